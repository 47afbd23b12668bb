"""Published methods of linearization, and ours, one file each.

A file says what is replaced by what, which stages train it, and what differs from the paper.
"""

from ..method import Method, StageShare, find_method, list_methods

__all__ = ["StageShare", "Method", "find_method", "list_methods"]
