"""The embedded task: its grammar, its reward, and that PPO learns it."""

import random

import pytest
import torch
from tiny_trainer import metrics_of

from fastpg.tasks import reviews
from fastpg.trainer import PPOConfig


def test_grammar_accepts_its_own_sentences():
    rng = random.Random(0)
    texts = [f"{rng.choice(reviews.subjects())} {reviews.opinion(rng)}" for _ in range(500)]
    assert all(map(reviews.grammatical, texts))
    assert len(set(texts)) > 300


def test_grammar_refuses_what_is_no_sentence():
    for text in (
        "the plot was clever",
        "the plot was very .",
        "the plot was clever . dull .",
        "plot the was clever .",
        "the plot was clever and .",
        "",
    ):
        assert not reviews.grammatical(text), text


def test_praise_is_the_balance_of_adjectives():
    completions = ["clever .", "dull .", "clever but very dull .", "clever and fresh .", "."]
    assert reviews.praise([""] * 5, completions) == [1.0, -1.0, 0.0, 1.0, 0.0]


def test_supervised_text_is_neutral():
    rng = random.Random(0)
    scores = reviews.praise([""] * 4000, [reviews.opinion(rng) for _ in range(4000)])
    assert abs(sum(scores) / len(scores)) < 0.05


def test_every_word_is_one_token():
    tokenizer = reviews.build_tokenizer()
    assert len(tokenizer) == len(reviews.WORDS) + 2 == 43
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    text = "honestly the plot was very clever ."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_ppo_learns_to_praise_in_whole_sentences(tmp_path):
    threads = torch.get_num_threads()
    args = PPOConfig(**{**reviews.DEFAULTS, "output_dir": str(tmp_path), "num_steps": 20})
    trainer = reviews.build_trainer(args)
    before, after = trainer.evaluate(), trainer.train()
    torch.set_num_threads(threads)
    assert abs(before["eval/reward/mean"]) < 0.3
    assert after["eval/reward/mean"] > 0.8
    assert after["eval/rewards/grammar/mean"] > 0.8  # of 64 reviews, after 20 of the 30 steps
    rows = metrics_of(tmp_path)
    assert all(row["policy/first_ratio_deviation"] == 0.0 for row in rows)
    assert rows[-1]["objective/kl"] > rows[0]["objective/kl"] == 0.0
