"""group_center against a loop over the groups, and the laws of baselines."""

import pytest
import torch
from accuracy import TOLERANCE, assert_no_worse, leaves
from torch.autograd import gradcheck

from fastpg import group_center

OP = "group_center"
OPTIONS = [(b, s) for b in ("mean", "loo", "none") for s in ("none", "std")]
GROUP = torch.tensor([7, -3, 7, 1 << 40, 7, -3, 5])  # any numbers in any order, two of them alone


def sample(dtype=torch.float64, mean=0.0, group=GROUP):
    return (mean + torch.randn(len(group), dtype=torch.float64)).to(dtype)


def by_hand(scores, group, baseline, scale):
    """fp64, one group after the other, leave-one-out by leaving one out."""
    out = torch.empty(len(scores), dtype=torch.float64)
    for g in set(group.tolist()):
        members = (group == g).nonzero()[:, 0]
        x = scores[members].double()
        n = len(x)
        if n == 1:
            out[members] = x
            continue
        others = torch.stack([x[torch.arange(n) != i].mean() for i in range(n)])
        centre = {"mean": x.mean(), "loo": others, "none": 0.0}[baseline]
        out[members] = (x - centre) / (x.std() + 1e-6 if scale == "std" else 1.0)
    return out


@pytest.mark.parametrize("baseline, scale", OPTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_a_loop_over_the_groups(dtype, baseline, scale):
    scores = sample(dtype)
    for group in (GROUP, GROUP.sort().values, (GROUP % 3).to(torch.int32)):
        ours = group_center(scores, group, baseline=baseline, scale=scale)
        assert ours.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        exact = by_hand(scores, group, baseline, scale)
        assert_no_worse(ours, exact.to(ours.dtype), exact, TOLERANCE[dtype])


@pytest.mark.parametrize("baseline, scale", OPTIONS)
def test_gradients(baseline, scale):
    options = {"baseline": baseline, "scale": scale}
    assert gradcheck(lambda x: group_center(x, GROUP, **options), leaves(sample()))
    same = torch.ones(7, requires_grad=True)  # where the standard deviation has no derivative
    group_center(same, GROUP, **options).sum().backward()
    assert same.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses its own old parts
def test_compile(compiler):
    @torch.compile(backend=compiler, fullgraph=True, dynamic=True)
    def compiled(scores, group):
        return group_center(scores, group, baseline="loo", scale="std").cos().sum()

    for stance, size in [("default", 6), ("fail_on_recompile", 9)]:
        group = torch.arange(size) % 4
        ours, eager = leaves(*[sample(group=group)] * 2)
        with torch.compiler.set_stance(stance):
            compiled(ours, group).backward()
        group_center(eager, group, baseline="loo", scale="std").cos().sum().backward()
        torch.testing.assert_close(ours.grad, eager.grad)


X = torch.zeros(7)
BAD = [
    ({"scores": X.int()}, TypeError, "scores must be floating point, got torch.int32"),
    ({"scores": X[None]}, ValueError, r"scores must be \[B\], got \(1, 7\)"),
    ({"scores": 1.0}, TypeError, "scores must be a tensor, got float"),
    ({"group": X}, TypeError, "group must be integers, uint8 or signed, got torch.float32"),
    ({"group": X.bool()}, TypeError, "group must be integers, uint8 or signed, got torch.bool"),
    ({"group": GROUP[:3]}, ValueError, r"group \(3,\) must be \(7,\)"),
    ({"baseline": "rloo"}, ValueError, "baseline must be one of mean, loo, none, got 'rloo'"),
    ({"scale": "batch"}, ValueError, "scale must be one of none, std, got 'batch'"),
    ({"eps": 0.0}, ValueError, "eps must be finite and > 0, got 0.0"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:30])
def test_bad_arguments_raise(change, error, message):
    with pytest.raises(error, match=message):
        group_center(**{"scores": X, "group": GROUP, **change})
    assert group_center(X[:0], GROUP[:0]).shape == (0,)


@pytest.mark.parametrize("baseline, scale", OPTIONS)
def test_a_group_of_one_keeps_its_score(baseline, scale):
    alone = torch.tensor([3, 6])
    scores = sample()
    ours = group_center(scores, GROUP, baseline=baseline, scale=scale)
    assert torch.equal(ours[alone], scores[alone])


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_leave_one_out_is_centring_times_n_over_n_minus_one_without_cancellation(mean):
    group = torch.arange(12) % 3
    spread = torch.randn(12, dtype=torch.float64)
    scores = (mean + spread).float()
    ours = group_center(scores, group, baseline="loo")
    torch.testing.assert_close(ours, 4 / 3 * group_center(scores, group), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        ours.double(), by_hand(scores, group, "loo", "none"), rtol=1e-6, atol=0
    )


def test_equal_scores_of_a_group_earn_nothing():
    ours = group_center(torch.full((8,), 0.1), torch.arange(8) % 2, scale="std")
    assert ours.abs().max() < 1e-6


@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_scores_of_a_group_sum_to_zero(baseline):
    ours = group_center(sample(), GROUP, baseline=baseline, scale="std")
    for g in (7, -3):
        assert ours[GROUP.eq(g)].sum().abs() < 1e-12


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_other_groups_never_matter(poison):
    scores = sample()
    bad = scores.masked_fill(GROUP == 7, poison)
    kept = GROUP != 7
    for baseline, scale in OPTIONS:
        options = {"baseline": baseline, "scale": scale}
        alone = group_center(scores[kept], GROUP[kept], **options)
        assert torch.equal(group_center(bad, GROUP, **options)[kept], alone)


def test_equal_scores_are_centred_to_zero_exactly():
    scores, group = torch.full((7,), 0.1, dtype=torch.float64), torch.zeros(7, dtype=torch.int64)
    assert not group_center(scores, group, scale="std", eps=1e-20).any()


def test_the_result_is_never_the_input():
    scores = torch.rand(3, dtype=torch.float64)
    out = group_center(scores, torch.arange(3), baseline="none")
    assert torch.equal(out, scores) and out.data_ptr() != scores.data_ptr()


@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_eps_is_added_to_the_standard_deviation(eps):
    scores, group = torch.tensor([1.0, 3.0, 5.0]), torch.zeros(3, dtype=torch.int64)
    ours = group_center(scores, group, scale="std", eps=eps)
    torch.testing.assert_close(ours, torch.tensor([-2.0, 0.0, 2.0]) / (2.0 + eps))


def test_any_strides():
    scores, group = sample(), GROUP
    pairs = torch.stack([scores, group.double()], 1)
    for baseline, scale in OPTIONS:
        options = {"baseline": baseline, "scale": scale}
        views = pairs[:, 0], torch.stack([group, group], 1)[:, 0]
        assert torch.equal(group_center(*views, **options), group_center(scores, group, **options))
