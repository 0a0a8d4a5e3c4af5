"""Vocabularies in shards, one per rank: the same results as from the whole, on every rank."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from registration import check_registration

import fastpg.ops.vocabulary.linear_rows as page
from bench.inputs import head_and_labels
from fastpg import linear_token_logprobs, linear_token_loss, token_logprobs
from fastpg.ops.vocabulary import head as head_module
from fastpg.ops.vocabulary import linear_token_loss as loss_page
from fastpg.ops.vocabulary.shards import NEVER, add_over_ranks

pytestmark = pytest.mark.slow

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


def results(call, inputs, labels, **options):
    """Values, entropies and the gradients of the inputs, from one upstream gradient."""
    upstream = torch.randn(2, *labels.shape, generator=torch.Generator().manual_seed(1))
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = call(*leaves, labels, return_entropy=True, **options)
    gradients = torch.autograd.grad(outputs, leaves, tuple(upstream.to(outputs[0].dtype)))
    return [*(x.detach() for x in outputs), *gradients]


def compare(group, logits, labels, tolerance, **options):
    """token_logprobs of this rank's shard with that of the whole."""
    *whole, gradient = results(token_logprobs, [logits], labels, **options)
    options["process_group"], own = group, shard(logits, group)
    *ours, own_gradient = results(token_logprobs, [own], labels, **options)
    expected = [*whole, shard(gradient, group)]
    closeness = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close([*ours, own_gradient], expected, **closeness)
    assert all(same_on_all_ranks(x, group) for x in ours)
    assert same_bits(token_logprobs(own, labels, **options), ours[0])


def head_call(hidden, weight, bias, labels, **options):
    return linear_token_logprobs(hidden, weight, labels, bias=bias, **options)


def compare_heads(group, head, labels, tolerance, **options):
    """linear_token_logprobs of this rank's part of the head with that of the whole."""
    *whole, dweight, dbias = results(head_call, head, labels, **options)
    own = [head[0], *(shard(x, group, 0) for x in head[1:])]
    options["process_group"] = group
    *ours, own_dweight, own_dbias = results(head_call, own, labels, **options)
    expected = [*whole, shard(dweight, group, 0), shard(dbias, group, 0)]
    actual = [*ours, own_dweight, own_dbias]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert all(same_on_all_ranks(x, group) for x in ours)
    assert same_bits(head_call(*own, labels, **options), ours[0])


def check_heads(group):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        *head, labels = head_and_labels((3, 4), VOCAB, 8, dtype)
        labels[0, :3] = torch.tensor([0, VOCAB - 1, -100])
        compare_heads(group, head, labels, tolerance)
        temperature = torch.linspace(0.5, 2, 4)
        options = {"softcap": 3.0, "logit_scale": 1.5, "temperature": temperature}
        compare_heads(group, head, labels, tolerance, **options)
    labels[1, 2] = VOCAB
    with pytest.raises(IndexError, match=r"linear_token_logprobs: labels holds 37"):
        head_call(head[0], *(shard(x, group, 0) for x in head[1:]), labels, process_group=group)


def check_an_adapter(group):
    """Two products; h is constant, as where only an adapter is trained; 17 rows are two tiles."""
    *head, labels = head_and_labels((17,), VOCAB, 8, torch.float64)
    tensors = [*head[0].split((5, 3), 1), *head[1].split((5, 3), 1)]

    def gradients(weights, **options):
        h, low, w, b = [*tensors[:2], *weights]
        leaves = [low.clone().requires_grad_(), b.clone().requires_grad_()]
        value = linear_token_logprobs((h, leaves[0]), (w, leaves[1]), labels, **options)
        return [value.detach(), *torch.autograd.grad(value.sin().sum(), leaves)]

    *want, dweight = gradients(tensors[2:])
    got = gradients([shard(x, group, 0) for x in tensors[2:]], process_group=group)
    torch.testing.assert_close(got, [*want, shard(dweight, group, 0)], rtol=1e-12, atol=1e-12)


def loss_and_gradients(head, labels, token_loss, **options):
    leaves = [x.clone().requires_grad_() for x in head]
    loss, stats = linear_token_loss(
        *leaves[:2], labels, token_loss, bias=leaves[2], temperature=0.7, softcap=3.0, **options
    )
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves), torch.stack(stats)]


def check_losses(group):
    """Chunks of 4 rows, slices of 8 tokens; a row in three has a coefficient of 0."""
    factor = torch.randn(12, generator=torch.Generator().manual_seed(2))
    factor[::3] = 0

    def token_loss(logp, entropy, rows):
        loss = (factor[rows] * (logp.sin() + entropy)).sum()
        return loss, loss.detach()

    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        *head, labels = head_and_labels((12,), VOCAB, 8, dtype)
        labels[:3] = torch.tensor([0, VOCAB - 1, -100])
        own = [head[0], *(shard(x, group, 0) for x in head[1:])]
        for level in ("token", "sequence"):
            whole, ours = (
                loss_and_gradients(*args, labels, token_loss, level=level, process_group=to)
                for *args, to in ((head, None), (own, group))
            )
            expected = [*whole[:2], *(shard(x, group, 0) for x in whole[2:4]), whole[4]]
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
            assert all(same_on_all_ranks(ours[i], group) for i in (0, 1, 4))
            assert level == "sequence" or len(ours[4]) > 1


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


def check_an_empty_shard(group):
    """All ranks learn of it, where one alone would leave the others waiting."""
    last = dist.get_world_size(group) - 1
    *head, labels = head_and_labels((3,), VOCAB, 8)
    keep = slice(0 if dist.get_rank(group) == last else None)
    hidden, weight, bias = head[0], *(shard(x, group, 0)[keep] for x in head[1:])
    sizes = f"a shard must hold a token at least, got .*{SHARDS[last + 1][last - 1]}, 0]"
    options = {"bias": bias, "process_group": group}
    with pytest.raises(ValueError, match=f"linear_token_logprobs: {sizes}"):
        linear_token_logprobs(hidden, weight, labels, **options)
    with pytest.raises(ValueError, match=f"linear_token_loss: {sizes}"):
        weight.requires_grad_()
        linear_token_loss(hidden, weight, labels, lambda *_: None, **options)
    with pytest.raises(ValueError, match=f"token_logprobs: {sizes}"):
        token_logprobs(hidden @ weight.detach().T, labels, process_group=group)


def check_sums(group):
    """Added up in the dtype that is asked for, and rounded once."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(dist.get_world_size(group), 64, generator=g).bfloat16()
    total = add_over_ranks(x[dist.get_rank(group)], group, torch.float32)
    assert torch.equal(total, x.float().sum(0).bfloat16())


def test_a_part_of_a_head_matches_its_reference():
    hidden, weight, bias, labels = head_and_labels((5,), VOCAB, 8)
    labels[2:] = torch.tensor([-3, VOCAB, NEVER])  # on other ranks, and ignored
    x = page.Inputs(
        hidden=[hidden],
        head_weight=[weight],
        bias=bias,
        labels=labels,
        temperature=torch.tensor(0.7),
        softcap=3.0,
        ignore_index=NEVER,
        logits_dtype=torch.float32,
    )
    check_registration(page.linear_token_logprobs_part_op, x, traced=True)
    found = page.linear_token_logprobs_part_op(x)
    torch.testing.assert_close(tuple(found), tuple(page.reference_part(x)))


def rank_main(rank, folder):
    torch.set_num_threads(1)
    head_module.WIDTH, head_module.ROWS = {"cpu": 8}, {"cpu": 16}
    loss_page.CHUNK_ROWS = {"cpu": {2: 8, 4: 4, 8: 2}}
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=4)
    pair = dist.new_group([2, 3])
    groups = [dist.group.WORLD, *([pair] if rank >= 2 else [])]
    for group in groups:
        check_values(group)
        check_specials(group)
        check_bad_input(group)
        check_heads(group)
        check_an_adapter(group)
        check_losses(group)
        check_an_empty_shard(group)
        check_sums(group)
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
