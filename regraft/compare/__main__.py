"""One run of a comparison as a process: python -m regraft.compare OUT source|arm NAME SEED."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from ..progress import quiet

SECONDS_BETWEEN_NOTES = 1.0


def main(arguments: list[str]) -> int:
    """Train the run; 0 when done, else the exit code of the command line.

    Args:
        arguments: the comparison's folder, `source` or `arm`, its name, the seed.
    """
    # Before torch and transformers are imported, whose warnings would hide the error's line.
    quiet()
    import torch

    from .. import distributed
    from ..io.failures import report_failure
    from ..io.files import write_text
    from ..io.signals import StopAtOnce
    from . import arm, scheduler

    out, kind, name, seed = Path(arguments[0]), arguments[1], arguments[2], int(arguments[3])
    job = scheduler.TrainingJob(kind, name, seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    parent, last_note = os.getppid(), 0.0

    def report_progress(share: float) -> None:
        """Leave a note on how far this run is; end with the parent."""
        nonlocal last_note
        # A killed scheduler cannot end its runs: its children see that they have another parent.
        if os.getppid() != parent:
            sys.exit("the comparison was stopped")
        if time.monotonic() - last_note > SECONDS_BETWEEN_NOTES and distributed.is_rank0():
            last_note = time.monotonic()
            write_text(job.progress_path(out), f"{share:.4f}")

    train = arm.pretrain if kind == "source" else arm.train_arm
    try:
        with StopAtOnce(), distributed.init_distributed():
            train(scheduler.load_recipe(out), out, name, seed, report_progress)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return report_failure(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
