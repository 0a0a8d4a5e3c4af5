"""Reward models: trained on pairs, loaded by transformers, and as rewards of a policy."""

import json
import math
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cli import OWN, workspace
from tiny_trainer import make_trainer, metrics_of, tiny_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3ForSequenceClassification,
)

from fastpg.cli import main
from fastpg.tasks import reviews
from fastpg.trainer import InputError, RewardConfig, RewardModel, RewardTrainer
from fastpg.trainer.rewards.pairs import read_pairs
from fastpg.trainer.rewards.reward_report import Judgement
from fastpg.trainer.run import files
from fastpg.trainer.run.files import only_writer
from fastpg.trainer.run.signals import Interrupted

__all__ = ["workspace"]


def praise_pairs(count, seed=0):
    """Reviews of the same subject, of which the kinder one is chosen."""
    rng, pairs = random.Random(seed), []
    while len(pairs) < count:
        prompt = rng.choice(reviews.subjects())
        answers = [" " + reviews.opinion(rng) for _ in range(2)]
        scores = reviews.praise([prompt] * 2, answers)
        if scores[0] != scores[1]:
            rejected, chosen = sorted(answers, key=lambda a: scores[answers.index(a)])
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def tiny_scorer(**changes):
    torch.manual_seed(1)
    config = tiny_model().config
    config.update({"num_labels": 1, "pad_token_id": 0, **changes})
    return Qwen3ForSequenceClassification(config)


def make_reward_trainer(output_dir, pairs, **settings):
    defaults = {"output_dir": str(output_dir), "learning_rate": 3e-3, "batch_size": 32}
    return RewardTrainer(
        tiny_scorer(),
        RewardConfig(**{**defaults, **settings}),
        train_dataset=pairs,
        processing_class=reviews.build_tokenizer(),
    )


def test_a_reward_model_learns_to_order_pairs(tmp_path):
    trainer = make_reward_trainer(tmp_path, praise_pairs(640), micro_batch_size=32)
    before, after = trainer.evaluate(), trainer.train()
    assert 0.2 < before["accuracy"] < 0.8 < after["accuracy"]
    assert after["loss"] < 0.5 < before["loss"]
    assert after == trainer.evaluate()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 19))
    assert rows[0]["learning_rate"] == 3e-3 and rows[-1]["learning_rate"] < 2e-4
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "calibration_error" in summary and "accuracy" in summary
    assert (tmp_path / "reward_model.png").stat().st_size > 0


def test_a_saved_reward_model_is_one_of_transformers(tmp_path):
    trainer = make_reward_trainer(tmp_path, praise_pairs(64))
    trainer.train()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = ["the plot was clever .", "honestly this cast was very dull but fresh ."]
    batch = tokenizer([f"{text} <eos>" for text in texts], padding=True, return_tensors="pt")
    reward = RewardModel.load(str(tmp_path / "model"))
    torch.testing.assert_close(
        torch.tensor(reward.score(texts)), model(**batch).logits[:, 0], rtol=1e-5, atol=1e-6
    )
    assert reward.__name__ == tmp_path.name


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_the_score_does_not_depend_on_what_else_is_in_the_batch(pad):
    tokenizer = reviews.build_tokenizer()
    tokenizer.pad_token = pad
    reward = RewardModel(tiny_scorer(pad_token_id=tokenizer.pad_token_id), tokenizer)
    texts = ["the plot was clever .", "dull", "honestly this cast was very dull but fresh ."]
    together = reward.score(texts)
    alone = [reward.score([text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-6)
    assert len({round(score, 3) for score in together}) == 3


def test_micro_batches_change_no_step(tmp_path):
    weights = []
    for size in (3, 32):
        trainer = make_reward_trainer(tmp_path, praise_pairs(40), micro_batch_size=size)
        trainer.train()
        weights.append(torch.nn.utils.parameters_to_vector(trainer.reward.model.parameters()))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_processes_exchange_the_gradients_of_a_step_once(tmp_path, monkeypatch):
    trainer = make_reward_trainer(tmp_path, praise_pairs(20), batch_size=8, micro_batch_size=3)
    backward, exchanges = trainer.accelerator.backward, []

    def noted(loss):
        exchanges.append(trainer.accelerator.sync_gradients)
        backward(loss)

    monkeypatch.setattr(trainer.accelerator, "backward", noted)
    trainer._step(trainer.train_pairs[:8])
    assert exchanges == [False, False, True]


def test_a_directory_in_use_keeps_its_settings(tmp_path):
    with only_writer(tmp_path):
        (tmp_path / "config.yaml").write_text("those of the other run")
        with pytest.raises(InputError, match="Another run is writing to"):
            make_reward_trainer(tmp_path, praise_pairs(20)).train()
        assert (tmp_path / "config.yaml").read_text() == "those of the other run"


def test_a_reward_model_does_not_replace_the_model_that_it_starts_from(workspace, capsys):
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, praise_pairs(10))))
    before = Path("model/model.safetensors").read_bytes()
    flags = ["--model", "model", "--dataset", "pairs.jsonl", "--output_dir", "."]
    assert main(["reward-model", *flags]) == 2
    refusal = f"{workspace}/model is where the run in {workspace} writes its own files"
    assert refusal in capsys.readouterr().err
    assert Path("model/model.safetensors").read_bytes() == before


def test_a_second_run_moves_the_files_of_the_first_one_aside(tmp_path, capsys):
    written = {"config.yaml", "metrics.jsonl", "model", "reward_model.png", "summary.md"}
    make_reward_trainer(tmp_path, praise_pairs(20)).train()
    weights = (tmp_path / "model/model.safetensors").read_bytes()
    assert "earlier" not in capsys.readouterr().out
    make_reward_trainer(tmp_path, praise_pairs(20), seed=1).train()
    assert f"are now in {tmp_path}/earlier-1." in capsys.readouterr().out
    for directory in (tmp_path, tmp_path / "earlier-1"):
        assert written <= {path.name for path in directory.iterdir()}
    assert (tmp_path / "earlier-1/model/model.safetensors").read_bytes() == weights
    assert (tmp_path / "model/model.safetensors").read_bytes() != weights


def test_a_signal_saves_a_reward_model_and_its_metrics(tmp_path, monkeypatch):
    trainer = make_reward_trainer(tmp_path, praise_pairs(40), batch_size=8)
    monkeypatch.setattr(
        trainer, "_show", lambda step, _: step == 2 and os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(Interrupted):
        trainer.train()
    assert [row["step"] for row in metrics_of(tmp_path)] == [1, 2]
    assert (tmp_path / "model/model.safetensors").exists()


def test_a_full_disk_is_found_before_a_reward_model_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    trainer = make_reward_trainer(tmp_path, praise_pairs(20))
    monkeypatch.setattr(trainer, "_step", lambda pairs: pytest.fail("there was a step"))
    with pytest.raises(InputError, match=r"0\.00 MB free, but the reward model takes"):
        trainer.train()


def test_a_policy_learns_from_a_reward_model_of_another_vocabulary(tmp_path):
    """A directory is a reward; its tokenizer need not be that of the policy."""
    tokenizer = reviews.build_tokenizer()
    tokenizer.add_tokens(["<unused>"])
    scorer = tiny_scorer(vocab_size=44)
    scorer.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    trainer = make_trainer(tmp_path / "run", str(tmp_path / "rm"))
    trainer.train()
    lines = (tmp_path / "run/completions/step_000002.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    texts = [" ".join([s["prompt"], *s["completion"].split()]) for s in samples]
    expected = RewardModel(scorer, tokenizer).score(texts)
    assert [s["rewards"]["rm"] for s in samples] == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) > 1


def test_a_chat_is_scored_through_the_template_of_the_reward_model():
    tokenizer = reviews.build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}honestly {% endif %}"
        "{{ m.content }} {% endfor %}"
    )
    reward = RewardModel(tiny_scorer(), tokenizer)
    prompt = [{"role": "user", "content": "the plot was"}]
    begun = [*prompt, {"role": "assistant", "content": "very "}]
    answer = [{"role": "assistant", "content": "clever ."}]
    scores = reward([prompt, begun], [answer, answer], ["not read", "nor this"])
    texts = ["honestly the plot was clever .", "honestly the plot was very clever ."]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert scores == pytest.approx(reward.scores_of(reward.model, ids).tolist(), abs=1e-6)
    with pytest.raises(InputError, match="The tokenizer of reward_model has no chat template"):
        RewardModel(tiny_scorer(), reviews.build_tokenizer()).score([prompt])


def test_a_text_that_is_too_long_loses_its_beginning_with_a_warning(caplog):
    reward = RewardModel(tiny_scorer(max_position_embeddings=8), reviews.build_tokenizer())
    assert reward.score(["the plot " * 9]) == reward.score(["the plot " * 20])
    assert [r.getMessage() for r in caplog.records] == [
        "reward_model has 8 positions; longer texts lose their beginning."
    ]


def test_pairs_of_every_form():
    user, kind = {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}
    rude = {"role": "assistant", "content": "bad"}
    chat = ([user, kind], [user, rude])
    rows = [
        ({"prompt": "q", "chosen": " good", "rejected": " bad"}, ("q good", "q bad")),
        ({"chosen": "q good", "rejected": "q bad"}, ("q good", "q bad")),
        ({"prompt": [user], "chosen": [kind], "rejected": [rude]}, chat),
        ({"prompt": [user], "chosen": "good", "rejected": "bad"}, chat),
        ({"prompt": "q", "chosen": [kind], "rejected": [rude]}, chat),
        # The answers of TRL's and UltraFeedback's data hold the prompt too.
        ({"prompt": "q", "chosen": chat[0], "rejected": chat[1]}, chat),
        ({"chosen": chat[0], "rejected": chat[1]}, chat),
    ]
    for row, expected in rows:
        row = {k: list(v) if isinstance(v, tuple) else v for k, v in row.items()}
        assert read_pairs([row]) == [expected], row
    for row, sentence in [
        ({"chosen": "a"}, "Example 0 must have 'chosen' and 'rejected'"),
        ({"chosen": "a", "rejected": "a"}, "Example 0 prefers an answer to itself."),
        (
            {"chosen": "a", "rejected": [{"role": "user", "content": "b"}]},
            "Example 0 has a text and a chat for 'chosen' and 'rejected'.",
        ),
        ({"chosen": [{"from": "gpt"}], "rejected": "a"}, "Example 0 must have"),
    ]:
        with pytest.raises(InputError, match=sentence):
            read_pairs([row])


def test_an_answer_continues_a_message_of_any_content():
    def whole(begun, more):
        prompt = [{"role": "assistant", **begun}]
        chosen, rejected = [{"role": "assistant", **more}], [{"role": "assistant", "content": "z"}]
        pair = read_pairs([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])[0]
        return pair.chosen[0]["content"]

    x, y = ({"type": "text", "text": text} for text in "xy")
    assert whole({"content": "x"}, {"content": "y"}) == "xy"
    assert whole({"content": [x]}, {"content": "y"}) == [x, y]
    assert whole({"content": "x"}, {"content": [y]}) == [x, y]
    assert whole({"content": [x]}, {"content": [y]}) == [x, y]
    assert whole({"content": "x"}, {"content": None}) == "x"
    assert whole({"content": "x"}, {}) == "x"


def test_the_model_knows_every_token_that_it_is_given():
    tokenizer = reviews.build_tokenizer()
    text = reviews.subjects()[0]
    longer = " ".join([text, *sorted(reviews.POSITIVE)[:2]])
    alone = RewardModel(tiny_scorer(), tokenizer).score([text, longer])
    # The model was made before its tokenizer got a token to pad with.
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    padded = RewardModel(tiny_scorer(pad_token_id=None), tokenizer)
    assert tokenizer.pad_token_id == 43 and padded.model.config.pad_token_id != 43
    assert len(padded.score([text, longer])) == len(alone)
    with pytest.raises(InputError, match="reward_model has 43 tokens, and its tokenizer makes one"):
        padded.score(["<padding>"])
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="has no PAD or EOS that the model knows"):
        RewardModel(tiny_scorer(pad_token_id=None), tokenizer)
    with pytest.raises(InputError, match="cannot score a text without tokens"):
        RewardModel(tiny_scorer(), tokenizer).score([""])


def test_calibration_compares_confidence_with_accuracy():
    # Margins of 2 in three pairs, of which one is wrong; of 0.1 in one pair, which is right.
    judgement = Judgement(torch.tensor([2.0, 2.0, 0.0, 0.1]), torch.tensor([0.0, 0.0, 2.0, 0.0]))
    sure, unsure = (1 / (1 + math.exp(-m)) for m in (2.0, 0.1))
    expected = 0.75 * abs(sure - 2 / 3) + 0.25 * abs(unsure - 1)
    metrics = judgement.metrics()
    assert metrics["calibration_error"] == pytest.approx(expected, abs=1e-6)
    assert (metrics["accuracy"], metrics["count"]) == (0.75, 4)


def test_the_command_trains_a_reward_model_that_the_trainer_takes(workspace, capsys):
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, praise_pairs(40))))
    command = ["reward-model", "--model", "model", "--dataset", "pairs.jsonl"]
    assert main([*command, "--output_dir", "kind", "--batch_size", "8"]) == 0
    assert "of 4 held-out pairs" in capsys.readouterr().out.lower()
    flags = ["--config", "run.yaml", "--reward", "kind/model", "--reward", "my_rewards:length"]
    assert main(["train", *OWN[:4], *flags]) == 0
    (row,) = metrics_of("run")
    assert row["reward/mean"] == pytest.approx(
        row["rewards/kind/mean"] + row["rewards/length/mean"]
    )
    # A policy is no reward model: its head would be random.
    assert main(["train", *OWN[:4], "--reward", "model"]) == 2
    error = capsys.readouterr().err
    assert "Cannot load a reward model from 'model': it lacks score.weight." in error


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "Your own run also needs --model and --dataset."),
        (["--model", "two", "--dataset", "one.jsonl"], "its score.weight has another shape"),
        (
            ["--model", "model", "--dataset", "surrogates.jsonl"],
            "The tokenizer of reward_model ref",
        ),
        (["--batch_siz", "3"], "Unknown setting 'batch_siz'; did you mean 'batch_size'?"),
        (["--eval_fraction", "1"], "eval_fraction must be between 0 and 1, and neither, not 1.0."),
        (["--model", "model", "--dataset", "prompts.jsonl"], "prompts.jsonl, line 1: no 'chosen'"),
        (["--model", "model", "--dataset", "one.jsonl"], "1 pairs are too few to hold one out"),
    ],
)
def test_bad_input_of_the_command_is_one_sentence(workspace, capsys, flags, sentence):
    Path("one.jsonl").write_text(json.dumps(praise_pairs(1)[0]))
    surrogates = [{"chosen": "\ud800", "rejected": "\udfff"}] * 2
    Path("surrogates.jsonl").write_text("\n".join(map(json.dumps, surrogates)))
    if "two" in flags:
        Path("one.jsonl").write_text("\n".join(map(json.dumps, praise_pairs(2))))
        tiny_scorer(num_labels=2).save_pretrained("two")
    capsys.readouterr()
    assert main(["reward-model", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastpg reward-model: ") and error.count("\n") == 1
    assert sentence in error


def test_weights_that_are_not_finite_are_neither_taken_nor_saved(tmp_path):
    trainer = make_reward_trainer(tmp_path, praise_pairs(8), learning_rate=3e37, num_epochs=2)
    with pytest.raises(InputError, match=r"Weights are no longer finite after step \d"):
        trainer.train()
    assert not (tmp_path / "model").exists()
    model = tiny_scorer()
    with torch.no_grad():
        model.score.weight[0, 0] = math.inf
    with pytest.raises(InputError, match=r"The weight score.weight of the reward model is not"):
        RewardModel(model, trainer.reward.tokenizer)


def test_a_model_of_two_outputs_is_no_reward_model(tmp_path):
    two = tiny_scorer(num_labels=2)
    with pytest.raises(InputError, match="it has not one output"):
        RewardModel(two, reviews.build_tokenizer())
    two.save_pretrained(tmp_path)
    reviews.build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="it has 2 outputs, not one"):
        RewardModel.load(str(tmp_path))
