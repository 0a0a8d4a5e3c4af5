"""The page of `fastpg report`: it says what the files say, escaped, and needs nothing else."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_run import PROMPT, make_run, sample, start, steps

from fastpg.cli import main
from fastpg.report.numbers import MISSING
from fastpg.report.page import write_page

VOID = {"meta", "br", "line", "path", "circle", "rect"}


class Page(HTMLParser):
    """A page read by a parser that knows nothing of the template: its tags, text and attributes."""

    def __init__(self, html):
        super().__init__()
        self.html, self.open, self.tags, self.attributes, self.texts = html, [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)


def page(*directories):
    return Page(write_page(directories).read_text(encoding="utf-8"))


def test_the_page_of_a_run_says_what_its_files_say(tmp_path):
    directory = make_run(tmp_path / "out")
    shown = page(directory)
    assert (directory / "report.html").exists()
    for text in (
        "PPO · 20 of 20 steps · 2026-11-26 11:20",
        "Reward in evaluation 0.000 → 2.00",
        "reward/mean 0.000 2.00 +2.00",
        f"{PROMPT} before training · score 0.250 · 3 tokens grey . "
        "after step 20 · score 0.250 · 3 tokens blue , and wide .",
        "train 40 s 67%",
        "generate 20 s 33%",
        "kl_coef 0.1",
        "fastpg train --model some-model",
        "fastpg 0.1.0, torch 2.13.0",
        "CPU, threads: 1",
        "C++ gae, whiten",
        "BLAS linear_token_logprobs",
    ):
        assert text in shown.text, text
    assert "lam" not in shown.text.split()  # which nobody has set


def test_the_page_needs_no_network_and_no_script(tmp_path):
    shown = page(make_run(tmp_path / "out"))
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & {*shown.tags}
    assert not {"src", "href", "srcset", "xlink:href"} & {name for name, _ in shown.attributes}
    assert not re.search(r"url\(|@import|https?:", shown.html)
    assert "prefers-color-scheme: dark" in shown.html


def test_what_users_wrote_is_text_and_no_html(tmp_path):
    bad = "</p><script>alert('1')</script>&amp;<b"
    rows = steps(**{f"rewards/{bad}/mean": 1.0, "rewards/other/mean": 2.0})
    for row in rows:
        row[f"eval/rewards/{bad}/mean"] = 1.0
    chat = [{"role": bad, "content": [{"type": "text", "text": bad}]}]
    samples = {0: [sample(bad, prompt=chat)], 20: [sample(bad, prompt=chat)]}
    directory = make_run(
        tmp_path / "<i>&amp;",
        rows,
        algorithm=bad,
        evaluations=samples,
        starts=[start(command=bad, machine=bad, versions={bad: bad}, kernels={bad: bad})],
        settings=json.dumps({bad: bad}),
    )
    shown = page(directory)
    assert "script" not in shown.tags and "i" not in shown.tags and "b" not in shown.tags
    assert shown.text.count(bad) == 15
    assert "<i>&amp;" in shown.text


def test_characters_that_no_page_can_hold_are_replaced(tmp_path):
    samples = {0: [sample("a\x00b")], 20: [sample("c\ud800d\x1b[31m")]}
    text = page(make_run(tmp_path / "out", evaluations=samples)).text
    assert "a�b" in text and "c�d�[31m" in text


def test_runs_stand_side_by_side_with_a_legend(tmp_path):
    rows = steps(10, **{"value/explained_variance": 0.5})
    one = make_run(tmp_path / "a/ppo", rows)
    two = make_run(
        tmp_path / "b/grpo", algorithm="GRPO", num_steps=30, settings="kl_coef: 0.2\nseed: 1",
        evaluations={0: [sample("grey .")], 20: [sample("cold .")]},
    )  # fmt: skip
    other = make_run(tmp_path / "c/ppo", rows, evaluations={0: [sample("x", prompt="else")]})
    shown = page(one, two)
    for text in (
        "2 runs side by side",
        "A ppo PPO 10 of 20 steps, not finished 0.000 → 1.00",
        "B grpo GRPO 20 of 30 steps, not finished 0.000 → 2.00",
        "ppo 1.00",
        "grpo 1.95",  # the mean of the last two steps
        "reward/mean 0.000 1.00 +1.00 0.000 2.00 +2.00",
    ):
        assert text in shown.text, text
    # A prompt that both were asked is there once.
    assert shown.text.count(PROMPT) == 1
    assert "blue , and wide ." in shown.text and "cold ." in shown.text
    # Settings that differ come first; the critic's picture has the run alone that has a critic.
    settings = shown.text[shown.text.index("Setting A ppo B grpo") :].replace(MISSING, "-")
    assert settings.startswith("Setting A ppo B grpo algorithm ppo - kl_coef 0.1 0.2 seed - 1")
    variance = shown.text[shown.text.index("Explained variance Of the returns") :]
    assert "A 0.500" in variance and "B 0.500" not in variance
    assert "A a" in page(one, other).text and "B c" in page(one, other).text


@pytest.mark.parametrize(
    ("completions", "said"),
    [
        ({7: [sample("half way")] * 2}, "after step 7 · score 0.250 · 3 tokens half way"),
        ({}, "before training · score 0.250 · 3 tokens grey ."),
    ],
)
def test_a_run_that_was_stopped_has_samples_of_its_last_step(tmp_path, completions, said):
    rows = [*steps(7)[:-2], {"step": 7, "reward/mean": 1.0}]
    for row in rows[1:]:
        row.pop("eval/reward/mean", None)
    run = make_run(
        tmp_path / "out", rows, evaluations={0: [sample("grey .")]}, completions=completions
    )
    text = page(run).text
    assert "7 of 20 steps, not finished" in text
    assert text.count(said) == 1
    assert "Reward in evaluation" not in text


def test_every_start_of_a_run_is_told(tmp_path):
    starts = [start(), start(after_step=10, command="fastpg train --resume out", machine="new")]
    text = page(make_run(tmp_path / "out", starts=starts)).text
    assert "Started on 2026-11-26 11:20:03+01:00 fastpg train --model some-model" in text
    assert "Taken up after step 10 on 2026-11-26 11:20:03+01:00 fastpg train --resume out" in text
    assert "Machine new" in text and "threads: 1" not in text


def test_metrics_alone_make_a_page(tmp_path):
    run = make_run(tmp_path / "out", evaluations={})
    (run / "run.json").unlink()
    (run / "config.yaml").unlink()
    text = page(run).text
    assert "20 steps" in text
    assert "Made with" not in text and "Samples" not in text and "Settings" not in text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: append(run / "metrics.jsonl", '{"step": 21, "rew'), "left out: 1."),
        (lambda run: append(run / "metrics.jsonl", '[]\n{"step": true}\n{"a": 1}'), "left out: 3."),
        (lambda run: append(run / "evaluations/step_000020.jsonl", "{}\n["), "step_000020.jsonl"),
        (lambda run: (run / "run.json").write_text("{"), "run.json cannot be read."),
        (lambda run: (run / "config.yaml").write_text("a: ["), "config.yaml cannot be read."),
        (lambda run: (run / "run.json").write_text('{"starts": [{}, 3]}'), "Started"),
        (lambda run: (run / "evaluations/step_x.jsonl").write_text("{"), "blue"),
        (lambda run: append(run / "metrics.jsonl", b"\n\xff\xfe"), "left out: 1."),
    ],
)
def test_what_is_damaged_is_left_out_and_said(tmp_path, damage, said):
    run = make_run(tmp_path / "out")
    damage(run)
    text = page(run).text
    assert said in text
    assert "20 steps" in text


def append(path, text):
    with path.open("ab") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "There is no directory nowhere."),
        (["out/metrics.jsonl"], "There is no directory out/metrics.jsonl."),
        (["."], ". is not the directory of a run: it has no metrics.jsonl."),
        (["out", "empty"], "empty/metrics.jsonl has nothing in it yet, so there is nothing"),
        (["half"], "half/metrics.jsonl has no whole line, so there is nothing to report."),
        (["rewards"], "rewards is not the directory of a policy's run: it has no rewards."),
        (["out", "./out/"], "out is given twice."),
        (["out", "--output", "no/page.html"], "Cannot write no/page.html: No such file"),
        (["out", "--output", "out"], "Cannot write out: Is a directory."),
    ],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    make_run(Path("out"))
    make_run(Path("empty"), [])
    make_run(Path("half"), [])
    Path("half/metrics.jsonl").write_text('{"step": 1, "reward')
    make_run(Path("rewards"), [{"step": 1, "loss": 0.5}])
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastpg report: {said}") and error.count("\n") == 1


def test_the_command_names_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(Path("out"))
    assert main(["report", "out"]) == 0
    assert capsys.readouterr().out == "Written to out/report.html.\n"
    assert main(["report", "out", "--output", "page.html"]) == 0
    assert Path("page.html").read_text() == Path("out/report.html").read_text()


def test_many_steps_make_no_large_page(tmp_path):
    small, large = make_run(tmp_path / "small"), make_run(tmp_path / "large", steps(20_000))
    sizes = [write_page([run]).stat().st_size for run in (small, large)]
    assert sizes[1] < 3 * sizes[0] + 100_000
