"""Instructions that are ready to run."""

from collections.abc import Callable
from dataclasses import dataclass, field

from .parse import Instruction

COMPUTE, EFFECT, BRANCH, EXIT, BARRIER = range(5)
WAIT, YIELD = "wait", "yield"  # what a group hands to the scheduler: it is at a barrier; others may run in between


@dataclass(slots=True)
class Step:
    """One instruction, ready to run.

    Attributes:
        instruction: What was parsed.
        kind: COMPUTE, EFFECT, BRANCH, EXIT or BARRIER.
        predicate: The register that guards it, or None.
        negated: Whether it is guarded by that register's negation.
        leader: Whether threads that parted may meet before it.
        target: Where a branch leads.
        run: Of COMPUTE, the function of the sources' bits that returns the destination's; of EFFECT, a function of
            (group, mask) that returns YIELD or None.
        destination: Of COMPUTE, the register that is written.
        sources: Of COMPUTE, the registers that are read.
        count: How often warps executed it in the launch that runs.
    """

    instruction: Instruction
    kind: int
    predicate: int | None
    negated: bool
    leader: bool
    target: int
    run: Callable | None = None
    destination: int | None = None
    sources: list[int] = field(default_factory=list)
    count: int = 0
