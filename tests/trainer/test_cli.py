"""The `fastpg` command: a user's own run, and one plain sentence for what cannot be used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_trainer import metrics_of, tiny_model
from transformers import AutoModelForCausalLM, HfArgumentParser

import fastpg
from fastpg.cli import main
from fastpg.tasks import reviews
from fastpg.trainer import PPOConfig
from fastpg.trainer.run.run_files import save_config
from fastpg.trainer.settings.config import from_mapping

REPOSITORY = Path(__file__).parents[2]
REWARDS = """
def letters(prompts, completions):
    return [len(completion) / 10 for completion in completions]

def constant(completions):
    return [1.0] * len(completions)

def length(prompts, completions, **columns):
    return [float(len(c.split())) for c in completions]

def short(prompts, completions, **columns):
    return [0.0]
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A directory with a model, prompts, a reward and a config."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    reviews.build_tokenizer().save_pretrained("model")
    rows = [json.dumps({"prompt": subject, "id": 1}) for subject in reviews.subjects()[:8]]
    Path("prompts.jsonl").write_text("\n".join(rows))
    Path("my_rewards.py").write_text(REWARDS)
    settings = {"output_dir": "run", "num_steps": 1, "rollout_batch_size": 4, "max_new_tokens": 4}
    Path("run.yaml").write_text(
        yaml.safe_dump(settings) + "learning_rate: 1e-4\nmixed_precision: no\n"
    )
    return tmp_path


def run(*argv: str, cwd: Path = REPOSITORY, **more: str) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": "", **more}
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True
    )


OWN = ["--model", "model", "--dataset", "prompts.jsonl", "--reward", "my_rewards:length"]


@pytest.mark.slow
def test_training_ones_own_model(workspace):
    command = ["-m", "fastpg", "train", *OWN, "--config", "run.yaml", "--num_steps", "2"]
    finished = run(*command, cwd=workspace)
    assert finished.returncode == 0, finished.stderr
    assert "2/2" in finished.stdout
    assert len(metrics_of("run")) == 2  # the flag, not the file
    resolved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert resolved["learning_rate"] == 1e-4
    assert resolved["reward"] == ["my_rewards:length"]
    assert resolved["gamma"] == 1.0
    trained = AutoModelForCausalLM.from_pretrained("run/model").state_dict()
    start = AutoModelForCausalLM.from_pretrained("model").state_dict()
    assert any(not torch.equal(trained[name], start[name]) for name in start)


def test_resume_takes_up_a_run_with_its_settings(workspace, capsys):
    command = ["train", *OWN, "--config", "run.yaml", "--learning_rate", "1e-3"]
    assert main(command) == 0
    assert main(["train", "--resume", "run", "--num_steps", "2"]) == 0
    settings = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (settings["learning_rate"], settings["num_steps"]) == (1e-3, 2)
    assert len(metrics_of("run")) == 2
    assert not Path("run/earlier-1").exists()
    # A finished run has nothing to do but to evaluate and report.
    assert main(["train", "--output_dir", "run", "--resume"]) == 0
    assert main(["train", "--resume", "run/checkpoint-1", "--learning_rate", "1"]) == 2
    assert "was made with learning_rate=0.001, not 1.0" in capsys.readouterr().err
    assert main(["train", "--resume", "nowhere"]) == 2
    assert "There is no run to resume in nowhere." in capsys.readouterr().err
    assert main(["train", "--resume", "run", "--output_dir", "other"]) == 2
    assert "The run goes on in run, so output_dir cannot be other." in capsys.readouterr().err


def test_none_is_no_value_of_a_list_either():
    given = {"reward_weights": ["none"], "stop_strings": ["None"], "save_steps": "None"}
    args = from_mapping(PPOConfig, given)
    assert (args.reward_weights, args.stop_strings, args.save_steps) == (None, None, None)


def test_a_run_from_python_is_not_taken_for_the_embedded_task(workspace, capsys):
    save_config(PPOConfig(), Path("config.yaml"))
    assert main(["train", "--resume", "."]) == 2
    assert "The run in . was started from Python" in capsys.readouterr().err


@pytest.mark.parametrize("weights", [["0.5,2"], ["[0.5, 2]"], ["0.5", "--reward_weights", "2"]])
def test_several_rewards_add_up(workspace, weights):
    rewards = [*OWN, "--reward", "my_rewards:letters", "--reward_weights", *weights]
    assert main(["train", *rewards, "--config", "run.yaml"]) == 0
    settings = yaml.safe_load(Path("run/config.yaml").read_text())
    assert settings["reward"] == ["my_rewards:length", "my_rewards:letters"]
    assert settings["reward_weights"] == [0.5, 2.0]
    (row,) = metrics_of("run")
    parts = (row["rewards/length/mean"], row["rewards/letters/mean"])
    assert row["reward/mean"] == pytest.approx(0.5 * parts[0] + 2 * parts[1])
    # A YAML list is as good as repeated flags.
    assert main(["train", "--config", "run/config.yaml", "--output_dir", "again"]) == 0
    (again,) = metrics_of("again")
    assert again["reward/mean"] == row["reward/mean"]


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("GRPO", "grpo"),
        ("Dr.GRPO", "dr_grpo"),
        ("dr-grpo", "dr_grpo"),
        ("REINFORCE++", "reinforce++"),
        ("Reinforce", "reinforce"),
        ("vanilla policy gradient", "vpg"),
    ],
)
def test_an_algorithm_may_be_spelled_as_its_authors_do(written, key):
    assert PPOConfig(algorithm=written, num_generations=8).algorithm == key


@pytest.mark.parametrize("command", [[], ["train"], ["reward-model"]])
def test_the_version_is_told(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([*command, "--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fastpg {fastpg.__version__}\n"


@pytest.mark.slow
def test_an_ascii_locale_costs_nothing(workspace):
    chat = '{"prompt": [{"role": "user", "content": "東京 😀"}]}'
    Path("prompts.jsonl").write_text(chat, encoding="utf-8")
    Path("model/chat_template.jinja").write_text("the story was")
    ascii_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    flags = [*OWN[:-1], "my_rewards:constant", "--config", "run.yaml"]
    finished = run(
        "-m", "fastpg", "train", *flags, cwd=workspace, PYTHONIOENCODING="ascii", **ascii_locale
    )
    assert finished.returncode == 0, finished.stderr
    assert "The report is not complete" not in finished.stdout
    assert "東京" in Path("run/summary.md").read_text(encoding="utf-8")


def test_without_arguments_the_embedded_task_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reviews, "SUPERVISED_STEPS", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    Path("short.yaml").write_text("num_steps: 1\nkl_coef: 0.3")
    assert main(["train", "--config", "short.yaml"]) == 0
    own = "fastpg train --model DIR --dataset FILE --reward MODULE:FUNCTION"
    assert f"This is the demo; your own run: {own}\n" in capsys.readouterr().out
    resolved = yaml.safe_load(Path("out/reviews/config.yaml").read_text())
    assert (resolved["kl_coef"], resolved["max_new_tokens"]) == (0.3, 12)  # file, then the task
    assert main(["train", "--config", "out/reviews/config.yaml"]) == 0
    moved = "The files of an earlier run in out/reviews are now in out/reviews/earlier-1."
    assert moved in capsys.readouterr().out
    first, again = (Path("out/reviews", d, "completions") for d in ("earlier-1", ""))
    assert (first / "step_000001.jsonl").read_text() == (again / "step_000001.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--learnin_rate", "1"], "Unknown setting 'learnin_rate'; did you mean 'learning_rate'?"),
        (["model"], "'model' belongs to no setting: a value stands behind its --name"),
        ([*OWN, "--reward_weights", "1", "0.5"], "'0.5' belongs to no setting"),
        ([*OWN, "--reward_weights", "1", "-0.5"], "'-0.5' belongs to no setting"),
        (["-num_steps", "5"], "A setting has two dashes: --num_steps, not -num_steps."),
        (["--num-steps", "5"], "Unknown setting 'num-steps'; did you mean 'num_steps'?"),
        (["--eval_dataset", "no.jsonl"], "Your own run also needs --model and --dataset and --rew"),
        (["--num_eval_samples", "192"], "leaves none of the 192 prompts of the task to train on."),
        (["--reward_weights", "1"], "reward_weights has 1 values for 2 reward functions."),
        (["--learning_rate", "fast"], "learning_rate must be a number, not 'fast'."),
        (["--num_steps", "2.5"], "num_steps must be a whole number, not '2.5'."),
        (["--seed", "-1"], "seed must be between 0 and 2**31 - 1, not -1."),
        (["--seed", str(2**70)], f"seed must be between 0 and 2**31 - 1, not {2**70}."),
        (["--output_dir", ""], "output_dir must be text, not ''."),
        (["--gamma", "1.5"], "gamma must be between 0 and 1, not 1.5."),
        (["--algorithm", "dapoo"], "Unknown algorithm 'dapoo'; did you mean 'dapo'?"),
        (["--mixed_precision", "fp8"], "mixed_precision must be no, bf16 or fp16, not 'fp8'."),
        (["--config", "no.yaml"], "Cannot read the config file no.yaml: No such file"),
        (
            ["--config", "typo.yaml"],
            "Unknown setting 'lerning_rate'; did you mean 'learning_rate'?",
        ),
        (["--config", "list.yaml"], "The config file list.yaml must hold `name: value` lines."),
        (["--config", "twice.yaml"], "The config file gives seed twice."),
        (["--config", "deep.yaml"], "The config file deep.yaml has too many brackets"),
        (["--config", "broken.yaml"], "The config file broken.yaml is not valid YAML at line 1."),
        (["--model", "model"], "Your own run also needs --dataset and --reward."),
        ([*OWN, "--dataset", "none"], "Your own run also needs --dataset."),
        ([*OWN, "--model", "./no"], "Cannot load a causal language model from './no': "),
        ([*OWN, "--dataset", "no.jsonl"], "Cannot read the dataset no.jsonl: No such file"),
        ([*OWN, "--dataset", "empty.jsonl"], "The dataset empty.jsonl is empty."),
        ([*OWN, "--dataset", "bad.jsonl"], "bad.jsonl, line 3: no 'prompt'"),
        ([*OWN, "--dataset", "my_rewards.py"], "my_rewards.py, line 2: not JSON"),
        ([*OWN, "--reward", "length"], "A reward is module:function or the directory of"),
        ([*OWN, "--reward", "./my_rewards.py:length"], "A reward is module:function or the"),
        ([*OWN, "--reward", "nowhere:f"], "Cannot import the module of the reward 'nowhere:f'"),
        (
            [*OWN, "--reward", "my_rewards:lenght"],
            "has no function 'lenght'; did you mean 'length'",
        ),
        ([*OWN, "--config", "run.yaml", "--reward", "my_rewards:short"], "Reward short returned 1"),
    ],
)
def test_bad_input_is_one_sentence(workspace, capsys, flags, sentence):
    Path("typo.yaml").write_text("lerning_rate: 1")
    Path("list.yaml").write_text("- 1")
    Path("broken.yaml").write_text("a: [")
    Path("twice.yaml").write_text("seed: 1\nseed: 2")
    Path("deep.yaml").write_text("[" * 1000)
    Path("empty.jsonl").write_text("\n")
    Path("bad.jsonl").write_text('{"prompt": "the plot"}\n\n{"text": "was"}')
    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastpg train: ")
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("task", [[], ["--rlhf"]])
def test_a_directory_that_cannot_be_made_is_refused_before_a_model_is_taught(
    task, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(reviews, "supervised_model", lambda seed: pytest.fail("it is taught"))
    (tmp_path / "file").touch()
    assert main(["train", *task, "--output_dir", str(tmp_path / "file" / "run")]) == 2
    assert "Cannot write to" in capsys.readouterr().err


def test_a_tokenizer_without_eos_is_refused(workspace, capsys):
    settings = json.loads(Path("model/tokenizer_config.json").read_text())
    del settings["eos_token"]
    Path("model/tokenizer_config.json").write_text(json.dumps(settings))
    assert main(["train", *OWN]) == 2
    assert "The tokenizer has no EOS token" in capsys.readouterr().err


@pytest.mark.slow
def test_bad_input_has_no_traceback_and_exit_code_2(workspace):
    finished = run("-m", "fastpg", "train", "--seeed", "1", cwd=workspace)
    assert finished.returncode == 2
    assert finished.stderr == "fastpg train: Unknown setting 'seeed'; did you mean 'seed'?\n"


WITHOUT_EXTRA = """
import sys
sys.modules.update({"transformers": None, "accelerate": None, "yaml": None, "rich": None})
import fastpg
from fastpg.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


def test_kernels_are_listed_without_the_trainer_extra():
    finished = run("-W", "ignore", "-c", WITHOUT_EXTRA)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("op ")
    assert "token_logprobs" in finished.stdout
    assert f"torch {torch.__version__}" in finished.stdout
    assert "C++ extension: " in finished.stdout


def test_train_without_the_extra_says_what_to_install():
    finished = run("-c", WITHOUT_EXTRA, "train")
    assert finished.returncode == 2
    assert "pip install transformers accelerate rich pyyaml\n" in finished.stderr
    assert finished.stderr.count("\n") == 1


HELP = """
usage: fastpg train --model DIR --dataset FILE --reward MODULE:FUNCTION [options]
Without a model, dataset and reward, an embedded task runs.
your run:
  --model MODEL
  --dataset DATASET
  --reward REWARD
optimizer:
  --learning_rate RATE
example:
  fastpg train --model Qwen/Qwen3-0.6B --dataset prompts.jsonl
  KL        to the starting model, nats per completion
"""


def test_the_help_shows_an_example_groups_and_the_columns(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    places = [text.find(line) for line in HELP.strip().splitlines()]
    assert -1 not in places and places == sorted(places)
    assert "Args:" not in text and "Loading" not in text
    assert text.count("your run:") == text.count("optimizer:") == 1


def test_a_run_says_what_it_does_from_the_start(workspace, capsys):
    assert main(["train", *OWN, "--config", "run.yaml", "--eval_steps", "1"]) == 0
    said = [
        "Loading torch, transformers and accelerate ...",
        "Reading prompts.jsonl ...",
        "Loading model, to be trained on 8 prompts ...",
        "writing checkpoint 0, to see that the model can be saved ...",
        "evaluating the starting model ...",
        "step    0/1  eval",
        "step 1/1: sampling completions ...",
        "step 1: evaluating ...",
        "step    1/1  reward",
        "KL: to the starting model, nats per completion; clipped: tokens held at",
        "evaluating the trained model ...",
        "Written to run: model",
        "Kernels on CPU: ",
        " Evaluation ",
        " Samples ",
    ]
    text = capsys.readouterr().out
    places = [text.find(line) for line in said]
    assert -1 not in places and places == sorted(places)


def test_import_is_light():
    code = "import fastpg, sys; assert not {'transformers', 'accelerate', 'rich'} & {*sys.modules}"
    assert run("-c", code).returncode == 0


def test_config_is_a_plain_dataclass_for_other_parsers():
    (config,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(
        ["--learning_rate", "1e-4", "--cliprange_value", "0.2"]
    )
    assert config == PPOConfig(learning_rate=1e-4, cliprange_value=0.2)
