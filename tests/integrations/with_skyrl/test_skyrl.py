"""SkyRL's functions and ours on the same batches, and what the patch replaces."""

import pytest
import skyrl.backends.skyrl_train.utils.ppo_utils as credit
import skyrl.backends.skyrl_train.utils.torch_utils as stock
import skyrl.backends.skyrl_train.workers.model_wrapper as holder
import torch
from accuracy import assert_no_worse

from fastpg.integrations import skyrl as ours
from fastpg.integrations.patching import PatchError

B, T, V = 3, 7, 50
MASK = torch.arange(T) < torch.tensor([[7], [4], [1]])
HELD = [
    (stock, "logprobs_from_logits"),
    (holder, "logprobs_from_logits"),
    (stock, "chunked_entropy_from_logits"),
    (holder, "chunked_entropy_from_logits"),
    (credit, "compute_gae_advantage_return"),
]


@pytest.fixture(autouse=True)
def without_flash_attention(monkeypatch):
    """SkyRL takes a stub for it."""
    monkeypatch.setattr(stock, "FLASH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)


def held():
    registered = credit.AdvantageEstimatorRegistry._functions["gae"]
    return [vars(owner)[name] for owner, name in HELD] + [registered]


def test_everything_is_replaced_where_it_is_held_and_given_back():
    before = held()
    with ours.patched(strict=True) as report:
        assert report.version == "0.3.0" and ours.is_patched() and report.complete
        assert not any(a is b for a, b in zip(held(), before, strict=True))
        assert holder.logprobs_from_logits is stock.logprobs_from_logits
        assert "already patched" in str(ours.patch())
    assert not ours.is_patched()
    assert all(a is b for a, b in zip(held(), before, strict=True))


def test_another_release_is_in_the_report_and_raises_if_strict(monkeypatch):
    monkeypatch.setattr(ours._patches, "version", lambda: "0.4.0")
    with pytest.raises(PatchError, match=r"tested with skyrl 0\.3"):
        ours.patch(strict=True)
    assert not ours.is_patched()


def scores(logits, labels, logprobs, entropy, **options):
    """Log-probs, entropies and the gradient of both."""
    leaf = logits.clone().requires_grad_()
    scaled = leaf.clone().div_(0.7)  # as the model wrapper does
    logp, h = logprobs(scaled, labels), entropy(scaled, requires_grad=True, **options)
    (logp.sum() - 0.5 * h.sum()).backward()
    return logp, h, leaf.grad


@pytest.mark.parametrize("mask", [None, MASK], ids=["packed", "padded"])
def test_log_probs_entropies_and_gradients(mask):
    logits, labels = 3 * torch.randn(B, T, V), torch.randint(V, (B, T))
    functions = stock.logprobs_from_logits, stock.chunked_entropy_from_logits
    options = {"attention_mask": mask, "chunk_size": 3}
    exact = scores(logits.double(), labels, *functions, **options)
    theirs = scores(logits, labels, *functions, **options)
    with ours.patched(strict=True):
        replaced = holder.logprobs_from_logits, holder.chunked_entropy_from_logits
        mine = scores(logits, labels, *replaced, **options)
    for result, yardstick, oracle in zip(mine, theirs, exact, strict=True):
        assert_no_worse(result, yardstick, oracle, 2e-6)


def test_an_entropy_that_is_logged_has_no_gradient_and_a_wrong_mask_raises():
    logits = torch.randn(B, T, V, requires_grad=True)
    assert not ours.chunked_entropy_from_logits(logits).requires_grad
    with pytest.raises(ValueError, match=r"attention_mask must be \(3, 7\).*got \(3, 6\)"):
        ours.chunked_entropy_from_logits(logits, attention_mask=MASK[:, 1:])


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 1.0)])
def test_whitened_advantages_and_returns(gamma, lam):
    rewards, values = torch.randn(2, B, T)
    wide = rewards.double(), values.double(), MASK.double()
    exact = credit.compute_gae_advantage_return(*wide, gamma, lam)
    with ours.patched(strict=True):
        estimator = credit.AdvantageEstimatorRegistry._functions["gae"]
        advantages, returns = estimator(rewards, values, MASK, gamma=gamma, lambd=lam, index=None)
    torch.testing.assert_close(returns.double(), exact[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(advantages[MASK].double(), exact[0][MASK], rtol=1e-5, atol=1e-5)
    assert not advantages[~MASK].any()
