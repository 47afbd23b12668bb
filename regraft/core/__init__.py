"""A model as named axes: signatures, parts of a family, lazy tensors with provenance, checkpoints,
steps.
"""
