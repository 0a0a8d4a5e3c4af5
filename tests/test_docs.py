"""The pages in docs/ are true: their code runs and prints what it says, their links lead on."""

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))


def python_blocks(page):
    """The code of each block, on its own lines of the page, so that a traceback names the line."""
    text = page.read_text()
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield "\n" * text.count("\n", 0, block.start(1)) + block[1]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_and_prints_what_it_says(page):
    names = {"__name__": page.stem}
    for code in python_blocks(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), names)
        said = re.findall(r"^print\(.*\)  # (.+)$", code, re.MULTILINE)
        assert code.count("print(") == len(said)
        assert printed.getvalue().splitlines() == said


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_links_lead_to_files_and_to_tests_of_that_name(page):
    links = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", page.read_text())
    assert links
    for text, target in links:
        if not target.startswith("http"):
            path = page.parent / target
            assert path.exists(), target
            test = text.strip("`")
            assert not test.startswith("test_") or f"def {test}(" in path.read_text(), test
