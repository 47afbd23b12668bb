"""Linearization: softmax attention replaced by mixers of linear cost, methods, layers to keep."""
