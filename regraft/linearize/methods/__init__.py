"""Published ways to linearize, and ours: what is replaced by what, and which stages train it; one file each."""

from ..method import Method, StageShare, find_method, list_methods

__all__ = ["StageShare", "Method", "find_method", "list_methods"]
