"""qwen2: Qwen2 and Qwen2.5."""

from ..architecture import GGUFArchitecture

architecture = GGUFArchitecture(
    name="qwen2",
    families=("qwen2",),
    names="QWEN2",
    biases="attn.q attn.k attn.v",
    square=True,
)
