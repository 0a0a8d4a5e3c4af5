"""Files of the repository that pages link to become pages of the site, under repository/.

So the links that lead out of docs/ work on the site as they do in the repository. A link whose text
is the name of a test leads to the line where the test begins.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from docs.hooks import op_pages

ROOT = Path(__file__).parents[2]
FOLDER = "repository/"
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")
ALWAYS = ("CONTRIBUTING.md", "CHANGELOG.md")  # which the navigation names


def folder_of(page: str) -> str:
    """The folder, seen from the root of the repository, from which the links of a page start."""
    origin = page.removeprefix(FOLDER) if page.startswith(FOLDER) else f"docs/{page}"
    return posixpath.dirname(origin)


def outside(target: str, page: str) -> str | None:
    """The file outside docs/ that a link leads to, from the root; None where it leads elsewhere."""
    if "://" in target or target.startswith(("/", "mailto:")):
        return None
    path = posixpath.normpath(posixpath.join(folder_of(page), target))
    return None if path.startswith("docs/") and not page.startswith(FOLDER) else path


def page_of(path: str) -> str:
    """The page of the site that shows a file of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return FOLDER + (path if path.endswith(".md") else f"{path}.md")


def shown(path: str) -> str:
    """A file of the repository as Markdown: as it is, or as code with numbered lines."""
    text = (ROOT / path).read_text()
    hidden = "---\nsearch:\n  exclude: true\n---\n\n"
    if path.endswith(".md"):
        return hidden + text
    language = {"py": "python", "h": "cpp", "cu": "cpp"}.get(path.rpartition(".")[2], "text")
    return f'{hidden}# `{path}`\n\n`````{language} linenums="1"\n{text}\n`````\n'


def line_of(name: str, path: str) -> str:
    """The anchor of the line in which a function begins, if the text of a link names one."""
    lines = (ROOT / path).read_text().splitlines()
    found = (n for n, line in enumerate(lines, 1) if f"def {name.strip('`')}(" in line)
    return next((f"#__codelineno-0-{n}" for n in found), "")


def on_files(files: Any, config: Any) -> Any:
    """Called by MkDocs with the pages in docs/: adds those that they link to."""
    paths = set(ALWAYS)
    for file in files.documentation_pages():
        text = Path(file.abs_src_path).read_text()
        if op := op_pages.op_of(file.src_uri):
            paths.add(str(op_pages.source_of(op).relative_to(ROOT)))
        paths |= {outside(target, file.src_uri) for _, target, _ in LINK.findall(text)} - {None}
    for path in sorted(paths):
        if page_of(path).startswith(FOLDER):
            files.append(File.generated(config, page_of(path), content=shown(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for every page: turns its links to files into links to their pages."""
    here = page.file.src_uri

    def to_page(link: re.Match[str]) -> str:
        path = outside(link[2], here)
        if path is None:
            return link[0]
        target = posixpath.relpath(page_of(path), posixpath.dirname(here) or ".")
        return f"[{link[1]}]({target}{link[3] or line_of(link[1], path)})"

    shows_code = here.startswith(FOLDER) and not (ROOT / here.removeprefix(FOLDER)).exists()
    return markdown if shows_code else LINK.sub(to_page, markdown)
