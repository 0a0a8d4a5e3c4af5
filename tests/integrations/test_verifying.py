"""`fastpg verify`: what it finds of a call that is replaced by a better or a worse one."""

from contextlib import contextmanager

import pytest
import torch

from fastpg.cli import main
from fastpg.integrations.patching import PatchReport, PatchRow
from fastpg.integrations.verifying import Case, Row, Side, compare

REPLACED = PatchReport("house", "1.2", [PatchRow("house.f", "replaced", "")])


def report_of(stock, ours, x, exact=torch.exp):
    """Compares two functions of x that are to be exp(x)."""
    current = [stock]

    @contextmanager
    def patched():
        current[0] = ours
        yield REPLACED
        current[0] = stock

    case = Case("exp", {"x": x}, lambda x: [current[0](x)], exact and (lambda x: [exact(x)]))
    return compare(lambda: [case], patched)


@pytest.mark.parametrize(
    ("stock", "ours", "worse"),
    [
        (torch.exp, torch.exp, ""),
        (lambda x: x.exp() * 1.001, torch.exp, ""),
        (torch.exp, lambda x: x.exp() * 1.001, "the error of a value"),
        (torch.exp, lambda x: x.exp().detach() + 0 * x, "the error of a gradient"),
        (torch.exp, lambda x: x.exp() * torch.nan, "the error of a value"),
        (lambda x: x.exp() * torch.nan, torch.exp, ""),
        (torch.exp, lambda x: x.no_such_thing(), "it raises AttributeError"),
        (lambda x: x.no_such_thing(), torch.exp, ""),
    ],
)
def test_a_larger_error_than_before_is_worse(stock, ours, worse):
    report = report_of(stock, ours, torch.linspace(-2, 2, 9, requires_grad=True))
    assert report.rows[0].worse.startswith(worse) and bool(report.rows[0].worse) == bool(worse)
    assert report.ok == (not worse) and ("WORSE" in str(report)) == bool(worse)


def test_a_call_that_raises_where_time_is_taken_is_a_row():
    def raises(x):
        raise MemoryError("too large")

    x = torch.zeros(4, requires_grad=True)
    assert report_of(torch.exp, raises, x, exact=None).rows[0].worse.startswith("it raises Memory")
    report = report_of(raises, torch.exp, x, exact=None)
    assert report.ok and "stock raises MemoryError: too large" in str(report)


def test_an_infinite_value_that_ought_to_be_is_exact():
    report = report_of(torch.log, torch.log, torch.tensor([0.0, 1.0, 2.0]), exact=torch.log)
    assert report.rows[0].ours.value < 1e-6


def test_more_time_or_memory_is_worse():
    stock = Side(seconds=1.0, mib=100.0)
    assert Row("", stock, Side(seconds=1.05, mib=105.0)).worse == ""
    assert Row("", stock, Side(seconds=1.2, mib=50.0)).worse == "time"
    assert Row("", stock, Side(seconds=0.5, mib=120.0)).worse == "memory"


def test_memory_is_that_of_the_call_alone():
    def greedy(x):
        return (x.expand(2**22, len(x)) + 1).sum(0)

    row = report_of(greedy, torch.exp, torch.zeros(4, requires_grad=True), exact=None).rows[0]
    if row.stock.mib is not None:
        assert row.stock.mib > 50 > row.ours.mib
    assert row.stock.seconds > row.ours.seconds


def test_the_command_says_what_it_cannot_compare(capsys, monkeypatch):
    with pytest.raises(SystemExit) as usage:
        main(["verify", "no_such_trainer"])
    assert usage.value.code == 2 and "invalid choice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["verify", "trl", "--vocab", "0"])
    with pytest.raises(SystemExit) as usage:
        main(["verify", "trl", "--device", "gpu"])
    assert usage.value.code == 2 and "'gpu' is no device here" in capsys.readouterr().err
    monkeypatch.setattr("fastpg.integrations.trl._patches.version", lambda: None)
    assert main(["verify", "trl"]) == 2
    said = capsys.readouterr().out
    assert "trl is not installed" in said and "error of values" not in said, "there is no table"
