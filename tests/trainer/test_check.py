"""`fastpg train --check` passes a sound run, and finds each of a table of mistakes."""

from dataclasses import replace

import pytest
import torch
from tiny_trainer import make_trainer, tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from fastpg import algorithms
from fastpg.cli import main
from fastpg.tasks import reviews
from fastpg.trainer import trainer
from fastpg.trainer.check import of_learning
from fastpg.trainer.check.command import CHECKS, check_run, gather_evidence
from fastpg.trainer.learning import learner
from fastpg.trainer.models import forward
from fastpg.trainer.models.head import HeadTransform
from fastpg.trainer.rollouts import rollout
from fastpg.trainer.rollouts.generation import Sampler
from fastpg.trainer.run.state import TrainingState

UNEQUAL = [{"prompt": "the story was"}, {"prompt": "honestly the story was"}]
CHECK = {check.__name__: check for check in CHECKS}


def test_a_sound_run_fails_no_check_and_writes_nothing(tmp_path, capsys):
    assert check_run(make_trainer(tmp_path / "out", kl_coef=0.1, temperature=0.7)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("24 pass, 1 warn, 0 fail")
    assert not (tmp_path / "out").exists()


def test_the_flag_gives_exit_code_1_where_a_check_fails(monkeypatch, capsys):
    sound = algorithms.token_rewards
    monkeypatch.setattr(algorithms, "token_rewards", lambda *a, **k: sound(*a, **k).roll(1, -1))
    monkeypatch.setattr(reviews, "build_trainer", lambda args: make_trainer(args.output_dir))
    assert main(["train", "--check"]) == 1
    assert "fail  score position" in capsys.readouterr().out


def dropout_left_on(patch):
    patch.setattr(trainer, "check_forwards", lambda *a: None)
    return {"model": tiny_model(attention_dropout=0.5)}, lambda t: t.policy.train()


def doubled_bos(patch):
    tokenizer = reviews.build_tokenizer()
    tokenizer.bos_token = "honestly"
    number = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="honestly $A", special_tokens=[("honestly", number)]
    )
    return {"tokenizer": tokenizer, "dataset": [{"prompt": "honestly the story was"}]}, None


def sampler_that(change):
    def spoil(patch):
        sound = Sampler.draw
        patch.setattr(Sampler, "draw", lambda self, logits: sound(self, change(logits)))
        many = {"rollout_batch_size": 64, "max_new_tokens": 8}
        return {"model": tiny_model(vocab_size=200), **many, "temperature": 0.7}, None

    return spoil


def top_k(logits):
    least = logits.topk(50).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def end_never_sampled(patch):
    model = tiny_model(tie_word_embeddings=False)
    model.generation_config = GenerationConfig(eos_token_id=list(range(1, 12)))
    sound = Sampler.draw
    few = torch.arange(1, 12)
    patch.setattr(Sampler, "draw", lambda s, x: sound(s, x.index_fill(-1, few, -torch.inf)))
    return {"model": model, "rollout_batch_size": 64}, None


def mask_that(change):
    def spoil(patch):
        sound = rollout.completion_mask
        patch.setattr(rollout, "completion_mask", lambda ids, ends: change(*sound(ids, ends)))
        return {"rollout_batch_size": 64}, None

    return spoil


def without_last(mask, finished):
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask & ~(last & finished[:, None]), finished


def padding_in_positions(patch):
    patch.setattr(forward, "takes_positions", lambda policy: False)
    config = GPT2Config(vocab_size=43, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    torch.manual_seed(0)
    return {"model": GPT2LMHeadModel(config), "dataset": UNEQUAL}, None


def padding_attended(patch):
    sound = forward.plain_inputs
    patch.setattr(
        "fastpg.trainer.models.head.plain_inputs",
        lambda policy, ids, mask: sound(policy, ids, torch.ones_like(mask)),
    )
    return {"dataset": UNEQUAL}, None


def temperature_of(power):
    def spoil(patch):
        sound = learner.Learner.batch
        patch.setattr(
            learner.Learner,
            "batch",
            lambda self, r: replace(sound(self, r), temperature=self.args.temperature**power),
        )
        return {"temperature": 0.5}, None

    return spoil


def another_reference(t):
    with torch.no_grad():
        t.learner.reference.lm_head.weight.mul_(1.5)


def other_old_logp(patch):
    sound = learner.Learner._before_update
    patch.setattr(
        learner.Learner,
        "_before_update",
        lambda self, r: (sound(self, r)[0] + 0.01, *sound(self, r)[1:]),
    )
    return {}, None


def wrong_head(t):
    t.paths = replace(t.paths, head=HeadTransform(scale=1.3))


def patched(target, name, value, **settings):
    def spoil(patch):
        patch.setattr(target, name, value)
        return settings, None

    return spoil


def after(change, **settings):
    return lambda patch: (settings, change)


def score_at_padding(scores, mask, **options):
    rewards = torch.zeros(mask.shape)
    rewards[:, -1] = scores
    return rewards


def no_rate(t):
    for group in t.learner.optimizer.param_groups:
        group["lr"] = 0.0


def forgotten_weight(t):
    t.learner.optimizer.param_groups[0]["params"].pop()


SOUND_GAE = algorithms.gae
SOUND_TARGETS = learner.Learner._targets
MISTAKES = {
    "dropout left on": (dropout_left_on, "dropout", "fail"),
    "doubled BOS": (doubled_bos, "beginning", "fail"),
    "top_k of 50": (sampler_that(top_k), "sampled_distribution", "fail"),
    "sampled at the temperature twice": (
        sampler_that(lambda logits: logits / 0.3), "sampled_distribution", "fail"
    ),
    "EOS never sampled": (end_never_sampled, "ends", "fail"),
    "EOS dropped from the mask": (mask_that(without_last), "completions_mask", "fail"),
    "mask beyond EOS": (
        mask_that(lambda mask, f: (torch.ones_like(mask), f)), "completions_mask", "fail"
    ),
    "padding counted in positions": (padding_in_positions, "padding", "fail"),
    "padding attended to": (padding_attended, "padding", "fail"),
    "temperature used twice": (temperature_of(2), "temperature", "fail"),
    "temperature left out": (temperature_of(0), "temperature", "fail"),
    "a reference that is not the start": (
        after(another_reference, kl_coef=0.1), "reference", "fail"
    ),
    "old log-probs of another forward": (other_old_logp, "first_ratio", "fail"),
    "scale of the head left out": (after(wrong_head), "lm_head", "fail"),
    "score on padding": (
        patched(algorithms, "token_rewards", score_at_padding), "score_position", "fail"
    ),
    "rewards counted twice": (
        patched(algorithms, "gae", lambda r, v, m, **o: SOUND_GAE(2 * r, v, m, **o)),
        "advantage_estimation", "fail",
    ),
    "advantages not whitened": (
        patched(algorithms, "whiten", lambda x, mask, **o: x), "advantages", "fail"
    ),
    "losses averaged by micro-batch": (
        patched(learner.Learner, "_targets", lambda self, experience, denom: SOUND_TARGETS(
            self, experience, experience.rollout.mask.sum())),
        "micro_batches", "fail",
    ),
    "equal rewards": (
        lambda patch: ({"reward": lambda prompts, completions: [1.0] * len(prompts)}, None),
        "rewards", "warn",
    ),
    "no learning rate": (after(no_rate), "learning_rate", "fail"),
    "a weight not in the optimiser": (after(forgotten_weight), "trained_weights", "fail"),
    "a checkpoint that is not taken up": (
        patched(TrainingState, "restore", lambda self, saved: None, num_steps=5), "resuming", "fail"
    ),
    "the same seed in all processes": (
        patched(of_learning, "gather_object", lambda x: x * 2),
        "seeds", "fail",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound_findings(tmp_path_factory):
    """What each check finds in a run without a mistake."""
    evidence = gather_evidence(make_trainer(tmp_path_factory.mktemp("sound"), kl_coef=0.1))
    return {name: check(evidence) for name, check in CHECK.items()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(tmp_path, monkeypatch, mistake, sound_findings):
    spoil, name, verdict = MISTAKES[mistake]
    sound = sound_findings[name]
    assert sound is None or sound.verdict == "pass"
    settings, change = spoil(monkeypatch)
    spoiled = make_trainer(tmp_path, **settings)
    if change is not None:
        change(spoiled)
    finding = CHECK[name](gather_evidence(spoiled))
    assert finding.verdict == verdict, finding
