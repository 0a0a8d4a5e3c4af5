"""What `PPOTrainer` promises, on a tiny model with random weights."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastpg.tasks import reviews
from fastpg.trainer import InputError, PPOConfig, PPOTrainer
from fastpg.trainer.models import PolicyWithValue
from fastpg.trainer.rollout import completion_mask, encode, sample, sampling

PROMPTS = [{"prompt": subject} for subject in reviews.subjects()[:8]]
SETTINGS = {
    "num_steps": 2,
    "rollout_batch_size": 10,
    "max_new_tokens": 6,
    "micro_batch_size": 2,  # does not divide the 5 episodes of a minibatch
    "learning_rate": 1e-3,
    "num_eval_samples": 2,
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(**changes) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=43,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        **changes,
    )
    return Qwen3ForCausalLM(config)


def tiny_gpt2() -> GPT2LMHeadModel:
    """A model of absolute positions: to it padding is not just masked keys."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=43,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def share_of_praise(prompts, completions):
    counts = [[word in reviews.POSITIVE for word in c.split()] for c in completions]
    return [sum(count) / max(len(count), 1) for count in counts]


def make_trainer(output_dir, reward=share_of_praise, model=None, dataset=PROMPTS, **settings):
    return PPOTrainer(
        model or tiny_model(),
        reward,
        PPOConfig(output_dir=str(output_dir), **{**SETTINGS, **settings}),
        train_dataset=dataset,
        processing_class=reviews.build_tokenizer(),
    )


def metrics_of(output_dir) -> list[dict]:
    return [json.loads(line) for line in Path(output_dir, "metrics.jsonl").read_text().splitlines()]


def parameters_after_a_step(output_dir, model=None, **settings) -> torch.Tensor:
    trainer = make_trainer(output_dir, model=model, **{"num_steps": 1, **settings})
    trainer.train()
    return torch.nn.utils.parameters_to_vector(trainer.learner.model.parameters())


def test_first_ratio_is_exactly_one_and_first_kl_zero(tmp_path):
    make_trainer(tmp_path, model=tiny_model(attention_dropout=0.5)).train()
    first, second = metrics_of(tmp_path)
    assert first["policy/first_ratio_deviation"] == second["policy/first_ratio_deviation"] == 0.0
    assert first["policy/ratio_max"] > 1.0  # later ones do move
    assert first["objective/kl"] == 0.0 != second["objective/kl"]


def test_learns_a_toy_reward(tmp_path):
    trainer = make_trainer(
        tmp_path, num_steps=20, rollout_batch_size=32, micro_batch_size=16, learning_rate=1e-2
    )
    trainer.train()
    rewards = [row["reward/mean"] for row in metrics_of(tmp_path)]
    assert rewards[0] < 0.4
    assert rewards[-1] > 0.8


MATHS = {
    "kl_coef": 0.3,
    "gamma": 0.9,
    "lam": 0.7,
    "temperature": 1.7,
    "cliprange": 0.1,
    "cliprange_value": 0.1,
    "vf_coef": 0.7,
    "entropy_coef": 0.3,
}
"""Away from the defaults, and none 0 or 1, so that none can be left out."""


def perturb(model, scale):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)


def maths_trainer(output_dir, **settings):
    """A trainer whose policy is not its reference, with values, and a left-padded rollout."""
    trainer = make_trainer(output_dir, max_new_tokens=16, **MATHS, **settings)
    perturb(trainer.model, 0.1)
    rows = [{"prompt": text} for text in ["the story was", "honestly the story was", "plot"] * 3]
    rollout = trainer._sample(rows)
    assert not rollout.attention_mask[:, 0].all()
    assert 0 < rollout.finished.sum() < len(rows)
    return trainer, rollout


def by_hand(policy, value_head, rollout, temperature):
    """fp64, unpadded: for each episode log-probs and entropies [L], and values [L]."""
    policy, episodes = copy.deepcopy(policy).double(), []
    for ids, kept, mask in zip(
        rollout.input_ids, rollout.attention_mask, rollout.mask, strict=True
    ):
        ids, length = ids[kept.bool()], int(mask.sum())
        out = policy(ids[None], output_hidden_states=True)
        logp = (out.logits[0, -length - 1 : -1] / temperature).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        hidden = out.hidden_states[-1][0, -length - 1 : -1]
        values = hidden @ value_head.weight[0].double() + value_head.bias.double()
        episodes.append((logp.gather(-1, ids[-length:, None])[:, 0], entropy, values))
    return episodes


def credit_by_hand(kl, values, score):
    """Advantages and returns of one episode, by the recursion."""
    rewards = -MATHS["kl_coef"] * kl
    rewards[-1] += score
    advantages, following, next_value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(len(values))):
        delta = rewards[t] + MATHS["gamma"] * next_value - values[t]
        following = delta + MATHS["gamma"] * MATHS["lam"] * following
        advantages[t], next_value = following, values[t]
    return advantages, advantages + values


@torch.no_grad()
@pytest.mark.parametrize("make_model", [tiny_model, tiny_gpt2])
def test_experience_against_a_computation_by_hand(tmp_path, make_model):
    trainer, rollout = maths_trainer(tmp_path, model=make_model())
    scores = torch.linspace(-1, 2, len(rollout.mask))
    experience, metrics = trainer.learner.experience(rollout, scores)
    head = trainer.model.value_head
    own = by_hand(trainer.policy, head, rollout, MATHS["temperature"])
    other = by_hand(trainer.learner.reference, head, rollout, MATHS["temperature"])
    kl = [p[0] - q[0] for p, q in zip(own, other, strict=True)]
    credit = [credit_by_hand(*x) for x in zip(kl, (p[2] for p in own), scores, strict=True)]
    advantages, returns = (torch.cat(column) for column in zip(*credit, strict=True))
    whitened = (advantages - advantages.mean()) / advantages.std()
    logp, _, values = (torch.cat(column) for column in zip(*own, strict=True))
    assert values.abs().mean() > 0.1
    for actual, expected in [
        (experience.logp, logp),  # unpadded by hand: padding on the left changes nothing
        (experience.values, values),
        (experience.returns, returns),
        (experience.advantages, whitened),
    ]:
        torch.testing.assert_close(actual[rollout.mask].double(), expected, rtol=1e-4, atol=1e-4)
    assert metrics["objective/kl"] == pytest.approx(float(sum(x.sum() for x in kl)) / 9, rel=1e-3)


@torch.no_grad()
def test_loss_against_a_computation_by_hand(tmp_path):
    trainer, rollout = maths_trainer(tmp_path)
    old, _ = trainer.learner.experience(rollout, torch.linspace(-1, 2, len(rollout.mask)))
    perturb(trainer.model, 0.02)
    tokens = 2 * rollout.mask.sum()  # as if these were half of an optimiser step
    loss, *_ = trainer.learner._loss(old, tokens)
    own = by_hand(trainer.policy, trainer.model.value_head, rollout, MATHS["temperature"])
    logp, entropy, values = (torch.cat(column) for column in zip(*own, strict=True))
    old_logp, old_values, advantages, returns = (
        x[rollout.mask].double() for x in (old.logp, old.values, old.advantages, old.returns)
    )
    ratio = (logp - old_logp).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)
    near = old_values + (values - old_values).clamp(-0.1, 0.1)
    error = 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)
    assert (surrogate != ratio * advantages).any()
    assert (error != 0.5 * (values - returns) ** 2).any()
    expected = (-surrogate - 0.3 * entropy + 0.7 * error).sum() / tokens
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_the_gradient_is_clipped(tmp_path):
    trainer = make_trainer(tmp_path, num_steps=1, max_grad_norm=1e-3)
    norms = []

    def record(*_):
        gradients = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
        norms.append(torch.stack(gradients).norm())

    trainer.learner.optimizer.optimizer.register_step_pre_hook(record)
    trainer.train()
    assert metrics_of(tmp_path)[0]["grad_norm"] > 2e-3
    torch.testing.assert_close(torch.stack(norms), torch.full((8,), 1e-3), rtol=2e-2, atol=0)


def test_micro_batches_add_up(tmp_path):
    whole = parameters_after_a_step(tmp_path / "whole", micro_batch_size=10)
    split = parameters_after_a_step(tmp_path / "split", micro_batch_size=2)
    start = torch.nn.utils.parameters_to_vector(tiny_model().parameters())
    assert (whole[: len(start)] - start).abs().max() > 1e-4
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-6)


def tiny_opt(**changes) -> OPTForCausalLM:
    """A model whose layers call functional dropout, and whose last states are projected."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=43,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        **changes,
    )
    return OPTForCausalLM(config)


def test_functional_dropout_is_off_under_gradient_checkpointing(tmp_path):
    plain = parameters_after_a_step(tmp_path / "plain", model=tiny_opt(dropout=0.0))
    model = tiny_opt(dropout=0.3)
    model.activation_checkpointing_enable()
    checkpointed = parameters_after_a_step(tmp_path / "checkpointed", model=model)
    assert metrics_of(tmp_path / "checkpointed")[0]["policy/first_ratio_deviation"] == 0.0
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-6)


def test_values_are_float32_under_mixed_precision():
    model = PolicyWithValue(tiny_opt())
    torch.nn.init.ones_(model.value_head.weight)
    ids = torch.arange(12).view(2, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, values = model(ids, torch.ones_like(ids), 3)
    assert logits.shape == (2, 3, 43)
    assert values.dtype == torch.float32


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = parameters_after_a_step(tmp_path / "plain")
    model = tiny_model()
    model.activation_checkpointing_enable()
    forwards = []
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda *_: forwards.append(1))
    checkpointed = parameters_after_a_step(tmp_path / "checkpointed", model=model)
    recomputed = len(forwards)
    model.activation_checkpointing_disable()
    forwards.clear()
    parameters_after_a_step(tmp_path / "again", model=model)
    assert recomputed > len(forwards)
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-6)


def test_reference_is_frozen(tmp_path):
    model = tiny_model()
    start = copy.deepcopy(model.state_dict())
    trainer = make_trainer(tmp_path, model=model)
    trainer.train()
    reference = trainer.learner.reference
    assert not any(p.requires_grad for p in reference.parameters())
    torch.testing.assert_close(reference.state_dict(), start, rtol=0, atol=0)
    assert not torch.equal(model.lm_head.weight, start["lm_head.weight"])


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
    assert (tmp_path / "reward_and_kl.png").stat().st_size > 0


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

    dataset = [{"prompt": [{"role": "user", "content": "the plot"}]}]
    trainer = make_trainer(tmp_path, reward, dataset=dataset)
    trainer.tokenizer.chat_template = "{{ messages[0].content }}"
    trainer.evaluate()
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
        ([1.0, None], "Reward reward must return a list of numbers"),
        ([1.0, 1e39], "Reward reward returned inf for completion 1."),
        ([1.0, 10**400], "Reward reward returned inf for completion 1."),
        ({"1": 0, "2": 0}, "Reward reward must return a list of numbers"),
        (3.0, "Reward reward must return a list of numbers, not 3.0."),
    ],
)
def test_bad_rewards_are_refused(tmp_path, values, sentence):
    def reward(prompts, completions):
        return values

    with pytest.raises(InputError) as refusal:
        make_trainer(tmp_path, reward).evaluate()
    assert str(refusal.value).startswith(sentence)


def test_what_cannot_work_is_refused_before_it_is_tried(tmp_path):
    with pytest.raises(InputError, match=r"64 positions.* prompt of 3 tokens"):
        make_trainer(
            tmp_path, model=tiny_model(max_position_embeddings=64), max_new_tokens=62
        ).evaluate()
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
