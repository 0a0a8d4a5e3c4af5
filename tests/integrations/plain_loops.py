"""Runs the recipes of docs/plain_loops.md, and computes what they should train in plain torch."""

import copy
import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs/plain_loops.md"
RATE = 0.5  # of SGD, in every recipe


def code_of(text):
    """The one block of code of a section."""
    (code,) = re.findall(r"^```py(?:thon)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return code


def sections():
    """What all recipes begin with, and the recipes by their headings."""
    beginning, *parts = re.split(r"^## (.+)\n", PAGE.read_text(), flags=re.MULTILINE)
    texts = dict(zip(parts[::2], parts[1::2], strict=True))
    return code_of(beginning), {title: code_of(text) for title, text in texts.items()}


BEGINNING, RECIPES = sections()


def begin():
    """The names that every recipe begins with: the model, the rows, ..."""
    names = {"__name__": "recipe"}
    exec(BEGINNING, names)
    return names


def run(recipe):
    """Runs a recipe; returns its names, and a copy of the model as it was before."""
    names = begin()
    before = copy.deepcopy(names["lm"])
    exec(compile(RECIPES[recipe], PAGE, "exec"), names)
    return names, before


def batch_of(rows):
    """All rows as one batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def ppo_loss(model, rows):
    """The clipped loss of PPO, from the logits."""
    batch = batch_of(rows)
    labels = batch["labels"][:, 1:].clamp(min=0)
    logits = model(batch["input_ids"]).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    ratio = (logp - batch["old_logp"]).exp()
    gain, clipped = (r * batch["advantages"] for r in (ratio, ratio.clamp(0.8, 1.2)))
    return -(torch.minimum(gain, clipped) * batch["weight"]).sum()


def trained_plainly(model, loss):
    """The weights of a model after one step of SGD, of those that have a gradient."""
    loss.backward()
    return {
        name: x.detach() - RATE * x.grad
        for name, x in model.named_parameters()
        if x.grad is not None
    }


def assert_trained(found, expected, before):
    """Every weight is what was expected, and not what it was before."""
    assert expected
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-6, msg=name)
        assert (x - before[name]).abs().max() > 1e-5, name


def assert_recipe_trains_as_a_plain_loop(recipe):
    """For a recipe that trains `lm` itself by `ppo_loss`."""
    names, before = run(recipe)
    expected = trained_plainly(before, ppo_loss(before, names["rows"]))
    assert_trained(dict(names["lm"].named_parameters()), expected, dict(before.named_parameters()))
