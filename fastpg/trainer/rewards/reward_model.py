"""A reward model: a language model with a linear head on the hidden state of the last token."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastpg.trainer.models.forward import vocabulary_size
from fastpg.trainer.models.loading import check_finite, load_scorer, load_tokenizer
from fastpg.trainer.settings.parsing import InputError

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
"""A chat."""


class RewardModel:
    """Scores text with a model of its own tokenizer and chat template; it is a reward function.

    Args:
        model: A module with one output, as `AutoModelForSequenceClassification` loads it.
        tokenizer: Its tokenizer, which need not be that of the policy.
        name: The name under which the reward is logged.
        batch_size: Texts per forward.

    Raises:
        InputError: The model has not one output, or a weight that is not finite, or no token that
            could be padding.

    Example:
        >>> from fastpg.trainer import PPOTrainer, RewardModel
        >>> reward = RewardModel.load("out/reward_model/model")  # doctest: +SKIP
        >>> PPOTrainer("my-model", reward, train_dataset=prompts)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "reward_model",
        batch_size: int = 32,
    ) -> None:
        if getattr(model, "num_labels", None) != 1:
            raise InputError(f"{type(model).__name__} is no reward model: it has not one output.")
        check_finite(model, "the reward model")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.__name__ = name
        # The forward of a model takes the last token that is no padding, which the config names.
        config: Any = model.config.get_text_config()
        self._size = vocabulary_size(model)
        if config.pad_token_id is None:
            config.pad_token_id = self._padding()
        self._positions = getattr(config, "max_position_embeddings", None)
        self._has_cut = False

    @staticmethod
    def load(directory: str, trust_remote_code: bool = False) -> "RewardModel":
        """Load a reward model with its tokenizer.

        Args:
            directory: A directory or name for `AutoModelForSequenceClassification`.
            trust_remote_code: Whether code that comes with the model may run.

        Returns:
            The reward model, whose name is that of the directory; of the one around it, if its
            own is "model".

        Raises:
            InputError: There is no such model, or it has not one output.
        """
        model, _ = load_scorer(directory, trust_remote_code, new_head=False)
        path = Path(directory).resolve()
        name = path.parent.name if path.name == "model" else path.name
        return RewardModel(model, load_tokenizer(model, trust_remote_code), name)

    def _padding(self) -> int:
        """Return the token to pad with. The model may not know that of the tokenizer."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and token < self._size:
                return token
        raise InputError(
            f"The tokenizer of {self.__name__} has no PAD or EOS that the model knows."
        )

    def to(self, device: torch.device) -> "RewardModel":
        """Move the model to a device."""
        # The type of `to` wants a module for self, which transformers' decorators hide.
        module: Any = self.model
        module.to(device)
        return self

    def __call__(self, prompts: list[Any], completions: list[Any], texts: list[str]) -> list[float]:
        """Score B completions with their prompts.

        Args:
            prompts: Texts or chats.
            completions: Texts, or chats of one message, for prompts that are chats.
            texts: The prompts with their completions; what chats are here is not read.

        Returns:
            B scores.
        """
        conversations = [
            text if isinstance(prompt, str) else joined(prompt, completion)
            for prompt, completion, text in zip(prompts, completions, texts, strict=True)
        ]
        return self.score(conversations)

    @torch.no_grad()
    def score(self, conversations: Sequence[str | Messages]) -> list[float]:
        """Score whole texts or chats.

        Args:
            conversations: Texts, or chats that end with the message to score.

        Returns:
            A score for each.
        """
        scores: list[float] = []
        for start in range(0, len(conversations), self.batch_size):
            ids = [self.encode(text) for text in conversations[start : start + self.batch_size]]
            scores += self.scores_of(self.model, ids).tolist()
        return scores

    def scores_of(self, model: torch.nn.Module, tokens: Sequence[list[int]]) -> Tensor:
        """Score texts that are encoded.

        Args:
            model: The model, or what wraps it for training.
            tokens: The ids of each text.

        Returns:
            float32 [B]; differentiable.
        """
        pad = self.model.config.get_text_config().pad_token_id
        width = max(map(len, tokens))
        ids = [row + [pad] * (width - len(row)) for row in tokens]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in tokens]
        device = self.model.device
        output = model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
        )
        return output.logits[:, 0].float()

    def encode(self, conversation: str | Messages) -> list[int]:
        """Turn a text or chat into tokens.

        A text gets the tokenizer's EOS at its end. A chat is what the template makes of it. One
        that is too long for the model loses its beginning.

        Args:
            conversation: The text or chat.

        Returns:
            Its ids.

        Raises:
            InputError: There is no chat template, it or the tokenizer refuses the conversation, or
                the model cannot read what they make of it.
        """
        if isinstance(conversation, str):
            ids = self._ids(conversation, add_special_tokens=True)
            end = self.tokenizer.eos_token_id
            if end is not None and ids[-1:] != [end]:
                ids.append(end)
        else:
            ids = self._chat_ids(conversation)
        if not ids:
            raise InputError(f"{self.__name__} cannot score a text without tokens.")
        if max(ids) >= self._size:
            raise InputError(
                f"{self.__name__} has {self._size} tokens, and its tokenizer makes one of id "
                f"{max(ids)}."
            )
        if self._positions is not None and len(ids) > self._positions:
            if not self._has_cut:
                logger.warning(
                    "%s has %d positions; longer texts lose their beginning.",
                    self.__name__,
                    self._positions,
                )
            self._has_cut = True
            ids = ids[-self._positions :]
        return ids

    def _chat_ids(self, chat: Messages) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise InputError(f"The tokenizer of {self.__name__} has no chat template.")
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False)
        except Exception as error:
            # Templates raise errors of jinja.
            reason = " ".join(str(error).split())
            raise InputError(f"The template of {self.__name__} refuses a chat: {reason}") from error
        # The template writes its own special tokens, so none are added here.
        return self._ids(str(text), add_special_tokens=False)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        except Exception as error:
            # Tokenizers raise plain exceptions, for a lone surrogate or an unknown word.
            reason = " ".join(str(error).split())
            raise InputError(
                f"The tokenizer of {self.__name__} refuses a text: {reason}"
            ) from error


def joined(prompt: Messages, answer: Messages) -> Messages:
    """Put an answer behind a chat; an answer that continues the last message becomes part of it.

    Args:
        prompt: The chat.
        answer: Messages, the first one of the assistant.

    Returns:
        The whole chat.
    """
    last, first = prompt[-1], answer[0]
    if last["role"] != "assistant" or first["role"] != "assistant":
        return [*prompt, *answer]
    contents = [message.get("content") or "" for message in (last, first)]
    if all(isinstance(content, str) for content in contents):
        whole: Any = "".join(contents)
    else:
        whole = [part for content in contents for part in _parts(content)]
    return [*prompt[:-1], {**last, "content": whole}, *answer[1:]]


def _parts(content: Any) -> list[Any]:
    """Return the parts of the content of a message, of which a text is one."""
    return content if isinstance(content, list) else [{"type": "text", "text": content}]
