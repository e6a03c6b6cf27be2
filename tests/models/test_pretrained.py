"""Files of published models: settings of our own beside them, and what keeps them from being fetched."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from unisonde.models.base import Generation
from unisonde.models.parts import pretrained
from unisonde.models.parts.checkpoint import weight_files
from unisonde.models.parts.pretrained import own_settings, reach, read_json, settled


def test_settings_beside_the_weights(tmp_path: Path) -> None:
    assert own_settings(tmp_path) == ({}, None)
    own = {"generation": {"text": {"tokens": 7, "temperature": 0.0}}, "family": "mine"}
    (tmp_path / "unisonde.json").write_text(json.dumps(own))
    assert own_settings(tmp_path) == ({"text": Generation(tokens=7, temperature=0.0)}, None)
    (tmp_path / "unisonde.json").write_text(json.dumps({"system": ""}))
    assert own_settings(tmp_path) == ({}, "")


@pytest.mark.parametrize(
    "own",
    [
        "{torn",
        "[]",
        '{"generation": 3}',
        '{"generation": {"text": 3}}',
        '{"generation": {"text": {"heat": 1}}}',
        '{"generation": {"text": {"tokens": 0}}}',
    ],
)
def test_settings_that_are_none(tmp_path: Path, own: str) -> None:
    (tmp_path / "unisonde.json").write_text(own)
    with pytest.raises(ValueError, match=r"unisonde\.json") as error:
        own_settings(tmp_path)
    assert "\n" not in str(error.value)


def test_where_a_model_runs_if_nothing_is_said() -> None:
    assert settled("cpu", None) == (torch.device("cpu"), torch.float32)
    assert settled("meta", None) == (torch.device("meta"), torch.bfloat16)
    assert settled("cpu", torch.float16) == (torch.device("cpu"), torch.float16)


def test_no_space_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pretrained, "cached_file", full)
    for ask in (lambda: read_json("org/name", "config.json"), lambda: weight_files("org/name")):
        with pytest.raises(
            ValueError, match=r"no space left for (config\.json|model\.safetensors) of 'org/name'.*HF_HOME"
        ) as error:
            ask()
        assert "\n" not in str(error.value)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was wanted is named, and how to go on without a network."""
    monkeypatch.setattr(pretrained, "cached_file", lambda *args, **kwargs: None)
    assert reach("org/name", "config.json") is None
    with pytest.raises(
        ValueError, match=r"config\.json of 'org/name' is not in the hub's cache .* give the path of a local folder"
    ):
        read_json("org/name", "config.json")
    with pytest.raises(ValueError, match=r"none of model\.safetensors.* of 'org/name'.*can be had from the hub; give the path"):
        weight_files("org/name")
