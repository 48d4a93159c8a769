"""The notebooks of docs/tutorials: each runs in a fresh kernel, prints what is committed, and is a page of the site."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("docs/tutorials/*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Lines of trained nets and of solves, whose figures depend on how a machine rounds; all others are the same everywhere.
ROUNDED = re.compile(r" dB|%|loss |evaluations|rounds|k = |[a-h]{5}>")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def joined(text):
    """Returns the text of a field that the format stores as a string or as a list of lines."""
    return text if isinstance(text, str) else "".join(text)


def printed(cell):
    return "".join(joined(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def shown(cell):
    """Returns what the cell's outputs are: text, pictures."""
    return {kind for output in cell["outputs"] for kind in (output["output_type"], *output.get("data", ()))}


def assert_same_line(new, old):
    """Compares words, and figures to a tenth and two of their last digit; what a net writes behind ">" may differ."""
    if not ROUNDED.search(old):
        assert new == old
        return
    words = [NUMBER.sub("#", re.sub("(?<=>)[a-h]+", "#", line)) for line in (new, old)]
    assert words[0] == words[1]
    for fresh, committed in zip(NUMBER.findall(new), NUMBER.findall(old), strict=True):
        digit = 10.0 ** -len(committed.partition(".")[2])
        assert float(fresh) == pytest.approx(float(committed), rel=0.1, abs=2 * digit), (new, old)


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_and_prints_what_is_committed(path, tmp_path):
    """No cell raises or warns; each draws its pictures, and its printed lines are those of the file."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for package in ("ipykernel", "matplotlib", "sklearn"):
        pytest.importorskip(package)
    notebook = nbformat.read(path, as_version=4)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("MPLBACKEND", None)  # the kernel's own shows pictures
    options = {"timeout": 120, "kernel_name": "python3", "resources": {"metadata": {"path": str(tmp_path)}}}
    nbclient.NotebookClient(notebook, **options).execute(env=environment)
    assert not [*tmp_path.iterdir()], "a tutorial leaves no files"
    for cell, committed in zip((c for c in notebook.cells if c.cell_type == "code"), cells(path, "code"), strict=True):
        assert "stderr" not in [output.get("name") for output in cell.outputs], cell.outputs
        assert shown(cell) == shown(committed)
        for new, old in zip(printed(cell).splitlines(), printed(committed).splitlines(), strict=True):
            assert_same_line(new, old)


@each_notebook
def test_a_notebook_is_committed_as_it_ran(path):
    """From first to last cell in one run, without errors, warnings, paths, times or other metadata."""
    notebook, code = json.loads(path.read_text()), cells(path, "code")
    assert notebook["metadata"] == METADATA
    assert not any(cell["metadata"] for cell in notebook["cells"])
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr" or output.get("metadata")]
    assert outputs and not re.search(r"(?<![\w.])/\w+/|\b[A-Z]:\\|0x[0-9a-f]{6}", "".join(map(printed, code)))
    assert path.stat().st_size < 60e3


@each_notebook
def test_a_notebook_teaches_in_short_cells(path):
    """It begins with a title, its cells are short, words come before code, and it checks what it claims."""
    text, code = cells(path, "markdown"), [joined(cell["source"]) for cell in cells(path, "code")]
    assert joined(text[0]["source"]).startswith("# ")
    assert max(source.count("\n") for source in code) < 30
    assert len(text) > len(code) / 3
    assert sum("assert " in source for source in code) >= 3


@each_notebook
def test_links_of_a_notebook_lead_somewhere(path):
    """Files and headings that it links to exist in the repository."""
    links = re.findall(r"\]\(([^)\s]+)\)", "".join(joined(cell["source"]) for cell in cells(path, "markdown")))
    assert links
    for target in (target for target in links if "://" not in target):
        file, _, heading = target.partition("#")
        linked = (path.parent / file).resolve()
        assert linked.is_file(), target
        titles = re.findall("^#+ (.+)$", linked.read_text(), re.M)
        headings = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in headings, target


@pytest.mark.slow
def test_the_site_shows_the_notebooks_and_they_load_nothing(tmp_path):
    """Pages have the committed text and pictures, links lead to pages of the site, and no script names an address."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "mkdocs_jupyter"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for path in NOTEBOOKS:
        page = (tmp_path / f"tutorials/{path.stem}.html").read_text()
        scripts = re.findall(r"<script\b.*?</script>", page, re.S)
        assert not [script for script in scripts if re.search(r'(?:src="|import\(")(?:https?:|")', script)]
        assert not re.search(r'<(?:img|link|iframe)\b[^>]*(?:src|href)="https?://', page)
        pictures = [o for cell in cells(path, "code") for o in cell["outputs"] if "image/png" in o.get("data", ())]
        assert page.count('src="data:image/png;base64,') == len(pictures)
        for line in (line for cell in cells(path, "code") for line in printed(cell).splitlines()):
            assert line in html.unescape(page)
        targets = re.findall(r'<a href="([^":#]+)["#]', page.partition('class="jupyter-wrapper"')[2])
        assert targets and all((tmp_path / "tutorials" / target).resolve().is_file() for target in targets)
