"""A hook of mkdocs: pages from outside docs/ join the site, and the links among all pages are rewritten to match."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# File in the repository -> page of the site; what is in docs/ keeps its name.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "testbed/README.md": "miniature.md",
    "testbed/samples.png": "samples.png",
} | {str(file.relative_to(ROOT)): f"measured/{file.name}" for file in (ROOT / "benchmarks/results").iterdir()}
_SOURCES = {page: source for source, page in OUTSIDE.items()}
# A link or picture to another file here: no address with a scheme, no anchor within the page.
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri

    def rewritten(link: re.Match[str]) -> str:
        folder = posixpath.dirname(_SOURCES.get(here, f"docs/{here}"))
        target = posixpath.normpath(posixpath.join(folder, link[1]))
        return posixpath.relpath(OUTSIDE.get(target, target.removeprefix("docs/")), posixpath.dirname(here) or ".")

    return _LINK.sub(rewritten, markdown)
