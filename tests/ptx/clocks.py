"""What happened before what, across programs."""

import numpy as np


class Clock:
    """Accesses that happened before something.

    Attributes:
        epochs: Of each program, all its accesses in epochs before this one; an epoch ends with a barrier. [programs]
        threads: Of single threads, by (program, thread), the time up to which theirs did too.
    """

    def __init__(self, programs: int):
        self.epochs = np.zeros(programs, np.int32)
        self.threads: dict[tuple[int, int], int] = {}

    def copy(self) -> "Clock":
        made = Clock(0)
        made.epochs, made.threads = self.epochs.copy(), dict(self.threads)
        return made

    def merge(self, other: "Clock") -> None:
        """Adds what happened before something else."""
        np.maximum(self.epochs, other.epochs, out=self.epochs)
        for key, time in other.threads.items():
            self.threads[key] = max(self.threads.get(key, -1), time)

    def covers(self, program: int, thread: int, epoch: int, time: int) -> bool:
        """Returns whether an access happened before; thread -1 stands for several threads of the program."""
        return bool(epoch < self.epochs[program]) or self.threads.get((program, thread), -1) >= time
