"""What each verb of the command line does."""

from .improve import compare, demo, run, train
from .make import grow, linearize, receipts
from .outcome import Outcome
from .planning import plan
from .use import bench, evaluate, generate

__all__ = [
    "Outcome",
    "bench",
    "compare",
    "demo",
    "evaluate",
    "generate",
    "grow",
    "linearize",
    "plan",
    "receipts",
    "run",
    "train",
]
