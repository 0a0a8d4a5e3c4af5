"""`make gpu`, as far as a machine without a GPU can tell: its steps, limits, rows and table."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import __main__ as runner
from bench import counters, gpu, smoke
from fastpg.bench import timing
from fastpg.bench.timing import Case


def python(code):
    return [sys.executable, "-c", code]


# A process that starts another, which would write to a file if it lived two seconds longer.
HANGS = """
import subprocess, sys, time
child = "import time, pathlib; time.sleep(4); pathlib.Path({path!r}).write_text('alive')"
subprocess.Popen([sys.executable, "-c", child])
print("begun", flush=True)
time.sleep(60)
"""


def outcomes(steps, tmp_path, seconds=100.0):
    recorded = []
    found = gpu.run_all(
        steps, seconds, tmp_path / "run.log", lambda step, outcome: recorded.append(step)
    )
    return found, recorded


def test_a_step_that_hangs_is_ended_with_its_children_and_the_next_one_runs(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    alive = tmp_path / "alive"
    steps = [
        gpu.Step("hangs", python(HANGS.format(path=str(alive))), 2),
        gpu.Step("next", python("print('here')"), 30),
    ]
    found, recorded = outcomes(steps, tmp_path)
    assert found["hangs"].startswith("FAILED: still running after 2 s")
    assert found["next"].startswith("ok")
    assert recorded == ["hangs", "next"]
    time.sleep(3)
    assert not alive.exists()
    assert "begun" in capfd.readouterr().out  # The end of what it printed is shown.


def test_a_step_that_fails_or_is_missing_or_cannot_start_hides_no_other(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("no program")
    broken.chmod(0o755)
    steps = [
        gpu.Step("fails", python("raise SystemExit(3)"), 30),
        gpu.Step("missing", ["no-such-program"], 30),
        gpu.Step("broken", [str(broken)], 30),
        gpu.Step("next", python("import os; assert os.environ['A'] == 'b'"), 30, (("A", "b"),)),
    ]
    found, _ = outcomes(steps, tmp_path)
    assert found["fails"].startswith("FAILED: 3")
    assert found["missing"].startswith("no-such-program is not here")
    assert found["broken"].startswith("FAILED: OSError")
    assert found["next"].startswith("ok")


def test_a_step_without_time_is_not_begun(tmp_path):
    found, recorded = outcomes([gpu.Step("late", python(""), 30)], tmp_path, seconds=gpu.LEAST - 1)
    assert found == {"late": "no time was left"} and recorded == []


def test_the_order_is_that_of_worth():
    names = [step.name for step in gpu.steps(Path("there"))]
    assert names[:4] == ["smoke", "tests", "vocabulary", "counters"]
    assert names[-2:] == ["memcheck", "racecheck"]
    for step in gpu.steps(Path("there")):
        if step.command[2:3] in (["bench"], ["bench.smoke"], ["bench.counters"]):
            assert step.command[-2:] == ["--out", "there"], step.name
    ops = {op for step in gpu.steps(None) for op in step.command if op in runner.BENCHMARKS}
    assert ops >= {"token_logprobs", "policy_loss_from_logits", "gae", "peers", "hardware"}
    compiled = [step for step in gpu.steps(None) if "only" in step.command]
    assert [step.name for step in compiled] == ["torch.compile"]


def test_the_table_is_short_and_begins_with_what_is_wrong():
    def row(op, **more):
        return {"op": op, "case": "c", "candidate": "fastpg", "target": ""} | more

    timed = {"median_ms": 0.5, "ratio": 1}
    rows = [row(f"op{i}", **timed) for i in range(40)]
    rows += [row("met", **timed | {"target": ">= 0.9"}), {"op": "bad", "case": "c", "wrong": "nan"}]
    rows += [row("hardware", **timed, rate=3000.0, unit="GB/s")]
    lines = gpu.table(rows)
    assert len(lines) == gpu.TABLE_LINES
    assert lines[0].startswith("bad, c: WRONG") and lines[1].endswith("[target >= 0.9]")
    assert lines[-1] == "and 19 cases more"
    assert "500 µs = 3000 GB/s" in gpu.line("hardware", "c", rows[-1:])


def test_the_counters_of_a_kernel_are_one_row():
    header = "ID,Kernel Name,Grid Size,Metric Name,Metric Unit,Metric Value"
    cells = [
        '"0","rows_kernel","(132, 1, 1)","dram__bytes_read.sum","byte","2489319424"',
        '"0","rows_kernel","(132, 1, 1)","other","%","71.5"',
        '"1","forward_kernel","(8192, 1, 1)","dram__bytes_read.sum","byte","5"',
    ]
    printed = ["==PROF== Connected", ",".join(f'"{name}"' for name in header.split(",")), *cells]
    first, second = counters.rows("\n".join(printed))
    assert first["case"] == "rows_kernel, grid (132, 1, 1)" and first["op"] == "ncu"
    assert first["counters"] == {"bytes read from memory": "2489319424 byte", "other": "71.5 %"}
    assert second["counters"] == {"bytes read from memory": "5 byte"}
    assert counters.rows("==ERROR== ERR_NVGPUCTRPERM") == []


def test_the_smoke_names_an_op_that_is_wrong_and_goes_on(monkeypatch):
    assert smoke.faults("cpu") == {}
    check = smoke.check

    def broken(example):
        if example.op == "gae":
            raise AssertionError("off by one")
        check(example)

    monkeypatch.setattr(smoke, "check", broken)
    faults = smoke.faults("cpu")
    assert {"gae", "gae, every option"} <= set(faults)
    assert all(name.partition(",")[0] == "gae" for name in faults)
    assert set(faults.values()) == {"AssertionError: off by one"}


def test_the_smoke_compares_the_kernels_with_the_references(monkeypatch):
    example = next(e for e in smoke.examples("cpu") if e.op == "kl_estimate")
    results, calls = smoke.results, []

    def off_by_one_the_second_time(example):
        calls.append(example)
        return [x + (len(calls) == 2) for x in results(example)]

    monkeypatch.setattr(smoke, "results", off_by_one_the_second_time)
    with pytest.raises(AssertionError):
        smoke.check(example)


class Event:
    """Of torch.cuda.Event, with a clock that a test turns."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


def test_on_a_gpu_events_time_so_many_calls_that_a_sample_takes_five_milliseconds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "peak_extra_mib", lambda call, device: 0.0)
    calls = {"short": 0, "long": 0}

    def call(name, milliseconds):
        calls[name] += 1
        Event.now += milliseconds

    case = Case(
        "op",
        "case",
        lambda: None,
        {"short": lambda: call("short", 0.01), "long": lambda: call("long", 8.0)},
        ours="short",
        device="cuda",
        least=3,
    )
    timings = timing.measure(case, rounds=3, seconds=0.0)
    assert timings["short"].median == pytest.approx(0.01)
    assert timings["long"].median == pytest.approx(8.0)
    assert timings["long"].ratio == pytest.approx(800)
    pilot = 2  # calls, which tell how many a sample takes
    assert calls == {"short": pilot + 3 * 500, "long": pilot + 3 * 1}


def test_a_candidate_that_raises_or_is_wrong_is_a_row_and_the_others_are_timed():
    def wrong():
        raise AssertionError("off by 2")

    def no_memory():
        raise RuntimeError("out of memory")

    case = Case(
        "op",
        "case",
        lambda: None,
        {"fastpg": int, "peer": int, "torch.compile": no_memory},
        gates={"peer": wrong},
        rates={"fastpg": (1.0, "GB/s")},
    )
    rows = {row["candidate"]: row for row in runner.run(case, 0.1)}
    assert rows["peer"]["wrong"] == "off by 2"
    assert rows["torch.compile"]["wrong"] == "RuntimeError: out of memory"
    assert rows["fastpg"]["median_ms"] > 0 and rows["fastpg"]["unit"] == "GB/s"
    gate = Case("op", "case", no_memory, {"fastpg": int})
    assert runner.run(gate, 0.1)[0]["wrong"] == "RuntimeError: out of memory"


def test_what_torch_compiles_can_be_left_out_or_be_all():
    def case():
        candidates = dict.fromkeys(("fastpg", "eager", "torch.compile, doubling"), int)
        return Case("op", "case", lambda: None, candidates)

    assert list(runner.select(case(), "with").candidates) == list(case().candidates)
    assert list(runner.select(case(), "without").candidates) == ["fastpg", "eager"]
    assert list(runner.select(case(), "only").candidates) == ["fastpg", "torch.compile, doubling"]


def test_rows_go_to_both_folders_at_once_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "HERE", tmp_path)
    monkeypatch.setenv("PATH", "")
    results = runner.Results("cpu", tmp_path / "new" / "out")
    results.append([{"op": "a"}])
    results.append([{"op": "b"}])
    assert [path.parent.name for path in results.paths] == ["results", "out"]
    for path in results.paths:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["op"] for row in rows] == ["a", "b"]
        assert {row["commit"] for row in rows} == {"unknown"}
    assert [row["op"] for row in results.rows()] == ["a", "b"]


def test_an_op_whose_inputs_do_not_fit_hides_no_other(tmp_path, monkeypatch):
    known = {"no_such": "bench.no_such", "kl_estimate": runner.BENCHMARKS["kl_estimate"]}
    monkeypatch.setattr(runner, "HERE", tmp_path)
    monkeypatch.setattr(runner, "BENCHMARKS", known)
    monkeypatch.setattr(sys, "argv", ["bench", "--seconds", "0.01", "--compiled", "without"])
    with pytest.raises(SystemExit, match="failed: no_such"):
        runner.main()
    rows = runner.Results("cpu").rows()
    assert rows[0]["wrong"].startswith("ModuleNotFoundError")
    assert {row["op"] for row in rows[1:]} == {"kl_estimate"}
