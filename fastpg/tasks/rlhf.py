"""The embedded task with a learned reward: pairs of reviews, a reward model, a policy.

Someone who likes every kind word compares reviews that the supervised model wrote, and errs as
Bradley and Terry say. Nearly all of them are sentences, so the pairs, and the reward model that
learns from them, say nothing of what is none. That is where a policy without a KL penalty goes: the
learned reward rises, and `true_reward`, which no one optimises, falls (Gao et al. 2022,
arXiv:2210.10760).
"""

import copy
import math
import random
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from fastpg.tasks import reviews
from fastpg.trainer import PPOConfig, PPOTrainer, RewardConfig, RewardModel, RewardTrainer
from fastpg.trainer.checks import check_packages
from fastpg.trainer.rollouts.rollout import sample
from fastpg.trainer.run.run_files import make_directory

NUM_PAIRS = 1500
"""So few that what the reward model overrates is near; with 2500 not every seed finds it."""
SURENESS = 8.0
"""A pair is ordered rightly with probability sigmoid(SURENESS · difference of kind words)."""

INTRODUCTION = """\
The embedded task with a learned reward. A tiny model learns to write film
reviews (supervised, some 15 seconds); a reward model learns from 1500 pairs of
them which is the kinder one; then {algorithm} trains the first on the second.
Watch rewards/true_reward beside rewards/reward_model: with --kl_coef 0 the reward
model is pleased by what is no sentence any more. It runs on one thread, since more
would wait for each other."""


def preferred_settings(algorithm: str) -> dict[str, Any]:
    """Return the settings that this task prefers to those of `PPOConfig`.

    Args:
        algorithm: A key of `fastpg.algorithms.ALGORITHMS`; another name is like "ppo".

    Returns:
        The values by the name of the setting.
    """
    # The policy is trained on the reward model. The other two are watched.
    own = {
        "output_dir": "out/reviews_rlhf",
        "reward_weights": [1.0, 0.0, 0.0],
        # The bonus keeps the policy trying out words, so that it finds what the reward model
        # overrates; otherwise it soon repeats one review.
        "entropy_coef": 0.05,
        "kl_coef": 0.2,
        "num_steps": 60,
    }
    return reviews.preferred_settings(algorithm) | own


def true_reward(prompts: list[str], completions: list[str]) -> list[float]:
    """Score what the reward model stands for: praise in a whole sentence.

    Args:
        prompts: The beginnings of B reviews.
        completions: The rest of each review.

    Returns:
        B scores: `praise` of a grammatical review, -1 for any other.
    """
    both = zip(
        reviews.grammar(prompts, completions), reviews.praise(prompts, completions), strict=True
    )
    return [praise if whole else -1.0 for whole, praise in both]


def kind_words(text: str) -> int:
    """Count the positive words of a text, less the negative ones."""
    words = text.split()
    positive = sum(word in reviews.POSITIVE for word in words)
    return positive - sum(word in reviews.NEGATIVE for word in words)


def compare(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, subjects: list[str], seed: int
) -> list[dict[str, str]]:
    """Let the model finish reviews, two of each, and say which is the kinder one.

    Args:
        model: The supervised model.
        tokenizer: Its tokenizer.
        subjects: The beginnings.
        seed: The seed of subjects, reviews and errors.

    Returns:
        Up to `NUM_PAIRS` pairs, for `RewardTrainer`; two equal reviews are none.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    prompts = [rng.choice(subjects) for _ in range(NUM_PAIRS)]
    first, second = (_finished(model, tokenizer, prompts) for _ in range(2))
    pairs = []
    for prompt, *texts in zip(prompts, first, second, strict=True):
        a, b = map(kind_words, texts)
        likes_first = 1 / (1 + math.exp(-SURENESS * (a - b)))
        chosen, rejected = texts if rng.random() < likes_first else reversed(texts)
        if chosen != rejected:
            pairs.append({"prompt": f"{prompt} ", "chosen": chosen, "rejected": rejected})
    return pairs


def _finished(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> list[str]:
    longest = reviews.DEFAULTS["max_new_tokens"]
    rollout = sample(
        model,
        tokenizer,
        prompts,
        max_prompt_length=None,
        max_new_tokens=longest,
        temperature=1.0,
        packing=None,
    )
    # Outside of the mask is what the model wrote behind its EOS.
    ids = rollout.completion_ids.where(rollout.mask, tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def reward_directory(args: PPOConfig) -> Path:
    """Return where the reward model of a run is trained."""
    return Path(args.output_dir, "reward_model")


def train_reward_model(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[dict[str, str]],
    args: PPOConfig,
) -> RewardModel:
    """Train a reward model whose trunk begins as that of the supervised model.

    Args:
        model: The supervised model, which stays as it is.
        tokenizer: Its tokenizer.
        pairs: The pairs.
        args: The settings of the run, for the seed and the output directory.

    Returns:
        The reward model, which is also in `reward_model/` of the output directory.
    """
    torch.manual_seed(args.seed)
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    scorer = Qwen3ForSequenceClassification(config)
    scorer.model.load_state_dict(model.model.state_dict())
    settings = RewardConfig(
        output_dir=str(reward_directory(args)),
        seed=args.seed,
        num_epochs=2,
        batch_size=32,
        micro_batch_size=32,
        learning_rate=5e-4,
        mixed_precision=args.mixed_precision,
    )
    trainer = RewardTrainer(scorer, settings, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    return trainer.reward


def build_trainer(args: PPOConfig, is_resumed: bool = False) -> PPOTrainer:
    """Build the trainer of this task: supervised model, pairs, reward model.

    Args:
        args: The settings of the run.
        is_resumed: Whether an earlier run is taken up, with the reward model that it had.

    Returns:
        The trainer, ready for `train()`.
    """
    # What is wrong is said before the models have trained for a while.
    check_packages(args)
    make_directory(Path(args.output_dir))
    train, held_out = reviews.split_subjects(args)
    model, tokenizer = reviews.supervised_model(args.seed)
    saved = reward_directory(args) / "model"
    if is_resumed and saved.is_dir():
        reward = RewardModel.load(str(saved))
    else:
        print(f"The model writes {NUM_PAIRS} pairs of reviews ...", flush=True)
        pairs = compare(model, tokenizer, [row["prompt"] for row in train], args.seed)
        print(f"It has written {len(pairs)} pairs; a reward model learns from them.", flush=True)
        reward = train_reward_model(model, tokenizer, pairs, args)
    return PPOTrainer(
        model,
        [reward, true_reward, reviews.grammar],
        args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
