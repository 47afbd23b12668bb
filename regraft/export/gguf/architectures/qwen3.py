"""qwen3: dense Qwen3, with norms of queries and keys."""

from ..architecture import GGUFArchitecture

architecture = GGUFArchitecture(name="qwen3", families=("qwen3",), names="QWEN3")
