"""Quantised weights as plain tensors: a file a scheme, with the tensors that it stores."""
