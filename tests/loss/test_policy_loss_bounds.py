"""policy_loss where a log-ratio is at its bound, and where a log-prob is -inf."""

import math

import pytest
import torch
from accuracy import leaves
from test_policy_loss import CASES

from fastpg import PolicyStats, merge_stats, policy_loss

OP = "policy_loss"
SURROGATES = ("ppo", "reinforce", "cispo", "sapo")
UNBOUNDED = {"clip": (None, None)}


def fields_of(stats):
    return dict(zip(PolicyStats.FIELDS, stats.values.tolist(), strict=True))


@pytest.mark.parametrize("d", [-20.25, -20.0, -19.75, 19.75, 20.0, 20.25])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beyond", ["stop", "hold"])
def test_log_ratios_are_bounded_by_20_and_no_less(kernel, level, d, beyond):
    logp = torch.full((1, 3), -30.0, dtype=torch.float64)
    (leaf,) = leaves(logp)
    loss, stats = policy_loss(
        leaf, torch.ones_like(logp), torch.ones_like(logp), old_logp=logp - d, level=level,
        ref_logp=logp - d, kl_coef=1.0, kl="k2", beyond=beyond, **UNBOUNDED,
    )  # fmt: skip
    loss.backward()
    bounded = max(-20.0, min(20.0, d))
    ratio = math.exp(bounded)
    assert loss.item() == pytest.approx(3 * (bounded**2 / 2 - ratio), rel=1e-12)
    slope = 0.0 if beyond == "stop" and bounded != d else bounded - ratio
    torch.testing.assert_close(leaf.grad, torch.full_like(logp, slope), rtol=1e-12, atol=0)
    fields = fields_of(stats)
    assert fields["k1"] == -3 * bounded and fields["ref_kl"] == 3 * bounded**2 / 2
    assert fields["ratio_min"] == fields["ratio_max"] == pytest.approx(ratio, rel=1e-12)


def clamped_by_torch(logp, advantages, old_logp, ref_logp, *, bound, surrogate, kl, beyond):
    """The loss of each token as it is commonly written, where torch.clamp stops gradients."""
    d = logp - old_logp
    ratio = d.clamp(-bound, bound).exp()
    if beyond == "hold":  # the value of the clamped ratio moves like the ratio
        ratio = ratio.detach() * (logp - logp.detach()).exp()
    if surrogate in ("reinforce", "cispo"):
        loss = -ratio.detach() * advantages * logp
    elif surrogate == "sapo":
        tau = 1 + 0.05 * (advantages < 0).to(logp.dtype)
        loss = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
    else:
        loss = -ratio * advantages
    d = (logp - ref_logp).clamp(-bound, bound)
    if beyond == "hold":
        d = d.detach() + (logp - logp.detach())
    if kl == "k2":
        return loss + 0.1 * d**2 / 2
    return loss + 0.1 * (torch.exp(-d) - 1 + d)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("beyond", ["stop", "hold"])
@pytest.mark.parametrize("kl", ["k2", "k3_naive"])
def test_the_bound_is_that_of_a_clamp_in_torch(kernel, surrogate, beyond, kl):
    g = torch.Generator().manual_seed(0)
    logp, advantages, d, d_ref = torch.randn(4, 60, generator=g, dtype=torch.float64)
    logp, old_logp, ref_logp = logp - 5, logp - 5 - 3 * d, logp - 5 - 3 * d_ref
    ours, plain = leaves(logp, logp)
    weight = torch.rand(60, generator=g, dtype=torch.float64)
    loss, stats = policy_loss(
        ours, advantages, weight, old_logp=old_logp, ref_logp=ref_logp, surrogate=surrogate,
        kl_coef=0.1, kl=kl, max_log_ratio=2.5, beyond=beyond, **UNBOUNDED,
    )  # fmt: skip
    by_torch = clamped_by_torch(
        plain, advantages, old_logp, ref_logp, bound=2.5, surrogate=surrogate, kl=kl, beyond=beyond
    )
    expected = (weight * by_torch).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, plain)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    assert 10 < ((logp - old_logp).abs() > 2.5).sum() < 50  # on both sides of the bound
    assert merge_stats(stats)["ratio_max"] == pytest.approx(math.exp(2.5), rel=1e-14)


@pytest.mark.parametrize("beyond", ["stop", "hold"])
def test_k3_has_a_gradient_only_where_both_log_ratios_have(kernel, beyond):
    """The log-ratios to the old and to the reference policy are within and beyond, in turn."""
    old_logp = torch.tensor([-1.0, -9.0, -1.0, -9.0], dtype=torch.float64)
    ref_logp = torch.tensor([-1.0, -1.0, -9.0, -9.0], dtype=torch.float64)
    (logp,) = leaves(torch.full((4,), -0.5, dtype=torch.float64))
    zeros, ones = torch.zeros_like(old_logp), torch.ones_like(old_logp)
    loss, _ = policy_loss(
        logp, zeros, ones, old_logp=old_logp, ref_logp=ref_logp, kl_coef=1.0, kl="k3",
        max_log_ratio=2.0, beyond=beyond,
    )  # fmt: skip
    ratio = (logp.detach() - old_logp).clamp(max=2.0).exp()
    d = (logp.detach() - ref_logp).clamp(max=2.0)
    torch.testing.assert_close(loss, (ratio * (torch.exp(-d) - 1 + d)).sum())
    slope = ratio * d
    if beyond == "stop":
        slope[1:] = 0
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], slope)


def test_one_token_far_from_its_sampler_does_not_make_the_step(kernel):
    """Where the default held the gradient, it was e^20 / 3 for this token."""
    (logp,) = leaves(torch.tensor([-1.0, -1.0, -1.0]))
    old_logp = torch.tensor([-1.0, -26.0, -1.1])
    loss, _ = policy_loss(logp, -torch.ones(3), torch.full((3,), 1 / 3), old_logp=old_logp)
    (grad,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(grad, torch.tensor([1.0, 0.0, math.exp(0.1)]) / 3)


INF = math.inf
# Log-probs of the policy and of the other, with their log-ratio: both infinite, or one alone.
INFINITE = (-INF, -INF, 0.0), (-INF, -2.0, -20.0), (-2.0, -INF, 20.0)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_log_ratio_of_infinite_log_probs(kernel, surrogate, level):
    """Of two it is 0, of one it is at its bound; it has no gradient, and no other token notices."""
    cases = torch.tensor(INFINITE, dtype=torch.float64)
    plain = torch.tensor([-1.0, -1.25, 0.25], dtype=torch.float64).expand_as(cases)
    logp, old_logp, d = torch.stack([cases, plain], 1).unbind(-1)  # sequences of such and a plain
    (leaf,) = leaves(logp)
    options = {"surrogate": surrogate, "beyond": "hold", **UNBOUNDED}
    ones = torch.ones_like(old_logp)
    loss, stats = policy_loss(leaf, ones, ones, old_logp=old_logp, level=level, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    mean = d if level == "token" else d.mean(1, keepdim=True).expand_as(d)
    fields = fields_of(stats)
    assert fields["ratio"] == pytest.approx(mean.exp().sum().item(), rel=1e-12)
    assert fields["k1"] == pytest.approx(-d.sum().item(), rel=1e-12)
    assert loss.isfinite() and stats.values.isfinite().all()
    # Where the log-prob is finite, reinforce and cispo differentiate it and no ratio.
    moves = level == "sequence" or surrogate in ("reinforce", "cispo")
    assert (grad[:2, 0] == 0).all() and (moves or grad[2, 0] == 0)
    (alone,) = leaves(logp[:, 1])
    loss, _ = policy_loss(alone, ones[:, 1], ones[:, 1], old_logp=alone - mean[:, 1], **options)
    torch.testing.assert_close(grad[:, 1], torch.autograd.grad(loss, alone)[0])


@pytest.mark.parametrize("case", ["reinforce", "ppo_on_policy"])
def test_a_token_that_cannot_be_counts_nothing_without_old_logp(kernel, case):
    """Of its own policy its ratio is 1; it has no gradient, and its logp multiplies nothing."""
    (logp,) = leaves(torch.tensor([-INF, -1.0]))
    options = CASES[case][0]
    loss, stats = policy_loss(logp, torch.tensor([3.0, 2.0]), torch.tensor([0.5, 0.5]), **options)
    loss.backward()
    assert logp.grad.tolist() == [0.0, -1.0]
    assert loss == (1.0 if case == "reinforce" else -2.5)
    assert merge_stats(stats)["ratio_min"] == merge_stats(stats)["ratio_max"] == 1


@pytest.mark.parametrize("surrogate", ["reinforce", "cispo"])
def test_an_impossible_token_without_an_advantage_costs_nothing(kernel, surrogate):
    (logp,) = leaves(torch.tensor([-INF, -1.0]))
    advantages, weight = torch.tensor([0.0, 2.0]), torch.tensor([0.5, 0.5])
    loss, _ = policy_loss(logp, advantages, weight, surrogate=surrogate)
    loss.backward()
    assert loss == 1.0
    assert logp.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("kl", ["k2", "k3", "k3_naive"])
def test_the_kl_of_infinite_log_probs(kernel, kl):
    logp, ref_logp, d = torch.tensor([*INFINITE, (-1.0, -1.5, 0.5)], dtype=torch.float64).unbind(1)
    (leaf,) = leaves(logp)
    zeros, ones = torch.zeros_like(logp), torch.ones_like(logp)
    loss, stats = policy_loss(
        leaf, zeros, ones, old_logp=logp, ref_logp=ref_logp, kl_coef=1.0, kl=kl, beyond="hold"
    )
    expected = d**2 / 2 if kl == "k2" else torch.exp(-d) - 1 + d
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-12, atol=0)
    assert fields_of(stats)["ref_kl"] == pytest.approx(expected.sum().item(), rel=1e-12)
    slope = 1 - math.exp(-0.5) if kl == "k3_naive" else 0.5
    expected = torch.tensor([0.0, 0.0, 0.0, slope], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected)
