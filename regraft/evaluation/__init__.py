"""Measuring a model: perplexity and divergence from a teacher, baselines, speed and memory."""
