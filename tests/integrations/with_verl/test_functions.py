"""verl's functions and ours on the same batches: values, gradients and metrics.

What verl computes in fp64 is the oracle of what we compute in fp32.
"""

import math

import pytest
import torch
import verl.trainer.distillation.fsdp.losses as distillation
import verl.trainer.ppo.core_algos as core
import verl.utils.torch_functional as verl_logits
from accuracy import assert_no_worse
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config import ActorConfig

from fastpg.integrations import verl_functions as ours

B, T = 6, 40
LENGTHS = torch.tensor([40, 31, 17, 1, 5, 0])
PADDED = torch.arange(T) < LENGTHS[:, None]
MODES = list(ours.REDUCTIONS)
GLOBAL = {"dp_size": 2, "batch_num_tokens": 200, "global_batch_size": 16}
LOSSES = {loss.__name__.removeprefix("fastpg_"): loss for loss in ours.POLICY_LOSSES}
LOSSES["vanilla"] = LOSSES.pop("fastpg")


def with_holes():
    """Right-padded sequences, 30 % of whose tokens an environment has written."""
    return PADDED & (torch.rand(B, T) > 0.3)


def config(**batch):
    made = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_high=0.28)
    made.global_batch_info.update(batch)
    return made


def relative(result, oracle):
    return ((result.double() - oracle.double()).abs().max() / oracle.abs().max()).item()


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("is_global", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_policy_loss_its_gradient_and_its_metrics(name, mode, is_global, spread):
    settings = config(**GLOBAL if is_global else {})
    mask, advantages = with_holes(), torch.randn(B, T)
    old = -3 * torch.rand(B, T)
    logp = old + spread * torch.randn(B, T)
    factors = 2 * torch.rand(B, T) if is_global else None

    def run(loss, dtype):
        leaf = logp.to(dtype, copy=True).requires_grad_()
        weights = None if factors is None else factors.to(dtype)
        arguments = old.to(dtype), leaf, advantages.to(dtype), mask, mode, settings, weights
        value, metrics = loss(*arguments)
        return value, *torch.autograd.grad(value, leaf), metrics

    value, grad, metrics = run(LOSSES[name], torch.float32)
    oracle, oracle_grad, oracle_metrics = run(core.get_policy_loss_fn(name), torch.float64)
    # A sum may cancel: its error is one of its terms.
    assert abs(value - oracle) <= 2e-5 * max(abs(oracle), 0.1)
    assert relative(grad, oracle_grad) <= 2e-5
    assert metrics == pytest.approx(oracle_metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_factor_of_0_takes_its_token_out_of_the_loss_alone(name):
    mask, old, logp, advantages = with_holes(), *-torch.rand(3, B, T)
    factors = (torch.rand(B, T) > 0.5).float()
    arguments = old, logp, advantages, mask, "token-mean", config(), factors
    value, metrics = LOSSES[name](*arguments)
    oracle, oracle_metrics = core.get_policy_loss_fn(name)(*arguments)
    assert value.item() == pytest.approx(oracle.item(), rel=1e-5)
    for key in {"actor/ppo_kl", "actor/pg_clipfrac_lower"} & set(metrics):
        assert metrics[key] == pytest.approx(oracle_metrics[key], rel=1e-5, abs=1e-7)


def test_an_unknown_aggregation_and_a_missing_global_count_raise():
    mask = PADDED.float()
    with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean"):
        ours.aggregation_weights(mask, "mean")
    with pytest.raises(ValueError, match="batch_num_tokens is required"):
        ours.aggregation_weights(mask, "token-mean", dp_size=2)
    with pytest.raises(ValueError, match="global_batch_size is required"):
        ours.aggregation_weights(mask, "seq-mean-token-sum", dp_size=2)


@pytest.mark.parametrize("count", [torch.tensor(200), torch.tensor([200.0])])
def test_a_global_count_may_be_a_tensor(count):
    weight = ours.aggregation_weights(PADDED, "token-mean", 2, count)
    assert torch.equal(weight, torch.where(PADDED, 2 / 200, 0.0))


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0)])
@pytest.mark.parametrize("holes", [False, True], ids=["right-padded", "holes"])
def test_whitened_advantages_and_returns(holes, gamma, lam):
    mask = with_holes() if holes else PADDED
    rewards, values = torch.randn(2, B, T)
    advantages, returns = ours.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    wide = rewards.double(), values.double(), mask.double()
    oracle = core.compute_gae_advantage_return(*wide, gamma, lam)
    assert relative(advantages[mask], oracle[0][mask]) <= 2e-6
    assert relative(returns[mask], oracle[1][mask]) <= 2e-6
    assert advantages[~mask].eq(0).all() and returns[~mask].eq(0).all()


def test_what_is_in_the_padding_does_not_matter_and_one_token_is_enough():
    rewards, values = torch.randn(2, B, T)
    clean = ours.compute_gae_advantage_return(rewards, values, PADDED, 1.0, 0.95)
    rewards[~PADDED], values[~PADDED] = math.nan, math.inf
    spoilt = ours.compute_gae_advantage_return(rewards, values, PADDED, 1.0, 0.95)
    assert all(torch.equal(a, b) for a, b in zip(clean, spoilt, strict=True))
    single = torch.zeros(B, T, dtype=torch.bool)
    single[0, 0] = True
    advantages, returns = ours.compute_gae_advantage_return(rewards, values, single, 1.0, 0.95)
    assert not advantages.any() and returns[0, 0] == rewards[0, 0]
    with pytest.raises(ValueError, match="sum of the mask is one"):
        core.compute_gae_advantage_return(rewards, values, single.float(), 1.0, 0.95)


@pytest.mark.parametrize("batch", [{}, GLOBAL | {"loss_scale_factor": 64}], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
def test_the_value_loss_and_its_clipped_fraction(mode, batch):
    mask, (new, returns, old) = with_holes(), torch.randn(3, B, T)

    def run(loss, dtype):
        leaf = new.to(dtype, copy=True).requires_grad_()
        value, fraction = loss(leaf, returns.to(dtype), old.to(dtype), mask, 0.2, mode, **batch)
        return value, *torch.autograd.grad(value, leaf), fraction

    value, grad, fraction = run(ours.compute_value_loss, torch.float32)
    oracle, oracle_grad, oracle_fraction = run(core.compute_value_loss, torch.float64)
    assert relative(value, oracle) <= 2e-6 and relative(grad, oracle_grad) <= 2e-6
    assert fraction.item() == pytest.approx(oracle_fraction.item())


def scores(logits, labels, logprobs, entropy):
    """Log-probs, entropies and the gradient of a sum of both."""
    leaf = logits.clone().requires_grad_()
    logp, h = logprobs(leaf * 1, labels), entropy(leaf)
    upstream = torch.linspace(-1, 1, labels.numel(), dtype=torch.float64).view(labels.shape)
    (grad,) = torch.autograd.grad((logp * upstream).sum() + (h * upstream.flip(0)).sum(), leaf)
    return logp.detach(), h.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_and_entropies_are_no_worse_than_those_of_verl(dtype):
    logits = (2 * torch.randn(24, 3000)).to(dtype)
    labels = torch.randint(3000, (24,))
    stock = verl_logits.logprobs_from_logits, verl_logits.entropy_from_logits
    mine = scores(logits, labels, ours.logprobs_from_logits, ours.entropy_from_logits)
    theirs = scores(logits, labels, *stock)
    oracle = scores(logits.double(), labels, *stock)
    assert mine[0].dtype == mine[1].dtype == torch.float32
    for result, yardstick, exact in zip(mine, theirs, oracle, strict=True):
        assert_no_worse(result, yardstick, exact, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_squared_probabilities_are_no_worse_than_those_of_verl(dtype):
    logits = (3 * torch.randn(24, 3000)).to(dtype)
    stock = verl_logits.calculate_sum_pi_squared_from_logits
    mine = ours.calculate_sum_pi_squared_from_logits(logits)
    assert_no_worse(mine, stock(logits), stock(logits.double()), 2e-6)


def test_entropies_in_chunks_and_of_a_masked_token():
    logits = torch.randn(7, 50)
    logits[:, 3] = -math.inf
    chunked = ours.entropy_from_logits(logits, chunk_size=2)
    finite = torch.cat([logits[:, :3], logits[:, 4:]], dim=1)
    oracle = verl_logits.entropy_from_logits(finite.double())
    assert relative(chunked, oracle) <= 2e-6
    assert verl_logits.entropy_from_logits_with_chunking(logits, chunk_size=2).isnan().all()


def test_the_gradient_goes_over_the_logits_where_nobody_else_wants_them():
    hidden, labels = torch.randn(5, 8, requires_grad=True), torch.arange(5)
    logits = hidden @ torch.randn(8, 30)
    ours.logprobs_from_logits(logits, labels).sum().backward()
    assert logits.sum(-1).abs().max() < 1e-5  # a gradient sums to 0 over the vocabulary
    leaf = torch.randn(5, 30, requires_grad=True)
    before = leaf.detach().clone()
    ours.logprobs_from_logits(leaf, labels).sum().backward()
    ours.logprobs_from_logits(leaf.view(5, 30), labels).sum().backward()
    ours.logprobs_from_logits((leaf * 1)[:, ::2], labels).sum().backward()
    assert torch.equal(leaf.detach(), before)


def head(hidden, weight, labels, call):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    logp, entropy = call(*leaves, labels)
    upstream = torch.linspace(-1, 1, labels.numel(), dtype=torch.float64).view(logp.shape)
    total = (logp * upstream).sum() + (entropy * upstream.flip(0)).sum()
    return logp.detach(), entropy.detach(), *torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("shape", [(24,), (3, 8)], ids=["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_head_is_no_worse_than_that_of_verl(dtype, shape):
    hidden, weight = torch.randn(*shape, 32).to(dtype), (0.3 * torch.randn(900, 32)).to(dtype)
    labels = torch.randint(900, shape)

    def stock(h, w, y):
        return FusedLinearForPPO()(h, w, y, temperature=0.7)

    def exact(h, w, y):
        logp = (h @ w.T / 0.7).log_softmax(-1)
        return logp.gather(-1, y[..., None])[..., 0], -(logp.exp() * logp).sum(-1)

    forward = ours.fused_linear(torch.float32)
    mine = head(hidden, weight, labels, lambda h, w, y: forward(None, h, w, y, temperature=0.7))
    theirs = head(hidden, weight, labels, stock)
    oracle = head(hidden.double(), weight.double(), labels, exact)
    for result, yardstick, truth in zip(mine, theirs, oracle, strict=True):
        assert_no_worse(result, yardstick, truth, 2e-6)


def test_the_gradient_stops_where_that_of_verl_stops():
    new = torch.tensor([[25.0, -25.0, 0.1]], requires_grad=True)
    mask = torch.ones(1, 3)
    arguments = torch.zeros(1, 3), new, torch.tensor([[-1.0, 1.0, 1.0]]), mask
    for name, loss in LOSSES.items():
        for mode in MODES:
            (grad,) = torch.autograd.grad(loss(*arguments, mode, config())[0], new)
            stock = core.get_policy_loss_fn(name)(*arguments, mode, config())[0]
            torch.testing.assert_close(grad, torch.autograd.grad(stock, new)[0])


def test_the_log_probs_of_a_teachers_top_k():
    logits, ids = 3 * torch.randn(2, 9, 40), torch.randint(40, (2, 9, 5))

    def run(logprobs, dtype):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        logp = logprobs(leaf, ids)
        return logp, *torch.autograd.grad(logp, leaf, torch.linspace(-1, 1, 90).view(logp.shape))

    mine = run(ours.chunked_topk_log_probs, torch.float32)
    stock = run(distillation._chunked_topk_log_probs, torch.float32)
    exact = run(lambda leaf, ids: leaf.log_softmax(-1).gather(-1, ids), torch.float64)
    for result, yardstick, oracle in zip(mine, stock, exact, strict=True):
        assert_no_worse(result, yardstick, oracle, 2e-6)
    assert ours.chunked_topk_log_probs(logits[:, :0].bfloat16(), ids[:, :0]).shape == (2, 0, 5)
