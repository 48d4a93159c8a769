"""The Python of README.md and of docs/ runs as a reader would run it, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("name", ["README.md", "docs/guide.md", "docs/guarantees.md", "docs/training.md"])
def test_every_block_runs(name, capsys):
    """Blocks of one page build on one another. Those that need timm run in tests/test_convert_real.py."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S)
    names: dict = {}
    for block in blocks:
        if "import timm" not in block:
            exec(compile(block, name, "exec"), names)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Files and headings that a page links to exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.M)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}
