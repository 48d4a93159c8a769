"""One launch: its programs, in which order they run, and what is found in it."""

import random

import numpy as np

from .clocks import Clock
from .cta import Cta
from .errors import Fault
from .memory import Global
from .options import Options, Race, Report
from .parse import TYPES
from .program import Program
from .steps import WAIT


class Machine:
    """One launch.

    Args:
        program: What runs.
        grid: Programs along x, y and z.
        shared: Bytes of shared memory that the launch asks for.
        memory: The tensors.
        params: What each parameter holds, as an unsigned integer, by name.
        options: What is checked, and in which order things run.
        cooperative: Whether all programs have to be resident at once.
    """

    def __init__(
        self, program: Program, grid: tuple[int, int, int], shared: int, memory: Global, params: dict[str, int],
        options: Options, cooperative: bool = False,
    ):  # fmt: skip
        self.program, self.grid, self.memory, self.params = program, grid, memory, params
        self.options, self.cooperative = options, cooperative
        self.threads = program.kernel.threads
        self.warps = self.threads // 32
        self.ctas = grid[0] * grid[1] * grid[2]
        self.shared = max(shared, program.kernel.static)
        self.granule = _granule(program)
        self.time = 0  # of accesses
        self.idle = 0  # atomics and strong loads, since something changed
        self.released: dict[int, Clock] = {}  # by address
        self.report = Report(program.kernel.name, grid, self.warps)
        self.random = random.Random(options.seed)
        self._found: dict[tuple, Race] = {}
        self._notes: dict[tuple, Race] = {}

    def race(self, kind, space, places, ctas, earlier, steps, cta, own, step, one_instruction=False) -> None:
        """Records accesses that race.

        Args:
            kind: Such as "read-write".
            space: The memory that both accessed.
            places: Granules, [races].
            ctas: Whose programs' the earlier accesses were: [races], or one for all.
            earlier: Their threads, likewise; -1 stands for several.
            steps: Their instructions, likewise.
            cta: The program that accesses now.
            own: Its threads, [races] or one.
            step: Its instruction.
            one_instruction: Whether both accesses are of one instruction, which is a note.
        """
        first, second = kind.split("-")
        arrays = np.broadcast_arrays(places, ctas, earlier, steps, own)
        for i in range(min(len(places), 4)):
            place, by, thread, earlier_step, mine = (int(array[i]) for array in arrays)
            before, now = (self.program.steps[s].instruction for s in (earlier_step, step))
            scope = "grid" if by != cta else "warp" if thread >= 0 and thread >> 5 == mine >> 5 else "cta"
            lanes = one_instruction and scope == "warp"
            found = self._notes if lanes else self._found
            key = kind, space.name, before.text, before.place, now.text, now.place, scope
            if key in found:
                found[key].times += len(places) if i == 0 else 0
                continue
            found[key] = Race(
                kind, "shared" if space.written is not None else f"global {space.name}", "lanes" if lanes else scope,
                f"granule {place} of {space.granule} bytes",
                f"{first} by CTA {by} thread {thread}: {before.text}  at {before.place}",
                f"{second} by CTA {cta} thread {mine}: {now.text}  at {now.place}",
                len(places) if i == 0 else 1,
            )  # fmt: skip

    def note(self, kind: str, space, place: int, first: str, second: str) -> None:
        """Records what may be intended, once for each kind and pair of accesses."""
        where = f"granule {place} of {space.granule} bytes"
        note = self._notes.setdefault((kind, first, second), Race(kind, "shared", "cta", where, first, second, 0))
        note.times += 1

    def run(self) -> Report:
        """Runs the launch to its end.

        Raises:
            Fault: A check failed, or programs wait for what never comes.
        """
        with np.errstate(all="ignore"):
            self._schedule()
        self.report.races, self.report.notes = list(self._found.values()), list(self._notes.values())
        for step in self.program.steps:
            if step.count:
                self.report.steps += step.count
                self.report.classes[step.instruction.opcode] += step.count
                step.count = 0
        return self.report

    def _schedule(self) -> None:
        options, rng = self.options, self.random
        order = list(range(self.ctas))
        most = self.ctas if self.cooperative else 1
        if options.seed is not None:
            most = self.ctas if self.cooperative else rng.choice([2, 4, self.ctas])
            rng.shuffle(order)
        most = options.resident or most
        order.reverse()
        live: list[Cta] = []
        last = None
        while order or live:
            while order and len(live) < most:
                live.append(Cta(self, order.pop()))
            ready = [(cta, group) for cta in live for group in cta.running if group not in cta.waiting]
            cta, group = last = self._pick(ready, last)
            try:
                if next(cta.running[group]) is WAIT:
                    cta.waiting.add(group)
            except StopIteration:
                self.idle = 0
                del cta.running[group]
                if not cta.running:
                    live.remove(cta)
            if self.idle > options.most_polls:
                waiting = [one.number for one in live]
                raise Fault(f"deadlock: {self.idle} atomics that changed nothing, by CTAs {waiting}")
            if cta.waiting and len(cta.waiting) == len(cta.running):
                cta.meet()

    def _pick(self, ready, last):
        """Returns which (program, group) runs next."""
        if self.options.seed is None:
            if (self.cooperative or self.idle) and last in ready:  # in turn: one may wait for another
                return ready[(ready.index(last) + 1) % len(ready)]
            return ready[0]
        eager = self.options.seed % 2  # lets one warp run until it has to wait, else switches at every chance
        if eager and last in ready and self.random.random() < 0.9:
            return last
        return self.random.choice(ready)


def _granule(program: Program) -> int:
    """Returns the bytes of the places by which shared memory is watched: the least that an instruction accesses."""
    least = 4
    for step in program.steps:
        parts = step.instruction.parts
        if parts[0] in ("ld", "st", "atom") and {"shared", "shared::cta"} & set(parts):
            least = min(least, TYPES[parts[-1]].itemsize)
        elif parts[0] in ("ldmatrix", "stmatrix"):
            least = min(least, 2)
    return least
