"""whiten against its formula in fp64, and the laws of whitening."""

import pytest
import torch
import torch.distributed as dist
from accuracy import TOLERANCE, assert_no_worse, leaves
from kernels import GPU
from registration import check_registration
from torch.autograd import gradcheck

from bench.inputs import generator
from fastpg import whiten
from fastpg.ops.credit import whiten as page

OP = "whiten"
POISON = [float("nan"), float("inf"), 1e30]


def inputs(shape, dtype=torch.float64, seed=0, shift=0.0):
    g = generator(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64) + shift
    return x.to(dtype), torch.rand(shape, generator=g) < 0.7


def plain(x, mask, center=True, eps=1e-8):
    """The formula in fp64, with torch's own mean and variance."""
    kept = x[mask].double()
    y = (kept - kept.mean()) * torch.rsqrt(kept.var() + eps)
    out = torch.zeros(x.shape, dtype=torch.float64)
    out[mask] = y if center else y + kept.mean()
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape", [(2, 2), (3, 7), (4095,), (4097,), (5, 4096)]
)  # A block has 4096.
@pytest.mark.parametrize("center", [True, False])
def test_matches_the_formula(kernel, shape, dtype, center):
    x, mask = inputs(shape, dtype)
    y = whiten(x, mask, center=center)
    assert y.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    exact = plain(x, mask, center)
    assert_no_worse(y, exact.to(y.dtype), exact, TOLERANCE[dtype])


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("kept", ["some", "two", "one", "none"])
def test_gradients(kernel, center, kept):
    x, mask = inputs((3, 4))
    if kept != "some":
        mask = (torch.arange(12) < ["none", "one", "two"].index(kept)).view(3, 4)
    (x,) = leaves(x)
    assert gradcheck(lambda x: whiten(x, mask, center=center, eps=0.1), x)
    weight = torch.randn(4, 3, dtype=torch.float64).t()
    for strided in (weight, weight[:1].expand(3, 4)):
        grads = [torch.autograd.grad(whiten(x, mask), x, g)[0] for g in (strided, strided.clone())]
        assert torch.equal(*grads)


def test_registration():
    for layout in ("contiguous", "transposed", "expanded", "empty"):
        x, mask = inputs((0, 3) if layout == "empty" else (4, 3))
        x, mask = (x.t(), mask.t()) if layout == "transposed" else (x, mask)
        x = x[:1].expand(x.shape) if layout == "expanded" else x
        every = page.MomentsInputs(x, mask)
        check_registration(page.whiten_moments_op, every, traced=True)
        moments = page.whiten_moments_op(every).moments
        check_registration(page.whiten_op, page.Inputs(x, mask, None, center=True, eps=0.1))
        scaled = page.Inputs(x, mask, moments, center=False, eps=0.1)
        check_registration(page.whiten_op, scaled)
        grad = page.BackwardInputs(scaled, x.sum().expand(x.shape))
        check_registration(page.whiten_backward_op, grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses its own old parts
def test_compile(compiler):
    @torch.compile(backend=compiler, fullgraph=True, dynamic=True)
    def compiled(x, mask):
        return whiten(x, mask, eps=0.1).cos().sum()

    for stance, shape in ("default", (3, 7)), ("fail_on_recompile", (5, 11)):
        x, mask = inputs(shape, torch.float32)
        ours, eager = leaves(x, x)
        with torch.compiler.set_stance(stance):
            compiled(ours, mask).backward()
        whiten(eager, mask, eps=0.1).cos().sum().backward()
        torch.testing.assert_close(ours.grad, eager.grad)


def test_bad_arguments_raise(kernel):
    x, mask = inputs((2, 3), torch.float32)
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        whiten(x.long(), mask)
    with pytest.raises(TypeError, match="mask must be a tensor, got NoneType"):
        whiten(x, None)
    with pytest.raises(ValueError, match=r"mask \(3,\) must be \(2, 3\)"):
        whiten(x, mask[0])
    with pytest.raises(ValueError, match="eps must be finite and > 0, got 0"):
        whiten(x, mask, eps=0)
    assert whiten(x, torch.zeros(2, 3)).count_nonzero() == 0
    assert whiten(x[:0], mask[:0]).shape == (0, 3)
    one = torch.tensor([[1, 0, 0], [0, 0, 0]])
    assert whiten(x, one).count_nonzero() == 0
    assert torch.equal(whiten(x, one, center=False), x * one)
    assert whiten(torch.full((2, 3), 5.0), torch.ones(2, 3)).count_nonzero() == 0


@pytest.mark.parametrize("poison", POISON)
def test_masked_slots_change_no_bit(kernel, poison):
    x, mask = inputs((5, 9))
    weight = torch.randn(5, 9, dtype=torch.float64)

    def run(fill):
        (leaf,) = leaves(torch.where(mask, x, fill))
        y = whiten(leaf, mask)
        return y, *torch.autograd.grad(y, leaf, torch.where(mask, weight, fill))

    assert all(torch.equal(a, b) for a, b in zip(run(0.0), run(poison), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_does_not_cancel_at_mean_1e4(kernel, dtype):
    x, mask = inputs((8, 5000), dtype, shift=1e4)
    y = whiten(x, mask)
    assert (y.double() - plain(x, mask)).abs().max() < 1e-5
    assert abs(y[mask].double().var().item() - 1) < 1e-6


def test_every_block_is_merged(kernel, monkeypatch):
    """More blocks of 1024 elements than Triton merges at a time: 256; in its interpreter 2."""
    size, first = 270_001, 262_144
    if kernel == "triton" and not GPU:
        few = pytest.importorskip("triton").language.constexpr(2)
        monkeypatch.setattr("fastpg.ops.common.triton.CHUNK", few)
        size, first = 6000, 4096
    x, mask = inputs((size,), torch.float32)
    x[first:] += 5  # The last blocks have another mean.
    (leaf,) = leaves(x)
    y = whiten(leaf, mask)
    assert_no_worse(y, plain(x, mask).float(), plain(x, mask), TOLERANCE[torch.float32])
    # A gradient at the last blocks alone reaches the others through the sums.
    grad = torch.zeros_like(x)
    grad[first:] = 1.0
    exact = x.double().requires_grad_()
    kept = exact[mask]
    formula = (kept - kept.mean()) * torch.rsqrt(kept.var() + 1e-8)
    (expected,) = torch.autograd.grad(formula, exact, grad.double()[mask])
    (ours,) = torch.autograd.grad(y, leaf, grad)
    assert_no_worse(ours, expected.float(), expected, TOLERANCE[torch.float32])


def test_moments_can_be_given(kernel):
    """As those of several ranks are: of x alone they give the same bits as none."""
    x, mask = inputs((5, 9))
    moments = page.whiten_moments_op(page.MomentsInputs(x, mask)).moments
    given = page.whiten_op(page.Inputs(x, mask, moments, center=False, eps=0.1))
    own = page.whiten_op(page.Inputs(x, mask, None, center=False, eps=0.1))
    assert torch.equal(given.y, own.y)
    assert torch.equal(given.y, whiten(x, mask, center=False, eps=0.1))
    assert torch.equal(given.moments_used, moments) and torch.equal(own.moments_used, moments)
    doubled = moments * torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    other = page.whiten_op(page.Inputs(x, mask, doubled, center=True, eps=0.1))
    scale = torch.rsqrt(moments[2] / (moments[0] - 1) + 0.1)
    torch.testing.assert_close(other.y, torch.where(mask, (x - doubled[1]) * scale, 0.0))
    of_one_value = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)  # It has no variance.
    unscaled = page.whiten_op(page.Inputs(x, mask, of_one_value, center=True, eps=0.1))
    torch.testing.assert_close(unscaled.y, torch.where(mask, x - 2.0, 0.0))


def test_any_strides(kernel):
    x, mask = inputs((5, 8))
    for view, kept in ((x.t(), mask.t()), (x[:, ::2], mask[:, 1::2]), (x[:1].expand(5, 8), mask)):
        weight = torch.randn(view.shape, dtype=torch.float64)
        results = []
        for change in (lambda t: t, torch.clone):
            leaf = change(view).detach().requires_grad_()
            y = whiten(leaf, change(kept))
            results.append((y, *torch.autograd.grad(y, leaf, weight)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_threads_change_no_bit():
    """Of the C++ kernel: the sums of torch, which the reference uses, depend on their number."""
    x, mask = inputs((9, 30001), torch.float32)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        (leaf,) = leaves(x)
        y = whiten(leaf, mask)
        results.append((y, *torch.autograd.grad(y, leaf, x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def rank_main(rank, folder):
    """The first of two ranks has every element of x, then half of them."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    x, mask = inputs((4, 50), torch.float32, shift=100.0)
    for split in (4, 2):
        mine = slice(0, split) if rank == 0 else slice(split, 4)
        for center in (True, False):
            ours = whiten(x[mine], mask[mine], center=center, process_group=dist.group.WORLD)
            torch.testing.assert_close(ours, whiten(x, mask, center=center)[mine])
    with pytest.raises(ValueError, match="x requires a gradient"):
        whiten(x.requires_grad_(), mask, process_group=dist.group.WORLD)
    dist.destroy_process_group()


def test_ranks_whiten_together(tmp_path):
    torch.multiprocessing.start_processes(
        rank_main, (str(tmp_path),), nprocs=2, start_method="fork"
    )
