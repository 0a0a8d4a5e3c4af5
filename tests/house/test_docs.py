"""The pages in docs/ are true: their code runs and prints what it says, their links lead on."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from fastpg.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").rglob("*.md"))


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


def test_the_ops_of_the_readme_run():
    first, loop, hidden, *_ = python_blocks(README)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(first, {})
    assert "'clip_frac" in printed.getvalue()
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(loop + hidden, names)
    assert "'ess': 1.0" in printed.getvalue() and names["logits"].grad.isfinite().all()
    assert names["lm_head"].grad.isfinite().all() and names["lm_head"].grad.any()


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.stem)
def test_links_lead_to_files_and_to_tests_of_that_name(page):
    links = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", page.read_text())
    assert links
    for text, target in links:
        if not target.startswith("http"):
            path = page.parent / target.partition("#")[0]
            assert path.exists(), target
            test = text.strip("`")
            assert not test.startswith("test_") or f"def {test}(" in path.read_text(), test


ROWS = {row.title: row for row in ALGORITHMS.values()}
PAGE = ROOT / "docs/algorithms.md"


def call(op, *arguments, **options):
    return f"`{op}({', '.join([*arguments, *(f'{k}={v!r}' for k, v in options.items())])})`"


def credit(row):
    """The calls from scores to advantages. What is left out changes nothing."""
    penalty = {"kl_coef": row.kl_coef} if row.kl_coef else {}
    steps = ["`scores - {kl_coef} * kl`".format(**penalty)] if row.kl == "score" else []
    steps += [call("group_center", **row.center)] if row.center else []
    if row.kl == "reward":
        steps.append(call("token_rewards", **penalty).replace("()", ""))
    if not row.center:
        steps.append(call("gae", *["values"] * row.critic, **row.gae))
    return ", ".join(steps + ["`whiten`"] * row.whiten)


def table():
    """| algorithm | credit | weight | surrogate |, from the data"""
    yield "| algorithm | credit | weight | surrogate |"
    yield "|---|---|---|---|"
    for row in ALGORITHMS.values():
        weight = f"`{row.reduce}`" + ", constant `denom`" * row.per_length
        penalty = {"kl_coef": row.kl_coef} if row.kl == "loss" and row.kl_coef else {}
        options = {k: v for k, v in (row.surrogate | penalty).items() if k != "surrogate"}
        surrogate = call(row.surrogate["surrogate"], **options).replace("()", "")
        surrogate += " + `value_loss`" * row.critic
        yield f"| {row.title} | {credit(row)} | {weight} | {surrogate} |"


def test_the_table_of_algorithms_is_the_data():
    _, written, _ = re.split(r"<!-- /?table -->\n", PAGE.read_text())
    assert written == "".join(
        f"{line}\n" for line in table()
    )  # python tests/house/test_docs.py prints it


def test_the_calls_of_a_row_are_the_data():
    """Each block under a title of ALGORITHMS gives the loss and gradient of its row."""
    block = r"^##+ ([^\n]*)\n(?:(?!^##).)*?^```python\n(.*?)^```$"  # under its own heading
    x, seen = {}, []
    for title, code in re.findall(block, PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(code, x)
        if title not in ROWS:
            continue
        row = ROWS[title]
        seen.append(title)
        advantages, returns = row.advantages(
            x["scores"], x["mask"], group=x["group"], values=x["values"], kl=x["kl"]
        )
        weight = row.weights(x["mask"], row.denom(x["mask"], x["max_length"]))
        old_logp = x["old_logp"] if "old_logp" in code else None
        loss, _ = row.loss(x["logp"], advantages, weight, old_logp=old_logp, ref_logp=x["ref_logp"])
        grads = [torch.autograd.grad(each, x["logp"])[0] for each in (loss, x["loss"])]
        torch.testing.assert_close(loss, x["loss"])
        torch.testing.assert_close(*grads)
        if row.critic:
            torch.testing.assert_close(returns, x["returns"])
    assert seen == list(ROWS)


if __name__ == "__main__":
    print("\n".join(table()))
