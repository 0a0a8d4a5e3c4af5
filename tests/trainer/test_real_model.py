"""SmolLM2-135M-Instruct, whose pad is its EOS, whose head is tied, and whose chat template is real.

`make real` lays it out. Where it is not, these tests are left out.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_trainer import metrics_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpg.trainer import PPOConfig, PPOTrainer
from fastpg.trainer.data.encoding import encode
from fastpg.trainer.models.policy import CompletionBatch, logprobs_through
from fastpg.trainer.rollouts.rollout import sample

MODEL = Path(__file__).parents[2] / ".real" / "smollm2"
CHATS = [
    [{"role": "user", "content": "What is 3 plus 1?"}],
    [{"role": "user", "content": "What is 3 plus 1?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a color."}],
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.exists(), reason="make real has not been run"),
]


def brevity(completions):
    return [-float(len(completion[0]["content"])) for completion in completions]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    args = PPOConfig(
        algorithm="grpo", output_dir=str(tmp_path_factory.mktemp("real")), num_steps=1,
        rollout_batch_size=4, num_generations=2, max_new_tokens=4, num_eval_samples=2,
        kl_coef=0.0, save_steps=None,
    )  # fmt: skip
    return PPOTrainer(str(MODEL), brevity, args, train_dataset=[{"prompt": c} for c in CHATS])


def played(trainer):
    torch.manual_seed(0)
    return sample(
        trainer.policy, trainer.tokenizer, CHATS, max_prompt_length=None, max_new_tokens=5,
        temperature=1.0, packing=trainer.paths.packing,
    )  # fmt: skip


def test_its_tied_head_and_its_rows_take_the_fast_paths(trainer):
    """They give the log-probs of the model's logits."""
    assert trainer.paths.head is not None and trainer.paths.packing is not None
    rollout = played(trainer)
    batch = CompletionBatch(
        rollout.input_ids, rollout.attention_mask, rollout.labels, 1.0,
        trainer.paths.head, trainer.paths.packing,
    )  # fmt: skip
    with torch.no_grad():
        ours = logprobs_through(trainer.model, batch).logp
        for row in range(len(CHATS)):
            ids = rollout.input_ids[row][rollout.attention_mask[row].bool()][None]
            logp = trainer.policy(ids).logits.double().log_softmax(-1)
            own = logp[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
            kept = rollout.mask[row]
            expected = own[-int(kept.sum()) :]
            torch.testing.assert_close(ours[row][kept].double(), expected, rtol=0, atol=2e-4)


def test_its_chat_template_makes_the_prompts(trainer):
    ids, kept = encode(CHATS[2:], trainer.tokenizer, None)
    text = trainer.tokenizer.decode(ids[0][kept[0].bool()])
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a color.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_eos_of_a_completion_counts_though_it_is_the_padding(trainer):
    eos = trainer.tokenizer.eos_token_id
    assert trainer.tokenizer.pad_token_id == eos
    prompt = [*CHATS[0], {"role": "assistant", "content": "4"}, CHATS[0][0]]
    torch.manual_seed(0)
    rollout = sample(
        trainer.policy, trainer.tokenizer, [prompt] * 16, max_prompt_length=None,
        max_new_tokens=4, temperature=0.5, packing=trainer.paths.packing,
    )  # fmt: skip
    assert rollout.finished.any()
    for ids, mask, finished in zip(
        rollout.completion_ids, rollout.mask, rollout.finished, strict=True
    ):
        assert (ids[mask][-1] == eos) == finished
        assert not (ids[mask][:-1] == eos).any()


def test_a_step_begins_at_ratio_1_and_what_is_saved_is_tied(trainer):
    before = trainer.policy.lm_head.weight.detach().clone()
    trainer.train()
    folder = Path(trainer.args.output_dir)
    (metrics,) = metrics_of(folder)
    # The default settings make several optimiser steps; the first of them is at ratio 1.
    assert metrics["policy/first_ratio_deviation"] < 1e-4
    with safe_open(folder / "model" / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert torch.equal(loaded.lm_head.weight, trainer.policy.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, before)
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template
