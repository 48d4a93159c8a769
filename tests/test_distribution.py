"""The wheel and the sdist, as somebody installs them who has no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
FOLDERS = {"tritondeq": "tritondeq", "kernels": "tritondeq/kernels", "bench": "tritondeq/bench"}
LOCAL = shutil.ignore_patterns(
    ".git", ".venv", "*_cache", ".hypothesis", ".benchmarks", "build", "dist", "*.egg-info", "__pycache__"
)


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def files(tree: Path, *folders: str) -> set[str]:
    paths = (path for folder in folders for path in tree.glob(f"{folder}/**/*") if path.is_file())
    return {path.relative_to(tree).as_posix() for path in paths}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """A copy of the tree, the sdist made from it, and the wheel made from the sdist."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "tree", ignore=LOCAL)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "tree", cwd=folder)
    return {"tree": folder / "tree", "wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Installs one of them and returns the interpreter, which gets all other packages from the running one."""
    pythons = {}

    def install(name: str) -> Path:
        if name not in pythons:
            folder = tmp_path_factory.mktemp(name)
            venv.create(folder, symlinks=os.name != "nt")
            site, scripts = (Path(sysconfig.get_path(n, vars={"base": str(folder)})) for n in ("purelib", "scripts"))
            here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
            # The .pth files in these folders are not read, so no editable install gets in.
            (site / "others.pth").write_text("\n".join(here))
            pythons[name] = next(scripts.glob("python*"))
            options = ("--no-deps", "--no-index", "--no-build-isolation")
            pip = (sys.executable, "-m", "pip", "--python", pythons[name], "install")
            run(*pip, *options, built[name], cwd=folder)
        return pythons[name]

    return install


def test_the_wheel_holds_the_packages_and_nothing_else(built):
    data = {"tritondeq/py.typed"}
    for folder, package in FOLDERS.items():
        data |= {name.replace(folder, package, 1) for name in files(built["tree"], folder) if name.endswith(".py")}
    names = zipfile.ZipFile(built["wheel"]).namelist()
    assert {name for name in names if ".dist-info/" not in name} == data
    assert built["wheel"].stat().st_size < 400e3


def test_the_sdist_holds_tests_documents_and_benchmarks(built):
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = files(built["tree"], "tests", "docs", "examples", "bench", "kernels", "tritondeq", ".ci")
    assert expected | {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE"} <= names


def test_every_module_of_the_wheel_imports(installed, tmp_path):
    code = """
import importlib, pkgutil, sys, tritondeq
assert tritondeq.__file__.startswith(sys.prefix)
for module in pkgutil.walk_packages(tritondeq.__path__, "tritondeq."):
    importlib.import_module(module.name)
    print(module.name)
"""
    pytest.importorskip("triton")
    names = run(installed("wheel"), "-c", code, cwd=tmp_path).split()
    assert {"tritondeq.deq", "tritondeq.kernels.rows.affine", "tritondeq.bench.studies.images"} <= set(names)


def test_doctor_of_the_wheel(installed, tmp_path):
    assert "torch  " in run(installed("wheel"), "-m", "tritondeq", "doctor", cwd=tmp_path)


def test_bench_of_the_wheel(installed, tmp_path):
    run(installed("wheel"), "-m", "tritondeq", "bench", "--cpu", "--suite", "tiny", "--out", tmp_path, cwd=tmp_path)
    assert list(tmp_path.glob("*.json"))


def test_the_public_names_of_the_wheel_are_typed(installed, tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\npython_version = 3.10\n")
    python = ("--python-executable", installed("wheel"))
    run(sys.executable, "-m", "mypy", *python, ROOT / "tests/typing/uses.py", cwd=tmp_path)


def test_tests_of_the_sdist_run_on_it(built, installed, tmp_path):
    with tarfile.open(built["sdist"]) as archive:
        archive.extractall(tmp_path)
    (tree,) = tmp_path.iterdir()
    elsewhere = tmp_path / "elsewhere"  # python -m imports from the current folder first
    elsewhere.mkdir()
    options = ("-p", "no:cacheprovider", "-c", tree / "pyproject.toml", tree / "tests/test_layout.py")
    assert " passed" in run(installed("sdist"), "-m", "pytest", *options, cwd=elsewhere)
