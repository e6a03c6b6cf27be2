"""`unisonde.load`: every way to name a model, and what is said of a name that is none."""

from __future__ import annotations

import json

import pytest

import unisonde
from unisonde.models.registry import FAMILIES, MODELS, packaged
from unisonde.train.janus_pro import GENERATION, export, new_twin


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "mine"
    export(new_twin(0), path, {})
    return path


def test_a_local_folder_of_a_known_family(folder) -> None:
    model = unisonde.load(folder)
    assert (model.family, model.name, model.tasks) == ("janus-pro", str(folder), ("text", "image"))
    assert model.defaults("image") == GENERATION["image"]
    assert model.identity()["weights"] == unisonde.load(folder).identity()["weights"]


def test_a_folder_in_the_hub_layout_has_the_published_settings(folder, tmp_path) -> None:
    """Without the twin's own settings the folder is a Janus-Pro as published: its sampling, and its system prompt."""
    import shutil

    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "unisonde.json").unlink()
    model = unisonde.load(plain)
    assert model.defaults("image").guidance == 5.0 and model.defaults("image").temperature == 1.0
    assert model.system.startswith("You are a helpful language and vision assistant.")


def test_another_weight_is_another_identity(folder, tmp_path) -> None:
    other = tmp_path / "other"
    export(new_twin(1), other, {})
    assert unisonde.load(other).identity()["weights"] != unisonde.load(folder).identity()["weights"]


@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_says_what_it_is(name) -> None:
    entry = MODELS[name]
    assert entry.name == name and entry.summary and entry.licence and entry.tasks
    if name.startswith("twin/"):
        assert (packaged(entry.where) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("twin/janus-por", "did you mean twin/janus-pro"),
        ("smollm", "no model is called 'smollm'.*smollm2-135m-q4"),
        ("nobody/nothing-1B", "no model is called 'nobody/nothing-1B' .nor does the hub"),
        ("hf:nobody/nothing-1B", "config.json.*local folder"),
        ("deepseek-community/Janus-Pro-1B", r"(tokenizer\.json|config\.json).*local folder"),
    ],
)
def test_names_that_cannot_be_opened(name, said, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=said):
        unisonde.load(name)


def test_a_folder_of_another_family_is_told_how_to_go_on(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=rf"type 'llama'.*{'|'.join(FAMILIES)}.*hf:"):
        unisonde.load(tmp_path)
    (tmp_path / "config.json").write_text("{torn")
    with pytest.raises(ValueError, match=r"config\.json"):
        unisonde.load(tmp_path)
    with pytest.raises(ValueError, match="no model is called"):
        unisonde.load(tmp_path / "nowhere")
