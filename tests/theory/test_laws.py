"""The theory, proved by enumeration: exact expectations over a policy of 27 completions.

The laws of one op are in its own file, those of a whole training step in test_steps.py.
"""

from itertools import product

import pytest
import torch
from accuracy import leaves

from fastpg import (
    gae,
    group_center,
    importance_weights,
    kl_estimate,
    policy_loss,
    preference_loss,
    token_logprobs,
    token_rewards,
    value_loss,
)

V, T = 3, 3  # every completion of three tokens over a vocabulary of three: 27 of them
IDS = torch.tensor(list(product(range(V), repeat=T)))
PREFIXES = [y for t in range(T) for y in product(range(V), repeat=t)]
PREFIXES = {prefix: i for i, prefix in enumerate(PREFIXES)}
STATES = torch.tensor([[PREFIXES[tuple(y[:t])] for t in range(T)] for y in IDS.tolist()])
REWARDS = torch.randn(13, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
REWARDS = REWARDS[STATES, IDS]  # r(prefix, token): what comes later cannot change it
SCORES = REWARDS.sum(1)  # R(y), as it is known after the last token
EVERY = torch.ones(V**T, T, dtype=torch.bool)


# The policy is a table of logits: one row per prefix, so its gradient is exact too.


def table(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), V, generator=g, dtype=torch.float64).requires_grad_()


def log_probs(theta):
    return token_logprobs(theta[STATES], IDS)


def chances(theta):
    """The probability of each completion."""
    return log_probs(theta).sum(1).exp()


def exact_gradient(theta, score=lambda theta: SCORES):
    """∇ Σ_y π(y) R(y), by differentiating the sum itself."""
    return torch.autograd.grad((chances(theta) * score(theta)).sum(), theta)[0]


def each_gradient(theta, advantages, **options):
    """What policy_loss ascends for each completion alone: [27, *theta.shape]."""
    one = torch.ones(1, T, dtype=torch.float64)
    grads = []
    for i in range(V**T):
        logp = token_logprobs(theta[STATES[i : i + 1]], IDS[i : i + 1])
        loss, _ = policy_loss(logp, advantages[i : i + 1], one, **options)
        grads.append(-torch.autograd.grad(loss, theta)[0])
    return torch.stack(grads)


def expected(chance, per_completion):
    return torch.einsum("y,y...->...", chance.detach(), per_completion)


def spread(chance, per_completion):
    """Σ of the variances of the gradient's entries."""
    mean = expected(chance, per_completion)
    return expected(chance, (per_completion - mean) ** 2).sum()


def exact_values(theta):
    """V(prefix) = E[reward to go | prefix] at every token of every completion."""
    to_go, chance = gae(REWARDS)[0], chances(theta).detach()
    values = torch.empty_like(to_go)
    for t in range(T):
        for state in STATES[:, t].unique():
            here = STATES[:, t] == state
            values[here, t] = (chance * to_go[:, t])[here].sum() / chance[here].sum()
    return values


def test_reinforce_is_the_gradient_of_the_expected_reward():
    theta = table()
    ours = each_gradient(theta, SCORES[:, None].expand(-1, T), surrogate="reinforce")
    torch.testing.assert_close(expected(chances(theta), ours), exact_gradient(theta))


def test_token_actions_and_one_completion_action_give_the_identical_update():
    theta = table()
    weight = torch.full((V**T, T), 1 / V**T, dtype=torch.float64)
    logp = log_probs(theta)
    tokens, _ = policy_loss(logp, SCORES[:, None].expand(-1, T), weight)
    whole, _ = policy_loss(logp.sum(1), SCORES, weight[:, 0])
    grads = [torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in (tokens, whole)]
    assert torch.equal(*grads)


def test_reward_to_go_keeps_the_expectation_and_lowers_the_variance():
    theta = table()
    total = each_gradient(theta, SCORES[:, None].expand(-1, T))
    to_go = each_gradient(theta, gae(REWARDS)[0])
    chance = chances(theta)
    torch.testing.assert_close(expected(chance, to_go), expected(chance, total))
    assert spread(chance, to_go) < spread(chance, total)


def test_baselines_keep_the_expectation_and_lower_the_variance():
    theta, to_go = table(), gae(REWARDS)[0] + 5  # what a baseline is for: rewards far from 0
    chance, values = chances(theta).detach(), exact_values(theta) + 5
    mean = expected(chance, to_go)
    plain, constant, learned = (each_gradient(theta, to_go - b) for b in (0, mean, values))
    for grads in (plain, constant, learned):
        torch.testing.assert_close(expected(chance, grads), exact_gradient(theta))
    assert spread(chance, learned) < spread(chance, constant) < 0.1 * spread(chance, plain)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_with_exact_values_gae_of_any_lambda_is_q_minus_v(lam):
    """And so leaves the expected gradient alone; lambda only trades variance."""
    theta = table()
    values, chance = exact_values(theta), chances(theta).detach()
    advantages, _ = gae(REWARDS, values, lam=lam)
    to_go = gae(REWARDS)[0]
    for t in range(T):
        for prefix in IDS[:, : t + 1].unique(dim=0):  # a state and an action
            here = (IDS[:, : t + 1] == prefix).all(1)
            share = chance[here] / chance[here].sum()
            q = (share * to_go[here, t]).sum()
            expected_advantage = (share * advantages[here, t]).sum()
            torch.testing.assert_close(expected_advantage, q - values[here, t][0])
    grads = each_gradient(theta, advantages)
    torch.testing.assert_close(expected(chance, grads), exact_gradient(theta))


def test_truncation_with_the_return_as_bootstrap_equals_continuing():
    theta = table()
    values = exact_values(theta)
    advantages, returns = gae(REWARDS, values, gamma=0.9)
    cut = gae(REWARDS[:, :2], values[:, :2], gamma=0.9, bootstrap=returns[:, 2])
    for ours, whole in zip(cut, (advantages, returns), strict=True):
        torch.testing.assert_close(ours, whole[:, :2])


def test_a_ratio_per_token_is_exact_where_a_completion_is_one_token():
    """E_old[r A ∇log π] = E_π[A ∇log π], for PPO unclipped and for REINFORCE with the ratio."""
    theta, old = (torch.randn(5, dtype=torch.float64) for _ in range(2))
    old, scores = old.log_softmax(0), torch.randn(5, dtype=torch.float64)
    (theta,) = leaves(theta)
    exact = torch.autograd.grad(-(theta.softmax(0) * scores).sum(), theta)[0]
    for options in {"clip": (None, None)}, {"surrogate": "reinforce"}:
        logp = token_logprobs(theta.expand(5, 5), torch.arange(5))
        loss, _ = policy_loss(logp, scores, old.exp(), old_logp=old, **options)
        torch.testing.assert_close(torch.autograd.grad(loss, theta)[0], exact)


def test_weights_of_completions_undo_the_sampling_policy():
    """E_μ[w R ∇log π] = E_π[R ∇log π] for w = π(y)/μ(y); a ratio per token does not do it."""
    theta, other = table(), table(3)
    logp, behavior = log_probs(theta), log_probs(other)
    exact, grads = exact_gradient(theta), []
    for level in "sequence", "token":
        ratio, _ = importance_weights(logp, behavior, EVERY, level=level)
        weight = ratio * chances(other).detach()[:, None]
        loss, _ = policy_loss(log_probs(theta), SCORES[:, None].expand(-1, T), weight)
        grads.append(-torch.autograd.grad(loss, theta)[0])
    torch.testing.assert_close(grads[0], exact)
    assert (grads[1] - exact).norm() > 0.1 * exact.norm()


def test_vtrace_values_one_policy_from_the_samples_of_another():
    """Uncapped, the expected target is V of the new policy, whatever values it starts from."""
    theta, other = table(), table(3)
    logp, behavior = log_probs(theta), log_probs(other)
    ratio, _ = importance_weights(logp, behavior, EVERY)
    guess = table(4).detach()[:, 0][STATES]
    _, targets = gae(REWARDS, guess, rho=ratio, c=ratio)
    torch.testing.assert_close(expected(chances(other), targets[:, 0]), exact_values(theta)[0, 0])


def test_vtrace_with_one_cap_is_the_advantage_times_the_ratio():
    """A_t = ρ_t (r_t + γ target_{t+1} − V_t), IMPALA's policy gradient, where c = ρ and λ = 1."""
    ratio, _ = importance_weights(log_probs(table()), log_probs(table(3)), EVERY, high=1.0)
    guess = table(4).detach()[:, 0][STATES]
    advantages, targets = gae(REWARDS, guess, gamma=0.9, rho=ratio, c=ratio)
    after = torch.nn.functional.pad(targets[:, 1:], (0, 1))
    torch.testing.assert_close(advantages, ratio * (REWARDS + 0.9 * after - guess))


def test_kl_in_the_reward_is_kl_in_the_objective():
    """∇ E[R − β Σ_t k1_t] by REINFORCE on token_rewards is ∇ (E[R] − β KL(π ‖ ref))."""
    theta, beta = table(), 0.3
    ref = log_probs(table(2)).detach()
    kl = kl_estimate(log_probs(theta), ref).detach()
    rewards = token_rewards(SCORES, EVERY, kl=kl, kl_coef=beta)
    ours = expected(chances(theta), each_gradient(theta, gae(rewards)[0]))

    def penalised(theta):
        return SCORES - beta * (log_probs(theta) - ref).sum(1)

    torch.testing.assert_close(ours, exact_gradient(theta, penalised))


def test_the_entropy_bonus_has_the_gradient_of_the_entropy():
    theta, scores = torch.randn(2, 5, dtype=torch.float64)
    (theta,) = leaves(theta)
    logp, entropy = token_logprobs(theta.expand(5, 5), torch.arange(5), return_entropy=True)
    weight = theta.softmax(0).detach()
    loss, _ = policy_loss(logp, scores, weight, entropy=entropy, entropy_coef=0.1)
    p = theta.softmax(0)
    exact = -(p * scores).sum() + 0.1 * (p * p.log()).sum()
    ours, exact = (torch.autograd.grad(x, theta)[0] for x in (loss, exact))
    torch.testing.assert_close(ours, exact)


def test_value_loss_is_least_at_the_expected_return():
    theta = table()
    chance, returns = chances(theta).detach()[:, None].expand(-1, T), gae(REWARDS)[1]
    learned = torch.zeros(len(PREFIXES), dtype=torch.float64, requires_grad=True)
    with torch.no_grad():  # V(prefix), one entry per row of the table
        learned[STATES.flatten()] = exact_values(theta).flatten()
    loss, _ = value_loss(learned[STATES], returns, chance)
    gradient = torch.autograd.grad(loss, learned)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_leaving_one_out_keeps_the_expectation_and_centring_shrinks_it():
    """Over every group of two completions: centring gives (n − 1)/n of the gradient."""
    theta = table()
    grads, chance = each_gradient(theta, torch.ones(V**T, T).double()), chances(theta).detach()
    first, second = torch.cartesian_prod(torch.arange(V**T), torch.arange(V**T)).unbind(1)
    pairs, group = torch.stack([first, second], 1), torch.arange(len(first)).repeat_interleave(2)
    for baseline, share in ("loo", 1.0), ("mean", 0.5):
        advantages = group_center(SCORES[pairs].flatten(), group, baseline=baseline).view(-1, 2)
        of_completions = (chance[first] * chance[second])[:, None] * advantages / 2
        weight = torch.zeros(V**T, dtype=torch.float64)
        weight.index_add_(0, pairs.flatten(), of_completions.flatten())
        ours = torch.einsum("y,yij->ij", weight, grads)
        torch.testing.assert_close(ours, share * exact_gradient(theta))


def test_preferences_recover_the_differences_of_scores():
    """Weighted by the model's own probabilities, the loss is least at the true scores."""
    true = torch.randn(5, dtype=torch.float64)
    chosen, rejected = torch.cartesian_prod(torch.arange(5), torch.arange(5)).unbind(1)
    preferred = (true[chosen] - true[rejected]).sigmoid()
    (scores,) = leaves(true + 3)  # a constant does not matter
    loss, _ = preference_loss(scores[chosen], scores[rejected], weight=preferred)
    gradient = torch.autograd.grad(loss, scores)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
