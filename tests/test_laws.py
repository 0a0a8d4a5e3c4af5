"""The laws that cross ops: exact expectations of a policy small enough to enumerate, and what a
whole training step must not notice. The laws of one op are in its own file.
"""

import math
from itertools import accumulate, pairwise, product

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accuracy import leaves

from fastpg import (
    PolicyStats,
    ValueStats,
    gae,
    group_center,
    importance_weights,
    kl_estimate,
    merge_stats,
    policy_loss,
    preference_loss,
    token_logprobs,
    token_rewards,
    token_weights,
    value_loss,
    whiten,
)

POISON = [float("nan"), float("inf"), 1e30]
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


# One PPO step, from logits to gradients. Tests change the batch in ways that must not show.


def batch(dtype=torch.float64, rows=6, length=9, vocab=11):
    """Masked at the start, inside and at the end; row 1 has no unmasked token at all."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    x = {name: normal(rows, length) for name in ("values", "old_values")}
    x |= {name: -normal(rows, length).abs() for name in ("old_logp", "ref_logp")}
    x["logits"], x["scores"] = normal(rows, length, vocab), normal(rows)
    x["ids"] = torch.randint(vocab, (rows, length), generator=g)
    x["mask"] = torch.rand(rows, length, generator=g) < 0.7
    x["mask"][1] = False
    return x


def advantages_of(x, cu_seqlens=None):
    kl = kl_estimate(x["old_logp"], x["ref_logp"])
    rewards = token_rewards(x["scores"], x["mask"], kl=kl, kl_coef=0.1, cu_seqlens=cu_seqlens)
    advantages, returns = gae(
        rewards, x["old_values"], x["mask"], gamma=0.99, lam=0.95, cu_seqlens=cu_seqlens
    )
    return whiten(advantages, x["mask"]), returns


def update_of(x, advantages, returns, denom, level="token", cu_seqlens=None):
    """Loss, gradients of logits and values, and both statistics."""
    logits, values = leaves(x["logits"], x["values"])
    labels = x["ids"].masked_fill(~x["mask"], -100)
    logp, entropy = token_logprobs(logits, labels, temperature=0.7, return_entropy=True)
    weight = token_weights(x["mask"], reduce="sequence", denom=denom, cu_seqlens=cu_seqlens)
    policy, policy_stats = policy_loss(
        logp, advantages, weight, old_logp=x["old_logp"], ref_logp=x["ref_logp"], kl_coef=0.1,
        entropy=entropy, entropy_coef=0.01, level=level, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    value, value_stats = value_loss(values, returns, weight, old_values=x["old_values"], clip=0.2)
    loss = policy + 0.5 * value
    loss.backward()
    return loss.detach(), logits.grad, values.grad, policy_stats.values, value_stats.values


def step(x, denom=5, level="token", cu_seqlens=None):
    credit = advantages_of(x, cu_seqlens)
    return (*credit, *update_of(x, *credit, denom, level, cu_seqlens))


def take(x, rows):
    return {name: tensor[rows] for name, tensor in x.items()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_masked_slots_change_no_bit_of_a_step(dtype, poison, level):
    x = batch(dtype)
    masked = ~x["mask"]

    def filled(fill, label):
        bad = {k: x[k].masked_fill(masked, fill) for k in ("values", "old_values", "ref_logp")}
        bad |= {"old_logp": x["old_logp"].masked_fill(masked, fill), "ids": x["ids"].clone()}
        bad["logits"] = x["logits"].masked_fill(masked[..., None], fill)
        bad["ids"][masked] = label
        bad["scores"] = x["scores"].masked_fill(~x["mask"].any(1), fill)
        return step(x | bad, level=level)

    clean, bad = filled(0.0, 0), filled(poison, 12345)
    assert all(torch.equal(a, b) for a, b in zip(clean, bad, strict=True))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_deleting_masked_tokens_changes_nothing(level):
    x = batch()
    mask, lengths = x["mask"], x["mask"].sum(1)
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    deleted = {k: t if k == "scores" else t[mask] for k, t in x.items()}
    whole, short = step(x, level=level), step(deleted, level=level, cu_seqlens=cu)
    for i, (a, b) in enumerate(zip(whole, short, strict=True)):
        close(a[mask] if i in (0, 1, 3, 4) else a, b)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_packed_equals_padded_equals_one_by_one(level):
    x, lengths = batch(), torch.tensor([9, 2, 5, 1, 0, 7])
    x["mask"] &= torch.arange(9) < lengths[:, None]
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    inside = torch.arange(9) < lengths[:, None]
    packed = {k: t if k == "scores" else t[inside] for k, t in x.items()}
    padded, packed = step(x, level=level), step(packed, level=level, cu_seqlens=cu)
    for i, (a, b) in enumerate(zip(padded, packed, strict=True)):
        close(a[inside] if i in (0, 1, 3, 4) else a, b)
    singles = [
        update_of(
            {k: t[i : i + 1, : lengths[i]] if k != "scores" else t for k, t in x.items()},
            *(c[i : i + 1, : lengths[i]] for c in padded[:2]), 5, level,
        )
        for i in range(6)
    ]  # fmt: skip
    close(sum(s[0] for s in singles), padded[2])
    for i in range(6):
        close(singles[i][1][0], padded[3][i, : lengths[i]])
        close(singles[i][2][0], padded[4][i, : lengths[i]])


def test_all_masked_is_a_step_of_nothing():
    x = batch(torch.float32)
    x = {k: t * math.nan if t.is_floating_point() else t for k, t in x.items()}
    x["mask"] = torch.zeros_like(x["mask"])
    *tensors, policy, value = step(x, denom=None)
    assert all(t.count_nonzero() == 0 for t in tensors)
    policy, value = merge_stats(PolicyStats(policy)), merge_stats(ValueStats(value))
    assert policy["count"] == value["count"] == policy["loss"] == value["loss"] == 0


def test_batch_mates_never_matter():
    """Whitening apart, which is of the whole batch, a row's bits are its own."""
    x = batch(torch.float32)
    credit = advantages_of(x)
    whole = update_of(x, *credit, 5)
    for i in range(6):
        alone = update_of(take(x, slice(i, i + 1)), *(c[i : i + 1] for c in credit), 5)
        assert all(torch.equal(alone[k][0], whole[k][i]) for k in (1, 2))


@pytest.mark.parametrize("sizes", [[1, 5], [2, 2, 2], [1] * 6], ids=str)
def test_any_split_into_micro_batches_adds_up(sizes):
    x = batch()
    credit = advantages_of(x)
    whole = update_of(x, *credit, 5)
    rows = [slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]
    parts = [update_of(take(x, r), *(c[r] for c in credit), 5) for r in rows]
    close(sum(p[0] for p in parts), whole[0])
    for k in (1, 2):
        close(torch.cat([p[k] for p in parts]), whole[k])
    for k, kind in (3, PolicyStats), (4, ValueStats):
        merged = merge_stats([kind(p[k]) for p in parts])
        assert merged == pytest.approx(merge_stats(kind(whole[k])), rel=1e-10)


def head_update(x, rows, denom, weight):
    """The same step for a shared head: what a rank would give its optimiser, and its statistics."""
    credit = [c[rows] for c in advantages_of(x)]
    x = take(x, rows)
    (head,) = leaves(weight)
    logits = x["logits"] @ head
    labels = x["ids"].masked_fill(~x["mask"], -100)
    w = token_weights(x["mask"], denom=denom)
    loss, stats = policy_loss(token_logprobs(logits, labels), credit[0], w, old_logp=x["old_logp"])
    loss.backward()
    return loss.detach(), head.grad, stats


def rank_main(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    x, weight = batch(), torch.eye(11, dtype=torch.float64)
    rows = (slice(0, 2), slice(2, 6))[rank]
    denom = x["mask"][rows].sum()
    dist.all_reduce(denom)
    loss, grad, stats = head_update(x, rows, denom, weight)
    dist.all_reduce(loss)
    dist.all_reduce(grad)
    merged = merge_stats(stats, process_group=dist.group.WORLD)
    torch.save((loss, grad, merged), f"{folder}/rank{rank}")
    dist.destroy_process_group()


def test_two_ranks_add_up(tmp_path):
    mp.start_processes(rank_main, (str(tmp_path),), nprocs=2, start_method="fork")
    x, weight = batch(), torch.eye(11, dtype=torch.float64)
    loss, grad, stats = head_update(x, slice(None), x["mask"].sum(), weight)
    for rank in range(2):
        theirs = torch.load(f"{tmp_path}/rank{rank}")
        close(theirs[0], loss)
        close(theirs[1], grad)
        assert theirs[2] == pytest.approx(merge_stats(stats), rel=1e-10)
