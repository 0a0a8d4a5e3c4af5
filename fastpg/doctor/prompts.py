"""The forms in which an engine may have seen the prompts that a file has as token ids."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from .rollouts import Rollout
from .scoring import AS_GIVEN

Prompts = list[list[int]]


def forms_of(
    rollouts: list[Rollout], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Prompts]:
    """The prompts as they are in the file, and those other forms of them that there can be.

    Args:
        rollouts: The rollouts.
        tokenizer: That of the model; None if it has none.

    Returns:
        The prompts of each form, by what the sentence about a mismatch calls it.
    """
    given = [each.prompt for each in rollouts]
    forms = {AS_GIVEN: given}
    if tokenizer is None:
        return forms
    for name, prompts in (_with_bos(given, tokenizer) | _from_chats(rollouts, tokenizer)).items():
        if prompts not in forms.values() and all(prompts):
            forms[name] = prompts
    return forms


def _with_bos(given: Prompts, tokenizer: PreTrainedTokenizerBase) -> dict[str, Prompts]:
    """One BOS token more, and one less."""
    bos = tokenizer.bos_token_id
    if not isinstance(bos, int):
        return {}
    forms = {"with one BOS token more than in the file": [[bos, *prompt] for prompt in given]}
    if all(prompt[0] == bos and len(prompt) > 1 for prompt in given):
        forms["with one BOS token less than in the file"] = [prompt[1:] for prompt in given]
    return forms


def _from_chats(rollouts: list[Rollout], tokenizer: PreTrainedTokenizerBase) -> dict[str, Prompts]:
    """What the tokenizer makes of the messages, or of the text, that the file has."""
    chats: list[Any] = [each.chat for each in rollouts]
    read: Any = tokenizer.apply_chat_template  # whose type is that of all of its options
    if all(isinstance(chat, str) for chat in chats):
        return {
            f"as the tokenizer reads the text, {words} special tokens": [
                tokenizer(chat, add_special_tokens=special)["input_ids"] for chat in chats
            ]
            for words, special in (("with", True), ("without", False))
        }
    if not all(isinstance(chat, list) and chat for chat in chats) or not tokenizer.chat_template:
        return {}
    return {
        f"by the model's chat template, {words} the generation prompt": [
            read(chat, add_generation_prompt=generation, tokenize=True, return_dict=False)
            for chat in chats
        ]
        for words, generation in (("with", True), ("without", False))
    }
