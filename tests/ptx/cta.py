"""One program (CTA) of a launch: its warps, its shared memory, and what of the others happened before."""

import numpy as np

from .clocks import Clock
from .errors import Fault
from .group import Group
from .memory import shared


class Cta:
    """One program.

    Attributes:
        machine: The launch.
        number: Which of its programs it is.
        at: The same along each axis of the grid.
        epoch: How many barriers it came through.
        clock: What happened before all that its threads do now.
        acquired: What happened before single threads since the last barrier, by thread.
        lenient: Whether lanes of a warp do not race.
        warp_synced: Time of the last bar.warp.sync of each warp.
        fenced: Time of the last proxy fence of each thread.
        shared: Its shared memory.
        groups: Its warps, as they run together.
        running: What executes each group that has not ended.
        waiting: The groups that wait at a barrier.
        barriers: Where they wait: (number of the instruction, place in the source).
    """

    def __init__(self, machine, number: int):
        self.machine, self.number = machine, number
        x, y, _ = machine.grid
        self.at = number % x, number // x % y, number // x // y
        self.epoch = 0
        self.clock = Clock(machine.ctas)
        self.acquired: dict[int, Clock] = {}
        self.lenient = machine.options.races != "warp"
        self.warp_synced = np.zeros(machine.warps, np.int64)
        self.fenced = np.full(machine.threads, -1, np.int64)
        self.shared = shared(machine.shared, machine.granule)
        width = machine.program.width
        self.groups = [Group(self, machine.program, first) for first in range(0, machine.threads, width)]
        self.running = {group: group.run() for group in self.groups}
        self.waiting: set[Group] = set()
        self.barriers: set[tuple[int, str]] = set()

    @property
    def has_acquired(self) -> bool:
        """Whether its threads may have heard of more than its clock's epochs."""
        return bool(self.acquired or self.clock.threads)

    def meet(self) -> None:
        """Opens the barrier at which all groups wait.

        Raises:
            Fault: They wait at different ones, or some have ended.
        """
        if len(self.running) < len(self.groups):
            raise Fault(f"warps of CTA {self.number} wait at {sorted(self.barriers)}, and others have ended")
        if len(self.barriers) > 1:
            raise Fault(f"warps of CTA {self.number} wait at different barriers: {sorted(self.barriers)}")
        self.barriers.clear()
        self.waiting.clear()
        self.epoch += 1
        for clock in self.acquired.values():
            self.clock.merge(clock)
        self.acquired.clear()

    def heard(self, thread: int, cta: int, by: int, epoch: int, time: int) -> bool:
        """Returns whether an access by thread `by` of `cta` happened before what `thread` does now."""
        if self.clock.covers(cta, by, epoch, time):
            return True
        acquired = self.acquired.get(thread)
        return acquired is not None and acquired.covers(cta, by, epoch, time)

    def release(self, thread: int, address: int) -> None:
        """Orders what happened before `thread` came here before what follows an acquire from this address."""
        clock = self.clock.copy()
        if thread in self.acquired:
            clock.merge(self.acquired[thread])
        clock.epochs[self.number] = self.epoch
        clock.threads[self.number, thread] = self.machine.time
        if address in self.machine.released:  # an atomic continues what was released before
            clock.merge(self.machine.released[address])
        self.machine.released[address] = clock

    def acquire(self, thread: int, address: int) -> None:
        """Orders what was released at this address before what `thread` does from now on."""
        released = self.machine.released.get(address)
        if released is not None:
            self.acquired.setdefault(thread, Clock(self.machine.ctas)).merge(released)
