"""Datasets in every form: files, directories, chats of two kinds, and what is refused."""

import csv
import json
from pathlib import Path

import pytest
from test_cli import OWN, workspace
from tiny_trainer import PROMPTS, make_trainer

from fastpg.cli import main
from fastpg.trainer import InputError
from fastpg.trainer.data.datasets import load_pairs, load_prompts

__all__ = ["workspace"]

ROWS = [
    {"prompt": 'the "plot", was', "id": "1"},
    {"prompt": "line\u2028one\nline two ", "id": "2"},
    {"prompt": "naïve 東京", "id": "3"},
]


def write_csv(path):
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "id"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def dataset_of(rows):
    datasets = pytest.importorskip("datasets")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    table = datasets.table.InMemoryTable.from_pydict(columns)
    # With a fingerprint of its own, datasets need not pickle the table, which some releases cannot.
    return datasets.Dataset(table, fingerprint=f"rows{len(rows)}")


def write_datasets(path):
    dataset_of(ROWS).save_to_disk(path)


def write_split(path):
    kind = pytest.importorskip("datasets").DatasetDict
    kind({"train": dataset_of(ROWS), "test": dataset_of(ROWS[:1])}).save_to_disk(path)


@pytest.mark.filterwarnings("ignore::Warning")  # those of datasets and dill
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda p: p.write_text("\n\n".join(map(json.dumps, ROWS)))),
        ("a.txt", lambda p: p.write_text("\r\n".join(map(json.dumps, ROWS)))),
        ("a.json", lambda p: p.write_text(json.dumps(ROWS, indent=2))),
        ("a.csv", write_csv),
        ("a.parquet", write_parquet),
        ("directory", write_datasets),
        ("splits", write_split),
    ],
)
def test_every_form_of_a_dataset_has_the_same_rows(tmp_path, name, write):
    write(tmp_path / name)
    assert load_prompts(str(tmp_path / name)) == ROWS


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "q"}]}
CALL = {"role": "assistant", "content": None, "tool_calls": []}


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({"question": "q"}, "question", {"question": "q", "prompt": "q"}),
        ({"messages": [USER]}, None, {"prompt": [USER]}),
        ({"messages": [USER, ANSWER]}, None, {"prompt": [USER], "answer": "a"}),
        ({"messages": [USER, CALL, ANSWER], "answer": 3}, None, {"prompt": [USER], "answer": 3}),
        # A prompt by name that ends with the assistant is to be continued.
        ({"prompt": [USER, ANSWER]}, None, {"prompt": [USER, ANSWER]}),
        ({"prompt": [PARTS]}, None, {"prompt": [PARTS]}),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            None,
            {"prompt": [USER], "answer": "a"},
        ),
        (
            {"prompt": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]},
            None,
            {"prompt": [{"role": "system", "content": "s"}, USER]},
        ),
    ],
)
def test_prompts_of_every_form(tmp_path, row, column, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert load_prompts(str(tmp_path / "a.jsonl"), column) == [expected]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.jsonl", '{"prompt": [{"role": "user"}]}', "line 1: a message needs 'role' and"),
        ("a.jsonl", '{"prompt": [{"content": "q"}]}', "line 1: a message needs 'role' and"),
        ("a.jsonl", '\n{"prompt": "q"}\n{"prompt": []}', "line 3: no 'prompt' that is text or"),
        ("a.jsonl", "[1]", "line 1: not a JSON object."),
        ("a.json", '{"prompt": "q"}', "a.json must be a list of objects"),
        ("a.json", "[", "a.json: not JSON"),
        ("a.csv", "prompt,id\nq\n", "row 1: other columns than the header names."),
        ("a.csv", "text\nq\n", "row 1: no 'prompt' that is text or"),
        ("a.csv", "prompt\n", "a.csv is empty."),
        ("a.csv", "prompt,prompt\nq,r\n", "a.csv has two columns of one name: prompt, prompt."),
        ("a.csv", 'prompt\n"q', "not CSV (unexpected end of data)."),
        ("a.JSON", '{"prompt": "q"}', "a.JSON must be a list of objects"),
        ("a.jsonl", '{"prompt": [{"from": ["human"], "value": "q"}]}', "line 1: a message needs"),
        (
            "a.jsonl",
            '{"prompt": [{"role": "user", "content": null, "tool_calls": null}]}',
            "line 1: a message needs 'role' and 'content', not",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "line 1: 'messages' has no message before the assistant's.",
        ),
    ],
)
def test_what_is_no_dataset_is_one_sentence(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as refusal:
        load_prompts(str(tmp_path / name))
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "is_on_the_hub"),
    [
        ("org/data", True),
        ("org/data-v1.5", True),
        ("org/data-v1.5:train[:10]", True),
        ("folder/missing.csv", False),
        ("folder/missing.jsonl", False),
        ("missing", False),
        ("a/b/c", False),
    ],
)
def test_names_of_the_hub_are_told_from_files_that_are_missing(monkeypatch, name, is_on_the_hub):
    datasets = pytest.importorskip("datasets")

    def load_dataset(path, split):
        raise ConnectionError(f"asked for {path} and {split}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as refusal:
        load_prompts(name)
    path, _, split = name.partition(":")
    expected = f"asked for {path} and {split or 'train'}" if is_on_the_hub else "No such file"
    assert str(refusal.value).startswith(f"Cannot read the dataset {name}: {expected}")


def test_a_column_that_rewards_cannot_see_is_named(tmp_path, caplog):
    make_trainer(tmp_path, dataset=[{**prompt, "texts": "mine"} for prompt in PROMPTS])
    assert "Rewards do not see the column 'texts' of the train dataset" in caplog.text


def test_pairs_of_sharegpt_are_understood(tmp_path):
    turns = {"chosen": [{"from": "gpt", "value": "a"}], "prompt": [{"from": "human", "value": "q"}]}
    (tmp_path / "a.json").write_text(json.dumps([{**turns, "rejected": [ANSWER]}]))
    (pair,) = load_pairs(str(tmp_path / "a.json"))
    assert pair == {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}


def test_messages_without_a_role_are_refused_before_the_training(tmp_path):
    dataset = [*PROMPTS, {"prompt": [{"from": "human", "value": "hi"}]}]
    with pytest.raises(InputError, match="messages with 'role' and 'content'; example 8 has not"):
        make_trainer(tmp_path, dataset=dataset)


def test_a_column_can_be_named_from_the_shell(workspace):
    write = "question,id\nthe story was,1\nthe plot felt,2\n"
    Path("prompts.csv").write_text(write)
    flags = ["--dataset", "prompts.csv", "--prompt_column", "question", "--config", "run.yaml"]
    assert main(["train", *OWN, *flags]) == 0
    lines = Path("run/completions/step_000001.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt"] for line in lines} == {"the story was", "the plot felt"}
