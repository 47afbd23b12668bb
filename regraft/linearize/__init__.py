"""Softmax attention replaced by linear-cost mixers: the steps, published methods, which layers keep it."""
