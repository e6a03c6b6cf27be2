"""Run folders: whole parts, identities that are compared, full disks and damaged files."""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl
import pytest

from unisonde.runs.run import ITEMS, KEY, MEASUREMENTS, Part, Run, compare, write_whole

IDENTITY = {
    "models": [{"name": "a", "dtype": "float32"}],
    "data": {"name": "d"},
    "protocol": {"digest": "x", "alpha": 1.01},
    "limit": None,
}
SESSION = {"started": "now"}


def row(**values) -> dict:
    empty = {name: "" if kind == pl.String else 0 for name, kind in MEASUREMENTS.items()}
    return empty | {"value": 1.5, "item": "i"} | values


def item(**values) -> dict:
    return {name: None for name in ITEMS} | {"item": "i", "task": "text"} | values


def part(**values) -> Part:
    return Part([row(**values)], [item()])


def test_what_is_written_is_read(tmp_path) -> None:
    run = Run.begin(tmp_path / "r", IDENTITY, SESSION)
    assert run.measurements().is_empty() and run.measurements().columns == list(MEASUREMENTS)
    run.add("00-text-00000", part(layer=3))
    run.add("00-text-00001", part(layer=4, item="j"))
    again = Run.open(tmp_path / "r")
    assert again.measurements()["layer"].to_list() == [3, 4]
    assert again.scan().filter(pl.col("layer") == 4).collect()["item"].to_list() == ["j"]
    assert again.items().schema == pl.Schema(ITEMS) and again.measurements().schema == pl.Schema(MEASUREMENTS)
    assert set(MEASUREMENTS) - set(KEY) == {"value", "ceiling", "stderr", "flags"}


def test_the_same_question_goes_on_and_another_is_refused(tmp_path) -> None:
    Run.begin(tmp_path, IDENTITY, SESSION)
    assert len(Run.begin(tmp_path, IDENTITY, SESSION).info["sessions"]) == 2
    other = IDENTITY | {"protocol": {"digest": "y", "alpha": 2.0}, "limit": 5}
    with pytest.raises(ValueError, match=r"protocol.alpha = 1.01 where 2.0 is asked for; limit = null where 5 is asked for"):
        Run.begin(tmp_path, other, SESSION)
    other = IDENTITY | {"models": [{"name": "b", "dtype": "float32"}]}
    with pytest.raises(ValueError, match=r'models\[0\].name = "a" where "b" is asked for'):
        Run.begin(tmp_path, other, SESSION)


def test_two_models_where_one_was(tmp_path) -> None:
    assert compare(IDENTITY, IDENTITY | {"models": IDENTITY["models"] * 2})[0].startswith("models = ")
    assert compare({"digest": 1}, {"digest": 2}) == ["digest = 1 where 2 is asked for"]


def test_a_folder_that_is_no_run_is_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that are no run"):
        Run.begin(tmp_path, IDENTITY, SESSION)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match=r"has no run\.json"):
        Run.open(tmp_path)


def test_a_session_that_ended_before_run_json_can_be_begun_again(tmp_path, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Run.begin(tmp_path, IDENTITY, SESSION)
    monkeypatch.undo()
    assert len(Run.begin(tmp_path, IDENTITY, SESSION).info["sessions"]) == 1
    (tmp_path / "run.json").unlink()
    (tmp_path / "parts" / "mine").mkdir()
    with pytest.raises(ValueError, match="holds files that are no run"):
        Run.begin(tmp_path, IDENTITY, SESSION)


def test_a_damaged_run_json_is_named(tmp_path) -> None:
    Run.begin(tmp_path, IDENTITY, SESSION)
    (tmp_path / "run.json").write_text('{"format": 1, "iden')
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        Run.open(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="run format 99"):
        Run.open(tmp_path)


@pytest.mark.parametrize("fails", ["write", "flush", "rename"])
def test_no_space_leaves_nothing_half_written(tmp_path, monkeypatch, fails) -> None:
    run = Run.begin(tmp_path, IDENTITY, SESSION)
    run.add("00-text-00000", part())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if fails == "write":
        original = pl.DataFrame.write_parquet

        def half(self, file, **kwargs):
            original(self, file, **kwargs)
            Path(file).write_bytes(Path(file).read_bytes()[:100])
            full()

        monkeypatch.setattr(pl.DataFrame, "write_parquet", half)
    else:
        place, name = (os, "fsync") if fails == "flush" else (Path, "rename")
        monkeypatch.setattr(place, name, full)
    with pytest.raises(OSError, match="No space"):
        run.add("00-text-00001", part())
    monkeypatch.undo()
    assert [p.name for p in run.parts()] == ["00-text-00000"]
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["00-text-00000"]
    run.add("00-text-00001", part())
    assert len(run.measurements()) == 2


def test_what_a_kill_left_is_never_read(tmp_path) -> None:
    run = Run.begin(tmp_path, IDENTITY, SESSION)
    run.add("00-text-00000", part())
    stale = tmp_path / "parts" / ".00-text-00001.partial"
    stale.mkdir()
    (stale / "measurements.parquet").write_bytes(b"half")
    assert len(run.measurements()) == 1 and not run.has("00-text-00001")
    run.lock().release()
    assert not stale.exists()


def test_two_sessions_at_once_are_refused(tmp_path) -> None:
    run = Run.begin(tmp_path, IDENTITY, SESSION)
    with run.lock(), pytest.raises(ValueError, match="another session is writing"):
        Run.open(tmp_path).lock()
    with run.lock():
        pass


def test_failures_can_be_dropped(tmp_path) -> None:
    run = Run.begin(tmp_path, IDENTITY, SESSION)
    run.add("00-text-00000", part())
    run.add("00-text-00001", Part([], [item(error="broken")]))
    assert run.drop_failures() == 1
    assert [p.name for p in run.parts()] == ["00-text-00000"]


def test_small_files_are_replaced_whole(tmp_path, monkeypatch) -> None:
    write_whole(tmp_path / "f", "old")
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError):
        write_whole(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
