"""A trainer of a tiny model with random weights, on prompts of the embedded task."""

import json
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fastpg.tasks import reviews
from fastpg.trainer import PPOConfig, PPOTrainer

PROMPTS = [{"prompt": subject} for subject in reviews.subjects()[:8]]
SETTINGS = {
    "num_steps": 2,
    "rollout_batch_size": 10,
    "max_new_tokens": 6,
    "micro_batch_size": 2,  # does not divide the 5 episodes of a minibatch
    "learning_rate": 1e-3,
    "num_eval_samples": 2,
}


def tiny_model(**changes) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 43,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    return Qwen3ForCausalLM(Qwen3Config(**{**sizes, **changes}))


def share_of_praise(prompts, completions):
    counts = [[word in reviews.POSITIVE for word in c.split()] for c in completions]
    return [sum(count) / max(len(count), 1) for count in counts]


def make_trainer(
    output_dir, reward=share_of_praise, model=None, dataset=PROMPTS, tokenizer=None, **settings
):
    return PPOTrainer(
        model or tiny_model(),
        reward,
        PPOConfig(output_dir=str(output_dir), **{**SETTINGS, **settings}),
        train_dataset=dataset,
        processing_class=tokenizer or reviews.build_tokenizer(),
    )


def rows_of(output_dir) -> list[dict]:
    """What metrics.jsonl holds, the evaluation before training included."""
    return [json.loads(line) for line in Path(output_dir, "metrics.jsonl").read_text().splitlines()]


def metrics_of(output_dir) -> list[dict]:
    """The metrics of the steps."""
    return [row for row in rows_of(output_dir) if row["step"] > 0]
