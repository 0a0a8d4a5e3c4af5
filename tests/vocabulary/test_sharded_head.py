"""A head in the shards of data-parallel ranks: the numbers of a whole one, which no rank holds."""

from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from bench.inputs import head_and_labels
from fastpg import linear_token_logprobs, linear_token_loss
from fastpg.ops.vocabulary import head as head_module
from fastpg.ops.vocabulary import linear_token_loss as loss_page
from fastpg.ops.vocabulary.sharded_head import owners, shard_sizes
from tests.zero3 import parameter_of_zero3, stand_for_deepspeed

pytestmark = pytest.mark.slow

RANKS = 4
ROWS = (5, 0, 21, 3)  # of each rank; 21 are two tiles
WIDTH = 8


def batch(rank, dtype=torch.float32):
    """The rows of a rank: hidden, labels, and what its loss gives back to its results."""
    g = torch.Generator().manual_seed(rank + 1)
    hidden = torch.randn(ROWS[rank], WIDTH, generator=g).to(dtype)
    labels = torch.randint(3, (ROWS[rank],), generator=g)
    labels[:1] = -100
    upstream = torch.randn(2, ROWS[rank], generator=g)
    upstream[:, 1:2] = 0
    return hidden, labels, upstream


def mean_of_ranks(weight, bias, mesh_size, **options):
    """Results and gradients of all the ranks' rows from the whole head; those of the head, mean."""
    leaves = [x.clone().requires_grad_() for x in (weight, bias)]
    found = []
    for rank in range(mesh_size):
        hidden, labels, upstream = batch(rank, weight.dtype)
        hidden.requires_grad_()
        results = linear_token_logprobs(hidden, leaves[0], labels, bias=leaves[1], **options)
        torch.autograd.backward(results, tuple(upstream / mesh_size))
        found.append((*(x.detach() for x in results), hidden.grad * mesh_size))
    return found, leaves[0].grad, leaves[1].grad


def check_head(mesh, vocab, placements, dtype, tolerance, **options):
    """The results of a DTensor are those of the whole, to the bit; its gradient is the mean."""
    options["return_entropy"] = True
    _, weight, bias, _ = head_and_labels((1,), vocab, WIDTH, dtype)
    want, dweight, dbias = mean_of_ranks(weight, bias, mesh.size(), **options)
    hidden, labels, upstream = batch(mesh.get_rank(), dtype)
    hidden.requires_grad_()
    shards = [distribute_tensor(x, mesh, placements) for x in (weight, bias.repeat(2, 1).t())]
    own, own_bias = (x.requires_grad_() for x in shards)
    results = linear_token_logprobs(hidden, own, labels, bias=own_bias[:, 0], **options)
    torch.autograd.backward(results, tuple(upstream))
    for ours, whole in zip((*results, hidden.grad), want[mesh.get_rank()], strict=True):
        assert torch.equal(ours, whole)
    assert own.grad.placements == own.placements
    closeness = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(own.grad.full_tensor(), dweight, **closeness)
    torch.testing.assert_close(own_bias.grad.full_tensor()[:, 0], dbias, **closeness)


def check_values(mesh):
    for vocab in (37, 6, 3):  # 6 tokens are 2, 2, 2 and none; 3 are one each, and none
        check_head(mesh, vocab, [Shard(0)], torch.float32, 1e-6)
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 1e-6)):
        check_head(mesh, 37, [Shard(0)], dtype, tolerance, softcap=3.0, temperature=0.7)
    for placement in (Replicate(), Shard(1)):
        check_head(mesh, 37, [placement], torch.float32, 1e-6)


def check_a_mesh_of_two_axes(pairs):
    """Replicas of shards are gathered whole."""
    check_head(pairs, 37, [Replicate(), Shard(0)], torch.float32, 1e-6)


def check_an_adapter(mesh):
    """A frozen head in shards, and an adapter in shards, in fp32 for hidden in bf16."""
    _, weight, low, _ = head_and_labels((1,), 37, WIDTH)
    low = low[:, None].expand(37, 2).contiguous()
    hidden, labels, _ = batch(mesh.get_rank(), torch.bfloat16)

    def gradients(w, b):
        h = hidden.clone().requires_grad_()
        b = b.clone().requires_grad_()
        linear_token_logprobs(
            (h, h[:, :2]), (w, b), labels, logits_dtype=torch.float32
        ).sum().backward()
        return h.grad, b.grad

    own = [distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, low)]
    dhidden, dlow = gradients(*own)
    whole, each = gradients(weight.bfloat16(), low.bfloat16())
    assert torch.equal(dhidden, whole)
    dist.all_reduce(each := each.float())
    torch.testing.assert_close(dlow.full_tensor(), each / RANKS, rtol=1e-2, atol=1e-2)


def check_sets_and_losses(mesh):
    """Where slices cannot be had, the head is gathered."""
    _, weight, _, _ = head_and_labels((1,), 37, WIDTH)
    own = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    whole = weight.clone().requires_grad_()
    hidden, labels, _ = batch(mesh.get_rank())
    support = torch.arange(3).repeat(len(labels)), 3 * torch.arange(len(labels) + 1)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(w):
        return linear_token_logprobs(hidden, w, labels)

    def losses(w):
        yield compiled(w).sum()
        yield linear_token_logprobs(hidden, w, labels, support=support).sum()
        yield linear_token_loss(hidden, w, labels, lambda logp, *_: (logp.sum(), []))[0]

    for ours, expected in zip(losses(own), losses(whole), strict=True):
        assert torch.equal(ours, expected)
        (grad,) = torch.autograd.grad(ours, own)
        (mean,) = torch.autograd.grad(expected, whole)
        dist.all_reduce(mean)
        torch.testing.assert_close(grad.full_tensor(), mean / RANKS, rtol=1e-5, atol=1e-6)


def check_fsdp(mesh):
    """A policy under FSDP2 whose head is a group of its own: the gradients of the whole model."""

    def policy():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 37, bias=False)
        )

    sharded = policy()
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    hidden, labels, _ = batch(mesh.get_rank())
    linear_token_logprobs(sharded[0](hidden), sharded[1].weight, labels).sum().backward()
    whole = policy()
    for rank in range(RANKS):
        hidden, labels, _ = batch(rank)
        (whole(hidden).log_softmax(-1)[labels >= 0, labels[labels >= 0]].sum() / RANKS).backward()
    for ours, expected in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), expected.grad, rtol=1e-5, atol=1e-6)


def check_zero3(vocab, dtype):
    """Of the parameters of ZeRO-3 each rank has the gradient of its own rows, whole."""
    _, weight, bias, _ = head_and_labels((1,), vocab, WIDTH, dtype)
    hidden, labels, upstream = batch(dist.get_rank(), dtype)
    leaves = [hidden, weight, bias]
    for x in leaves:
        x.requires_grad_()
    expected = linear_token_logprobs(hidden, weight, labels, bias=bias, return_entropy=True)
    gradients = torch.autograd.grad(expected, leaves, tuple(upstream))
    parameters = [parameter_of_zero3(x.detach()) for x in (weight, bias)]
    found = linear_token_logprobs(
        hidden, parameters[0], labels, bias=parameters[1], return_entropy=True
    )
    torch.autograd.backward(found, tuple(upstream))
    for ours, want in zip(
        (*found, hidden.grad, parameters[0].grad), (*expected, *gradients[:2]), strict=True
    ):
        assert torch.equal(ours, want)
    closeness = {"rtol": 1e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(parameters[1].grad, gradients[2], **closeness)
    assert all(x.shape == (0,) for x in parameters)


def check_a_bad_label_on_one_rank(mesh):
    """It raises there, and tells the others, who would wait for it for ever."""
    _, weight, _, _ = head_and_labels((1,), 37, WIDTH)
    heads = [parameter_of_zero3(weight)]
    for axes in (mesh, init_device_mesh("cpu", (2, 2))):
        placements = [Replicate()] * (axes.ndim - 1) + [Shard(0)]
        heads.append(distribute_tensor(weight, axes, placements))
    for own in heads:
        for call in (call_one_label, call_several, call_sets, call_loss):
            hidden, labels, _ = batch(2)
            if dist.get_rank() == 1:
                labels[3] = 37
            expected = (
                pytest.raises(IndexError, match="holds 37")
                if dist.get_rank() == 1
                else pytest.raises(RuntimeError, match="another rank that has a part of weight")
            )
            with expected:
                call(hidden, own, labels)


def call_one_label(hidden, weight, labels):
    return linear_token_logprobs(hidden, weight, labels)


def call_several(hidden, weight, labels):
    return linear_token_logprobs(hidden, weight, torch.stack([labels, labels], 1))


def call_sets(hidden, weight, labels):
    support = torch.arange(3).repeat(len(labels)), 3 * torch.arange(len(labels) + 1)
    return linear_token_logprobs(hidden, weight, labels, support=support)


def call_loss(hidden, weight, labels):
    return linear_token_loss(hidden, weight, labels, lambda logp, *_: (logp.sum(), []))


def check_bad_input(mesh):
    _, weight, _, _ = head_and_labels((1,), 37, WIDTH)
    own = distribute_tensor(weight, mesh, [Shard(0)])
    hidden, labels, _ = batch(2)
    with pytest.raises(TypeError, match=r"weight is a DTensor: pass weight.to_local\(\)"):
        linear_token_logprobs(hidden, own, labels, process_group=mesh.get_group())
    with pytest.raises(TypeError, match=r"hidden is a DTensor: pass hidden.to_local\(\)"):
        linear_token_logprobs(distribute_tensor(hidden, mesh, [Shard(0)]), own, labels)
    with pytest.raises(IndexError, match="linear_token_logprobs: labels holds 137"):
        linear_token_logprobs(hidden, own, labels.abs() + 37)
    rows = (5, 5, 3, 5)[mesh.get_rank()]
    uneven = DTensor.from_local(
        weight[:rows], mesh, [Shard(0)], shape=(18, WIDTH), stride=(WIDTH, 1)
    )
    error = pytest.raises(
        ValueError, match="in even shards, rank 2 must have 40 values of it, got 24"
    )
    with error if mesh.get_rank() == 2 else pytest.raises((ValueError, RuntimeError)):
        linear_token_logprobs(hidden, uneven, labels)
    with pytest.raises(ValueError, match=r"weight \[V, H\], got \(21, 7\) and \(37, 8\)"):
        linear_token_logprobs(hidden[:, 1:], own, labels)


def peak_of_tensors(call):
    """The most bytes that a call's tensors take at a time, as torch's allocator counts them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def check_memory_of_zero3():
    """Beside its gradient, which DeepSpeed wants whole, not a third of the head."""
    vocab, width = 2**16, 32
    head_module.WIDTH = {"cpu": 1024}
    weight = torch.zeros(vocab, width)
    own = parameter_of_zero3(weight)
    hidden, labels = torch.zeros(16, width), torch.zeros(16, dtype=torch.int64)
    peak = peak_of_tensors(lambda: linear_token_logprobs(hidden, own, labels).sum().backward())
    assert weight.nbytes < peak < weight.nbytes * 4 / 3


def check_memory(mesh, autocast):
    """Less than a third of the head and its gradient, a quarter of which the rank keeps anyway."""
    vocab, width = 2**16, 32
    head_module.WIDTH = {"cpu": 1024}
    local = torch.zeros(vocab // RANKS, width)
    own = DTensor.from_local(local, mesh, [Shard(0)]).requires_grad_()
    hidden, labels = torch.zeros(16, width), torch.zeros(16, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        peak = peak_of_tensors(lambda: linear_token_logprobs(hidden, own, labels).sum().backward())
    assert own.grad is not None
    whole = 2 * RANKS * local.nbytes
    assert whole / 16 < peak < whole / 3 - local.nbytes


def rank_main(rank, folder):
    torch.set_num_threads(1)
    head_module.WIDTH, head_module.ROWS = {"cpu": 16}, {"cpu": 16}
    loss_page.CHUNK_ROWS = {"cpu": {2: 16, 4: 16, 8: 16}}
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    check_values(mesh)
    check_a_mesh_of_two_axes(init_device_mesh("cpu", (2, 2)))
    check_an_adapter(mesh)
    check_sets_and_losses(mesh)
    check_fsdp(mesh)
    check_bad_input(mesh)
    with pytest.MonkeyPatch.context() as patch:
        stand_for_deepspeed(patch)
        for vocab in (37, 5, 3):  # 40 values are 10 each: a rank's part begins within a row
            check_zero3(vocab, torch.float32)
        check_zero3(37, torch.bfloat16)
        check_a_bad_label_on_one_rank(mesh)
        check_memory_of_zero3()
    check_memory(mesh, autocast=False)
    check_memory(mesh, autocast=True)
    Path(folder, f"passed{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


def test_four_ranks_equal_a_whole_head(tmp_path):
    mp.start_processes(rank_main, (str(tmp_path),), RANKS, start_method="fork")
    assert len(list(tmp_path.glob("passed*"))) == RANKS


@pytest.mark.parametrize("vocab", [1, 3, 4, 6, 37])
def test_every_token_of_a_slice_has_an_owner(vocab):
    sizes = shard_sizes(vocab, RANKS)
    parts = torch.arange(vocab).tensor_split(torch.tensor(sizes).cumsum(0)[:-1])
    assert [len(x) for x in torch.arange(vocab).chunk(RANKS)] == [x for x in sizes if x]
    for begin in range(0, vocab, 5):
        tokens = slice(begin, min(begin + 5, vocab))
        found = [parts[part.rank][part.in_part] for part in owners(tokens, sizes)]
        assert torch.cat(found).tolist() == list(range(tokens.start, tokens.stop))
