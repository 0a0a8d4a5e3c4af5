"""What `PPOTrainer` reads, samples, scores and writes, and what it refuses."""

import datetime
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_trainer import PROMPTS, make_trainer, metrics_of, share_of_praise, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fastpg.tasks import reviews
from fastpg.trainer import InputError, PPOTrainer
from fastpg.trainer.data.encoding import encode
from fastpg.trainer.rollouts.generation import sampling
from fastpg.trainer.rollouts.rollout import completion_mask, sample


def test_saved_model_loads(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("the story was", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(loaded(ids).logits, trainer.policy(ids).logits)
    head = load_file(tmp_path / "model" / "value_head.safetensors")
    assert head["weight"].shape == (1, 32)
    assert head["weight"].abs().max() > 0


def test_the_run_is_written(tmp_path):
    trainer = make_trainer(tmp_path, eval_steps=2)
    final = trainer.train()
    first, second = metrics_of(tmp_path)
    assert (first["learning_rate"], second["learning_rate"]) == (1e-3, 5e-4)
    assert "eval/reward/mean" not in first
    assert second["eval/reward/mean"] == final["eval/reward/mean"]
    samples = (tmp_path / "completions" / "step_000002.jsonl").read_text().splitlines()
    assert set(json.loads(samples[0])) >= {"prompt", "completion", "score", "finished"}
    assert list((tmp_path / "tensorboard").glob("events*"))
    summary = (tmp_path / "summary.md").read_text()
    assert "Where the time went" in summary
    assert "token_logprobs" in summary
    assert (tmp_path / "reward.png").stat().st_size > 0
    for words in ("| date | 20", "| command | `", "| versions | fastpg ", "\nseed: 0\n"):
        assert words in summary


def test_an_earlier_run_is_kept(tmp_path):
    make_trainer(tmp_path, num_steps=1).train()
    before = (tmp_path / "metrics.jsonl").read_text()
    make_trainer(tmp_path, num_steps=1, seed=1).train()
    assert (tmp_path / "earlier-1" / "metrics.jsonl").read_text() == before


def test_evaluation_takes_no_random_numbers(tmp_path):
    trainer = make_trainer(tmp_path)
    state = torch.get_rng_state()
    assert trainer.evaluate() == trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), state)


def test_mask_ends_with_the_first_eos():
    ids = torch.tensor([[5, 1, 1, 1], [5, 6, 7, 8], [2, 5, 1, 0], [5, 6, 7, 1]])
    mask, finished = completion_mask(ids, eos_ids=[1, 2])
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert finished.tolist() == [True, False, True, True]


def test_eos_counts_where_it_is_also_the_padding():
    tokenizer = reviews.build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    prompts = ["the story was", "honestly the story was", tokenizer.eos_token + " the plot felt"]
    rollout = sample(
        tiny_model(),
        tokenizer,
        prompts * 20,
        max_prompt_length=9,
        max_new_tokens=30,
        temperature=1.0,
        packing=None,
    )
    is_eos = (rollout.completion_ids == tokenizer.eos_token_id) & rollout.mask
    assert 0 < rollout.finished.sum() < 60
    assert torch.equal(is_eos.sum(-1), rollout.finished.long())
    assert torch.equal((rollout.labels != -100), rollout.mask)
    assert rollout.attention_mask[:3, :4].tolist() == [[0, 1, 1, 1], [1] * 4, [1] * 4]


def test_long_prompts_lose_their_beginning():
    tokenizer = reviews.build_tokenizer()
    ids, mask = encode(["honestly the story was", "plot"], tokenizer, max_length=2)
    assert tokenizer.batch_decode(ids) == ["story was", "<pad> plot"]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_chat_prompts_go_through_the_template():
    tokenizer = reviews.build_tokenizer()
    messages = [{"role": "user", "content": "the plot"}]
    with pytest.raises(InputError, match="no chat template"):
        encode([messages], tokenizer, 9)
    tokenizer.chat_template = (
        "{{ messages[0].content }}{% if add_generation_prompt %} was{% endif %}"
    )
    assert tokenizer.batch_decode(encode([messages], tokenizer, 9)[0]) == ["the plot was"]


def test_chat_rewards_see_messages(tmp_path):
    seen = []

    def reward(prompts, completions):
        seen.extend(completions)
        return [0.0] * len(prompts)

    # A parquet file may have dates, of which JSON knows nothing.
    message = {"role": "user", "content": "the plot", "date": datetime.date(2026, 1, 1)}
    tokenizer = reviews.build_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    make_trainer(
        tmp_path, reward, dataset=[{"prompt": [message]}], tokenizer=tokenizer, num_steps=1
    ).train()
    (line, *_) = (tmp_path / "completions" / "step_000001.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == [{**message, "date": "2026-01-01"}]
    assert [message["role"] for message in seen[0]] == ["assistant"]


def test_rollout_leaves_the_model_as_it_was():
    model = tiny_model().train()
    model.lm_head.eval()
    model.activation_checkpointing_enable()
    own_config = model.generation_config
    before = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), sampling(model, GenerationConfig()):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError
    after = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]
    assert after == before
    assert model.generation_config is own_config
    assert torch.is_grad_enabled()


def test_sampling_is_from_the_whole_distribution():
    model = tiny_model()
    model.generation_config = GenerationConfig(top_k=1, repetition_penalty=2.0, min_p=0.9)
    rollout = sample(
        model,
        reviews.build_tokenizer(),
        ["the story was"] * 40,
        max_prompt_length=9,
        max_new_tokens=1,
        temperature=1.0,
        packing=None,
    )
    assert len(rollout.completion_ids.unique()) > 10


def test_rewards_get_the_columns_they_name(tmp_path):
    dataset = [{**row, "answer": i, "other": None} for i, row in enumerate(PROMPTS)]
    seen = []

    def reward(completions, answer):
        seen.append(answer)
        return answer

    make_trainer(tmp_path, reward, dataset=dataset).evaluate()
    assert seen == [[0, 1]]
    with pytest.raises(InputError, match="needs a dataset column 'answer'"):
        make_trainer(tmp_path, reward).evaluate()


def test_a_column_is_as_deep_as_python_reads_it(tmp_path):
    tree = json.loads("[" * 900 + "]" * 900)
    seen = []

    def reward(completions, tree):
        seen.extend(tree)
        return [0.0] * len(completions)

    dataset = [{**row, "tree": tree} for row in PROMPTS]
    make_trainer(tmp_path, reward, dataset=dataset, num_steps=1).train()
    assert seen and all(value is tree for value in seen)


def test_a_column_may_be_missing_from_the_first_row(tmp_path):
    seen = []

    def reward(completions, answer):
        seen.append(answer)
        return [0.0] * len(completions)

    make_trainer(tmp_path, reward, dataset=[PROMPTS[0], {**PROMPTS[1], "answer": 1}]).evaluate()
    assert seen == [[None, 1]]


def test_reward_weights(tmp_path):
    rewards = [lambda completions: [1.0] * len(completions), share_of_praise]
    trainer = make_trainer(tmp_path, rewards, reward_weights=[3.0, 0.0])
    assert trainer.evaluate()["eval/reward/mean"] == 3.0


def test_unfinished_completions_are_penalised(tmp_path):
    trainer = make_trainer(
        tmp_path,
        lambda completions: [1.0] * len(completions),
        missing_eos_penalty=0.25,
        num_eval_samples=8,
    )
    metrics = trainer.evaluate()
    unfinished = 1 - metrics["eval/completions/finished"]
    assert unfinished > 0
    assert metrics["eval/reward/mean"] == pytest.approx(1 - 0.25 * unfinished)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1.0], "Reward reward returned 1 values for 2 completions."),
        ([1.0, float("nan")], "Reward reward returned nan for completion 1."),
        ([float("inf"), 1.0], "Reward reward returned inf for completion 0."),
        ([1.0, "a"], "Reward reward must return a list of numbers"),
        ([1.0, 1e39], "Reward reward returned inf for completion 1."),
        ([1.0, 10**400], "Reward reward returned inf for completion 1."),
        ({"1": 0, "2": 0}, "Reward reward must return a list of numbers"),
        (3.0, "Reward reward must return a list of numbers, not 3.0."),
        ("11", "Reward reward must return a list of numbers, not '11'."),
        (
            torch.zeros(2, 2),
            "Reward reward must return a list of numbers, not tensor([[0., 0.], [0., 0.]]).",
        ),
    ],
)
def test_bad_rewards_are_refused(tmp_path, values, sentence):
    def reward(prompts, completions):
        return values

    with pytest.raises(InputError) as refusal:
        make_trainer(tmp_path, reward).evaluate()
    assert str(refusal.value).startswith(sentence)


def test_what_cannot_work_is_refused_before_it_is_tried(tmp_path):
    with pytest.raises(
        InputError, match=r"64 positions: too few for the 3 tokens in the prompt of train example 0"
    ):
        make_trainer(tmp_path, model=tiny_model(max_position_embeddings=64), max_new_tokens=62)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"Cannot write to .*file"):
        make_trainer(tmp_path / "file").train()


def test_a_failing_reward_loses_no_finished_step(tmp_path):
    calls = []

    def reward(prompts, completions):
        calls.append(1)
        return [0.0] * len(prompts) if len(calls) < 3 else []

    with pytest.raises(InputError, match="returned 0 values"):
        make_trainer(tmp_path, reward).train()
    assert [row["step"] for row in metrics_of(tmp_path)] == [1]


def test_the_model_is_saved_before_the_last_evaluation(tmp_path):
    calls = []

    def reward(prompts, completions):
        calls.append(1)
        return [0.0] * len(prompts) if len(calls) < 3 else []

    with pytest.raises(InputError, match="returned 0 values"):
        make_trainer(tmp_path, reward, num_steps=1).train()
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_generation_config_that_cannot_be_saved_is_refused(tmp_path):
    model = tiny_model()
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = False
    with pytest.raises(InputError, match="generation_config could not be saved"):
        make_trainer(tmp_path, model=model)


def test_bad_input_is_refused_at_construction(tmp_path):
    with pytest.raises(InputError, match="train dataset is empty"):
        make_trainer(tmp_path, dataset=[])
    with pytest.raises(InputError, match="no reward function"):
        make_trainer(tmp_path, [])
    with pytest.raises(InputError, match="must have a 'prompt'"):
        make_trainer(tmp_path, dataset=[{"text": "the"}])
    with pytest.raises(InputError, match="2 values for 1 reward functions"):
        make_trainer(tmp_path, reward_weights=[1.0, 1.0])
    with pytest.raises(InputError, match="needs its tokenizer"):
        PPOTrainer(tiny_model(), share_of_praise, train_dataset=PROMPTS)
    tokenizer = reviews.build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        PPOTrainer(tiny_model(), share_of_praise, train_dataset=PROMPTS, processing_class=tokenizer)
    assert list(tmp_path.iterdir()) == []
