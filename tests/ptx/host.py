"""Host time of solves whose kernels do nothing: python -m tests.ptx.host

What a call of a layer costs beside its launches, whichever GPU takes them: kernels are compiled for one, and Triton's
launcher returns at once. A GPU's own launch adds a few microseconds for each.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it at its import
os.environ["TRITONDEQ_CACHE"] = os.devnull  # no folder: what is launched does not depend on this machine's tables

import sys
from functools import partial

import torch

from tritondeq import DEQ, backend, cells
from tritondeq.bench import host, measure
from tritondeq.bench.report import markdown
from tritondeq.toolbox import one_thread

from . import Driver

CELLS = {"Affine": cells.Affine, "MLP": cells.MLP, "Gated": cells.Gated, "Monotone": cells.Monotone}
ROWS, WIDTH = 64, 64
OUTPUTS = ("z_ptr", "steps_ptr", "residual_ptr", "status_ptr", "far_ptr", "unit_ptr", "scale_ptr")


class Silent(Driver):
    """Compiles kernels, and launches none: their outputs are zeros, as those of solves that have converged.

    Attributes:
        launches: How many were asked for.
    """

    launches = 0

    def __init__(self):
        super().__init__()
        self.launcher_cls = self._launcher

    def _launcher(self, src, metadata):
        outputs = [i for i, name in enumerate(src.fn.arg_names) if name in OUTPUTS]

        def launch(*arguments):
            self.launches += 1
            for i in outputs:
                arguments[i - len(src.fn.arg_names)].numpy().fill(0)

        return launch


def calls(kind) -> dict:
    """Returns a forward pass and a training step of a layer, by name."""
    layer, x = DEQ(kind(WIDTH)), torch.randn(ROWS, WIDTH)
    return {"forward": torch.no_grad()(partial(layer, x)), "training step": lambda: host.loss(layer(x)).backward()}


def main(seconds: float) -> None:
    """Prints the table."""
    driver = Silent().activate()
    rows = [["cell", "what", "median", "launches", "torch operations", "Python calls"]]
    for name, kind in CELLS.items():
        for work, call in calls(kind).items():
            call()  # compiles
            driver.launches = 0
            call()
            launches, counts = driver.launches, host.counts(call)
            timing = measure.clock({work: call}, torch.device("cpu"), seconds)[work]
            each = [str(counts[name]) for name in ("ops", "frames")]
            rows.append([name, work, f"{timing.median * 1e6:.0f} us", str(launches), *each])
    print(markdown(rows))


if __name__ == "__main__":
    with one_thread(), backend("triton"):
        main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
