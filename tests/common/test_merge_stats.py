from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastpg import PolicyStats, ValueStats, merge_stats, policy_loss, value_loss
from fastpg._library import _C
from fastpg.ops.common.stats import check_names


def stats_of(seed, **options):
    """Both kinds, of 100 tokens."""
    g = torch.Generator().manual_seed(seed)
    a, b, c = torch.randn(3, 100, generator=g, dtype=torch.float64)
    weight = (torch.rand(100, generator=g) > 0.3).double()
    policy = policy_loss(a, b, weight, old_logp=a + 0.3 * c, **options)[1]
    return policy, value_loss(a, b, weight)[1]


def test_policy_summary_is_what_its_names_say():
    logp = torch.tensor([0.1, -0.5, 0.4, 9.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 2.0, 9.0], dtype=torch.float64)
    weight, old = torch.tensor([0.5, 1.0, 2.0, 0.0]).double(), torch.zeros(4, dtype=torch.float64)
    loss, stats = policy_loss(logp, advantages, weight, old_logp=old, entropy=logp**2)
    r, d = logp[:3].exp(), logp[:3]
    expected = {
        "loss": loss, "clip_frac_low": 1 / 3, "clip_frac_high": 1 / 3, "clip_frac_dual": 0.0,
        "approx_kl": (r - 1 - d).mean(), "kl": -d.mean(), "ratio_mean": r.mean(),
        "ratio_min": r.min(), "ratio_max": r.max(), "ess": r.sum() ** 2 / (3 * (r**2).sum()),
        "count": 3, "entropy": (d**2).mean(),
    }  # fmt: skip
    merged = merge_stats(stats)
    assert merged == pytest.approx({k: float(v) for k, v in expected.items()})
    assert all(type(value) is float for value in merged.values())


def test_what_was_not_computed_is_absent():
    with_entropy = stats_of(0, entropy=torch.ones(100, dtype=torch.float64))[0]
    assert merge_stats(with_entropy)["entropy"] == 1.0
    assert "entropy" not in merge_stats([with_entropy, stats_of(1)[0]])
    assert "ref_kl" not in merge_stats(with_entropy)


def test_the_fields_have_names():
    policy, value = stats_of(0)
    assert len(PolicyStats.FIELDS) == policy.values.numel()
    assert len(ValueStats.FIELDS) == value.values.numel()


def test_an_extension_with_other_statistics_is_refused():
    names = list(ValueStats.FIELDS)
    module = SimpleNamespace(__name__="fastpg._C", statistics={"ValueStats": names})
    check_names(module)
    names[0], names[1] = names[1], names[0]
    with pytest.raises(ImportError, match="statistics than those of ValueStats") as raised:
        check_names(module)
    assert "Python: count, weight, loss" in str(raised.value)
    assert "C++:    weight, count, loss" in str(raised.value)


@pytest.mark.skipif(_C is None, reason="needs the extension")
def test_the_extension_names_the_statistics_of_its_ops():
    kinds = "PolicyStats", "ValueStats", "ImportanceStats", "DistillationStats"
    assert set(_C.statistics) == set(kinds)


def test_bad_arguments_raise():
    policy, value = stats_of(0)
    with pytest.raises(ValueError, match="stats is empty"):
        merge_stats([])
    with pytest.raises(TypeError, match="stats is NoneType, must be PolicyStats or"):
        merge_stats(None)
    with pytest.raises(TypeError, match="mixes PolicyStats and ValueStats"):
        merge_stats([policy, value])
    with pytest.raises(TypeError, match="stats holds Tensor"):
        merge_stats([policy.values])


def _rank(rank, file, out):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    seeds = ([0], [1, 2])[rank]
    merged = [
        merge_stats([stats_of(seed)[i] for seed in seeds], process_group=dist.group.WORLD)
        for i in (0, 1)
    ]
    torch.save(merged, f"{out}{rank}")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.start_processes(
        _rank, (tmp_path / "rendezvous", tmp_path / "merged"), 2, start_method="fork"
    )
    ranks = [torch.load(tmp_path / f"merged{rank}") for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    for i in (0, 1):
        one = merge_stats([stats_of(seed)[i] for seed in (0, 1, 2)])
        assert ranks[0][i] == pytest.approx(one, rel=1e-12)


def test_a_mean_of_0_is_reported_where_its_term_was_computed():
    """A policy that still is its reference has a KL of exactly 0 to it."""
    logp, ones = torch.tensor([-1.0, -2.0]), torch.ones(2)
    _, stats = policy_loss(logp, ones, ones, ref_logp=logp, kl_coef=0.1)
    merged = merge_stats([stats])
    assert merged["ref_kl"] == 0.0 and "entropy" not in merged
