"""The judge of parity is judged: what may be fed, what counts as wrong, and what the command says of it.

The fixtures are written here: a family of three arrays, whose "model" doubles its input.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unisonde.cli import main
from unisonde.study import parity
from unisonde.study.parity import Verdict, verify
from unisonde.study.parity.fixture import TOLERANCE, Difference, Fixture, weights_of

INPUTS = ("x", r"draw\d")
ARRAYS = {
    "x": np.arange(6, dtype=np.float32).reshape(2, 3),
    "draw0": np.array([0.5], dtype=np.float32),
    "double": np.arange(6, dtype=np.float32).reshape(2, 3) * 2,
    "ids": np.array([3, 1, 2]),
    "flag": np.array([True, False]),
}


def write(folder: Path, name: str = "toy", **changes: np.ndarray | None) -> Path:
    arrays = {key: value for key, value in (ARRAYS | changes).items() if value is not None}
    np.savez(folder / f"{name}.npz", **arrays)
    (folder / f"{name}.json").write_text(json.dumps({"run": {"steps": 2}}))
    save_file({"w": torch.full((2,), 2.0, dtype=torch.float16), "n": torch.tensor([3])}, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path)


@pytest.fixture
def fixture(folder: Path) -> Fixture:
    return Fixture(folder, "toy", INPUTS)


def right(fixture: Fixture) -> None:
    fixture.feed("draw0")
    fixture.compare("double", fixture.feed("x") * fixture.weights["w"][0])
    fixture.compare("ids", torch.tensor([3, 1, 2]))
    fixture.compare("flag", torch.tensor([True, False]))


def family(monkeypatch: pytest.MonkeyPatch, **checks: Callable[[Fixture], Any]) -> None:
    """Families whose modules are these functions."""
    monkeypatch.setattr(parity, "FAMILIES", {name: name for name in checks})
    monkeypatch.setattr(parity, "import_module", lambda name: SimpleNamespace(INPUTS=INPUTS, check=checks[name]))


# ------------------------------------------------------------------------------------------------------------------ a fixture


def test_weights_and_inputs_are_as_recorded(fixture: Fixture) -> None:
    assert fixture.weights["w"].dtype == torch.float32 and fixture.weights["n"].dtype == torch.int64
    assert fixture.config["run"]["steps"] == 2
    fed = fixture.feed("x")
    fed += 100
    assert torch.equal(fixture.feed("x"), torch.from_numpy(ARRAYS["x"])) and fixture.fed == {"x"}
    assert fixture.left == ["draw0", "double", "ids", "flag"]


@pytest.mark.parametrize("name", ["double", "ids", "xx", "draw"])
def test_an_output_is_never_fed(folder: Path, name: str) -> None:
    write(folder, xx=np.zeros(1), draw=np.zeros(1))  # patterns hold for whole names
    fixture = Fixture(folder, "toy", INPUTS)
    with pytest.raises(ValueError, match=f"{name} of toy is an output; it is compared and never fed"):
        fixture.feed(name)
    assert not fixture.fed


def test_arrays_that_are_not_there(fixture: Fixture) -> None:
    with pytest.raises(ValueError, match=r"toy\.npz has no array 'draw7'"):
        fixture.feed("draw7")
    with pytest.raises(ValueError, match=r"no array 'triple'; ours has the shape \(2, 3\)"):
        fixture.compare("triple", torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("name", "ours", "ok"),
    [
        ("double", torch.from_numpy(ARRAYS["double"]), True),
        ("double", torch.from_numpy(ARRAYS["double"] + np.float32(1.5e-4)), True),
        ("double", torch.from_numpy(ARRAYS["double"] + np.float32(3e-4)), False),
        ("double", torch.from_numpy(ARRAYS["double"]).bfloat16(), True),
        ("double", torch.from_numpy(ARRAYS["double"]).flatten(), False),
        ("double", torch.from_numpy(ARRAYS["double"])[:1], False),
        ("double", torch.from_numpy(ARRAYS["double"])[None], False),
        ("double", torch.full((2, 3), float("nan")), False),
        ("double", torch.from_numpy(ARRAYS["double"]).masked_fill(torch.eye(2, 3).bool(), float("inf")), False),
        ("ids", torch.tensor([3, 1, 2], dtype=torch.int32), True),
        ("ids", torch.tensor([3, 1, 3]), False),
        ("ids", torch.tensor([3.0, 1.0, 2.0001]), False),
        ("flag", torch.tensor([True, True]), False),
    ],
)
def test_what_agrees(fixture: Fixture, name: str, ours: torch.Tensor, ok: bool) -> None:
    fixture.compare(name, ours)
    assert fixture.differences[name].ok is ok


def test_a_recorded_number_that_is_not_finite_agrees_with_nothing(tmp_path: Path) -> None:
    fixture = Fixture(write(tmp_path, double=np.array([np.nan, 1], dtype=np.float32)), "toy", INPUTS)
    fixture.compare("double", torch.tensor([0.0, 1.0]))
    assert not fixture.differences["double"].ok


def test_the_worst_of_several_comparisons_counts(fixture: Fixture) -> None:
    good, bad = torch.from_numpy(ARRAYS["double"]), torch.from_numpy(ARRAYS["double"] + 1)
    for ours in (good, bad, good):
        fixture.compare("double", ours)
    assert fixture.differences["double"] == Difference("double", 1.0, exact=False)


def test_states_of_all_layers(tmp_path: Path) -> None:
    layers = [torch.full((1, 2), float(k)) for k in range(4)]
    recorded = {f"p.h{k}": layers[k].numpy() for k in range(3)} | {"p.final": layers[3].numpy()}
    fixture = Fixture(write(tmp_path, **recorded), "toy", INPUTS)
    fixture.states("p", layers)
    assert {name for name in fixture.differences} == set(recorded) and all(d.ok for d in fixture.differences.values())
    with pytest.raises(ValueError, match=r"no array 'p\.h3'"):
        fixture.states("p", [*layers, layers[0]])


def test_damaged_weights_are_named(folder: Path) -> None:
    file = folder / "toy.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"toy\.safetensors is no whole safetensors file"):
        weights_of(folder, "toy")


# ------------------------------------------------------------------------------------------------------------------ a verdict


def judged(folder: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[Fixture], Any]) -> Verdict:
    family(monkeypatch, toy=check)
    [verdict] = verify(folder)
    return verdict


def test_a_family_that_agrees(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = judged(folder, monkeypatch, right)
    assert verdict.ok
    assert (verdict.arrays, verdict.inputs, verdict.compared, verdict.left, verdict.largest) == (5, 2, 3, (), 0.0)


def but(name: str, ours: torch.Tensor) -> Callable[[Fixture], None]:
    def check(fixture: Fixture) -> None:
        right(fixture)
        fixture.compare(name, ours)

    return check


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (but("double", torch.zeros(2, 3)), ["double"]),
        (but("double", torch.from_numpy(ARRAYS["double"]) + 2 * TOLERANCE), ["double"]),
        (but("double", torch.full((2, 3), float("nan"))), ["double"]),
        (but("double", torch.zeros(3, 2)), ["double"]),
        (but("ids", torch.tensor([3, 1, 1])), ["ids"]),
    ],
)
def test_a_difference_is_no_agreement(folder: Path, monkeypatch: pytest.MonkeyPatch, check, wrong: list[str]) -> None:
    verdict = judged(folder, monkeypatch, check)
    assert not verdict.ok and [difference.name for difference in verdict.wrong] == wrong and not verdict.left


def test_an_output_that_is_not_compared_is_no_agreement(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lazy(fixture: Fixture) -> None:
        fixture.compare("double", fixture.feed("x") * 2)

    verdict = judged(folder, monkeypatch, lazy)
    assert not verdict.ok and verdict.left == ("draw0", "ids", "flag") and not verdict.wrong


def test_nothing_compared_is_no_agreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, double=None, ids=None, flag=None)
    verdict = judged(tmp_path, monkeypatch, lambda fixture: (fixture.feed("x"), fixture.feed("draw0")))
    assert not verdict.ok and not verdict.left and verdict.compared == 0


def test_a_check_that_feeds_an_output_is_no_agreement(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = judged(folder, monkeypatch, lambda fixture: fixture.compare("double", fixture.feed("double")))
    assert not verdict.ok and "never fed" in verdict.error


@pytest.mark.parametrize(
    "problem", [ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, ZeroDivisionError]
)
def test_a_check_that_breaks_does_not_hide_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch, problem) -> None:
    def broken(fixture: Fixture) -> None:
        raise problem("it broke")

    write(folder, "other")
    family(monkeypatch, toy=broken, other=right)
    first, second = verify(folder)
    assert not first.ok and first.error.startswith(problem.__name__) and "it broke" in first.error
    assert second.ok


@pytest.mark.parametrize("suffix", ["npz", "json", "safetensors"])
@pytest.mark.parametrize("damage", ["torn", "gone"])
def test_a_damaged_fixture_does_not_hide_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, damage: str
) -> None:
    write(folder, "other")
    file = folder / f"toy.{suffix}"
    if damage == "torn":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif suffix != "npz":  # without arrays there is no fixture
        file.unlink()

    def check(fixture: Fixture) -> None:
        assert fixture.config["run"]
        right(fixture)

    family(monkeypatch, toy=check, other=right)
    verdicts = {verdict.name: verdict for verdict in verify(folder)}
    assert verdicts["other"].ok
    assert verdicts["toy"].ok is (damage == "gone" and suffix == "npz")
    assert verdicts["toy"].ok or verdicts["toy"].error


def test_any_subset_of_families(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family(monkeypatch, absent=right, toy=right)
    assert [verdict.name for verdict in verify(folder)] == ["toy"]
    with pytest.raises(ValueError, match=r"has no parity fixture: none of absent\.npz, toy\.npz is there"):
        verify(folder / "nowhere")


# ----------------------------------------------------------------------------------------------------------------- the command


def test_the_command_says_it_and_exits_by_it(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    family(monkeypatch, toy=right)
    assert main(["verify", str(folder)]) == 0
    assert "1 of 1 families agree" in capsys.readouterr().out
    assert main(["verify", str(folder), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["family"] == "toy" and (row["arrays"], row["inputs"], row["compared"]) == (5, 2, 3)
    assert row["ok"] and row["not compared"] == [] and row["wrong"] == [] and row["largest difference"] == 0


def test_the_command_fails_on_one_wrong_family(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    write(folder, "other")

    def lazy(fixture: Fixture) -> None:
        fixture.compare("ids", torch.tensor([3, 1, 9]))

    family(monkeypatch, toy=lazy, other=right)
    assert main(["verify", str(folder)]) == 1
    assert "1 of 2 families agree" in capsys.readouterr().out
    assert main(["verify", str(folder), "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert first["not compared"] == ["x", "draw0", "double", "flag"] and first["wrong"] == ["ids (7)"] and not first["ok"]
    assert second["ok"]


def test_the_command_gives_valid_json_for_infinite_differences(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    family(monkeypatch, toy=but("double", torch.zeros(1)))
    assert main(["verify", str(folder), "--json"]) == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    [row] = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert not row["ok"]


def test_the_command_without_a_fixture(tmp_path: Path, capsys) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "has no parity fixture" in said and said.count("\n") == 1


def test_every_family_of_the_folder_has_its_check() -> None:
    from importlib import import_module

    for name, module in parity.FAMILIES.items():
        checker = import_module(module)
        assert checker.INPUTS and callable(checker.check), name
