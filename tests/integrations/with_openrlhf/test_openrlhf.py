"""OpenRLHF's functions and ours on the same batches, and its actor with both.

What OpenRLHF computes in fp64 is the oracle of what we compute in fp32.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from accuracy import assert_no_worse
from openrlhf_here import actors, experience, ring_attn_utils, utils

from fastpg.integrations import openrlhf as ours
from fastpg.integrations import openrlhf_verify
from fastpg.integrations.patching import PatchError
from fastpg.integrations.verifying import Sizes

B, T, VOCAB = 6, 40, 300
PADDED = torch.arange(T) < torch.tensor([40, 31, 17, 1, 5, 9])[:, None]


@pytest.fixture(autouse=True)
def no_compilation():
    """OpenRLHF compiles its entropy, which would take seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield
    ours.unpatch()


def masks():
    return {"right-padded": PADDED, "holes": PADDED & (torch.rand(B, T) > 0.3), "none": None}


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0)])
@pytest.mark.parametrize("name", ["right-padded", "holes", "none"])
def test_advantages_and_returns_at_every_slot(name, gamma, lam):
    mask, (rewards, values) = masks()[name], torch.randn(2, B, T)
    results = ours.get_advantages_and_returns(None, values, rewards, mask, gamma, lam)
    wide = values.double(), rewards.double(), None if mask is None else mask.double()
    stock = experience.RemoteExperienceMaker
    oracles = stock.get_advantages_and_returns(None, *wide, gamma, lam)
    for result, oracle in zip(results, oracles, strict=True):
        torch.testing.assert_close(result.double(), oracle, rtol=2e-6, atol=2e-6)
    result = ours.get_cumulative_returns(None, rewards, mask, gamma)
    oracle = stock.get_cumulative_returns(None, *wide[1:], gamma)
    torch.testing.assert_close(result.double(), oracle.double(), rtol=2e-6, atol=2e-6)


def test_what_is_in_the_padding_does_not_matter():
    rewards, values = torch.randn(2, B, T)
    clean = ours.get_advantages_and_returns(None, values, rewards, PADDED, 1.0, 0.95)
    rewards[~PADDED], values[~PADDED] = math.nan, math.inf
    spoilt = ours.get_advantages_and_returns(None, values, rewards, PADDED, 1.0, 0.95)
    assert all(torch.equal(a, b) for a, b in zip(clean, spoilt, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_entropies_are_no_worse_and_leave_the_logits_alone(dtype):
    logits = (2 * torch.randn(2, 12, VOCAB)).to(dtype)
    labels, before = torch.randint(VOCAB, (2, 12)), logits.clone()
    logp = ours.log_probs_from_logits(logits, labels, 0.7)
    entropy = ours.entropy_from_logits(logits)
    assert torch.equal(logits, before)
    oracle = utils.log_probs_from_logits(logits.double(), labels, 0.7)
    assert_no_worse(logp, utils.log_probs_from_logits(before, labels, 0.7), oracle, 2e-6)
    oracle = utils.compute_entropy(logits.double())
    assert_no_worse(entropy, utils.compute_entropy(logits), oracle, 2e-6)


def tiny_actor(dtype, temperature):
    """An actor around a small Qwen3."""
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3ForCausalLM(config).to(dtype)
    actor = actors.Actor(model, temperature=temperature)
    actor.packing_samples = False
    return actor


def step(actor, **wanted):
    """What a forward returns, and the gradients of a loss of it."""
    actor.zero_grad()
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(VOCAB, (3, 12), generator=generator)
    attention_mask = torch.arange(12) < torch.tensor([12, 9, 12])[:, None]
    logp, output = actor(sequences, attention_mask=attention_mask, return_output=True, **wanted)
    weight = torch.rand(logp.shape, generator=generator)
    loss = (logp * weight).sum()
    if wanted.get("return_entropy"):
        loss = loss - 0.1 * output.entropy.mean()
    loss.backward()
    entropy = getattr(output, "entropy", torch.zeros(1))
    grads = [p.grad.flatten() for p in actor.parameters()]
    return logp.detach(), entropy.detach(), torch.cat(grads)


WANTED = {
    "actions": {"action_mask": torch.arange(7).expand(3, 7) < 6},
    "actions and entropy": {
        "action_mask": torch.arange(7).expand(3, 7) < 6,
        "return_entropy": True,
    },
    "log-probs": {"return_logprobs": True},
}


@pytest.mark.parametrize("words", [["logprob", "entropy"], ["actor"], ours.WORDS], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_the_actor_gives_the_same_and_the_same_gradients(wanted, temperature, words):
    actor = tiny_actor(torch.float32, temperature)
    stock = step(actor, **wanted)
    with ours.patched(words, strict=True):
        mine = step(actor, **wanted)
    assert stock[2].norm() > 0
    for result, expected in zip(mine, stock, strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-6)


def flash_attn_padding():
    """What flash_attn.bert_padding has, in PyTorch."""

    def unpad_input(x, mask):
        indices = mask.flatten().nonzero()[:, 0]
        return x.flatten(0, 1)[indices], indices, None, None, None

    def pad_input(x, indices, batch, seqlen):
        padded = x.new_zeros(batch * seqlen, *x.shape[1:]).index_copy(0, indices, x)
        return padded.view(batch, seqlen, *x.shape[1:])

    return {
        "unpad_input": unpad_input,
        "pad_input": pad_input,
        "index_first_axis": lambda x, indices: x[indices],
        "rearrange": lambda x, _pattern: x.flatten(0, 1),
    }


def test_the_actor_of_packed_sequences_gives_the_same(monkeypatch):
    for name, function in flash_attn_padding().items():
        monkeypatch.setattr(ring_attn_utils, name, function)
    actor, wanted = tiny_actor(torch.float32, 0.7), WANTED["actions and entropy"]
    actor.packing_samples = True
    stock = step(actor, **wanted)
    with ours.patched(["actor"], strict=True):
        mine = step(actor, **wanted)
    for result, expected in zip(mine, stock, strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-6)


def test_the_actor_makes_no_copy_of_bf16_logits_and_is_as_exact():
    actor, wanted = tiny_actor(torch.bfloat16, 0.7), WANTED["actions and entropy"]
    stock = step(actor, **wanted)
    with ours.patched(["actor"], strict=True):
        mine = step(actor, **wanted)
        sequences, attention_mask = torch.arange(8)[None], torch.ones(1, 8)
        _, output = actor(sequences, None, attention_mask, True, return_logprobs=True)
    assert output.logits.dtype == torch.bfloat16
    # Both read the same logits in bf16; the gradient of logits is rounded to bf16 by both.
    torch.testing.assert_close(mine[0], stock[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine[1], stock[1], rtol=1e-5, atol=1e-5)
    assert (mine[2] - stock[2]).norm() <= 2e-2 * stock[2].norm()


def test_a_forward_for_its_logits_is_the_stock_one():
    actor = tiny_actor(torch.float32, 0.7)
    arguments = torch.arange(8)[None], None, torch.ones(1, 8)
    stock = actor(*arguments, return_output=True)["logits"]
    with ours.patched(strict=True):
        assert torch.equal(actor(*arguments, return_output=True)["logits"], stock)


def test_patching_reaches_the_holders_and_unpatching_gives_back_what_was():
    held = [
        (utils, "log_probs_from_logits"),
        (utils, "compute_entropy"),
        (actors, "log_probs_from_logits"),
        (actors, "compute_entropy"),
        (actors.Actor, "forward"),
        (experience.RemoteExperienceMaker, "get_advantages_and_returns"),
        (experience.RemoteExperienceMaker, "get_cumulative_returns"),
    ]
    stock = [vars(owner)[name] for owner, name in held]
    report = ours.patch(strict=True)
    assert report.complete and report.version == "0.11.2" and ours.is_patched()
    assert all(
        vars(owner)[name] is not each for (owner, name), each in zip(held, stock, strict=True)
    )
    assert all(row.state == "refused" for row in ours.patch().rows)
    with pytest.raises(PatchError, match="already patched"):
        ours.patch(strict=True)
    ours.unpatch()
    assert all(vars(owner)[name] is each for (owner, name), each in zip(held, stock, strict=True))
    assert not ours.is_patched()


def test_verify_finds_ours_no_less_exact(monkeypatch):
    monkeypatch.setattr(openrlhf_verify, "LENGTH", 200)
    report = ours.verify(Sizes(vocab=500, hidden=32, tokens=20))
    # A busy machine is no place to compare times.
    assert {row.worse for row in report.rows} <= {"", "time", "memory"}, str(report)
    judged = [row for row in report.rows if row.ours.value >= 0]
    assert len(judged) >= 5 and not ours.is_patched()


def test_an_unknown_word_raises():
    with pytest.raises(ValueError, match=r"what must be of gae, .*, got 'loss'"):
        ours.patch(["loss"])


def test_a_worker_of_ray_is_patched_when_it_imports_openrlhf():
    code = """
import fastpg_hooks
fastpg_hooks.openrlhf()
from openrlhf_here import actors, experience
for f in (
    actors.Actor.forward,
    actors.log_probs_from_logits,
    experience.RemoteExperienceMaker.get_advantages_and_returns,
):
    print(f.__module__.partition(".")[0])
"""
    environment = os.environ | {"FASTPG_OPENRLHF": "gae, logprob,loss"}
    here = Path(__file__).parent
    folders = [str(here), str(here.parents[1]), environment["PYTHONPATH"]]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["openrlhf", "fastpg", "fastpg"]
    assert "FASTPG_OPENRLHF has 'loss', must be of gae, logprob" in run.stderr
