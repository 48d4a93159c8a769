"""The command line: `python -m tritondeq demo | doctor | tune | bench`."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

EXTRAS = {
    "sklearn": ("scikit-learn", "demo"),
    "matplotlib": ("matplotlib", "demo"),
    "tqdm": ("tqdm", "demo"),
    "pytest": ("pytest", "bench"),
    "pytest_benchmark": ("pytest-benchmark", "bench"),
    "torchdeq": ("torchdeq", "bench"),
}
TASKS, SEEDS = ("digits", "parity"), 3
TUNED = ("affine", "monotone", "mlp", "gated", "transformer", "conv", "any")
DTYPES = ("fp32", "bf16", "fp64")
SIZES = {"features": (64, 128, 256), "rows": (256, 16384)}  # what `tune` measures by default
MOST = 2**31 - 1  # seeds that every generator takes
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0; 1 if it can't be done here; 2 for bad arguments; 130 on Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    finished: list[str] = []
    try:
        if argv[:1] == ["bench"]:  # which parses its options itself
            return _bench(argv[1:])
        arguments, rest = _parser().parse_known_args(argv)
        if rest:
            arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        status = arguments.command(arguments, finished) or 0
        sys.stdout.flush()  # a closed pipe has to raise here
        return status
    except KeyboardInterrupt:
        return _fail(f"interrupted; finished: {', '.join(finished) or 'nothing yet'}", INTERRUPTED)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        package, extra = EXTRAS[module]
        return _fail(f'{package} is missing: pip install "tritondeq[{extra}]"')
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python is quiet as it exits
        return 1
    except OSError as error:
        return _fail(str(error))


def _demo(arguments: argparse.Namespace, finished: list[str]) -> None:
    from .toolbox import one_thread, writable

    task = importlib.import_module(f".demo.{arguments.which}", __package__)
    seeds = range(arguments.seed, arguments.seed + (arguments.seeds or (1 if arguments.quick else SEEDS)))
    with writable(arguments.out), one_thread():
        task.run(seeds, arguments.out, arguments.device, arguments.quick, finished)


def _doctor(arguments: argparse.Namespace, finished: list[str]) -> None:
    from .doctor import report

    print(report())


def _tune(arguments: argparse.Namespace, finished: list[str]) -> int:
    from .tune import run, workloads

    chosen = workloads(arguments.cell, arguments.features, arguments.rows, arguments.dtype)
    return run(chosen, finished, fresh=arguments.fresh)


def _bench(argv: list[str]) -> int:
    try:
        from .bench.__main__ import main as bench
    except ModuleNotFoundError as error:
        if error.name not in ("tritondeq.bench", "tritondeq.bench.__main__"):
            raise
        return _fail("this installation has no tritondeq.bench")
    return bench(argv) or 0


def _fail(message: str, status: int = 1) -> int:
    print(f"tritondeq: {message}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """Reports what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists what there is)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("python -m tritondeq", description="Deep Equilibrium layers for PyTorch.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, command: Callable | None, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, allow_abbrev=False, description=help, help=help)
        sub.set_defaults(command=command, parser=sub)
        return sub

    demo = add("demo", _demo, help="train a DEQ beside the explicit nets it has to be compared with")
    demo.add_argument("which", nargs="?", choices=TASKS, default=TASKS[0], help=f"the task (default: {TASKS[0]})")
    counts = f"default: {SEEDS}, or 1 if --quick"
    demo.add_argument("--seeds", type=_at_least(1), metavar="N", help=f"how many seeds ({counts})")
    demo.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="the first seed (default: 0)")
    demo.add_argument("--out", type=Path, default="demo_out", metavar="DIR", help="pictures (default: demo_out)")
    demo.add_argument("--device", type=_device, default="auto", help="cpu, cuda, cuda:N or auto (the default)")
    demo.add_argument("--quick", action="store_true", help="seconds; shows that all works, trains nothing of use")
    add("doctor", _doctor, help="print what this machine will run, and why")
    tune = add("tune", _tune, help="measure launch parameters on this GPU, and use the best from then on")
    options = {"cell": ({"choices": TUNED}, TUNED), "dtype": ({"choices": DTYPES}, DTYPES[:2])}
    options |= {name: ({"type": _at_least(1), "metavar": "N"}, sizes) for name, sizes in SIZES.items()}
    for name, (kind, usual) in options.items():
        words = f"default: {' '.join(map(str, usual))}"
        tune.add_argument(f"--{name}", nargs="+", default=list(usual), help=words, **kind)
    tune.add_argument("--fresh", action="store_true", help="measure again what has been measured")
    add("bench", None, help="measure against eager PyTorch; `bench --help` lists its options")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= MOST:
            raise argparse.ArgumentTypeError(f"takes an integer from {least} to {MOST}, got {text!r}")
        return int(text)

    return integer


def _device(text: str) -> torch.device:
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"takes auto, cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"asks for {text}, and torch sees {count} CUDA devices")
    return device


if __name__ == "__main__":
    sys.exit(main())
