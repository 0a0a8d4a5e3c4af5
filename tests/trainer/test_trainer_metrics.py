"""What `PPOTrainer` reports of a run, computed by hand from what it sampled.

The metrics of the optimiser steps are in test_trainer_steps, beside the parameters.
"""

import json
import re
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from recorded_runs import ENDS, REWARDS, moved_trainer, recording, score_by_hand, text_of
from tiny_trainer import PROMPTS, make_trainer, metrics_of, rows_of

import fastpg


def scored(trainer, played):
    """The episodes of a rollout, their scores, and what the log says of them, by hand."""
    episodes = played.episodes(ENDS)
    scores, metrics = score_by_hand(
        episodes,
        REWARDS,
        trainer.args.reward_weights,
        trainer.args.missing_eos_penalty,
        trainer.tokenizer,
    )
    return episodes, scores, metrics


def close(metrics):
    return pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with evaluations after its second and fourth steps of five: trainer, rounds, result."""
    trainer, _ = moved_trainer(
        tmp_path_factory.mktemp("run"), "ppo", num_steps=5, eval_steps=2, num_eval_samples=7,
        num_logged_completions=3, num_ppo_epochs=1, learning_rate=0.02,
    )  # fmt: skip
    sent, log = [], trainer.accelerator.log
    trainer.accelerator.log = lambda values, step: (sent.append((step, values)), log(values, step))
    with recording(trainer) as rounds:
        result = trainer.train()
    return trainer, rounds, result, sent


def test_evaluations_come_first_last_and_every_so_many_steps(run):
    trainer, rounds, *_ = run
    assert [len(played.sequences) for played in rounds] == [7, 12, 12, 7, 12, 12, 7, 12, 7]
    with_evaluation = [
        row["step"] for row in metrics_of(trainer.args.output_dir) if "eval/reward/mean" in row
    ]
    assert with_evaluation == [2, 4, 5]


def test_an_evaluation_is_reported_as_computed_by_hand(run):
    trainer, rounds, result, _ = run
    rows = metrics_of(trainer.args.output_dir)
    start, *_ = rows_of(trainer.args.output_dir)
    assert start.pop("step") == 0
    assert {name.partition("/")[0] for name in start} == {"eval"}
    for played, reported in (
        (rounds[0], start),
        (rounds[3], rows[1]),
        (rounds[6], rows[3]),
        (rounds[8], rows[4]),
        (rounds[8], result),
    ):
        expected = {f"eval/{name}": x for name, x in scored(trainer, played)[2].items()}
        actual = {name: x for name, x in reported.items() if name.startswith("eval/")}
        assert actual == close(expected)
    assert rows[1]["eval/reward/mean"] != result["eval/reward/mean"]


def test_the_summary_compares_the_first_evaluation_with_the_last(run):
    trainer, rounds, *_ = run
    (_, _, before), (_, _, after) = scored(trainer, rounds[0]), scored(trainer, rounds[8])
    with open(f"{trainer.args.output_dir}/summary.md") as file:
        summary = file.read()
    assert before["reward/mean"] != after["reward/mean"]
    for name in before:
        assert f"| {name} | {before[name]:.3f} | {after[name]:.3f} |" in summary


def test_the_learning_rate_falls_from_step_to_step(run):
    rows = metrics_of(run[0].args.output_dir)
    expected = [0.02 * (1 - step / 5) for step in range(5)]
    assert [row["learning_rate"] for row in rows] == pytest.approx(expected)


def test_the_trackers_get_the_metrics_of_every_step(run):
    trainer, *_, sent = run
    *others, last = rows_of(trainer.args.output_dir)
    # The evaluation after training comes later than the last step.
    after = {name: last[name] for name in last if name.startswith("eval/")}
    rows = [*others, {name: x for name, x in last.items() if name not in after}]
    rows.append({"step": 5, **after})
    assert [step for step, _ in sent] == [row.pop("step") for row in rows] == [0, 1, 2, 3, 4, 5, 5]
    assert [values for _, values in sent] == [close(row) for row in rows]


def test_the_first_episodes_of_a_step_are_written(run):
    trainer, rounds, *_ = run
    for step, played in ((1, rounds[1]), (2, rounds[2]), (5, rounds[7])):
        with open(f"{trainer.args.output_dir}/completions/step_{step:06d}.jsonl") as file:
            records = [json.loads(line) for line in file]
        episodes, scores, _ = scored(trainer, played)
        prompts = trainer.tokenizer.batch_decode([e.prompt for e in episodes])
        texts = [text_of(episode, trainer.tokenizer) for episode in episodes]
        rewards = {reward.__name__: reward(prompts, texts) for reward in REWARDS}
        assert len(records) == 3
        for i, record in enumerate(records):
            assert record["prompt"] == prompts[i]
            assert record["completion"] == texts[i]
            assert record["score"] == pytest.approx(scores[i].item(), abs=1e-6)
            assert record["rewards"] == close({name: x[i] for name, x in rewards.items()})
            assert record["length"] == len(episodes[i].completion)
            assert record["finished"] is episodes[i].finished


def test_the_first_episodes_of_every_evaluation_are_written(run):
    trainer, rounds, *_ = run
    folder = Path(trainer.args.output_dir, "evaluations")
    assert len(list(folder.iterdir())) == 4
    for step, played in ((0, rounds[0]), (2, rounds[3]), (4, rounds[6]), (5, rounds[8])):
        lines = (folder / f"step_{step:06d}.jsonl").read_text().splitlines()
        texts = [text_of(episode, trainer.tokenizer) for episode in played.episodes(ENDS)]
        assert [json.loads(line)["completion"] for line in lines] == texts[:3]


def test_what_a_run_was_started_with_is_written(run):
    written = json.loads(Path(run[0].args.output_dir, "run.json").read_text())
    assert (written["algorithm"], written["num_steps"]) == ("PPO", 5)
    (start,) = written["starts"]
    assert start["after_step"] == 0 and start["device"] == "CPU"
    assert start["versions"]["torch"] == torch.__version__
    assert start["command"] == shlex.join(sys.orig_argv)
    assert start["kernels"] == {op: kernels["CPU"] for op, kernels in fastpg.kernels_of().items()}
    assert f"threads: {torch.get_num_threads()}, processes: 1" in start["machine"]
    age = datetime.now().astimezone() - datetime.fromisoformat(start["date"])
    assert 0 <= age.total_seconds() < 3600


def test_the_pace_is_that_of_the_step(run):
    trainer, rounds, *_ = run
    training = [played for played in rounds[1:-1] if len(played.sequences) == 12]
    for row, played in zip(metrics_of(trainer.args.output_dir), training, strict=True):
        phases = [row[f"time/{phase}"] for phase in ("generate", "score", "logprob", "train")]
        assert min(phases) > 0
        assert row["time/step"] == pytest.approx(sum(phases))
        tokens = sum(len(episode.completion) for episode in played.episodes(ENDS))
        assert row["tokens_per_second"] == pytest.approx(tokens / row["time/step"])


def test_the_time_of_a_phase_is_that_of_its_own_step(tmp_path):
    """The reward of the second of three steps sleeps."""
    calls = []

    def reward(completions):
        calls.append(1)
        if len(calls) == 3:
            time.sleep(0.5)
        return [0.0] * len(completions)

    trainer = make_trainer(tmp_path, reward, num_steps=3, num_ppo_epochs=1)
    with recording(trainer):
        trainer.train()
    first, second, third = (row["time/score"] for row in metrics_of(tmp_path))
    assert second > 0.5 > max(first, third)


def test_equal_rewards_are_reported_as_such(tmp_path):
    """A score that does not vary has no spread, and equal completions are one."""
    trainer = make_trainer(
        tmp_path, lambda completions: [2.5] * len(completions), dataset=PROMPTS[:1] * 6,
        temperature=1e-4, num_eval_samples=6,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval/reward/mean"] == 2.5
    assert metrics["eval/reward/std"] == 0.0
    assert metrics["eval/completions/distinct"] == pytest.approx(1 / 6)


def documented_metrics():
    """The keys that the table in docs/trainer.md explains."""
    text = (Path(__file__).parents[2] / "docs/trainer.md").read_text()
    table = text.partition("| key | what it is |")[2].partition("\n\n")[0]
    return {
        key for line in table.splitlines() for key in re.findall("`([^`]+)`", line.split(" | ")[0])
    }


def test_every_metric_is_documented_and_every_documented_one_is_written(tmp_path):
    runs = {
        "ppo": {"adaptive_kl_target": 6.0, "target_kl": 9.0},
        "grpo": {"num_generations": 5, "kl_coef": 0.1},
    }
    written = {"eval/..."}
    for algorithm, settings in runs.items():
        directory = tmp_path / algorithm
        make_trainer(directory, algorithm=algorithm, num_steps=1, **settings).train()
        written |= {key for row in rows_of(directory) for key in row}
    name = "share_of_praise"
    written = {key.replace(name, "<function>") for key in written}
    evaluated = {key for key in written if key.startswith("eval/")} - {"eval/..."}
    assert {key.removeprefix("eval/") for key in evaluated} < documented_metrics()
    assert written - evaluated == documented_metrics()
