"""Tied embeddings: their gradient is added to that of the head, and no second one is made."""

import contextlib

import pytest
import torch
from test_micro_batches import gradient
from test_trainer import tiny_gpt2
from tiny_trainer import tiny_model

from fastpg.trainer import learner


def tied_model():
    """A model whose weight is both, with a padding row that is sampled as well."""
    return tiny_model(tie_word_embeddings=True, pad_token_id=3)


@pytest.mark.parametrize("make_model", [tied_model, tiny_gpt2])
def test_the_gradient_is_that_of_autograd(tmp_path, monkeypatch, make_model):
    """In several micro-batches, in fp64."""
    settings = {"algorithm": "grpo", "num_generations": 5, "max_new_tokens": 8}
    calls = []
    lookup = torch.nn.functional.embedding

    def counted(ids, weight, *args, **kwargs):
        states = lookup(ids, weight, *args, **kwargs)
        if states.requires_grad:
            states.register_hook(lambda _: calls.append(weight.shape))
        return states

    monkeypatch.setattr(torch.nn.functional, "embedding", counted)
    ours, _ = gradient(tmp_path / "a", make_model, **settings)
    tied = next(iter(ours.values())).shape
    assert tied not in calls
    monkeypatch.setattr(learner, "one_gradient", lambda *_: contextlib.nullcontext())
    expected, _ = gradient(tmp_path / "b", make_model, **settings)
    assert tied in calls
    assert ours.keys() == expected.keys()
    for name, theirs in expected.items():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-9, atol=1e-12)
