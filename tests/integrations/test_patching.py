"""Replacing the globals of a package, on a small package made for the tests."""

import importlib
import sys

import pytest

import fastpg
from fastpg.integrations.patching import (
    Addition,
    PatchError,
    Patches,
    PatchReport,
    PatchRow,
    Refused,
    Replacement,
    replaced_by,
)

FILES = {
    "__init__": "",
    "utils": "def f(): return 'stock'\n"
    "class Actor:\n    def forward(self): return 'stock'\n"
    "REGISTRY = {'f': f}",
    "early": "from house.utils import f",
    "late": "from house.utils import f",
    "damp": "raise RuntimeError('a wall is wet')",
}


@pytest.fixture
def house(tmp_path, monkeypatch):
    """The package `house`: `early` is imported before a patch, `late` is not."""
    package = tmp_path / "house"
    package.mkdir()
    for name, text in FILES.items():
        (package / f"{name}.py").write_text(text)
    info = tmp_path / "house-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: house\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("house.early") and importlib.import_module("house.utils")
    for name in [name for name in sys.modules if name.partition(".")[0] == "house"]:
        del sys.modules[name]


def ours(_original):
    """What stands in the place of every original."""
    return lambda *_: "ours"


def test_a_global_is_replaced_in_every_module_and_put_back_by_identity(house):
    early, stock, patches = sys.modules["house.early"], house.f, Patches("house")
    report = patches.apply([Replacement("house.utils.f", ours)], strict=True)
    assert report == PatchReport(
        "house", "1.2", [PatchRow("house.utils.f", "replaced", "and in house.early.f")]
    )
    late = importlib.import_module("house.late")
    assert {house.f(), early.f(), late.f()} == {"ours"} and patches.applied
    patches.undo()
    assert house.f is stock and early.f is stock and late.f is stock and not patches.applied


def test_where_its_target_says_alone(house):
    patches = Patches("house")
    patches.apply([Replacement("house.early.f", ours, everywhere=False)], strict=True)
    assert (sys.modules["house.early"].f(), house.f()) == ("ours", "stock")
    house.theirs = sys.modules["house.early"].f
    patches.undo()
    assert sys.modules["house.early"].f is house.f and house.theirs() == "ours"


def test_a_function_that_modules_hold_already_must_be_copied(house):
    """`undo` would put the original in their place."""
    patches, held, stock = Patches("house"), fastpg.token_logprobs, house.f
    with pytest.raises(ValueError, match=r"token_logprobs is what would stand for it; make a copy"):
        patches.apply([Replacement("house.utils.f", lambda _: held)], strict=True)
    patches.undo()
    assert fastpg.token_logprobs is held and house.f is stock


def test_methods_and_entries_of_a_registry(house):
    stock, patches = vars(house.Actor)["forward"], Patches("house")
    targets = "house.utils.Actor.forward", "house.utils.REGISTRY[f]"
    assert patches.apply([Replacement(target, ours) for target in targets], strict=True).complete
    assert (house.Actor().forward(), house.REGISTRY["f"]()) == ("ours", "ours")
    patches.undo()
    assert vars(house.Actor)["forward"] is stock and house.REGISTRY["f"] is house.f


def test_an_entry_is_added_where_there_is_none_and_goes_with_the_patch(house):
    patches, wanted = Patches("house"), Addition("house.utils.REGISTRY[ours]", "ours")
    assert patches.apply([wanted], strict=True).rows[0].state == "added"
    assert house.REGISTRY["ours"] == "ours"
    assert Patches("house").apply([wanted], strict=True).complete
    another = Addition("house.utils.REGISTRY[f]", "ours")
    assert Patches("house").apply([another], strict=False).rows[0].state == "refused"
    patches.undo()
    assert list(house.REGISTRY) == ["f"]
    assert patches.apply([Addition("house.utils.NONE[f]", 1)], strict=False).rows[0].state == (
        "missing"
    )


def test_one_function_may_replace_several(house):
    def mine():
        return "mine"

    globals()["test_function_of_ours"], patches = mine, Patches("house")
    stock = house.f, house.Actor.forward
    wanted = [replaced_by(f"house.utils.{name}", mine) for name in ("f", "Actor.forward")]
    patches.apply(wanted, strict=True)
    assert house.f() == "mine"
    patches.undo()
    assert (house.f, house.Actor.forward) == stock
    assert globals().pop("test_function_of_ours") is mine


def test_more_is_replaced_beside_what_is(house):
    patches = Patches("house")
    patches.apply_more([Replacement("house.utils.f", ours)])
    patches.apply_more([Replacement("house.utils.Actor.forward", ours)])
    assert (house.f(), house.Actor().forward()) == ("ours", "ours")
    patches.undo()
    assert (house.f(), house.Actor().forward()) == ("stock", "stock")


def test_a_second_patch_changes_nothing_and_says_so(house):
    patches = Patches("house")
    wanted = [Replacement("house.utils.f", ours)]
    patches.apply(wanted, strict=True)
    first = house.f
    assert patches.apply(wanted, strict=False).rows[0].state == "refused"
    with pytest.raises(PatchError, match="already patched"):
        patches.apply(wanted, strict=True)
    assert house.f is first


def test_what_is_missing_or_refused_is_in_the_report_and_raises_if_strict(house):
    def refuse(_original):
        raise Refused("it takes other arguments")

    wanted = [
        Replacement("house.utils.f", ours),
        Replacement("house.utils.g", ours),
        Replacement("house.cellar.g", ours),
        Replacement("house.damp.g", ours),
        Addition("house.damp.REGISTRY[g]", ours),
        Replacement("house.utils.REGISTRY[g]", ours),
        Replacement("house.early.f", refuse),
        PatchRow("house.early.f", "refused", "the caller knows better"),
    ]
    stock, patches = house.f, Patches("house")
    with pytest.raises(PatchError, match="it takes other arguments"):
        patches.apply(wanted, strict=True)
    assert house.f is stock and not patches.applied
    report = patches.apply(wanted, strict=False)
    states = [row.state for row in report.rows]
    assert states == ["replaced", *["missing"] * 5, "refused", "refused"]
    assert "RuntimeError: a wall is wet" in str(report)
    assert "No module named 'house.cellar'" in str(report) and not report.complete
    patches.undo()


def test_a_package_that_is_not_installed_is_the_only_row():
    report = Patches("no_such_house").apply([Replacement("no_such_house.f", ours)], strict=False)
    assert report.rows == [PatchRow("no_such_house", "missing", "the package is not installed")]
    with pytest.raises(PatchError, match="no_such_house is not installed"):
        Patches("no_such_house").apply([], strict=True)


def test_what_someone_else_has_put_there_since_stays(house):
    patches = Patches("house")
    patches.apply([Replacement("house.utils.f", ours)], strict=True)
    theirs = house.f = lambda: "theirs"
    patches.undo()
    assert house.f is theirs and sys.modules["house.early"].f() == "stock"


def test_the_replacements_end_with_the_block_also_when_it_raises(house):
    patches, wanted = Patches("house"), [Replacement("house.utils.f", ours)]
    with pytest.raises(ZeroDivisionError), patches.during(wanted, strict=True) as report:
        assert house.f() == "ours" and report.complete
        with patches.during(wanted, strict=False) as inner:
            assert inner.rows[0].state == "refused"
        assert house.f() == "ours"
        _ = 1 / 0
    assert house.f() == "stock"


def test_a_call_that_is_left_to_the_package_is_in_the_report_once_and_raises_if_strict(house):
    patches, wanted = Patches("house"), [Replacement("house.utils.f", ours)]
    with patches.during(wanted, strict=False) as report:
        for _ in range(2):
            patches.leave("house.utils.f", "its weight is quantised")
        assert [row.state for row in report.rows] == ["replaced", "refused"]
    with (
        patches.during(wanted, strict=True),
        pytest.raises(PatchError, match="its weight is quantised"),
    ):
        patches.leave("house.utils.f", "its weight is quantised")
