"""starcoder2: StarCoder2 whose layers see everything."""

from ..architecture import GELU, GGUFArchitecture

architecture = GGUFArchitecture(
    name="starcoder2",
    families=("starcoder2",),
    names="STARCODER2",
    activations=GELU,
    biases="attn.q attn.k attn.v attn.o mlp.up mlp.down",
    needed="attn.o mlp.up mlp.down",
    square=True,
)
