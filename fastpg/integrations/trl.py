"""fastpg in TRL: its trainers take their log-probs and entropies from fastpg's kernels.

    from fastpg.integrations import trl as fastpg_trl

    print(fastpg_trl.patch())
    trainer = GRPOTrainer(...)  # as ever

TRL 1.15 and 1.16 have one function for all trainers, from hidden states (`trl_head.py`): GRPO,
RLOO, SFT, DPO and KTO. TRL 0.16 to 1.14 have functions of logits (`trl_logits.py`), which trainers
import by name, and from 1.12 on one of hidden states besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from importlib import import_module

import torch
from packaging.version import Version

from . import trl_head, trl_logits, trl_lora, trl_verify
from .patching import Patches, PatchReport, PatchRow, Replacement
from .trl_logits import UTILS
from .verifying import Sizes, VerifyReport, compare

# The releases that this page was written for.
OLDEST, FIRST_WITH_ONE_HEAD, NEWEST = (0, 16), (1, 15), (1, 16)

IN_ALL_RELEASES = ("selective_log_softmax",)

_patches = Patches("trl")


def patch(
    *,
    logits_dtype: torch.dtype | None = None,
    lora_head: bool = False,
    strict: bool = False,
) -> PatchReport:
    """Replaces TRL's log-probs and entropies by fastpg's, in all its modules.

    Trainers that exist already take part, as TRL looks its functions up at each call. Log-probs and
    entropies are fp32 in every release, where TRL up to 1.14 returns bf16 for a bf16 model.

    Args:
        logits_dtype: torch.float32 keeps the logits of a bf16 or fp16 model in fp32: log-probs four
            digits better. It is for TRL 1.15 and later; before, the model makes the logits.
        lora_head: Whether trainers take a LoRA adapter on the LM head, which TRL 1.15 and later
            refuse. It counts for trainers that are made after the call.
        strict: Whether to raise unless everything is replaced, and later if a call has to be left
            to TRL.

    Returns:
        What was replaced, what was not, and why. A second call changes nothing, and says so. A call
        that is left to TRL, for a head that is quantised, adds a row later.

    Raises:
        ValueError: logits_dtype is neither None nor torch.float32.
        PatchError: strict, and something is not replaced. Then nothing is.

    Example:
        >>> from fastpg.integrations import trl as fastpg_trl
        >>> print(fastpg_trl.patch())  # doctest: +SKIP
        trl 1.16.0
          replaced  trl.trainer.utils._ChunkedLogProbFunction  and in ...
    """
    return _patches.apply(_wanted(logits_dtype, lora_head), strict=strict)


def unpatch() -> None:
    """Puts TRL's own functions back, also in modules that were imported in between.

    A trainer that was made with lora_head=True keeps its adapter, which TRL's function ignores.
    """
    _patches.undo()


def patched(
    *,
    logits_dtype: torch.dtype | None = None,
    lora_head: bool = False,
    strict: bool = False,
) -> AbstractContextManager[PatchReport]:
    """`patch` for a with block, at the end of which TRL is as it was before.

    Args:
        logits_dtype: As for `patch`.
        lora_head: As for `patch`.
        strict: As for `patch`.

    Returns:
        The context manager; `with patched() as report`.
    """
    return _patches.during(_wanted(logits_dtype, lora_head), strict=strict)


def is_patched() -> bool:
    """Whether TRL's functions are replaced now."""
    return _patches.applied


def verify(sizes: Sizes | None = None, *, device: str = "cpu") -> VerifyReport:
    """Compares TRL's log-probs and entropies with fastpg's, on this machine.

    Args:
        sizes: The vocabulary, the hidden size and the tokens of the case that is timed.
        device: Where to compute.

    Returns:
        What is replaced, and for each case the errors of both against fp64, or time and peak
        memory. `report.ok` says whether fastpg is worse in nothing.

    Example:
        >>> from fastpg.integrations import trl as fastpg_trl
        >>> print(fastpg_trl.verify())  # doctest: +SKIP
    """
    return compare(partial(trl_verify.cases, sizes or Sizes(), device), patched)


def _wanted(logits_dtype: torch.dtype | None, lora_head: bool) -> list[Replacement | PatchRow]:
    """What to replace in the installed release; nothing, if there is none."""
    if logits_dtype not in (None, torch.float32):
        raise ValueError(f"logits_dtype must be None or torch.float32, got {logits_dtype}")
    installed = _patches.version()
    if installed is None:
        return []
    release = Version(installed).release[:2]
    wanted: list[Replacement | PatchRow] = []
    if not OLDEST <= release <= NEWEST:
        wanted.append(PatchRow("trl", "refused", "fastpg is tested with TRL 0.16 to 1.16"))
    for name, make in trl_logits.REPLACEMENTS.items():
        if name in IN_ALL_RELEASES or _has(name):
            wanted.append(Replacement(f"{UTILS}.{name}", make))
    running = trl_lora.RunningHead()
    has_head = release >= FIRST_WITH_ONE_HEAD
    if has_head or _has(trl_head.NAME):
        wanted.append(trl_head.replacement(_patches, logits_dtype, running))
    elif logits_dtype is not None:
        wanted.append(PatchRow("logits_dtype", "refused", "the model makes the logits"))
    if has_head:
        wanted += _around_the_head()
    if lora_head and has_head:
        wanted += trl_lora.replacements(running)
    elif lora_head:
        wanted.append(PatchRow("lora_head", "refused", "the model applies its adapters itself"))
    return wanted


def _around_the_head() -> Iterator[Replacement]:
    """What the caller of the head does before it, of which fastpg does a part itself.

    It gathers a DTensor, and loses the other ranks' part of the gradient. On a CPU it passes rows
    without a label too.
    """
    yield Replacement(f"{UTILS}.DTensor", lambda _: trl_lora.NoLayer, everywhere=False)
    if _has("_use_triton"):
        yield Replacement(f"{UTILS}._use_triton", lambda _: _always, everywhere=False)


def _always(_device: torch.device) -> bool:
    return True


def _has(name: str) -> bool:
    """Whether this release has a function of this name. One that cannot be imported has none."""
    try:
        return hasattr(import_module(UTILS), name)
    except ImportError:
        return False
