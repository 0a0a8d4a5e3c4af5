"""gae against its reference, and both against a plain loop."""

from contextlib import nullcontext

import pytest
import torch
from accuracy import TOLERANCE, assert_no_worse, leaves
from gae_inputs import CU, by_loop, flags, inputs, loop, record, sequences, shorten_blocks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from registration import check_registration
from torch.autograd import forward_ad, gradcheck

from fastpg import gae
from fastpg.ops.credit import gae as page

OP = "gae"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def short_blocks(request, monkeypatch):
    shorten_blocks(request, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (9, 130), (0, 5), (2, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_reference(kernel, shape, dtype, masked):
    rewards, values, mask = inputs(shape, dtype)
    mask = mask if masked else None
    options = {"mask": mask, "gamma": 0.99, "lam": 0.95}
    out = gae(rewards, values, mask, gamma=0.99, lam=0.95)
    assert out[0].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    if kernel == "reference":  # It is compared with the loop, for it cannot be with itself.
        oracle = by_loop(rewards, values, **options)
        torchs = [x.to(out[0].dtype) for x in oracle]
    else:
        oracle = page.reference(record(rewards.double(), values.double(), **options))
        given = rewards.to(out[0].dtype), values.to(out[0].dtype)
        torchs = page.reference(record(*given, **options))
    for ours, theirs, exact in zip(out, torchs, oracle, strict=True):
        assert_no_worse(ours, theirs, exact, TOLERANCE[dtype])


@settings(max_examples=60, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    seed=st.integers(0, 999), packed=st.booleans(), masked=st.booleans(), baseline=st.booleans(),
    gamma=st.sampled_from(["float", "sequence", "token"]),
    lam=st.sampled_from(["float", "sequence", "token"]),
    terminated=st.sampled_from([None, "sequence", "token"]),
    truncated=st.sampled_from([None, "sequence", "token"]),
    bootstrap=st.booleans(), weighted=st.booleans(),
)  # fmt: skip
def test_every_option_means_what_it_says(
    kernel, seed, packed, masked, baseline, gamma, lam, terminated, truncated, bootstrap, weighted
):
    cu = CU if packed else None
    shape, count = ((20,), 6) if packed else ((4, 6), 4)
    rewards, values, mask = inputs(shape, seed=seed)
    values, mask = values if baseline else None, mask if masked else None
    of = {"sequence": flags((count,), seed), "token": flags(shape, seed + 1)}
    end = None if terminated is None else of[terminated][0]
    cut = None if truncated is None else of[truncated][1]
    after = of[truncated or "sequence"][2] if bootstrap or truncated else None
    discounts = [0.9 if kind == "float" else of[kind][2].sigmoid() for kind in (gamma, lam)]
    rho, c = (flags(shape, seed + 2 + i)[2].exp() if weighted else None for i in range(2))
    out = gae(rewards, values, mask, gamma=discounts[0], lam=discounts[1], terminated=end,
              truncated=cut, bootstrap=after, rho=rho, c=c, cu_seqlens=cu)  # fmt: skip
    ratios = [torch.ones_like(rewards) if x is None else x for x in (rho, c)]
    values = torch.zeros_like(rewards) if values is None else values
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    discounts = [rewards.new_full((count,), x) if isinstance(x, float) else x for x in discounts]

    def each(x):
        if x is None:
            return [None] * count
        return list(x) if x.shape == (count,) else sequences(x, cu)

    options = rewards, values, mask, *discounts, *ratios, end, cut, after
    rest = zip(*map(each, options), strict=True)
    expected = torch.cat([loop(*sequence) for sequence in rest], 1)
    torch.testing.assert_close(torch.stack(out).view(2, -1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("form", ["plain", "sequence", "token", "packed"])
def test_gradients(kernel, form, wanted):
    cu = CU if form == "packed" else None
    shape, count = ((20,), 6) if cu is not None else ((2, 5), 2)
    rewards, values, mask = inputs(shape)
    terminated, truncated, bootstrap = flags(shape if form == "token" else (count,))
    options = {"mask": mask, "terminated": terminated, "cu_seqlens": cu}
    if form == "plain":
        options = {}
    if form == "token":
        options["truncated"] = truncated
        options["rho"], options["c"] = rewards.exp().detach(), values.exp().detach()
    tensors = rewards, values, bootstrap
    for i, x in enumerate(tensors):
        x.requires_grad_(bool(wanted >> i & 1))

    def run(r, v, b):
        return gae(r, v, bootstrap=b, gamma=0.9, lam=0.8, **options)

    # All three together are looked at element by element, fewer along a random direction.
    assert gradcheck(run, tensors, fast_mode=kernel == "triton" or wanted < 7)
    if wanted == 7 and cu is None:  # an expanded and a strided grad_output
        advantages, returns = run(*tensors)
        weight = torch.randn(shape[::-1], dtype=torch.float64).t()
        (advantages.sum() + (returns * weight).sum()).backward()
        again = leaves(*tensors)
        torch.autograd.backward(run(*again), [torch.ones(shape).double(), weight.contiguous()])
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(tensors, again, strict=True))


def test_registration():
    for layout in ("contiguous", "transposed", "expanded", "empty"):
        shape = (2, 0) if layout == "empty" else (4, 3)
        rewards, values, mask = inputs(shape)
        if layout == "transposed":
            rewards, values, mask = (x.t() for x in (rewards, values, mask))
        if layout == "expanded":
            rewards, mask = rewards[:1].expand(shape), mask[:, :1].expand(shape)
        terminated, truncated, bootstrap = flags(rewards.shape)
        gammas = torch.full((len(rewards),), 0.9, dtype=torch.float64)
        every_input = record(
            rewards, values, bootstrap=bootstrap, mask=mask, gammas=gammas, rho=values, c=rewards,
            terminated=terminated, truncated=truncated, lam=0.8,
        )  # fmt: skip
        for x in (every_input, record(rewards, gamma=0.9, lam=0.8)):
            check_registration(page.gae_op, x)
            expanded = rewards.sum().expand(rewards.shape)
            check_registration(page.gae_backward_op, page.BackwardInputs(x, values, expanded))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses its own old parts
def test_compile(compiler):
    @torch.compile(backend=compiler, fullgraph=True, dynamic=True)
    def compiled(rewards, values, mask, bootstrap):
        advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8, bootstrap=bootstrap)
        return (advantages * returns.cos()).sum()

    for stance, shape in ("default", (3, 7)), ("fail_on_recompile", (5, 11)):
        *tensors, mask = inputs(shape, torch.float32)
        rewards, values, bootstrap = leaves(*tensors, tensors[0][:, 0])
        with torch.compiler.set_stance(stance):
            compiled(rewards, values, mask, bootstrap).backward()
        again = leaves(rewards, values, bootstrap)
        out = gae(again[0], again[1], mask, gamma=0.9, lam=0.8, bootstrap=again[2])
        (out[0] * out[1].cos()).sum().backward()
        for ours, eager in zip((rewards, values, bootstrap), again, strict=True):
            torch.testing.assert_close(ours.grad, eager.grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses its own old parts
def test_compile_packed(compiler):
    rewards, values, mask = inputs((20,), torch.float32)
    truncated = torch.rand(20) < 0.3
    terminated = torch.arange(len(CU) - 1) % 2 == 0
    options = {"terminated": terminated, "truncated": truncated, "bootstrap": values + 1}

    def run(function):
        return function(rewards, values, mask, gamma=0.9, cu_seqlens=CU, **options)

    compiled = torch.compile(gae, backend=compiler, fullgraph=True, dynamic=True)
    for ours, eager in zip(run(compiled), run(gae), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch uses its own old parts
@pytest.mark.parametrize("wanted", [False, True])
def test_other_derivatives_raise(wanted):
    rewards = torch.ones(2, 3, requires_grad=wanted)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|functorch"):
        torch.func.jvp(lambda r: gae(r)[0], (rewards,), (torch.ones(2, 3),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        gae(forward_ad.make_dual(rewards, torch.ones(2, 3)))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda r: gae(r)[0].sum())(rewards)


ONES, FLAGS = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "rewards must be floating point, got torch.int64", {"rewards": ONES.long()}),
        (TypeError, "values must be floating point, got torch.int32", {"values": ONES.int()}),
        (ValueError, r"rewards must be \[B, T\], or \[N\] .* got \(3,\)", {"rewards": ONES[0]}),
        (ValueError, r"values \(3, 2\) must be \(2, 3\)", {"values": ONES.t()}),
        (ValueError, r"mask \(3,\) must be \(2, 3\)", {"mask": FLAGS[0]}),
        (ValueError, r"gamma must be in \[0, 1\], got 99", {"gamma": 99}),
        (ValueError, r"lam must be in \[0, 1\], got nan", {"lam": float("nan")}),
        (ValueError, r"gamma must be in \[0, 1\], holds 2.0", {"gamma": 2 * ONES}),
        (ValueError, r"lam must be in \[0, 1\], holds nan", {"lam": ONES[:, 0] / 0 * 0}),
        (TypeError, "gamma must be real, got torch.complex64", {"gamma": ONES * 1j}),
        (ValueError, r"rho \(2,\) must be \(2, 3\)", {"rho": ONES[:, 0]}),
        (TypeError, "c must be floating point, got torch.int64", {"c": ONES.long()}),
        (ValueError, r"lam \(3,\) must be \(2,\) or \(2, 3\)", {"lam": ONES[0]}),
        (ValueError, r"terminated \(3,\) must be \(2,\) or \(2, 3\)", {"terminated": FLAGS[0]}),
        (ValueError, "truncated needs bootstrap", {"truncated": FLAGS}),
        (ValueError, r"bootstrap \(2,\) must be \(2, 3\)",
         {"truncated": FLAGS, "bootstrap": ONES[:, 0]}),
        (ValueError, r"bootstrap \(2, 3\) must be \(2,\)", {"bootstrap": ONES}),
        (ValueError, "values on meta, expected cpu", {"values": ONES.to("meta")}),
    ],
)  # fmt: skip
def test_bad_arguments_raise(error, message, changed):
    with pytest.raises(error, match=message):
        gae(**{"rewards": ONES, **changed})


@pytest.mark.parametrize(
    ("message", "cu_seqlens"),
    [
        (r"cu_seqlens must be \[B \+ 1\], got \(0,\)", []),
        ("must rise from 0 to N = 6, got 1 at index 0", [1, 6]),
        ("must rise from 0 to N = 6, got 3 at index 2", [0, 4, 3, 6]),
        ("must rise from 0 to N = 6, got 5 at index 1", [0, 5]),
        ("must rise from 0 to N = 6, got -1 at index 1", [0, -1, 6]),
    ],
)
def test_cu_seqlens_is_checked(kernel, message, cu_seqlens):
    on_gpu = kernel in ("cuda", "cuda-on-cpu", "triton")  # where reading values would synchronise
    with nullcontext() if on_gpu and cu_seqlens else pytest.raises(ValueError, match=message):
        gae(torch.ones(6), cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"cu_seqlens must be int32, got torch\.int64"):
        gae(torch.ones(6), cu_seqlens=torch.tensor(cu_seqlens).long())
