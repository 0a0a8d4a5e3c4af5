"""Rewards of every kind: what they may ask for, async ones, those of verl and OpenRLHF."""

import asyncio
import sys

import pytest
import torch
from tiny_trainer import PROMPTS, make_trainer

from fastpg.tasks import reviews
from fastpg.trainer import InputError
from fastpg.trainer.rewards.functions import load_reward, score
from fastpg.trainer.rewards.reward_adapters import adapted


def chat_tokenizer():
    tokenizer = reviews.build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}honestly{% endif %}"
    )
    return tokenizer


def test_a_reward_may_ask_for_ids_and_whole_texts(tmp_path):
    seen = {}

    def reward(prompts, completions, completion_ids, texts, prompt_texts):
        seen.update(locals())
        return [0.0] * len(prompts)

    trainer = make_trainer(tmp_path, reward, max_prompt_length=2, num_eval_samples=8)
    trainer.evaluate()
    tokenizer = trainer.tokenizer
    rows = zip(*(seen[name] for name in reward.__code__.co_varnames[:5]), strict=True)
    for prompt, completion, ids, text, prompt_text in rows:
        assert tokenizer.decode(ids, skip_special_tokens=True) == completion
        # The prompt has lost its first words before the model, but not before the reward.
        assert prompt_text == prompt
        assert text.split() == [*prompt.split(), *completion.split()]


def test_the_texts_of_a_chat_are_what_the_policy_saw(tmp_path):
    seen = {}

    def reward(completions, texts, prompt_texts):
        seen.update(locals())
        return [0.0] * len(texts)

    dataset = [{"prompt": [{"role": "user", "content": "the plot was"}]}]
    trainer = make_trainer(tmp_path, reward, dataset=dataset, tokenizer=chat_tokenizer())
    trainer.evaluate()
    (text,), ((message,),) = seen["texts"], seen["completions"]
    assert seen["prompt_texts"] == ["the plot was honestly"]
    assert text.startswith("the plot was honestly ")
    assert text.removesuffix(" <eos>").split()[4:] == message["content"].split()


def columns(**more):
    return {"prompts": ["a", "b"], "completions": ["x", "y"], **more}


def test_async_rewards_wait_together():
    running = []

    async def slow(completions):
        running.append(1)
        await asyncio.sleep(0.05)
        assert len(running) == 2, "the other one has not begun"
        return [1.0, None]

    class Remote:
        async def __call__(self, completions):
            return await slow(completions)

    def plain(completions):
        return [2.0, 3.0]

    rewards = score([slow, plain, Remote()], columns())
    assert list(rewards) == ["slow", "plain", "Remote"]
    assert rewards["plain"].tolist() == [2.0, 3.0]
    for name in ("slow", "Remote"):
        assert rewards[name][0] == 1.0 and rewards[name][1].isnan()


def test_an_async_reward_runs_where_an_event_loop_runs_already():
    async def reward(completions):
        return [1.0, 2.0]

    async def notebook():
        return score([reward], columns())

    assert asyncio.run(notebook())["reward"].tolist() == [1.0, 2.0]


def test_the_error_of_an_async_reward_is_raised():
    async def broken(completions):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        score([broken], columns())


# These have the signatures of verl 0.9 and OpenRLHF 0.11.


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "sums" and extra_info is None
    return {"score": float(solution_str == ground_truth), "acc": True}


def reward_func(queries, prompts, labels):
    pairs = zip(queries, prompts, strict=True)
    assert all(query.startswith(prompt) and len(query) > len(prompt) for query, prompt in pairs)
    return {"rewards": torch.tensor([float(label) for label in labels]), "scores": None}


def test_a_reward_of_verl_is_called_as_verl_does():
    rows = columns(data_source=["sums"] * 2, ground_truth=["x", "z"], other=[1, 2])
    assert score([adapted(compute_score)], rows)["compute_score"].tolist() == [1.0, 0.0]


def test_a_reward_of_verl_finds_the_truth_where_verl_keeps_it(tmp_path):
    row = {"data_source": "sums", "reward_model": {"style": "rule", "ground_truth": "x"}}
    dataset = [{**prompt, **row} for prompt in PROMPTS]
    metrics = make_trainer(tmp_path, compute_score, dataset=dataset).evaluate()
    assert metrics["eval/rewards/compute_score/mean"] == 0.0
    with pytest.raises(InputError, match="compute_score needs a dataset column 'data_source'"):
        make_trainer(tmp_path, compute_score)


def test_a_reward_of_openrlhf_is_called_as_openrlhf_does(tmp_path):
    dataset = [{**prompt, "label": i} for i, prompt in enumerate(PROMPTS)]
    metrics = make_trainer(tmp_path, reward_func, dataset=dataset).evaluate()
    assert metrics["eval/rewards/reward_func/mean"] == 0.5
    with pytest.raises(InputError, match="reward_func needs a dataset column 'label'"):
        make_trainer(tmp_path, reward_func)


def test_rewards_of_verl_and_openrlhf_may_be_async():
    async def compute(data_source, solution_str, ground_truth):
        return compute_score(data_source, solution_str, ground_truth)

    async def reward(queries, prompts, labels):
        return reward_func(queries, prompts, labels)

    rows = columns(data_source=["sums"] * 2, ground_truth=["x", "z"], label=[3, 4])
    rows |= {"prompt_texts": ["a", "b"], "texts": ["ax", "by"]}
    scores = score([adapted(compute), adapted(reward)], rows)
    assert scores["compute"].tolist() == [1.0, 0.0]
    assert scores["reward"].tolist() == [3.0, 4.0]


def test_a_reward_of_verl_gets_no_information_that_it_does_not_take():
    def score_sum(solution_str, ground_truth):
        return float(solution_str == ground_truth)

    rows = columns(ground_truth=["x", "z"], extra_info=[{"index": 1}] * 2)
    assert score([adapted(score_sum)], rows)["score_sum"].tolist() == [1.0, 0.0]


def test_a_dict_without_the_score_is_refused():
    def compute(solution_str, ground_truth):
        return {"acc": 1.0}

    async def reward(queries, prompts):
        return {"score": 1.0}

    rows = columns(ground_truth=["x", "z"]) | {"prompt_texts": ["a", "b"], "texts": ["ax", "by"]}
    with pytest.raises(InputError, match=r"compute returned a dict without 'score': \{'acc': 1.0"):
        score([adapted(compute)], rows)
    with pytest.raises(InputError, match="reward returned a dict without 'rewards'"):
        score([adapted(reward)], rows)


def test_a_reward_that_takes_no_names_is_refused():
    def reward(prompts, completions, /):
        return [0.0] * len(completions)

    with pytest.raises(InputError, match="Reward reward does not take 'prompts' by name"):
        score([reward], columns() | {"prompts": ["a", "b"]})


def test_a_module_that_fails_at_its_import_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("raise ValueError('no\\nkey')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=r"reward 'broken_rewards:f': ValueError: no key\.$"):
        load_reward("broken_rewards:f")


def test_a_reward_or_module_that_ends_the_process_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_script.py").write_text("import sys; sys.exit(5)")
    with pytest.raises(InputError, match=r"Cannot import the module .*: SystemExit: 5."):
        load_reward("a_script:f")

    def ends(completions):
        sys.exit(0)

    async def waits_and_ends(completions):
        sys.exit(0)

    for reward in (ends, waits_and_ends):
        with pytest.raises(InputError, match=rf"A reward .{reward.__name__}. called sys.exit.0."):
            score([reward], {"completions": ["a"]})


def test_a_builtin_that_hides_its_arguments_is_refused():
    with pytest.raises(InputError, match="Reward max does not tell the names it takes"):
        score([max], columns())
