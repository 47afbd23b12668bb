"""gpt2: GPT-2, with learned positions."""

from ..architecture import GELU, GGUFArchitecture

architecture = GGUFArchitecture(
    name="gpt2",
    families=("gpt2",),
    names="GPT2",
    activations=GELU,
    biases="attn.qkv attn.o mlp.up mlp.down",
)
