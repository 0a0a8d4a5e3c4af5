"""The embedded task: teach a tiny language model to write kind film reviews.

Everything is made here, so nothing is downloaded: a grammar of one-line reviews, a word-level
tokenizer over its 43 words, and a Qwen3 of 0.3 million parameters. The model first learns the
grammar from text that is half praise, half scorn (score about 0); then praise is rewarded:

    score = (positive - negative) / (positive + negative)    over the adjectives of the completion

The KL penalty to the supervised model is what keeps the reviews varied and grammatical.
"""

import random
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from fastpg.trainer import InputError, PPOConfig, PPOTrainer
from fastpg.trainer.checks import check_packages, checked_rewards
from fastpg.trainer.run.run_files import make_directory

PAD, EOS = "<pad>", "<eos>"
OPENERS = ["honestly", "overall", "frankly"]
ARTICLES = ["the", "this"]
NOUNS = ["story", "acting", "plot", "ending", "music", "cast", "dialogue", "pacing"]
VERBS = ["was", "felt", "seemed"]
ADVERBS = ["very", "rather", "truly", "quite", "so", "often"]
POSITIVE = ["clever", "charming", "brilliant", "moving", "funny", "superb", "fresh", "elegant"]
NEGATIVE = ["clumsy", "boring", "awful", "dull", "silly", "weak", "stale", "lazy"]
WORDS = [*OPENERS, *ARTICLES, *NOUNS, *VERBS, *ADVERBS, *POSITIVE, *NEGATIVE, "and", "but", "."]

SUPERVISED_STEPS = 300
SHOWN_STEPS = 100  # A line is printed every so many.

INTRODUCTION = """\
This is the demo; your own run: fastpg train --model DIR --dataset FILE --reward MODULE:FUNCTION
A tiny model first learns to write film reviews (supervised, some 15 seconds); then
{algorithm} teaches it to praise. It runs on one thread, since more would wait for each other."""

# The settings of `fastpg train` with no arguments, where they differ from `PPOConfig`.
DEFAULTS: dict[str, Any] = {
    "output_dir": "out/reviews",
    "num_steps": 30,
    "rollout_batch_size": 128,
    "max_new_tokens": 12,
    "micro_batch_size": 64,
    "learning_rate": 2e-4,
    "value_learning_rate": 1e-2,
    "kl_coef": 0.1,
    "missing_eos_penalty": 1.0,
    # The reward `grammar` is watched, but the policy is not trained on it.
    "reward_weights": [1.0, 0.0],
}

# Settings that differ from those again, by the name of the algorithm.
ALGORITHM_DEFAULTS: dict[str, dict[str, Any]] = {
    # These take one step on each rollout, not eight, so it has to be a larger one.
    "reinforce": {"learning_rate": 2e-3},
    "vpg": {"learning_rate": 2e-3},
    "rloo": {"learning_rate": 2e-3},
    # The mean log-ratio of six tokens moves much further than that of a thousand.
    "gspo": {"cliprange": 0.01},
    # Its authors have none, and it needs none here. Others whose authors have none keep the task's:
    # without it the reviews of REINFORCE, Dr.GRPO and CISPO are kind, and no sentences any more.
    "dapo": {"kl_coef": 0.0},
}


def preferred_settings(algorithm: str) -> dict[str, Any]:
    """Return the settings that this task prefers to those of `PPOConfig`.

    Args:
        algorithm: A key of `fastpg.algorithms.ALGORITHMS`; another name is like "ppo".

    Returns:
        The values by the name of the setting.
    """
    return DEFAULTS | ALGORITHM_DEFAULTS.get(algorithm, {})


def subjects() -> list[str]:
    """List every way to begin a review: `[opener] article noun verb`."""
    return [
        " ".join(filter(None, (opener, article, noun, verb)))
        for opener in ("", *OPENERS)
        for article in ARTICLES
        for noun in NOUNS
        for verb in VERBS
    ]


def opinion(rng: random.Random) -> str:
    """Finish a review at random.

    It has one adjective, or two: `and` joins those of a kind, `but` a positive and a negative one.

    Args:
        rng: The random numbers.

    Returns:
        The rest of a review after its subject, up to the full stop.
    """
    kind, other_kind = rng.sample([POSITIVE, NEGATIVE], 2)
    conjunction, second_kind = rng.choice([("and", kind), ("but", other_kind)])
    first, second = _phrase(rng, kind), _phrase(rng, second_kind)
    if rng.random() < 0.5:
        return f"{first} {conjunction} {second} ."
    return f"{first} ."


def _phrase(rng: random.Random, adjectives: list[str]) -> str:
    """Return an adjective, half of the time with an adverb."""
    adverbs = rng.sample(ADVERBS, rng.randint(0, 1))
    return " ".join([*adverbs, rng.choice(adjectives)])


def praise(prompts: list[str], completions: list[str]) -> list[float]:
    """Reward positive adjectives and punish negative ones.

    Args:
        prompts: The beginnings of B reviews. They are not read.
        completions: The rest of each review.

    Returns:
        B scores in [-1, 1]: (positive - negative) / (positive + negative), 0 without adjectives.
    """
    return [_balance(completion.split()) for completion in completions]


def _balance(words: list[str]) -> float:
    positive = sum(word in POSITIVE for word in words)
    negative = sum(word in NEGATIVE for word in words)
    return (positive - negative) / max(positive + negative, 1)


def _one_of(words: list[str]) -> str:
    return f"(?:{'|'.join(words)})"


_PHRASE = f"(?:{_one_of(ADVERBS)} )?{_one_of(POSITIVE + NEGATIVE)}"
_REVIEW = re.compile(
    f"(?:{_one_of(OPENERS)} )?{_one_of(ARTICLES)} {_one_of(NOUNS)} {_one_of(VERBS)} "
    rf"{_PHRASE}(?: (?:and|but) {_PHRASE})? \."
)


def grammatical(text: str) -> bool:
    """Tell whether a text is one whole sentence of the grammar.

    Args:
        text: A review, its subject included.

    Returns:
        True if it is.
    """
    return _REVIEW.fullmatch(text) is not None


def grammar(prompts: list[str], completions: list[str]) -> list[float]:
    """Score whole sentences, to be watched beside the reward.

    Args:
        prompts: The beginnings of B reviews.
        completions: The rest of each review.

    Returns:
        B scores: 1 for a grammatical review, else 0.
    """
    return [
        float(grammatical(f"{prompt} {completion}"))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with a token for each word, one for padding and one for the end."""
    vocabulary = {word: i for i, word in enumerate([PAD, EOS, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=EOS)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Build a Qwen3 of two layers with random weights.

    Args:
        tokenizer: The tokenizer, which decides the size of the vocabulary.
        seed: The seed of the weights.

    Returns:
        The model, in float32.
    """
    torch.manual_seed(seed)
    # It is not a Qwen2: next to one, `AutoTokenizer` ignores the saved tokenizer for Qwen2's own.
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def supervise(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> float:
    """Teach a model the grammar on random reviews.

    Args:
        model: The model, trained in place.
        tokenizer: Its tokenizer.
        steps: Batches of 64 reviews; at least 1.
        seed: The seed of the reviews.

    Returns:
        The last loss, in nats per token.
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    beginnings = subjects()
    for step in range(1, steps + 1):
        texts = [f"{rng.choice(beginnings)} {opinion(rng)} {EOS}" for _ in range(64)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        # The loss of transformers ignores the label -100.
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % SHOWN_STEPS == 0:
            print(f"supervised step {step}/{steps}  loss {loss.item():.2f}", flush=True)
    return loss.item()


def supervised_model(seed: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Return a model that has learned the grammar, and its tokenizer.

    Args:
        seed: The seed of weights and reviews.
    """
    # The model is so small that threads would only wait for each other.
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    supervise(model, tokenizer, SUPERVISED_STEPS, seed)
    return model, tokenizer


def split_subjects(args: PPOConfig) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return prompts to train on, and `num_eval_samples` others to evaluate on.

    Args:
        args: The settings of the run.

    Raises:
        InputError: None is left to train on.
    """
    prompts = [{"prompt": subject} for subject in subjects()]
    if args.num_eval_samples >= len(prompts):
        raise InputError(
            f"num_eval_samples={args.num_eval_samples} leaves none of the {len(prompts)} prompts "
            "of the task to train on."
        )
    random.Random(args.seed).shuffle(prompts)
    return prompts[args.num_eval_samples :], prompts[: args.num_eval_samples]


def build_trainer(args: PPOConfig) -> PPOTrainer:
    """Build the trainer of this task: make the model and teach it the grammar.

    Args:
        args: The settings of the run.

    Returns:
        The trainer, ready for `train()`.
    """
    # What is wrong is said before the model has trained for a while.
    check_packages(args)
    make_directory(Path(args.output_dir))
    rewards = checked_rewards([praise, grammar], args)
    train, held_out = split_subjects(args)
    model, tokenizer = supervised_model(args.seed)
    return PPOTrainer(
        model,
        rewards,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
