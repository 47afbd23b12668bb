"""flash-linear-attention's kernels, played by a stand-in with their signatures; the real ones where
there is a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.mixers import LIGER, RADLADS, SHAPES, made, projections, relative, rotary
from torch import Tensor

from regraft.mixers import kernels
from regraft.mixers.base import Mixer, MixerContext
from regraft.mixers.recurrence import naive_recurrence
from regraft.mixers.vector import naive_vector

SPECS = {
    "gated_delta_rule": [{"name": "gated_deltanet"}, {"name": "gated_deltanet", "grouped": False}],
    "simple_gla": [{"name": "lightning", "grouped": True}, {"name": "hedgehog"}, {"name": "supra"}],
    "gla": [{"name": "gla"}, {"name": "gla"} | LIGER, {"name": "rwkv6"} | RADLADS],
    "rwkv6": [{"name": "rwkv6"}, {"name": "rwkv6", "decay": "static", "grouped": True}],
}
CASES = [(operation, spec) for operation, specs in SPECS.items() for spec in specs]
ATTENTION = SHAPES["9-heads-3-kv"]


def stand_in(operation: str, calls: list[tuple]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function that takes and gives what `fla.ops.<operation>.chunk_<operation>` does."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        extra: Tensor | None = None,
        *,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        calls.append((operation, q.dtype, cu_seqlens is not None, initial_state is not None))
        assert (
            scale == 1.0
            and output_final_state
            and q.shape == k.shape
            and q.dtype == k.dtype == v.dtype
        )
        assert g.dtype == torch.float32 and all(t.is_contiguous() for t in (q, k, v, g))
        assert (
            g.shape == (q.shape if operation in ("gla", "rwkv6") else q.shape[:3])
            and v.shape[:3] == q.shape[:3]
        )
        assert extra is None or extra.shape == (
            q.shape[2:] if operation == "rwkv6" else q.shape[:3]
        )
        assert (extra is None) == (operation in ("gla", "simple_gla"))
        rows = [(row, slice(None)) for row in range(len(q))]
        if cu_seqlens is not None:
            assert len(q) == 1 and initial_state is None
            rows = [(0, slice(a, b)) for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
        outputs, states = [], []
        for index, (row, span) in enumerate(rows):
            parts = [t[row : row + 1, span].float().transpose(1, 2) for t in (q, k, v, g)]
            start = None if initial_state is None else initial_state[index : index + 1]
            if operation == "gated_delta_rule":
                out, last = naive_recurrence(
                    *parts, extra[row : row + 1, span].transpose(1, 2), None, start
                )
            elif operation == "simple_gla":
                out, last = naive_recurrence(*parts, None, None, start)
            else:
                out, last = naive_vector(*parts, extra, None, start)
            outputs.append(out.transpose(1, 2))
            states.append(last)
        whole = torch.cat(outputs, 1 if cu_seqlens is not None else 0)
        return whole.to(v.dtype), torch.cat(states)

    return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """What the stand-ins were asked for; they stand in for tensors of this machine's processor."""
    found: list[tuple] = []
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "find_kernel", lambda operation: stand_in(operation, found))
    yield found


def runs(mixer: Mixer) -> list[Tensor]:
    """Outputs and gradients of two pieces in a row, of padded rows, and of packed ones."""
    torch.manual_seed(1)
    x = torch.randn(2, 90, 36)
    place = lambda begin, end: rotary(torch.arange(begin, end).expand(2, -1), ATTENTION)  # noqa: E731
    first, state = mixer(x[:, :70], MixerContext(place(0, 70)))
    second, state = mixer(x[:, 70:], MixerContext(place(70, 90)), state)
    valid = torch.ones(2, 90, dtype=torch.bool)
    valid[0, :13] = False
    padded, last = mixer(x, MixerContext(place(0, 90), valid))
    segments = torch.tensor([[0, 1, 1, 2, 3], [4, 4, 4, 4, 5]]).repeat_interleave(18, 1)
    packed, _ = mixer(x, MixerContext(place(0, 90), None, segments))
    found = [first, second, padded * valid.unsqueeze(-1), packed, state["matrix"], last["matrix"]]
    total = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in found)
    return [*found, *torch.autograd.grad(total, projections(mixer))]


@pytest.mark.parametrize(("operation", "spec"), CASES, ids=lambda value: str(value))
def test_kernels_give_what_the_chunked_forms_give(
    operation: str, spec: dict, calls: list[tuple]
) -> None:
    mixer = made(spec, ATTENTION)
    fast, used = runs(mixer), list(calls)
    float32 = (operation, torch.float32)
    assert used == [
        (*float32, False, False),
        (*float32, False, True),
        (*float32, False, False),
        (*float32, True, False),
    ]
    kernels.DEVICE = "no such device"
    for a, b in zip(fast, runs(mixer), strict=True):
        assert relative(a, b) < 1e-4
    assert calls == used


def test_half_precision_goes_into_the_kernel_and_float32_comes_back(calls: list[tuple]) -> None:
    mixer = made({"name": "gla"}, ATTENTION).to(torch.bfloat16)
    y, state = mixer(torch.randn(2, 20, 36, dtype=torch.bfloat16), MixerContext())
    assert [call[1] for call in calls] == [torch.bfloat16]
    assert y.dtype == torch.bfloat16 and state["matrix"].dtype == torch.float32


def test_what_no_kernel_does(calls: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = made({"name": "gated_deltanet", "rotary": False}, ATTENTION), torch.randn(2, 20, 36)
    _, state = mixer(x[:, :1], MixerContext())
    assert not calls  # one token: the equation itself
    mixer(x, MixerContext(segments=torch.zeros(2, 20, dtype=torch.long)), state)
    assert not calls  # packed rows that go on from a state
    monkeypatch.setattr(kernels, "MAX_KEY_DIM", 9)
    mixer(x, MixerContext())
    assert not calls  # keys wider than the kernel takes
    monkeypatch.setattr(kernels, "find_kernel", lambda operation: None)
    monkeypatch.setattr(kernels, "MAX_KEY_DIM", 256)
    assert torch.isfinite(mixer(x, MixerContext())[0]).all() and not calls  # not installed


def test_a_processor_never_asks_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kernels, "find_kernel", lambda operation: pytest.fail(f"asked for {operation}")
    )
    made({"name": "gla"}, ATTENTION)(torch.randn(1, 20, 36), MixerContext())


def test_a_kernel_that_is_not_there_is_none() -> None:
    assert kernels.find_kernel.__wrapped__("no_such_operation") is None


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("fla") is None,
    reason="no GPU with flash-linear-attention here",
)
@pytest.mark.parametrize(("operation", "spec"), CASES, ids=lambda value: str(value))
def test_real_kernels_on_a_gpu(operation: str, spec: dict) -> None:
    mixer, x = made(spec, ATTENTION), torch.randn(2, 90, 36)
    segments = torch.tensor([[0, 1, 1, 2, 3], [4, 4, 4, 4, 5]]).repeat_interleave(18, 1)
    for ids in (None, segments):
        with torch.no_grad():
            expected = mixer.cpu()(x, MixerContext(segments=ids))[0]
            found = mixer.cuda()(
                x.cuda(), MixerContext(segments=None if ids is None else ids.cuda())
            )[0]
        assert relative(found.cpu(), expected) < 2e-2
