"""Settings from the command line: flags, in groups, and the config file."""

import argparse
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import fastpg
from fastpg.trainer.report.display import COLUMNS
from fastpg.trainer.rewards.reward_trainer import RewardConfig
from fastpg.trainer.run.checkpoint import run_of
from fastpg.trainer.settings.config import PPOConfig, RunSettings
from fastpg.trainer.settings.groups import (
    CreditSettings,
    ModelSettings,
    OptimizerSettings,
    ScoreSettings,
    VllmSettings,
    WatchSettings,
    option,
)
from fastpg.trainer.settings.parsing import InputError, did_you_mean, load_yaml

OWN = ("model", "dataset", "reward", "prompt_column", "eval_dataset", "value_model")
"""The settings of a user's own run, which the embedded task has no use for."""


@dataclass
class RunConfig(PPOConfig):
    """`PPOConfig`, and by name what Python hands to `PPOTrainer` as objects.

    Args:
        model: Directory or name of a causal language model.
        dataset: Prompts: a .jsonl, .json, .csv or .parquet file, a directory of the package
            `datasets`, or a name on the Hub.
        prompt_column: The column of the prompts. None: "prompt", "messages" or "conversations".
        eval_dataset: The same for evaluation. None: the first training prompts.
        reward: The rewards, each as "module:function" or the directory of a reward model.
        task: An embedded task instead of a model, dataset and reward: "reviews".
        rlhf: Whether the embedded task learns its reward from preference pairs first.
    """

    model: str | None = option(None, "directory or name of a causal language model")
    dataset: str | None = option(
        None, "prompts: a jsonl, json, csv or parquet file, a datasets directory or Hub name"
    )
    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "module:function or the directory of a reward model; may be given several times"
        },
    )
    prompt_column: str | None = option(
        None, "column of the prompts; by default prompt, messages or conversations"
    )
    eval_dataset: str | None = option(None, "likewise; by default the first training prompts")
    task: str | None = option(
        None, "an embedded task, 'reviews', which is what runs without a model, dataset and reward"
    )
    rlhf: bool = option(False, "let the embedded task learn its reward from preference pairs first")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in (None, "reviews"):
            raise InputError(f"task must be reviews, not {self.task!r}.")
        own = [name for name in OWN if getattr(self, name)]
        if own and (self.task or self.rlhf):
            embedded = "task" if self.task else "rlhf"
            raise InputError(f"{embedded} is the embedded task, which has its own {own[0]}.")


GROUPS = {
    RunConfig: "your run",
    RunSettings: "algorithm, steps and rollouts",
    ModelSettings: "model",
    VllmSettings: "vLLM",
    OptimizerSettings: "optimizer",
    CreditSettings: "credit and loss",
    ScoreSettings: "from rewards to scores",
    WatchSettings: "evaluation and files",
    RewardConfig: "your reward model",
}
"""The titles of groups of options, by the class that declares their settings."""

_COLUMN_LINES = "\n".join(f"  {column.heading:9} {column.meaning}" for column in COLUMNS)


class Command(NamedTuple):
    """What the help of a command says besides its options."""

    usage: str
    description: str
    epilog: str


COMMANDS = {
    "train": Command(
        "fastpg train --model DIR --dataset FILE --reward MODULE:FUNCTION [options]",
        "Train a policy. Without a model, dataset and reward, an embedded task runs.\n"
        "Flags override the settings of the config file.",
        f"""\
example:
  fastpg train --model Qwen/Qwen3-0.6B --dataset prompts.jsonl \\
    --reward my_rewards:brevity --algorithm grpo --learning_rate 1e-6

  prompts.jsonl has a line {{"prompt": "Name a color."}} for each prompt;
  my_rewards.py has
    def brevity(completions):
        return [-len(text) for text in completions]

what a run shows of each step:
{_COLUMN_LINES}

docs/trainer.md explains datasets, rewards, models and files.""",
    ),
    "reward-model": Command(
        "fastpg reward-model --model DIR --dataset FILE [options]",
        "Train a reward model on preference pairs. Flags override the config file.",
        """\
example:
  fastpg reward-model --model Qwen/Qwen3-0.6B --dataset pairs.jsonl

  pairs.jsonl has lines such as {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}""",
    ),
}
"""The commands that have settings."""


class _Parser(argparse.ArgumentParser):
    """A parser that raises `InputError` where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[0].upper()}{message[1:]}.")


def read_options(argv: Sequence[str], command: str, config_class: type) -> dict[str, Any]:
    """Read the settings that a command line gives. Flags override the `--config` file.

    Args:
        argv: The arguments after the command.
        command: A key of `COMMANDS`.
        config_class: The dataclass of the settings.

    Returns:
        The values of the settings that were given, by name. Values may still be text.

    Raises:
        InputError: A flag is unknown (the sentence names the nearest one), or the file cannot be
            read.
    """
    parser = _parser(command, config_class)
    # argparse's own error for an unknown flag would not name the nearest known one.
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        raise _refusal(unknown[0], [setting.name for setting in fields(config_class)])
    values = vars(flags)
    path = values.pop("config")
    # Both are still text or YAML's idea of a type; `from_mapping` converts them.
    from_file = load_yaml(path) if path else {}
    return from_file | values


def _refusal(written: str, known: Sequence[str]) -> InputError:
    """Return what is to be said of a word on the command line that is no flag and no value."""
    name = written.lstrip("-").partition("=")[0]
    # A negative number has a dash too.
    if not written.startswith("-") or name[:1].isdigit():
        return InputError(
            f"{written!r} belongs to no setting: a value stands behind its --name, and those of a "
            "list have commas between them."
        )
    if name in known:
        return InputError(f"A setting has two dashes: --{name}, not {written}.")
    return InputError(f"Unknown setting {name!r}{did_you_mean(name, known)}")


def _parser(command: str, config_class: type) -> _Parser:
    """Return the parser of `--config` and a flag for each setting; for a run, more."""
    hints = typing.get_type_hints(config_class)
    words = COMMANDS[command]
    parser = _Parser(
        usage=words.usage,
        description=words.description,
        epilog=words.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An abbreviated flag would change its meaning when a setting is added.
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastpg {fastpg.__version__}")
    settings = {setting.name: setting for setting in fields(config_class)}
    for owner, title in GROUPS.items():
        if issubclass(config_class, owner):
            group = parser.add_argument_group(title)
            for name in owner.__annotations__:
                _add_flag(group, settings[name], hints[name])
    group = parser.add_argument_group("settings from files")
    group.add_argument("--config", metavar="FILE", help="YAML file of `name: value` settings")
    if issubclass(config_class, PPOConfig):
        group.add_argument(
            "--resume",
            metavar="DIR",
            nargs="?",
            const=True,
            default=argparse.SUPPRESS,
            help="go on with the run in DIR, or from one of its checkpoints, with its settings; "
            "without DIR, with that in output_dir",
        )
        parser.add_argument(
            "--check",
            action="store_true",
            default=argparse.SUPPRESS,
            help="make one rollout, check what can go wrong, and write nothing; the exit code is 1 "
            "if a check fails",
        )
    return parser


def _add_flag(group: Any, setting: Field, hint: Any) -> None:
    """Add the flag of a setting to a group of the parser; argparse hides the type of groups."""
    text = setting.metadata["help"]
    if setting.default_factory is not MISSING:
        text += f" (default: {', '.join(setting.default_factory())})"
    elif setting.default is not None:
        text += f" (default: {setting.default})"
    # A list can be given piece by piece: of another setting, the last value counts.
    is_list = any(typing.get_origin(kind) is list for kind in (hint, *typing.get_args(hint)))
    group.add_argument(
        f"--{setting.name}",
        action="append" if is_list else "store",
        # A switch needs no value: `--trust_remote_code` is true.
        nargs="?" if hint is bool else None,
        const=True if hint is bool else None,
        metavar="true|false" if hint is bool else setting.name.rpartition("_")[2].upper(),
        # SUPPRESS leaves out what nobody gave, so that defaults do not override the file.
        default=argparse.SUPPRESS,
        help=text,
    )


def settings_of_run(given: dict[str, Any], default: str) -> tuple[dict[str, Any], str]:
    """Read the settings of the run that `--resume` names.

    Args:
        given: The values of `read_options`, "resume" among them. They override those of the run.
        default: The directory of the run if neither `--resume` nor `--output_dir` gives one.

    Returns:
        The settings by name, and the directory or checkpoint to resume from.

    Raises:
        InputError: There is no run, it was started from Python, or `--output_dir` names another
            place.
    """
    place = given["resume"]
    path = Path(str(given.get("output_dir", default) if place is True else place))
    run = run_of(path)
    if not (run / "config.yaml").exists():
        raise InputError(f"There is no run to resume in {run}.")
    if Path(str(given.get("output_dir", run))).resolve() != run.resolve():
        raise InputError(
            f"The run goes on in {run}, so output_dir cannot be {given['output_dir']}."
        )
    saved = load_yaml(str(run / "config.yaml"))
    # Settings from Python name no model, whose place the embedded task must not take.
    if "model" not in saved and not any(given.get(name) for name in OWN):
        raise InputError(
            f"The run in {run} was started from Python, and is to be resumed there: "
            "train(resume_from_checkpoint=True)."
        )
    settings = saved | given | {"output_dir": str(run)}
    del settings["resume"]
    return settings, str(path)
