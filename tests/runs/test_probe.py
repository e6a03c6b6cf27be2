"""`probe` from items to rows: what is measured, what fails, what a killed run becomes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest
import torch
from PIL import Image

import unisonde
from unisonde.data.item import Item
from unisonde.models.trace import LayerStates, Reading, Trace
from unisonde.runs.run import KEY
from unisonde.runs.work import measure_chunk

from .conftest import QUICK


def probe(model, items, out, **kwargs):
    options = {"task": ("text", "image"), "generation": QUICK, "batch_size": 4, "progress": False} | kwargs
    return unisonde.probe(model, items, out=out, **options)


@pytest.fixture(scope="module")
def run(untrained, tmp_path_factory):
    from unisonde.data.tabletop import question_item, text_item

    texts = [text_item(category, "test", 1, k) for category in ("composition", "deductive") for k in range(3)]
    items = texts + [question_item("attribute", "test", 1, k) for k in range(3)]
    return probe(untrained, items, tmp_path_factory.mktemp("runs") / "first")


def test_every_cell_layer_and_quantity_is_there(run, untrained) -> None:
    table = run.measurements()
    layers = untrained.stacks[0].depth + 2
    keys = table.select(KEY)
    assert not keys.is_duplicated().any() and not keys.null_count().sum_horizontal().item()
    counts = {tuple(k): n for *k, n in table.group_by("task", "level", "modality", "quantity").len().iter_rows()}
    assert counts["text", "prompt", "text", "entropy"] == 9 * layers  # six prompts, and three questions beside pictures
    assert counts["text", "prompt", "image", "entropy"] == 3 * layers
    assert counts["image", "prompt", "text", "entropy"] == 6 * layers
    for quantity in ("conditional_entropy", "joint_entropy", "prompt_term"):
        assert counts["text", "response", "text", quantity] == counts["image", "response", "text", quantity] == 6 * layers
        assert counts["text", "response", "image", quantity] == 3 * layers
    beside = table.filter(
        (pl.col("level") == "prompt") & (pl.col("modality") == "text") & pl.col("item").str.starts_with("attribute")
    )
    assert beside["flags"].str.contains("question").all()
    assert set(table["layer"]) == set(range(layers)) and set(table["step"]) == {"single"}
    assert (table["value"] <= table["ceiling"] + 1e-9).all()
    difference = table.pivot("quantity", index=["item", "task", "layer"], values="value", aggregate_function="first")
    assert (difference["joint_entropy"] - difference["prompt_term"] - difference["conditional_entropy"]).abs().max() < 1e-12


def test_rows_equal_the_measure_of_the_states(run, untrained) -> None:
    """One item, measured by hand from the states of its own trace."""
    from unisonde.data.tabletop import question_item

    item = question_item("attribute", "test", 1, 0)
    states: dict[int, LayerStates] = {}
    settings = untrained.settings("text", **{"tokens": 10})
    untrained.respond([item], "text", settings, 0, Trace(lambda s: states.__setitem__(s.layer, s)))
    rows = run.measurements().filter((pl.col("item") == item.id) & (pl.col("task") == "text"))
    reading, protocol = Reading(), unisonde.Protocol()
    for layer, seen in states.items():
        image = seen.select("prompt", reading, "image")
        everything = seen.select("prompt", reading)
        response = seen.select("response", reading)
        expected = {
            ("prompt", "image", "entropy"): unisonde.entropy(image, protocol),
            ("prompt", "text", "entropy"): unisonde.entropy(seen.select("prompt", reading, "text"), protocol),
            ("response", "image", "conditional_entropy"): unisonde.conditional_entropy(everything, response, protocol),
        }
        for (level, modality, quantity), estimate in expected.items():
            [row] = rows.filter(
                (pl.col("layer") == layer)
                & (pl.col("level") == level)
                & (pl.col("modality") == modality)
                & (pl.col("quantity") == quantity)
            ).iter_rows(named=True)
            assert row["value"] == pytest.approx(estimate.value, abs=1e-4) and row["ceiling"] == pytest.approx(estimate.ceiling)
        assert len(image) == 16 and row["n_prompt"] == len(everything) and row["n_response"] == len(response)


def test_items_keep_prompt_and_response(run) -> None:
    items = run.items()
    assert items["error"].is_null().all() and len(items) == 15
    drawn = items.filter(pl.col("task") == "image")
    assert drawn["response_image"].is_not_null().all() and (drawn["n_response"] == 64).all()
    assert items.filter(pl.col("modality") == "image")["prompt_image"].is_not_null().all()


def test_a_second_call_measures_nothing_again(run, untrained, items) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*.parquet")}
    probe(untrained, items, run.folder)
    assert {p: p.stat().st_mtime_ns for p in run.folder.rglob("*.parquet")} == before
    assert len(json.loads((run.folder / "run.json").read_text())["sessions"]) == 2


def test_another_protocol_or_seed_is_refused(run, untrained, items) -> None:
    with pytest.raises(ValueError, match=r"protocol.alpha = 1.01 where 2.0"):
        probe(untrained, items, run.folder, protocol=unisonde.Protocol(alpha=2.0))
    with pytest.raises(ValueError, match="seed = 0 where 1"):
        probe(untrained, items, run.folder, seed=1)
    with pytest.raises(ValueError, match=r"data\..*items"):
        probe(untrained, items[:5], run.folder)


def test_a_broken_item_is_recorded_and_the_rest_goes_on(untrained, items, tmp_path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    broken = [
        Item("empty", "attribute", "what colour is the ring?", tmp_path / "empty.png"),
        Item("torn", "attribute", "what colour is the ring?", tmp_path / "torn.png"),
        Item("blank", "composition", " "),
        Item("dragon", "composition", "a large green dragon"),
    ]
    run = probe(untrained, items[:2] + broken + items[6:], tmp_path / "r", task="text")
    table = run.items()
    errors = dict(table.filter(pl.col("error").is_not_null()).select("item", "error").iter_rows())
    assert set(errors) == {"empty", "torn", "blank", "dragon"}
    assert "0 bytes" in errors["empty"] and "cannot be read" in errors["torn"] and "empty prompt" in errors["blank"]
    assert set(run.measurements()["item"]) == {i.id for i in items[:2] + items[6:]}
    Image.new("RGB", (32, 32)).save(tmp_path / "empty.png")
    with pytest.raises(ValueError, match=r"digest|items"):  # the data changed, so it is another run
        probe(untrained, items[:2] + broken + items[6:], tmp_path / "r", task="text", retry=True)


def test_prompts_of_one_token_and_of_identical_tokens(untrained, tmp_path) -> None:
    odd = [Item("one", "c", "red"), Item("same", "c", "red " * 20)]
    run = probe(untrained, odd, tmp_path / "r", task="text")
    table = run.measurements().filter(pl.col("level") == "prompt")
    one = table.filter(pl.col("item") == "one")
    assert (one["value"] == 0).all() and (one["n_prompt"] == 1).all() and one["flags"].str.contains("short").all()
    embedded = table.filter((pl.col("item") == "same") & (pl.col("layer") == 0))
    # Equal states are one state; the ridge of 1e-6 leaves its trace.
    assert embedded["value"].item() == pytest.approx(0, abs=1e-3) and embedded["n_prompt"].item() == 20
    assert not embedded["flags"].str.contains("short").any()


def test_states_that_are_not_finite_are_refused_with_layer_and_item(untrained, items, tmp_path) -> None:
    layer = untrained.stacks[0].layers[2]

    def spoil(module, args, output):
        output = output.clone() if torch.is_tensor(output) else output
        output[..., 3] = float("nan")
        return output

    handle = layer.register_forward_hook(spoil, prepend=True)
    try:
        run = probe(untrained, items[:1], tmp_path / "r", task="text")
    finally:
        handle.remove()
    [error] = run.items()["error"]
    assert "layer 3 of llm" in error and items[0].id in error and ("NaN" in error or "finite" in error)
    assert run.measurements().is_empty()


def test_states_can_be_kept(untrained, items, tmp_path) -> None:
    from safetensors.torch import load_file

    run = probe(untrained, items[:1], tmp_path / "r", task="text", keep_states=True)
    [part] = run.parts()
    states = load_file(part / "states.safetensors")
    name = f"{items[0].id}/llm/single"
    spans = json.loads(bytes(states[f"{name}/spans"].tolist()))
    row = run.measurements().filter((pl.col("layer") == 2) & (pl.col("level") == "prompt")).row(0, named=True)
    [[start, stop, *_]] = [s for s in spans if s[2] == "prompt" and s[4] == "content"]
    assert float(unisonde.entropy(states[f"{name}/002"][start:stop])) == pytest.approx(row["value"], abs=1e-9)


SCRIPT = """
import sys, time
import unisonde
from unisonde.runs import work
from unisonde.train.janus_pro import new_twin
import unisonde.runs.local as local
original = local.measure_chunk
def slow(*args):
    part = original(*args)
    time.sleep(float(sys.argv[2]))
    return part
local.measure_chunk = slow
from unisonde.data.tabletop import text_item
items = [text_item("composition", "test", 1, k, 1) for k in range(12)]
unisonde.probe(new_twin(0), items, "text", sys.argv[1], generation={"tokens": 6}, batch_size=2, progress=False)
"""


def start(out: Path, pause: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out), str(pause)], stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_without_a_lost_or_doubled_row(tmp_path, how) -> None:
    whole = tmp_path / "whole"
    assert start(whole, 0).wait(300) == 0
    killed = tmp_path / "killed"
    process = start(killed, 0.5)
    deadline = time.monotonic() + 240
    while len(list((killed / "parts").glob("[!.]*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    assert process.wait(60) != 0
    parts = len(list((killed / "parts").glob("[!.]*")))
    assert 2 <= parts < 6
    assert start(killed, 0).wait(300) == 0
    rows = [unisonde.Run.open(folder).measurements().drop("run") for folder in (whole, killed)]
    assert rows[0].equals(rows[1]) and len(rows[0]) > 0
    assert len(unisonde.Run.open(killed).info["sessions"]) == 2


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write everywhere; for a moment it is nobody."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_cannot_be_written(untrained, items) -> None:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    try:
        with as_nobody(), pytest.raises(PermissionError):
            probe(untrained, items, folder / "r")
        assert not list(folder.iterdir())
    finally:
        folder.chmod(0o755)
        folder.rmdir()


def test_asking_for_what_is_not_there(untrained, items, tmp_path) -> None:
    for kwargs, said in (
        ({"task": "sound"}, "task"),
        ({"task": ()}, "at least one model and one task"),
        ({"engine": "cloud"}, "the engine is one of local"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"protocol": "defualt"}, "defualt"),
        ({"generation": {"tempo": 3}}, "no sampling setting is called tempo"),
        ({"generation": {"steps": 3}}, "has the sampling setting steps"),
        ({"limit": 0}, "limit must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            probe(untrained, items, tmp_path / "r", **kwargs)
    with pytest.raises(ValueError, match="have the id"):
        probe(untrained, [items[0], items[0]], tmp_path / "r")
    with pytest.raises(ValueError, match="did you mean twin/janus-pro"):
        probe("twin/janus-por", items, tmp_path / "r")
    with pytest.raises(ValueError, match="tabletop"):
        probe(untrained, "tabeltop", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_one_chunk_gives_the_same_rows_alone(untrained, items, tmp_path) -> None:
    """`measure_chunk` is all an engine calls: its rows do not depend on what ran before."""
    from unisonde.runs.work import Settings, chunks_of

    settings = Settings("r", "d", unisonde.Protocol(), Reading(), 0, False, False)
    chunks = chunks_of(0, "text", items, untrained.settings("text", tokens=6), 4)
    first = measure_chunk(untrained, chunks[1], settings)
    measure_chunk(untrained, chunks[0], settings)
    assert measure_chunk(untrained, chunks[1], settings).measurements == first.measurements
