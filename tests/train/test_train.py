"""The whole command at a toy's length: from nothing to a folder that loads, refused where something stands, gone on with after a stop."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import unisonde
from unisonde.train import RECIPES, train_twin
from unisonde.train.janus_pro import Recipe, train
from unisonde.train.loop import Schedule

TOY = Recipe(
    codes=Schedule(3, 1e-3, 1),
    vision=Schedule(3, 1e-3, 1),
    joint=Schedule(3, 1e-3, 1),
    mix={"draw": 2, "infer": 2, "caption": 2, "answer": 2},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train(tmp_path_factory.mktemp("twins") / "toy", TOY)


def test_the_folder_loads_and_responds(folder) -> None:
    model = unisonde.load(folder)
    assert model.system == "" and model.defaults("text").tokens == 96
    assert model.generate("a red ring at the top left", "image", seed=1).size == (32, 32)
    assert isinstance(model.generate("a red ring at the top left", "text", tokens=5), str)
    record = json.loads((folder / "training.json").read_text())
    assert record["recipe"]["seed"] == 0 and record["effort"]["joint"]["processor_seconds"] > 0
    assert not folder.with_name("toy.training").exists()


def test_the_same_seed_gives_the_same_weights(folder, tmp_path) -> None:
    again = train(tmp_path / "toy", TOY)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    other = train(tmp_path / "other", replace(TOY, seed=1))
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


def test_what_stands_there_is_not_overwritten(folder) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds files"):
        train(folder, TOY)
    assert (folder / "model.safetensors").read_bytes() == before


def test_another_recipe_does_not_go_on(tmp_path, monkeypatch) -> None:
    import unisonde.train.janus_pro as recipe

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "joint_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "t", TOY)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="begun with another recipe"):
        train(tmp_path / "t", replace(TOY, seed=9))
    assert (train(tmp_path / "t", TOY) / "model.safetensors").exists()


def test_an_unknown_twin_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no twin is called 'janus'; there are janus-pro"):
        train_twin("janus", tmp_path / "t")


def test_a_truncated_weight_file_is_refused(folder, tmp_path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="broken"):
        unisonde.load(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors"):
        unisonde.load(broken)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("janus-pro", "codes", "joint"), ("speech-smollm", "spell", "write"), ("vision-smollm-masked", "encoder", "write")],
)
def test_steps_go_to_the_stages(tmp_path, monkeypatch, name, first, last) -> None:
    from importlib import import_module

    room, seen = import_module(RECIPES[name][0]), {}
    monkeypatch.setattr(room, "train", lambda out, recipe: seen.update(recipe=recipe) or out)
    assert train_twin(name, tmp_path / "t", seed=3, precision="fp32", steps=7, code_steps=5) == tmp_path / "t"
    recipe = seen["recipe"]
    assert (recipe.seed, recipe.precision, getattr(recipe, first).steps, getattr(recipe, last).steps) == (3, "fp32", 5, 7)
    train_twin(name, tmp_path / "t")
    assert seen["recipe"] == (room.recipe_of(name) if "vision" in name else room.Recipe())
