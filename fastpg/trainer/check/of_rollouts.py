"""Checks of tokenizer, prompts and completions: is the rollout what the policy would say?"""

import math

from torch import Tensor

from fastpg.trainer.check.evidence import Evidence, Finding, Verdict
from fastpg.trainer.data.encoding import encode_one
from fastpg.trainer.models.forward import vocabulary_size

_LOOKED_AT = 256  # prompts of the dataset
_LARGEST_TRUNCATED = 0.5
_SURPRISING, _IMPOSSIBLE = 3.5, 5.0  # standard errors
_ROUNDING = 1e-6  # a variance that rounding alone has, in nats squared a token


def padding_token(evidence: Evidence) -> Finding:
    """Is the padding token one of its own?"""
    tokenizer = evidence.trainer.tokenizer
    is_own = tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    return Finding(
        "padding token",
        "pass" if is_own else "warn",
        f"pad {tokenizer.pad_token_id}, EOS {tokenizer.eos_token_id}",
        "masks go by position here, but where `ids != pad` was the mask, as in much supervised "
        "training, the model never learned to end",
    )


def beginning(evidence: Evidence) -> Finding | None:
    """Does a prompt begin with more than one BOS?"""
    trainer = evidence.trainer
    bos = trainer.tokenizer.bos_token_id
    if bos is None:
        return None
    count = min(_LOOKED_AT, len(trainer.train_dataset))
    prompts = [trainer.train_dataset[i]["prompt"] for i in range(count)]
    encoded = [encode_one(prompt, trainer.tokenizer, "A prompt") for prompt in prompts]
    doubled = sum(ids[:2] == [bos, bos] for ids in encoded)
    return Finding(
        "beginning",
        "fail" if doubled else "pass",
        f"{doubled} of {count} prompts with BOS twice",
        "the tokenizer adds a BOS to prompts that have one: take it out of the dataset's text",
    )


def chat_template(evidence: Evidence) -> Finding | None:
    """Are there prompts of plain text for a model of chats?"""
    if evidence.trainer.tokenizer.chat_template is None:
        return None
    plain = sum(isinstance(example["prompt"], str) for example in evidence.examples)
    return Finding(
        "chat template",
        "warn" if plain else "pass",
        f"{plain} of {len(evidence.examples)} prompts are plain text",
        "the tokenizer has a chat template: give prompts as messages, or text with its marks",
    )


def vocabulary(evidence: Evidence) -> Finding:
    """Do model and tokenizer know the same tokens?"""
    model, tokenizer = vocabulary_size(evidence.trainer.policy), len(evidence.trainer.tokenizer)
    sampled = evidence.rollout.completion_ids[evidence.mask]
    unknown = int((sampled >= tokenizer).sum())
    return Finding(
        "vocabulary",
        "warn" if unknown or model < tokenizer else "pass",
        f"model {model}, tokenizer {tokenizer}, sampled {unknown} that the tokenizer has not",
        "rewards do not see such tokens; is the tokenizer that of the model?",
    )


def completions_mask(evidence: Evidence) -> Finding:
    """Are exactly the tokens up to the first EOS, that included, trained on and attended to?"""
    rollout, mask = evidence.rollout, evidence.mask
    width = mask.shape[1]
    labels = rollout.completion_ids.where(mask, -100)
    wrong = (rollout.mask != mask) | (rollout.attention_mask[:, -width:].bool() != mask)
    wrong |= rollout.labels != labels
    lengths = rollout.attention_mask[:, :-width].sum(-1).tolist()
    prompts = sum(a != len(b) for a, b in zip(lengths, evidence.prompts, strict=True))
    return Finding(
        "mask",
        "fail" if wrong.any() or prompts else "pass",
        f"{int(wrong.sum())} of {int(mask.sum())} tokens and {prompts} prompts otherwise",
        "a completion is its tokens up to the first EOS, and the EOS is one of them",
    )


def truncated(evidence: Evidence) -> Finding:
    """How many completions have no end?"""
    share = 1 - evidence.rollout.finished.float().mean().item()
    return Finding(
        "truncated",
        "warn" if share > _LARGEST_TRUNCATED else "pass",
        f"{share:.0%} of completions without EOS, {max(evidence.lengths)} tokens at most",
        "raise max_new_tokens, or see whether the model ends its answers at all",
    )


def sampled_distribution(evidence: Evidence) -> Finding:
    """Are tokens as improbable as tokens of the log-probs' distribution are on average?

    That of a sampled token is −H on average, so the sum of −log p − H has mean 0 and a known
    variance. With top_k, top_p, min_p or another temperature tokens are more probable.
    """
    plain, count = evidence.plain, evidence.mask.sum().item()
    logp = plain.logp[evidence.temperatures[0]]
    surprise, entropy = -logp.sum().item(), plain.entropy.sum().item()
    deviation = _standardised(surprise - entropy, plain.variance, count)
    return Finding(
        "sampling",
        _verdict(deviation),
        f"{surprise / count:.3f} nats a token, entropy {entropy / count:.3f}: "
        f"{deviation:+.1f} standard errors",
        "tokens do not come from the distribution of the log-probs: look for top_k, top_p, min_p, "
        "a penalty, or another temperature",
    )


def ends(evidence: Evidence) -> Finding:
    """Do as many completions end as their probabilities of ending say?"""
    expected = evidence.plain.end.sum().item()
    completions = evidence.rollout.completion_ids.tolist()
    pairs = zip(completions, evidence.lengths, strict=True)
    found = sum(tokens[length - 1] in evidence.ends for tokens, length in pairs)
    variance = evidence.plain.end * (1 - evidence.plain.end)
    deviation = _standardised(found - expected, variance, evidence.mask.sum().item())
    return Finding(
        "ends",
        _verdict(deviation),
        f"{found} completions end, {expected:.1f} expected: {deviation:+.1f} standard errors",
        "EOS is not sampled as its probability says: look for min_new_tokens or another EOS",
    )


def modes_after_sampling(evidence: Evidence) -> Finding:
    """Is every module in the mode that it had before sampling?"""
    changed = evidence.other_modes
    return Finding(
        "modes",
        "fail" if changed else "pass",
        f"{len(changed)} modules in another mode after sampling",
        f"restore training or evaluation mode of {', '.join(changed[:3])}",
    )


def _standardised(excess: float, variance: Tensor, count: float) -> float:
    """Return a sum of mean 0 in its standard errors."""
    return excess / math.sqrt(variance.sum().item() + _ROUNDING * count)


def _verdict(deviation: float) -> Verdict:
    if abs(deviation) > _IMPOSSIBLE or math.isnan(deviation):
        return "fail"
    return "warn" if abs(deviation) > _SURPRISING else "pass"
