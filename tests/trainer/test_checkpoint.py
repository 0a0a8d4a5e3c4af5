"""Checkpoints: whole, named, and such that a run goes on as if it had not been stopped."""

import errno
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from resumable_run import (
    RUN,
    assert_same_run,
    noisy_praise,
    trained,
    without_times,
)
from safetensors import SafetensorError
from tiny_trainer import make_trainer, metrics_of, share_of_praise, tiny_model
from transformers import AutoModelForCausalLM

from fastpg.trainer import InputError, PPOTrainer
from fastpg.trainer.run import checkpoint, files
from fastpg.trainer.run.checkpoint import Checkpoint, save_checkpoint
from fastpg.trainer.run.files import StorageError


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        (2, {}),
        pytest.param(0, {}, marks=pytest.mark.slow),
        pytest.param(3, {"algorithm": "grpo", "num_generations": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, step, settings):
    whole, part = tmp_path / "whole", tmp_path / "part"
    trained(whole, eval_steps=2, **settings)
    trained(part, eval_steps=2, **settings)
    # What the run wrote after that step is still there, as after a kill.
    (part / "LATEST").write_text(f"checkpoint-{step}")
    with (part / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(99)
    resumed = trained(part, resume=True, eval_steps=2, **settings)
    assert resumed.policy is not None
    assert_same_run(part, whole)
    assert (part / "summary.md").read_text().count("| before |") == 2


def test_a_checkpoint_holds_no_weight_twice_and_no_pickle(tmp_path):
    trained(tmp_path, num_steps=1)
    checkpoint = tmp_path / "checkpoint-1"
    suffixes = {path.suffix for path in checkpoint.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".jinja"}
    state = json.loads((checkpoint / "state.json").read_text())
    assert len(state["in_model"]) == len(list(tiny_model().parameters()))
    AutoModelForCausalLM.from_pretrained(checkpoint / "model")


def test_old_checkpoints_go(tmp_path):
    trained(tmp_path, save_total_limit=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert (tmp_path / "LATEST").read_text() == "checkpoint-4"


@pytest.mark.slow
def test_a_longer_run_begins_where_a_finished_one_ended(tmp_path):
    trained(tmp_path)
    trained(tmp_path, resume=True, num_steps=5)
    rows = metrics_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["learning_rate"] == pytest.approx(1e-3 / 5)


def damage(path: Path, how: str):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "flipped":
        data[len(data) // 2] ^= 1
    path.unlink()
    if how != "missing":
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize(
    "name", ["tensors.safetensors", "state.json", "model/model.safetensors", "manifest.json"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, caplog, name, how):
    damage(finished / "checkpoint-4" / name, how)
    trainer = make_trainer(finished, noisy_praise, **RUN)
    assert trainer._load(finished).step == 3
    (record,) = caplog.records
    assert f"{finished / 'checkpoint-4'} is damaged" in record.getMessage()


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    trained(folder)
    return folder


@pytest.fixture
def finished(finished_once, tmp_path):
    """The directory of a finished run, to be damaged."""
    folder = tmp_path / "run"
    for path in finished_once.rglob("*"):
        copy = folder / path.relative_to(finished_once)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            copy.write_bytes(path.read_bytes())
    return folder


def test_a_run_with_only_its_last_evaluation_left_draws_the_same_numbers_for_it(finished, capsys):
    whole = metrics_of(finished)
    ends = [finished / "model" / "model.safetensors", finished / "summary.md"]
    weights = ends[0].read_bytes()
    for path in ends:
        path.unlink()
    trained(finished, resume=True)
    assert "All 4 steps are made; model, last evaluation and report are left." in " ".join(
        capsys.readouterr().out.split()
    )
    assert without_times(metrics_of(finished)) == without_times(whole)
    assert ends[0].read_bytes() == weights
    assert ends[1].exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"starts": 1}', "\xff"])
def test_a_damaged_record_of_the_starts_is_named(finished, text):
    (finished / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"run\.json is damaged; without it the run can go on\."):
        trained(finished, resume=True)


def test_without_a_whole_checkpoint_there_is_no_resume(finished, tmp_path):
    for directory in finished.glob("checkpoint-*"):
        damage(directory / "state.json", "truncated")
    with pytest.raises(InputError, match="There is no whole checkpoint in"):
        trained(finished, resume=True)
    with pytest.raises(InputError, match="There is no checkpoint in"):
        trained(tmp_path / "nothing", resume=True)
    with pytest.raises(InputError, match=r"There is no checkpoint .*checkpoint-9"):
        trained(finished, resume=finished / "checkpoint-9")


def test_a_checkpoint_of_another_run_is_refused(finished):
    with pytest.raises(InputError, match="was made with seed=0, not 1"):
        trained(finished, resume=True, seed=1)
    with pytest.raises(InputError, match=r"is of step 4, after num_steps=3"):
        trained(finished, resume=True, num_steps=3)
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(InputError, match="another starting model"):
        make_trainer(finished, noisy_praise, model, **RUN).train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="another dataset"):
        trainer = make_trainer(finished, noisy_praise, dataset=[{"prompt": "the plot"}], **RUN)
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="another list of reward functions"):
        make_trainer(finished, **RUN).train(resume_from_checkpoint=True)
    assert len(metrics_of(finished)) == 4


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    # Without a penalty the weights that a run starts from do not matter where it is taken up.
    make_trainer(tmp_path, **{**RUN, "num_steps": 1}, kl_coef=0.0).train()
    other = make_trainer(tmp_path, model=tiny_model(hidden_size=64), **RUN, kl_coef=0.0)
    with pytest.raises(InputError, match=r"run of another model: see policy\.model\.embed_tokens"):
        other.train(resume_from_checkpoint=True)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    with pytest.raises(InputError, match="no longer finite after step 1, of which nothing is"):
        make_trainer(tmp_path, learning_rate=1e30, **RUN).train()
    assert (tmp_path / "LATEST").read_text() == "checkpoint-0"
    assert not (tmp_path / "model").exists()


def test_a_full_disk_is_found_before_the_training(tmp_path, monkeypatch):
    free = SimpleNamespace(free=100)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: free)
    calls = []
    trainer = make_trainer(tmp_path, lambda completions: calls.append(1), **RUN)
    with pytest.raises(InputError, match=r"0.00 MB free, but a checkpoint takes"):
        trainer.train()
    # There is room for one checkpoint, but not for four.
    free.free = 3 * 4 * sum(p.numel() for p in trainer.model.parameters()) + 50_000
    with pytest.raises(InputError, match=r"this run will keep \(save_total_limit=none\) takes"):
        trainer.train()
    assert not calls
    # What was tried takes no room.
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "LATEST").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: os error 28")]
)
def test_a_full_disk_costs_one_checkpoint_and_not_the_run(tmp_path, monkeypatch, capsys, error):
    trainer = make_trainer(tmp_path, noisy_praise, **RUN)
    write, calls = trainer._write_model, []

    def full_at_second_step(*given):
        calls.append(1)
        write(*given)
        if len(calls) == 3:
            raise error

    trainer._write_model = full_at_second_step
    trainer.train()
    steps = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert steps == [f"checkpoint-{i}" for i in (0, 1, 3, 4)]
    assert "There is no checkpoint of step 2: Cannot write" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_checkpoint_is_named_as_the_newest_once_it_is_on_the_disk(tmp_path, monkeypatch):
    def full(directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_checkpoint(tmp_path, Checkpoint(1, {}, {}), Path.mkdir, keep=None)
    monkeypatch.setattr(checkpoint, "flush_all", full)
    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(tmp_path, Checkpoint(2, {}, {}), Path.mkdir, keep=None)
    assert (tmp_path / "LATEST").read_text() == "checkpoint-1"


def test_a_directory_that_is_gone_costs_its_checkpoints_and_not_the_model(tmp_path, capsys):
    calls = []

    def reward(prompts, completions):
        calls.append(1)
        if len(calls) == 2:
            (tmp_path / "run").rename(tmp_path / "moved")
        return share_of_praise(prompts, completions)

    # The thread of TensorBoard would fail in a directory that is gone.
    settings = {**RUN, "num_steps": 2, "report_to": ["none"]}
    make_trainer(tmp_path / "run", reward, **settings).train()
    assert "There is no checkpoint of step 1: Cannot write to" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_model_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **RUN)
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    write = trainer._write_model

    def full(*given):
        write(*given)
        raise OSError(28, "No space left on device")

    trainer._write_model = full
    with pytest.raises(InputError, match="model: No space left on device"):
        trainer.save_model()
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_a_model_that_cannot_be_saved_is_refused_before_the_training(tmp_path, monkeypatch):
    def unsaveable(*args, **kwargs):
        raise ValueError("no way to write this")

    model = tiny_model()
    monkeypatch.setattr(model, "save_pretrained", unsaveable)
    calls = []
    trainer = make_trainer(tmp_path, lambda completions: calls.append(1), model, **RUN)
    with pytest.raises(InputError, match="model cannot be saved: no way to write this"):
        trainer.train()
    assert not calls


@pytest.mark.slow
def test_one_run_writes_to_a_directory_at_a_time(tmp_path):
    first = make_trainer(tmp_path, noisy_praise, **RUN)

    def second_run(prompts, completions):
        with pytest.raises(InputError, match="Another run is writing to"):
            trained(tmp_path)
        return [0.0] * len(prompts)

    first.reward_funcs = [second_run]
    first.train()
    assert len(metrics_of(tmp_path)) == 4


def test_the_value_head_is_where_the_critic_of_another_run_begins(tmp_path):
    first = trained(tmp_path / "first", num_steps=2)
    again = PPOTrainer(
        str(tmp_path / "first" / "model"), share_of_praise, first.args,
        train_dataset=first.train_dataset,
    )  # fmt: skip
    head = first.accelerator.unwrap_model(first.model).value_head
    assert head.weight.abs().max() > 0
    assert torch.equal(again.accelerator.unwrap_model(again.model).value_head.weight, head.weight)
