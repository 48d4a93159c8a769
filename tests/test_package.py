"""The package as it is installed and imported, and the rules of the house that no other test looks after."""

import ast
import inspect
import json
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import tritondeq

ROOT = Path(__file__).parent.parent
HOUSE = sorted([*ROOT.glob("tritondeq/**/*.py"), *ROOT.glob("kernels/**/*.py")])
PUBLIC = {
    *("DEQ", "fixed_point", "Solution", "Status", "cells", "backend", "set_backend"),
    *("Picard", "Anderson", "Broyden", "PeacemanRachford", "ForwardBackward", "FixedDropout"),
    "to_equilibrium",
    *("Implicit", "Neumann", "Phantom", "OneStep", "Unrolled"),
    *("jacobian_penalty", "spectral_radius", "diagnose", "plot", "Watch"),
}
# A module imports what stands before it or in its own folder; one not named here stands last and imports any.
ORDER = ["kernels", "checks", "row_kernels", "layout", "solution", "capture", "solvers", "adjoints", "dropout", "cells"]
ORDER += ["loop", "recorder", "graphs", "fixed_point", "parametrized", "deq"]
ORDER += ["stacks", "convert", "jacobian", "diagnose", "watch"]
HIDE_TRITON = "import sys; sys.modules['triton'] = None\n"


def run(code: str, *arguments: str) -> str:
    """What `code` prints in a new interpreter."""
    code = textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names of what a file imports, wherever in it; `from a import b` gives a and a.b."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    if package[0] == "kernels":
        package = ["tritondeq", *package]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_import_is_light():
    code = """
        import sys, json, torch
        before = set(sys.modules)
        import tritondeq
        print(json.dumps(sorted(set(sys.modules) - before)))
    """
    new = set(json.loads(run(code)))
    assert not new & {"triton", "matplotlib", "sklearn", "tqdm", "torchdeq", "pytest"}
    assert "torch._dynamo" not in new, "it imports Triton, and takes as long to import as torch"


def test_solves_and_differentiates_where_triton_is_absent():
    code = """
        import torch, tritondeq
        torch.manual_seed(0)
        layer = tritondeq.DEQ(tritondeq.cells.Affine(8), tol=1e-5)
        x = torch.randn(3, 8, requires_grad=True)
        z = layer(x)
        z.sum().backward()
        grads = [x.grad, *(p.grad for p in layer.parameters())]
        assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in grads)
        assert torch.allclose(layer.cell(z, layer.cell.inject(x)), z, atol=1e-4)
        assert not any(name.startswith("triton.") for name in sys.modules)
    """
    run(HIDE_TRITON + textwrap.dedent(code))


def test_says_so_where_triton_is_absent():
    code = """
        import tritondeq
        try:
            tritondeq.set_backend("triton")
        except ValueError as error:
            assert "not installed" in str(error)
        else:
            raise AssertionError("set_backend('triton') was taken without Triton")
        from tritondeq import doctor
        print(doctor.report())
    """
    assert "triton   not installed" in run(HIDE_TRITON + textwrap.dedent(code))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel made from a copy of the tree, so that the checkout stays clean."""
    if int(metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("setuptools 77 or later is needed for the licence field")
    out = tmp_path_factory.mktemp("wheel")
    code = """
        import shutil, subprocess, sys
        out = sys.argv[1]
        shutil.copytree(".", out + "/tree", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, "tree"]
        subprocess.run(command, cwd=out, check=True)
    """
    run(code, str(out))
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [ROOT / "tritondeq/py.typed", *HOUSE, *ROOT.glob("bench/**/*.py")]
    sources += [*ROOT.glob("tritondeq/tuned/*.json"), *ROOT.glob("bench/**/results/*.json")]
    expected = {path if path.startswith("tritondeq/") else f"tritondeq/{path}" for path in relative(sources)}
    assert "tritondeq/kernels/dispatch.py" in expected and "tritondeq/bench/__init__.py" in expected
    assert expected <= names
    strangers = {name for name in names - expected if ".dist-info/" not in name and not name.endswith(".png")}
    assert not strangers


def test_wheel_works_by_itself(wheel, tmp_path):
    """From outside the checkout, past its editable install, which the wheel would otherwise lose against."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
        import os, sys
        os.chdir(sys.argv[1])
        sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
        sys.path.insert(0, sys.argv[1])
        import torch, tritondeq, tritondeq.kernels.dispatch as dispatch
        assert tritondeq.__file__.startswith(sys.argv[1]) and dispatch.__file__.startswith(sys.argv[1])
        assert tritondeq.DEQ(tritondeq.cells.Affine(8))(torch.randn(3, 8)).isfinite().all()
    """
    run(code, str(tmp_path))


@pytest.mark.parametrize("path", HOUSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    names = {name for name in imports(path) if name.split(".")[0] in ("triton", "tritondeq")}
    if ROOT / "kernels" in path.parents:
        assert all(name.split(".")[0] == "triton" or name.startswith("tritondeq.kernels") for name in names)
        return
    assert not {name for name in names if name.split(".")[0] == "triton"}
    ops = {name.split(".")[2] for name in names if name.startswith("tritondeq.kernels.")}
    plain = "costs dispatch formulas jobs launch offline rules space tables tails trials"
    assert ops <= {*plain.split()}, "an op is reached through kernels.dispatch"
    own = path.relative_to(ROOT / "tritondeq").with_suffix("").parts[0]
    if own not in ORDER:
        return
    for name in names - {"tritondeq"}:
        target = name.split(".")[1]
        assert target == own or target in ORDER[: ORDER.index(own)], f"{own} imports {name}"


def test_an_adjoint_knows_no_solver_by_name():
    names = {name for name in imports(ROOT / "tritondeq/adjoints.py") if name.startswith("tritondeq.solvers.")}
    assert all(name.startswith("tritondeq.solvers.base") or name == "tritondeq.solvers.Solver" for name in names)


def test_dispatch_and_rules_know_no_op():
    for name in ("dispatch", "rules", "formulas"):
        assert not {name for name in imports(ROOT / f"kernels/{name}.py") if name.startswith("tritondeq")}


def test_files_stay_short():
    assert not [name for name, path in zip(relative(HOUSE), HOUSE, strict=True) if path.read_text().count("\n") > 350]


def test_no_block_pointers():
    """Triton removed them."""
    removed = ("make_block_ptr", "tl.advance")
    assert not [path for path in HOUSE if any(word in path.read_text() for word in removed)]


def test_public_api():
    assert set(tritondeq.__all__) == PUBLIC
    assert len(tritondeq.__all__) == len(PUBLIC)
    assert tritondeq.__version__ == metadata.version("tritondeq")
    assert (ROOT / "tritondeq/py.typed").exists()


def public_callables() -> Iterator[tuple[str, object]]:
    for name in PUBLIC - {"cells", "plot"}:
        yield name, getattr(tritondeq, name)
    for name, value in vars(tritondeq.cells).items():
        if inspect.isclass(value) and not name.startswith("_"):
            yield f"cells.{name}", value


def test_every_public_name_has_a_docstring():
    bare = []
    for name, value in public_callables():
        # A dataclass without a docstring gets its signature as one.
        if not (value.__doc__ or "").strip() or value.__doc__.startswith(f"{name}("):
            bare.append(name)
        if inspect.isclass(value) and value.__module__.startswith("tritondeq"):
            members = inspect.getmembers(value, inspect.isfunction)
            own = [(n, f) for n, f in members if f.__module__.startswith("tritondeq") and not n.startswith("_")]
            bare += [f"{name}.{n}" for n, f in own if n != "forward" and not inspect.getdoc(getattr(value, n))]
    assert not bare


def test_readme_gives_the_two_setup_commands():
    readme = (ROOT / "README.md").read_text()
    assert 'pip install -e ".[demo]" && python -m tritondeq demo' in readme
    command = 'pip install -e ".[test]" && pytest -n auto --dist loadfile'
    assert f"{command} " in readme
    assert f"test_command='{command}'" in (ROOT / ".ci/run").read_text()


def test_pins_agree():
    (pinned,) = [line for line in (ROOT / ".pre-commit-config.yaml").read_text().splitlines() if "rev: v" in line]
    assert f'"ruff=={pinned.split("v")[-1]}"' in (ROOT / "pyproject.toml").read_text()
