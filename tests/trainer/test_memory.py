"""Tied embeddings have one gradient, and a reference leaves memory while the policy learns."""

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from recorded_runs import trained_parameters
from test_micro_batches import gradient
from test_trainer import tiny_gpt2
from tiny_trainer import make_trainer, metrics_of, tiny_model

from fastpg.trainer.learning import learner
from fastpg.trainer.models import memory
from fastpg.trainer.models.memory import Aside


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


def resident():
    """The bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="weights move under Linux only")


@linux_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_put_aside_needs_no_memory_and_keeps_its_weights(tmp_path, dtype):
    model = torch.nn.ModuleList([torch.nn.Linear(1999, 2001), torch.nn.Linear(2001, 1500)])
    model.to(dtype).requires_grad_(False)
    model.append(torch.nn.Linear(2001, 1500))
    model[2].weight = model[1].weight
    before = [weight.clone() for weight in model.parameters()]
    size = sum(weight.nbytes for weight in before)
    aside = Aside(model, tmp_path)
    aside.weights = list(model.parameters())
    for _ in range(2):
        memory.give_back_freed()
        with_it = resident()
        aside.put()
        memory.give_back_freed()
        assert with_it - resident() > 0.9 * size
        for weight, value in zip(model.parameters(), before, strict=True):
            assert torch.equal(weight, value)
    assert model[2].weight is model[1].weight
    # The file has no name that would have to be removed.
    assert not list(tmp_path.iterdir())


@linux_only
def test_a_model_stays_where_there_is_no_room_for_it(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory, "WORTH_A_FILE", 0)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    PartialState()  # accelerate's loggers ask for it
    model = tiny_model()
    places = [weight.data_ptr() for weight in model.parameters()]
    aside = Aside(model, tmp_path)
    for _ in range(2):
        aside.put()
    assert [weight.data_ptr() for weight in model.parameters()] == places
    (warning,) = caplog.messages
    assert "stays in memory while the policy learns: [Errno 28] No space left" in warning


def test_a_small_model_and_none_are_not_put_aside(tmp_path):
    for model in (tiny_model(), None):
        aside = Aside(model, tmp_path)
        aside.put()
        assert aside.weights == [] and not list(tmp_path.iterdir())


@linux_only
def test_a_run_whose_reference_is_put_aside_ends_in_the_same_bits(tmp_path, monkeypatch):
    settings = {"algorithm": "grpo", "num_generations": 5, "num_eval_samples": 1}
    settings |= {"num_ppo_epochs": 1, "num_mini_batches": 1}
    here = make_trainer(tmp_path / "a", **settings)
    here.train()
    monkeypatch.setattr(memory, "WORTH_A_FILE", 0)
    aside = make_trainer(tmp_path / "b", **settings)
    assert aside.aside.weights and not here.aside.weights
    aside.train()
    assert torch.equal(trained_parameters(aside), trained_parameters(here))
    kl = [[row["objective/kl"] for row in metrics_of(tmp_path / run)] for run in "ab"]
    assert kl[0] == kl[1] and kl[0][-1] != 0
