"""The Python of README.md and docs/ runs as a reader would run it, their links lead somewhere, and the site builds."""

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import tritondeq

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples/README.md"]
ELSEWHERE = {"docs/replace-a-stack.md"}  # runs in tests/test_convert_real.py and tests/test_convert_saved.py
WITH_CODE = [str(page.relative_to(ROOT)) for page in DOCS if "```python" in page.read_text()]
SOLVERS = (r"Picard\(damping=1.0\)", r"Picard\(damping=0.5\)", "Anderson")
# A build that opens a connection fails.
MKDOCS = "import socket; socket.socket.connect = None; from mkdocs.__main__ import cli; cli()"


def blocks(name):
    """Yields (line of the page, code) of each Python block."""
    text = (ROOT / name).read_text()
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.S | re.M):
        yield text.count("\n", 0, match.start(1)), match[1]


def lacking(code):
    """Returns what a block needs and this machine lacks: packages that it imports, and a GPU if a comment names it."""
    nodes = [*ast.walk(ast.parse(code))]
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    packages = sorted({name.partition(".")[0] for name in names})
    missing = [package for package in packages if find_spec(package) is None]
    return missing + ["a GPU"] * ("# needs a GPU" in code and not torch.cuda.is_available())


@pytest.mark.parametrize("name", [name for name in WITH_CODE if name not in ELSEWHERE])
def test_every_block_runs(name, capsys):
    """Blocks of one page build on one another. If one needs more than is here, its page ends as skipped, with why."""
    names, left_out = {}, []
    for line, code in blocks(name):
        if missing := lacking(code):
            left_out.append(f"{name}:{line + 1} needs {' and '.join(missing)}")
        else:
            exec(compile("\n" * line + code, name, "exec"), names)  # an error has the page's line
    printed = capsys.readouterr().out
    if name == "docs/guarantees.md":
        assert printed.startswith("the cell is not a function of its state: ") and " cell.calls: " in printed
    if name == "docs/guide.md":
        assert "\nTORCH because " in printed
        assert len(names["draws"].unique(dim=0)) == 5 and names["solution"].aux["balance"].requires_grad
    if name == "docs/training.md":
        report = names["report"]
        assert 1 < report["steps"] <= report["steps_max"] <= 50 and 0 < report["radius"]
        assert printed.startswith("DEQ of Block: Picard(), Implicit(), tol 0.001, max_steps 50\n")
        assert all(p.grad.isfinite().all() for p in names["core"].parameters())
        assert "\na backward solve, u = J'u + g of the implicit gradient, did not converge, " in printed
        advice = "\nadjoint=Implicit(solver=Anderson(), max_steps=200): the backward solve makes it, "
        assert advice in printed and "\ntensor(2.0000)\n" in printed
        assert printed.endswith("\n[8.0]\n")
        assert (names["net"].cell.embedding.weight.grad.abs().sum(1) > 0).all()
    if name == "docs/quick-start.md":
        assert names["accuracy"] > 0.8 and "\nall is well\n" in printed
    if name == "docs/choose.md":
        plain, damped, anderson = (int(re.search(rf"^{n}.* (\d+)$", printed, re.M)[1]) for n in SOLVERS)
        assert anderson < plain < damped
        cosines = dict(re.findall(r"(\w+) +cosine (\S+) to", printed))
        assert float(cosines["OneStep"]) < float(cosines["Phantom"]) < float(cosines["Implicit"])
        errors = re.findall(r"^tol (\S+): \d+ steps, error (\S+)$", printed, re.M)
        assert len(errors) == 4 and all(float(error) <= float(tol) / (1 - 0.9) for tol, error in errors)
    if name == "docs/stability.md":
        assert printed.startswith("['MAX_STEPS', ") and "\n* solver=Picard(damping=" in printed
        assert re.search(r"^Picard\(damping=1.0\) 0\.\d+ 200\nAnderson\(.*\) 1\.0 \d\d$", printed, re.M)
        assert re.search(r"^Picard\(damping=1.0\) False\nAnderson\(.*\) True\nBroyden\(.*\) True$", printed, re.M)
        assert "\nFalse {'GROWING'}\nTrue {'CONVERGED'}\ntensor([[3]])\n{" in printed and "'PLATEAU'" in printed
        assert "; it draws random numbers at each: " in printed
    if name == "docs/faq.md":
        assert names["second"].item() == pytest.approx(-3.7329238706515873, rel=1e-9)
        assert "\nDEQ.__init__() got an unexpected keyword argument 'stop_mode'\n" in printed
        assert "\n['NONFINITE', 'CONVERGED', " in printed
        cold, warm = re.findall(r"^tensor\((\S+)\) tensor\((\S+)\)$", printed, re.M)[0]
        assert float(warm) < float(cold)
    if left_out:
        pytest.skip("; ".join(left_out))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files and headings that a page links to exist in the repository, as a forge shows it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.M)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}


def test_figures_of_why_and_when_are_those_of_the_studies():
    """Every number of its tables, and of its bullets, stands in the report of the studies."""
    measured = set(re.findall(r"(?<![\d.,])\d+(?:\.\d+)?(?![\d.,]*\d)", (ROOT / "bench/studies/README.md").read_text()))
    text = (ROOT / "docs/why.md").read_text().partition("## When it pays")[2]
    figures = re.findall(r"\d+(?:\.\d+)?", re.sub(r"\]\([^)]*\)", "", text))
    assert len(figures) > 30
    assert not {*figures} - measured


class Built(HTMLParser):
    """A page of the site: where it links to, what it loads, and its anchors."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.anchors, self.emphasis = [], [], set(), 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self.emphasis += tag == "em"
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("link", "script", "img", "iframe"):
            self.loads += [given[name] for name in ("href", "src") if given.get(name, "data:")[:5] != "data:"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Returns the pages of the site, by path, after a strict build that finds nothing to warn of."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "mkdocs_jupyter"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", MKDOCS, "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return {path: Built(path) for path in folder.rglob("*.html") if path.name != "404.html"}


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(site):
    broken = []
    for page, built in site.items():
        for target in built.links + built.loads:
            path, _, anchor = unquote(target).partition("#")
            if "://" in path:
                if target in built.loads:
                    broken.append(f"{page.name} loads {target}")
                continue
            linked = (page.parent / path).resolve() if path else page
            if not linked.is_file() or (anchor and anchor not in site[linked].anchors):
                broken.append(f"{page.name} links to {target}")
    assert len(site) > 20
    assert not broken


@pytest.mark.slow
def test_the_site_has_the_whole_public_interface(site):
    anchors = {anchor for page, built in site.items() if page.parent.name == "api" for anchor in built.anchors}
    cells = {f"cells.{name}" for name, value in vars(tritondeq.cells).items() if isinstance(value, type)}
    names = {*tritondeq.__all__, *cells, "plot.residuals", "plot.steps"} - {"cells", "plot"}
    assert not {f"tritondeq.{name}" for name in names} - anchors
    assert not sum(built.emphasis for page, built in site.items() if page.parent.name == "api"), "z* is no emphasis"
