"""The package as it is imported, and the rules of the house that no other test checks."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import tritondeq

ROOT = Path(__file__).parent.parent
HOUSE = {str(p.relative_to(ROOT)): p for f in ("tritondeq", "kernels") for p in sorted(ROOT.glob(f"{f}/**/*.py"))}
PUBLIC = {
    *("DEQ", "fixed_point", "Solution", "Status", "Route", "cells", "backend", "set_backend"),
    *("Picard", "Anderson", "Broyden", "PeacemanRachford", "ForwardBackward", "FixedDropout"),
    *("Implicit", "Neumann", "Phantom", "OneStep", "Unrolled"),
    *("to_equilibrium", "fix_dropout", "jacobian_penalty", "spectral_radius", "diagnose", "plot", "Watch"),
}
# A module imports what stands before it or lies in its folder.
ORDER = "kernels checks row_kernels layout solution solvers held cells problem adjoints capture gradient loop guards"
ORDER += " outside cuda_graphs routes backward options fixed_point generation deq convert inspect compat"
ORDER = ORDER.split()
COMMANDS = {"toolbox", "tune", "doctor", "demo", "bench", "__main__"}  # these import any
PLAIN = {*"devices dispatch formulas launch rules tables tails".split()}  # of kernels/: they need no Triton
HIDE_TRITON = "import sys; sys.modules['triton'] = None\n"


def run(code: str) -> str:
    """Returns what `code` prints in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports(name: str) -> set[str]:
    """Absolute dotted names of what a file imports, anywhere in it; `from a import b` gives a and a.b."""

    def names() -> Iterator[str]:
        package = [*(["tritondeq"] if name.startswith("kernels/") else []), *Path(name).parts[:-1]]
        for node in ast.walk(ast.parse(HOUSE[name].read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                source = ".".join([*base, *filter(None, [node.module])])
                yield from (source, *(f"{source}.{alias.name}" for alias in node.names))

    return set(names())


def test_import_is_light():
    code = "import sys, torch; old = {*sys.modules}; import tritondeq; print(*sys.modules.keys() - old)"
    new = set(run(code).split())
    assert not new & {"triton", "matplotlib", "sklearn", "tqdm", "tabulate", "torchdeq", "pytest"}
    assert "torch._dynamo" not in new, "it imports Triton and takes as long to import as torch"


def test_solves_and_differentiates_without_triton():
    code = """
        import torch, tritondeq
        torch.manual_seed(0)
        try:
            tritondeq.set_backend("triton")
        except ValueError as error:
            assert "not installed" in str(error)
        else:
            raise AssertionError("set_backend('triton') was accepted without Triton")
        layer = tritondeq.DEQ(tritondeq.cells.Affine(8), tol=1e-5)
        x = torch.randn(3, 8, requires_grad=True)
        z = layer(x)
        z.sum().backward()
        grads = [x.grad, *(p.grad for p in layer.parameters())]
        assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in grads)
        assert torch.allclose(layer.cell(z, layer.cell.inject(x)), z, atol=1e-4)
        assert not any(name.startswith("triton.") for name in sys.modules)
        from tritondeq import doctor
        print(doctor.report())
    """
    assert "triton     not installed" in run(HIDE_TRITON + textwrap.dedent(code))


@pytest.mark.parametrize("name", [name for name in HOUSE if name.startswith("kernels/")])
def test_kernels_import_nothing_of_the_library(name):
    below = {target for target in imports(name) if target.split(".")[0] == "tritondeq"}
    assert all(target.startswith("tritondeq.kernels") for target in below)
    if Path(name).stem in ("dispatch", "rules", "formulas"):
        assert below <= {"tritondeq.kernels", "tritondeq.kernels.devices"}, "it knows no op"


@pytest.mark.parametrize("name", [name for name in HOUSE if name.startswith("tritondeq/")])
def test_arrows_run_one_way(name):
    targets = [target.split(".") for target in imports(name)]
    assert ["triton"] not in targets, "Triton is imported in kernels/ only"
    below = [target for target in targets if target[0] == "tritondeq" and len(target) > 1]
    kernels = {target[2] for target in below if target[1] == "kernels" and len(target) > 2}
    assert kernels <= PLAIN, "ask dispatch for ops"
    module = Path(name).with_suffix("").parts[1]
    assert module in {"__init__", *ORDER, *COMMANDS}, "it has no place in the order of imports"
    if module in ORDER:
        later = {*ORDER[ORDER.index(module) + 1 :], *COMMANDS}
        assert not {target[1] for target in below} & later


def test_an_adjoint_knows_no_solver_by_name():
    solvers = {target for target in imports("tritondeq/adjoints.py") if target.startswith("tritondeq.solvers.")}
    assert all(target.startswith(("tritondeq.solvers.base", "tritondeq.solvers.Solver")) for target in solvers)


def test_files_stay_short():
    assert not [name for name, path in HOUSE.items() if path.read_text().count("\n") > 350]


def test_public_api():
    assert sorted(tritondeq.__all__) == sorted(PUBLIC)
    assert (ROOT / "tritondeq/py.typed").exists()


def test_versions_agree():
    assert tritondeq.__version__ == metadata.version("tritondeq")
    assert f"\nversion: {tritondeq.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    hook = (ROOT / ".pre-commit-config.yaml").read_text().split("ruff-pre-commit\n    rev: v")[1].split()[0]
    assert f'"ruff=={hook}"' in (ROOT / "pyproject.toml").read_text()


def test_ci_runs_the_two_commands_of_the_readme():
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    for name, command in {
        "demo": 'pip install -e ".[demo]" && python -m tritondeq demo',
        "tests": 'pip install -e ".[test]" && pytest -n auto --dist loadfile',
    }.items():
        assert f"\n{command} " in readme
        assert f"\n{name}='{command}'\n" in script
