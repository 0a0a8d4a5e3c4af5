"""With top_k and top_p, log-probs are those of the distribution that tokens were drawn from."""

from dataclasses import replace

import pytest
import torch
from tiny_trainer import make_trainer, tiny_model

from fastpg.trainer import InputError, PPOConfig
from fastpg.trainer.check.command import gather_evidence
from fastpg.trainer.check.of_rollouts import ends, sampled_distribution
from fastpg.trainer.models.forward import plain_inputs
from fastpg.trainer.models.policy import logprobs_through
from fastpg.trainer.rollouts.kept_sets import KeptSets

CUT = {"top_k": 12, "top_p": 0.8, "temperature": 0.7}
WAYS = {
    "shared prompts": lambda paths: paths,
    "generate": lambda paths: replace(paths, packing=None),
    "the model's logits": lambda paths: replace(paths, packing=None, head=None),
}


def rolled_out(folder, way="shared prompts", **settings):
    """A trainer that takes one of the ways, and a rollout of it."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.2)
    prompts = [{"prompt": "the story was"}] * 5 + [{"prompt": "honestly the story was"}] * 5
    trainer = make_trainer(
        folder, model=model, dataset=prompts, max_new_tokens=8, **{**CUT, **settings}
    )
    trainer.paths = trainer.learner.paths = WAYS[way](trainer.paths)
    trainer.engine.packing = trainer.paths.packing
    rollout, _ = trainer.roll_out(prompts)
    return trainer, rollout


def logits_by_one_forward(trainer, rollout):
    """The logits of each completion token in fp64, after the temperature: [B, T, V]."""
    inputs = plain_inputs(trainer.policy, rollout.input_ids, rollout.attention_mask)
    logits = trainer.policy(**inputs).logits[:, -rollout.mask.shape[1] - 1 : -1]
    return logits.double() / trainer.args.temperature


def marked(rollout, vocabulary=43):
    """The sets of a rollout, bool [B, T, V]; nothing is marked of a masked token."""
    token_ids, offsets = rollout.kept.support
    marks = torch.zeros(rollout.mask.numel(), vocabulary, dtype=torch.bool)
    for row in range(len(marks)):
        marks[row, token_ids[offsets[row] : offsets[row + 1]].long()] = True
    return marks.view(*rollout.mask.shape, vocabulary)


def kept_by_hand(logits, top_k, top_p):
    """The likeliest tokens, one by one, until there are `top_k` or they reach `top_p`."""
    order = logits.argsort(descending=True).tolist()[:top_k]
    p = logits[order].softmax(0)
    kept, reached = set(), 0.0
    for token, probability in zip(order, p.tolist(), strict=True):
        if reached < top_p:
            kept.add(token)
        reached += probability
    return kept


@pytest.mark.parametrize("way", WAYS)
def test_the_sets_are_those_of_top_k_and_then_top_p(tmp_path, way):
    trainer, rollout = rolled_out(tmp_path, way)
    with torch.no_grad():
        logits = logits_by_one_forward(trainer, rollout)
    marks, sizes = marked(rollout), set()
    for episode, place in rollout.mask.nonzero().tolist():
        expected = kept_by_hand(logits[episode, place], 12, 0.8)
        assert set(marks[episode, place].nonzero()[:, 0].tolist()) == expected
        assert rollout.completion_ids[episode, place].item() in expected
        sizes.add(len(expected))
    assert len(sizes) > 2
    assert not marks[~rollout.mask].any()


@pytest.mark.parametrize("way", WAYS)
def test_log_probs_and_their_gradients_are_those_of_a_softmax_over_the_set(tmp_path, way):
    trainer, rollout = rolled_out(tmp_path, way)
    weight = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(1))
    weight = weight.double() * rollout.mask
    parameters = list(trainer.policy.parameters())

    found = logprobs_through(trainer.model, trainer.learner.batch(rollout))
    total = (found.logp.double() * weight).sum() + (found.entropy.double() * weight).sum()
    gradients = torch.autograd.grad(total, parameters)

    trainer.policy.double()
    logits = logits_by_one_forward(trainer, rollout)
    logps = logits.masked_fill(~marked(rollout), -torch.inf)[rollout.mask].log_softmax(-1)
    tokens = rollout.completion_ids[rollout.mask]
    logp = logps.gather(1, tokens[:, None])[:, 0]
    entropy = -(logps.exp() * logps.clamp(min=-1e9)).sum(-1)
    weight = weight[rollout.mask]
    expected = torch.autograd.grad((logp * weight).sum() + (entropy * weight).sum(), parameters)

    torch.testing.assert_close(found.logp[rollout.mask].double(), logp, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.entropy[rollout.mask].double(), entropy, rtol=0, atol=2e-5)
    for gradient, wanted in zip(gradients, expected, strict=True):
        error = (gradient.double() - wanted).norm() / wanted.norm().clamp(min=1e-6)
        assert error < 1e-4


@pytest.mark.parametrize("algorithm, generations", [("ppo", 1), ("gspo", 5)])
def test_ratios_begin_at_exactly_1_and_the_kl_at_0(tmp_path, algorithm, generations):
    trainer, rollout = rolled_out(
        tmp_path, algorithm=algorithm, num_generations=generations, kl_coef=0.1, entropy_coef=0.01
    )
    steps = []
    for _ in range(2):
        experience, metrics = trainer.learner.experience(rollout, torch.randn(10))
        steps.append(metrics | trainer.learner.update(experience))
    assert [step["policy/first_ratio_deviation"] for step in steps] == [0, 0]
    assert steps[0]["objective/kl"] == 0
    assert steps[1]["objective/kl"] != 0


def test_the_kl_to_the_reference_is_one_of_the_cut_distributions(tmp_path):
    """Both are divided by their mass in the set of the policy, so the KL is never negative."""
    trainer, rollout = rolled_out(tmp_path, kl_coef=0.1)
    with torch.no_grad():
        trainer.learner.reference.lm_head.weight.mul_(1.5)
        experience, _ = trainer.learner.experience(rollout, torch.zeros(10))
        logits = logits_by_one_forward(trainer, rollout)
        policy, trainer.model.policy = trainer.policy, trainer.learner.reference
        ref_logits = logits_by_one_forward(trainer, rollout)
        trainer.model.policy = policy
    cut = ~marked(rollout)[rollout.mask]
    tokens = rollout.completion_ids[rollout.mask][:, None]
    logps = [
        x[rollout.mask].masked_fill(cut, -torch.inf).log_softmax(-1) for x in (logits, ref_logits)
    ]
    expected = logps[0].gather(1, tokens) - logps[1].gather(1, tokens)
    found = (experience.logp - experience.ref_logp)[rollout.mask].double()
    torch.testing.assert_close(found, expected[:, 0], rtol=0, atol=5e-5)
    assert ((logps[0].exp() * (logps[0] - logps[1]).nan_to_num()).sum(-1) >= -1e-12).all()


def test_the_check_of_sampling_passes_where_log_probs_know_the_sets(tmp_path):
    settings = {"model": tiny_model(vocab_size=200), "rollout_batch_size": 64, "temperature": 0.7}
    evidence = gather_evidence(make_trainer(tmp_path, top_k=50, max_new_tokens=8, **settings))
    assert sampled_distribution(evidence).verdict == ends(evidence).verdict == "pass"
    forgotten = replace(evidence, rollout=replace(evidence.rollout, kept=None))
    assert sampled_distribution(forgotten).verdict == "fail"


def test_sets_go_with_their_episodes():
    sets = KeptSets(torch.tensor([3, 5, 1, 0, 2, 7, 4]), torch.tensor([[2, 0], [1, 3], [0, 1]]))
    token_ids, offsets = sets[torch.tensor([2, 1])].support
    assert token_ids.tolist() == [4, 1, 0, 2, 7]
    assert offsets.tolist() == [0, 0, 1, 2, 5]
    assert sets.lengthened().support[1].tolist() == [0, 2, 2, 2, 3, 6, 6, 6, 7, 7]


def test_nothing_is_recorded_where_nothing_is_cut(tmp_path):
    assert rolled_out(tmp_path, top_k=0, top_p=1.0)[1].kept is None


@pytest.mark.parametrize("setting", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_an_impossible_cut_is_refused(setting):
    (name,) = setting
    with pytest.raises(InputError, match=f"{name} must be"):
        PPOConfig(**setting)
