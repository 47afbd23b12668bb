"""Tensor types with named axes, such as `Float[Tensor, "batch time hidden"]`.

The tests check them at every call.
"""

from jaxtyping import Bool, Float, Int

__all__ = ["Bool", "Float", "Int"]
