"""Hook of MkDocs: pages, pictures and programs outside of docs/ are part of the site, and links to them lead there.

In the repository each link is relative to its file, as a forge's view of the file takes it. MkDocs looks for no links
in notebooks: theirs are rewritten in HTML.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/studies/README.md": "studies.md",
    "examples/README.md": "examples.md",
}
FOUND = (path for kind in ("bench/studies/results/*.png", "examples/*.py") for path in ROOT.glob(kind))
COPIES = ["CITATION.cff", *(str(path.relative_to(ROOT)) for path in FOUND)]


def on_files(files: Files, config) -> Files:
    """Adds what lies outside of docs/; pages by their names in PAGES, all else below files/."""
    for source, name in (PAGES | {copy: f"files/{copy}" for copy in COPIES}).items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def by_path(files: Files) -> dict[Path, File]:
    """Returns the files of the site by where they are in the repository."""
    return {Path(file.abs_src_path).resolve(): file for file in files if file.abs_src_path}


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Rewrites links of a page to files of the repository as links to where these are in the site."""
    there = {path: file.src_uri for path, file in by_path(files).items()}
    here, folder = Path(page.file.abs_src_path).parent, posixpath.dirname(page.file.src_uri) or "."

    def rewritten(link: re.Match) -> str:
        uri = there.get((here / link["path"]).resolve())
        return link[0] if uri is None else f"]({posixpath.relpath(uri, folder)}{link['rest']})"

    return re.sub(r"\]\((?P<path>[^)#\s:]+)(?P<rest>[^)\s:]*)\)", rewritten, markdown)


def on_page_content(html: str, page, config, files: Files) -> str:
    """Rewrites links of a notebook as `on_page_markdown` does those of a page, and drops scripts that load others.

    Raises:
        PluginError: A link leads to no file of the site.
    """
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    there, here = by_path(files), Path(page.file.abs_src_path).parent

    def rewritten(link: re.Match) -> str:
        file = there.get((here / link["path"]).resolve())
        if file is None:
            raise PluginError(f"{page.file.src_uri} links to {link['path']}, which is not in the site")
        return f'<a href="{file.url_relative_to(page.file)}{link["rest"]}"'

    def kept(script: re.Match) -> str:  # nbconvert's MathJax and Mermaid come from a network
        return "" if re.search("src=|://", script[0]) else script[0]

    html = re.sub(r"<script\b.*?</script>", kept, html, flags=re.S)
    return re.sub(r'<a href="(?P<path>[^"#:]+)(?P<rest>[^":]*)"', rewritten, html)
