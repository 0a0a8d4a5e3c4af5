"""What `PPOTrainer` learns, by hand and by its laws, on a tiny model with random weights."""

import copy

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_trainer import make_trainer, metrics_of, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from fastpg.ops.vocabulary import linear_token_loss
from fastpg.trainer.models.head import HeadTransform
from fastpg.trainer.models.policy import CompletionBatch, PolicyWithValue


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


def parameters_after_a_step(output_dir, model=None, **settings) -> torch.Tensor:
    trainer = make_trainer(output_dir, model=model, **{"num_steps": 1, **settings})
    trainer.train()
    return torch.nn.utils.parameters_to_vector(trainer.learner.model.parameters())


@pytest.fixture
def another_precision():
    AcceleratorState._reset_state()  # or that of an earlier trainer would stay
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_first_ratio_is_exactly_one_and_first_kl_zero(tmp_path, another_precision, precision):
    model = tiny_model(attention_dropout=0.5)
    make_trainer(tmp_path, model=model, mixed_precision=precision).train()
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
    assert sum(rewards[-5:]) / 5 > 0.7  # a single one hangs on the last bit of the first step


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
    loss, *_ = trainer.learner._loss(old, trainer.learner._targets(old, tokens))
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "eager"),
    ],
)
def test_what_reaches_accelerate_by_the_environment_changes_nothing(
    tmp_path, monkeypatch, another_precision, name, value
):
    plain = parameters_after_a_step(tmp_path / "plain")
    AcceleratorState._reset_state()
    monkeypatch.setenv(name, value)
    trainer = make_trainer(tmp_path / "again", num_steps=1)
    assert not hasattr(trainer.learner.model, "_orig_mod")
    trainer.train()
    again = torch.nn.utils.parameters_to_vector(trainer.learner.model.parameters())
    assert torch.equal(again, plain)


def test_chunks_of_a_micro_batch_add_up(tmp_path, monkeypatch):
    """The parameters, and what was counted of every one of them."""
    results = []
    for rows in (7, 1000):
        monkeypatch.setattr(linear_token_loss, "CHUNK_ROWS", {"cpu": {4: rows}})
        parameters = parameters_after_a_step(tmp_path / f"{rows}", micro_batch_size=5)
        metrics = metrics_of(tmp_path / f"{rows}")[0]
        results.append((parameters, {k: v for k, v in metrics.items() if k.startswith("policy/")}))
    (few, some), (one, whole) = results
    torch.testing.assert_close(few, one, rtol=0, atol=1e-6)
    assert some == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert whole["policy/count"] > 7 * 5


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


def test_outputs_are_float32_under_mixed_precision():
    model = PolicyWithValue(tiny_opt())
    torch.nn.init.ones_(model.value_head.weight)
    ids = torch.arange(12).view(2, 6)
    for head in (HeadTransform(), None):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            batch = CompletionBatch(ids, torch.ones_like(ids), ids[:, -3:], 1.0, head)
            outputs = model.logprobs(batch)
        assert all(x.shape == (2, 3) and x.dtype == torch.float32 for x in outputs)


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


def test_a_head_that_is_not_understood_falls_back_to_the_logits(tmp_path, caplog):
    plain = parameters_after_a_step(tmp_path / "plain")
    assert not caplog.records
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *_: None)
    fallen_back = parameters_after_a_step(tmp_path / "fallen back", model=model)
    (record,) = caplog.records
    sentence = "Log-probs come from the model's logits, for the LM head has a hook of its own."
    assert record.message.endswith(sentence)
    torch.testing.assert_close(fallen_back, plain, rtol=0, atol=1e-6)
