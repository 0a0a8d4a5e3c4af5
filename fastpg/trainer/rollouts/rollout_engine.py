"""What samples completions: the policy itself, or an engine that has a copy of its weights."""

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from fastpg.trainer.data.encoding import Prompt
from fastpg.trainer.models.packing import Packing
from fastpg.trainer.models.policy import policy_through
from fastpg.trainer.rollouts.rollout import Rollout, sample
from fastpg.trainer.rollouts.stop_strings import stop_criteria
from fastpg.trainer.run.engine import shares_weights
from fastpg.trainer.settings.config import PPOConfig
from fastpg.trainer.settings.parsing import InputError


class RolloutEngine(Protocol):
    """What a trainer samples with."""

    def sample(self, prompts: Sequence[Prompt]) -> Rollout:
        """Sample one completion for each prompt, as the settings say.

        Args:
            prompts: B prompts, text or chat messages.

        Returns:
            B episodes in the order of the prompts, on the device of the policy. An engine whose
            log-probs are not those of training gives them as `behavior_logp`.
        """

    def update_weights(self) -> None:
        """Sample from the weights that the policy has now; called whenever they have changed."""


@dataclass
class HFEngine:
    """Samples from the policy that is trained: in rows that share prompts, or by its `generate`.

    Args:
        model: The prepared `PolicyWithValue`.
        tokenizer: The tokenizer.
        args: The settings.
        accelerator: The accelerator that prepared the model.
        packing: How rows are packed for the policy. None: its own `generate` samples.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    args: PPOConfig
    accelerator: Accelerator
    packing: Packing | None

    def sample(self, prompts: Sequence[Prompt]) -> Rollout:
        """Sample one completion for each prompt, as `RolloutEngine.sample`."""
        is_shared = shares_weights(self.accelerator)
        sample_from = functools.partial(
            sample,
            tokenizer=self.tokenizer,
            prompts=prompts,
            max_prompt_length=self.args.max_prompt_length,
            max_new_tokens=self.args.max_new_tokens,
            temperature=self.args.temperature,
            top_k=self.args.top_k,
            top_p=self.args.top_p,
            stop=self._stop,
            packing=None if is_shared else self.packing,
            together=is_shared,
        )
        if is_shared:
            return policy_through(self.model, sample_from)
        return sample_from(self.accelerator.unwrap_model(self.model).policy)

    @functools.cached_property
    def _stop(self) -> StopStringCriteria | None:
        # It looks at every token that the tokenizer knows, so it is made once.
        strings = self.args.stop_strings
        return None if strings is None else stop_criteria(self.tokenizer, strings)

    def update_weights(self) -> None:
        """Do nothing: the weights are those that are trained."""


def check_engine(args: PPOConfig) -> None:
    """Refuse an engine that is not installed.

    Raises:
        InputError: vLLM is wanted and missing.
    """
    if args.use_vllm and importlib.util.find_spec("vllm") is None:
        raise InputError("use_vllm needs vLLM: pip install vllm.")


def make_engine(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
    accelerator: Accelerator,
    packing: Packing | None,
) -> RolloutEngine:
    """Make the engine that the settings ask for.

    Args:
        model: The prepared `PolicyWithValue`.
        tokenizer: The tokenizer.
        args: The settings.
        accelerator: The accelerator that prepared the model.
        packing: How rows are packed for the policy, if they are.

    Raises:
        InputError: vLLM is wanted in a run of several processes.
    """
    if not args.use_vllm:
        return HFEngine(model, tokenizer, args, accelerator, packing)
    if accelerator.num_processes > 1 or shares_weights(accelerator):
        raise InputError(
            f"use_vllm is for a run of one process, and this one has {accelerator.num_processes}."
        )
    # Only this module imports vLLM.
    from fastpg.trainer.rollouts.vllm_engine import VllmEngine

    return VllmEngine(accelerator.unwrap_model(model).policy, tokenizer, args)
