"""Log-probs from hidden states: what `find_head` reads off a model is what the model computes."""

import contextlib
import copy
import functools

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from fastpg.integrations.peft import UnknownHead
from fastpg.trainer.models.head import (
    HeadTransform,
    completion_logprobs,
    completion_loss,
    find_head,
)

SIZES = {
    "vocab_size": 43,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GPT2_SIZES = {"vocab_size": 43, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1}
FAMILIES = {
    "llama": (LlamaConfig(**SIZES), HeadTransform()),
    "llama tied": (LlamaConfig(**SIZES, tie_word_embeddings=True), HeadTransform()),
    "qwen2": (Qwen2Config(**SIZES, tie_word_embeddings=True), HeadTransform()),
    "qwen3": (Qwen3Config(**SIZES), HeadTransform()),
    "gemma2": (Gemma2Config(**SIZES), HeadTransform(softcap=30.0)),
    "gemma3": (
        Gemma3TextConfig(**SIZES, final_logit_softcapping=20.0),
        HeadTransform(softcap=20.0),
    ),
    "gpt2": (GPT2Config(**GPT2_SIZES, eos_token_id=1), HeadTransform()),
    "phi": (PhiConfig(**SIZES), HeadTransform()),  # its head has a bias
    "cohere": (CohereConfig(**SIZES, logit_scale=0.25), HeadTransform(scale=0.25)),
    "granite": (GraniteConfig(**SIZES, logits_scaling=8.0), HeadTransform(scale=0.125)),
    "opt": (
        OPTConfig(**SIZES, word_embed_proj_dim=16, ffn_dim=48),
        HeadTransform(),
    ),  # states are projected
}


def build(config, dtype=torch.float64):
    """A model whose every parameter is random, biases too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    return perturb(model.eval().to(dtype))


def perturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch():
    """Two prompts of 5 tokens with completions of 4 and 2."""
    torch.manual_seed(1)
    ids, mask = torch.randint(2, 43, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, -2:] = 0
    return ids, mask, ids[:, -4:].where(mask[:, -4:].bool(), -100)


def logprobs_and_gradients(model, head):
    model.zero_grad()
    logp, entropy, hidden = completion_logprobs(model, *batch(), 1.3, head)
    (logp.sum() + 0.3 * entropy.square().sum() + hidden.square().mean()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {
        "logp": logp.detach(),
        "entropy": entropy.detach(),
        "hidden": hidden.detach(),
    }, gradients


def assert_gives_the_models_own(model, head):
    actual, expected = (logprobs_and_gradients(model, h) for h in (head, None))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.fixture
def calls(monkeypatch):
    """How many rows went through the LM head of a model, by call."""
    rows = []
    forward = nn.Linear.forward

    def counting(self, x):
        if self.out_features == 43:
            rows.append(x.shape[:-1].numel())
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_gives_the_log_probs_and_gradients_of_the_models_logits(family):
    config, expected = FAMILIES[family]
    model = build(config)
    head = find_head(model, contextlib.nullcontext)
    assert head == expected
    assert_gives_the_models_own(model, head)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("family", ["llama tied", "gemma2", "phi"])
def test_gives_the_loss_and_gradients_of_the_models_logits(family, level):
    config, expected = FAMILIES[family]
    model = build(config)
    factor = torch.linspace(-1, 2, 8, dtype=torch.float64)

    def token_loss(logp, entropy, rows):
        return ((factor[rows] * logp).sin() + 0.3 * entropy).sum(), len(rows)

    results = []
    for head in (expected, None):
        model.zero_grad()
        args = *batch(), 1.3, head, token_loss, level
        loss, counts, hidden = completion_loss(model, *args)
        (loss + hidden.square().mean()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), hidden.detach(), gradients))
        # Padding is a row without a label: 6 of 8 are, but for all at once.
        assert sum(counts) == (6 if head and level == "token" else 8)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_the_model_computes_no_logits(calls):
    model = build(FAMILIES["llama"][0])
    head = find_head(model, contextlib.nullcontext)
    calls.clear()
    completion_logprobs(model, *batch(), 1.0, head)
    completion_loss(model, *batch(), 1.0, head, lambda logp, *_: (logp.sum(), None), "token")
    assert calls == []
    completion_logprobs(model, *batch(), 1.0, None)
    assert calls == [2 * 5]  # the four states that predict, and the last one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_verifies_under_autocast(family, dtype):
    config, expected = FAMILIES[family]
    model = build(config, torch.float32)
    autocast = lambda: torch.autocast("cpu", dtype)  # noqa: E731
    assert find_head(model, autocast) == expected
    with autocast():
        logp, entropy, _ = completion_logprobs(model, *batch(), 1.0, expected)
    exact, _, _ = completion_logprobs(model, *batch(), 1.0, None)
    assert logp.dtype == entropy.dtype == torch.float32
    assert 0 < (logp - exact).abs().max() < 0.1


@pytest.mark.parametrize("change", [{"softcap": 30.0}, {"scale": 0.9}, {"scale": 1.1}])
def test_a_wrong_head_does_not_verify(monkeypatch, change):
    wrong = HeadTransform(**change)
    monkeypatch.setattr("fastpg.trainer.models.head.HeadTransform", lambda *_: wrong)
    with pytest.raises(UnknownHead, match=r"log-probs that differ by .* \(tolerance 0.0005\)"):
        find_head(build(FAMILIES["llama"][0]), contextlib.nullcontext)


def with_another_head(head):
    model = build(FAMILIES["llama"][0])
    model.lm_head = head
    return model


def with_a_hook():
    model = build(FAMILIES["llama"][0])
    model.lm_head.register_forward_hook(lambda *_: None)
    return model


def with_sharded_weights():
    model = build(FAMILIES["llama"][0])
    model.model.embed_tokens.weight = nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it
    return model


def with_config(family, **changes):
    model = build(FAMILIES[family][0])
    model.config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def with_logits(model, change):
    """A model that does one thing more to its logits."""
    forward = model.forward

    @functools.wraps(forward)
    def changed(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = changed
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_softcap_that_the_config_hides_does_not_verify(dtype):
    """Of logits as small as this model's it changes less than the tolerance."""
    model, cap = build(FAMILIES["llama"][0], dtype), 200.0
    logits = model(batch()[0]).logits.double()
    assert (cap * torch.tanh(logits / cap) - logits).abs().max() < 5e-4
    with_logits(model, lambda x: cap * torch.tanh(x / cap))
    with pytest.raises(UnknownHead, match="log-probs that differ"):
        find_head(model, contextlib.nullcontext)


def test_two_scales_multiply():
    model = with_config("cohere", output_multiplier=0.5)
    with_logits(model, lambda x: 0.5 * x)
    head = find_head(model, contextlib.nullcontext)
    assert head == HeadTransform(scale=0.125)
    assert_gives_the_models_own(model, head)


def test_a_config_that_wants_tuples_changes_nothing():
    model = with_config("llama", return_dict=False)
    assert_gives_the_models_own(model, find_head(model, contextlib.nullcontext))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: with_config("gemma2", final_logit_softcapping=0.0), "softcapping is 0.0"),
        (lambda: with_config("cohere", logit_scale=-0.5), "logit_scale is -0.5 in the model's"),
        (lambda: with_config("granite", logits_scaling=0), "logits_scaling is 0 in the model's"),
        (lambda: with_another_head(nn.Sequential()), "LM head is a torch.*Sequential"),
        (with_a_hook, "hook"),
        (with_sharded_weights, "weights are sharded"),
    ],
)
def test_a_head_that_is_no_plain_product_is_refused(make, reason):
    with pytest.raises(UnknownHead, match=reason):
        find_head(make(), contextlib.nullcontext)
