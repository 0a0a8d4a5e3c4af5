"""One PPO step, from logits to gradients: what it must not notice, and how it adds up.

Each law is also proved op by op in the other files; here they hold for the ops together.
"""

import math
from itertools import accumulate, pairwise

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accuracy import leaves

from fastpg import (
    PolicyStats,
    ValueStats,
    gae,
    kl_estimate,
    merge_stats,
    policy_loss,
    token_logprobs,
    token_rewards,
    token_weights,
    value_loss,
    whiten,
)

POISON = [float("nan"), float("inf"), 1e30]


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
