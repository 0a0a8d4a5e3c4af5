"""Vocabularies in shards, one per rank: the same results as from the whole, on every rank."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastpg import token_logprobs

SHARDS = {2: (30, 7), 4: (9, 1, 20, 7)}  # ragged; one of a single token
VOCAB = 37


def logits_and_labels(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(3, 4, VOCAB, generator=g, dtype=torch.float64)
    labels = torch.randint(VOCAB, (3, 4), generator=g)
    labels[0, :3] = torch.tensor([0, VOCAB - 1, -100])
    return logits.to(dtype), labels


def shard(x, group, dim=-1):
    """This rank's part of x."""
    return x.split(SHARDS[dist.get_world_size(group)], dim)[dist.get_rank(group)]


def same_bits(a, b):
    return torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))


def same_on_all_ranks(x, group):
    everyones = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, x, group=group)
    return all(same_bits(x, other) for other in everyones)


def compare(group, logits, labels, rtol, **options):
    """Values, entropies and gradients of this rank's shard with those of the whole."""
    upstream = torch.randn(2, *labels.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for x, more in ((logits, {}), (shard(logits, group), {"process_group": group})):
        leaf = x.clone().requires_grad_()
        outputs = token_logprobs(leaf, labels, return_entropy=True, **options, **more)
        (gradient,) = torch.autograd.grad(outputs, leaf, tuple(upstream.to(outputs[0].dtype)))
        results.append([*(x.detach() for x in outputs), gradient])
    (*whole, whole_gradient), (*ours, gradient) = results
    expected = [*whole, shard(whole_gradient, group)]
    torch.testing.assert_close([*ours, gradient], expected, rtol=rtol, atol=rtol, equal_nan=True)
    assert all(same_on_all_ranks(x, group) for x in ours)
    assert same_bits(token_logprobs(leaf.detach(), labels, **options, **more), ours[0])


def check_values(group):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 8e-3)):
        logits, labels = logits_and_labels(dtype)
        compare(group, logits, labels, tolerance)
        temperature = torch.linspace(0.5, 2, 4)
        compare(group, logits, labels, tolerance, temperature=temperature, softcap=9.0)
        compare(group, logits, labels.clamp(min=0), tolerance, ignore_index=0)
        compare(group, logits.transpose(0, 1), labels.t(), tolerance, temperature=0.7)
        compare(group, logits[:0], labels[:0], tolerance)


def check_specials(group):
    logits, labels = logits_and_labels()
    logits[0, 0, 1:] = -math.inf  # every shard but one is nothing
    logits[0, 1] = -math.inf
    logits[0, 2] = math.nan  # ignored
    logits[1, 0, labels[1, 0]] = -math.inf
    logits[1, 1, 5] = math.nan
    logits[1, 2, 36] = math.inf
    compare(group, logits, labels, 1e-12)


def check_bad_input(group):
    logits, labels = logits_and_labels()
    for bad in (VOCAB, -1, 2**40):
        labels[1, 2] = bad
        message = rf"labels holds {bad}, outside \[0, 37\)"
        with pytest.raises(IndexError, match=message):
            token_logprobs(shard(logits, group), labels, process_group=group)


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=4)
    pair = dist.new_group([2, 3])
    groups = [dist.group.WORLD, *([pair] if rank >= 2 else [])]
    for group in groups:
        check_values(group)
        check_specials(group)
        check_bad_input(group)
    if rank < 2:
        logits, labels = logits_and_labels()
        with pytest.raises(
            ValueError, match=f"process_group does not hold this process, rank {rank}"
        ):
            token_logprobs(logits, labels, process_group=pair)
    Path(folder, f"passed{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


def test_two_and_four_ranks_equal_one(tmp_path):
    mp.start_processes(rank_main, (str(tmp_path),), 4, start_method="fork")
    assert len(list(tmp_path.glob("passed*"))) == 4
