"""Where a run goes besides its files: TensorBoard, Weights & Biases, callbacks."""

import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_trainer import make_trainer, metrics_of, rows_of

from fastpg.tasks import reviews, rlhf
from fastpg.trainer import InputError, PPOConfig, TrainerCallback
from fastpg.trainer.report.trackers import checked_trackers

# What the package has that the trainer calls.
WANDB = """
import json
from pathlib import Path

class Table:
    def __init__(self, columns, data, dataframe=None):
        self.columns, self.data = columns, data

class Run:
    def __init__(self, path):
        self.path = path

    def log(self, values, step):
        table = lambda x: {"columns": x.columns, "data": x.data} if isinstance(x, Table) else x
        self.write(step=step, values={name: table(x) for name, x in values.items()})

    def write(self, **line):
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\\n")

    def finish(self):
        self.write(finished=True)

def init(**settings):
    if settings["project"] == "forbidden":
        raise RuntimeError("no API key,\\nlog in")
    run = Run(Path(settings["dir"]) / "sent.jsonl")
    run.write(init=settings)
    return run
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package that writes down what it is told."""
    folder = tmp_path / "packages/wandb"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(WANDB)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    yield
    sys.modules.pop("wandb", None)


def test_wandb_gets_settings_metrics_and_samples_and_knows_a_run_again(wandb, tmp_path):
    out = tmp_path / "out"
    report_to = {"report_to": "wandb", "num_logged_completions": 2, "num_ppo_epochs": 1}
    make_trainer(out, num_steps=1, **report_to).train()
    make_trainer(out, num_steps=2, **report_to).train(resume_from_checkpoint=True)
    first, *sent = [json.loads(line) for line in (out / "sent.jsonl").read_text().splitlines()]
    settings = first["init"]
    assert (settings["project"], settings["name"], settings["resume"]) == ("fastpg", "out", "allow")
    assert settings["config"]["learning_rate"] == 1e-3
    (again,) = (line["init"] for line in sent if "init" in line)
    assert again["id"] == settings["id"]
    assert sum("finished" in line for line in sent) == 2
    logged = [(line["step"], line["values"]) for line in sent if "values" in line]
    rows = rows_of(out)
    metrics = [(step, values) for step, values in logged if "samples" not in next(iter(values))]
    assert [step for step, _ in metrics] == [0, 1, 1, 2, 2]
    assert metrics[3][1].items() <= rows[2].items()
    samples = [
        (step, name, table)
        for step, values in logged
        for name, table in values.items()
        if name.startswith("samples/")
    ]
    assert [(step, name.removeprefix("samples/")) for step, name, _ in samples] == [
        (0, "evaluation"), (1, "completions"), (1, "evaluation"),
        (2, "completions"), (2, "evaluation"),
    ]  # fmt: skip
    lines = (out / "completions/step_000001.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    columns, data = samples[1][2]["columns"], samples[1][2]["data"]
    assert [dict(zip(columns, line, strict=True)) for line in data] == [
        {name: record[name] for name in columns} for record in written
    ]
    assert not (out / "tensorboard").exists()


def test_tensorboard_gets_samples_as_a_table(tmp_path):
    def stars(completions):
        return [0.5] * len(completions)

    prompts = [{"prompt": [{"role": "user", "content": "a | b\nc"}]}] * 8
    tokenizer = reviews.build_tokenizer()
    tokenizer.chat_template = "the plot"
    settings = {"num_steps": 1, "num_ppo_epochs": 1, "dataset": prompts, "tokenizer": tokenizer}
    make_trainer(tmp_path, stars, **settings).train()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()
    evaluation, completions = (f"samples/{x}/text_summary" for x in ("evaluation", "completions"))
    assert {*tags["tensors"]} == {evaluation, completions}
    assert [event.step for event in events.Tensors(evaluation)] == [0, 1]
    (text,) = events.Tensors(completions)[0].tensor_proto.string_val
    heading, _, *lines = text.decode().splitlines()
    assert heading == "| prompt | completion | score | length | finished |"
    assert len(lines) == 8
    assert all(line.startswith(r"| user: a \| b<br>c | ") for line in lines)
    assert "reward/mean" in tags["scalars"]


def test_a_run_may_be_reported_to_nobody(tmp_path):
    make_trainer(tmp_path, num_steps=1, num_ppo_epochs=1, report_to="none").train()
    assert not (tmp_path / "tensorboard").exists()
    assert len(metrics_of(tmp_path)) == 1
    assert "| tensorboard |" not in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["tensorbord"], "report_to must be of tensorboard, wandb or none, not 'tensorbord'; did "),
        (["none", "wandb"], "report_to is none or names trackers, not both: none, wandb."),
        (["wandb"], "report_to=wandb needs the package wandb: pip install wandb."),
    ],
)
def test_trackers_that_cannot_be_used_are_refused_before_the_model_is_loaded(names, said):
    with pytest.raises(InputError, match=said.replace("?", r"\?")):
        make_trainer("out", model="no/model", report_to=names)


def test_trackers_are_named_once_or_not_at_all():
    assert checked_trackers(["tensorboard", "tensorboard"]) == ["tensorboard"]
    assert checked_trackers(["none"]) == []


def test_a_tracker_that_refuses_the_run_is_one_sentence(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "forbidden")
    trainer = make_trainer(tmp_path / "out", num_steps=1, report_to=["wandb"])
    with pytest.raises(InputError, match=r"\(report_to=wandb\): no API key, log in$"):
        trainer.train()


def test_a_tracker_that_fails_costs_only_what_it_was_sent(tmp_path, capsys):
    trainer = make_trainer(tmp_path, num_steps=2, num_ppo_epochs=1)
    log = trainer.accelerator.log

    def failing(values, step):
        if step == 1:
            raise RuntimeError("no route")
        log(values, step=step)

    trainer.accelerator.log = failing
    trainer.train()
    printed = capsys.readouterr().out
    assert printed.count("Nothing is sent to tensorboard from step 1 on: no route.") == 1
    assert len(metrics_of(tmp_path)) == 2


class Diary(TrainerCallback):
    def __init__(self):
        self.lines = []

    def on_step(self, step, metrics):
        self.lines.append(("step", step, metrics))

    def on_evaluate(self, step, metrics):
        self.lines.append(("evaluate", step, metrics))

    def on_save(self, step, directory):
        assert (directory / ("config.json" if directory.name == "model" else "state.json")).exists()
        self.lines.append(("save", step, directory.name))


def with_callbacks(output_dir, *callbacks, **settings):
    trainer = make_trainer(output_dir, num_ppo_epochs=1, **settings)
    trainer.callbacks = callbacks
    return trainer


def test_callbacks_hear_of_steps_evaluations_and_saves_in_order(tmp_path):
    diary, silent = Diary(), TrainerCallback()
    with_callbacks(tmp_path, diary, silent, num_steps=3, eval_steps=2, save_steps=2).train()
    assert [line[:2] for line in diary.lines] == [
        ("evaluate", 0), ("step", 1), ("step", 2), ("evaluate", 2), ("save", 2), ("step", 3),
        ("save", 3), ("save", 3), ("evaluate", 3),
    ]  # fmt: skip
    assert [line[2] for line in diary.lines if line[0] == "save"] == [
        "checkpoint-2", "checkpoint-3", "model",
    ]  # fmt: skip
    rows = rows_of(tmp_path)
    for kind, step, metrics in diary.lines:
        if kind == "step":
            assert metrics.items() <= rows[step].items() and "reward/mean" in metrics
        if kind == "evaluate":
            expected = {name: x for name, x in rows[step].items() if name.startswith("eval/")}
            assert metrics == expected


def test_a_callback_that_raises_ends_the_run_and_loses_no_step(tmp_path):
    class Enough(TrainerCallback):
        def on_step(self, step, metrics):
            if step == 2:
                raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        with_callbacks(tmp_path, Enough(), num_steps=4).train()
    assert (Path(tmp_path) / "LATEST").read_text() == "checkpoint-2"
    assert len(metrics_of(tmp_path)) == 2


@pytest.mark.parametrize("task", [reviews, rlhf])
def test_a_demo_refuses_them_before_it_teaches_its_model(task, monkeypatch):
    monkeypatch.setattr(reviews, "supervised_model", lambda seed: pytest.fail("It taught one."))
    with pytest.raises(InputError, match="report_to must be of"):
        task.build_trainer(PPOConfig(report_to=["tensorbord"]))
