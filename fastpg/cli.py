"""The `fastpg` command: what is installed, and commands that train or compare."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import fastpg
from fastpg.bench.command import bench
from fastpg.doctor.installed import TRAINER, absent_packages, checkup, kernels
from fastpg.integrations.verify_command import verify
from fastpg.report.command import report

if TYPE_CHECKING:
    from fastpg.trainer import PPOTrainer
    from fastpg.trainer.options import RunConfig

# Exit codes besides 0: for input that cannot be used; for a signal, whose number is added.
REJECTED = 2
STOPPED = 128

DESCRIPTION = "Without a command, print which kernel serves which op on which device."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `fastpg` command.

    Args:
        argv: The arguments after `fastpg`. None: those of the process.

    Returns:
        The exit code: 0, 1 if a check fails, 2 for input that cannot be used, 130 for Ctrl-C, 143
        for SIGTERM.

    Example:
        >>> from fastpg.cli import main
        >>> main(["train", "--algorithm", "grpo", "--num_steps", "10"])  # doctest: +SKIP
        0
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    # These read their own flags, whose names are those of the settings.
    if argv[:1] == ["verify"]:
        return verify(argv[1:])
    if argv[:1] == ["bench"]:
        return bench(argv[1:])
    if argv[:1] == ["report"]:
        return report(argv[1:])
    if argv[:2] == ["doctor", "mismatch"]:
        return run("doctor mismatch", argv[2:])
    if argv and argv[0] in COMMANDS:
        return run(argv[0], argv[1:])
    parser = argparse.ArgumentParser("fastpg", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"fastpg {fastpg.__version__}")
    # This lists the commands in the help and refuses other words.
    commands = parser.add_subparsers(title="commands")
    commands.add_parser("train", help="train a policy; `fastpg train --help` lists the settings")
    commands.add_parser("reward-model", help="train a reward model on preference pairs")
    commands.add_parser("report", help="write an HTML page about one or several runs of train")
    commands.add_parser("bench", help="time fastpg against PyTorch and other packages, here")
    commands.add_parser("verify", help="compare a trainer's own functions with fastpg's")
    commands.add_parser(
        "doctor",
        help="print what is installed, and what is missing for what; "
        "`fastpg doctor mismatch` says why log-probs differ from a rollout engine's",
        description="Print what is installed. `fastpg doctor mismatch --help` tells of another "
        "command: why log-probs differ from a rollout engine's.",
    ).set_defaults(text=checkup)
    parser.set_defaults(text=kernels)
    print(parser.parse_args(argv).text())
    return 0


def train(argv: Sequence[str]) -> int:
    """Run `fastpg train`.

    Args:
        argv: The arguments after `fastpg train`: flags named as the settings of `PPOConfig`.

    Returns:
        The exit code: 0, or 1 if a check of `--check` fails.

    Raises:
        InputError: They cannot be used.
    """
    from fastpg.trainer.check.command import check_run
    from fastpg.trainer.options import RunConfig, read_options

    given = read_options(argv, "train", RunConfig)
    is_check = given.pop("check", False)
    trainer, resume = _build_trainer(given)
    if is_check:
        return check_run(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return 0


def train_reward_model(argv: Sequence[str]) -> int:
    """Run `fastpg reward-model`.

    Args:
        argv: The arguments after it: flags named as the settings of `RewardConfig`.

    Returns:
        The exit code: 0.

    Raises:
        InputError: They cannot be used.
    """
    from transformers.utils.logging import disable_progress_bar

    from fastpg.trainer import RewardConfig, RewardTrainer
    from fastpg.trainer.data.datasets import load_pairs
    from fastpg.trainer.options import read_options
    from fastpg.trainer.settings.config import from_mapping

    disable_progress_bar()
    args = from_mapping(RewardConfig, read_options(argv, "reward-model", RewardConfig))
    model, dataset = _needed(model=args.model, dataset=args.dataset)
    say(f"Reading {dataset} ...")
    train = load_pairs(dataset)
    held_out = load_pairs(args.eval_dataset) if args.eval_dataset else None
    say(f"Loading {model}, to be trained on {len(train)} pairs ...")
    RewardTrainer(model, args, train_dataset=train, eval_dataset=held_out).train()
    return 0


def say(text: str) -> None:
    """Print what is being done, on the first process only.

    Args:
        text: The words.
    """
    # `accelerate launch` sets this variable. The accelerator itself takes seconds to be there.
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def find_mismatch(argv: Sequence[str]) -> int:
    """Run `fastpg doctor mismatch`.

    Args:
        argv: The arguments after it.

    Returns:
        The exit code: 0.

    Raises:
        InputError: They cannot be used.
    """
    from fastpg.doctor.mismatch_command import find_mismatch

    find_mismatch(argv)
    return 0


COMMANDS = {"train": train, "reward-model": train_reward_model, "doctor mismatch": find_mismatch}


def run(command: str, argv: Sequence[str]) -> int:
    """Run a command. Input that cannot be used is one sentence on stderr.

    Args:
        command: A key of `COMMANDS`.
        argv: The arguments after it.

    Returns:
        The exit code: 0, 1 if a check fails, 2 for input that cannot be used, 130 for Ctrl-C, 143
        for SIGTERM.
    """
    if not {"-h", "--help", "--version"} & set(argv):
        say("Loading torch, transformers and accelerate ...")
    # The trainer is an extra, so it is imported only here.
    try:
        from fastpg.trainer import InputError
    except ImportError as error:
        packages = absent_packages(TRAINER) or [str(error.name)]
        print(
            f"fastpg {command} needs {', '.join(packages)}: pip install {' '.join(packages)}",
            file=sys.stderr,
        )
        return REJECTED
    # Completions may hold what an old terminal cannot show, which is no reason to end a run.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return COMMANDS[command](argv)
    except InputError as error:
        print(f"fastpg {command}: {error}", file=sys.stderr)
        return REJECTED
    except KeyboardInterrupt as interruption:
        # Before the run has begun, and for a second Ctrl-C, there is no word of what was saved.
        number = getattr(interruption, "number", signal.SIGINT)
        print(f"fastpg {command}: stopped by {signal.Signals(number).name}.", file=sys.stderr)
        return STOPPED + number


def _build_trainer(given: dict[str, Any]) -> tuple["PPOTrainer", "str | bool"]:
    """Build the user's own run; without a model, dataset and reward, the embedded task.

    Args:
        given: What `read_options` read.

    Returns:
        The trainer, and what `train` is to resume from.
    """
    # These imports take seconds, and need the extra that `run` has checked for.
    from transformers.utils.logging import disable_progress_bar

    from fastpg.tasks import reviews, rlhf
    from fastpg.trainer.options import RunConfig, settings_of_run
    from fastpg.trainer.settings.config import algorithm_key, from_mapping

    disable_progress_bar()
    task = rlhf if given.get("rlhf") else reviews
    preferred = task.preferred_settings(algorithm_key(str(given.get("algorithm", "ppo"))))
    if "micro_batch_tokens" in given:
        preferred["micro_batch_size"] = None
    resume: str | bool = False
    if "resume" in given:
        default = RunConfig.output_dir if _is_own(given) else preferred["output_dir"]
        given, resume = settings_of_run(given, default)
    if _is_own(given):
        return _own_trainer(from_mapping(RunConfig, given)), resume
    # The given settings come last: they override those that the task prefers.
    args = from_mapping(RunConfig, preferred | given)
    title = args.resolved().algorithm.title
    if args.rlhf:
        say(rlhf.INTRODUCTION.format(algorithm=title))
        return rlhf.build_trainer(args, is_resumed=resume is not False), resume
    say(reviews.INTRODUCTION.format(algorithm=title))
    return reviews.build_trainer(args), resume


def _is_own(given: dict[str, Any]) -> bool:
    """Whether the settings are about the user's own model, dataset or reward."""
    from fastpg.trainer.options import OWN

    return any(given.get(name) for name in OWN)


def _own_trainer(args: "RunConfig") -> "PPOTrainer":
    """Build the trainer of a user's own model, dataset and reward, all three of which it needs."""
    from fastpg.trainer import PPOTrainer
    from fastpg.trainer.data.datasets import load_prompts

    model, dataset, rewards = _needed(model=args.model, dataset=args.dataset, reward=args.reward)
    say(f"Reading {dataset} ...")
    train = load_prompts(dataset, args.prompt_column)
    held_out = load_prompts(args.eval_dataset, args.prompt_column) if args.eval_dataset else None
    say(f"Loading {model}, to be trained on {len(train)} prompts ...")
    return PPOTrainer(model, rewards, args, train_dataset=train, eval_dataset=held_out)


def _needed(**settings: Any) -> list[Any]:
    """Return the values of settings that are needed; refuse a command line that lacks one."""
    from fastpg.trainer import InputError

    missing = [f"--{name}" for name, value in settings.items() if value is None]
    if missing:
        raise InputError(f"Your own run also needs {' and '.join(missing)}.")
    return list(settings.values())
