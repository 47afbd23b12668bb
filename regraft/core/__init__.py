"""A model as named axes: signatures, tables of families, lazy tensors, checkpoints, steps."""
