"""One run of a comparison in a process of its own: python -m regraft.compare OUT (source|arm) NAME SEED."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from ..progress import quiet

EVERY = 1.0  # seconds between notes to the parent


def main(words: list[str]) -> int:
    """0 done; 2 with one line on standard error."""
    quiet()
    import torch

    from .. import distributed
    from ..errors import RegraftError
    from ..io.files import write_text
    from . import arm, scheduler

    out, kind, name, seed = Path(words[0]), words[1], words[2], int(words[3])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    parent, said = os.getppid(), 0.0

    def report_progress(share: float) -> None:
        """Leave a note on how far this run is; end with the parent."""
        nonlocal said
        if os.getppid() != parent:
            sys.exit("the comparison was stopped")
        if time.monotonic() - said > EVERY and distributed.is_rank0():
            said = time.monotonic()
            write_text(
                scheduler.TrainingJob(kind, name, seed).log_path(out).with_suffix(".share"),
                f"{share:.4f}",
            )

    try:
        with distributed.init_distributed():
            recipe = scheduler.load_recipe(out)
            (arm.pretrain if kind == "source" else arm.train_arm)(
                recipe, out, name, seed, report_progress
            )
    except (RegraftError, OSError) as error:
        print(f"regraft: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
