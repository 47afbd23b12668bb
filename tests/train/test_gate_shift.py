"""How far gates open after the closed form: the shift that leaves the least KL, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny import save_model, tokens

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.mixers.remix import Remix
from regraft.train.gate_shift import SHIFTS, choose_gate_shift, shift_gates


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(save_model(tmp_path_factory.mktemp("source") / "model"))


def build_student(source: Checkpoint) -> tuple[list, torch.nn.Module]:
    """A model whose linear branches matter: half the output comes from them."""
    student = modeling.materialize(Remix(keep="0", window=4, sinks=1, gate=0.0)(source)).eval()
    return modeling.slots(student), student


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_shift_is_the_one_that_gives_the_teacher(source: Checkpoint, shift: float) -> None:
    slots, student = build_student(source)
    gates = [slot.mixer.gate.bias for slot in slots[1:]]
    teacher = copy.deepcopy(student)
    with shift_gates(gates, -shift), torch.no_grad():
        assert choose_gate_shift(slots, student, teacher, tokens(2, 48)) == shift
        for mine, its in zip(student.parameters(), teacher.parameters(), strict=True):
            torch.testing.assert_close(mine, its)


def test_a_shift_is_taken_back(source: Checkpoint) -> None:
    slots, student = build_student(source)
    gates = [slot.mixer.gate.bias for slot in slots[1:]]
    before = [gate.detach().clone() for gate in gates]
    with pytest.raises(KeyboardInterrupt), shift_gates(gates, -2.0):
        raise KeyboardInterrupt
    for gate, value in zip(gates, before, strict=True):
        assert torch.equal(gate, value)


def test_a_model_without_gates_stays_as_it_is(source: Checkpoint) -> None:
    student = modeling.materialize(Remix("supra", keep="0", window=0)(source))
    before = copy.deepcopy(student.state_dict())
    found = choose_gate_shift(modeling.slots(student), student, student, tokens(1, 8))
    assert found is None
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
