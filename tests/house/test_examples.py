"""The examples run, and do what their first lines say."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gridworld_is_learned_by_all_three():
    world = load("gridworld")
    for algorithm in world.ALGORITHMS.values():
        curve = world.train(algorithm, world.Room(4), 16, lr=0.02, critic_lr=0.02)
        assert sum(curve[-3:]) / 3 > 80 > curve[0]


def test_gridworld_prints_its_table_and_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "out" / "gridworld.png"
    curves = load("gridworld").main(["--iterations", "2", "--seeds", "1", "--out", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert list(curves) == ["REINFORCE", "vanilla policy gradient", "PPO"]
    assert all(f"\n{name} " in printed for name in curves)


def test_the_calculator_writes_behind_calls_alone():
    pytest.importorskip("transformers")
    calculator = load("calculator").calculator
    assert calculator(["call", "7", "*", "8", "<eos>"]) == ["result", "56"]
    for turn in ("answer 7 <eos>", "call 7 * 8 9", "call 3 - 7 <eos>", "call <eos>", "<eos>"):
        assert calculator(turn.split()) is None


def test_an_episode_with_the_calculator_has_two_turns():
    pytest.importorskip("transformers")
    example = load("calculator")
    turns = iter([["call 7 * 8 <eos>", "answer 9 <eos>"], ["answer 56 <eos>"]])
    asked = []

    class Trainer:
        tokenizer = example.make_tokenizer()

        def generate(self, queries):
            asked.append([self.tokenizer.decode(query) for query in queries])
            return [self.tokenizer(x, return_tensors="pt")["input_ids"][0] for x in next(turns)]

    _, responses, masks, scores = example.play(Trainer(), ["7 * 8", "4 + 4"])
    assert asked == [["7 * 8", "4 + 4"], ["7 * 8 call 7 * 8 <eos> result 56"]]
    words = [Trainer.tokenizer.decode(response) for response in responses]
    assert words == ["call 7 * 8 <eos> result 56 answer 56 <eos>", "answer 9 <eos>"]
    assert masks == [[1, 1, 1, 1, 1, 0, 0, 1, 1, 1], [1, 1, 1]]
    assert scores == [1.0, 0.0]


def test_the_calculator_example_takes_a_few_steps(tmp_path, capsys):
    pytest.importorskip("transformers")
    flags = ["--steps", "2", "--imitation_steps", "5", "--output_dir", str(tmp_path / "out")]
    load("calculator").main(flags)
    assert "Right answers to unseen questions:" in capsys.readouterr().out
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.training
def test_the_use_of_the_calculator_is_learned(tmp_path):
    pytest.importorskip("transformers")
    before, after = load("calculator").main(["--output_dir", str(tmp_path / "out")])
    assert before < 0.3 and after > 0.7


def said(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_a_shorter_answer_of_smollm2_earns_more_and_the_sum_alone_earns_most():
    pytest.importorskip("transformers")
    smollm2 = load("smollm2")
    texts = "12", " 12\n", "It is 12.", "It is 12, I think.", "13", "112", "Twelve", ""
    rewards = smollm2.graded(said(*texts), [12] * len(texts))
    assert rewards == [1.0, 1.0, 0.2 * 2 / 9, 0.2 * 2 / 18, 0.2, 0.2, 0.0, 0.0]
    assert smollm2.exact(said(*texts), [12] * len(texts)) == [1.0, 1.0, 0, 0, 0, 0, 0, 0]


def test_no_sum_is_trained_on_and_evaluated_with():
    pytest.importorskip("transformers")
    train, held_out = load("smollm2").sums()
    asked = [{row["prompt"][-1]["content"] for row in rows} for rows in (train, held_out)]
    assert not asked[0] & asked[1] and len(asked[0] | asked[1]) == 81


def save_model_of_bytes(directory):
    """A tiny model whose tokens are bytes, and which chats."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>",
        chat_template="{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
    ).save_pretrained(directory)  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=len(ids), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


def test_the_curve_of_a_real_model_is_that_of_a_training(tmp_path, monkeypatch):
    smollm2 = load("smollm2")
    save_model_of_bytes(tmp_path / "model")
    short = {"num_steps": 4, "eval_steps": 2, "num_eval_samples": 4, "rollout_batch_size": 8}
    monkeypatch.setattr(smollm2, "SETTINGS", smollm2.SETTINGS | short)
    run = smollm2.train(tmp_path / "model", "GRPO", tmp_path / "out")
    assert list(run["train"]) == [1, 2, 3, 4] and list(run["evaluations"]) == [0, 2, 4]
    smollm2.draw({"GRPO": run}, tmp_path / "real_model.svg")
    smollm2.write_page({"GRPO": run}, tmp_path / "real_model.md")
    assert "| What is 3 plus 7? |" in (tmp_path / "real_model.md").read_text()


def test_the_page_of_a_real_model_has_its_curve_and_its_answers(tmp_path):
    pytest.importorskip("matplotlib")
    smollm2 = load("smollm2")
    steps = smollm2.SETTINGS["num_steps"]
    seen = {"eval/reward/mean": 0.5, "eval/rewards/exact/mean": 0.25}
    run = {
        "train": {1: 0.1, steps: 0.9}, "evaluations": {0: seen, steps: seen},
        "before": ["a|b"] * 8, "after": ["12"] * 8, "seconds": 90.0,
    }  # fmt: skip
    runs = {name: run for name in smollm2.ALGORITHMS}
    smollm2.draw(runs, tmp_path / "real_model.svg")
    smollm2.write_rows(runs, tmp_path / "real_model.csv")
    smollm2.write_page(runs, tmp_path / "real_model.md")
    page = (tmp_path / "real_model.md").read_text()
    assert "| GRPO | 25% | 25% | 0.50 | 0.50 | 1.5 min |" in page
    assert page.count('"12" | "12" |') == 8 and "a\\|b" in page
    assert (tmp_path / "real_model.csv").read_text().splitlines()[:3] == [
        "algorithm,step,train_reward,eval_reward,eval_exact",
        "GRPO,0,,0.5000,0.2500",
        "GRPO,1,0.1000,,",
    ]
    assert "<svg" in (tmp_path / "real_model.svg").read_text()
