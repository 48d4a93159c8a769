"""The studies: `python -m tritondeq.bench.studies NAME [NAME ...]`, or `report`."""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from tritondeq.__main__ import EXTRAS, INTERRUPTED, _at_least, _device
from tritondeq.toolbox import one_thread, writable

from ..machine import installed
from . import STUDIES, results, study
from .study import SUITES, Study

SEEDS = 3


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 if it can't be done here; 2 for bad arguments; 130 after Ctrl-C, with finished runs written."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    names = list(dict.fromkeys(arguments.names))
    known = (*STUDIES, "report")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"argument NAME: takes {', '.join(known)}, got {', '.join(unknown)}")
    if arguments.out is None:
        arguments.out = results.FOLDER if names == ["report"] else Path("studies_out")
    try:
        for name in (name for name in names if name != "report"):
            with writable(arguments.out), one_thread():
                carry_out(study(name), arguments.suite, range(arguments.seeds), arguments.out, arguments.device)
        from . import report

        folder = arguments.out.resolve()
        beside = folder.parent if folder == results.FOLDER.resolve() else folder
        for path in report.write(folder, beside / "README.md"):
            print(f"saved {path}")
    except KeyboardInterrupt:
        return _fail("interrupted; finished runs are written, and the same command goes on from there", INTERRUPTED)
    except ModuleNotFoundError as error:
        module = (error.name or "tritondeq").partition(".")[0]
        if module == "tritondeq":
            raise
        return _fail(f'{EXTRAS.get(module, module)} is missing: pip install "tritondeq[studies]"')
    except (OSError, ValueError) as error:
        return _fail(str(error))
    return 0


def carry_out(study: Study, suite: str, seeds: range, out: Path, device: torch.device) -> Path:
    """Makes the runs that are not in the study's file yet, and returns its path."""
    for package in study.packages:
        if not installed(package):
            raise ModuleNotFoundError(f"no module {package}", name=package)
    fresh = results.new(study, suite, device)
    path = results.path_of(fresh, out)
    found, why = results.resumed(fresh, path)
    if why:
        _say(f"{path} is begun anew: it has {why}")
    have, jobs = results.finished(found), list(study.jobs(suite, seeds, device))
    for i, job in enumerate(jobs, 1):
        if (job.case, job.contestant, job.seed) in have:
            continue
        began = time.perf_counter()
        run = {"case": job.case, "contestant": job.contestant, "seed": job.seed, **study.run(job)}
        found["runs"].append(run)
        results.save(found, path)
        main = ", ".join(
            f"{m.title} {m.scale * run[m.key]:.{m.digits}f}"
            for m in study.measures
            if m.main and run.get(m.key) is not None
        )
        name = ", ".join(filter(None, (study.name, job.case, job.contestant, f"seed {job.seed}")))
        _say(f"{i}/{len(jobs)} {name}: {main} ({time.perf_counter() - began:.1f} s)")
    found["complete"] = True
    results.save(found, path)
    return path


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _fail(message: str, status: int = 1) -> int:
    _say(f"tritondeq: {message}")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tritondeq.bench.studies", description=__doc__, allow_abbrev=False)
    kinds = f"{', '.join(STUDIES)}; or report, which writes README.md and pictures from the results that are there"
    parser.add_argument("names", nargs="+", metavar="NAME", help=kinds)
    parser.add_argument("--suite", choices=SUITES, default="quick", help="default: quick")
    parser.add_argument("--seeds", type=_at_least(1), default=SEEDS, metavar="N", help=f"default: {SEEDS}")
    where = "results, pictures and report (default: studies_out; for report: the results that are committed)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=where)
    parser.add_argument("--device", type=_device, default="auto", help="cpu, cuda, cuda:N or auto (the default)")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    sys.exit(main())
