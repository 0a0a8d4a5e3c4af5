"""Completions that end at strings, and where they do."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StopStringCriteria

from fastpg.trainer.settings.parsing import InputError


def stop_criteria(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> StopStringCriteria:
    """Look up which tokens can be parts of strings that end completions.

    Args:
        tokenizer: The tokenizer.
        strings: The strings.

    Raises:
        InputError: A string has no tokens.
    """
    try:
        return StopStringCriteria(tokenizer, list(strings))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"The tokens have no stop_strings={list(strings)}: {reason}") from None


@dataclass
class StopRecorder:
    """Says which completions a string ends, and remembers how long they are.

    Args:
        criteria: What finds the strings.
        lengths: int64 [B], the tokens of each completion that a string has ended; 0 of others, and
            at first of all.
    """

    criteria: StopStringCriteria
    lengths: Tensor

    def ended(self, completions: Tensor, episodes: Tensor, grows: Tensor) -> Tensor:
        """Find completions that a string has just ended.

        Args:
            completions: int64 [..., t], the tokens so far.
            episodes: int64 [...], whose they are.
            grows: bool [...], whether that episode had not ended a token ago.

        Returns:
            bool [...].
        """
        found = self.criteria(completions.flatten(0, -2), None).view(grows.shape) & grows
        self.lengths[episodes[found]] = completions.shape[-1]
        return found

    def cut(self, mask: Tensor, finished: Tensor) -> tuple[Tensor, Tensor]:
        """Return which tokens belong to completions, and which of these have ended.

        Args:
            mask: bool [B, T], the tokens up to the first EOS.
            finished: bool [B], whether there is an EOS.
        """
        stopped = self.lengths > 0
        places = torch.arange(mask.shape[1], device=mask.device)
        beyond = stopped[:, None] & (places >= self.lengths[:, None])
        return mask & ~beyond, finished | stopped


class EndAtStrings(StoppingCriteria):
    """Lets a `StopRecorder` end the completions of the model's own `generate`.

    Args:
        recorder: The recorder.
        prompt: The tokens of a prompt, padding included. A string that begins there does not count.
    """

    def __init__(self, recorder: StopRecorder, prompt: int) -> None:
        self.recorder, self.prompt = recorder, prompt

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """Return which rows of int64 [B, L] have ended, bool [B]."""
        episodes = torch.arange(len(input_ids), device=input_ids.device)
        grows = self.recorder.lengths == 0
        return self.recorder.ended(input_ids[:, self.prompt :], episodes, grows)
