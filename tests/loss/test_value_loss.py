"""value_loss against the loss as it is commonly written, and its laws."""

import math
from itertools import pairwise

import pytest
import torch
from accuracy import TOLERANCE, assert_no_worse, leaves
from kernels import GPU
from registration import check_registration
from torch._dynamo.testing import CompileCounterWithBackend

from fastpg import ValueStats, merge_stats, value_loss
from fastpg.ops.loss import value_loss as page

OP = "value_loss"
NAMES = ("values", "returns", "weight", "old_values")
CLIPS = [None, 0.3]


def sample(shape, dtype=torch.float32, mean=0.0):
    values, noise, old, weight = torch.randn(4, *shape, dtype=torch.float64)
    weight = torch.where(weight > -0.4, 0.5 + torch.rand(shape), 0.0) / (math.prod(shape) + 1)
    tensors = (mean + values, mean + values + noise, weight, mean + values + 0.5 * old)
    return dict(zip(NAMES, (t.to(dtype) for t in tensors), strict=True))


def run(x, clip):
    """(loss, stats, gradient of values)"""
    x = dict(x, values=x["values"].detach().requires_grad_(), clip=clip)
    if clip is None:
        del x["old_values"]
    loss, stats = value_loss(**x)
    loss.backward()
    return loss.detach(), stats.values, x["values"].grad


def by_autograd(x, clip):
    """What `run` returns, with torch's own gradient, in the dtype of the values."""
    kept = x["weight"] != 0
    values = x["values"].detach().requires_grad_()
    v, r, w, old = (t[kept] for t in (values, x["returns"], x["weight"], x["old_values"]))
    errors = plain = (v - r) ** 2
    if clip is not None:
        errors = torch.maximum(plain, (torch.clamp(v, old - clip, old + clip) - r) ** 2)
    loss = (w * 0.5 * errors).sum()
    loss.backward()
    fields = [kept.sum(), w.sum(), loss.detach(), (errors > plain).sum()]
    for t in (r, (r - v).detach()):
        fields += [t.mean(), ((t - t.mean()) ** 2).sum()] if len(t) else [loss * 0, loss * 0]
    stats = torch.stack([field.detach().double() for field in fields])
    return loss.detach(), stats, values.grad


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_matches_autograd(kernel, clip, dtype):
    shapes = [(1,), (16,), (3, 7), (2, 2048), (4321,), ()]  # below, at and beyond lanes and blocks
    for x in (sample(shape, dtype) for shape in shapes):
        ours = run(x, clip)
        computed = torch.float64 if dtype is torch.float64 else torch.float32
        assert ours[0].dtype is computed and ours[2].dtype is dtype
        torchs = by_autograd({name: tensor.to(computed) for name, tensor in x.items()}, clip)
        oracle = by_autograd({name: tensor.double() for name, tensor in x.items()}, clip)
        for a, b, c in zip(ours[:2], torchs[:2], oracle[:2], strict=True):
            assert_no_worse(a, b, c, TOLERANCE[dtype])
        rtol = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(ours[2].double(), oracle[2], rtol=rtol, atol=1e-7)


def test_every_block_is_merged(kernel, monkeypatch):
    """More blocks than a merge takes at a time: 256 in CUDA; in Triton's interpreter, here, 4."""
    tokens = 270_001
    if kernel == "triton" and not GPU:
        triton = pytest.importorskip("triton")
        tokens = 9_001
        for module in ("common.triton", "loss.value_loss_triton"):
            few = triton.language.constexpr(4)
            monkeypatch.setattr(f"fastpg.ops.{module}.CHUNK", few)
    x = sample((tokens,), torch.float64)
    for ours, expected in zip(run(x, 0.3), by_autograd(x, 0.3), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-15)


def test_a_ticket_serves_launch_after_launch(kernel, monkeypatch):
    if kernel not in ("cuda", "cuda-on-cpu"):
        pytest.skip("for the reduction in CUDA C++")
    ticket = torch.zeros((), dtype=torch.int32)  # on a GPU, each stream has one
    monkeypatch.setattr("fastpg._library._ticket", lambda device: ticket)
    for shape in (5000,), (5000,), (3000,), (7,), (5000,):
        x = sample(shape, torch.float64)
        torch.testing.assert_close(run(x, 0.3)[1], by_autograd(x, 0.3)[1], rtol=1e-11, atol=1e-15)
        assert ticket == 0


def test_the_order_in_which_blocks_run_changes_no_bit(kernel):
    if kernel not in ("cuda", "cuda-on-cpu"):
        pytest.skip("for the reduction in CUDA C++")
    x = sample((20_001,))
    first = run(x, 0.3)
    for _ in range(2):  # On the CPU every launch shuffles its blocks anew.
        assert all(torch.equal(a, b) for a, b in zip(first, run(x, 0.3), strict=True))


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_a_token_is_clipped_only_where_the_clipped_error_is_larger(kernel, side):
    """Values beyond the clip by the same, below and above the returns, and a tie of the errors."""
    values, old_values = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.25, 0.25, 0.25])
    returns = torch.tensor([0.0, 0.75, 2.0])  # the errors are 1 and .5; .25 twice; 1 and 1.5
    weight = torch.ones(3)
    x = dict(zip(NAMES, (side * values, side * returns, weight, side * old_values), strict=True))
    loss, stats, grad = run(x, 0.25)
    assert loss == 0.5 * (1 + 0.25**2 + 1.5**2)
    assert stats[ValueStats.FIELDS.index("clipped")] == 1
    assert torch.equal(grad, side * torch.tensor([1.0, 0.25, 0.0]))


def test_a_million_tokens_keep_six_digits():
    x = sample((1 << 20,))
    ours, oracle = run(x, 0.3), by_autograd({k: t.double() for k, t in x.items()}, 0.3)
    for a, b in zip(ours, oracle, strict=True):
        assert (a.double() - b).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.parametrize("clip", CLIPS)
def test_gradients(kernel, clip):
    x = sample((3, 5), torch.float64)
    rest = {"clip": clip, "old_values": x["old_values"] if clip else None}
    (values,) = leaves(x["values"])
    assert torch.autograd.gradcheck(
        lambda v: 3 * value_loss(v, x["returns"], x["weight"], **rest)[0], values
    )
    assert not value_loss(x["values"], x["returns"], x["weight"], **rest)[0].requires_grad


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "empty"])
@pytest.mark.parametrize("clip", CLIPS)
def test_registration(layout, clip):
    change = {
        "contiguous": lambda t: t,
        "transposed": lambda t: t.t(),
        "expanded": lambda t: t[:, :1].expand(4, 6),
        "empty": lambda t: t[:0],
    }[layout]
    values, returns, weight, old = (change(t) for t in sample((4, 6)).values())
    x = page.Inputs(values, returns, weight, old if clip else None, clip or 0.0)
    check_registration(page.value_loss_op, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses its own old parts
def test_compile(compiler):
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(value_loss, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for n in (50, 77):
        x = sample((2, n))
        (values,) = leaves(x.pop("values"))
        loss, stats = compiled(values, **x, clip=0.3)
        compilations.append(counter.frame_count)
        loss.backward()
        eager = value_loss(values, **x, clip=0.3)
        torch.testing.assert_close((loss, stats.values), (eager[0], eager[1].values))
        torch.testing.assert_close(values.grad, torch.autograd.grad(eager[0], values)[0])
    assert len(set(compilations)) == 1


X = torch.zeros(4)
BAD = [
    ({"values": X.int()}, TypeError, "values must be floating point, got torch.int32"),
    ({"weight": X.bool()}, TypeError, "weight must be floating point, got torch.bool"),
    ({"returns": None}, TypeError, "returns must be a tensor, got NoneType"),
    ({"returns": X[:3]}, ValueError, r"returns \(3,\) must have the shape of values \(4,\)"),
    ({"returns": X.to("meta")}, ValueError, "returns on meta, values on cpu"),
    ({"clip": 0.2}, ValueError, "clip and old_values go together, old_values is None"),
    ({"old_values": X}, ValueError, "clip and old_values go together, clip is None"),
    ({"old_values": X, "clip": 0.0}, ValueError, "clip must be finite and > 0, got 0.0"),
    ({"old_values": X[0], "clip": 0.2}, ValueError, r"old_values \(\) must have the shape"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:30])
def test_bad_arguments_raise(change, error, message):
    with pytest.raises(error, match=message):
        value_loss(**{"values": X, "returns": X, "weight": X, **change})


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_masked_slots_change_no_bit(kernel, clip, poison):
    x = sample((1000,))
    masked = x["weight"] == 0
    bad = {k: t if k == "weight" else t.masked_fill(masked, poison) for k, t in x.items()}
    assert all(torch.equal(a, b) for a, b in zip(run(x, clip), run(bad, clip), strict=True))


@pytest.mark.parametrize("clip", CLIPS)
def test_all_masked_is_zero(kernel, clip):
    x = {k: t * (0.0 if k == "weight" else math.nan) for k, t in sample((100,)).items()}
    loss, stats, grad = run(x, clip)
    assert loss == 0 and (grad == 0).all()
    assert set(merge_stats(ValueStats(stats)).values()) == {0.0}


@pytest.mark.parametrize("clip", CLIPS)
def test_any_split_adds_up(kernel, clip):
    x = sample((5000,), torch.float64)
    whole = run(x, clip)
    ends = [0, 17, 17, 4000, 5000]
    parts = [run({k: t[i:j] for k, t in x.items()}, clip) for i, j in pairwise(ends)]
    assert torch.equal(torch.cat([p[2] for p in parts]), whole[2])
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0], rtol=1e-12, atol=0)
    merged = merge_stats([ValueStats(p[1]) for p in parts])
    assert merged == pytest.approx(merge_stats(ValueStats(whole[1])), rel=1e-11)


def test_threads_change_no_bit():
    x, threads, results = sample((200_003,)), torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(run(x, 0.3))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_explained_variance_does_not_cancel_at_mean_1e4(kernel):
    x = sample((100_000,), mean=1e4)
    kept = x["weight"] != 0
    returns, residual = x["returns"][kept].double(), (x["returns"] - x["values"])[kept].double()
    expected = 1 - residual.var(correction=0) / returns.var(correction=0)
    parts = [[t[i:j] for t in list(x.values())[:3]] for i, j in pairwise([0, 7, 60_000, 100_000])]
    merged = merge_stats([value_loss(*part)[1] for part in parts])
    assert merged["explained_variance"] == pytest.approx(expected.item(), rel=1e-6)
    assert merged["return_mean"] == pytest.approx(returns.mean().item(), rel=1e-9)
    assert merged["mean"] == pytest.approx(x["values"][kept].double().mean().item(), rel=1e-9)


@pytest.mark.parametrize("value", [0.1, -7.7, 1e4 / 3, 1e-8, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_returns_leave_nothing_to_explain(kernel, value, dtype):
    returns = torch.full((100,), value, dtype=dtype)
    values, weight = torch.randn(100, dtype=dtype), torch.ones(100, dtype=dtype)
    _, whole = value_loss(values, returns, weight)
    parts = [value_loss(values[i:j], returns[i:j], weight[i:j])[1] for i, j in ((0, 3), (3, 100))]
    for stats in ([whole], parts):
        assert merge_stats(stats)["explained_variance"] == 0.0
    returns[0] = math.nan
    assert math.isnan(merge_stats(value_loss(values, returns, weight)[1])["explained_variance"])
