"""policy_loss against the loss as its docstring has it, with torch's own gradient."""

import math
from typing import get_args

import pytest
import torch
from accuracy import TOLERANCE, assert_no_worse, leaves
from registration import check_registration
from torch._dynamo.testing import CompileCounterWithBackend

from fastpg import PolicyStats, merge_stats, policy_loss
from fastpg.ops.loss import policy_loss as page
from fastpg.ops.loss import surrogates

OP = "policy_loss"
# A few roundings; of bf16, one.
GRADIENT_RTOL = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 8e-3}
NAMES = ("logp", "advantages", "weight", "old_logp", "ref_logp", "entropy")
KL = {"kl_coef": 0.13}
CASES = {  # the options, and which optional tensors are given
    "ppo": ({}, "old_logp"),
    "ppo_on_policy": ({}, ""),
    "ppo_one_sided": ({"clip": (None, 0.28)}, "old_logp"),
    "ppo_dual_clip": ({"dual_clip": 1.3}, "old_logp"),
    "cispo": ({"surrogate": "cispo", "clip": (0.3, 0.2)}, "old_logp"),
    "sapo": ({"surrogate": "sapo", "tau": (1.5, 3.0)}, "old_logp"),
    "gspo": ({"level": "sequence", "clip": (0.003, 0.004), **KL}, "old_logp ref_logp"),
    "cispo_of_sequences": ({"level": "sequence", "surrogate": "cispo"}, "old_logp"),
    "reinforce": ({"surrogate": "reinforce"}, ""),
    "reinforce_off_policy": ({"surrogate": "reinforce"}, "old_logp"),
    "k3": (KL, "old_logp ref_logp"),
    "k3_naive": ({**KL, "kl": "k3_naive"}, "old_logp ref_logp"),
    "k2": ({**KL, "kl": "k2"}, "old_logp ref_logp"),
    "entropy": ({"entropy_coef": 0.07}, "old_logp entropy"),
    "all": (
        {**KL, "entropy_coef": -0.07, "clip": (0.1, None), "dual_clip": 1.4},
        "old_logp ref_logp entropy",
    ),
}


def sample(shape, dtype=torch.float32):
    """Tensors by name; a third of the tokens is masked, ratios lie well beyond the clip bounds."""
    x = {name: torch.randn(shape, dtype=torch.float64) for name in NAMES}
    x["logp"] = -x["logp"].abs()
    x["old_logp"] = x["logp"] + 0.3 * x["old_logp"]
    x["ref_logp"] = x["logp"] + 0.2 * x["ref_logp"]
    x["weight"] = torch.where(x["weight"] > -0.4, 0.5 + torch.rand(shape), 0.0) / (
        math.prod(shape) + 1
    )
    return {name: tensor.to(dtype) for name, tensor in x.items()}


def run(tensors, case, cu_seqlens=None):
    """(loss, stats, gradient of logp, gradient of entropy or None)

    Where the level is "sequence", one-dimensional tensors are three sequences, one of them empty.
    """
    options, given = CASES[case]
    x = {name: tensors[name] for name in (*NAMES[:3], *given.split())}
    if "level" in options and x["logp"].dim() == 1:
        n = len(x["logp"])
        ends = [0, n // 3, n // 3, n] if cu_seqlens is None else cu_seqlens
        x["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    x["logp"] = x["logp"].detach().requires_grad_()
    if "entropy" in x:
        x["entropy"] = x["entropy"].detach().requires_grad_()
    loss, stats = policy_loss(**x, **options)
    loss.backward()
    return (
        loss.detach(),
        stats.values,
        x["logp"].grad,
        x["entropy"].grad if "entropy" in x else None,
    )


def frozen(value, slope_of):
    """`value`, with the gradient of `slope_of`."""
    return value.detach() + slope_of - slope_of.detach()


def surrogate_by_formula(options, r, a, logp):
    """s, and where r is held at its lower, its upper and its dual bound."""
    low, high = options["clip"]
    low = -math.inf if low is None else 1 - low
    high = math.inf if high is None else 1 + high
    ratio, clipped = r.detach(), r.clamp(low, high)
    never = torch.zeros_like(ratio, dtype=torch.bool)
    if options["surrogate"] == "ppo":
        s = -torch.minimum(r * a, clipped * a)
        dual = never
        if cap := options.get("dual_clip"):
            dual = (a < 0) & (ratio > cap)
            s = torch.where(a < 0, torch.minimum(s, -cap * a), s)
        return s, (ratio < low) & (a < 0), (ratio > high) & (a > 0), dual
    if options["surrogate"] == "reinforce":
        return -ratio * a * logp, never, never, never
    if options["surrogate"] == "cispo":
        return -clipped.detach() * a * logp, ratio < low, ratio > high, never
    positive, negative = (torch.tensor(tau, dtype=r.dtype) for tau in options["tau"])
    tau = torch.where(a < 0, negative, positive)
    return -4 / tau * torch.sigmoid(tau * (r - 1)) * a, never, never, never


def by_autograd(tensors, case, cu_seqlens=None):
    """What `run` returns, from formulas that torch differentiates, in the dtype of logp."""
    options, given = CASES[case]
    options = {"clip": (0.2, 0.2), "tau": (1.0, 1.05), "surrogate": "ppo", "kl": "k3"} | options
    kept = tensors["weight"] != 0
    leaf = tensors["logp"].detach().requires_grad_()
    entropy_leaf = tensors["entropy"].detach().requires_grad_()
    x, a, w = leaf[kept], tensors["advantages"][kept], tensors["weight"][kept]
    old = tensors["old_logp"][kept] if "old_logp" in given else x.detach()
    d = x - old
    r = token_ratio = d.clamp(-20, 20).exp()
    if "level" in options:
        groups = sequence_numbers(tensors["logp"], cu_seqlens)[kept]
        count = torch.bincount(groups, minlength=1).clamp(min=1)
        sums = torch.zeros(len(count), dtype=d.dtype).index_add(0, groups, d.detach())
        mean = (sums / count).clamp(-20, 20)[groups]
        r = frozen(mean.exp(), mean.exp() * x)
    s, *held = surrogate_by_formula(options, r, a, x)
    ref_kl, h, loss = torch.zeros_like(x), torch.zeros_like(x), w * s
    if "ref_logp" in given:
        e = x - tensors["ref_logp"][kept]
        naive = torch.exp(-e) - 1 + e
        kl = options["kl"]
        ref_kl = e**2 / 2 if kl == "k2" else naive if kl == "k3_naive" else token_ratio * naive
        loss = loss + w * options.get("kl_coef", 0.0) * ref_kl
    if "entropy" in given:
        h = entropy_leaf[kept]
        loss = loss - w * options["entropy_coef"] * h
    total = loss.sum()
    total.backward()
    k3 = token_ratio - 1 - d
    sums = [kept, loss, w * s, r, r**2, -d, k3, *held, ref_kl, h]
    least, most = r.detach().aminmax() if len(r) else (math.inf, -math.inf)
    bounds = [least, "ref_logp" in given, "entropy" in given, most]
    stats = [float(t.detach().sum(dtype=torch.float64)) for t in sums] + [float(t) for t in bounds]
    grads = leaf.grad, entropy_leaf.grad if "entropy" in given else None
    return total.detach(), torch.tensor(stats, dtype=torch.float64), *grads


def sequence_numbers(logp, cu_seqlens):
    """The sequence of each token, as `run` has them."""
    if logp.dim() == 2:
        return torch.arange(len(logp))[:, None].expand(logp.shape)
    n = len(logp)
    ends = [0, n // 3, n // 3, n] if cu_seqlens is None else cu_seqlens
    lengths = torch.tensor(ends).diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_matches_autograd(kernel, case, dtype):
    shapes = [(1,), (16,), (3, 7), (2, 2048), (4321,), ()]  # below, at and beyond lanes and blocks
    for x in (sample(shape, dtype) for shape in shapes):
        if x["logp"].dim() == 0 and "level" in CASES[case][0]:
            continue
        ours = run(x, case)
        computed = torch.float64 if dtype is torch.float64 else torch.float32
        torchs = by_autograd({name: tensor.to(computed) for name, tensor in x.items()}, case)
        oracle = by_autograd({name: tensor.double() for name, tensor in x.items()}, case)
        for a, b, c in zip(ours[:2], torchs[:2], oracle[:2], strict=True):
            finite = c.isfinite()
            assert torch.equal(a[~finite].double(), c[~finite])
            assert_no_worse(a[finite], b[finite], c[finite], TOLERANCE[dtype])
        for a, c in zip(ours[2:], oracle[2:], strict=True):
            assert a is c is None or a.dtype == dtype
            if a is not None:
                torch.testing.assert_close(a.double(), c, rtol=GRADIENT_RTOL[dtype], atol=1e-7)


def test_a_million_tokens_keep_six_digits():
    x = sample((1 << 20,))
    ours, oracle = run(x, "all"), by_autograd({k: t.double() for k, t in x.items()}, "all")
    for a, b in zip(ours[:3], oracle[:3], strict=True):
        assert (a.double() - b).abs().max() <= 1e-6 * b.abs().max()
    scale = oracle[1].abs().clamp(min=1)  # each field against the absolute sum it cannot exceed
    assert ((ours[1] - oracle[1]).abs() / scale).max() < 1e-5


# The others hold the ratio constant: their loss is not the integral of their gradient.
@pytest.mark.parametrize(
    "case",
    ["ppo", "ppo_dual_clip", "reinforce", "sapo", "k3", "k3_naive", "k2", "entropy", "all"],
)
def test_gradients(kernel, case):
    options, given = CASES[case]
    x = {
        k: t for k, t in sample((3, 5), torch.float64).items() if k in (*NAMES[:3], *given.split())
    }
    for names in (["logp"], ["entropy"], ["logp", "entropy"]):
        inputs = leaves(*(x[name] for name in names if name in x))

        def loss(*tensors, names=names):
            return 3 * policy_loss(**{**x, **dict(zip(names, tensors, strict=False))}, **options)[0]

        # Both together are looked at element by element, one alone along a random direction.
        fast = kernel == "triton" or len(names) == 1
        assert not inputs or torch.autograd.gradcheck(loss, inputs, fast_mode=fast)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "empty"])
@pytest.mark.parametrize("case", ["ppo_on_policy", "all"])
def test_registration(layout, case):
    x = sample((4, 6))
    change = {
        "contiguous": lambda t: t,
        "transposed": lambda t: t.t(),
        "expanded": lambda t: t[:, :1].expand(4, 6),
        "empty": lambda t: t[:0],
    }[layout]
    given = CASES[case][1].split()
    x["sequence_log_ratio"] = x["logp"] - x["old_logp"]
    given += ["sequence_log_ratio"] if "old_logp" in given else []
    names = (*NAMES[:4], "sequence_log_ratio", *NAMES[4:])
    tensors = {n: change(x[n]) if n in (*NAMES[:3], *given) else None for n in names}
    options = surrogates.LossOptions(0.8, 1.27, 3.0, 1.0, 1.05, 0.13, 0.07, 20.0, 0.0)
    record = page.Inputs(**tensors, surrogate="ppo", kl="k3", options=options, traced_options=None)
    check_registration(page.policy_loss_op, record)
    traced = torch.tensor(options, dtype=torch.float64)
    record = record._replace(surrogate="sapo", kl="k2", traced_options=traced)
    check_registration(page.policy_loss_op, record)
    logp, old_logp, weight = (change(x[n]) for n in ("logp", "old_logp", "weight"))
    inputs = page.LogRatioInputs(logp, old_logp, weight, None)
    check_registration(page.sequence_log_ratio_op, inputs)


def test_the_legal_strings_are_those_of_the_tables():
    assert get_args(surrogates.SurrogateName) == tuple(surrogates.SURROGATES)
    assert get_args(surrogates.KlName) == tuple(surrogates.KLS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses its own old parts
def test_compile(compiler):
    """One graph for all numbers, those of a clip that is absent aside."""
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(policy_loss, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for n, low, dual_clip, kl_coef, entropy_coef in (
        (50, 0.1, 3.0, 0.13, 0.07),
        (77, 0.3, 1.5, 0.3, 0.01),
        (60, 0.2, 2.0, 0.2, 0.05),
    ):
        x = sample((2, n))
        logp, entropy = leaves(x["logp"], x["entropy"])
        rest = {k: v for k, v in x.items() if k not in ("logp", "entropy")}
        options = {"clip": (low, None), "dual_clip": dual_clip, "level": "sequence"}
        options |= {"entropy_coef": entropy_coef, "kl_coef": kl_coef}
        loss, stats = compiled(logp, entropy=entropy, **rest, **options)
        compilations.append(counter.frame_count)
        loss.backward()
        eager = policy_loss(logp, entropy=entropy, **rest, **options)
        assert isinstance(stats, PolicyStats)
        torch.testing.assert_close((loss, stats.values), (eager[0], eager[1].values))
        grads = torch.autograd.grad(eager[0], (logp, entropy))
        torch.testing.assert_close((logp.grad, entropy.grad), grads)
    assert len(set(compilations)) == 1


X = torch.zeros(4)
PACKED = {"level": "sequence", "old_logp": X}
BAD = [
    ({"logp": X.long()}, TypeError, "logp must be floating point, got torch.int64"),
    ({"weight": X.bool()}, TypeError, "weight must be floating point, got torch.bool"),
    ({"advantages": None}, TypeError, "advantages must be a tensor, got NoneType"),
    ({"ref_logp": 0.0, "kl_coef": 0.1}, TypeError, "ref_logp must be a tensor, got float"),
    ({"advantages": X[:3]}, ValueError, r"advantages \(3,\) must have the shape of logp \(4,\)"),
    ({"old_logp": X[None]}, ValueError, r"old_logp \(1, 4\) must have the shape"),
    ({"entropy": X.to("meta")}, ValueError, "entropy on meta, logp on cpu"),
    ({"clip": 0.2}, ValueError, r"clip must be a pair, got 0.2"),
    ({"clip": (-0.1, 0.2)}, ValueError, r"clip must be >= 0 or None on each side, got \(-0.1"),
    ({"clip": (0.1, math.nan)}, ValueError, "clip must be >= 0"),
    ({"surrogate": "gspo"}, ValueError, "one of ppo, reinforce, cispo, sapo, got 'gspo'"),
    ({"dual_clip": 1.0}, ValueError, "dual_clip must be finite and > 1, got 1.0"),
    ({"dual_clip": 3.0, "surrogate": "sapo"}, ValueError, "dual_clip=3.0 needs surrogate='ppo'"),
    ({"tau": (1.0, 0.0)}, ValueError, r"tau must be finite and > 0, got \(1.0, 0.0\)"),
    ({"tau": 1.0}, ValueError, "tau must be a pair, got 1.0"),
    ({"level": "group"}, ValueError, "level must be token or sequence, got 'group'"),
    ({"level": "sequence"}, ValueError, r"logp must be \[B, T\], or \[N\] with cu_seqlens, got"),
    ({**PACKED, "cu_seqlens": X}, TypeError, "cu_seqlens must be int32, got torch.float32"),
    ({**PACKED, "cu_seqlens": X[:2].int()}, ValueError, "cu_seqlens must rise from 0 to N = 4"),
    ({"kl": "k1"}, ValueError, "kl='k1' has expected gradient 0"),
    ({"kl": "k4"}, ValueError, "kl must be one of k3, k3_naive, k2, got 'k4'"),
    ({"kl_coef": 0.1}, ValueError, "kl_coef=0.1 needs ref_logp"),
    ({"ref_logp": X, "kl_coef": -1.0}, ValueError, "kl_coef must be finite and >= 0, got -1.0"),
    ({"entropy_coef": 0.1}, ValueError, "entropy_coef=0.1 needs entropy"),
    ({"entropy": X, "entropy_coef": math.inf}, ValueError, "entropy_coef must be finite, got inf"),
    ({"max_log_ratio": 0.0}, ValueError, "max_log_ratio must be > 0 and <= 40, got 0.0"),
    ({"max_log_ratio": None}, TypeError, "max_log_ratio must be a number, got NoneType"),
    ({"beyond": "clamp"}, ValueError, "beyond must be one of stop, hold, got 'clamp'"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:30])
def test_bad_arguments_raise(change, error, message):
    with pytest.raises(error, match=message):
        policy_loss(**{"logp": X, "advantages": X, "weight": X, **change})


def test_cu_seqlens_are_checked_without_old_logp_too():
    x, cu_seqlens = torch.rand(4), torch.tensor([0, 2, 5], dtype=torch.int32)
    for old in (None, x):
        with pytest.raises(ValueError, match="got 5 at index 2"):
            policy_loss(x, x, x, old_logp=old, level="sequence", cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("surrogate", ["ppo", "reinforce", "cispo", "sapo"])
@pytest.mark.parametrize("count", [3, 1000])
def test_a_nan_shows_without_old_logp(kernel, surrogate, count):
    """The ratio is 1 whatever the log-prob, but for that of a model that has diverged."""
    logp, ones = torch.full((count,), -1.0), torch.ones(count)
    logp[1] = math.nan
    weight = ones.clone()
    for masked in (False, True):
        weight[1] = 0.0 if masked else 1.0
        (x,) = leaves(logp)
        loss, stats = policy_loss(x, ones, weight, surrogate=surrogate)
        loss.backward()
        merged = merge_stats([stats])
        shown = (loss.item(), merged["ratio_mean"], merged["ratio_max"], merged["approx_kl"])
        assert [math.isnan(value) for value in shown] == [not masked] * 4
        assert x.grad[[0, 2]].isfinite().all() and (x.grad[1] == 0 or not masked)
