"""`unisonde.load`: every way to name a model, and what is said of a name that is none."""

from __future__ import annotations

import json

import pytest
from bridges import WRITERS, built

import unisonde
from unisonde.models.base import fingerprint
from unisonde.models.registry import FAMILIES, MODELS, _loader, family_of, packaged
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


@pytest.mark.parametrize("file", ["Wan2.1_VAE.pth", "kl16.ckpt", "pytorch_model.bin", "vae/config.json"])
def test_another_file_of_weights_is_another_fingerprint(tmp_path, file) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "config.json").write_text("{}")
    seen = {fingerprint(tmp_path)}
    for content in (b"one", b"two"):
        (tmp_path / file).write_bytes(content)
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 3
    (tmp_path / "README.md").write_text("of no weight")
    assert fingerprint(tmp_path) in seen


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("lm_head.weight"), r"lack lm_head\.weight"),
        (lambda w: w.update(stranger=w["lm_head.weight"].clone()), r"hold stranger, which JanusForConditionalGeneration has not"),
        (
            lambda w: w.update({"lm_head.weight": w["lm_head.weight"][:-1].clone()}),
            r"lm_head\.weight .* is of shape \(\d+, 160\), where the network has",
        ),
    ],
)
def test_converted_weights_fill_the_network_exactly(folder, tmp_path, change, said) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    change(weights)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said):
        unisonde.load(other)


@pytest.mark.parametrize(
    ("files", "family"),
    [
        ({"config.json": {"model_type": "janus"}}, "janus-pro"),
        ({"config.json": {"model_type": "multi_modality"}}, "janus-pro"),
        ({"config.json": {"model_type": "multi_modality", "vision_gen_dec_config": {}}}, "janusflow"),
        ({"config.json": {"_class_name": "Showo"}}, "showo"),
        ({"config.json": {"_class_name": "Showo2Qwen2_5"}}, "showo2"),
        ({"config.json": {"model_type": "harmon"}}, "harmon"),
        ({"config.json": {"model_type": "emu3"}}, "emu3"),
        ({"config.json": "no JSON", "llm_config.json": {}, "vit_config.json": {}}, "bagel"),
        ({"model_index.json": {"_class_name": "OmniGen2Pipeline"}}, "omnigen2"),
        ({"harmon_1.5b.pth": ""}, "harmon"),
        ({"config.json": {"model_type": "ultravox"}}, "ultravox"),
        ({"config.json": {"model_type": "qwen2_audio"}}, "qwen2-audio"),
        ({"config.json": {"model_type": "llava"}}, "llava"),
        ({"config.json": {"model": {"vision_backbone_id": "dinov2-vit-l"}, "seed": 7}}, "prismatic"),
        ({"config.json": {"model_type": "speech-smollm"}}, "speech-smollm"),
        ({"config.json": {"model_type": "vision-smollm"}}, "vision-smollm"),
    ],
)
def test_a_family_is_told_by_its_files(tmp_path, files, family) -> None:
    from unisonde.models.registry import _family_at

    for file, held in files.items():
        (tmp_path / file).write_text(held if isinstance(held, str) else json.dumps(held))
    assert _family_at(str(tmp_path)) == family


@pytest.mark.parametrize("config", [{"model_type": "llava_next"}, {"model": {"name": "x"}}, {"model": "vision_backbone_id"}, {}])
def test_a_configuration_of_no_family(config) -> None:
    assert family_of(config) is None


@pytest.mark.parametrize("kind", WRITERS)
def test_a_bridged_model_by_its_folder(kind, tmp_path_factory) -> None:
    made = built(kind, tmp_path_factory.getbasetemp())[0]
    model = unisonde.load(made.source, device="cpu")
    assert type(model) is type(made) and model.tasks == ("text",)
    assert model.identity()["weights"] == made.identity()["weights"]
    with pytest.raises(ValueError, match="cannot do the task 'image'"):
        model.settings("image")


@pytest.mark.parametrize("name", [e.name for e in MODELS.values() if e.tasks == ("text",) and "/" in e.name])
def test_published_bridged_models_without_the_hub(name, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"config\.json"):
        unisonde.load(name)


def test_each_family_has_a_name_and_a_loader() -> None:
    assert {entry.family for entry in MODELS.values()} == {*FAMILIES, "causal-lm"}
    for loader in FAMILIES.values():
        assert callable(_loader(loader))


def test_a_folder_of_another_kind_of_model_says_so(tmp_path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="type 'FluxPipeline', which is no known family"):
        unisonde.load(tmp_path)


@pytest.mark.parametrize("device", ["auto", {"": "cpu"}])
def test_several_devices_are_for_one_family(folder, device) -> None:
    for name in (folder, "twin/janus-pro"):
        with pytest.raises(ValueError, match="runs on one device"):
            unisonde.load(name, device=device)
