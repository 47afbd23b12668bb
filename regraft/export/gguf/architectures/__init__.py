"""The architectures of llama.cpp that a stock class can be written as, one file each."""
