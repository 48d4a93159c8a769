"""Who accessed what: finds data races by what happened before what.

Two accesses of one place are ordered by a thread's program order; by a barrier of their program between them; and
across programs by a release after the first and an acquire before the second that reads from it, each by the thread of
the access itself or by another that a barrier orders. That is the causality of PTX's memory model, in which bar.sync is
cumulative.
"""

import numpy as np

_MOST = 1 << 22  # entries that are kept of reads


class Shadow:
    """The last write of each place, and the last reads by each program.

    Args:
        places: How many places there are.
        programs: How many programs may access them. Where that makes too many entries, programs share columns, and
            what is known is the last program that read.
    """

    def __init__(self, places: int, programs: int):
        programs = min(programs, max(1, _MOST // places))
        self.program, self.thread, self.epoch, self.step = (np.full(places, -1, np.int32) for _ in range(4))
        self.time = np.zeros(places, np.int64)
        self.atomic = np.zeros(places, bool)
        size = places, programs
        self.read_program, self.read_thread, self.read_step, self.read_epoch = (
            np.full(size, -1, np.int32) for _ in range(4)
        )
        self.read_warps = np.zeros(size, np.uint32)
        self.read_time = np.zeros(size, np.int64)

    def check(self, at, threads, cta, time, step, write, atomic, same, report):
        """Records accesses, and reports those that race with earlier ones.

        Args:
            at: The places, [accesses].
            threads: The threads that access them, [accesses].
            cta: Their program.
            time: Number of this access among all.
            step: Number of its instruction.
            write: Whether it writes.
            atomic: Whether it is an atomic or a strong access.
            same: Of writes, which of them change nothing, and so race with no earlier access, [accesses]; or None.
            report: Called as report(kind, places, programs, threads, steps, own threads) with what races; the middle
                three are those of the earlier accesses.
        """
        raced = self._unordered_write(at, threads, cta, atomic)
        if same is not None:
            raced &= ~same
        if raced.any():
            i = np.flatnonzero(raced)
            earlier = (known[at[i]] for known in (self.program, self.thread, self.step))
            report("write-write" if write else "write-read", at[i], *earlier, threads[i])
        column = cta.number % self.read_epoch.shape[1]
        if write:
            self._check_reads(at, threads, cta, same, column, report)
            self.program[at], self.thread[at], self.epoch[at] = cta.number, threads, cta.epoch
            self.time[at], self.step[at], self.atomic[at] = time, step, atomic
        elif not atomic:
            self._record_read(at, threads, cta, time, step, column)

    def _unordered_write(self, at, threads, cta, atomic):
        """Returns where the last write did not happen before these accesses, [accesses]."""
        by, thread, time = self.program[at], self.thread[at], self.time[at]
        raced = by >= 0
        if atomic:
            raced &= ~self.atomic[at]
        if not raced.any():
            return raced
        warps, epoch, mine = threads >> 5, self.epoch[at], by == cta.number
        ordered = (epoch < cta.epoch) | (thread == threads)
        ordered |= (thread >> 5 == warps) & (cta.lenient | (time < cta.warp_synced[warps]))
        if not mine.all():
            ordered = np.where(mine, ordered, epoch < cta.clock.epochs[np.maximum(by, 0)])
        raced &= ~ordered
        if cta.has_acquired:
            for i in np.flatnonzero(raced & ~mine):
                raced[i] = not cta.heard(int(threads[i]), int(by[i]), int(thread[i]), int(epoch[i]), int(time[i]))
        return raced

    def _check_reads(self, at, threads, cta, same, column, report):
        """Reports earlier reads that did not happen before these writes."""
        by, epochs = self.read_program[at], self.read_epoch[at]
        raced = (by >= 0) & (by != cta.number) & (epochs >= cta.clock.epochs[by])
        own = (by[:, column] == cta.number) & (epochs[:, column] == cta.epoch)
        others = self.read_warps[at, column] & ~(np.uint32(1) << (threads >> 5).astype(np.uint32))
        raced[:, column] |= own & (others != 0)
        if same is not None:
            raced &= ~same[:, None]
        if not raced.any():
            return
        i, j = np.nonzero(raced)
        places, by, reader = at[i], by[i, j], self.read_thread[at[i], j]
        if cta.has_acquired:
            known = zip(threads[i], by, reader, epochs[i, j], self.read_time[places, j], strict=True)
            left = [
                one for one, access in enumerate(known) if by[one] == cta.number or not cta.heard(*map(int, access))
            ]
            i, j, places, by, reader = (array[left] for array in (i, j, places, by, reader))
        if len(i):
            report("read-write", places, by, reader, self.read_step[places, j], threads[i])

    def _record_read(self, at, threads, cta, time, step, column):
        first = (self.read_epoch[at, column] != cta.epoch) | (self.read_program[at, column] != cta.number)
        if first.any():
            new = at[first]
            self.read_warps[new, column], self.read_epoch[new, column] = 0, cta.epoch
            self.read_program[new, column], self.read_thread[new, column] = cta.number, threads[first]
        warps = threads >> 5
        if warps[0] == warps[-1] and (warps == warps[0]).all():
            self.read_warps[at, column] |= np.uint32(1 << int(warps[0]))
        else:  # one place may stand here for several warps
            np.bitwise_or.at(self.read_warps, (at, column), np.uint32(1) << warps.astype(np.uint32))
        self.read_thread[at[self.read_thread[at, column] != threads], column] = -1  # several read it
        self.read_time[at, column], self.read_step[at, column] = time, step
