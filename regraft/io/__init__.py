"""Files on disk: safetensors, GGUF, JSON, outputs that appear whole or not at all; units."""
