"""gemma: the first Gemma."""

from ..architecture import GELU, GGUFArchitecture

architecture = GGUFArchitecture(
    name="gemma",
    families=("gemma",),
    names="GEMMA",
    activations=GELU,
    ropes=("default",),
    tied=True,
)
