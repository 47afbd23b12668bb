"""A signal, or a lost reader, while training: finish the step, write a checkpoint, then exit."""

from __future__ import annotations

import signal
from typing import NoReturn

from .. import distributed
from ..io.signals import SignalHandler, lost_reader
from ..progress import print_line


class StopSignals(SignalHandler):
    """Notes what asks a training run to stop while it is open; use it as a context."""

    def __enter__(self) -> StopSignals:
        super().__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        super().__exit__(*failure)
        # It came too late for the run to act on it: it counts for what follows.
        if self.number is not None and failure[0] is None:
            signal.raise_signal(self.number)

    @property
    def is_requested(self) -> bool:
        """Whether the run shall stop: a signal has come, or nobody reads its progress any more."""
        return (self.number or lost_reader()) is not None

    def exit_process(self, kept: str) -> NoReturn:
        """End the process with the status of the signal, and say what there is to resume.

        Every process of a torchrun calls it. Ctrl-C is a KeyboardInterrupt with that message.

        Args:
            kept: name of what is kept, empty when nothing is.
        """
        # One process may have been stopped by another one's signal.
        numbers = distributed.all_gather(self.number or lost_reader())
        number = signal.Signals(next(one for one in numbers if one))
        saved = (
            f"{kept} kept; run the same command again to resume"
            if kept
            else "no checkpoint yet: the same command begins anew"
        )
        message = f"stopped by {number.name}; {saved}"
        if number == signal.SIGINT:
            raise KeyboardInterrupt(message)
        if distributed.is_rank0():
            print_line(message)
        raise SystemExit(128 + number)
