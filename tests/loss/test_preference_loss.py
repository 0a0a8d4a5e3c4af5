"""preference_loss against -log sigmoid in fp64, and the laws of a Bradley-Terry model."""

import math

import pytest
import torch
from accuracy import TOLERANCE, assert_no_worse, leaves
from torch.autograd import gradcheck

from fastpg import merge_stats, preference_loss


def sample(dtype=torch.float64, count=9):
    chosen, rejected, weight = torch.randn(3, count, dtype=torch.float64)
    weight = torch.where(weight > -0.5, 0.5 + weight.abs(), 0.0)
    assert 0 < weight.count_nonzero() < count
    return [x.to(dtype) for x in (chosen, rejected, weight)]


def run(chosen, rejected, weight=None):
    """Loss, statistics, and the gradients of both scores."""
    chosen, rejected = leaves(chosen, rejected)
    loss, stats = preference_loss(chosen, rejected, weight=weight)
    return loss.detach(), stats.values, *torch.autograd.grad(loss, (chosen, rejected))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_the_formula(dtype, weighted):
    chosen, rejected, weight = sample(dtype)
    weight = weight if weighted else None
    w = torch.full((9,), 1 / 9, dtype=torch.float64) if weight is None else weight.double()
    exact = (w * -torch.sigmoid(chosen.double() - rejected.double()).log()).sum()
    loss, _ = preference_loss(chosen, rejected, weight=weight)
    assert loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert_no_worse(loss, exact.to(loss.dtype), exact, TOLERANCE[dtype])


@pytest.mark.parametrize("wanted", range(1, 4))
def test_gradients(wanted):
    chosen, rejected, weight = sample()
    chosen.requires_grad_(bool(wanted & 1)), rejected.requires_grad_(bool(wanted & 2))
    assert gradcheck(lambda a, b: 3 * preference_loss(a, b, weight=weight)[0], (chosen, rejected))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by its own compiler
def test_compile(compiler):
    compiled = torch.compile(preference_loss, backend=compiler, fullgraph=True, dynamic=True)
    for stance, count in [("default", 8), ("fail_on_recompile", 11)]:
        chosen, rejected, _ = sample(torch.float32, count)
        ours, eager = leaves(chosen, chosen)
        with torch.compiler.set_stance(stance):
            loss, stats = compiled(ours, rejected)
        loss.backward()
        expected = preference_loss(eager, rejected)
        expected[0].backward()
        torch.testing.assert_close((loss, stats.values), (expected[0], expected[1].values))
        torch.testing.assert_close(ours.grad, eager.grad)


X = torch.zeros(3)
BAD = [
    ({"chosen_scores": X.int()}, TypeError, "chosen_scores must be floating point, got torch.int"),
    ({"rejected_scores": None}, TypeError, "rejected_scores must be a tensor, got NoneType"),
    ({"rejected_scores": X[:2]}, ValueError, r"\(2,\) must have the shape of chosen_scores \(3,\)"),
    ({"weight": X.bool()}, TypeError, "weight must be floating point, got torch.bool"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:30])
def test_bad_arguments_raise(change, error, message):
    with pytest.raises(error, match=message):
        preference_loss(**{"chosen_scores": X, "rejected_scores": X, **change})
    loss, stats = preference_loss(X[:0], X[:0])
    assert loss == 0 and set(merge_stats(stats).values()) == {0.0}


@pytest.mark.parametrize("margin", [-40.0, -21.0, 21.0, 700.0])
def test_a_large_margin_keeps_its_digits(margin):
    chosen = torch.tensor([margin], dtype=torch.float64)
    loss, _, gradient, _ = run(chosen, torch.zeros_like(chosen))
    exact = max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))
    assert loss.item() == pytest.approx(exact, rel=1e-15, abs=0)
    assert gradient.item() == pytest.approx(-1 / (1 + math.exp(margin)), rel=1e-15, abs=0)


def test_equal_scores_cost_log_two_and_teach_most():
    loss, _, chosen, rejected = run(X, X)
    assert loss == pytest.approx(math.log(2))
    assert torch.allclose(chosen, torch.full((3,), -1 / 6))
    assert torch.equal(chosen, -rejected)


def test_only_the_margin_matters():
    chosen, rejected, _ = sample()
    first, shifted = run(chosen, rejected), run(chosen + 3, rejected + 3)
    for i in (0, 2, 3):
        torch.testing.assert_close(first[i], shifted[i])


def test_a_margin_of_a_thousand_neither_overflows_nor_vanishes():
    far = torch.full((1,), 1000.0)
    assert run(-far, far * 0)[0] == 1000.0
    assert run(-far, far * 0)[2] == -1.0
    assert run(far, far * 0)[0] == run(far, far * 0)[2] == 0.0


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_masked_pairs_change_no_bit(poison):
    chosen, rejected, weight = sample()
    bad = [x.masked_fill(weight == 0, poison) for x in (chosen, rejected)]
    pairs = zip(run(chosen, rejected, weight), run(*bad, weight), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_any_split_adds_up():
    chosen, rejected, weight = sample()
    whole, merged = preference_loss(chosen, rejected, weight=weight)
    parts = [preference_loss(chosen[i], rejected[i], weight=weight[i])
             for i in (slice(0, 4), slice(4, 4), slice(4, 9))]  # fmt: skip
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    assert merge_stats([s for _, s in parts]) == pytest.approx(merge_stats(merged), rel=1e-12)


def test_the_summary_is_what_its_names_say():
    chosen, rejected = torch.tensor([2.0, 1.0, 5.0]), torch.tensor([1.0, 1.0, 7.0])
    loss, stats = preference_loss(chosen, rejected)
    assert merge_stats(stats) == pytest.approx({
        "loss": loss.item(), "accuracy": 1 / 3, "margin": -1 / 3, "chosen_mean": 8 / 3,
        "rejected_mean": 3, "count": 3,
    })  # fmt: skip


@pytest.mark.parametrize("margin", [-700.0, -30.0, -6.0, 6.0, 30.0])
def test_large_margins_keep_their_digits(margin):
    loss, _ = preference_loss(torch.tensor([margin]), torch.zeros(1))
    exact = math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)
    assert loss.item() == pytest.approx(exact, rel=1e-6)
