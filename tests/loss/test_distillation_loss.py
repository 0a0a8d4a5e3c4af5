"""distillation_loss against its formulas in fp64, with torch's own gradient."""

import math

import pytest
import torch
from accuracy import leaves
from registration import check_registration

from fastpg import distillation_loss, merge_stats
from fastpg.ops.loss import distillation_loss as page

OP = "distillation_loss"
DIVERGENCES = page.DIVERGENCES
INF = math.inf


def sample(shape=(3, 5), kept=4, dtype=torch.float64, seed=0):
    """Log-probs of `kept` of 9 tokens under a student and a teacher, and weights, some 0."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, *shape, 9, generator=g, dtype=torch.float64)
    logp, teacher_logp = logits.log_softmax(-1)[..., :kept].to(dtype)
    weight = torch.rand(shape, generator=g, dtype=torch.float64)
    return logp, teacher_logp, weight.where(weight > 0.2, 0.0).to(dtype)


def by_formula(logp, teacher_logp, weight, divergence, beta):
    """The loss as it is commonly written, over the tokens and their tail."""
    kept = weight != 0
    p, q = logp[kept].exp(), teacher_logp[kept].exp()
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    m = (1 - beta) * p + beta * q
    value = {
        "forward_kl": q * (q / p).log(),
        "reverse_kl": p * (p / q).log(),
        "jsd": beta * q * (q / m).log() + (1 - beta) * p * (p / m).log(),
    }[divergence].sum(-1)
    means = {"divergence": value.mean(), "student_tail": p[..., -1].mean()}
    means |= {"teacher_tail": q[..., -1].mean(), "count": kept.sum()}
    return (weight[kept] * value).sum(), {name: x.item() for name, x in means.items()}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [1, 7])
def test_matches_reference(kernel, divergence, dtype, kept):
    for shape in [(3, 5)] if kernel == "triton" else [(3, 5), (70,)]:  # the interpreter is slow
        logp, teacher_logp, weight = sample(shape, kept, dtype)
        leaf, leaf64 = leaves(logp, logp.double())
        loss, stats = distillation_loss(leaf, teacher_logp, weight, divergence=divergence, beta=0.3)
        double = teacher_logp.double(), weight.double()
        expected, means = by_formula(leaf64, *double, divergence, 0.3)
        exact = dtype is torch.float64
        assert loss.dtype is (torch.float64 if exact else torch.float32)
        rtol = 1e-11 if exact else 1e-6
        torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)
        (grad,), (grad64,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, leaf64)
        atol, rtol = (1e-12, 1e-9) if exact else (1e-7, 1e-6)
        rtol = 1e-2 if dtype is torch.bfloat16 else rtol
        torch.testing.assert_close(grad.double(), grad64, rtol=rtol, atol=atol)
        merged = merge_stats(stats)
        assert merged == pytest.approx(means | {"loss": loss.item()}, rel=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients(kernel, divergence):
    logp, teacher_logp, weight = sample((2, 3))
    (logp,) = leaves(logp)

    def loss(x):
        return 3 * distillation_loss(x, teacher_logp, weight, divergence=divergence)[0]

    assert torch.autograd.gradcheck(loss, logp, fast_mode=kernel == "triton")
    (teacher,) = leaves(teacher_logp)
    loss, _ = distillation_loss(logp, teacher, weight, divergence=divergence)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "empty"])
def test_registration(layout):
    change = {
        "contiguous": lambda t: t,
        "transposed": lambda t: t.transpose(0, 1),
        "expanded": lambda t: t[:, :1].expand_as(t),
        "empty": lambda t: t[:0],
    }[layout]
    tensors = map(change, sample((4, 3), dtype=torch.float32))
    for divergence in DIVERGENCES:
        check_registration(page.distillation_loss_op, page.Inputs(*tensors, divergence, 0.5))
        tensors = map(change, sample((4, 3), dtype=torch.float32))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch compiles by its own old parts
def test_compile(compiler):
    compiled = torch.compile(distillation_loss, backend=compiler, fullgraph=True, dynamic=True)
    for stance, count in [("default", 8), ("fail_on_recompile", 11)]:
        logp, teacher_logp, weight = sample((count,), dtype=torch.float32)
        ours, eager = leaves(logp, logp)
        with torch.compiler.set_stance(stance):
            loss, stats = compiled(ours, teacher_logp, weight)
        expected, expected_stats = distillation_loss(eager, teacher_logp, weight)
        torch.testing.assert_close((loss, stats.values), (expected, expected_stats.values))
        grads = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, eager)
        torch.testing.assert_close(*grads)


def test_bad_arguments_raise():
    logp, teacher_logp, weight = sample((3,))
    for change, error, message in (
        ({"logp": logp[..., :0], "teacher_logp": logp[..., :0]}, ValueError, "K > 0, got"),
        ({"teacher_logp": teacher_logp[:, :2]}, ValueError, r"teacher_logp \(3, 2\) must have the"),
        ({"weight": weight[:2]}, ValueError, r"weight \(2,\) must be \(3,\)"),
        ({"weight": weight.long()}, TypeError, "weight must be floating point, got torch.int64"),
        ({"logp": None}, TypeError, "logp must be a tensor, got NoneType"),
        ({"divergence": "kl"}, ValueError, "one of forward_kl, reverse_kl, jsd, got 'kl'"),
        ({"beta": 1.0}, ValueError, r"beta must be in \(0, 1\), got 1.0"),
        ({"beta": None}, TypeError, "beta must be a number, got NoneType"),
    ):
        arguments = {"logp": logp, "teacher_logp": teacher_logp, "weight": weight, **change}
        with pytest.raises(error, match=message):
            distillation_loss(**arguments)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_whole_vocabulary_has_no_tail(kernel, divergence):
    """Then the divergence is that of the two distributions, and its gradient sums to 0."""
    logp, teacher_logp, weight = sample((6,), kept=9)
    (leaf,) = leaves(logp)
    loss, stats = distillation_loss(leaf, teacher_logp, weight, divergence=divergence)
    p, q = logp.exp(), teacher_logp.exp()
    m = (p + q) / 2
    value = {
        "forward_kl": q * (q / p).log(),
        "reverse_kl": p * (p / q).log(),
        "jsd": (q * (q / m).log() + p * (p / m).log()) / 2,
    }[divergence].sum(-1)
    torch.testing.assert_close(loss, (weight * value).sum(), rtol=1e-9, atol=1e-13)
    assert merge_stats(stats)["student_tail"] < 1e-15


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("nats", [20.0, 40.0])
def test_a_tail_near_0_keeps_its_digits(kernel, divergence, nats):
    """A student that is certain to e^-20 and e^-40, a teacher to half and twice as much."""
    tail = math.exp(-nats)
    logp = torch.tensor([[math.log1p(-tail)]], dtype=torch.float64)
    for factor in (0.5, 2.0):
        teacher_logp = torch.tensor([[math.log1p(-factor * tail)]], dtype=torch.float64)
        (leaf,) = leaves(logp)
        loss, stats = distillation_loss(leaf, teacher_logp, torch.ones(1), divergence=divergence)
        assert merge_stats(stats)["student_tail"] == pytest.approx(tail, rel=1e-7)
        # To the first order in the tails p and q a divergence is linear in them.
        p, q, m = 1.0, factor, (1 + factor) / 2
        u = {"forward_kl": q / p - 1, "reverse_kl": -math.log(p / q), "jsd": -math.log(p / m) / 2}
        expected = u[divergence]
        assert torch.autograd.grad(loss, leaf)[0].item() == pytest.approx(expected, rel=1e-6)


def test_fp64_in_any_argument_is_computed_in_fp64(kernel):
    given = dict(zip(("logp", "teacher_logp", "weight"), sample(dtype=torch.float32), strict=True))
    expected = distillation_loss(*(x.double() for x in given.values()))[0]
    for name, x in given.items():
        loss, _ = distillation_loss(**{**given, name: x.double()})
        assert torch.equal(loss, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_infinite_log_probs_are_finite_in_the_loss(kernel, divergence):
    """Both, the student alone, the teacher alone: a log-ratio of 0, -20 and 20."""
    logp = torch.tensor([[-INF, -1.0], [-INF, -1.0], [-2.0, -1.0]], dtype=torch.float64)
    teacher_logp = torch.tensor([[-INF, -1.5], [-2.0, -1.5], [-INF, -1.5]], dtype=torch.float64)
    (leaf,) = leaves(logp)
    weight = torch.ones(3, dtype=torch.float64)
    loss, stats = distillation_loss(leaf, teacher_logp, weight, divergence=divergence)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.isfinite() and stats.values.isfinite().all() and grad.isfinite().all()
    assert (grad[:2, 0] == 0).all()
    plain, teacher = leaf.detach()[:1, 1:], teacher_logp[:1, 1:]  # what is in neither counts 0
    alone, _ = distillation_loss(plain, teacher, weight[:1], divergence=divergence)
    first, _ = distillation_loss(logp[:1], teacher_logp[:1], weight[:1], divergence=divergence)
    torch.testing.assert_close(first, alone)
    if divergence == "reverse_kl":
        p, p_tail = math.exp(-2.0), 1 - math.exp(-2.0) - math.exp(-1.0)
        rest = math.exp(-1.0) * 0.5 + p_tail * math.log(p_tail / (1 - math.exp(-1.5)))
        third, _ = distillation_loss(logp[2:], teacher_logp[2:], weight[:1], divergence=divergence)
        assert third.item() == pytest.approx(20 * p + rest, rel=1e-12)


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_masked_tokens_change_no_bit(kernel, poison):
    logp, teacher_logp, weight = sample((40,))
    masked = (weight == 0)[:, None]
    results = []
    for x in (logp, teacher_logp), (logp.masked_fill(masked, poison), teacher_logp / ~masked):
        (leaf,) = leaves(x[0])
        loss, stats = distillation_loss(leaf, x[1], weight, divergence="jsd")
        results.append((loss, stats.values, torch.autograd.grad(loss, leaf)[0]))
    assert all(map(torch.equal, *results))


def test_any_split_adds_up(kernel):
    logp, teacher_logp, weight = sample((50,))
    whole, stats = distillation_loss(logp, teacher_logp, weight)
    parts = [
        distillation_loss(logp[i:j], teacher_logp[i:j], weight[i:j])
        for i, j in ((0, 1), (1, 40), (40, 40), (40, 50))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    merged = merge_stats([part for _, part in parts])
    assert merged == pytest.approx(merge_stats(stats), rel=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_nan_shows(kernel, divergence):
    logp, teacher_logp, weight = sample((4,))
    for place in 0, 3:
        bad = logp.clone()
        bad[1, place], weight[:] = math.nan, 1.0
        (leaf,) = leaves(bad)
        loss, _ = distillation_loss(leaf, teacher_logp, weight, divergence=divergence)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert loss.isnan() and grad[1].isnan().all() and grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("given_up", [-720.0, -800.0])
def test_forward_kl_pulls_on_a_token_whose_probability_underflows(kernel, given_up):
    """By q, however small p is: -720 is subnormal in fp64, and q / p infinite."""
    logp = torch.tensor([[math.log(0.5), given_up]], requires_grad=True)
    teacher_logp = torch.tensor([[0.25, 0.5]]).log()
    loss, _ = distillation_loss(logp, teacher_logp, torch.ones(1), divergence="forward_kl")
    loss.backward()
    # The tail is 0.5 of the student, 0.25 of the teacher.
    torch.testing.assert_close(logp.grad, torch.tensor([[-0.25 + 0.5 * 0.5, -0.5]]))
