"""Every algorithm of the table against its formula written out, and what each of them must keep."""

import dataclasses
import doctest
import typing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastpg import algorithms, merge_stats
from fastpg.algorithms import ALGORITHMS, AlgorithmName

B, T, GROUP, MAX_LENGTH = 8, 6, 4, 9
KL_COEF = 0.3  # where an algorithm has a penalty by default


def sample():
    """Two groups of four episodes, of a policy that has moved since it sampled them."""
    g = torch.Generator().manual_seed(0)
    logp, moved, drift, values = torch.randn(4, B, T, generator=g, dtype=torch.float64)
    lengths = torch.tensor([6, 1, 4, 3, 5, 6, 2, 4])
    mask = torch.arange(T) < lengths[:, None]
    mask[0, 2] = False  # a tool's token
    return {
        "logp": logp - 2, "old_logp": logp - 2 + 0.3 * moved, "ref_logp": logp - 2 + 0.5 * drift,
        "values": values, "mask": mask, "scores": torch.randn(B, generator=g, dtype=torch.float64),
        "group": torch.arange(B) // GROUP,
    }  # fmt: skip


def algorithm_of(name):
    algorithm = ALGORITHMS[name]
    return dataclasses.replace(algorithm, kl_coef=KL_COEF if algorithm.kl_coef else 0.0)


def run(algorithm, x, rows=slice(None), credit=None, denom=None, process_group=None):
    """Loss, statistics, and gradient by logp of the episodes `rows`."""
    x = {name: tensor[rows] for name, tensor in x.items()}
    logp, mask = x["logp"].detach().requires_grad_(), x["mask"]
    if credit is None:
        credit, _ = algorithm.advantages(
            x["scores"], mask, group=x["group"], values=x["values"],
            kl=x["old_logp"] - x["ref_logp"], process_group=process_group,
        )  # fmt: skip
    denom = algorithm.denom(mask, MAX_LENGTH) if denom is None else denom
    loss, stats = algorithm.loss(
        logp, credit, algorithm.weights(mask, denom), old_logp=x["old_logp"], ref_logp=x["ref_logp"]
    )
    return loss.detach(), stats, torch.autograd.grad(loss, logp)[0]


def episodes(x):
    """Each episode by itself, without its masked tokens."""
    tokens = "logp", "old_logp", "ref_logp", "values"
    return [{name: x[name][i][x["mask"][i]] for name in tokens} for i in range(B)]


def rewards_by_hand(x, kl_coef):
    """Per token: the penalty, and the score at the end."""
    rewards = []
    for score, e in zip(x["scores"], episodes(x), strict=True):
        r = -kl_coef * (e["old_logp"] - e["ref_logp"])
        r[-1] += score
        rewards.append(r)
    return rewards


def to_go(rewards, discount=1.0):
    out = torch.zeros_like(rewards)
    for t in range(len(rewards)):
        out[t] = sum(discount ** (k - t) * rewards[k] for k in range(t, len(rewards)))
    return out


def centred(scores, how):
    out = []
    for g in scores.split(GROUP):
        for i in range(GROUP):
            others = torch.cat([g[:i], g[i + 1 :]]).mean()
            out.append({"mean": g[i] - g.mean(), "loo": g[i] - others,
                        "std": (g[i] - g.mean()) / (g.std() + 1e-6)}[how])  # fmt: skip
    return out


def whitened(advantages):
    every = torch.cat(advantages)
    return [(a - every.mean()) / (every.var() + 1e-8).sqrt() for a in advantages]


def per_token(advantages, e):
    return [a.expand(len(one["logp"])) for a, one in zip(advantages, e, strict=True)]


def reinforce(e, advantages):
    ratios = [(one["logp"] - one["old_logp"]).exp().detach() for one in e]
    return [-r * a * one["logp"] for r, a, one in zip(ratios, advantages, e, strict=True)]


def clipped(e, advantages, low, high):
    out = []
    for one, a in zip(e, advantages, strict=True):
        r = (one["logp"] - one["old_logp"]).exp()
        out.append(-torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a))
    return out


def token_mean(terms):
    return torch.cat(terms).mean()


def by_hand_reinforce(x, e):
    return token_mean(reinforce(e, [to_go(r) for r in rewards_by_hand(x, 0.0)]))


def by_hand_vpg(x, e):
    credit = [to_go(r) - v["values"] for r, v in zip(rewards_by_hand(x, 0.0), e, strict=True)]
    return token_mean(reinforce(e, credit))


def by_hand_ppo(x, e):
    credit = []
    for r, one in zip(rewards_by_hand(x, KL_COEF), e, strict=True):
        v = torch.cat([one["values"], torch.zeros(1)])
        credit.append(to_go(r + v[1:] - v[:-1], discount=0.95))
    return token_mean(clipped(e, whitened(credit), 0.2, 0.2))


def by_hand_grpo(x, e):
    terms = clipped(e, per_token(centred(x["scores"], "std"), e), 0.2, 0.2)
    for i, one in enumerate(e):
        r, d = (one["logp"] - one["old_logp"]).exp(), one["logp"] - one["ref_logp"]
        terms[i] = terms[i] + KL_COEF * r * ((-d).exp() - 1 + d)
    return sum(t.mean() for t in terms) / B


def by_hand_dr_grpo(x, e):
    terms = clipped(e, per_token(centred(x["scores"], "mean"), e), 0.2, 0.2)
    return sum(t.sum() / MAX_LENGTH for t in terms) / B


def by_hand_dapo(x, e):
    return token_mean(clipped(e, per_token(centred(x["scores"], "std"), e), 0.2, 0.28))


def by_hand_rloo(x, e):
    kl = torch.stack([(one["old_logp"] - one["ref_logp"]).sum() for one in e])
    credit = per_token(centred(x["scores"] - KL_COEF * kl, "loo"), e)
    return sum(t.sum() for t in reinforce(e, credit)) / B


def by_hand_reinforce_plus_plus(x, e):
    credit = whitened([to_go(r) for r in rewards_by_hand(x, KL_COEF)])
    return token_mean(clipped(e, credit, 0.2, 0.2))


def by_hand_gspo(x, e):
    loss = 0
    for one, a in zip(e, centred(x["scores"], "std"), strict=True):
        s = (one["logp"] - one["old_logp"]).mean().exp()
        loss = loss - torch.minimum(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a)
    return loss / B


def by_hand_cispo(x, e):
    terms = []
    for one, a in zip(e, centred(x["scores"], "std"), strict=True):
        r = (one["logp"] - one["old_logp"]).exp().clamp(max=5.0).detach()
        terms.append(-r * a * one["logp"])
    return token_mean(terms)


def by_hand_sapo(x, e):
    terms = []
    for one, a in zip(e, centred(x["scores"], "std"), strict=True):
        r, tau = (one["logp"] - one["old_logp"]).exp(), 1.05 if a < 0 else 1.0
        terms.append(-4 / tau * torch.sigmoid(tau * (r - 1)) * a)
    return token_mean(terms)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_its_formula(name):
    x = sample()
    if name == "cispo":
        x["old_logp"][3, 1] -= 3.0  # a ratio beyond its cap
    loss, _, grad = run(algorithm_of(name), x)
    x["logp"] = x["logp"].requires_grad_()
    formula = globals()[f"by_hand_{name.replace('++', '_plus_plus')}"]
    expected = formula(x, episodes(x))
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x["logp"])[0])
    assert grad[x["mask"]].count_nonzero() > 3


@pytest.mark.parametrize("name", ALGORITHMS)
def test_any_split_into_micro_batches_adds_up(name):
    algorithm, x = algorithm_of(name), sample()
    loss, stats, grad = run(algorithm, x)
    credit, _ = algorithm.advantages(
        x["scores"],
        x["mask"],
        group=x["group"],
        values=x["values"],
        kl=x["old_logp"] - x["ref_logp"],
    )
    denom = algorithm.denom(x["mask"], MAX_LENGTH)
    for sizes in ([1, 7], [3, 3, 2], [1] * B):
        splits = torch.arange(B).split(sizes)
        parts = [run(algorithm, x, rows, credit[rows], denom) for rows in splits]
        torch.testing.assert_close(sum(part[0] for part in parts), loss)
        torch.testing.assert_close(torch.cat([part[2] for part in parts]), grad)
        merged = merge_stats([part[1] for part in parts])
        assert merged == pytest.approx(merge_stats(stats), rel=1e-9)


def test_only_algorithms_with_a_penalty_read_the_reference():
    x = sample()
    poisoned = {**x, "ref_logp": torch.full((B, T), torch.nan)}
    for name, algorithm in ALGORITHMS.items():
        finite = run(algorithm, poisoned)[2].isfinite().all()
        assert finite == (algorithm.kl_coef == 0), name


def test_only_a_critic_reads_values():
    x = sample()
    for name, algorithm in ALGORITHMS.items():
        other = run(algorithm, {**x, "values": x["values"] + torch.randn(B, T)})[2]
        assert torch.equal(other, run(algorithm, x)[2]) != algorithm.critic, name


def _rank(rank, file, out):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x, results = sample(), {}
    own = slice(rank * GROUP, (rank + 1) * GROUP)
    for name in ALGORITHMS:
        algorithm = algorithm_of(name)
        denom = algorithm.denom(x["mask"][own], MAX_LENGTH)
        dist.all_reduce(denom)
        loss, stats, grad = run(algorithm, x, own, denom=denom, process_group=dist.group.WORLD)
        dist.all_reduce(loss)
        results[name] = loss, merge_stats(stats, process_group=dist.group.WORLD), grad
    torch.save(results, f"{out}{rank}")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.start_processes(_rank, (tmp_path / "rendezvous", tmp_path / "out"), 2, start_method="fork")
    ranks = [torch.load(tmp_path / f"out{rank}") for rank in (0, 1)]
    for name in ALGORITHMS:
        loss, stats, grad = run(algorithm_of(name), sample())
        for rank in ranks:
            torch.testing.assert_close(rank[name][0], loss)
            assert rank[name][1] == pytest.approx(merge_stats(stats), rel=1e-9)
        torch.testing.assert_close(torch.cat([rank[name][2] for rank in ranks]), grad)


@pytest.mark.parametrize("name", ["vpg", "ppo"])
def test_a_critic_without_values_is_refused(name):
    x = sample()
    with pytest.raises(ValueError, match="needs values, got None"):
        ALGORITHMS[name].advantages(x["scores"], x["mask"], kl=x["old_logp"] - x["ref_logp"])


@pytest.mark.parametrize("name", ["ppo", "rloo", "reinforce++"])
def test_a_penalty_without_its_kl_is_refused(name):
    x, algorithm = sample(), ALGORITHMS[name]
    given = {"group": x["group"], "values": x["values"]}
    with pytest.raises(ValueError, match="needs kl, got None"):
        algorithm.advantages(x["scores"], x["mask"], **given)
    with pytest.raises(ValueError, match=r"kl \(8,\) must be \(8, 6\)"):
        algorithm.advantages(x["scores"], x["mask"], kl=x["scores"], **given)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_mask_of_numbers_is_a_mask(name):
    x = sample()
    loss, _, grad = run(algorithm_of(name), x)
    for dtype in (torch.float32, torch.int64):
        theirs, _, their_grad = run(algorithm_of(name), {**x, "mask": x["mask"].to(dtype)})
        assert torch.equal(theirs, loss) and torch.equal(their_grad, grad)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo"])
def test_an_episode_without_tokens_is_not_counted(name):
    mask = torch.ones(3, T, dtype=torch.bool)
    with_empty = torch.cat([mask, torch.zeros_like(mask)])
    algorithm = ALGORITHMS[name]
    assert algorithm.denom(with_empty, MAX_LENGTH) == algorithm.denom(mask, MAX_LENGTH)


def test_the_names_of_the_type_are_those_of_the_table():
    assert typing.get_args(AlgorithmName) == tuple(ALGORITHMS)


def test_groups_without_their_numbers_are_refused():
    x = sample()
    with pytest.raises(ValueError, match="GRPO needs group, got None"):
        ALGORITHMS["grpo"].advantages(x["scores"], x["mask"])


def test_the_example_runs():
    assert doctest.testmod(algorithms).failed == 0
