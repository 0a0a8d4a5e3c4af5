"""`fastpg bench`: it times only what is right, hides nobody, and says what it found."""

import dataclasses
import math
import sys
import types
from functools import partial

import pytest
import torch

from bench import readme
from fastpg.bench import (
    baselines,
    command,
    peers,
    plots,
    problems,
    provenance,
    report,
    scaling,
    torture,
)
from fastpg.bench.problem import OURS, PLAIN, Problem, errors
from fastpg.bench.problems import Settings
from fastpg.bench.timing import freed_memory_kept, peak_extra_mib


def quick():
    return Settings("cpu", quick=True, left_out={})


def squares(**solutions):
    """A problem that anyone can do."""

    def square(x):
        return x * x

    return Problem(
        "square", "8", (torch.randn(8),), (0,), square, {OURS: square, **solutions}, calls=1
    )


def test_a_wrong_suite_is_one_sentence_with_the_legal_names(capsys):
    assert command.bench(["gea"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "'gea'" in said
    assert all(name in said for name in command.SUITES)


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "all_rows", lambda names, settings: pytest.fail("it ran"))
    file = tmp_path / "file"
    file.touch()
    for flag, path in ("--csv", tmp_path), ("--csv", file / "rows.csv"), ("--plot", file):
        assert command.bench(["gae", flag, str(path)]) == command.REJECTED
        assert "what is asked for cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize("name", command.SUITES)
def test_every_suite_has_a_run_of_its_name(name, monkeypatch, capsys):
    row = {"op": name, "case": "c", "candidate": OURS, "wrong": "not asked"}
    monkeypatch.setitem(command.SUITES, name, lambda settings: iter([[row]]))
    monkeypatch.setattr(command, "hardware", lambda settings: [])
    assert command.bench([name, "--quick"]) == 1, "what is wrong shows in the exit code"
    assert f"{name}, c" in capsys.readouterr().out


def test_only_what_is_right_is_timed():
    problem = squares(
        PyTorch=lambda x: x**2,
        off=lambda x: x * x * 1.01,
        raises=lambda x: x @ x[:3],
        gradient=lambda x: (x * x).detach() + 0 * x.sum(),
    )
    rows = {row["candidate"]: row for row in command.rows_of(problem, quick())}
    assert rows["off"]["wrong"].startswith("values off by a relative 0.01")
    assert rows["gradient"]["wrong"].startswith("gradients off by a relative 1")
    assert rows["raises"]["wrong"].startswith("RuntimeError")
    for name in (OURS, PLAIN):
        assert rows[name]["median_ms"] > 0 and rows[name]["value_error"] < 1e-6
    (line,) = report.lines(list(rows.values()))
    assert line.startswith("square, 8") and "off WRONG (values off" in line


def test_fastpg_is_not_timed_where_it_is_wrong():
    problem = squares()
    problem = dataclasses.replace(problem, solutions={OURS: lambda x: x, PLAIN: problem.exact})
    (row,) = command.rows_of(problem, quick())
    assert row["candidate"] == OURS and "values off" in row["wrong"]


def test_a_solution_may_return_the_sum():
    problem = squares()
    found = errors(problem, lambda x: (x * x).sum())
    assert not found.too_large
    assert "values off" in errors(problem, lambda x: (x * x).mean()).too_large
    assert errors(problem, lambda x: (x * x)[:3]).value == math.inf


def test_a_package_that_cannot_take_part_is_a_reason(monkeypatch):
    def broken(device):
        raise OSError("no such library\nand more")

    adapters = {"absent": lambda d: peers.needs("no_such_package", d), "broken": broken}
    adapters["gpu"] = lambda d: peers.needs("torch", d, gpu=True)
    adapters["here"] = lambda d: baselines.log_probs
    found, left_out = peers.ask(adapters, "cpu")
    assert found == {"here": baselines.log_probs}
    assert left_out == {
        "absent": "not installed",
        "broken": "it cannot be imported: OSError: no such library",
        "gpu": peers.GPU,
    }
    rows = [{"candidate": name, "left_out": reason} for name, reason in left_out.items()]
    assert f"left out: gpu: {peers.GPU}" in report.absent(rows)
    assert "absent, broken, gpu" in report.absences(rows, quick=False)


def test_every_adapter_answers_on_this_machine():
    tables = (peers.LOG_PROBS, peers.LOG_PROBS_AND_ENTROPY, peers.HEAD_LOG_PROBS)
    adapters = dict(
        enumerate([*peers.HEAD_CROSS_ENTROPY.values(), *peers.HEAD_POLICY_LOSS.values()])
    )
    for table in (*tables, adapters):
        found, left_out = peers.ask(table, "cpu")
        assert found.keys() | left_out.keys() == table.keys()
        assert all(isinstance(reason, str) and reason for reason in left_out.values())


def test_the_filters_are_gae(monkeypatch):
    """torchaudio has no build for every torch: its filter is played by scipy's."""
    from scipy.signal import lfilter

    def played(x, a, b, clamp):
        return torch.from_numpy(lfilter(b.numpy(), a.numpy(), x.numpy())).to(x)

    module = types.ModuleType("torchaudio.functional")
    module.lfilter = played
    parent = types.ModuleType("torchaudio")
    parent.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "torchaudio", parent)
    monkeypatch.setitem(sys.modules, "torchaudio.functional", module)
    settings = quick()
    problem = problems.advantages(settings, 2, 33, 0.9)
    assert {"torchaudio's lfilter", "scipy's lfilter"} <= set(problem.solutions)
    for solution in problem.solutions.values():
        assert errors(problem, solution).value < 1e-6


def test_every_problem_is_solved_at_a_small_size():
    settings = quick()
    fp32 = torch.float32
    for problem in (
        problems.log_probs(settings, 8, 100, fp32, backward=True),
        problems.log_probs_and_entropy(settings, 8, 100, torch.bfloat16),
        problems.head_log_probs(settings, 8, 4, 100, fp32, backward=True),
        problems.head_cross_entropy(settings, 8, 4, 100, fp32),
        problems.head_policy_loss(settings, 2, 4, 4, 100, fp32),
        problems.clipped_surrogate(settings, 64),
        problems.clipped_value_loss(settings, 64),
        problems.kl(settings, 64),
        problems.whitening(settings, 4, 16),
    ):
        for name, solution in problem.solutions.items():
            assert not errors(problem, solution).too_large, (problem.op, name)


def test_few_tokens_of_the_clipped_loss_are_clipped_so_that_few_products_are_spared():
    problem = problems.head_policy_loss(quick(), 4, 256, 4, 100, torch.float32)
    hidden, weight, labels, advantages, old_logp = problem.inputs
    logp = baselines.head_log_probs(hidden.flatten(0, 1), weight, labels.flatten())
    ratio = (logp.view_as(labels) - old_logp).exp()
    rising, falling = advantages[:, None] > 0, advantages[:, None] < 0
    clipped = rising & (ratio > 1 + baselines.CLIP) | falling & (ratio < 1 - baselines.CLIP)
    assert 0 < clipped.float().mean() < 0.1


def test_every_candidate_computes_in_the_dtype_of_its_inputs():
    problem = problems.advantages(quick(), 2, 33, 0.9)
    for name, solution in problem.solutions.items():
        assert solution(*problem.inputs).dtype is torch.float32, name


def test_fastpg_is_right_on_every_hard_input_and_plain_lines_are_not(monkeypatch):
    # The tests fill fresh memory with NaN; here that would be 4 GiB of which two rows are read.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    rows = [row for found in torture.rows(quick()) for row in found]
    assert len({(row["op"], row["case"]) for row in rows}) >= 28
    wrong = {(r["op"], r["case"], r["verdict"]) for r in rows if r["verdict"] != torture.RIGHT}
    assert not [row for row in rows if row["candidate"] == OURS and row["verdict"] != torture.RIGHT]
    assert ("policy_loss", "NaN and inf where masked", "value NaN") in wrong
    (line, *_) = report.summaries(rows)
    assert line.split() == ["hard", "inputs,", "fastpg", "right", "on", "28", "of", "28"]


def test_a_hard_input_that_does_not_fit_is_left_out_with_the_reason():
    def make():
        raise RuntimeError("not enough memory: you tried to allocate 9 bytes.\nmore")

    settings = quick()
    family = torture.Family("op", torch.sin, {OURS: torch.sin}, [torture.Hard("huge", make)])
    assert torture.judged(settings, family, family.inputs[0]) == []
    assert settings.left_out["torture, huge"].startswith("not enough memory")


def test_an_exponent_is_the_slope():
    sizes = [8, 16, 32]
    assert scaling.exponent(sizes, [3.0 * s**1.5 for s in sizes]) == pytest.approx(1.5)


def test_growth_is_fitted_to_one_call_of_every_size(monkeypatch):
    growth, spent = scaling.Growth("op", "N", [1, 2, 4], None), []

    def call(size):
        spent.append(size**2)
        return size

    def measure(case, **_):
        found = {}
        for name, candidate in case.candidates.items():
            spent.clear()
            candidate()
            assert len(spent) * int(name) == 4  # Every sample does the same work.
            found[name] = types.SimpleNamespace(median=1, p10=sum(spent), p90=2)
        return found

    monkeypatch.setattr(scaling, "peak_extra_mib", lambda call, device: 10.0 * call())
    monkeypatch.setattr(scaling, "measure", measure)
    row = scaling.grown(quick(), growth, OURS, [partial(call, size) for size in growth.sizes])
    assert row["exponent"] == pytest.approx(2) and row["memory_exponent"] == pytest.approx(1)
    assert report.lines([row])[0].endswith("grows as N^2.00, its memory as N^1.00")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is Linux's")
def test_memory_that_is_used_again_shows_in_the_peak():
    def call():
        return torch.ones(2**24).sum()  # 64 MiB

    with freed_memory_kept():
        call()
        assert 60 < peak_extra_mib(call, "cpu") < 80


def rows_of_a_run():
    facts = {"suite": "gae", "op": "gae", "case": "8 x 9", "machine": "m-1", "torch": "2"}
    facts |= {"bytes": 8.0, "operations": 4.0, "extra_mib": 1.0}
    yield facts | {"candidate": OURS, "median_ms": 1.0, "ratio": 1.0, "value_error": 1e-7}
    yield facts | {"candidate": PLAIN, "median_ms": 3.0, "ratio": 3.0, "value_error": 1e-5}
    yield facts | {"candidate": "lib", "median_ms": 0.5, "ratio": 0.5, "gradient_error": math.nan}
    for name, rate in (("reading memory", "GB/s"), ("multiplying matrices", "GFLOP/s")):
        roof = {"suite": "hardware", "op": "hardware", "case": "", "candidate": name}
        yield facts | roof | {"rate": 9.0, "unit": rate, "ratio": 1.0}


def test_the_sentences_name_what_is_faster():
    first, second, third = report.sentences(list(rows_of_a_run()), quick=True)
    assert "in 1 of 1 cases" in first and "faster than fastpg is lib at gae, 8 x 9 (0.50)" in first
    assert second == "Its largest error against double precision is 1e-07."
    assert third.startswith("Torch.compile is left out") or "torch.compile" in third
    assert report.sentences([], quick=False) == []


def test_rows_come_back_from_csv(tmp_path):
    rows = list(rows_of_a_run())
    report.write_csv(rows, tmp_path / "rows.csv")
    again = report.read_csv(tmp_path / "rows.csv")
    assert [row["candidate"] for row in again] == [row["candidate"] for row in rows]
    assert [row["ratio"] for row in again] == [row["ratio"] for row in rows]
    assert report.speed(again) == report.speed(rows)


def test_the_generated_pages_are_those_of_the_committed_rows():
    """`python -m bench --readme` writes them."""
    for path, text in readme.pages().items():
        assert path.read_text() == text, path.name


def test_the_committed_pictures_are_those_of_the_committed_rows(tmp_path):
    import matplotlib

    (rows,) = map(report.read_csv, readme.RESULTS.glob("*.csv"))
    svg = (readme.PLOTS / "speed.svg").read_text()
    if f"Matplotlib v{matplotlib.__version__}," not in svg:
        pytest.skip("another version of matplotlib draws otherwise")
    drawn = plots.draw(rows, tmp_path)
    assert {path.name for path in drawn} == {
        f"{name}.{suffix}" for name in ("speed", "roofline") for suffix in ("png", "svg")
    }
    drawn += plots.draw_ops(rows, tmp_path / "ops")
    for path in drawn:
        if path.suffix == ".svg":
            committed = readme.PLOTS / path.relative_to(tmp_path)
            assert path.read_text() == committed.read_text(), path.name
    assert plots.draw([], tmp_path) == plots.draw_ops([], tmp_path) == []


def test_an_installed_package_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.revision() == "unknown"
