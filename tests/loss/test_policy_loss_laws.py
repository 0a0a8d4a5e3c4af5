"""The laws of policy_loss."""

import math
from itertools import pairwise

import pytest
import torch
from accuracy import leaves
from kernels import GPU
from test_policy_loss import CASES, NAMES, by_autograd, run, sample

from fastpg import PolicyStats, merge_stats, policy_loss

OP = "policy_loss"


def test_every_layout_gives_the_same_bits(kernel):
    x = sample((40, 30))
    plain = run(x, "all")
    strided = run({k: t.t().contiguous().t() for k, t in x.items()}, "all")
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


ON_POLICY = ("ppo_dual_clip", "cispo", "sapo", "cispo_of_sequences", "ppo", "ppo_on_policy")


def test_old_logp_equal_to_logp_is_reinforce(kernel):
    x = sample((500,))
    x["old_logp"] = x["logp"].clone()
    for case in ON_POLICY:
        _, stats, grad, _ = run(x, case)
        assert torch.equal(grad, -x["weight"] * x["advantages"]), case
        ratios = merge_stats(PolicyStats(stats))
        assert ratios["ratio_min"] == ratios["ratio_max"] == ratios["ratio_mean"] == 1
        assert ratios["ess"] == 1 and ratios["clip_frac_low"] == ratios["clip_frac_high"] == 0


def test_the_loss_shares_no_memory_with_the_statistics(kernel):
    loss, stats, *_ = run(sample((3,), torch.float64), "ppo")
    before = stats.clone()
    loss += 1  # as an all-reduce would
    assert torch.equal(stats, before)


def test_cispo_keeps_the_gradient_of_clipped_tokens(kernel):
    """Ratios within [0.8, 1.28] and beyond; a loss without the detach gives 0.

    Two tokens have no advantage: they count as tokens, but are not clipped.
    """
    ratios = torch.tensor([0.5, 0.905, 1.105, 2.0, 2.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    logp = leaves(ratios.log() - 2.0)[0]
    advantages = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    loss, stats = policy_loss(
        logp, advantages, torch.ones_like(logp), old_logp=torch.full_like(logp, -2.0),
        surrogate="cispo", clip=(0.2, 0.28),
    )  # fmt: skip
    loss.backward()
    held = torch.tensor([0.8, 0.905, 1.105, 1.28, 1.28, 0.8, 1.28, 1.0], dtype=torch.float64)
    torch.testing.assert_close(logp.grad, -held * advantages)
    merged = merge_stats(stats)
    assert (merged["clip_frac_low"], merged["clip_frac_high"]) == (1 / 8, 2 / 8)


def test_dual_clip_caps_the_loss_of_negative_advantages(kernel):
    logp = leaves(torch.tensor([1.0, 2.9, 3.1, 50.0, 50.0], dtype=torch.float64).log() - 4)[0]
    advantages = torch.tensor([-2.0, -2.0, -2.0, -2.0, 2.0], dtype=torch.float64)
    for i, expected in enumerate([2.0, 5.8, 6.0, 6.0, -2.4]):
        one = [x[i : i + 1] for x in (logp, advantages, torch.ones_like(logp))]
        loss, stats = policy_loss(*one, old_logp=torch.full_like(one[0], -4.0), dual_clip=3.0)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        (grad,) = torch.autograd.grad(loss, logp)
        held = expected in (6.0, -2.4)
        merged = merge_stats(stats)
        assert merged["clip_frac_dual"] == (expected == 6.0)
        assert merged["clip_frac_high"] == (expected == -2.4) and (grad[i] == 0) == held


def padded_sample(*shape):
    x = sample(shape, torch.float64)
    x["advantages"] = x["advantages"][:, :1].expand(shape).contiguous()
    lengths = (x["weight"] != 0).sum(1, keepdim=True).clamp(min=1)
    x["weight"] = torch.where(x["weight"] != 0, 1 / lengths, 0.0)
    return x


def test_gspo_is_its_token_form_where_advantages_are_constant(kernel):
    """Against autograd through the ratio of whole sequences, one term for each."""
    x = padded_sample(40, 30)
    (logp,) = leaves(x["logp"])
    kept = x["weight"] != 0
    d = torch.where(kept, logp - x["old_logp"], 0.0)
    ratio, advantages = (d.sum(1) / kept.sum(1)).exp(), x["advantages"][:, 0]
    clipped = ratio.clamp(1 - 0.003, 1 + 0.004)
    expected = -torch.minimum(ratio * advantages, clipped * advantages).sum()
    expected.backward()
    x["ref_logp"] = x["logp"]  # no KL
    loss, stats, grad, _ = run(x, "gspo")
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, logp.grad)
    assert 0 < merge_stats(PolicyStats(stats))["clip_frac_high"] < 1


def test_sequences_are_the_same_padded_packed_and_alone(kernel):
    x = sample((7, 50))
    lengths = [0, 50, 1, 17, 16, 33, 49]
    for i, length in enumerate(lengths):
        x["weight"][i, length:] = 0
    grads = run(x, "gspo")[2]
    rows = [{k: t[i : i + 1, :n] for k, t in x.items()} for i, n in enumerate(lengths)]
    packed = {k: torch.cat([row[k][0] for row in rows]) for k in x}
    ends = [sum(lengths[:i]) for i in range(8)]
    alone = torch.cat([run(row, "gspo")[2][0] for row in rows])
    together = run(packed, "gspo", ends)[2]
    assert torch.equal(together, alone)
    assert torch.equal(together, torch.cat([g[:n] for g, n in zip(grads, lengths, strict=True)]))


def test_the_level_leaves_the_kl_alone(kernel):
    """approx_kl and the KL to the reference are of tokens, whatever the surrogate's ratio is."""
    x = sample((300,), torch.float64)
    x["advantages"].zero_()
    sequences, tokens = run(x, "gspo"), run(x, "k3")
    assert torch.equal(sequences[2], tokens[2]) and torch.equal(sequences[0], tokens[0])
    kl = slice(PolicyStats.FIELDS.index("k1"), PolicyStats.FIELDS.index("k3") + 1)
    assert torch.equal(sequences[1][kl], tokens[1][kl])


@pytest.mark.parametrize("case", ["ppo", "sapo", "cispo", "reinforce_off_policy", "gspo"])
def test_a_nan_shows(kernel, case):
    x = sample((3000,))
    x["weight"][:] = 1
    for place in 0, 1700, 2999:
        bad = x | {"old_logp": x["old_logp"].clone()}
        bad["old_logp"][place] = math.nan
        loss, stats, grad, _ = run(bad, case)
        merged = merge_stats(PolicyStats(stats))
        numbers = loss.item(), grad[place].item(), merged["ratio_min"], merged["ratio_max"]
        assert all(map(math.isnan, numbers)), numbers


def test_off_policy_reinforce_detaches_the_ratio(kernel):
    x = sample((300,), torch.float64)
    r = (x["logp"] - x["old_logp"]).exp()
    expected = -x["weight"] * r * x["advantages"]
    torch.testing.assert_close(run(x, "reinforce_off_policy")[2], expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_slots_change_no_bit(kernel, case, poison):
    x = sample((1000,))
    masked = x["weight"] == 0
    bad = {k: t if k == "weight" else t.masked_fill(masked, poison) for k, t in x.items()}
    for a, b in zip(run(x, case), run(bad, case), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_all_masked_is_zero(kernel, case):
    x = sample((100,))
    x["weight"] = torch.zeros(100)
    loss, stats, *grads = run({k: t if k == "weight" else t * math.nan for k, t in x.items()}, case)
    assert loss == 0 and all(g is None or (g == 0).all() for g in grads)
    merged = merge_stats(PolicyStats(stats))
    assert merged.pop("ratio_min") == merged.pop("ratio_max") == 1
    assert set(merged.values()) == {0.0}


@pytest.mark.parametrize("case", CASES)
def test_any_split_adds_up(kernel, case):
    x = sample((5000,), torch.float64)
    sequences = [0, 17, 17, 100, 4000, 5000]
    whole = run(x, case, sequences)
    parts = [
        run({k: t[i:j] for k, t in x.items()}, case, [s - i for s in sequences if i <= s <= j])
        for i, j in pairwise([0, 17, 17, 4000, 5000])
    ]
    grads = torch.cat([p[2] for p in parts])
    torch.testing.assert_close(grads, whole[2], rtol=1e-14, atol=0)
    assert kernel == "reference" or torch.equal(grads, whole[2])  # torch's sigmoid has two forms
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0], rtol=1e-12, atol=1e-12)
    merged = merge_stats([PolicyStats(p[1]) for p in parts])
    assert merged == pytest.approx(merge_stats(PolicyStats(whole[1])), rel=1e-11, abs=1e-13)


def test_every_block_is_merged(kernel, monkeypatch):
    """More blocks than a merge takes at a time: 256 in CUDA; in Triton's interpreter, here, 4."""
    tokens = 270_001
    if kernel == "triton" and not GPU:
        triton = pytest.importorskip("triton")
        tokens = 9_001
        few = triton.language.constexpr(4)
        monkeypatch.setattr("fastpg.ops.loss.policy_loss_triton.ROWS", few)
    x = sample((tokens,), torch.float64)
    for extreme in x["logp"] + 3, x["logp"] - 3:  # of all ratios, in the last block
        x["old_logp"][-1], x["weight"][-1] = extreme[-1], 1e-5
        ours, expected = run(x, "all"), by_autograd(x, "all")
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_ticket_serves_launch_after_launch(kernel, monkeypatch):
    if kernel not in ("cuda", "cuda-on-cpu"):
        pytest.skip("for the reduction in CUDA C++")
    ticket = torch.zeros((), dtype=torch.int32)  # on a GPU, each stream has one
    monkeypatch.setattr("fastpg._library._ticket", lambda device: ticket)
    for shape in (5000,), (5000,), (3000,), (7,), (5000,):
        x = sample(shape, torch.float64)
        stats, expected = run(x, "all")[1], by_autograd(x, "all")[1]
        torch.testing.assert_close(stats, expected, rtol=1e-11, atol=1e-12)
        assert ticket == 0


def test_the_order_in_which_blocks_run_changes_no_bit(kernel):
    if kernel not in ("cuda", "cuda-on-cpu"):
        pytest.skip("for the reduction in CUDA C++")
    x = sample((20_001,))
    first = run(x, "all")
    for _ in range(2):  # On the CPU every launch shuffles its blocks anew.
        assert all(torch.equal(a, b) for a, b in zip(first, run(x, "all"), strict=True))


def test_no_tokens_make_a_loss_of_0_and_say_what_was_computed(kernel):
    _, stats, *_ = run(sample((0,)), "all")
    fields = dict(zip(PolicyStats.FIELDS, stats.tolist(), strict=True))
    assert fields.pop("ratio_min") == math.inf and fields.pop("ratio_max") == -math.inf
    assert fields.pop("has_ref_kl") == fields.pop("has_entropy") == 1
    assert set(fields.values()) == {0.0}
    _, stats, *_ = run(sample((0,)), "ppo")
    assert stats[PolicyStats.FIELDS.index("has_ref_kl")] == 0


def test_the_gradient_of_the_entropy_has_the_factor_of_the_loss(kernel):
    x = sample((50,), torch.float64)
    logp, entropy = leaves(x["logp"], x["entropy"])
    loss, _ = policy_loss(logp, x["advantages"], x["weight"], entropy=entropy, entropy_coef=0.5)
    grads = torch.autograd.grad(-3 * loss, (logp, entropy), retain_graph=True)
    again = torch.autograd.grad(7 * loss, (logp, entropy))
    for factor, (by_logp, by_entropy) in ((-3, grads), (7, again)):
        torch.testing.assert_close(by_logp, -factor * x["weight"] * x["advantages"])
        torch.testing.assert_close(by_entropy, -factor * 0.5 * x["weight"])


def test_threads_change_no_bit(kernel):
    if kernel in ("reference", "cuda", "cuda-on-cpu", "triton"):
        pytest.skip("for the threads of a CPU")
    x, threads = sample((400, 251)), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append([*run(x, "all"), *run(x, "gspo")[:3]])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("case", ["all", "gspo"])
def test_cuda_graph(kernel, case):
    """Nothing synchronises, and replays read the inputs anew."""
    if kernel != "cuda":
        pytest.skip("for a GPU")
    x, other = sample((3, 5000)), sample((3, 5000))
    run(x, case)  # allocates what lasts
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x, case)
    for name, tensor in x.items():
        tensor.copy_(other[name])
    for _ in range(2):
        graph.replay()
        for got, want in zip(captured, run(other, case), strict=True):
            assert got is want is None or torch.equal(got, want)


@pytest.mark.parametrize("case", CASES)
def test_extreme_log_ratios_are_finite(kernel, case):
    x = sample((4,))
    x["logp"] = torch.tensor([-1000.0, -0.5, -1000.0, -0.5])
    x["old_logp"] = x["ref_logp"] = torch.tensor([-0.5, -1000.0, -0.5, -1000.0])
    x["advantages"], x["weight"] = torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.ones(4)
    loss, stats, grad, _ = run(x, case)
    assert loss.isfinite() and stats.isfinite().all() and grad.isfinite().all()
    if "kl_coef" not in CASES[case][0]:
        assert (grad[2:] == 0).all()  # A = 0


@pytest.mark.parametrize("kl", ["k2", "k3", "k3_naive"])
def test_kl_gradient_by_enumeration(kernel, kl):
    theta, phi = torch.randn(2, 5, dtype=torch.float64)
    ref, old = phi.log_softmax(0), torch.randn(5, dtype=torch.float64).log_softmax(0)
    # k3 is exact off policy too; k2 and k3_naive are defined on policy.
    sampled = old if kl == "k3" else theta.log_softmax(0)

    def gradient(loss_of):
        t = theta.clone().requires_grad_()
        return torch.autograd.grad(loss_of(t.log_softmax(0)), t)[0]

    ours = gradient(lambda logp: policy_loss(
        logp, torch.zeros_like(logp), sampled.exp(), ref_logp=ref, kl_coef=1.0, kl=kl,
        old_logp=sampled if kl == "k3" else None,
    )[0])  # fmt: skip
    reverse = gradient(lambda logp: (logp.exp() * (logp - ref)).sum())
    forward = gradient(lambda logp: (ref.exp() * (ref - logp)).sum())
    torch.testing.assert_close(ours, forward if kl == "k3_naive" else reverse)


@pytest.mark.parametrize("kl", ["k2", "k3", "k3_naive"])
def test_a_kl_of_coefficient_0_is_only_counted(kernel, kl):
    x = sample((500,))
    (logp,) = leaves(x["logp"])

    def of(**options):
        loss, stats = policy_loss(
            logp, x["advantages"], x["weight"], old_logp=x["old_logp"], kl=kl, **options
        )
        return loss, torch.autograd.grad(loss, logp)[0], merge_stats(stats)

    plain, counted, penalised = (
        of(), of(ref_logp=x["ref_logp"]), of(ref_logp=x["ref_logp"], kl_coef=0.1)
    )  # fmt: skip
    assert torch.equal(counted[0], plain[0]) and torch.equal(counted[1], plain[1])
    assert counted[2]["ref_kl"] == penalised[2]["ref_kl"] != 0


def test_approx_kl_keeps_its_digits_near_the_old_policy(kernel):
    logp = torch.full((1000,), -0.5)
    old = logp + torch.linspace(-1e-3, 1e-3, 1000)
    stats = policy_loss(logp, logp, torch.ones(1000), old_logp=old)[1]
    d = logp.double() - old.double()
    expected = (torch.expm1(d) - d).mean().item()
    # The reference subtracts d from expm1(d): 1e-7 d against d² / 2.
    rel = 1e-3 if kernel == "reference" else 1e-6
    assert merge_stats(stats)["approx_kl"] == pytest.approx(expected, rel=rel)


def test_double_backward_raises_and_single_repeats():
    x = sample((20,))
    (logp,) = leaves(x["logp"])
    loss = policy_loss(logp, x["advantages"], x["weight"])[0]
    once = torch.autograd.grad(loss, logp, retain_graph=True)[0]
    assert torch.equal(once, torch.autograd.grad(loss, logp, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="policy_loss: its gradient is not differentiable"):
        torch.autograd.grad(loss, logp, create_graph=True)
    with torch.inference_mode():
        weight = x["weight"].clone()
    assert policy_loss(logp, x["advantages"], weight)[0] == loss
    with torch.inference_mode(), torch.autocast("cpu"):
        assert policy_loss(**{k: x[k] for k in NAMES[:3]})[0] == loss
