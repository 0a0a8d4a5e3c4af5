"""`fastpg doctor mismatch`: its flags, and the models and files that they name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from fastpg.integrations.verify_command import available, positive
from fastpg.trainer.models.loading import load_policy, load_tokenizer
from fastpg.trainer.rollouts.sampling import Sampling
from fastpg.trainer.settings.parsing import InputError
from fastpg.trainer.settings.ranges import Dtype

from .mismatch import MismatchReport, corrections_of, diagnose
from .prompts import forms_of
from .rollouts import Rollout, load_rollouts
from .scoring import Scorer

DESCRIPTION = """\
Say where the log-ratios of a trainer to a rollout engine come from: temperature, kept mass, bf16
logits, padded vocabulary, prompts (chat template, BOS) or batch shape. ROLLOUTS is a .jsonl or
.parquet file with a completion a row: prompt_token_ids, token_ids and logprobs (or as TRL and verl
name them), and optionally the prompt's messages or text. The model is the one that sampled them."""

TOKENS = 1024


def find_mismatch(argv: Sequence[str]) -> None:
    """Run `fastpg doctor mismatch`.

    Args:
        argv: The arguments after it.

    Raises:
        InputError: The model or the rollouts cannot be used.
    """
    parser = argparse.ArgumentParser("fastpg doctor mismatch", description=DESCRIPTION)
    parser.add_argument("rollouts", metavar="ROLLOUTS")
    parser.add_argument("--model", required=True, help="a directory or Hub name")
    for name, default in Sampling._field_defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="the engine's")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="default: that of the files")
    parser.add_argument(
        "--tokens", type=positive, default=TOKENS, help="completion tokens to score"
    )
    parser.add_argument("--device", type=available, default="cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    disable_progress_bar()
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    sampling.check()
    rollouts, row_count = load_rollouts(args.rollouts, args.tokens)
    policy = load_model(args.model, args.dtype, args.device)
    try:
        tokenizer = load_tokenizer(policy, trust_remote_code=False)
    except InputError:
        tokenizer = None  # the report says what it was wanted for
    print(report_of(policy, tokenizer, rollouts, sampling))
    if len(rollouts) < row_count:
        print(f"Of {row_count} rows the first {len(rollouts)} were scored; --tokens takes more.")


def load_model(model: str, dtype: Dtype | None, device: str) -> PreTrainedModel:
    """The model, in the dtype of its files unless one is given."""
    policy, of_files = load_policy(model, trust_remote_code=False, dtype=dtype)
    # The type of `to` wants a module for self, which transformers' decorators hide.
    module: Any = policy
    module.to(device=device, dtype=of_files if dtype is None else None)
    return policy.eval()


def report_of(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    rollouts: list[Rollout],
    sampling: Sampling,
) -> MismatchReport:
    """Scores the rollouts in every way that there is.

    Args:
        policy: The model that sampled them.
        tokenizer: Its tokenizer; None if it has none.
        rollouts: The completions.
        sampling: How the engine sampled.

    Returns:
        What each correction takes off, and the largest cause.
    """
    scorer = Scorer(policy, rollouts, forms_of(rollouts, tokenizer), sampling)
    known_tokens = None if tokenizer is None else len(tokenizer)
    corrections, not_tried = corrections_of(scorer, known_tokens)
    return diagnose(scorer, corrections, not_tried)
