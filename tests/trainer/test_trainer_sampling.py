"""What `PPOTrainer` samples: from which distribution, to which end, for which prompts and seed."""

import pytest
import torch
from recorded_runs import recording, text_of, trained_parameters
from tiny_trainer import PROMPTS, make_trainer, metrics_of, share_of_praise, tiny_model

from fastpg.tasks import reviews
from fastpg.trainer import PPOConfig, PPOTrainer
from fastpg.trainer.rollouts.generation import generate

MANY = [{"prompt": subject} for subject in reviews.subjects()[:16]]
ONE = [{"prompt": "the story was"}]
ONE_STEP = {"num_ppo_epochs": 1, "num_mini_batches": 1, "micro_batch_size": 16}
"""Most tests here do not look at what is learned from a rollout."""


def sharp_model(vocab_size=43):
    """A model whose most likely token is far ahead of most others."""
    model = tiny_model()
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.2)
    return model


def next_token(model, ids, temperature):
    """The probabilities of the token after `ids`."""
    with torch.no_grad():
        return (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)


def evaluated(trainer):
    """The one call of `generate` of an evaluation."""
    with recording(trainer) as rounds:
        trainer.evaluate()
    (only,) = rounds
    return only


def trained(trainer):
    """Every call of `generate` of a training run but those of the first and last evaluation."""
    with recording(trainer) as rounds:
        trainer.train()
    return rounds[1:-1]


def prompts_of(played):
    words = reviews.build_tokenizer().batch_decode(played.input_ids, skip_special_tokens=True)
    return [text.strip() for text in words]


def completions_of(rounds):
    width = rounds[0].input_ids.shape[1]
    return [played.sequences[:, width:].tolist() for played in rounds]


@pytest.mark.parametrize(
    "temperature, packed", [(0.6, True), (1.0, True), (1.7, True), (0.6, False)]
)
def test_tokens_come_from_the_whole_distribution_at_the_temperature(tmp_path, temperature, packed):
    """The frequencies of 8000 tokens of a vocabulary of 300, by Pearson's statistic."""
    trainer = make_trainer(
        tmp_path, model=sharp_model(300), dataset=ONE * 8000, num_eval_samples=8000,
        max_new_tokens=1, temperature=temperature,
    )  # fmt: skip
    assert trainer.engine.packing is not None
    if not packed:
        trainer.engine.packing = None  # The model's own `generate` samples.
    played = evaluated(trainer)
    expected = 8000 * next_token(trainer.policy, played.input_ids[0].tolist(), temperature)
    counts = played.sequences[:, -1].bincount(minlength=300)
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    assert len(expected) > 60  # There are more than the 50 that `generate` keeps by default.
    statistic = ((counts - expected) ** 2 / expected).sum() / (len(expected) - 1)
    assert statistic < 1.6  # Its mean is 1, and its standard deviation below 0.19.


def test_every_rollout_is_sampled_at_the_temperature(tmp_path):
    """Near temperature 0 every token of training and of evaluation is the most likely one."""
    trainer = make_trainer(
        tmp_path, model=sharp_model(), temperature=1e-4, eval_steps=1, learning_rate=0.0, **ONE_STEP
    )
    with recording(trainer) as rounds:
        trainer.train()
    assert len(rounds) == 6
    for played in rounds:
        for episode in played.episodes({1}):
            ids = list(episode.prompt)
            for token in episode.completion:
                assert token == next_token(trainer.policy, ids, 1.0).argmax()
                ids.append(token)


@pytest.mark.parametrize("own", [5, [5, 9], None])
def test_the_models_own_ends_end_a_completion(tmp_path, own):
    model = tiny_model()
    model.generation_config.eos_token_id = own
    ends = {1} | ({own} if isinstance(own, int) else set(own or ()))
    seen = []

    def reward(completions):
        seen.extend(completions)
        return [0.0] * len(completions)

    trainer = make_trainer(
        tmp_path, reward, model=model, dataset=ONE * 80, num_eval_samples=80, max_new_tokens=16
    )
    with recording(trainer) as rounds:
        metrics = trainer.evaluate()
    episodes = rounds[0].episodes(ends)
    assert {e.completion[-1] for e in episodes if e.finished} == ends
    assert {len(e.completion) for e in episodes if not e.finished} == {16}
    assert seen == [text_of(episode, trainer.tokenizer) for episode in episodes]
    for episode, completion in zip(episodes, rounds[0].sequences[:, 3:], strict=True):
        assert set(completion[len(episode.completion) :].tolist()) <= {0}
    finished = sum(e.finished for e in episodes) / 80
    assert metrics["eval/completions/finished"] == pytest.approx(finished)
    lengths = sum(len(e.completion) for e in episodes) / 80
    assert metrics["eval/completions/mean_length"] == pytest.approx(lengths)


def put_noise_after_the_end(monkeypatch, ends):
    """Make `generate` return ordinary tokens, and further ends, where it has padding."""
    ends = torch.tensor(ends)
    g = torch.Generator().manual_seed(4)

    def noisy(policy, input_ids, attention_mask, *options):
        sequences = generate(policy, input_ids, attention_mask, *options)
        completions = sequences[:, input_ids.shape[1] :]
        is_end = torch.isin(completions, ends).long()
        after_end = is_end.cumsum(1) - is_end > 0
        assert (completions[after_end] == 0).all()
        completions[after_end] = torch.randint(1, 43, completions.shape, generator=g)[after_end]
        return sequences

    monkeypatch.setattr("fastpg.trainer.rollouts.rollout.generate", noisy)


@pytest.mark.slow
def test_what_follows_the_end_of_a_completion_changes_nothing(tmp_path, monkeypatch):
    """Neither the texts that are rewarded nor the training hang on the padding of `generate`."""
    results = []
    for is_noisy in (False, True):
        texts, folder = [], tmp_path / f"{is_noisy}"

        def reward(prompts, completions, texts=texts):
            texts.extend(completions)
            return share_of_praise(prompts, completions)

        model = tiny_model()
        model.generation_config.eos_token_id = [5, 9]
        trainer = make_trainer(folder, reward, model=model, max_new_tokens=12)
        if is_noisy:
            put_noise_after_the_end(monkeypatch, [1, 5, 9])
        trainer.train()
        rows = [
            {k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_second"))}
            for row in metrics_of(folder)
        ]
        results.append((texts, rows, trained_parameters(trainer)))
    (texts, rows, parameters), (noisy_texts, noisy_rows, noisy_parameters) = results
    assert 0 < rows[0]["completions/finished"] < 1
    assert noisy_texts == texts
    assert noisy_rows == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in rows]
    torch.testing.assert_close(noisy_parameters, parameters, rtol=0, atol=1e-6)


def test_sampling_is_in_evaluation_mode_under_gradient_checkpointing(tmp_path):
    model = tiny_model(attention_dropout=0.5)
    model.activation_checkpointing_enable()
    trainer = make_trainer(tmp_path, model=model, num_steps=1, **ONE_STEP)
    assert any(module.training for module in trainer.policy.modules())
    with recording(trainer) as rounds:
        trainer.train()
    assert [played.is_quiet for played in rounds] == [True] * 3


@pytest.mark.parametrize("algorithm, generations", [("ppo", 1), ("dr_grpo", 2)])
def test_the_seed_decides_the_order_of_the_prompts(tmp_path, algorithm, generations):
    """Every pass over the dataset is a permutation of its own."""
    settings = {"algorithm": algorithm, "num_generations": generations, "max_new_tokens": 2}
    settings |= {"num_steps": 4, "rollout_batch_size": 8 * generations, **ONE_STEP}
    orders = {}
    for run, seed in (("first", 3), ("again", 3), ("other", 4)):
        trainer = make_trainer(tmp_path / run, dataset=MANY, seed=seed, **settings)
        prompts = [p for played in trained(trainer) for p in prompts_of(played)]
        assert all(
            len(set(prompts[i : i + generations])) == 1 for i in range(0, len(prompts), generations)
        )
        orders[run] = prompts[::generations]
    given = [row["prompt"] for row in MANY]
    passes = [order[i : i + 16] for order in orders.values() for i in (0, 16)]
    assert all(sorted(order) == sorted(given) for order in passes)
    assert orders["first"] == orders["again"]
    assert len(set(map(tuple, [given, *passes]))) == 5


def test_the_seed_decides_the_samples(tmp_path):
    runs = {}
    for run, seed in (("first", 3), ("again", 3), ("other", 4)):
        trainer = make_trainer(tmp_path / run, dataset=ONE, seed=seed, **ONE_STEP)
        with recording(trainer) as rounds:
            trainer.train()
        runs[run] = completions_of(rounds)
    assert runs["first"] == runs["again"]
    for mine, others in zip(runs["first"], runs["other"], strict=True):
        assert mine != others
    assert runs["first"][1] != runs["first"][2]  # The two steps have samples of their own.


def test_an_evaluation_draws_the_same_samples_and_takes_none_from_training(tmp_path):
    settings = {"learning_rate": 0.0, "dataset": ONE * 4, **ONE_STEP}
    watched = trained(make_trainer(tmp_path / "watched", eval_steps=1, **settings))
    plain = trained(make_trainer(tmp_path / "plain", **settings))
    assert len(watched) == 4
    assert completions_of(watched[::2]) == completions_of(plain)
    first, second = completions_of(watched[1::2])
    assert first == second


def test_an_evaluation_is_of_the_first_prompts_of_its_dataset(tmp_path):
    args = PPOConfig(
        output_dir=str(tmp_path), num_eval_samples=5, max_new_tokens=2, max_prompt_length=2
    )
    for own in (MANY[8:], MANY[12:], None):
        trainer = PPOTrainer(
            tiny_model(), share_of_praise, args, train_dataset=PROMPTS, eval_dataset=own,
            processing_class=reviews.build_tokenizer(),
        )  # fmt: skip
        played = evaluated(trainer)
        expected = [row["prompt"].split()[-2:] for row in (own or PROMPTS)[:5]]
        assert [prompt.split() for prompt in prompts_of(played)] == expected


def test_a_reward_is_asked_once_for_every_episode_with_its_row(tmp_path):
    """The prompts, the columns and the completions of one call belong together."""
    rows = [{**row, "number": i} for i, row in enumerate(MANY)]
    calls = []

    def reward(prompts, completions, number):
        calls.append((prompts, completions, number))
        return [float(i) for i in number]

    trainer = make_trainer(
        tmp_path,
        reward,
        dataset=rows,
        algorithm="dr_grpo",
        num_generations=2,
        max_new_tokens=3,
        **ONE_STEP,
    )
    with recording(trainer) as rounds:
        trainer.train()
    assert len(calls) == len(rounds) == 4
    for (prompts, completions, number), played in zip(calls, rounds, strict=True):
        assert prompts == prompts_of(played) == [MANY[i]["prompt"] for i in number]
        episodes = played.episodes({1})
        assert completions == [text_of(episode, trainer.tokenizer) for episode in episodes]
    for row, (_, _, number) in zip(metrics_of(tmp_path), calls[1:-1], strict=True):
        assert row["reward/mean"] == pytest.approx(sum(number) / 10)
