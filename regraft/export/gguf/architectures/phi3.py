"""phi3: Phi-3 and Phi-4 whose layers see everything; llama.cpp computes no windows for them."""

from ..architecture import GGUFArchitecture

architecture = GGUFArchitecture(
    name="phi3",
    families=("phi3",),
    names="PHI3",
    ropes=("default", "linear"),
    partial=True,
    square=True,
)
