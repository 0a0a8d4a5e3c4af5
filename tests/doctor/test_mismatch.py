"""`fastpg doctor mismatch` names the one thing that is wrong with the log-probs of rollouts.

The engine here is Hugging Face's: the model's own logits, its logits processors, log_softmax.
"""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastpg.cli import main
from fastpg.doctor.mismatch_command import load_model, report_of
from fastpg.doctor.rollouts import Rollout, load_rollouts
from fastpg.doctor.sampling import kept_tokens
from fastpg.trainer import InputError
from fastpg.trainer.rollouts.sampling import Sampling

WORDS = ["<pad>", "<bos>", "<eos>", "<user>", "<answer>", *(f"w{i}" for i in range(91))]
KNOWN = len(WORDS)
VOCAB = 128  # rows of the head; those beyond WORDS are padding
TEMPLATE = "<bos> {% for m in messages %}<user> {{ m['content'] }} {% endfor %}" + (
    "{% if add_generation_prompt %}<answer>{% endif %}"
)
CONTENTS = ["w3 w4 w5", "w9 w8 w7", "w1 w1 w1", "w4 w60 w70", "w7 w5 w3", "w2 w0 w8"]
LENGTHS = [24, 20, 17, 12, 22, 9]  # of the completions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in bf16, its tokenizer with a chat template."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(12.0)  # else all tokens are about as likely
        model.model.embed_tokens.weight.mul_(50.0)
        for layer in model.model.layers:  # else what comes before a token hardly matters
            layer.self_attn.o_proj.weight.mul_(50.0)
            layer.self_attn.v_proj.weight.mul_(10.0)
    model.bfloat16().save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return str(path)


class Engine:
    """Samples from a model, and tells the log-probs in one of the ways that engines do."""

    def __init__(self, folder, dtype=torch.float32, vocab=KNOWN, warpers=(), raw=False):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.vocab, self.warpers, self.raw = vocab, warpers, raw

    def prompt(self, content):
        """The tokens of a prompt, by the chat template."""
        return self.tokenizer.apply_chat_template(
            chat_of(content), add_generation_prompt=True, return_dict=False
        )

    def rollouts(self, temperature=1.0, seen=lambda prompt: prompt, told=lambda prompt: prompt):
        """Rollouts whose prompts are told otherwise than they were seen."""
        generator = torch.Generator().manual_seed(1)
        prompts = [self.prompt(content) for content in CONTENTS]
        ids = torch.tensor([seen(prompt) for prompt in prompts])
        logp, start = [], ids.shape[1]
        for _ in range(max(LENGTHS)):
            scores = self.scores(ids, temperature)
            tokens = torch.multinomial(scores.softmax(-1), 1, generator=generator)
            told_scores = self.scores(ids, 1.0) if self.raw else scores
            logp.append(told_scores.log_softmax(-1).gather(-1, tokens))
            ids = torch.cat([ids, tokens], -1)
        rows = zip(prompts, ids[:, start:].tolist(), torch.cat(logp, -1).tolist(), strict=True)
        return [
            Rollout("a test", told(prompt), completion[:length], logp[:length], chat_of(content))
            for (prompt, completion, logp), length, content in zip(
                rows, LENGTHS, CONTENTS, strict=True
            )
        ]

    @torch.no_grad()
    def scores(self, ids, temperature):
        """The logits that the engine samples of; in fp32, as those of all engines."""
        hidden = self.model.model(ids).last_hidden_state[:, -1]
        logits = (hidden.float() @ self.model.lm_head.weight.float().T)[:, : self.vocab]
        for warper in (lambda _, x: x / temperature, *self.warpers):
            logits = warper(None, logits)
        return logits


def chat_of(content):
    return [{"role": "user", "content": content}]


def report(folder, rollouts, dtype="float32", **sampling):
    """What the command finds."""
    policy = load_model(folder, dtype, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return report_of(policy, tokenizer, rollouts, Sampling(**sampling))


def assert_only_cause(found, field, left=1e-4):
    """One correction, which is of this field, takes the log-ratios to 0."""
    assert found.taken[0].gap.mean > 10 * left
    assert [row.correction.field for row in found.taken[1:]] == [field], str(found)
    assert found.largest.field == field and found.largest.cause in found.sentence
    assert found.left.largest < 10 * left and found.left.outside == 0.0
    assert found.sentence.startswith("The largest cause is ")


def whole(folder, **options):
    """An engine of all rows of the head."""
    return Engine(folder, vocab=VOCAB, **options)


def test_log_probs_that_agree_have_no_cause(folder):
    found = report(folder, whole(folder).rollouts())
    assert found.sentence == "The log-probs agree." and found.largest is None
    assert len(found.taken) == 1 and found.left.largest < 1e-4
    assert found.tokens == sum(LENGTHS) and found.sequences == len(LENGTHS)


def test_a_temperature_that_the_trainer_does_not_divide_by(folder):
    found = report(folder, whole(folder).rollouts(0.7), temperature=0.7)
    assert_only_cause(found, "temperature")
    assert "logits / 0.7" in found.sentence


def test_log_probs_of_before_the_temperature(folder):
    found = report(folder, whole(folder, raw=True).rollouts(0.7), temperature=0.7)
    assert len(found.taken) == 1 and found.left.largest < 1e-4
    assert found.largest.field == "temperature" and "raw_logprobs" in found.sentence
    (row,) = [row for row in found.others if row.correction.field == "temperature"]
    assert row.gap.mean > 0.05 and f"worth {row.gap.mean:.2g} of mean" in found.sentence


@pytest.mark.parametrize(
    ("warper", "sampling"),
    [
        (TopKLogitsWarper(5), {"top_k": 5}),
        (TopPLogitsWarper(0.8), {"top_p": 0.8}),
        (MinPLogitsWarper(0.1), {"min_p": 0.1}),
    ],
)
def test_the_kept_mass(folder, warper, sampling):
    found = report(folder, whole(folder, warpers=[warper]).rollouts(), **sampling)
    assert_only_cause(found, "kept")
    assert next(iter(sampling)) in found.sentence


def test_kept_sets_are_those_of_hugging_face():
    logits = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    sampled, expected = logits.argmax(-1), logits / 0.7
    for warper in (MinPLogitsWarper(0.02), TopKLogitsWarper(9), TopPLogitsWarper(0.9)):
        expected = warper(None, expected)
    token_ids, offsets = kept_tokens(logits, sampled, Sampling(0.7, 9, 0.9, 0.02))
    for i, row in enumerate(expected):
        kept = token_ids[offsets[i] : offsets[i + 1]]
        assert torch.equal(kept, row.isfinite().nonzero()[:, 0])
    # A token that was sampled is in its set.
    least = logits.argmin(-1)
    token_ids, offsets = kept_tokens(logits, least, Sampling(top_k=1))
    assert offsets.diff().eq(2).all() and (token_ids.view(-1, 2) == least[:, None]).any(-1).all()


def test_logits_in_bf16(folder):
    engine = whole(folder, dtype=torch.bfloat16)
    found = report(folder, engine.rollouts(), "bfloat16")
    assert "fp32_logits" in [row.correction.field for row in found.taken[1:]]
    assert found.largest.field == "fp32_logits" and "bfloat16 logits" in found.sentence
    assert found.left.mean < found.taken[0].gap.mean / 2


def test_a_padded_vocabulary(folder):
    found = report(folder, Engine(folder).rollouts())
    assert_only_cause(found, "vocab")
    assert f"{VOCAB} rows" in found.sentence and f"{KNOWN} tokens" in found.sentence


def test_a_doubled_bos_of_the_engine(folder):
    found = report(folder, whole(folder).rollouts(seen=lambda prompt: [1, *prompt]))
    assert_only_cause(found, "prompts")
    assert "one BOS token more" in found.sentence


def test_a_doubled_bos_of_the_trainer(folder):
    rollouts = whole(folder).rollouts(told=lambda prompt: [1, *prompt])
    unknown = [rollout._replace(chat=None) for rollout in rollouts]
    found = report(folder, unknown)
    assert_only_cause(found, "prompts")
    assert "one BOS token less" in found.sentence


def test_a_chat_template_that_the_trainer_does_not_use(folder):
    found = report(folder, whole(folder).rollouts(told=lambda prompt: prompt[2:-1]))
    assert_only_cause(found, "prompts")
    assert "chat template, with the generation prompt" in found.sentence


def rounds_otherwise_in_a_batch(module, arguments, output):
    """Stands for a GPU's kernels: their sums depend on the batch, a tiny model's here do not."""
    hidden = output.last_hidden_state
    if len(hidden) > 1:
        errors = torch.linspace(-(2**-7), 2**-7, hidden.shape[-1])
        output.last_hidden_state = hidden * (1 + errors)


def test_the_batch_shape(folder):
    rollouts = whole(folder).rollouts()
    policy = load_model(folder, "float32", "cpu")
    policy.model.register_forward_hook(rounds_otherwise_in_a_batch)
    found = report_of(policy, AutoTokenizer.from_pretrained(folder), rollouts, Sampling())
    assert_only_cause(found, "alone")
    assert "batch shape" in found.sentence


def test_several_causes_are_taken_in_the_order_of_their_size(folder):
    engine = Engine(folder, warpers=[TopKLogitsWarper(5)])
    found = report(folder, engine.rollouts(0.7), temperature=0.7, top_k=5)
    fields = [row.correction.field for row in found.taken[1:]]
    assert set(fields) == {"kept", "temperature", "vocab"}
    means = [row.gap.mean for row in found.taken]
    assert means == sorted(means, reverse=True) and found.left.largest < 1e-3


def test_weights_that_came_late_are_none_of_the_causes(folder):
    engine = whole(folder)
    with torch.no_grad():
        engine.model.model.norm.weight.mul_(1.2)
    found = report(folder, engine.rollouts())
    assert found.largest is None and "other weights" in found.sentence
    assert found.left.mean > 0.01


def as_rows(rollouts, names=("prompt_token_ids", "token_ids", "logprobs")):
    """Rows of a file."""
    return [dict(zip(names, (x.prompt, x.completion, x.logp), strict=True)) for x in rollouts]


def test_the_command_prints_the_table_and_the_sentence(folder, tmp_path, capsys):
    path = tmp_path / "rollouts.jsonl"
    rollouts = whole(folder).rollouts(0.7)
    for names in (
        ("prompt_token_ids", "token_ids", "logprobs"),
        ("prompts", "responses", "rollout_log_probs"),
    ):
        path.write_text("\n".join(map(json.dumps, as_rows(rollouts, names))))
        flags = ["--model", folder, "--temperature", "0.7", "--dtype", "float32", "--tokens", "50"]
        assert main(["doctor", "mismatch", str(path), *flags]) == 0
        said = capsys.readouterr().out
        assert "61 tokens of 3 completions" in said and "Of 6 rows the first 3" in said
        assert "The largest cause is temperature" in said and "+ temperature 0.7" in said
        assert "ratio outside [0.9, 1.1]" in said


def test_a_model_without_a_tokenizer_is_told_what_is_not_tried(folder, tmp_path, capsys):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("\n".join(map(json.dumps, as_rows(whole(folder).rollouts()))))
    model = tmp_path / "model"
    load_model(folder, None, "cpu").save_pretrained(model)
    assert load_model(str(model), None, "cpu").dtype is torch.bfloat16
    assert main(["doctor", "mismatch", str(path), "--model", str(model)]) == 0
    assert "not tried: chat template, BOS, padded vocabulary" in capsys.readouterr().out


ROW = {"prompt_token_ids": [1], "token_ids": [5, 6], "logprobs": [-1.0, -2.0]}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({**ROW, "logprobs": [-1.0]}, "'logprobs' has 1 numbers for 2 tokens"),
        ({**ROW, "logprobs": [-1.0, None]}, "must hold log-probs, of at most 0, not None"),
        ({**ROW, "logprobs": [-1.0, 0.5]}, "must hold log-probs, of at most 0, not 0.5"),
        ({**ROW, "token_ids": [5, 1.5]}, "'token_ids' must hold token ids, not 1.5"),
        ({**ROW, "token_ids": [5, 999]}, "token 999 is not in the model's vocabulary of 128"),
        ({**ROW, "token_ids": [], "logprobs": []}, "have no completion tokens"),
        ({**ROW, "prompt_token_ids": []}, "'prompt_token_ids' is empty"),
        ({"token_ids": [5], "logprobs": [-1.0]}, "no list 'prompt_token_ids' (or prompt_ids"),
    ],
)
def test_rows_that_cannot_be_used_are_named(folder, tmp_path, capsys, row, sentence):
    path = tmp_path / "rollouts.jsonl"
    path.write_text(json.dumps(row))
    assert main(["doctor", "mismatch", str(path), "--model", folder]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("fastpg doctor mismatch: ") and sentence in said and said.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("--tokens", "0", "must be at least 1, got 0"),
        ("--device", "gpu", "'gpu' is no device here"),
    ],
)
def test_a_flag_that_cannot_be_used_is_named(flag, value, sentence, capsys):
    with pytest.raises(SystemExit) as usage:
        main(["doctor", "mismatch", "rollouts.jsonl", "--model", "model", flag, value])
    assert usage.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"), [("temperature", 0.0), ("top_k", -2), ("top_p", 0.0), ("min_p", 1.0)]
)
def test_sampling_that_no_engine_does_is_refused(flag, value):
    with pytest.raises(InputError, match=f"{flag} must be .*, got {value}"):
        Sampling(**{flag: value}).check()


def test_rows_are_taken_until_there_are_enough_tokens(tmp_path):
    path = Path(tmp_path, "rollouts.jsonl")
    path.write_text("\n".join([json.dumps(ROW)] * 9))
    rollouts, rows = load_rollouts(str(path), 5)
    assert (len(rollouts), rows) == (3, 9)
    assert rollouts[0].where == f"{path}, line 1" and rollouts[0].logp == [-1.0, -2.0]
