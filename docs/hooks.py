"""Hook of MkDocs: pages and pictures that lie outside of docs/ are part of the site, and links to them lead there.

In the repository each link is relative to its file, as a forge's view of the file takes it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/studies/README.md": "studies.md",
}
COPIES = ["CITATION.cff", *(str(path.relative_to(ROOT)) for path in ROOT.glob("bench/studies/results/*.png"))]


def on_files(files: Files, config) -> Files:
    """Adds what lies outside of docs/; pages by their names in PAGES, all else below files/."""
    for source, name in (PAGES | {copy: f"files/{copy}" for copy in COPIES}).items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Rewrites links of a page to files of the repository as links to where these are in the site."""
    there = {Path(file.abs_src_path).resolve(): file.src_uri for file in files if file.abs_src_path}
    here, folder = Path(page.file.abs_src_path).parent, posixpath.dirname(page.file.src_uri) or "."

    def rewritten(link: re.Match) -> str:
        uri = there.get((here / link["path"]).resolve())
        return link[0] if uri is None else f"]({posixpath.relpath(uri, folder)}{link['rest']})"

    return re.sub(r"\]\((?P<path>[^)#\s:]+)(?P<rest>[^)\s:]*)\)", rewritten, markdown)
