"""importance_weights against a loop over the sequences, and the laws of importance sampling."""

import math

import pytest
import torch
from accuracy import TOLERANCE, assert_no_worse
from kernels import GPU
from registration import check_registration

from bench.inputs import DEVICE
from fastpg import importance_weights, merge_stats
from fastpg.ops.weight import importance_weights as page

OP = "importance_weights"
CU = torch.tensor([0, 3, 3, 8, 12, 13, 4120], dtype=torch.int32)  # the last one has two blocks
OPTIONS = [
    {},
    {"high": 1.1},
    {"low": 0.95, "high": 1.1, "outside": "zero"},
    {"low": 1.0, "outside": "clamp"},
]
LEVELS = list(page.LEVELS)


def sample(packed=False, dtype=torch.float64, shape=(6, 37)):
    """logp, behavior_logp, a mask with a sequence that has no unmasked token, and cu_seqlens."""
    shape = (4120,) if packed else shape
    logp, noise = torch.randn(2, *shape, dtype=torch.float64)
    mask = torch.rand(shape) < 0.6
    mask[slice(8, 12) if packed else slice(1, 2)] = False
    scale = 0.02 if packed else 0.1
    return logp.to(dtype), (logp + scale * noise).to(dtype), mask, CU if packed else None


def sequences_of(x, cu):
    return list(x) if cu is None else list(x.split(cu.diff().tolist()))


def by_hand(logp, behavior, mask, cu, level="token", low=None, high=None, outside="clamp"):
    """fp64: the weights, and those that are counted, with the ratios that they came from."""
    out, ratios, weights = torch.zeros(mask.shape, dtype=torch.float64), [], []
    d = logp.double() - behavior.double()
    parts = (sequences_of(x, cu) for x in (out, d, mask))
    for part, exponent, kept in zip(*parts, strict=True):
        if not kept.any():
            continue
        exponent = exponent[kept]
        if level == "sequence":
            exponent = exponent.sum()[None]
        if level == "geometric":
            exponent = exponent.mean()[None]
        ratio = exponent.exp()
        weight = ratio.clone()
        if low is not None:
            weight[ratio < low] = low if outside == "clamp" else 0.0
        if high is not None:
            weight[ratio > high] = high if outside == "clamp" else 0.0
        part[kept] = weight
        ratios.append(ratio)
        weights.append(weight)
    return out, torch.cat(ratios), torch.cat(weights)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_a_loop_over_the_sequences(kernel, dtype, packed, level):
    logp, behavior, mask, cu = sample(packed, dtype)
    for options in OPTIONS:
        ours, _ = importance_weights(logp, behavior, mask, level=level, cu_seqlens=cu, **options)
        exact, *_ = by_hand(logp, behavior, mask, cu, level, **options)
        assert ours.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert_no_worse(ours, exact.to(ours.dtype), exact, TOLERANCE[dtype])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_statistics_are_what_their_names_say(kernel, level, options):
    logp, behavior, mask, _ = sample()
    _, stats = importance_weights(logp, behavior, mask, level=level, **options)
    _, r, w = by_hand(logp, behavior, mask, None, level, **options)
    low, high = options.get("low", 0.0), options.get("high", math.inf)
    d = (logp - behavior)[mask]
    expected = {
        "outside_low": (r < low).double().mean(), "outside_high": (r > high).double().mean(),
        "weight_mean": w.mean(), "ratio_mean": r.mean(), "ratio_min": r.min(),
        "ratio_max": r.max(), "ess": w.sum() ** 2 / (len(w) * (w**2).sum()) if w.any() else 0.0,
        "approx_kl": (d.exp() - 1 - d).mean(), "kl": -d.mean(), "count": len(w),
    }  # fmt: skip
    merged = merge_stats(stats)
    assert merged == pytest.approx({name: float(x) for name, x in expected.items()}, rel=1e-9)


def test_weights_have_no_gradient():
    logp, behavior, mask, _ = sample()
    logp, behavior = logp.requires_grad_(), behavior.requires_grad_()
    weight, stats = importance_weights(logp, behavior, mask)
    assert not weight.requires_grad and not stats.values.requires_grad


def test_registration():
    for layout in ("contiguous", "transposed", "expanded", "empty", "packed"):
        shape = (4, 0) if layout == "empty" else (4, 4)
        *tensors, cu = sample(layout == "packed", torch.float32, shape)
        change = {"transposed": torch.t, "expanded": lambda x: x[:1].expand(x.shape)}
        tensors = [change.get(layout, lambda x: x)(x) for x in tensors]
        for options in (("token", 0.9, 1.1, "zero"), ("geometric", -math.inf, 1.1, "clamp")):
            check_registration(page.importance_weights_op, page.Inputs(*tensors, cu, *options))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses its own old parts
def test_compile(compiler):
    compiled = torch.compile(importance_weights, backend=compiler, fullgraph=True, dynamic=True)
    for stance, shape in [("default", (3, 7)), ("fail_on_recompile", (5, 11))]:
        *tensors, _ = sample(dtype=torch.float32, shape=shape)
        with torch.compiler.set_stance(stance):
            weight, stats = compiled(*tensors, level="sequence", high=2.0)
        expected = importance_weights(*tensors, level="sequence", high=2.0)
        torch.testing.assert_close((weight, stats.values), (expected[0], expected[1].values))


X = torch.zeros(2, 3)
BAD = [
    ({"logp": X.int()}, TypeError, "logp must be floating point, got torch.int32"),
    ({"behavior_logp": X[:1]}, ValueError, r"\(1, 3\) must have the shape of logp \(2, 3\)"),
    ({"mask": X[0]}, ValueError, r"mask \(3,\) must be \(2, 3\)"),
    ({"level": "mean"}, ValueError, "level must be one of token, sequence, geometric, got 'mean'"),
    ({"outside": "drop"}, ValueError, "outside must be one of clamp, zero, got 'drop'"),
    ({"low": 2.0, "high": 1.0}, ValueError, "low <= high, .* must hold, got 2.0 and 1.0"),
    ({"low": math.inf}, ValueError, "low < inf and high > 0 must hold, got inf and inf"),
    ({"high": math.nan}, ValueError, "must hold, got -inf and nan"),
    ({"high": 0.0}, ValueError, "high > 0 must hold, got -inf and 0.0"),
    ({"cu_seqlens": CU}, ValueError, r"logp must be \[B, T\], or \[N\] with cu_seqlens, got"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:30])
def test_bad_arguments_raise(change, error, message):
    with pytest.raises(error, match=message):
        importance_weights(**{"logp": X, "behavior_logp": X, "mask": X, **change})


def test_packed_sequences_must_cover_the_tokens(kernel):
    if kernel in DEVICE:
        pytest.skip("a GPU would have to wait for the answer")
    flat = torch.zeros(20)
    with pytest.raises(ValueError, match="must rise from 0 to N = 20, got 4120 at index 6"):
        importance_weights(flat, flat, flat, cu_seqlens=CU)


@pytest.mark.parametrize("level", LEVELS)
def test_all_masked_gives_zeros(kernel, level):
    for shape in (3, 4), (0, 4), (3, 0):
        nothing = torch.full(shape, math.nan)
        weight, stats = importance_weights(nothing, nothing, torch.zeros(shape), level=level)
        assert weight.count_nonzero() == 0
        merged = merge_stats(stats)
        assert (merged.pop("ratio_min"), merged.pop("ratio_max")) == (1.0, 1.0)
        assert set(merged.values()) == {0.0}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_masked_slots_change_no_bit(kernel, level, poison):
    *tensors, mask, _ = sample(dtype=torch.float32)
    bad = [x.masked_fill(~mask, poison) for x in tensors]
    ours, theirs = (importance_weights(*x, mask, level=level) for x in (tensors, bad))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1].values, theirs[1].values)


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_policy_weighs_one(kernel, level):
    logp, _, mask, _ = sample()
    weight, stats = importance_weights(logp, logp, mask, level=level)
    assert torch.equal(weight, mask.double())
    merged = merge_stats(stats)
    assert merged["ess"] == merged["weight_mean"] == 1.0 and merged["kl"] == 0.0


@pytest.mark.parametrize("level", LEVELS)
def test_packed_equals_padded_equals_one_by_one(kernel, level):
    logp, behavior, mask, _ = sample(dtype=torch.float32)
    cu = torch.arange(0, 37 * 6 + 1, 37, dtype=torch.int32)
    padded, stats = importance_weights(logp, behavior, mask, level=level)
    flat = (x.view(-1) for x in (logp, behavior, mask))
    packed, _ = importance_weights(*flat, level=level, cu_seqlens=cu)
    sequences = zip(logp.split(1), behavior.split(1), mask.split(1), strict=True)
    alone = [importance_weights(*sequence, level=level) for sequence in sequences]
    assert torch.equal(padded.view(-1), packed)
    assert torch.equal(padded, torch.cat([weight for weight, _ in alone]))
    merged = merge_stats([part for _, part in alone])
    assert merged == pytest.approx(merge_stats(stats), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("level", LEVELS)
def test_deleting_masked_tokens_equals_masking_them(kernel, level):
    logp, behavior, mask, _ = sample()
    lengths = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1)])
    kept = (x[mask] for x in (logp, behavior, mask))
    packed, _ = importance_weights(*kept, level=level, cu_seqlens=lengths.cumsum(0).int())
    weight, _ = importance_weights(logp, behavior, mask, level=level)
    torch.testing.assert_close(weight[mask], packed, rtol=1e-12, atol=0)


def test_the_weight_of_a_sequence_is_the_product_of_its_tokens_weights(kernel):
    logp, behavior, mask, _ = sample()
    token, sequence, geometric = (
        importance_weights(logp, behavior, mask, level=level)[0].masked_fill(~mask, 1.0)
        for level in LEVELS
    )
    product = token.prod(1, keepdim=True).expand(mask.shape)
    torch.testing.assert_close(sequence[mask], product[mask])
    mean = product ** (1 / mask.sum(1, keepdim=True))
    torch.testing.assert_close(geometric[mask], mean[mask])


@pytest.mark.parametrize("sign", [1, -1])
def test_log_ratios_are_bounded_by_20_and_no_less(kernel, sign):
    """Those of tokens first, at every level; then their sum or mean."""
    d = sign * torch.tensor([[19.5, 20.0, 20.5, 1e4]], dtype=torch.float64)
    weight, _ = importance_weights(d, torch.zeros(1, 4), torch.ones(1, 4))
    expected = (sign * torch.tensor([[19.5, 20.0, 20.0, 20.0]], dtype=torch.float64)).exp()
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)
    for d, total, mean in (
        ([6.5, 6.5, 6.5], 19.5, 6.5),
        ([7.0, 7.0, 7.0], 20.0, 7.0),
        ([1e4, -18.0, 0.0], 2.0, 2 / 3),
        ([1e4, 1e4, 1e4], 20.0, 20.0),
    ):
        d = sign * torch.tensor([d], dtype=torch.float64)
        for level, exponent in (("sequence", total), ("geometric", mean)):
            weight, _ = importance_weights(d, torch.zeros(1, 3), torch.ones(1, 3), level=level)
            expected = torch.full((1, 3), math.exp(sign * exponent), dtype=torch.float64)
            torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)


def test_a_log_ratio_of_infinite_log_probs(kernel):
    """Of two, as where a label is outside a kept set in both, it is 0; of one it is ±20."""
    inf = math.inf
    logp = torch.tensor([[-inf, -1.0], [-inf, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    behavior = torch.tensor([[-inf, -1.5], [-1.0, -1.5], [-inf, -1.5]], dtype=torch.float64)
    d = torch.tensor([[0.0, 0.5], [-20.0, 0.5], [20.0, 0.5]], dtype=torch.float64)
    exponents = {"token": d, "sequence": d.sum(1, keepdim=True), "geometric": d.mean(1, True)}
    for level, exponent in exponents.items():
        weight, stats = importance_weights(logp, behavior, torch.ones(3, 2), level=level)
        expected = exponent.clamp(-20, 20).exp().expand_as(weight)
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)
        assert stats.values.isfinite().all()
        assert merge_stats(stats)["kl"] == pytest.approx(-d.mean().item())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("outside", page.OUTSIDE)
def test_a_ratio_at_its_bounds_is_inside(kernel, level, outside):
    logp = torch.randn(2, 3)
    options = {"level": level, "low": 1.0, "high": 1.0, "outside": outside}
    weight, stats = importance_weights(logp, logp, torch.ones(2, 3), **options)
    assert (weight == 1).all()
    merged = merge_stats(stats)
    assert merged["outside_low"] == merged["outside_high"] == 0.0


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1023, 1024, 1025, 2047, 2048, 2049, 4097])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_any_number_of_tokens(kernel, level, n):
    """Lanes have 16 tokens, blocks 1024 in Triton and 2048 in C++."""
    logp, behavior, mask, _ = sample(shape=(3, n))
    behavior = logp + (behavior - logp) * 0.05
    mask[0, -1] = mask[2, 0] = True
    weight, stats = importance_weights(logp, behavior, mask, level=level, high=1.01)
    expected, r, w = by_hand(logp, behavior, mask, None, level, high=1.01)
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)
    merged = merge_stats(stats)
    assert merged["count"] == len(w)
    assert merged["weight_mean"] == pytest.approx(w.mean().item(), rel=1e-12)
    assert merged["ratio_max"] == pytest.approx(r.max().item(), rel=1e-12)
    assert merged["kl"] == pytest.approx((behavior - logp)[mask].mean().item(), rel=1e-9)


@pytest.mark.parametrize("level, shape", [("token", (1, 270_001)), ("sequence", (300, 1))])
def test_every_block_is_merged(kernel, level, shape, monkeypatch):
    """More blocks, or sequences, than Triton merges at once: 256; in its interpreter 2."""
    if kernel == "triton" and not GPU:
        few = pytest.importorskip("triton").language.constexpr(2)
        for module in ("common.triton", "weight.importance_weights_triton"):
            monkeypatch.setattr(f"fastpg.ops.{module}.CHUNK", few)
        shape = (1, 5000) if level == "token" else (5, 1)
    for lowest, highest in ((-1, -2), (0, 1)):  # The extremes are in the last round, or the first.
        logp, behavior, mask, _ = sample(shape=shape)
        behavior.view(-1)[lowest] = logp.view(-1)[lowest] + 1.0
        behavior.view(-1)[highest] = logp.view(-1)[highest] - 1.0
        mask.view(-1)[[lowest, highest]] = True
        _, stats = importance_weights(logp, behavior, mask, level=level)
        _, r, w = by_hand(logp, behavior, mask, None, level)
        merged = merge_stats(stats)
        assert merged["count"] == len(w)
        assert merged["ratio_mean"] == pytest.approx(r.mean().item(), rel=1e-9)
        assert merged["ratio_min"] == pytest.approx(math.exp(-1), rel=1e-9)
        assert merged["ratio_max"] == pytest.approx(math.exp(1), rel=1e-9)
        kl = (behavior - logp)[mask].mean().item()
        assert merged["kl"] == pytest.approx(kl, rel=1e-9)


@pytest.mark.parametrize("level", LEVELS)
def test_any_strides(kernel, level):
    logp, behavior, mask, _ = sample(shape=(4, 7))
    for view in (torch.t, lambda x: x[:, ::2], lambda x: x[:1].expand(4, 7)):
        views = [view(x) for x in (logp, behavior, mask)]
        weight, stats = importance_weights(*views, level=level)
        plain = importance_weights(*(x.clone() for x in views), level=level)
        assert torch.equal(weight, plain[0]) and torch.equal(stats.values, plain[1].values)


def test_weighted_samples_estimate_the_other_policy():
    """E_b[π/b · f] = E_π[f]: by enumeration, and with the weights bounded it is biased."""
    behavior, policy = torch.tensor([[3.0, 1, 2], [1, 3, 2]]).double().log_softmax(1)
    f = torch.tensor([1.0, 5.0, -2.0]).double()
    mask = torch.ones(1, 3)
    weight, _ = importance_weights(policy[None], behavior[None], mask)
    expected = (policy.exp() * f).sum()
    assert (behavior.exp() * weight[0] * f).sum() == pytest.approx(expected.item())
    bounded, _ = importance_weights(policy[None], behavior[None], mask, high=2.0)
    assert (behavior.exp() * bounded[0] * f).sum() < expected


@pytest.mark.parametrize("level", LEVELS)
def test_threads_change_no_bit(level):
    *tensors, _ = sample(dtype=torch.float32, shape=(50, 4003))
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        weight, stats = importance_weights(*tensors, level=level, high=1.05)
        results.append((weight, stats.values))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
