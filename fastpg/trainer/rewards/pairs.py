"""Preference pairs: which of two answers is the better one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastpg.trainer.rewards.reward_model import Messages, joined
from fastpg.trainer.settings.parsing import InputError


class Pair(NamedTuple):
    """Two texts or chats, prompts included."""

    chosen: str | Messages
    rejected: str | Messages


def read_pairs(dataset: Sequence[dict[str, Any]]) -> list[Pair]:
    """Read the pairs of a dataset.

    Args:
        dataset: Dicts with "chosen" and "rejected", each an answer to the "prompt" of the dict, or
            with the prompt inside. Texts are joined as they are; chats are lists of messages.

    Returns:
        The pairs.

    Raises:
        InputError: An example has no such pair, or both of its answers are the same.
    """
    pairs = []
    for i, example in enumerate(dataset):
        where = f"Example {i}"
        prompt = example.get("prompt")
        pair = Pair(*(_whole(prompt, example.get(name), where) for name in Pair._fields))
        if isinstance(pair.chosen, str) != isinstance(pair.rejected, str):
            raise InputError(f"{where} has a text and a chat for 'chosen' and 'rejected'.")
        if pair.chosen == pair.rejected:
            raise InputError(f"{where} prefers an answer to itself.")
        pairs.append(pair)
    return pairs


def _whole(prompt: Any, answer: Any, where: str) -> str | Messages:
    """Return a prompt with an answer; `where` names the example in errors."""
    if isinstance(prompt, str | None) and isinstance(answer, str):
        return (prompt or "") + answer
    # A text stands for the message of whose turn it is.
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answers = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if not _is_chat(answers) or not (chat is None or _is_chat(chat)):
        raise InputError(
            f"{where} must have 'chosen' and 'rejected', and if any a 'prompt', each of them text "
            "or a list of chat messages."
        )
    # An answer that does not begin with the assistant is the whole chat.
    return joined(chat, answers) if chat and answers[0]["role"] == "assistant" else answers


def _is_chat(chat: Any) -> bool:
    return (
        isinstance(chat, list)
        and bool(chat)
        and all(isinstance(message, dict) and "role" in message for message in chat)
    )
