"""What a step of the affine cell would take on one path or another: predictions, which no GPU has measured, by which
affine_steps.py and affine_grid.py tell whether they are worth taking."""

from .launch import affine_grid, affine_steps
from .space import PROCESSORS, SHARED

# What these rules reckon with, of an H200: FLOP/s of cuBLAS by what the cell multiplies in, bytes/s, the seconds of
# a launch, and the share of cuBLAS' rate that the kernel reaches.
RATES = {"fp32": 60e12, "tf32": 395e12, "bf16": 790e12}
BANDWIDTH, LAUNCH, SHARE = 4.3e12, 2e-6, 0.7


def affine_seconds(*, rows: int, features: int, terms: int, cell: str) -> tuple[float, float]:
    """(of a launch here, of cuBLAS and a fused step after it): a prediction, which no GPU has measured.

    Here: waves of tiles on PROCESSORS, each 2 BLOCK_M BLOCK_N D FLOP a term, or W's bytes if they take longer, then
    22 bytes an element. Apart: 2 B D^2 FLOP in `cell`, a key of RATES, or W's bytes, then 24 bytes an element (z and u
    read, y written; y and z read, z written) and a second launch.
    """
    config = affine_steps(batch=rows, features=features, terms=terms)
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    waves = -(-(-(-rows // block_m) * -(-features // block_n)) // PROCESSORS)
    tile = 2 * block_m * block_n * features * terms / (SHARE * RATES["bf16"] / PROCESSORS)
    here = max(waves * tile, 2 * terms * features**2 / BANDWIDTH)
    itemsize = 2 if cell == "bf16" else 4
    apart = max(2 * rows * features**2 / RATES[cell], itemsize * features**2 / BANDWIDTH)
    state = rows * features / BANDWIDTH
    return LAUNCH + here + 22 * state, 2 * LAUNCH + apart + 24 * state


# And bytes/s of L2 for one multiprocessor and for all, seconds until one sees
# what another has written, those of a step's own work, those in which Python launches a kernel, and steps of a solve.
L2_ONE, L2, ROUND, OWN, HOST, STEPS = 1.1e11, 5.5e12, 0.6e-6, 0.5e-6, 10e-6, 20


def grid_seconds(
    *,
    batch: int,
    features: int,
    terms: int,
    cell: str,
    shared: int = SHARED,
    processors: int = PROCESSORS,
    host: float = HOST,
) -> tuple[float, float]:
    """(of a step here, of one that is launched by itself): a prediction, which no GPU has measured, for a solve of
    STEPS steps that fits; `host` is 0 in a graph.

    Here: a round for arriving, for seeing that all have, and for reading what they wrote, whose bytes come from L2; and
    once the launch and W's bytes. Apart: the faster of what `affine_seconds` knows, but no less than a launch and the
    bytes from L2 of its programs, each of which reads its slice of W again, nor than `host`.
    """

    def from_l2(programs: int, bytes_of_one: int) -> float:
        return max(bytes_of_one / L2_ONE, programs * bytes_of_one / L2)

    config = affine_grid(batch=batch, features=features, terms=terms, shared=shared, processors=processors)
    tiles, splits = -(-batch // config["BLOCK_M"]), -(-features // config["BLOCK_N"])
    told = from_l2(tiles * splits, 2 * config["BLOCK_M"] * features + 8 * config["BLOCK_M"] * splits)
    once = LAUNCH + 4 * tiles * features**2 / BANDWIDTH
    step = affine_steps(batch=batch, features=features, terms=terms, shared=shared)
    block_m, block_n = step["BLOCK_M"], step["BLOCK_N"]
    read = from_l2(-(-batch // block_m) * -(-features // block_n), 2 * features * (block_m + terms * block_n))
    fused, apart = affine_seconds(rows=batch, features=features, terms=terms, cell=cell)
    return 3 * ROUND + OWN + told + once / STEPS, max(min(max(fused, LAUNCH + read), apart), host)
