"""The command line: `python -m tritondeq demo | doctor | tune | bench`."""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}  # packages by module
TASKS, SEEDS = ("digits", "parity"), 3
TUNED = ("affine", "monotone", "mlp", "gated", "transformer", "conv", "any")
DTYPES = ("fp32", "bf16", "fp64")
MOST = 2**31 - 1  # seeds that every generator takes
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0; 1 if it can't be done here; 2 for bad arguments; 130 on Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    finished: list[str] = []
    try:
        if argv[:1] == ["bench"]:  # which parses its options itself
            from .bench.__main__ import main as bench

            return bench(argv[1:])
        arguments = _parser().parse_args(argv)
        status = arguments.command(arguments, finished) or 0
        sys.stdout.flush()  # a closed pipe has to raise here
        return status
    except KeyboardInterrupt:
        return _fail(f"interrupted; finished: {', '.join(finished) or 'nothing yet'}", INTERRUPTED)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        return _fail(f'{EXTRAS[module]} is missing: pip install "tritondeq[demo]"')
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

    def add(name: str, help: str, command: Callable | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, allow_abbrev=False, description=help, help=help)
        sub.set_defaults(command=command)
        return sub

    demo = add("demo", "train a DEQ beside the explicit nets it has to be compared with", _demo)
    demo.add_argument("which", nargs="?", choices=TASKS, default=TASKS[0], help=f"the task (default: {TASKS[0]})")
    counts = f"default: {SEEDS}, or 1 if --quick"
    demo.add_argument("--seeds", type=_at_least(1), metavar="N", help=f"how many seeds ({counts})")
    demo.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="the first seed (default: 0)")
    demo.add_argument("--out", type=Path, default="demo_out", metavar="DIR", help="pictures (default: demo_out)")
    demo.add_argument("--device", type=_device, default="auto", help="cpu, cuda, cuda:N or auto (the default)")
    demo.add_argument("--quick", action="store_true", help="seconds; shows that all works, trains nothing of use")
    add("doctor", "print what this machine will run, and why", _doctor)
    tune = add("tune", "measure launch parameters on this GPU, and use the best from then on", _tune)
    sizes: dict[str, Any] = {"type": _at_least(1), "metavar": "N"}
    options: dict[str, tuple[dict[str, Any], tuple]] = {
        "cell": ({"choices": TUNED}, TUNED),
        "dtype": ({"choices": DTYPES}, DTYPES[:2]),
        "features": (sizes, (64, 128, 256)),
        "rows": (sizes, (256, 16384)),
    }
    for name, (kind, usual) in options.items():
        words = f"default: {' '.join(map(str, usual))}"
        tune.add_argument(f"--{name}", nargs="+", default=list(usual), help=words, **kind)
    tune.add_argument("--fresh", action="store_true", help="measure again what has been measured")
    add("bench", "measure against eager PyTorch; `bench --help` lists its options")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= MOST:
            raise argparse.ArgumentTypeError(f"takes an integer from {least} to {MOST}, got {text!r}")
        return int(text)

    return integer


def _device(text: str) -> torch.device:
    count = torch.cuda.device_count()
    if text == "auto":
        return torch.device("cuda" if count else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"takes auto, cpu, cuda or cuda:N, got {text!r}")
    if text != "cpu" and int(match[1] or 0) >= count:
        raise argparse.ArgumentTypeError(f"asks for {text}, and torch sees {count} CUDA devices")
    return torch.device(text)


if __name__ == "__main__":
    sys.exit(main())
