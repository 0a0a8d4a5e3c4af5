"""`step` learns from the episodes of a user's own loop as `train` does from its own."""

import dataclasses
import inspect
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from plain_loop import plain_loop
from played_episodes import EOS, played_episodes
from recorded_runs import OF_ALGORITHM, SETTINGS, move, trained_parameters
from tiny_trainer import PROMPTS, make_trainer, metrics_of, share_of_praise
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fastpg.trainer import InputError, PPOConfig, PPOTrainer, TrainerCallback
from fastpg.trainer.data.encoding import encode

ROOT = Path(__file__).parents[2]
SCORES = torch.linspace(-1, 1, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(2))]


def own_trainer(folder, **settings):
    """A trainer without a dataset and without rewards."""
    return make_trainer(folder, None, dataset=None, **{"num_mini_batches": 2, **settings})


def columns(episodes):
    """Queries, responses and masks."""
    queries = [torch.tensor(episode.prompt) for episode in episodes]
    responses = [episode.completion for episode in episodes]
    return queries, responses, [torch.tensor(episode.sampled) for episode in episodes]


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_steps_are_those_of_a_plain_loop(tmp_path, algorithm):
    settings = {**SETTINGS, **OF_ALGORITHM[algorithm], "algorithm": algorithm}
    settings |= {"num_ppo_epochs": 1, "reward_weights": None}
    trainer = own_trainer(tmp_path, **settings)
    move(trainer)
    loop = plain_loop(trainer, settings)
    queries, responses, masks = columns(played_episodes())
    finished = torch.tensor([episode.finished for episode in played_episodes()])
    scores = SCORES.double() - 0.3 * (~finished)
    seen, expected = [], []
    for _ in range(2):
        seen.append(trainer.step(queries, responses, SCORES, masks))
        batches = [list(range(6)), list(range(6, 12))]
        expected.append(loop.step(played_episodes(), scores, batches))
    torch.testing.assert_close(
        trained_parameters(trainer).double(), loop.parameters(), rtol=0, atol=3e-6
    )
    logged = metrics_of(tmp_path)
    for step, (row, by_hand) in enumerate(zip(seen, expected, strict=True), start=1):
        assert {name: row[name] for name in by_hand} == pytest.approx(by_hand, rel=1e-4, abs=1e-5)
        assert row["reward/mean"] == pytest.approx(scores.mean().item())
        assert logged[step - 1] == {"step": step, **row}
    with pytest.raises(InputError, match="All num_steps=2 steps are made"):
        trainer.step(queries, responses, SCORES, masks)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    vector = torch.nn.utils.parameters_to_vector(saved.parameters())
    torch.testing.assert_close(vector, trained_parameters(trainer)[: len(vector)])


def test_the_samples_hold_texts_of_whole_episodes(tmp_path):
    trainer, episodes = own_trainer(tmp_path, num_logged_completions=12), played_episodes()
    queries, responses, masks = columns(episodes)
    trainer.step(queries, responses, SCORES, masks)
    lines = (tmp_path / "completions" / "step_000001.jsonl").read_text().splitlines()
    for line, episode, score in zip(lines, episodes, SCORES.tolist(), strict=True):
        sample = json.loads(line)
        words = trainer.tokenizer.decode(episode.completion, skip_special_tokens=True)
        assert (sample["prompt"], sample["completion"]) == (
            trainer.tokenizer.decode(episode.prompt, skip_special_tokens=True), words,
        )  # fmt: skip
        assert sample["score"] == pytest.approx(score)
        assert sample["length"] == sum(episode.sampled)
        assert sample["finished"] == episode.finished


def played(trainer, episodes=8):
    """Queries, and what the policy answers."""
    ids, _ = encode([row["prompt"] for row in PROMPTS[:1]], trainer.tokenizer, None)
    queries = ids.repeat(episodes, 1)
    return queries, trainer.generate(queries)


def test_generate_samples_as_train_does(tmp_path):
    trainer = own_trainer(tmp_path, max_new_tokens=40, temperature=1.5)
    trainer.seed()
    queries, responses = played(trainer)
    trainer.seed()
    rollout = trainer._sample([PROMPTS[0]] * 8)
    for ids, mask, response in zip(rollout.completion_ids, rollout.mask, responses, strict=True):
        assert torch.equal(ids[mask], response)
    assert rollout.finished.any()
    assert all(EOS in x or len(x) == 40 for x in responses)
    metrics = trainer.step(queries, responses, [float(len(x)) for x in responses])
    assert metrics["policy/first_ratio_deviation"] == 0.0
    assert metrics["completions/finished"] == rollout.finished.float().mean().item()


def test_a_loop_that_is_taken_up_ends_in_the_same_bits(tmp_path):
    def loop(folder, steps, resumed=False):
        sizes = {"num_steps": 2, "save_steps": 1, "num_ppo_epochs": 1}
        trainer = own_trainer(folder, adaptive_kl_target=1.0, **sizes)
        trainer.seed()
        done = trainer.resume() if resumed else 0
        for _ in range(done, steps):
            queries, responses = played(trainer)
            trainer.step(queries, responses, [float(len(x)) for x in responses])
        return trainer

    whole = loop(tmp_path / "whole", 2)
    loop(tmp_path / "cut", 1)  # Nobody keeps this trainer, so its files are closed.
    again = loop(tmp_path / "cut", 2, resumed=True)
    assert torch.equal(trained_parameters(again), trained_parameters(whole))
    timeless = [
        [{k: v for k, v in row.items() if "time" not in k and "second" not in k} for row in rows]
        for rows in (metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "cut"))
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 2
    with pytest.raises(InputError, match="resume\\(\\) has to come before the first step"):
        again.resume()


def test_a_loop_that_is_taken_up_at_its_end_can_be_finished(tmp_path):
    trainer = own_trainer(tmp_path, num_steps=1)
    trainer.step(**GOOD)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "model")
    again = own_trainer(tmp_path, num_steps=1)
    assert again.resume() == 1
    again.finish()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert len(metrics_of(tmp_path)) == 1
    with pytest.raises(InputError, match="There is no loop of step"):
        again.finish()


def test_a_loop_that_ends_early_saves_its_model(tmp_path):
    trainer = own_trainer(tmp_path, num_steps=9)
    with pytest.raises(InputError, match="There is no loop of step"):
        trainer.finish()
    queries, responses = played(trainer)
    trainer.step(queries, responses, torch.arange(8))
    assert not (tmp_path / "model").exists()
    trainer.finish()
    assert (tmp_path / "model" / "config.json").exists()
    assert (tmp_path / "checkpoint-1").exists()
    with pytest.raises(InputError, match="This loop is finished"):
        trainer.step(queries, responses, torch.arange(8))


@pytest.mark.parametrize("heard", ["on_step", "on_save"])
def test_a_callback_that_raises_loses_no_step_of_a_loop(tmp_path, heard):
    def fail(step, _):
        raise ZeroDivisionError

    callback = TrainerCallback()
    setattr(callback, heard, fail)
    trainer = own_trainer(tmp_path, num_steps=2)
    trainer.callbacks = [callback]
    with pytest.raises(ZeroDivisionError):
        trainer.step(**GOOD)
        trainer.finish()
    assert (tmp_path / "LATEST").read_text() == "checkpoint-1"
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_train_says_what_it_lacks(tmp_path):
    trainer = own_trainer(tmp_path)
    with pytest.raises(InputError, match="needs train_dataset and reward_funcs, which"):
        trainer.train()
    with pytest.raises(InputError, match="needs eval_dataset and reward_funcs, which"):
        trainer.evaluate()
    trainer = make_trainer(tmp_path, None)
    with pytest.raises(InputError, match=r"^train\(\) needs reward_funcs, which"):
        trainer.train()
    with pytest.raises(InputError, match=r"^train\(\) needs train_dataset, which"):
        make_trainer(tmp_path, share_of_praise, dataset=None).train()
    with pytest.raises(InputError, match="reward_weights has 2 values for 0 reward functions"):
        own_trainer(tmp_path, reward_weights=[1.0, 2.0])
    assert not list(tmp_path.iterdir())


GOOD = {
    "queries": [[5, 6], [5, 6]],
    "responses": [[7, 8, 1], [9]],
    "scores": [1.0, 2.0],
    "response_masks": [[1, 0, 1], [1]],
}
BAD = [
    ({"queries": [[5]]}, "one of each for every episode, not 1 queries, 2 responses, 2 scores, 2"),
    ({"scores": [1.0]}, "2 queries, 2 responses, 1 scores, 2 response_masks"),
    ({"scores": [1.0, math.nan]}, r"scores\[1\] must be finite, not nan"),
    ({"scores": [1e39, 1.0]}, r"scores\[0\] must be finite, not 1e\+39"),
    ({"scores": [1.0, 10**400]}, r"scores\[1\] must be a number, not 1000"),
    ({"queries": None}, "queries must be a 1-D tensor or a list, not None"),
    ({"responses": 7}, "responses must be a 1-D tensor or a list, not 7"),
    ({"scores": [1.0, None]}, r"scores\[1\] must be a number, not None"),
    ({"scores": torch.tensor(1.0)}, "scores must be a 1-D tensor or a list, not a tensor of"),
    ({"scores": torch.ones(2, 1)}, r"scores\[0\] must be a number, not \[1.0\]"),
    ({"queries": [[5, 6], []]}, r"queries\[1\] is empty"),
    ({"responses": [[7, 8, 1], []]}, r"responses\[1\] is empty"),
    ({"responses": [[7, 8, 43], [9]]}, r"responses\[0\] has the token id 43, but the model has 43"),
    ({"queries": [[-1], [5, 6]]}, r"queries\[0\] has the token id -1"),
    (
        {"queries": ["why", [5]]},
        r"queries\[0\] must be a 1-D tensor or a list of token ids, not ",
    ),
    ({"queries": [torch.ones(2), [5]]}, r"queries\[0\] must be .* a tensor of torch.float32"),
    ({"queries": [torch.ones(1, 2).long(), [5]]}, r"token ids, not a tensor of .* \(1, 2\)"),
    ({"queries": [], "responses": [], "scores": [], "response_masks": None}, "no queries"),
    ({"response_masks": [[1, 0], [1]]}, r"response_masks\[0\] has 2 values for 3 tokens"),
    ({"response_masks": [[1, 0, 1], [0]]}, r"response_masks\[1\] is 0 everywhere"),
    ({"response_masks": [[1, 0, 2], [1]]}, r"response_masks\[0\] must hold zeros and ones, not 2"),
    (
        {"response_masks": None, "responses": [[7, 1, 1], [9]]},
        r"responses\[0\] goes on after the",
    ),
    ({"queries": [[5, 6], [5, 7]]}, r"queries\[1\] differs from queries\[0\]"),
    ({name: GOOD[name][:1] for name in GOOD}, "num_generations=2 responses to a query, of which 1"),
    ({"queries": [[5] * 12] * 2}, r"queries\[0\] has 12 tokens, more than max_prompt_length=10"),
    (
        {"responses": [[7, 8, 1], [9] * 31], "response_masks": None},
        r"queries\[1\] and its response have 2 and 31 tokens",
    ),
]


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """A trainer that fails at any forward."""
    trainer = make_trainer(
        tmp_path_factory.mktemp("refusing") / "out", None, dataset=None,
        model=None, algorithm="grpo", num_generations=2, max_prompt_length=10, num_mini_batches=1,
    )  # fmt: skip
    trainer.policy.config.max_position_embeddings = 32
    trainer.model.register_forward_pre_hook(lambda *_: pytest.fail("there was a forward"))
    return trainer


@pytest.mark.parametrize(("changes", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_what_does_not_fit_is_refused_before_any_forward(refusing, changes, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        refusing.step(**{**GOOD, **changes})
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert refusing.scheduler.last_epoch == 0


def test_settings_that_do_not_fit_given_episodes_are_refused(tmp_path):
    few = {name: given[:1] for name, given in GOOD.items()}
    with pytest.raises(InputError, match="1 episodes are too few for num_mini_batches=2"):
        own_trainer(tmp_path).step(**few)
    with pytest.raises(InputError, match=r"queries\[0\] and its response have 2 and 40000 tokens"):
        own_trainer(tmp_path, max_new_tokens=40000).generate([[5, 6]])
    with pytest.raises(InputError, match=r"top_k has to be 0 and top_p 1, not 0 and 0\.9"):
        own_trainer(tmp_path, top_p=0.9).step(**GOOD)


def test_a_model_may_have_fewer_positions_than_a_prompt_usually_has_tokens(tmp_path):
    sizes = {"n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=43, bos_token_id=1, eos_token_id=1, **sizes))
    trainer = make_trainer(tmp_path, None, model, None, max_new_tokens=4)
    assert len(trainer.generate([[5, 6]])[0]) <= 4


def test_the_page_of_own_loops_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/own_loop.md").read_text()
    (code,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names = {}
    exec(code, names)
    assert names["metrics"]["policy/count"] > 0
    assert (tmp_path / "out/own_loop/model").exists()
    page = (ROOT / "docs/from_trl_ppo.md").read_text().partition("## Metrics")[2]
    ours = re.findall(r"^\| .*\| `([^`]+)`[^|]*\|$", page, re.MULTILINE)
    assert len(ours) == 12 and set(ours) <= set(names["metrics"])


def test_the_names_on_the_page_for_users_of_trl_are_ours():
    """The right column of its tables; "the same" stands for the left one."""
    known = {field.name for field in dataclasses.fields(PPOConfig)}
    known |= set(inspect.signature(PPOTrainer).parameters) | set(dir(PPOTrainer))
    page = (ROOT / "docs/from_trl_ppo.md").read_text().partition("## Metrics")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", page, re.MULTILINE)
    assert len(rows) > 50
    for theirs, ours in rows:
        named = re.findall(r"`(\w+)", theirs if ours == "the same" else ours)
        assert ours == "none" or (named and set(named) <= known), (theirs, ours)
        # What has our name is not said to have another one.
        for name in re.findall(r"`(\w+)", theirs):
            assert name not in known or ours == "none" or name in named, theirs
