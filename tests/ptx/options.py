"""What a launch is asked to check, and what it reports."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Options:
    """What is checked, and in which order things run.

    Attributes:
        seed: None for one warp after the other and one program after the other, else the seed of a random order.
        lockstep: Whether all warps of a program run in step, which is the fastest.
        races: "off", "cta" (between warps and between programs) or "warp" (also between lanes of a warp that no
            bar.warp.sync orders).
        uninit: Whether it is a fault to read shared memory that was not written.
        counts: Whether conflicts in the banks of shared memory are counted, which takes a third of the time, and bytes
            that several threads of an instruction access only once.
        resident: Most programs at once. None: all where the launch is cooperative, else what the seed picks.
        raise_races: Whether a launch with races raises, instead of only reporting them.
        truncates: Whether tensor cores cut sums to float32, as hardware does; else they round to nearest.
        most_polls: Atomics and strong loads in a row that change nothing, after which a launch is in deadlock.
    """

    seed: int | None = None
    lockstep: bool = False
    races: str = "cta"
    uninit: bool = True
    counts: bool = False
    resident: int | None = None
    raise_races: bool = True
    truncates: bool = True
    most_polls: int = 20_000

    def __post_init__(self):
        if self.races not in ("off", "cta", "warp"):
            raise ValueError(f'races must be "off", "cta" or "warp", not {self.races!r}')


@dataclass
class Race:
    """Accesses of one place that nothing orders.

    Attributes:
        kind: Such as "read-write", in the order in which they ran.
        space: Which memory.
        scope: "lanes" (of one instruction), "warp", "cta" or "grid": the least that holds both.
        where: One place.
        first: The access that ran before.
        second: The access that ran after it.
        times: How many places there are.
    """

    kind: str
    space: str
    scope: str
    where: str
    first: str
    second: str
    times: int = 1

    def __str__(self):
        return (
            f"{self.kind} race in {self.space} memory ({self.scope}), {self.times} elements, e.g. {self.where}:\n"
            f"    {self.first}\n    {self.second}"
        )


@dataclass
class Report:
    """What a launch did.

    Attributes:
        kernel: Name of the kernel.
        grid: Programs along each axis.
        warps: Warps of a program.
        steps: Instructions that warps executed, in total.
        seconds: How long the launch took here.
        classes: How often warps executed each opcode.
        bytes: Bytes of global memory that were read, were written and were changed by atomics.
        conflicts: Extra passes through the banks of shared memory, by bytes that a thread accesses (Options.counts).
        races: The data races.
        notes: What may be intended: lanes of one instruction that store different values to one place, and copies
            that wgmma read without a proxy fence.
    """

    kernel: str = ""
    grid: tuple[int, ...] = ()
    warps: int = 0
    steps: int = 0
    seconds: float = 0.0
    classes: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    conflicts: Counter = field(default_factory=Counter)
    races: list[Race] = field(default_factory=list)
    notes: list[Race] = field(default_factory=list)
