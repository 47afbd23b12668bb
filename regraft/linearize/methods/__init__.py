"""Published ways to linearize, and ours: what is replaced by what, and which stages train it; one file each."""

from ..method import Leg, Method, find, names

__all__ = ["Leg", "Method", "find", "names"]
