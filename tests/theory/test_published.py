"""Numbers that other projects publish in their tests, computed by our calls.

Each test names the project, the file and the tests its numbers come from; rlax's vectors of GAE and
V-trace are in test_gae_laws.py. Tolerances are those of the sources, which printed four to seven
digits.
"""

import pytest
import torch

from fastpg import (
    AdaptiveKL,
    gae,
    group_center,
    importance_weights,
    kl_estimate,
    policy_loss,
    token_logprobs,
    token_rewards,
    token_weights,
    value_loss,
    whiten,
)

# rlax/_src/multistep_test.py: the inputs of most of its tests; V_T is read as the bootstrap.
R = torch.tensor([[1.0, 0.0, -1.0, 0.0, 1.0], [0.5, 0.8, -0.7, 0.0, 2.1]])
DISCOUNTS = torch.tensor([[0.5, 0.9, 1.0, 0.5, 0.8], [0.9, 0.5, 0.3, 0.8, 0.7]])
NEXT_V = torch.tensor([[3.0, 1.0, 5.0, -5.0, 3.0], [-1.7, 1.2, 2.3, 2.2, 2.7]])


def near(ours, published, **tolerance):
    published = torch.as_tensor(published, dtype=ours.dtype)
    torch.testing.assert_close(ours, published, **(tolerance or {"rtol": 1e-4, "atol": 1e-4}))


def shifted(next_values):
    """Values whose followers are next_values; the first one is read by nothing tested here."""
    return torch.cat([torch.zeros_like(next_values[..., :1]), next_values[..., :-1]], -1)


def test_rlax_lambda_returns():
    """LambdaReturnsTest: a lambda-return is what gae returns beside the advantage."""
    _, returns = gae(R, shifted(NEXT_V), gamma=DISCOUNTS, lam=0.75, bootstrap=NEXT_V[:, -1])
    near(returns, [[1.6460547, 0.72281253, 0.7375001, 0.6500001, 3.4],
                   [0.7866317, 0.9913063, 0.1101501, 2.834, 3.99]], rtol=1e-5, atol=0)  # fmt: skip


def test_rlax_discounted_returns():
    """DiscountedReturnsTest, and NStepBootstrappedReturnsTest where n reaches the end."""
    returns, _ = gae(R, gamma=DISCOUNTS, bootstrap=NEXT_V[:, -1])
    near(returns, [[1.315, 0.63, 0.7, 1.7, 3.4], [1.33592, 0.9288, 0.2576, 3.192, 3.99]],
         rtol=1e-5, atol=0)  # fmt: skip


LOGITS = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])
WEIGHT = torch.tensor([-2.0, 2.0, 0.0])
ADVANTAGES = torch.tensor([0.3, 0.2, 0.1])


def test_rlax_policy_gradient_loss():
    """rlax/_src/policy_gradients_test.py, PolicyGradientLossTest: weights may be negative."""
    cases = [
        (LOGITS, [0, 1, 2], ADVANTAGES, WEIGHT, 0.0788835088),
        (LOGITS + 1, [0, 0, 0], -ADVANTAGES, WEIGHT - 1, 0.327200909),
    ]
    for logits, actions, advantages, weight, published in cases:
        logp = token_logprobs(logits, torch.tensor(actions))
        loss, _ = policy_loss(logp, advantages, weight / 3, surrogate="reinforce")
        near(loss, published)


def test_rlax_entropy_loss():
    """EntropyLossTest: our bonus with an advantage of 0."""
    for logits, weight, published in (
        (LOGITS, WEIGHT, 0.288693),
        (LOGITS + 1, WEIGHT - 1, 1.15422),
    ):
        logp, entropy = token_logprobs(logits, torch.zeros(3).long(), return_entropy=True)
        zero = torch.zeros(3)
        loss, _ = policy_loss(logp, zero, weight / 3, entropy=entropy, entropy_coef=1.0)
        near(loss, published)


def test_rlax_clipped_surrogate():
    """ClippedSurrogatePGLossTest, both signs of the advantage."""
    old_logits = torch.cat([LOGITS[:2], LOGITS[2:].flip(1)])
    actions = torch.arange(3)
    logp, old = token_logprobs(LOGITS, actions), token_logprobs(old_logits, actions)
    for sign, published in ((1, -0.17117467), (-1, 0.19333333)):
        near(policy_loss(logp, sign * ADVANTAGES, torch.ones(3) / 3, old_logp=old)[0], published)


def test_tianshou_episodic_returns():
    """tianshou test/base/test_returns.py, test_episodic_returns: episodes along one row."""
    cases = [
        ([1, 0, 0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1.23, 2.3, 3, 4.5, 5, 6.7, 7]),
        ([0, 1, 0, 1, 0, 1, 0], [7, 6, 1, 2, 3, 4, 5], [7.6, 6, 1.2, 2, 3.4, 4, 5]),
        ([0, 1, 0, 1, 0, 0, 1], [7, 6, 1, 2, 3, 4, 5], [7.6, 6, 1.2, 2, 3.45, 4.5, 5]),
    ]
    for done, rewards, published in cases:
        done, rewards = torch.tensor([done]), torch.tensor([rewards], dtype=torch.float32)
        near(gae(rewards, gamma=0.1, terminated=done)[0], [published])


def test_tianshou_gae_with_termination_and_truncation():
    """The two cases with values: a truncated step reads the value that follows it."""
    rewards = [101, 102, 103, 200, 104, 105, 106, 201, 107, 108, 109, 202]
    next_values = [2, 3, 4, -1, 5, 6, 7, -2, 8, 9, 10, -3]
    rewards, next_values = torch.tensor([rewards, next_values], dtype=torch.float32)[:, None]
    ends, last = torch.arange(12)[None] % 4 == 3, torch.arange(12)[None] == 11
    options = {"gamma": 0.99, "lam": 0.95, "bootstrap": next_values}
    first, second = [454.8344, 376.1143, 291.298, 200], [464.5610, 383.1085, 295.387, 201]
    third = [474.2876, 390.1027, 299.476, 202]
    none = torch.zeros_like(ends)
    _, returns = gae(rewards, shifted(next_values), terminated=ends, truncated=none, **options)
    near(returns, [first + second + third], rtol=1e-5, atol=1e-3)
    first, second = [454.0109, 375.2386, 290.3669, 199.01], [462.9138, 381.3571, 293.5248, 199.02]
    _, returns = gae(
        rewards, shifted(next_values), terminated=last, truncated=ends & ~last, **options
    )
    near(returns, [first + second + third], rtol=1e-5, atol=1e-3)


def test_skyrl_gae():
    """SkyRL tests/backends/skyrl_train/utils/test_ppo_utils.py, test_compute_gae_advantage_return,
    its _gamma and _lam, and test_compute_reinforce_plus_plus_outcome_advantage_gamma.
    """
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    near(gae(rewards, values)[1], [[6, 5, 3]])
    near(gae(rewards, values, gamma=0.5)[1], [[2.75, 3.5, 3]])
    near(gae(rewards, values, lam=0.5)[1], [[3.625, 4.25, 3]])
    near(gae(rewards, gamma=0.5)[1], [[2.75, 3.5, 3]])


def test_skyrl_group_advantages():
    """test_compute_rloo_outcome_advantage_basic, test_compute_grpo_outcome_advantage_norm_std_false

    RLOO has a group of one there, which is left out: SkyRL gives it 0, we leave its score.
    """
    group = torch.tensor([0, 0, 1, 1])
    near(group_center(torch.tensor([6.0, 3, 9, 12]), group, baseline="loo"), [3, -3, -3, 3])
    near(group_center(torch.tensor([6.0, 3, 9, 12]), group), [1.5, -1.5, -1.5, 1.5])


def test_skyrl_adaptive_kl():
    """test_adaptive_kl_controller_update"""
    near(torch.tensor(AdaptiveKL(0.2, 0.1, 100).update(0.2, 10)), 0.2 * 1.02)


def test_skyrl_loss_reductions():
    """TestApplyLossReductionToAdvantagesMinibatch: token_mean, sequence_mean and
    seq_mean_token_sum_norm, whose constant 10 goes into denom.
    """
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    near((token_weights(torch.tensor([[1, 1, 0], [1, 1, 1]])) * x).sum(), 3.6)
    mask, x = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.0, 2], [3, 4]])
    near((token_weights(mask, reduce="sequence") * x).sum(), 2.25)
    x = torch.tensor([[2.0, 3], [9, 12]])
    near((token_weights(mask, reduce="sequence_sum", denom=2 * 10) * x).sum(), 0.7)


def test_skyrl_importance_weights():
    """SkyRL tests/train/algorithms/test_off_policy_correction.py: test_compute_tis_ratio at
    _token_level, _sequence_level, with _cap and _mask, and test_compute_sequence_mask_geometric.
    """
    logp, behavior = torch.tensor([[-1.0, -1.5, -0.5]]), torch.tensor([[-1.5, -1.0, -1.5]])
    every, one = torch.ones(1, 3), torch.tensor([[1, 0, 1]])
    shift = every / 2
    near(importance_weights(logp, behavior, every, high=2.0)[0], [[1.6487, 0.6065, 2.0]])
    sequence = {"level": "sequence", "high": 5.0}
    near(importance_weights(logp, behavior, every, **sequence)[0], [[2.7183] * 3])
    near(importance_weights(-every, -2 * every, every, **sequence)[0], [[5.0] * 3])
    near(importance_weights(logp, behavior, one, **sequence)[0], [[4.4817, 0, 4.4817]])
    bounds = {"level": "geometric", "low": 0.9, "high": 1.1, "outside": "zero"}
    kept = torch.tensor([[-1.0, -1.1, -1.0]]), torch.tensor([[-1.1, -1.0, -1.0]])
    near(importance_weights(*kept, every, **bounds)[0], [[1.0] * 3])
    near(importance_weights(-every, -every - shift, every, **bounds)[0], [[0.0] * 3])


OLD = torch.tensor([-1.0, -1.0, -3.0])
LOGP = torch.tensor([-1.69315, -1.0, -0.69741])  # ratios 0.5, 1, 10


def test_skyrl_and_nemo_dual_clip():
    """SkyRL tests/train/algorithms/test_losses.py and NeMo RL tests/unit/algorithms/
    test_loss_functions.py, test_policy_loss_dual_clip and test_clipped_pg_loss_dual_clip.
    """
    advantages, every = torch.tensor([1.0, -1.0, -4.0]), torch.ones(3)
    loss, _ = policy_loss(LOGP, advantages, every, old_logp=OLD, dual_clip=3.0)
    near(loss, 12.5, rtol=1e-4, atol=0)
    near(policy_loss(LOGP, advantages, every, old_logp=OLD)[0], 40.5, rtol=1e-4, atol=0)


def test_skyrl_cispo():
    """test_policy_loss_cispo"""
    advantages = torch.tensor([1.0, -1.0, -4.0])
    loss, _ = policy_loss(LOGP, advantages, torch.ones(3), old_logp=OLD, surrogate="cispo")
    near(loss, -2.9930)


def test_nemo_policy_losses():
    """NeMo RL, test_clipped_pg_loss_ppo_clipping, _reinforce_mode and _gspo."""
    advantages, third = torch.tensor([[1.0, -1.0, 2.0]]), torch.full((1, 3), 1 / 3)
    logp, old = torch.tensor([[-1.69315, -1.0, -0.59453]]), -torch.ones(1, 3)  # ratios 0.5, 1, 1.5
    near(policy_loss(logp, advantages, third, old_logp=old)[0], -0.6333)
    near(policy_loss(logp, advantages, third, old_logp=old, level="sequence")[0], -0.6057)
    logp = torch.tensor([[-0.5, -1.0, -1.5]])
    near(policy_loss(logp, advantages, third, surrogate="reinforce")[0], 0.8333)


def test_nemo_icepop():
    """test_clipped_pg_loss_icepop_importance_sampling: weights 0.6065, 12.182 (dropped), 0.8187."""
    logp, behavior = -torch.ones(1, 3), torch.tensor([[-0.5, -3.5, -0.8]])
    bounds = {"low": 0.5, "high": 5.0, "outside": "zero"}
    weight, _ = importance_weights(logp, behavior, torch.ones(1, 3), **bounds)
    near(weight, [[0.6065, 0, 0.8187]])


def test_nemo_gae():
    """NeMo RL tests/unit/algorithms/test_ppo.py, test_gae_gamma_lambda_zero and
    test_gae_carry_forward_interior_gap, whose masked value of 999 must not show.
    """
    rewards = token_rewards(torch.tensor([5.0]), torch.ones(1, 3))
    near(gae(rewards, torch.tensor([[1.0, 2.0, 3.0]]), lam=0.0)[0], [[1, 1, 2]])
    mask, score = torch.tensor([[1, 1, 0, 1, 1]]), torch.ones(1)
    gap, none = torch.tensor([[0.1, 0.2, 999.0, 0.4, 0.5]]), torch.tensor([[0.1, 0.2, 0.4, 0.5]])
    options = {"gamma": 0.99, "lam": 0.95}
    ours, _ = gae(token_rewards(score, mask), gap, mask, **options)
    short, _ = gae(token_rewards(score, torch.ones(1, 4)), none, **options)
    assert torch.equal(ours[mask.bool()], short[0]) and ours[0, 2] == 0


def test_verl_multi_turn_gae():
    """verl tests/trainer/ppo/test_core_algos_on_cpu.py, test_multi_turn_compute_gae*

    Values at observation tokens are drawn at random, and must not show.
    """
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0]])
    rewards = torch.tensor([[0, 0, 0.1, 0.1, 0.1, 0, 0, 0.1, 1.0, 0, 0]])
    values = torch.tensor([[0.0, 0, 4, 5, 6, 0, 0, 7, 9, 0, 0]])
    seen = []
    for noise in torch.empty(2, 1, 11).uniform_(-100, 100):
        out = gae(rewards, torch.where(mask == 1, values, noise), mask, gamma=0.7, lam=0.6)
        seen.append([whiten(out[0], mask), *out])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_torchtune_rewards():
    """torchtune tests/torchtune/rlhf/test_rewards.py, test_get_rewards_ppo"""
    logp = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.6, 0.7, 0.8]])
    ref = torch.tensor([[0.2, 0.3, 0.4], [0.6, 0.7, 0.8], [0.9, 1.0, 1.1]])
    kl = kl_estimate(logp, ref)
    near(kl, [[-0.1] * 3, [-0.2] * 3, [-0.3] * 3])
    rewards = token_rewards(torch.tensor([1.0, 2, 3]), torch.ones(3, 3), kl=kl, kl_coef=0.5)
    near(rewards, [[0.05, 0.05, 1.05], [0.1, 0.1, 2.1], [0.15, 0.15, 3.15]])


def test_torchtune_returns():
    """test_estimate_returns: 1 at the end, discounted by γ and then γλ."""
    one = torch.tensor([[0.0, 0, 0, 1]])
    _, returns = gae(one, one, gamma=0.9, lam=0.95)
    near(returns, [[0.9**3 * 0.95**2, 0.9**2 * 0.95, 0.9, 1]])


def test_torchtune_clipped_ratio():
    """tests/torchtune/rlhf/loss/test_ppo_loss.py, test_policy_loss_clipped_for_high_logprobs"""
    old, one = torch.tensor([0.5, 0.8, 1.2]), torch.ones(3)
    near(policy_loss(old + 1, one, one / 3, old_logp=old)[0], -1.2)


def test_trl_masked_whiten():
    """TRL tests/experimental/test_ppo_trainer.py, TestCore.test_masked_whiten"""
    ours = whiten(torch.tensor([1.0, 2, 3, 4]), torch.tensor([0, 1, 1, 0]))
    near(ours, [0, -(0.5**0.5), 0.5**0.5, 0], rtol=1e-5, atol=1e-5)


def test_nemo_value_loss_of_a_perfect_prediction():
    """NeMo RL tests/unit/algorithms/test_ppo.py, test_mse_value_loss_perfect_prediction"""
    returns = torch.randn(2, 4)
    assert value_loss(returns, returns, torch.ones(2, 4))[0] == 0


@pytest.mark.filterwarnings("ignore")  # of torchrl and tensordict, when they are imported
@pytest.mark.parametrize("lam", [0.5, 0.99])
def test_torchrl_loop_and_vectorised_gae(lam):
    """torchrl.objectives.value.functional, on inputs like its test/objectives/test_values.py,
    test_gae: terminated and truncated anywhere, a next value of its own after each end.
    """
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    rewards, values, after = torch.randn(3, 7, 200, dtype=torch.float64)
    terminated, truncated = torch.rand(2, 7, 200) < 0.1
    terminated, truncated[:, -1] = terminated & ~truncated, True
    terminated[:, -1] = False
    done = terminated | truncated
    following = torch.where(done, after, values.roll(-1, 1))
    ours = gae(
        rewards, values, gamma=0.99, lam=lam, terminated=terminated, truncated=truncated,
        bootstrap=after,
    )  # fmt: skip
    columns = [x[..., None] for x in (values, following, rewards, done, terminated)]
    for theirs in "generalized_advantage_estimate", "vec_generalized_advantage_estimate":
        advantages, returns = getattr(functional, theirs)(0.99, lam, *columns)
        near(ours[0], advantages[..., 0], rtol=1e-6, atol=1e-6)
        near(ours[1], returns[..., 0], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # of torchrl and tensordict, when they are imported
def test_torchrl_vtrace():
    """vtrace_advantage_estimate, whose values are our returns; one episode in each row."""
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    rewards, values, logp, behavior = torch.randn(4, 7, 50, dtype=torch.float64)
    after, last = torch.randn(7, dtype=torch.float64), torch.arange(50) == 49
    following = torch.where(last, after[:, None], values.roll(-1, 1))
    every = torch.ones(7, 50)
    rho, c = (importance_weights(logp, behavior, every, high=high)[0] for high in (1.5, 0.8))
    _, returns = gae(rewards, values, gamma=0.99, bootstrap=after, rho=rho, c=c)
    ends = last.expand(7, 50)
    columns = [x[..., None] for x in (logp, behavior, values, following, rewards, ends)]
    _, theirs = functional.vtrace_advantage_estimate(
        0.99, *columns, terminated=torch.zeros_like(columns[-1]), rho_thresh=1.5, c_thresh=0.8
    )
    near(returns, theirs[..., 0], rtol=1e-6, atol=1e-6)
