"""Models written as other classes that programs without regraft run, proven equal."""

from .target import ExportTarget, find_target, list_targets

__all__ = ["ExportTarget", "find_target", "list_targets"]
