"""Proofs about an output: parity at step 0, tensors accounted for, units that cannot learn."""
