"""Completions that share their prompt: the results and gradients of copies, with fewer tokens."""

import dataclasses

import pytest
import torch
from test_head import FAMILIES, build
from tiny_trainer import make_trainer, tiny_model
from transformers import BloomConfig, GenerationConfig, MistralConfig

from fastpg.trainer.learning.packable import CannotPack, find_packing
from fastpg.trainer.models.forward import predicting_states
from fastpg.trainer.models.head import completion_logprobs, find_head
from fastpg.trainer.models.packing import Packing, find_families, pack
from fastpg.trainer.rollouts import generation
from fastpg.trainer.rollouts.generation import Sampler, sampling
from fastpg.trainer.rollouts.rollout import completion_mask

WHOLE = Packing(additive=False, token_cost=1e9)
"""A packing that puts any number of completions behind a prompt."""

GROUPS = {(0, 4): 6, (4, 6): 4, (6, 9): 3}
"""Episodes with one prompt, and the tokens of that."""
LENGTHS = (5, 1, 3, 2, 2, 1, 1, 2, 3)
"""The tokens of their completions."""


def batch(padded=True):
    """Nine episodes of three prompts, with completions of at most 5 tokens."""
    torch.manual_seed(3)
    ids = torch.randint(2, 43, (9, 11))
    mask = torch.ones_like(ids)
    for (start, end), length in GROUPS.items():
        ids[start:end, :6] = ids[start, :6]
        if padded:
            mask[start:end, : 6 - length] = 0
    for episode, length in enumerate(LENGTHS):
        mask[episode, 6 + length :] = 0
    return ids, mask


def results_and_gradients(model, packing, padded):
    model.zero_grad()
    ids, mask = batch(padded)
    counts = mask[:, -5:].bool()
    labels = ids[:, -5:].where(counts, -100)
    head = find_head(model, torch.no_grad)
    logp, entropy, hidden = completion_logprobs(model, ids, mask, labels, 1.3, head, packing)
    kept = [x[counts] for x in (logp, entropy, hidden)]
    sum(x.sin().sum() for x in kept).backward()
    return kept, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# GPT-2 has learned positions. The norms of Llama compute in float32 whatever the dtype is.
@pytest.mark.parametrize("family, rtol", [("gpt2", 1e-10), ("phi", 1e-10), ("llama", 2e-5),
                                          ("qwen3", 2e-5), ("gemma2", 2e-5)])  # fmt: skip
@pytest.mark.parametrize("room", ["whole families", "two rows for a family"])
def test_results_and_gradients_are_those_of_copies(family, rtol, room):
    model = build(FAMILIES[family][0])
    found = find_packing(model)
    packing = dataclasses.replace(found, token_cost=1e9 if room == "whole families" else 6.0)
    # Eager attention in float64 is NaN where nothing is seen, with padding on the left.
    padded = not found.additive
    packed = results_and_gradients(model, packing, padded)
    plain = results_and_gradients(model, None, padded)
    torch.testing.assert_close(packed, plain, rtol=rtol, atol=rtol)


def test_a_prompt_stands_in_a_row_once_and_no_last_token_does():
    ids, mask = batch()
    rows = pack(ids, mask, 5, WHOLE)
    tokens = sum(GROUPS.values()) + sum(length - 1 for length in LENGTHS)
    assert int((rows.family >= 0).sum()) == tokens == 24
    assert rows.source.shape == (2, 6 + 7)  # The second and third family share a row.
    # Without a cost of its own, a token is best read behind a prompt of as many tokens.
    families = find_families(ids, mask, 5, Packing(additive=False, token_cost=0.0))
    assert [family.episodes for family in families] == [[0, 1, 2], [3], [4, 5], [6, 7, 8]]
    assert [family.first for family in families] == [0, 0, 4, 6]


def test_the_room_behind_a_prompt_is_the_cheapest():
    packing = Packing(additive=False, token_cost=300.0)

    def cost(room):
        """The cost of a token of a completion, with so many of them in a row."""
        row = 50 + room
        return (packing.token_cost * row + row**2) / room

    best = packing.room(50)
    assert cost(best) < min(cost(best * 0.98), cost(best * 1.02))


def sampled(model, packing, prompts, max_new_tokens=6, ends=(1, 5)):
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, temperature=1.3, eos_token_id=list(ends), pad_token_id=0,
        do_sample=True, top_k=0,
    )  # fmt: skip
    with sampling(model, config):
        return generation.generate(model, *prompts, config, packing)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("token_cost", [1e9, 60.0, 0.0])
def test_tokens_are_drawn_from_the_models_own_distribution(monkeypatch, family, token_cost):
    """With the most likely token for every draw: for whole, split and single families."""
    monkeypatch.setattr(Sampler, "draw", lambda self, logits: logits.argmax(-1))
    model = build(FAMILIES[family][0])
    found = find_packing(model)
    packing = dataclasses.replace(found, token_cost=token_cost)
    ids, mask = batch(padded=not found.additive)
    sequences = sampled(model, packing, (ids[:, :6], mask[:, :6]), ends=(1, 5, 9, 20, 21))
    for prompt, kept, sequence in zip(ids, mask, sequences, strict=True):
        context = prompt[:6][kept[:6].bool()].tolist()
        for token in sequence[6:].tolist():
            if context[-1] in (1, 5, 9, 20, 21) and len(context) > 6:
                assert token == 0
                break
            assert token == model(torch.tensor([context])).logits[0, -1].argmax()
            context.append(token)


def test_the_completions_of_a_prompt_differ_and_ended_ones_cost_nothing(monkeypatch):
    model, prompts = tiny_model(), torch.randint(2, 43, (1, 6)).repeat(12, 1)
    widths = []
    forward = model.model.forward

    def counting(**inputs):
        widths.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    monkeypatch.setattr(model.model, "forward", counting)
    torch.manual_seed(0)
    sequences = sampled(model, WHOLE, (prompts, torch.ones_like(prompts)), 40, range(1, 12))
    completions = [tuple(row) for row in sequences[:, 6:].tolist()]
    assert len(set(completions)) > 6
    lengths = completion_mask(sequences[:, 6:], range(1, 12))[0].sum(1).tolist()
    assert sequences.shape[1] == 6 + max(lengths)
    # A completion of n tokens has been read n - 1 times, and its prompt once for all of them.
    assert widths == [(1, 6)] + [
        (1, sum(length > step for length in lengths)) for step in range(1, max(lengths))
    ]


def test_a_model_that_takes_no_positions_is_not_packed():
    sizes = {"vocab_size": 43, "hidden_size": 32, "n_layer": 2, "n_head": 2}
    with pytest.raises(CannotPack, match="BloomForCausalLM takes no position_ids"):
        find_packing(build(BloomConfig(**sizes)))


def test_a_window_bounds_the_episodes_that_are_packed():
    sizes = {"vocab_size": 43, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    model = build(MistralConfig(**sizes, sliding_window=14))
    packing = find_packing(model)
    assert packing.holds(14) and not packing.holds(15)
    with pytest.raises(CannotPack, match="off by"):
        find_packing(build(MistralConfig(**sizes, sliding_window=5)))


def test_a_model_that_ignores_the_mask_is_not_packed(tmp_path, caplog):
    model = tiny_model()
    forward = model.model.forward

    def without_own_mask(**inputs):
        if inputs["attention_mask"].dim() == 4:
            inputs["attention_mask"] = None
        return forward(**inputs)

    model.model.forward = without_own_mask
    trainer = make_trainer(tmp_path, model=model)
    assert trainer.learner.paths.packing is None
    (record,) = caplog.records
    assert "Every completion goes through the model with its prompt" in record.message
    assert "off by" in record.message


def test_states_of_a_batch_that_a_window_forbids_are_plain():
    model = build(FAMILIES["gpt2"][0])
    ids, mask = batch()
    packing = dataclasses.replace(find_packing(model), window=10)
    plain = predicting_states(model, ids, mask, 5, None)
    torch.testing.assert_close(
        predicting_states(model, ids, mask, 5, packing), plain, rtol=0, atol=0
    )
