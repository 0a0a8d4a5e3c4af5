"""Rollouts by vLLM, which a stub stands for that has its real names."""

import copy
import dataclasses
import importlib.util
import math
import sys

import pytest
import torch
import vllm_stub
from tiny_trainer import PROMPTS, make_trainer, tiny_model

from fastpg.trainer import InputError, PPOConfig, PPOTrainer
from fastpg.trainer.check.command import gather_evidence
from fastpg.trainer.check.of_forwards import padding
from fastpg.trainer.check.of_rollouts import completions_mask, sampled_distribution
from fastpg.trainer.learning.mismatch import correct
from fastpg.trainer.models.adapters import merged_weights, with_adapter

TWO_LENGTHS = [{"prompt": "the story was"}, {"prompt": "honestly the story was"}] * 5


@pytest.fixture
def vllm(monkeypatch):
    """Lets `import vllm` give the stub."""
    monkeypatch.setattr(vllm_stub.LLM, "off", 0.0)
    monkeypatch.setitem(sys.modules, "vllm", vllm_stub)
    sys.modules.pop("fastpg.trainer.rollouts.vllm_engine", None)
    yield vllm_stub
    sys.modules.pop("fastpg.trainer.rollouts.vllm_engine", None)


def weights_of(trainer):
    return {name: weight.clone() for name, weight in merged_weights(trainer.policy)}


@pytest.mark.parametrize("kind", ["RequestOutput", "CompletionOutput", "SamplingMask", "Logprob"])
def test_the_stub_has_the_names_of_vllm_in_their_order(kind):
    real = vllm_stub.recorded()[kind]
    own = [field.name for field in dataclasses.fields(getattr(vllm_stub, kind))]
    assert own == [name for name in real if name in own]


def test_an_unknown_name_is_refused_by_the_stub():
    with pytest.raises(TypeError, match="no_such"):
        vllm_stub.SamplingParams(no_such=1)


@pytest.mark.parametrize("cut", [{}, {"top_k": 20, "top_p": 0.9}])
def test_a_rollout_of_vllm_has_the_log_probs_of_training(tmp_path, vllm, cut):
    """Masks, ends, kept sets and log-probs are right where both agree but for rounding."""
    trainer = make_trainer(
        tmp_path, dataset=TWO_LENGTHS, use_vllm=True, temperature=0.7, max_new_tokens=12, **cut
    )
    evidence = gather_evidence(trainer)
    for check in (completions_mask, padding, sampled_distribution):
        assert check(evidence).verdict == "pass", check(evidence)
    rollout = evidence.rollout
    assert 0 < rollout.finished.sum() < 10
    assert (rollout.kept is not None) == bool(cut)
    gap = (evidence.logp - rollout.behavior_logp)[rollout.mask].abs().max()
    assert gap < 1e-4
    assert evidence.credit["sampling/logp_difference/max"] == pytest.approx(gap.item(), abs=1e-6)


def test_weights_are_pushed_at_the_start_and_after_each_update(tmp_path, vllm):
    trainer = make_trainer(tmp_path, use_vllm=True)
    pushed = dict(trainer.engine.llm.model.model.named_parameters())
    for step in range(2):
        own = weights_of(trainer)
        assert own.keys() == pushed.keys()
        assert all(torch.equal(pushed[name], weight) for name, weight in own.items())
        assert trainer.engine.llm.resets == step + 1
        trainer.learn(*trainer.roll_out(PROMPTS + PROMPTS[:2]))
        assert not torch.equal(own["lm_head.weight"], weights_of(trainer)["lm_head.weight"])


def test_the_seed_decides_what_vllm_samples(tmp_path, vllm):
    ids = []
    for seed in (3, 3, 4):
        trainer = make_trainer(tmp_path, use_vllm=True, seed=seed)
        trainer.seed()
        ids.append(trainer.engine.sample(["the story was"] * 4).input_ids.tolist())
    assert ids[0] == ids[1] != ids[2]
    assert len(set(map(tuple, ids[0]))) > 1


@pytest.mark.parametrize("algorithm, steps", [("ppo", 1), ("ppo", 2), ("dr_grpo", 1)])
def test_the_policy_loss_is_weighed_by_truncated_ratios(tmp_path, vllm, algorithm, steps):
    """The gradient is that of one more factor of each token; the values are not touched."""
    vllm.LLM.off = 0.8
    settings = {"vllm_importance_sampling_clip_max": 1.5, "algorithm": algorithm}
    settings |= {"num_mini_batches": steps, "num_ppo_epochs": 1}
    settings |= {"num_generations": 2} if algorithm == "dr_grpo" else {}
    trainer = make_trainer(tmp_path, use_vllm=True, **settings)
    learner = trainer.learner
    rollout, _ = trainer.roll_out(PROMPTS + PROMPTS[:2])
    experience, metrics = learner.experience(rollout, torch.randn(10))

    off = (experience.logp - rollout.behavior_logp).double()[rollout.mask]
    assert metrics["sampling/logp_difference/mean"] == pytest.approx(off.abs().mean().item())
    assert metrics["sampling/logp_difference/max"] == pytest.approx(off.abs().max().item())
    assert metrics["sampling/kl"] == pytest.approx((off.exp() - 1 - off).mean().item())
    clipped = (off > math.log(1.5)).double().mean().item()
    assert metrics["sampling/weight_clipped"] == pytest.approx(clipped)
    assert 0 < clipped < 1

    by_hand = off.exp().clamp(max=1.5).float()
    torch.testing.assert_close(experience.importance[rollout.mask], by_hand)
    found = gradient_of(learner, experience)
    # The surrogate is proportional to the advantage, and no other term is in these losses.
    weighed = experience.advantages.clone()
    weighed[rollout.mask] *= by_hand
    plain = dataclasses.replace(experience, importance=None)
    expected = gradient_of(learner, dataclasses.replace(plain, advantages=weighed))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, gradient_of(learner, plain), rtol=1e-2)


def gradient_of(learner, experience):
    learner.optimizer.zero_grad()
    learner.accumulate(experience, learner.minibatches(torch.arange(10))[0])
    return torch.cat([p.grad.flatten() for p in learner.model.parameters()])


def test_nothing_is_corrected_where_the_policy_samples_itself(tmp_path):
    trainer = make_trainer(tmp_path)
    rollout, _ = trainer.roll_out(PROMPTS)
    assert rollout.behavior_logp is None
    assert correct(rollout, None, trainer.args, trainer.accelerator) == (None, {})


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_merged_weights_compute_what_the_adapter_does_and_leave_it_as_it_was():
    args = PPOConfig(lora_rank=4)
    plain = tiny_model()
    policy = with_adapter(copy.deepcopy(plain), args, "CAUSAL_LM")
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_" in name:
                weight.normal_(generator=torch.Generator().manual_seed(3)).mul_(0.3)
    before = copy.deepcopy(policy.state_dict())
    merged = dict(merged_weights(policy))
    assert merged.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
    ids = torch.arange(12).view(2, 6)
    expected = policy(ids).logits
    assert not torch.allclose(plain(ids).logits, expected, atol=1e-2)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-4)


def test_what_vllm_cannot_do_is_refused(tmp_path, vllm, monkeypatch):
    with pytest.raises(InputError, match=r"top_p=0\.9 with use_vllm needs a top_k"):
        PPOConfig(use_vllm=True, top_p=0.9)
    with pytest.raises(InputError, match="vllm_gpu_memory_utilization must be"):
        PPOConfig(vllm_gpu_memory_utilization=1.5)
    trainer = make_trainer(tmp_path, use_vllm=True)
    with pytest.raises(InputError, match="turn use_vllm off"):
        trainer.step([[3]], [[4]], [0.0])
    shares_weights = "fastpg.trainer.rollouts.rollout_engine.shares_weights"
    monkeypatch.setattr(shares_weights, lambda accelerator: True)
    with pytest.raises(InputError, match="use_vllm is for a run of one process"):
        make_trainer(tmp_path, use_vllm=True)


def test_a_missing_vllm_is_named_before_the_model_is_loaded(tmp_path):
    assert importlib.util.find_spec("vllm") is None
    with pytest.raises(InputError, match="pip install vllm"):
        PPOTrainer(
            "no/such/model", lambda completions: [], PPOConfig(use_vllm=True), train_dataset=PROMPTS
        )
