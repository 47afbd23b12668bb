"""Tensor types with named axes, such as `Float[Tensor, "batch time hidden"]`; checked while the
tests run.
"""

from jaxtyping import Bool, Float, Int

__all__ = ["Bool", "Float", "Int"]
