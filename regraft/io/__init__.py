"""Files on disk: safetensors, GGUF, JSON, and outputs that appear whole or not at all."""
