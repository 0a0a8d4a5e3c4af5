"""gae against its reference, and the laws of advantages."""

from contextlib import nullcontext

import pytest
import torch
from accuracy import TOLERANCE, assert_no_worse, leaves
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck
from torch.library import opcheck

import fastpg.ops.gae as page
from fastpg import gae

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
POISON = [float("nan"), float("inf"), -float("inf"), 1e30]
CU = torch.tensor([0, 3, 3, 8, 12, 13, 20], dtype=torch.int32)


def inputs(shape=(3, 7), dtype=torch.float64, seed=0):
    """Rewards, values and a mask that hides tokens at the start, inside and at the end."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in "rv")
    return rewards, values, torch.rand(shape, generator=g) < 0.7


def flags(shape, seed=1):
    """terminated, truncated and bootstrap of one shape."""
    g = torch.Generator().manual_seed(seed)
    terminated, truncated = (torch.rand(shape, generator=g) < 0.3 for _ in range(2))
    return terminated, truncated, torch.randn(shape, generator=g, dtype=torch.float64)


def sequences(x, cu_seqlens):
    """The sequences of a padded or packed tensor, one by one."""
    return list(x) if cu_seqlens is None else list(x.split(cu_seqlens.diff().tolist()))


def loop(r, v, mask, gamma, lam, rho, c, terminated, truncated, bootstrap):
    """One sequence, by the words of the docstring; flags and bootstrap are [T], [] or None."""
    kept, out = mask.nonzero()[:, 0].tolist(), r.new_zeros(2, len(r))
    carry = value = r.new_zeros(())
    for t in reversed(kept):
        last = t == kept[-1]

        def here(x, last=last, t=t):
            return x is not None and bool(x[t] if x.dim() else last and x)

        done, cut = here(terminated), here(truncated)
        if terminated is None:
            done = last and not cut and (truncated is not None or bootstrap is None)
        if last or done or cut:
            read = bootstrap is not None and not done and (cut or bootstrap.dim() == 0)
            value = (bootstrap[t] if bootstrap.dim() else bootstrap) if read else r.new_zeros(())
            carry = r.new_zeros(())
        g, decay = (x[t] if x.dim() else x for x in (gamma, lam))
        carry = rho[t] * (r[t] + g * value - v[t]) + g * decay * c[t] * carry
        value = v[t]
        out[:, t] = torch.stack([carry, carry + value])
    return out


@pytest.fixture(autouse=True)
def short_blocks(request, monkeypatch):
    """Of the scan in Triton, whose interpreter is slow: a sequence of these tests takes several."""
    if "kernel" in request.fixturenames and request.getfixturevalue("kernel") == "triton":
        monkeypatch.setattr("fastpg.ops.gae_triton.BLOCK", 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (9, 130), (0, 5), (2, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_reference(kernel, shape, dtype, masked):
    rewards, values, mask = inputs(shape, dtype)
    mask = mask if masked else None
    options = [None, mask, *[None] * 7, 0.99, 0.95]
    out = gae(rewards, values, mask, gamma=0.99, lam=0.95)
    oracle = page.reference(rewards.double(), values.double(), *options)
    torchs = page.reference(rewards.to(out[0].dtype), values.to(out[0].dtype), *options)
    assert out[0].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
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

    assert gradcheck(run, tensors, fast_mode=kernel == "triton")
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
        options = mask, gammas, None, values, rewards, terminated, truncated, None, 0.0, 0.8
        args = rewards, values, bootstrap, *options
        opcheck(page._gae, args)
        opcheck(page._backward, (values, rewards.sum().expand(rewards.shape), *args))
        opcheck(page._gae, (rewards, *[None] * 10, 0.9, 0.8))
        opcheck(page._backward, (values, rewards, rewards, *[None] * 10, 0.9, 0.8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by its own compiler
def test_compile():
    @torch.compile(fullgraph=True, dynamic=True)
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by its own compiler
def test_compile_packed():
    rewards, values, mask = inputs((20,), torch.float32)
    truncated = torch.rand(20) < 0.3
    terminated = torch.arange(len(CU) - 1) % 2 == 0
    options = {"terminated": terminated, "truncated": truncated, "bootstrap": values + 1}

    def run(function):
        return function(rewards, values, mask, gamma=0.9, cu_seqlens=CU, **options)

    compiled = torch.compile(gae, fullgraph=True, dynamic=True)
    for ours, eager in zip(run(compiled), run(gae), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by its own decompositions
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
def test_edges(error, message, changed):
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


def test_any_strides(kernel):
    rewards, values, mask = inputs((5, 8))
    views = rewards.t()[1:], values[:, :1].expand(5, 8).t()[1:], mask.t()[1:]
    gamma = torch.tensor([0.9], dtype=torch.float64).expand(7)
    ours = gae(*views, gamma=gamma, lam=torch.tensor(0.8))
    expected = gae(*(x.clone() for x in views), gamma=0.9, lam=torch.full((7, 5), 0.8))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_as_many_tokens_as_sequences_is_per_token(kernel):
    cu, gamma = torch.tensor([0, 0, 2], dtype=torch.int32), torch.tensor([0.25, 0.5])
    assert gae(torch.ones(2), gamma=gamma, cu_seqlens=cu)[0].tolist() == [1.25, 1.0]
    after = gae(torch.ones(2), gamma=gamma, bootstrap=torch.tensor([8.0, 4.0]), cu_seqlens=cu)[0]
    assert after.tolist() == [1.75, 3.0]


def test_published_vectors(kernel):
    """rlax, truncated_generalized_advantage_estimation; a discount of 0 ends an episode."""
    rewards = torch.tensor([[0, 0, 1, 0, -0.5], [0, 0, 0, 0, 1]])
    values = torch.tensor([[1.0, 4, -3, -2, -1], [-3, -2, -1, 0, 5]])
    discounts = torch.tensor([[0.99, 0.99, 0.99, 0.99, 0.99], [0.9, 0.9, 0.9, 0, 0.9]])
    for lam, *expected in (
        (1.0, [-1.45118, -4.4557, 2.5396, 0.5249, -0.49], [3.0, 2.0, 1.0, 0.0, -4.9]),
        (0.7, [-0.676979, -5.248167, 2.4846, 0.6704, -0.49], [2.2899, 1.73, 1.0, 0.0, -4.9]),
        (0.4, [0.56731, -6.042, 2.3431, 0.815, -0.49], [1.725, 1.46, 1.0, 0.0, -4.9]),
    ):
        after = torch.tensor([-1.0, -1.0])
        ours, _ = gae(rewards, values, gamma=discounts, lam=lam, bootstrap=after)
        torch.testing.assert_close(ours, torch.tensor(expected), rtol=0, atol=1e-3)


def test_published_vtrace(kernel):
    """rlax, vtrace_td_error_and_advantage: log-ratios from logits, clipped at 1."""
    behavior = [[[8.9, 0.7], [5.0, 1.0], [0.6, 0.1], [-0.9, -0.1]],
                [[0.3, -5.0], [1.0, -8.0], [0.3, 1.7], [4.7, 3.3]]]  # fmt: skip
    target = [[[0.4, 0.5], [9.2, 8.8], [0.7, 4.4], [7.9, 1.4]],
              [[1.0, 0.9], [1.0, -1.0], [-4.3, 8.7], [0.8, 0.3]]]  # fmt: skip
    actions = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1]])
    logps = [torch.tensor(x).log_softmax(-1).gather(-1, actions[..., None])[..., 0]
             for x in (target, behavior)]  # fmt: skip
    ratio = (logps[0] - logps[1]).exp().clamp(max=1)
    rewards = torch.tensor([[-1.3, -1.3, 2.3, 42.0], [1.3, 5.3, -3.3, -5.0]])
    values = torch.tensor([[2.1, 1.1, -3.1, 0.0], [3.1, 0.1, -1.1, 7.4]])
    discounts = torch.tensor([[0.0, 0.89, 0.85, 0.99], [0.88, 1.0, 0.83, 0.95]])
    after = torch.tensor([8.4, -1.2])
    errors, targets = gae(rewards, values, gamma=discounts, bootstrap=after, rho=ratio, c=ratio)
    expected = torch.tensor([[-1.6155143, -3.4973226, 1.8670533, 50.316002],
                             [1.4662437, 3.6116405, -8.3327293e-5, -13.54]])  # fmt: skip
    torch.testing.assert_close(errors, expected, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(targets, values + expected, rtol=1e-3, atol=1e-7)


def test_on_policy_vtrace_is_the_lambda_return(kernel):
    rewards, values, mask = inputs()
    one = torch.ones_like(rewards)
    ours = gae(rewards, values, mask, gamma=0.9, lam=0.8, rho=one, c=one)
    plain = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_ratio_of_zero_leaves_the_value(kernel):
    rewards, values, _ = inputs()
    rho = torch.zeros_like(rewards)
    advantages, returns = gae(rewards, values, gamma=0.9, rho=rho, c=rho)
    assert advantages.count_nonzero() == 0 and torch.equal(returns, values)


def test_lambda_one_is_monte_carlo(kernel):
    rewards, values, _ = inputs()
    advantages, returns = gae(rewards, values, gamma=0.9)
    discount = 0.9 ** torch.arange(7, dtype=torch.float64)
    for t in range(7):
        expected = (rewards[:, t:] * discount[: 7 - t]).sum(1)
        torch.testing.assert_close(returns[:, t], expected)
        torch.testing.assert_close(advantages[:, t], expected - values[:, t])
    to_go = gae(rewards, gamma=0.9)
    assert torch.equal(*to_go)
    torch.testing.assert_close(to_go[0], returns)


def test_lambda_zero_is_the_td_error(kernel):
    rewards, values, _ = inputs()
    after = torch.cat([values[:, 1:], torch.zeros(3, 1)], 1)
    advantages, _ = gae(rewards, values, gamma=0.9, lam=0.0)
    torch.testing.assert_close(advantages, rewards + 0.9 * after - values)


def test_deleting_masked_tokens_equals_masking_them(kernel):
    rewards, values, mask = inputs((1, 40), torch.float32)
    masked = gae(rewards, values, mask, gamma=0.99, lam=0.95)
    deleted = gae(rewards[mask][None], values[mask][None], gamma=0.99, lam=0.95)
    for a, b in zip(masked, deleted, strict=True):
        assert torch.equal(a[mask], b[0]) and a[~mask].count_nonzero() == 0


@pytest.mark.parametrize("poison", POISON)
def test_masked_slots_change_no_bit(kernel, poison):
    rewards, values, mask = inputs()
    terminated, truncated, bootstrap = flags(mask.shape)
    gamma = torch.full(mask.shape, 0.9, dtype=torch.float64)
    weight = torch.randn(mask.shape, dtype=torch.float64)

    def run(fill):
        tensors = leaves(*(torch.where(mask, x, fill) for x in (rewards, values)))
        tensors += leaves(torch.where(mask & truncated & ~terminated, bootstrap, fill))
        ratio = torch.where(mask, gamma, fill)
        out = gae(*tensors[:2], mask, gamma=ratio, lam=0.8, rho=ratio, c=ratio,
                  terminated=terminated, truncated=truncated, bootstrap=tensors[2])  # fmt: skip
        torch.autograd.backward(out, [torch.where(mask, weight, fill)] * 2)
        return [*out, *(x.grad for x in tensors)]

    assert all(torch.equal(a, b) for a, b in zip(run(0.0), run(poison), strict=True))


def test_packed_equals_padded_equals_one_by_one(kernel):
    rewards, values, mask = inputs((20,), torch.float32)
    packed = gae(rewards, values, mask, gamma=0.9, lam=0.8, cu_seqlens=CU)
    padded = [torch.nn.utils.rnn.pad_sequence(sequences(x, CU), batch_first=True)
              for x in (rewards, values, mask)]  # fmt: skip
    padded = gae(*padded, gamma=0.9, lam=0.8)
    split = zip(*(sequences(x, CU) for x in (rewards, values, mask)), strict=True)
    single = [gae(*(x[None] for x in one), gamma=0.9, lam=0.8) for one in split]
    for k in range(2):
        for i, ours in enumerate(sequences(packed[k], CU)):
            assert torch.equal(ours, padded[k][i, : len(ours)])
            assert torch.equal(ours, single[i][k][0])


@pytest.mark.parametrize("masked", [False, True])
def test_batch_mates_and_threads_never_matter(kernel, masked):
    shape = (7, {"reference": 60, "triton": 20}.get(kernel, 9000))
    rewards, values, mask = inputs(shape, torch.float32)

    def run(rows):
        tensors = leaves(rewards[rows], values[rows])
        out = gae(*tensors, mask[rows] if masked else None, gamma=0.99, lam=0.95)
        torch.autograd.backward(out, [values[rows], rewards[rows]])
        return [*out, *(x.grad for x in tensors)]

    threads, every = torch.get_num_threads(), run(slice(None))
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(slice(None)), every, strict=True))
    finally:
        torch.set_num_threads(threads)
    for row in range(7):
        alone = run(slice(row, row + 1))
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, every, strict=True))


def test_a_long_sequence_among_short_ones_keeps_its_bits(kernel):
    lengths = torch.tensor([0, 700] + [1] * 100)
    cu = lengths.cumsum(0).to(torch.int32)
    rewards, values, mask = inputs((800,))

    def run(tokens, cu_seqlens=None):
        tensors = leaves(rewards[tokens], values[tokens])
        out = gae(*tensors, mask[tokens], gamma=0.99, lam=0.95, cu_seqlens=cu_seqlens)
        torch.autograd.backward(out, [values[tokens], rewards[tokens]])
        return [*out, *(x.grad for x in tensors)]

    packed, alone = run(slice(None), cu), run((None, slice(700)))
    assert all(torch.equal(a[:700], b[0]) for a, b in zip(packed, alone, strict=True))


def test_truncation_is_an_absorbing_constant(kernel):
    """A bootstrap V after the end equals tokens of value V and reward (1 - gamma) V without end."""
    rewards, values, _ = inputs()
    after = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    flag = torch.ones(3, dtype=torch.bool)
    cut = gae(rewards, values, gamma=0.9, lam=0.8, truncated=flag, bootstrap=after)
    forever = after[:, None].expand(3, 5)
    longer = gae(torch.cat([rewards, 0.1 * forever], 1), torch.cat([values, forever], 1),
                 gamma=0.9, lam=0.8, bootstrap=after)  # fmt: skip
    for a, b in zip(cut, longer, strict=True):
        torch.testing.assert_close(a, b[:, :7])


def test_long_sums_keep_their_digits(kernel):
    length = 701 if kernel == "triton" else 70001  # its interpreter is slow
    rewards = torch.rand(1, length, generator=torch.Generator().manual_seed(0))
    exact = rewards.double().cpu().flip(1).cumsum(1).flip(1)
    assert ((gae(rewards)[1].cpu() - exact).abs() <= 1e-5 * exact).all()
