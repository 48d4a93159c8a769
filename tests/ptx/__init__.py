"""An emulator that runs the PTX of Triton's kernels on CPU tensors.

`Driver` stands in for a GPU of capability 8.0 or 9.0. Triton's own JIT specialises and compiles every launch for that
chip, and the PTX then runs here, thread by thread in numpy:

    driver = Driver(80, Options(seed=1)).activate()  # TRITON_INTERPRET must not be set in the process
    kernel[grid](tensor, ...)
    driver.reports[-1]

What it checks, and raises `Fault` for: global and shared memory is accessed within bounds and aligned; shared memory is
written before it is read; addresses, predicates and what is stored stand in registers that were set; all threads of a
program come to the same barriers; programs that wait for each other end; wgmma reads what was fenced. It raises `Races`
for accesses of one place by two warps or two programs that nothing orders (with races="warp", also by two lanes of a
warp). Different seeds give different orders of warps and programs, in which results should keep their bits. Tensor
cores truncate sums as hardware does, if `Options.truncates`. An instruction, or a form of one, that is not listed in
forms.py raises `Unknown` with its text.

What it can't check: what ptxas makes of the PTX (spilled registers, its order of instructions), time, and how real
memory behaves; code for capability 10.0 (tcgen05), TMA and mbarriers, clusters, generic addresses, products that
accumulate in float16; the errors of approximate instructions, which are computed exactly; the bits of NaN; registers
that wgmma reads and that are overwritten before it is waited for; an order of warps of one program that atomics alone
make, which is taken for a race. How many products a tensor core adds before it truncates, and with how many more bits,
differs between chips; the emulator does what was measured of several.
"""

from .errors import Fault, Races, Unknown
from .options import Options, Report

__all__ = ["Driver", "Fault", "Options", "Races", "Report", "Unknown"]


def __getattr__(name: str):
    if name == "Driver":  # imported on demand: it needs Triton, and the rest does not
        from .driver import Driver

        return Driver
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
