"""fastpg's ops in verl: what it computes on a CPU in loops, or from a copy of the logits.

`pip install fastpg` is all it takes. verl loads every package of the entry points `verl.plugins`,
in each of its processes, and so its registry gets the policy losses `fastpg` (PPO), `fastpg_gspo`,
`fastpg_sapo`, `fastpg_cispo` and `fastpg_gpg`, for `actor.policy_loss.loss_mode`. What else is to
be replaced is said in the environment:

    FASTPG_VERL=logprob,entropy,gae,value,linear python -m verl.trainer.main_ppo ...

    logprob     log-probs of the logits, also where Megatron shards the vocabulary, and those of a
                teacher's top K (distillation_loss.use_chunked_topk=True)
    entropy     entropies of the logits, and the sums of squared probabilities
    gae         advantages, whitened as verl whitens them, and returns
    value       the clipped value loss
    linear      log-probs and entropies from hidden states and the head (use_fused_kernels=True)
    linear_fp32 the same, from logits that are not rounded to bf16

`patch` does the same in one process, and returns a report.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec

import torch

from fastpg_hooks import when_imported

from . import verl_functions as functions
from . import verl_verify
from .patching import (
    Addition,
    Change,
    Patches,
    PatchReport,
    PatchRow,
    Replacement,
    replaced_by,
    words_in,
)
from .verifying import Sizes, VerifyReport, compare

CORE = "verl.trainer.ppo.core_algos"
LOGITS = "verl.utils.torch_functional"
FUSED = "verl.utils.experimental.torch_functional"
TRITON = "verl.utils.kernel.linear_cross_entropy"
MEGATRON = "verl.utils.megatron.tensor_parallel"
DISTILLATION = "verl.trainer.distillation.fsdp.losses"
MODULES = (CORE, LOGITS, FUSED, TRITON, MEGATRON, DISTILLATION)

WORDS = ("logprob", "entropy", "gae", "value", "linear", "linear_fp32")
DEFAULT = ("logprob", "entropy", "gae", "value", "linear")
VARIABLE = "FASTPG_VERL"

# Engines take the entropy function when they are built, and keep it.
ENGINES = ("fsdp", "automodel", "veomni", "torchtitan")
HELD_BY_ENGINES = "compute_entropy_from_logits"

_patches = Patches("verl")
_registrations = Patches("verl")  # those of the plugin: they replace nothing


def patch(what: Iterable[str] = DEFAULT, *, strict: bool = False) -> PatchReport:
    """Replaces functions of verl in this process, and adds the policy losses if need be.

    Args:
        what: Any of WORDS, which the top of this page explains.
        strict: Whether to raise unless everything was replaced.

    Returns:
        What was replaced, what was not, and why.

    Raises:
        ValueError: A word is not one of WORDS.
        PatchError: strict, and something was not replaced. Then nothing is.

    Example:
        >>> from fastpg.integrations import verl
        >>> print(verl.patch(["gae"]))  # doctest: +SKIP
        verl 0.9.1
          added     verl.trainer.ppo.core_algos.POLICY_LOSS_REGISTRY[fastpg]
          replaced  verl.trainer.ppo.core_algos.compute_gae_advantage_return
    """
    return _patches.apply([*policy_losses(), *changes(what)], strict=strict)


def unpatch() -> None:
    """Puts verl's own functions back."""
    _patches.undo()


def patched(
    what: Iterable[str] = DEFAULT, *, strict: bool = False
) -> AbstractContextManager[PatchReport]:
    """Like `patch`, for a with block."""
    return _patches.during([*policy_losses(), *changes(what)], strict=strict)


def is_patched() -> bool:
    """Whether anything of verl is replaced in this process."""
    return _patches.applied


def verify(sizes: Sizes | None = None, *, device: str = "cpu") -> VerifyReport:
    """Compares functions of verl with fastpg's, on this machine.

    Args:
        sizes: The vocabulary, the hidden size and the tokens of the cases that are timed.
        device: Where to compute.

    Returns:
        What is replaced, and for each case the errors of both against fp64, or time and peak
        memory. `report.ok` says whether fastpg is worse in nothing.

    Example:
        >>> from fastpg.integrations import verl
        >>> print(verl.verify())  # doctest: +SKIP
    """
    return compare(partial(verl_verify.cases, sizes or Sizes(), device), patched)


def patch_on_import() -> None:
    """Adds the policy losses, and patches what FASTPG_VERL says, as the modules are imported.

    What cannot be replaced is logged as a warning: verl shows what a plugin raises to nobody.
    """
    when_imported(CORE, partial(_registrations.apply_and_warn, policy_losses()))
    words = words_in(VARIABLE, WORDS)
    if not words:
        return
    wanted = changes(words)
    _patches.apply_and_warn([each for each in wanted if each.target == "verl"])
    for module in MODULES:
        inside = [each for each in wanted if each.target.startswith(f"{module}.")]
        if inside:
            when_imported(module, partial(_patches.apply_and_warn, inside))


def policy_losses() -> list[Change]:
    """The policy losses, as entries of verl's registry."""
    return [
        Addition(f"{CORE}.POLICY_LOSS_REGISTRY[{loss.__name__}]", loss)
        for loss in functions.POLICY_LOSSES
    ]


def changes(what: Iterable[str]) -> list[Change]:
    """What the words stand for."""
    wanted: list[Change] = _patches.untested("0.9")
    with_megatron = find_spec("megatron") is not None and find_spec("megatron.core") is not None
    for word in what:
        if word not in WORDS:
            raise ValueError(f"verl: what must be of {', '.join(WORDS)}, got {word!r}")
        wanted += CHANGES[word]()
        if with_megatron:
            wanted += MEGATRON_CHANGES.get(word, [])
    return wanted


def _logprob() -> list[Change]:
    return [
        replaced_by(f"{LOGITS}.logprobs_from_logits", functions.logprobs_from_logits),
        replaced_by(f"{DISTILLATION}._chunked_topk_log_probs", functions.chunked_topk_log_probs),
    ]


def _entropy() -> list[Change]:
    new = {
        "entropy_from_logits": functions.entropy_from_logits,
        "entropy_from_logits_with_chunking": functions.entropy_from_logits,
        "calculate_sum_pi_squared_from_logits": functions.calculate_sum_pi_squared_from_logits,
    }
    changes = [replaced_by(f"{LOGITS}.{name}", function) for name, function in new.items()]
    return [*changes, *engines_that_are_built()]


def _gae() -> list[Change]:
    targets = f"{CORE}.compute_gae_advantage_return", f"{CORE}.ADV_ESTIMATOR_REGISTRY[gae]"
    return [replaced_by(target, functions.compute_gae_advantage_return) for target in targets]


def _value() -> list[Change]:
    return [replaced_by(f"{CORE}.compute_value_loss", functions.compute_value_loss)]


def _linear(logits_dtype: torch.dtype | None) -> list[Change]:
    return [
        replaced_by(f"{FUSED}.FusedLinearForPPO.forward", functions.fused_linear(logits_dtype)),
        Replacement(
            f"{TRITON}.linear_cross_entropy",
            lambda stock: functions.linear_cross_entropy(stock, logits_dtype),
        ),
    ]


CHANGES: dict[str, Callable[[], list[Change]]] = {
    "logprob": _logprob,
    "entropy": _entropy,
    "gae": _gae,
    "value": _value,
    "linear": partial(_linear, None),
    "linear_fp32": partial(_linear, torch.float32),
}
MEGATRON_CHANGES: dict[str, list[Change]] = {
    "logprob": [
        replaced_by(
            f"{MEGATRON}.vocab_parallel_log_probs_from_logits",
            functions.vocab_parallel_log_probs_from_logits,
        )
    ],
    "entropy": [
        replaced_by(f"{MEGATRON}.vocab_parallel_entropy", functions.vocab_parallel_entropy),
        replaced_by(
            f"{MEGATRON}.vocab_parallel_entropy_with_chunking", functions.vocab_parallel_entropy
        ),
    ],
}


def engines_that_are_built() -> list[Change]:
    """A row for each kind of engine that exists: it keeps the entropy function of its beginning."""
    rows: list[Change] = []
    names = [f"verl.workers.engine.{engine}.transformer_impl" for engine in ENGINES]
    if not any(name in sys.modules for name in names):
        return rows
    kinds = {
        type(each)
        for each in gc.get_objects()
        if type(each).__module__ in names and HELD_BY_ENGINES in getattr(each, "__dict__", {})
    }
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        target = f"{kind.__module__}.{kind.__name__}.{HELD_BY_ENGINES}"
        reason = "an engine was built before the patch, and keeps verl's function"
        rows.append(PatchRow(target, "refused", reason))
    return rows
