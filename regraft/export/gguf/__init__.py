"""GGUF files for llama.cpp: its architectures, the tokenizer, the writer and the checks."""
