"""fastpg's ops in OpenRLHF: advantages and returns, log-probs and entropies.

OpenRLHF's actors live in processes of Ray. There, a setup hook waits for its modules; it imports
nothing itself:

    ray job submit --runtime-env-json='{"worker_process_setup_hook": "fastpg_hooks.openrlhf"}' \\
        -- python3 -m openrlhf.cli.train_ppo_ray ...

    FASTPG_OPENRLHF=gae,logprob,entropy,actor    what is replaced; unset, all of it

    gae        advantages and returns, where OpenRLHF loops over time on a CPU
    logprob    log-probs of the logits
    entropy    entropies of the logits
    actor      both in Actor.forward, from one pass over the logits in the model's own dtype:
               OpenRLHF makes a copy in fp32

`patch` does the same in one process, and returns a report.

Where the two differ: log-probs and entropies of bf16 logits are those of these logits in fp32, and
a -inf logit has an entropy. With "actor", `output.logits` of a forward that returns log-probs is
what the model gave, neither in fp32 nor divided by the temperature; OpenRLHF reads it nowhere, and
its gradient is written over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastpg

from . import openrlhf_verify
from .patching import Change, Patches, PatchReport, Replacement, replaced_by, words_in
from .verifying import Sizes, VerifyReport, compare
from .verl_functions import entropy_from_logits, is_wanted_elsewhere

ACTOR = "openrlhf.models.actor"
UTILS = "openrlhf.models.utils"
EXPERIENCE = "openrlhf.trainer.ppo_utils.experience_maker"
MAKER = f"{EXPERIENCE}.RemoteExperienceMaker"

WORDS = ("gae", "logprob", "entropy", "actor")
VARIABLE = "FASTPG_OPENRLHF"

_patches = Patches("openrlhf")


def patch(what: Iterable[str] = WORDS, *, strict: bool = False) -> PatchReport:
    """Replaces functions of OpenRLHF in this process.

    Args:
        what: Any of WORDS, which the top of this page explains.
        strict: Whether to raise unless everything was replaced.

    Returns:
        What was replaced, what was not, and why.

    Raises:
        ValueError: A word is not one of WORDS.
        PatchError: strict, and something was not replaced. Then nothing is.

    Example:
        >>> from fastpg.integrations import openrlhf
        >>> print(openrlhf.patch(["gae"]))  # doctest: +SKIP
        openrlhf 0.11.2
          replaced  openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker...
    """
    return _patches.apply(changes(what), strict=strict)


def unpatch() -> None:
    """Puts OpenRLHF's own functions back."""
    _patches.undo()


def patched(
    what: Iterable[str] = WORDS, *, strict: bool = False
) -> AbstractContextManager[PatchReport]:
    """Like `patch`, for a with block."""
    return _patches.during(changes(what), strict=strict)


def is_patched() -> bool:
    """Whether anything of OpenRLHF is replaced in this process."""
    return _patches.applied


def verify(sizes: Sizes | None = None, *, device: str = "cpu") -> VerifyReport:
    """Compares functions of OpenRLHF with fastpg's, on this machine.

    Args:
        sizes: The vocabulary, the hidden size and the tokens of the cases that are timed.
        device: Where to compute.

    Returns:
        What is replaced, and for each case the errors of both against fp64, or time and peak
        memory. `report.ok` says whether fastpg is worse in nothing.

    Example:
        >>> from fastpg.integrations import openrlhf
        >>> print(openrlhf.verify())  # doctest: +SKIP
    """
    return compare(partial(openrlhf_verify.cases, sizes or Sizes(), device), patched)


def patch_module(module: str) -> None:
    """Patches what FASTPG_OPENRLHF says of one module; what cannot be is logged as a warning."""
    words = words_in(VARIABLE, WORDS)
    wanted = changes(WORDS if words is None else words)
    inside = [each for each in wanted if each.target.startswith(f"{module}.")]
    if inside and not _patches.applied:  # of a release that is not tested the first module warns
        inside += [each for each in wanted if each.target == "openrlhf"]
    _patches.apply_and_warn(inside)


def changes(what: Iterable[str]) -> list[Change]:
    """What the words stand for."""
    wanted: list[Change] = _patches.untested("0.11")
    for word in what:
        if word not in WORDS:
            raise ValueError(f"openrlhf: what must be of {', '.join(WORDS)}, got {word!r}")
        wanted += CHANGES[word]
    return wanted


def get_advantages_and_returns(
    _self: Any,
    values: Tensor,
    rewards: Tensor,
    action_mask: Tensor | None,
    gamma: float,
    lambd: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T]. A masked token is a step of time without reward and value."""
    with torch.no_grad():
        rewards, values = _unmasked(rewards, action_mask), _unmasked(values, action_mask)
        return fastpg.gae(rewards, values, gamma=gamma, lam=lambd)


def get_cumulative_returns(
    _self: Any, rewards: Tensor, action_mask: Tensor | None, gamma: float
) -> Tensor:
    """The discounted rewards to come, [B, T]. A masked token is a step of time without reward."""
    with torch.no_grad():
        return fastpg.gae(_unmasked(rewards, action_mask), gamma=gamma)[1]


def _unmasked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x, and 0 where it is masked, whatever x holds there."""
    return x if mask is None else torch.where(mask != 0, x, 0.0)


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of labels [...]. OpenRLHF's divides the logits in place; this leaves them."""
    return fastpg.token_logprobs(logits, labels, temperature=temperature)


def actor_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Actor.forward without the copy of the logits in fp32.

    A forward that wants no log-probs, and one of a vision-language model, is the stock one's.
    """

    def forward(
        self: Any,
        sequences: Tensor,
        action_mask: Tensor | None = None,
        attention_mask: Any = None,
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: dist.ProcessGroup | None = None,
        packed_seq_lens: list[int] | None = None,
        return_entropy: bool = False,
        **mm_inputs: Any,
    ) -> Any:
        if getattr(self, "is_vlm", False) or (action_mask is None and not return_logprobs):
            return stock(
                self,
                sequences,
                action_mask,
                attention_mask,
                return_output,
                allgather_logits,
                return_logprobs,
                ring_attn_group,
                packed_seq_lens,
                return_entropy,
                **mm_inputs,
            )
        output, log_probs, entropy = _score(self, sequences, attention_mask, ring_attn_group)
        if return_entropy:
            output.entropy = entropy
        if action_mask is not None:
            log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask.float()
        return (log_probs, output) if return_output else log_probs

    return forward


def _score(
    actor: Any, sequences: Tensor, attention_mask: Tensor, ring_attn_group: dist.ProcessGroup | None
) -> tuple[Any, Tensor, Tensor]:
    """The model's output, and the log-prob and entropy of each token but the first, [B, T - 1]."""
    from openrlhf.models import ring_attn_utils

    batch, seqlen = sequences.shape
    if actor.packing_samples:
        tokens, position_ids, labels, *packing = ring_attn_utils.unpad_and_slice_tensor(
            sequences, attention_mask, ring_attn_group
        )
        # What is packed has no padding, and says where sequences begin by its positions.
        output = actor.model(tokens, attention_mask=None, position_ids=position_ids)
    else:
        labels = torch.roll(sequences, shifts=-1, dims=1)
        position_ids = attention_mask.long().cumsum(-1) - 1
        position_ids.masked_fill_(attention_mask == 0, 1)
        output = actor.model(sequences, attention_mask=attention_mask, position_ids=position_ids)
    logits = output["logits"]
    log_probs, entropy = fastpg.token_logprobs(
        logits,
        labels,
        temperature=actor.temperature,
        return_entropy=True,
        inplace_backward=not is_wanted_elsewhere(logits),
    )
    if actor.packing_samples:
        log_probs, entropy = (
            ring_attn_utils.gather_and_pad_tensor(each, ring_attn_group, *packing, batch, seqlen)
            for each in (log_probs, entropy)
        )
    return output, log_probs[:, :-1], entropy[:, :-1]


CHANGES: dict[str, list[Change]] = {
    "gae": [
        replaced_by(f"{MAKER}.get_advantages_and_returns", get_advantages_and_returns),
        replaced_by(f"{MAKER}.get_cumulative_returns", get_cumulative_returns),
    ],
    "logprob": [replaced_by(f"{UTILS}.log_probs_from_logits", log_probs_from_logits)],
    "entropy": [replaced_by(f"{UTILS}.compute_entropy", entropy_from_logits)],
    "actor": [Replacement(f"{ACTOR}.Actor.forward", actor_forward)],
}
