"""What the trainer refuses before any work is done, in one sentence, and what it warns of."""

import json
import math
from pathlib import Path

import pytest
import torch
from test_cli import OWN, workspace
from tiny_trainer import PROMPTS, make_trainer, metrics_of, share_of_praise, tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertLMHeadModel, Qwen3ForSequenceClassification

from fastpg.cli import main
from fastpg.tasks import reviews
from fastpg.trainer import InputError, PPOTrainer
from fastpg.trainer.data.encoding import encode, encode_one, eos_ids
from fastpg.trainer.rollouts.rollout import sample

__all__ = ["workspace"]

CHAT = [{"role": "user", "content": "the story was"}]


def chat_tokenizer(template="{% for m in messages %}{{ m.content }} {% endfor %}was"):
    tokenizer = reviews.build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# Rewards.


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        ("rm", "A reward is module:function or the directory of a reward model, not 'rm'."),
        ([share_of_praise, "./rm"], "Cannot load a reward model from './rm': there is no such"),
        ([share_of_praise, 3], "A reward is a function of prompts and completions, not 3."),
        ([None], "A reward is a function of prompts and completions, not None."),
        (torch.nn.Linear(2, 1), "is a module, which fastpg.trainer.RewardModel("),
    ],
)
def test_a_reward_that_is_no_function_is_refused(tmp_path, reward, sentence):
    with pytest.raises(InputError) as refusal:
        make_trainer(tmp_path, reward)
    assert sentence in str(refusal.value)


def test_a_column_that_a_reward_needs_is_asked_for_at_the_start(tmp_path):
    def exact(prompts, completions, solution, *rest, **columns):
        raise AssertionError("it is not called")

    with pytest.raises(InputError, match="Reward exact needs a dataset column 'solution'; there"):
        make_trainer(tmp_path, exact)
    make_trainer(tmp_path, exact, dataset=[PROMPTS[0], {**PROMPTS[1], "solution": 3}])


def test_none_says_that_a_reward_does_not_apply(tmp_path):
    def first(completions):
        return [None] + [3.0] * (len(completions) - 1)

    def never(completions):
        return [None] * len(completions)

    trainer = make_trainer(tmp_path, [first, never], reward_weights=[2.0, 1.0])
    metrics = trainer.evaluate()
    assert metrics["eval/rewards/first/mean"] == 3.0
    assert math.isnan(metrics["eval/rewards/never/mean"])
    assert metrics["eval/reward/mean"] == 3.0  # that of 0 and 2 * 3
    trainer.train()
    samples = (tmp_path / "completions" / "step_000001.jsonl").read_text().splitlines()
    assert json.loads(samples[0])["rewards"] == {"first": None, "never": None}
    assert metrics_of(tmp_path)[0]["rewards/never/mean"] is None


class Frame:
    """A table that is indexed by the names of its columns, as a DataFrame is."""

    def __len__(self):
        return 2

    def __getitem__(self, name):
        return {"prompt": ["the", "story"]}[name]


@pytest.mark.parametrize("dataset", [3, Frame(), {"train": PROMPTS, "test": PROMPTS}])
def test_what_is_no_sequence_of_dicts_is_no_dataset(tmp_path, dataset):
    kind = type(dataset).__name__
    with pytest.raises(InputError, match=f"train dataset must be a sequence of dicts, not {kind}"):
        make_trainer(tmp_path, dataset=dataset)


# Tokens.


def test_an_end_that_the_model_cannot_produce_is_refused(tmp_path):
    tokenizer = reviews.build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    sentence = r"EOS token '<\|endoftext\|>' has id 43, outside the model's 43 tokens"
    with pytest.raises(InputError, match=sentence):
        make_trainer(tmp_path, tokenizer=tokenizer)
    model = tiny_model()
    model.generation_config.eos_token_id = [1, 2, 50]
    assert eos_ids(model, tokenizer) == [1, 2]


def test_padding_that_the_model_does_not_know_is_replaced(tmp_path):
    prompts = ["the story was", "honestly the story was"]
    rollouts = []
    for pad in (None, "<new>"):
        tokenizer = reviews.build_tokenizer()
        if pad:
            tokenizer.add_special_tokens({"pad_token": pad})
            assert tokenizer.pad_token_id == 43
        torch.manual_seed(1)
        rollouts.append(
            sample(tiny_model(), tokenizer, prompts, max_prompt_length=None, max_new_tokens=8,
                   temperature=1.0, packing=None)
        )  # fmt: skip
    known, unknown = rollouts
    assert torch.equal(known.completion_ids[known.mask], unknown.completion_ids[unknown.mask])
    assert unknown.input_ids.max() < 43


def test_a_token_that_the_model_does_not_know_is_named(tmp_path):
    tokenizer = reviews.build_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(InputError, match=r"eval example 1 has the token '<new>' of id 43.*resize"):
        PPOTrainer(
            tiny_model(), share_of_praise, train_dataset=PROMPTS, processing_class=tokenizer,
            eval_dataset=[PROMPTS[0], {"prompt": "the <new> story"}],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "The prompt of train example 8 has no tokens: ''."),
        ("sea \ud800", "The prompt of train example 8 cannot be encoded: "),
        ("the unknown", "The prompt of train example 8 cannot be encoded: WordLevel error"),
        ("the " * 60, "for the 60 tokens in the prompt of train example 8 and max_new_tokens=6"),
        ([{"role": "tool", "content": "the"}], "example 8 cannot be encoded: no tools here"),
        ([{"role": "user"}], "The prompt of train example 8 cannot be encoded: "),
    ],
)
def test_one_bad_prompt_is_found_before_the_first_step(tmp_path, prompt, sentence):
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
        "{% endif %}{{ m.content + ' ' }}{% endfor %}"
    )
    dataset = [*PROMPTS, {"prompt": prompt}]
    model = tiny_model(max_position_embeddings=64)
    with pytest.raises(InputError) as refusal:
        make_trainer(tmp_path, model=model, dataset=dataset, tokenizer=chat_tokenizer(template))
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_nothing_is_cut_unless_it_is_asked_for_and_then_it_is_counted(tmp_path, caplog):
    dataset = [{"prompt": "the story " * 20}, *PROMPTS[:2]]
    trainer = make_trainer(tmp_path, dataset=dataset)
    assert trainer._sample(dataset).attention_mask[0, :-6].sum() == 40
    assert not caplog.records
    trainer = make_trainer(tmp_path, dataset=dataset, max_prompt_length=4)
    assert trainer._sample(dataset).attention_mask[0, :-6].sum() == 4
    (record,) = caplog.records
    assert record.getMessage().startswith("1 of 3 train prompts have more than max_prompt_length=4")


def test_a_text_does_not_end_with_an_end_that_the_tokenizer_adds():
    tokenizer = reviews.build_tokenizer()
    plain = encode_one("the story was", tokenizer, "It")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    assert tokenizer("the story was")["input_ids"] == [*plain, 1]
    assert encode_one("the story was", tokenizer, "It") == plain
    with pytest.raises(InputError, match="It has no tokens"):
        encode_one("", tokenizer, "It")
    own_end = reviews.build_tokenizer()
    assert encode_one("the story <eos>", own_end, "It")[-1] == 1


def test_a_chat_is_continued_where_the_assistant_has_begun():
    template = (
        "{% for m in messages %}{{ m.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}honestly{% endif %}"
    )
    tokenizer = chat_tokenizer(template)
    begun = [*CHAT, {"role": "assistant", "content": "very clever"}]
    ids, _ = encode([CHAT, begun], tokenizer, None)
    whole, continued = (text.replace("<pad> ", "") for text in tokenizer.batch_decode(ids))
    assert whole == "the story was <eos> honestly"
    assert continued == "the story was <eos> very clever"


# Models.


def test_a_policy_of_which_nothing_can_be_trained_is_refused(tmp_path):
    with pytest.raises(InputError, match="No weight of the model can be trained"):
        make_trainer(tmp_path, model=tiny_model().requires_grad_(False))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    with pytest.raises(InputError, match=r"weight model.layers.1.mlp.up_proj.weight of the model"):
        make_trainer(tmp_path, model=model)


def test_a_model_that_sees_what_follows_is_refused(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=43, num_attention_heads=2, initializer_range=1.0, **sizes)
    with pytest.raises(InputError, match="this is no causal language model"):
        make_trainer(tmp_path, model=BertLMHeadModel(config))


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def drop_the_head():
    model = tiny_model()
    state = {name: x for name, x in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained("model", state_dict=state)


def save_a_reward_model():
    Qwen3ForSequenceClassification(tiny_model(tie_word_embeddings=True).config).save_pretrained(
        "model"
    )


def save_pickle(text):
    Path("model/model.safetensors").unlink()
    Path("model/pytorch_model.bin").write_text(text)


def ask_for_code():
    config = json.loads(Path("model/config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
    }
    Path("model/config.json").write_text(json.dumps(config))
    Path("model/mine.py").write_text("open('ran', 'w')")


def drop_the_tokenizer():
    for path in Path("model").glob("tokenizer*"):
        path.unlink()


def write_config(**changes):
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("spoil", "flags", "sentence"),
    [
        (lambda: truncate(Path("model/model.safetensors")), [], "from 'model': "),
        (lambda: Path("model/model.safetensors").write_text("{}"), [], "from 'model': "),
        (lambda: save_pickle("garbage"), [], "from 'model': "),
        (drop_the_head, [], "from 'model': it lacks lm_head.weight."),
        (save_a_reward_model, [], "from 'model': it holds a reward model."),
        (lambda: None, ["--model", "model/config.json"], "config.json': it is a file"),
        (lambda: None, ["--model", "nowhere/"], "from 'nowhere/': there is no such directory."),
        (ask_for_code, [], "code of its own, which only trust_remote_code lets run."),
        (drop_the_tokenizer, [], "There is no tokenizer in '"),
        (lambda: write_config(dtype="float7"), [], "has no attribute 'float7'"),
        (lambda: write_config(hidden_size="big"), [], "TypeError: Field 'hidden_size' expected"),
        (lambda: write_config(intermediate_size=9), [], "proj.weight has another shape than that"),
    ],
)
def test_spoiled_model_files_are_one_sentence(workspace, capsys, spoil, flags, sentence):
    spoil()
    capsys.readouterr()
    assert main(["train", *OWN, *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastpg train: ") and sentence in error, error
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "line", ['{"prompt": "the", "n": ' + "9" * 5000 + "}", '{"prompt": ' + "[" * 100_000]
)
def test_json_that_python_cannot_read_is_one_sentence(workspace, capsys, line):
    Path("prompts.jsonl").write_text(line)
    assert main(["train", *OWN]) == 2
    assert "prompts.jsonl, line 1: JSON that Python cannot read" in capsys.readouterr().err


def test_a_second_precision_in_a_process_is_one_sentence(tmp_path):
    make_trainer(tmp_path)
    with pytest.raises(InputError, match="accelerate does not start with mixed_precision='bf16'"):
        make_trainer(tmp_path, mixed_precision="bf16")


@pytest.mark.parametrize(
    ("name", "value"), [("ACCELERATE_USE_MEGATRON_LM", "true"), ("WORLD_SIZE", "many")]
)
def test_an_environment_in_which_accelerate_does_not_start_is_one_sentence(
    tmp_path, monkeypatch, name, value
):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"accelerate does not start .* in this process: "):
        make_trainer(tmp_path)
