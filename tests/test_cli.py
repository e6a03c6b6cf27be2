"""The command line as a user meets it: help that teaches, errors of one sentence, exit codes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import unisonde
from unisonde.cli import main, spread


@pytest.fixture
def line(capsys):
    """Runs a command line: (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def states(tmp_path):
    array = np.random.default_rng(0).normal(size=(40, 12))
    np.save(tmp_path / "prompt.npy", array)
    return tmp_path


def test_help_names_every_command_and_teaches(line) -> None:
    code, out, _ = line("--help")
    assert code == 0
    for command in ("probe", "report", "models", "data", "entropy", "calibrate", "train", "score", "decode"):
        assert command in out
        code, said, _ = line(command, "--help")
        assert code == 0 and len(said) > 200
    assert "--debug" in out and "unisonde probe twin/janus-pro" in " ".join(out.split())


def test_models_and_data_as_tables_and_json(line) -> None:
    code, out, _ = line("models")
    assert code == 0 and "twin/janus-pro" in out and "hf:ORG/NAME" in out
    listed = json.loads(line("models", "--json")[1])
    assert {entry["name"] for entry in listed} == set(unisonde.MODELS)
    listed = json.loads(line("data", "--json")[1])
    assert {entry["name"] for entry in listed} == set(unisonde.DATA)


def test_entropy_of_saved_states(line, states) -> None:
    prompt = np.load(states / "prompt.npy")
    [row] = json.loads(line("entropy", states / "prompt.npy", "--json")[1])
    assert row["value"] == pytest.approx(float(unisonde.entropy(prompt)), abs=1e-12) and row["n"] == 40 and row["units"] == "bits"
    response = torch.randn(25, 12)
    save_file({"prompt": response}, states / "response.safetensors")
    rows = json.loads(line("entropy", states / "prompt.npy", "--response", states / "response.safetensors", "--json")[1])
    by = {row["quantity"]: row["value"] for row in rows}
    assert by["conditional_entropy"] == pytest.approx(float(unisonde.conditional_entropy(prompt, response)), abs=1e-12)


def test_calibrate_prints_every_line_and_fails_when_one_does(line, monkeypatch) -> None:
    from dataclasses import replace

    from unisonde.measure import calibrate

    code, out, _ = line("calibrate", "--json")
    rows = json.loads(out)
    assert code == 0 and len(rows) >= 40 and all(row["ok"] for row in rows)
    wrong = [replace(one, expected=one.expected + 1) if k == 3 else one for k, one in enumerate(calibrate.checks())]
    monkeypatch.setattr(calibrate, "checks", lambda: wrong)
    code, out, _ = line("calibrate")
    assert code == 1 and "1 failed" in out


def test_entropy_layer_by_layer(line, states) -> None:
    np.savez(states / "layers.npz", h=np.random.default_rng(1).normal(size=(3, 20, 5)))
    code, out, _ = line("entropy", states / "layers.npz")
    assert code == 0 and "h[0]" in out and "h[2]" in out


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: None, "there is no file"),
        (lambda p: p.write_bytes(b""), "0 bytes"),
        (lambda p: np.save(p, np.zeros(3)), r"shape \(3,\)"),
        (lambda p: np.save(p, np.array([{"a": 1}], object), allow_pickle=True), "cannot be read"),
        (lambda p: np.save(p, np.array([["a"]])), "not numbers"),
        (lambda p: np.save(p, np.full((4, 2), np.nan)), "(?i)nan|finite"),
    ],
)
def test_saved_states_that_cannot_be_used(line, tmp_path, make, said) -> None:
    import re

    make(tmp_path / "x.npy")
    code, _, err = line("entropy", tmp_path / "x.npy")
    assert code == 1 and re.search(said, " ".join(err.split())) and "Traceback" not in err


def test_a_truncated_safetensors_file(line, tmp_path) -> None:
    save_file({"a": torch.randn(30, 30)}, tmp_path / "s.safetensors")
    whole = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "s.safetensors").write_bytes(whole[:500])
    code, _, err = line("entropy", tmp_path / "s.safetensors")
    assert code == 1 and "no whole safetensors file" in " ".join(err.split())


def test_errors_are_one_sentence_and_debug_shows_more(line, tmp_path) -> None:
    words = ("probe", "twin/janus-por", "--data", "tabletop", "--out", tmp_path / "r")
    code, _, err = line(*words)
    assert code == 1 and "did you mean twin/janus-pro" in " ".join(err.split()) and "Traceback" not in err
    with pytest.raises(ValueError, match="did you mean"):
        line(*words, "--debug")
    code, _, err = line("probe", "twin/janus-pro", "--data", "tabeltop", "--out", tmp_path / "r")
    assert code == 1 and "tabletop" in err
    assert not (tmp_path / "r").exists()


def test_what_the_system_refuses_is_said_without_its_number(line, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "locked/r")

    monkeypatch.setattr("unisonde.runs.probe", refuse)
    code, _, err = line("probe", "twin/janus-pro", "--data", "tabletop", "--out", "locked/r")
    assert code == 1 and err.strip() == "error: locked/r: permission denied"


def test_a_line_that_cannot_be_understood(line) -> None:
    code, _, err = line("probe", "twin/janus-pro")
    assert code == 2 and "--data" in err
    code, _, err = line("prob")
    assert code == 2 and "prob" in err
    code, _, err = line("entropy", "x.npy", "--protocol", "nothing")
    assert code == 1 and "nothing" in err


def test_several_values_after_one_option() -> None:
    assert spread(["probe", "m", "--task", "text", "image", "--out", "r"]) == [
        "probe",
        "m",
        "--task",
        "text",
        "--task",
        "image",
        "--out",
        "r",
    ]
    assert spread(["probe", "--task", "text", "--limit", "5"]) == ["probe", "--task", "text", "--limit", "5"]
    assert spread(["score", "m", "--split", "test", "compositional", "train"]).count("--split") == 3


def test_stopping_by_hand_is_said(line, monkeypatch) -> None:
    import unisonde.measure

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(unisonde.measure, "named", stop)
    code, _, err = line("entropy", "x.npy")
    assert code == 130 and "goes on" in err


def test_decode_hands_on_what_was_asked(line, tmp_path, monkeypatch) -> None:
    from unisonde.study.decoding import experiments
    from unisonde.study.decoding.finding import Finding

    seen: dict = {}

    def decode(name, model, given):
        seen.update(given, experiment=name, model=model.name)
        return [Finding(None, "so it is.", None)]  # type: ignore[arg-type]

    monkeypatch.setattr(experiments, "decode", decode)
    monkeypatch.setattr("unisonde.report.decoding.draw", lambda folder, name: [folder / f"{name}.pdf", folder / f"{name}.png"])
    asked = ("decode", "gmi", "twin/janus-pro", "--data", "tabletop", "--attribute", "shape", "colour", "--limit", "3")
    code, said, _ = line(*asked, "--out", tmp_path / "d", "--group", "scene", "--retry")
    assert seen["retry"]
    assert code == 0 and said.startswith("so it is.\nThe table is ") and "gmi.parquet, the figure " in said and "gmi.pdf." in said
    assert (seen["experiment"], seen["model"], seen["attributes"], seen["group"]) == (
        "gmi",
        "twin/janus-pro",
        ("shape", "colour"),
        "scene",
    )
    assert len(seen["items"]) == 3 and {item.modality for item in seen["texts"]} == {"text"} and seen["name"] == "tabletop"
    line(*asked, "--out", tmp_path / "d", "--group", "shape=scene", "colour=layout")
    assert seen["group"] == {"shape": "scene", "colour": "layout"}
    monkeypatch.undo()
    code, _, said = line("decode", "probes", "twin/janus-pro", "--data", "tabletop", "--limit", "3", "--out", tmp_path / "d")
    assert code == 1 and "not an encoder with an adapter" in said and "\n" not in said.strip()


def test_a_run_that_is_no_run(line, tmp_path) -> None:
    code, _, err = line("report", tmp_path, "-o", tmp_path / "r.html")
    assert code == 1 and "run.json" in err
