"""Directories of runs and models: none of them is lost to another one."""

import os
import tempfile

import pytest
from resumable_run import RUN
from tiny_trainer import make_trainer, metrics_of, share_of_praise, tiny_model
from transformers import AutoModelForCausalLM

from fastpg.tasks import reviews
from fastpg.trainer import InputError, PPOConfig
from fastpg.trainer.rewards.functions import load_reward
from fastpg.trainer.run.run_files import check_apart

FEW = {"num_steps": 2, "rollout_batch_size": 2, "num_ppo_epochs": 1, "num_mini_batches": 1}
QUICK = {**RUN, **FEW, "report_to": ["none"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run of two steps. Any number in its name makes it no checkpoint."""
    directory = tmp_path_factory.mktemp("runs") / "checkpoint-7"
    make_trainer(directory, **QUICK).train()
    return directory


def test_a_run_goes_on_in_no_directory_of_another_run(run, tmp_path):
    other = tmp_path / "other"
    make_trainer(other, **QUICK, seed=1).train()
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"cannot go on in .*other, which holds the files of"):
        make_trainer(other, **QUICK).train(resume_from_checkpoint=run / "checkpoint-1")
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before
    make_trainer(tmp_path / "new", **QUICK).train(resume_from_checkpoint=run / "checkpoint-1")
    assert [row["step"] for row in metrics_of(tmp_path / "new")] == [2]


def test_the_directory_of_a_run_may_be_named_like_a_checkpoint(run):
    make_trainer(run, **{**QUICK, "num_steps": 3}).train(resume_from_checkpoint=True)
    assert [row["step"] for row in metrics_of(run)] == [1, 2, 3]


def test_a_run_does_not_start_from_its_own_files(run):
    before = sorted(run.rglob("*"))
    for place in ("model", "checkpoint-2/model"):
        again = make_trainer(run, model=str(run / place), **QUICK)
        with pytest.raises(InputError, match=r"is where the run in .* writes its own files"):
            again.train()
    assert sorted(run.rglob("*")) == before


def test_a_model_is_saved_in_the_working_directory(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run", **QUICK)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    trainer.save_model(".")
    assert (tmp_path / "here" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_whole_model_replaces_an_adapter(tmp_path):
    pytest.importorskip("peft")
    make_trainer(tmp_path / "adapters", **QUICK, lora_rank=2).save_model(tmp_path / "model")
    trainer = make_trainer(tmp_path / "whole", **QUICK)
    trainer.save_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.lm_head.weight.equal(trainer.policy.lm_head.weight)


def test_a_new_run_loses_nothing_that_others_left_in_its_directory(tmp_path):
    # Hugging Face's Trainer names its checkpoints as we do.
    found = ["checkpoint-500/model.safetensors", "model/model.safetensors", ".mine.tmp", "notes"]
    for name in found:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    make_trainer(tmp_path, **QUICK).train()
    left = [*(f"earlier-1/{name}" for name in found[:2]), *found[2:]]
    assert [(tmp_path / name).read_text() for name in left] == found


def in_a_directory_that_is_gone(prompts, completions):
    """It leaves the process where no relative path leads anywhere."""
    gone = tempfile.mkdtemp()
    os.chdir(gone)
    os.rmdir(gone)
    return share_of_praise(prompts, completions)


WRITTEN = {"checkpoint-2", "config.yaml", "metrics.jsonl", "model", "run.json", "tensorboard"}


def test_a_reward_that_changes_the_working_directory_does_not_move_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("base")
    reviews.build_tokenizer().save_pretrained("base")
    settings = {**QUICK, "model": "base", "report_to": ["tensorboard"], "save_total_limit": 1}
    make_trainer("out", in_a_directory_that_is_gone, **settings).train()
    assert WRITTEN | {"summary.md", "reward.png"} <= {path.name for path in tmp_path.glob("out/*")}
    os.chdir(tmp_path)
    taken_up = make_trainer("out", in_a_directory_that_is_gone, **{**settings, "num_steps": 3})
    taken_up.train(resume_from_checkpoint="out/checkpoint-2")
    assert [row["step"] for row in metrics_of(tmp_path / "out")] == [1, 2, 3]
    assert (tmp_path / "out/checkpoint-3").is_dir()


def test_a_loop_that_changes_the_working_directory_does_not_move_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer("out", None, dataset=None, **QUICK)
    for _ in range(2):
        trainer.step([[5, 6]] * 2, [[7, 8]] * 2, in_a_directory_that_is_gone([""] * 2, [""] * 2))
    assert WRITTEN - {"tensorboard"} <= {path.name for path in tmp_path.glob("out/*")}


def test_a_reward_imports_from_where_the_run_was_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("elsewhere")
    late = "def reward(completions):\n    import imported_late\n    return [imported_late.SCORE]\n"
    (tmp_path / "late_reward.py").write_text(late)
    (tmp_path / "imported_late.py").write_text("SCORE = 3.0\n")
    reward = load_reward("late_reward:reward")
    monkeypatch.chdir("/")
    assert reward(completions=[""]) == [3.0]


def test_a_path_may_begin_at_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PPOConfig(output_dir="~/run").output_dir == str(tmp_path / "run")


def test_links_in_a_circle_are_one_sentence(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "run")
    with pytest.raises(InputError, match=r"Cannot write to .*run: "):
        check_apart(str(tmp_path), tmp_path / "run")
        make_trainer(tmp_path / "run").train()
