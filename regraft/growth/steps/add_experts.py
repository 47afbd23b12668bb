"""AddExperts: routed experts in place of the MLP, or more of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...core.anatomy import find_anatomy
from ...core.checkpoint import Checkpoint
from ...core.step import step_entry
from ...errors import RegraftError
from ..experts import CLASSES, ExpertTensors, build_expert_config, find_expert_family

TOP_K = 2  # experts that a token of a dense model is sent to, unless it is said
PAPERS = ("Sparse Upcycling, arXiv 2212.05055",)
DROP_PAPER = "Drop-Upcycling, arXiv 2502.19261"


@dataclass(frozen=True)
class AddExperts:
    """Give a model `experts` experts of which each token goes to `top_k` (sparse upcycling, arXiv
    2212.05055): copies of the MLP of a dense model, or of the experts that there are.

    A dense Llama or Mistral becomes a Mixtral, a Qwen 3 a Qwen3-MoE, a Qwen 2 a Qwen2-MoE. Gates of
    the chosen experts add to one, so equal experts give what the MLP gave, whatever a router
    chooses; routers begin at random. Qwen2-MoE's shared expert gives one half of the MLP, the
    others the rest. A model with experts gets whole sets of copies with the router's rows, and
    `top_k` times as many: the copies of an expert are chosen together and share its gate.

    Equal experts part in training as their tokens differ; copies with equal rows of the router do
    not without `noise`, relative to a tensor's standard deviation, or `reinit`, the share of every
    expert's neurons that are drawn anew with the mean and standard deviation of what was there
    (Drop-Upcycling, arXiv 2502.19261). Neither keeps the function.

    Preserves: the logits, up to rounding, without `noise` and `reinit`.
    Refuses: families without such a class, keys and sizes that the class does not have, numbers of
    experts that are no whole sets, and moments of an optimiser.
    """

    experts: int
    top_k: int | None = None
    noise: float = 0.0
    reinit: float = 0.0
    seed: int = 0

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The checkpoint with more experts."""
        self._check_options(source)
        to = find_expert_family(source)
        top_k = self._count_chosen(source)
        if source.anatomy.routed:
            sizes = {**source.sizes, "expert": self.experts}
            extra = {source.anatomy.routed: top_k}
            config = source.anatomy.resize_config(source.config, sizes, extra=extra)
        else:
            config = build_expert_config(source, to, self.experts, top_k)

        anatomy = find_anatomy(config)
        placed = anatomy.place(config)
        tensors = ExpertTensors(source, config, self.noise, self.reinit, self.seed)
        step = step_entry(replace(self, top_k=top_k)) | {"papers": list(PAPERS)}
        if self.reinit:
            step["papers"].append(DROP_PAPER)
        step["notes"] = self._describe(source, to, top_k)
        return replace(
            source,
            config=config,
            anatomy=anatomy,
            sizes=anatomy.solve(config),
            tensors={key: tensors.build(key, part) for key, part in placed.items()},
            names={key: part.name for key, part in placed.items()},
            history=(*source.history, step),
        )

    def _check_options(self, source: Checkpoint) -> None:
        if source.holds != "weights":
            raise RegraftError(
                f"routers of --experts {self.experts} have no moments: leave out --optimizer-state"
            )
        if not 0 <= self.noise < float("inf"):
            raise RegraftError(f"--expert-noise must be >= 0, not {self.noise}")
        if not 0 <= self.reinit <= 1:
            raise RegraftError(f"--expert-reinit is a share, 0 to 1, not {self.reinit}")

    def _count_chosen(self, source: Checkpoint) -> int:
        """Experts that a token goes to; RegraftError for numbers that cannot be."""
        routed = source.anatomy.routed
        if not routed:
            top_k = self.top_k or min(TOP_K, self.experts)
            if not 1 <= top_k <= self.experts:
                raise RegraftError(f"--top-k {top_k} of --experts {self.experts}: give no more")
            return top_k

        old = source.sizes["expert"]
        chosen = int(source.anatomy.fill_defaults(source.config)[routed])
        times = self.experts // old
        if times < 1 or self.experts % old:
            raise RegraftError(
                f"'{source.origin}' has {old} experts, and copies come in whole sets: use --experts"
                f" {max(times, 1) * old} or {(max(times, 1) + 1) * old}, not {self.experts}"
            )
        if self.top_k not in (None, times * chosen):
            raise RegraftError(
                f"--top-k {self.top_k} of {self.experts} experts changes the function: the copies"
                f" of an expert are chosen together, use --top-k {times * chosen}"
            )
        return times * chosen

    def _describe(self, source: Checkpoint, to: str, top_k: int) -> list[str]:
        """What a person should know."""
        notes = []
        if source.anatomy.routed and not (self.noise or self.reinit):
            notes.append(
                "copies of an expert have the same rows of the router and stay alike in training:"
                " --expert-noise or --expert-reinit parts them, inexactly"
            )
        if not source.anatomy.routed:
            shared = ", and one half from the shared expert" if CLASSES[to].has_shared else ""
            notes.append(
                f"{source.anatomy.family} is written as {to}: every token gets {top_k} of"
                f" {self.experts} copies of its MLP{shared}"
            )
        if self.noise or self.reinit:
            notes.append(
                f"not exact: noise {self.noise:g} on experts, {self.reinit:g} of their neurons anew"
            )
        return notes
