"""Measuring a model: perplexity, KL to its teacher, benchmarks, recall, speed and memory."""
