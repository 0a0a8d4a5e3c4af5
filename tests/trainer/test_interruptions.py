"""Runs that a signal, a kill or an error of the user's code ends: no finished step is lost."""

import os
import random
import signal
import time

import pytest
from resumable_run import (
    QUICK,
    RUN,
    assert_same_run,
    killed_and_resumed,
    noisy_praise,
    trained,
)
from safetensors.torch import load_file
from tiny_trainer import PROMPTS, make_trainer, metrics_of
from transformers import AutoModelForCausalLM

from fastpg.trainer import TrainerCallback
from fastpg.trainer.run.signals import Interrupted


def interrupting(number, at_call):
    """A reward that sends this process a signal."""
    calls = []

    def reward(prompts, completions):
        calls.append(1)
        if len(calls) == at_call:
            os.kill(os.getpid(), number)
        return noisy_praise(prompts, completions)

    reward.__name__ = noisy_praise.__name__
    return reward


@pytest.fixture
def usual_handlers():
    """Those of a process in the foreground: one in the background of a script ignores Ctrl-C."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    earlier = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_saves_checkpoint_and_model(tmp_path, capsys, usual_handlers, number):
    whole, part = tmp_path / "whole", tmp_path / "part"
    trained(whole, save_steps=None)
    before = signal.getsignal(number)
    # The first call is that of the evaluation, the fourth is in step 3.
    trainer = make_trainer(part, interrupting(number, 4), **{**RUN, "save_steps": None})
    with pytest.raises(Interrupted) as stop:
        trainer.train()
    assert stop.value.number == number
    assert signal.getsignal(number) is before
    assert (part / "LATEST").read_text() == "checkpoint-2"
    assert "Stopped after step 2 of 4" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(part / "model")
    trained(part, resume=True, save_steps=None)
    assert_same_run(part, whole)


def test_a_signal_that_the_process_ignores_stays_ignored(tmp_path, usual_handlers):
    """As in the background of a script, or under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = make_trainer(tmp_path, interrupting(signal.SIGINT, 2), **RUN)
    try:
        trainer.train()
    except Interrupted:
        pytest.fail("the run was stopped")
    assert (tmp_path / "LATEST").read_text() == "checkpoint-4"


@pytest.mark.slow
def test_a_signal_in_an_update_waits_for_its_end(tmp_path, monkeypatch, usual_handlers):
    whole, part = tmp_path / "whole", tmp_path / "part"
    trained(whole)
    trainer = make_trainer(part, noisy_praise, **RUN)
    update = trainer.learner.update

    def interrupted_update(experience):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        return update(experience)

    monkeypatch.setattr(trainer.learner, "update", interrupted_update)
    with pytest.raises(Interrupted):
        trainer.train()
    assert (part / "LATEST").read_text() == "checkpoint-1"
    trained(part, resume=True)
    assert_same_run(part, whole)


@pytest.mark.parametrize("eval_steps", [None, 2], ids=["in a rollout", "in an evaluation"])
def test_a_reward_that_raises_loses_no_finished_step(tmp_path, eval_steps):
    calls = []

    def reward(prompts, completions):
        calls.append(1)
        return [0.0] * len(prompts) if len(calls) < 4 else 1 / 0

    settings = {**RUN, "save_steps": None, "eval_steps": eval_steps}
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, reward, **settings).train()
    assert [row["step"] for row in metrics_of(tmp_path)] == [1, 2]
    assert (tmp_path / "LATEST").read_text() == "checkpoint-2"
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("heard", ["on_step", "on_evaluate", "on_save"])
def test_a_callback_that_raises_loses_no_finished_step(tmp_path, heard):
    def fail(step, _):
        if step == 2:
            raise ZeroDivisionError

    callback = TrainerCallback()
    setattr(callback, heard, fail)
    trainer = make_trainer(tmp_path, **{**QUICK, "save_steps": 2, "eval_steps": 2})
    trainer.callbacks = [callback]
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert [row["step"] for row in metrics_of(tmp_path)] == [1, 2]
    assert (tmp_path / "LATEST").read_text() == "checkpoint-2"
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved["lm_head.weight"].equal(trainer.policy.lm_head.weight)


def test_a_dataset_that_raises_loses_no_finished_step(tmp_path):
    class Failing(list):
        fails = False

        def __getitem__(self, i):
            return 1 // 0 if self.fails else super().__getitem__(i)

    dataset = Failing(PROMPTS)
    trainer = make_trainer(tmp_path, dataset=dataset, **{**QUICK, "save_steps": None})
    callback = TrainerCallback()
    callback.on_step = lambda step, metrics: setattr(dataset, "fails", True)
    trainer.callbacks = [callback]
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    steps = [row["step"] for row in metrics_of(tmp_path)]
    assert steps[0] == 1
    assert (tmp_path / "LATEST").read_text() == f"checkpoint-{steps[-1]}"
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    trained(whole)
    # `python tests/trainer/resumable_run.py 200` kills many more.
    killed_and_resumed(part, 2, random.Random(time.time_ns()))
    assert_same_run(part, whole)


@pytest.mark.slow
def test_many_kills_at_random_moments_cost_an_interval_each(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    settings = {"num_steps": 12, "save_steps": 2, "save_total_limit": 2}
    trained(whole, **settings)
    killed_and_resumed(part, 25, random.Random(time.time_ns()), **settings)
    assert_same_run(part, whole)
