"""A planned training run: GPUs as their datasheets have them, batch, budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import RegraftError
from ..io.units import parse_number

DEFAULT_PEAK_SHARE = 0.35


@dataclass(frozen=True)
class Gpu:
    """An accelerator as its vendor's datasheet has it.

    Attributes:
        bfloat16: dense TFLOP/s.
        float32: TFLOP/s, without TF32.
        memory: GB (10^9 bytes).
    """

    bfloat16: float
    float32: float
    memory: int


# Datasheets of NVIDIA and AMD. NVIDIA's bfloat16 figures are with sparsity, twice these.
GPUS = {
    "a10": Gpu(125, 31.2, 24),
    "a100": Gpu(312, 19.5, 80),
    "a100-40": Gpu(312, 19.5, 40),
    "b200": Gpu(2250, 75, 180),
    "h100": Gpu(989, 67, 80),
    "h100-pcie": Gpu(756, 51, 80),
    "h200": Gpu(989, 67, 141),
    "l4": Gpu(121, 30.3, 24),
    "l40s": Gpu(362, 91.6, 48),
    "mi300x": Gpu(1307, 163.4, 192),
}


@dataclass(frozen=True)
class TrainingForecastRequest:
    """What is planned. RegraftError for values that make no sense.

    Attributes:
        gpus: how many, over which FSDP2 shards everything.
        memory: bytes of each, such as `80GB`; None for what `gpu` has.
        tokens: budget, such as `1B`; None when only a step is asked for.
        length: tokens of a row.
        batch: rows of a step over all GPUs; None for what fits at once.
        checkpointing: whether layers are computed again in the backward pass instead of kept.
        precision: of products; weights, gradients and Adam's state are float32 either way.
        gpu: key of `GPUS`.
        price: of one GPU for an hour, in any currency.
        stage: what is trained.
        share: of the GPU's peak that training is assumed to reach.
    """

    gpus: int = 1
    memory: str | None = None
    tokens: str | None = None
    length: int = 1024
    batch: int | None = None
    checkpointing: bool = False
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    gpu: str = "h100"
    price: float | None = None
    stage: Literal["align", "distil", "next"] = "distil"
    share: float = DEFAULT_PEAK_SHARE

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise RegraftError(
                f"no datasheet of '{self.gpu}' here: give one of {', '.join(GPUS)}, and --memory"
            )
        if min(self.gpus, self.length) < 1 or not 0 < self.share <= 1:
            raise RegraftError(
                f"{self.gpus} GPUs, rows of {self.length}, share {self.share} of the peak: "
                "give 1 or more, and a share above 0, at most 1"
            )
        # Every GPU gets the same number of rows: FSDP steps in lockstep.
        if self.batch is not None and (self.batch < 1 or self.batch % self.gpus):
            raise RegraftError(
                f"batch is {self.batch} rows for {self.gpus} GPUs: give a multiple of {self.gpus}"
            )
        if self.memory_bytes < 1 or (self.tokens and parse_number(self.tokens, "tokens") < 1):
            raise RegraftError(
                f"memory '{self.memory}', tokens '{self.tokens}': give more than nothing"
            )

    @property
    def memory_bytes(self) -> int:
        """Memory of one GPU."""
        return parse_number(self.memory, "memory") if self.memory else GPUS[self.gpu].memory * 10**9

    @property
    def rows_per_gpu(self) -> int | None:
        """A GPU's rows of a step; None when they are what fits."""
        return self.batch // self.gpus if self.batch else None
