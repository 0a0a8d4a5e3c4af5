"""Models and tokenizers from files: what cannot be used is refused in one sentence."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fastpg.trainer.settings.parsing import InputError
from fastpg.trainer.settings.ranges import Dtype

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
"""A directory with a tokenizer has one of these."""


class Loaded(NamedTuple):
    """A model, and the dtype that it is to be saved in. None: the one that it has."""

    model: PreTrainedModel
    saved_dtype: torch.dtype | None


def load_policy(
    model: str | PreTrainedModel, trust_remote_code: bool, dtype: Dtype | None = None
) -> Loaded:
    """Load a causal language model.

    Args:
        model: A directory or name for `from_pretrained`. A module is returned as it is, but for
            its dtype.
        trust_remote_code: Whether code that comes with the model may run.
        dtype: The dtype of the weights. None: float32 for a model from files.

    Returns:
        The model, and the dtype that it is to be saved in: that of the files, unless a `dtype` is
        given. None: the one that it has.

    Raises:
        InputError: There is no such model, or its files are damaged, lack weights or are those of
            a reward model.
    """
    if not isinstance(model, str):
        if dtype is not None:
            # The type of `to` wants a module for self, which transformers' decorators hide.
            module: Any = model
            module.to(getattr(torch, dtype))
        return Loaded(model, None)
    what = "a causal language model"
    weights = getattr(torch, dtype or "float32")
    policy, loading = _load(AutoModelForCausalLM, what, model, trust_remote_code, weights)
    if any(name.startswith("score.") for name in loading["unexpected_keys"]):
        raise InputError(f"Cannot load {what} from {model!r}: it holds a reward model.")
    _refuse_made_up(what, model, loading, allowed=set())
    return Loaded(policy, None if dtype else dtype_of_files(model))


def dtype_of_files(model: str) -> torch.dtype | None:
    """Return the dtype that the config of a model names, if it names one."""
    config, _ = PreTrainedConfig.get_config_dict(model)
    # Older configs have the second name.
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    # A name such as "auto" says nothing of the files.
    return dtype if isinstance(dtype, torch.dtype) else None


class Scorer(NamedTuple):
    """A model with a linear head of one output, and whether that was made up."""

    model: PreTrainedModel
    has_new_head: bool


def load_scorer(
    model: str, trust_remote_code: bool, new_head: bool, what: str = "a reward model"
) -> Scorer:
    """Load a model with a linear head of one output, in float32.

    Args:
        model: A directory or name for `from_pretrained`, or the directory of an adapter on such a
            model, which it becomes part of.
        trust_remote_code: Whether code that comes with the model may run.
        new_head: Whether a model without such a head, a language model, gets one with random
            weights.
        what: How errors name the model.

    Returns:
        The model.

    Raises:
        InputError: There is no such model, its files are damaged or lack weights, or its head has
            several outputs.
    """
    if Path(model, "adapter_config.json").is_file():
        with as_input_error(f"Cannot load {what} from {model!r}"):
            return Scorer(_merged_scorer(model), has_new_head=False)
    options = {"num_labels": 1} if new_head else {}
    with _no_report():
        scorer, loading = _load(
            AutoModelForSequenceClassification,
            what,
            model,
            trust_remote_code,
            torch.float32,
            **options,
        )
    # A language model has no head, whatever number of outputs its config gives by default.
    _refuse_made_up(what, model, loading, allowed={"score.weight"} if new_head else set())
    if scorer.config.num_labels != 1:
        raise InputError(
            f"Cannot load {what} from {model!r}: it has {scorer.config.num_labels} outputs, not "
            "one; a function can choose among them."
        )
    return Scorer(scorer, has_new_head="score.weight" in loading["missing_keys"])


def _merged_scorer(directory: str) -> PreTrainedModel:
    """Load a model with an adapter, and make the adapter part of its weights."""
    from peft import AutoPeftModelForSequenceClassification

    with _no_report():
        adapted = AutoPeftModelForSequenceClassification.from_pretrained(
            directory, num_labels=1, dtype=torch.float32
        )
    merged = adapted.merge_and_unload()
    # Its tokenizer is beside the adapter.
    merged.name_or_path = _absolute(directory)
    return merged.requires_grad_(True)


def _load(
    auto_class: Any,
    what: str,
    model: str,
    trust_remote_code: bool,
    dtype: torch.dtype,
    **options: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model, and what transformers says of its weights. Errors say `what` it should be."""
    sentence = f"Cannot load {what} from {model!r}"
    path = Path(model)
    if path.is_file():
        raise InputError(f"{sentence}: it is a file, and the directory around it is meant.")
    if not path.exists() and (path.is_absolute() or model.startswith(".") or model.endswith("/")):
        raise InputError(f"{sentence}: there is no such directory.")
    with as_input_error(sentence):
        return auto_class.from_pretrained(
            _absolute(model),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # They are in what is returned, and are refused from there.
            ignore_mismatched_sizes=True,
            **options,
        )


def _absolute(model: str) -> str:
    """Return a name of the Hub as it is, and a directory so that it is found from anywhere."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model


@contextmanager
def _no_report() -> Iterator[None]:
    """Keep transformers from printing a table of weights that a language model has not."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _refuse_made_up(what: str, model: str, loading: dict[str, Any], allowed: set[str]) -> None:
    """Refuse a model whose weights transformers made up, but for those that may be."""
    missing = sorted(set(loading["missing_keys"]) - allowed)
    mismatched = sorted(mismatch[0] for mismatch in loading["mismatched_keys"])
    if mismatched:
        raise InputError(
            f"Cannot load {what} from {model!r}: its {mismatched[0]} has another shape than that "
            "of such a model."
        )
    if missing:
        more = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
        raise InputError(f"Cannot load {what} from {model!r}: it lacks {missing[0]}{more}.")


def load_tokenizer(policy: PreTrainedModel, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved with a model.

    Args:
        policy: A model that came from a directory or name.
        trust_remote_code: Whether code that comes with the tokenizer may run.

    Returns:
        Its tokenizer.

    Raises:
        InputError: The model was built in code, or no tokenizer was saved with it.
    """
    if not policy.name_or_path:
        raise InputError("A model built in code needs its tokenizer as processing_class.")
    path = Path(policy.name_or_path)
    if path.is_dir() and not any((path / name).exists() for name in TOKENIZER_FILES):
        # transformers would make up an empty one for some families.
        raise InputError(f"There is no tokenizer in {policy.name_or_path!r}.")
    with as_input_error(f"Cannot load a tokenizer from {policy.name_or_path!r}"):
        return AutoTokenizer.from_pretrained(
            policy.name_or_path, trust_remote_code=trust_remote_code
        )


@contextmanager
def as_input_error(sentence: str) -> Iterator[None]:
    """Turn what reading a bad name or directory raises into an `InputError`."""
    try:
        yield
    except Exception as error:
        # Damaged files raise errors of safetensors, pickle, JSON and others. The first line of the
        # message says what is wrong, or ends in a colon, and the second says it; more are advice.
        lines = (str(error).strip() or type(error).__name__).splitlines()
        used = lines[:2] if lines[0].endswith(":") else lines[:1]
        reason = " ".join(" ".join(used).split())
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own, which only trust_remote_code lets run."
        raise InputError(f"{sentence}: {reason}") from error


def part_of(state: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    """Return the weights of a submodule, by its own names for them."""
    prefix = f"{module}."
    return {
        name.removeprefix(prefix): weight
        for name, weight in state.items()
        if name.startswith(prefix)
    }


def save_model(
    model: PreTrainedModel,
    directory: Path,
    dtype: torch.dtype | None,
    state: dict[str, torch.Tensor],
) -> None:
    """Write a model for `from_pretrained`.

    Args:
        model: The model.
        directory: Where its files go.
        dtype: The dtype of the weights in the files. None: the one that they have.
        state: Its weights by name, whole.
    """
    # Tied weights are written once, also where they were gathered one by one.
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if name in state and first in state:
            state[name] = state[first]
    if dtype is None or dtype == model.dtype:
        model.save_pretrained(directory, state_dict=state)
        return
    copies: dict[int, torch.Tensor] = {}
    for name, weight in state.items():
        copy = copies.setdefault(weight.data_ptr(), weight)
        if copy is weight and weight.is_floating_point():
            copy = copies[weight.data_ptr()] = weight.to(dtype)
        state[name] = copy
    model.save_pretrained(directory, state_dict=state)
    # The config tells the dtype of the model, not that of the files.
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_finite(model: PreTrainedModel, what: str) -> None:
    """Refuse a model with a weight that is NaN or infinite; `what` names it."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"The weight {name} of {what} is not finite.")
