"""Names of Adam's state on disk: `exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME`.

`NAME` is a weight's name in the checkpoint, or in the running model for the checkpoints of a run.
"""

from __future__ import annotations

from typing import Literal

# The running means of the gradient and of its square. Both have the shape of their weight.
MOMENTS: tuple[Literal["exp_avg", "exp_avg_sq"], ...] = ("exp_avg", "exp_avg_sq")
# The number of steps a weight was trained, a scalar.
STEP: Literal["step"] = "step"
# The file in a model's folder.
FILE = "optimizer.safetensors"
