"""BAGEL's published sizes and files: what the full size holds, pictures on their way in, loading, and several devices."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer

from unisonde.data.item import Item
from unisonde.models import bagel
from unisonde.models.bagel import SPECIAL_TOKENS, Bagel, load, recognised, resized, to_pixels
from unisonde.models.base import Generation
from unisonde.models.parts import flux_vae
from unisonde.models.parts.bagel_flow import Guidance
from unisonde.models.parts.bagel_network import (
    KEYS,
    BagelConfig,
    BagelNetwork,
    from_squares,
    places_of,
    sinusoids,
    squares,
    twin,
)
from unisonde.models.parts.checkpoint import empty
from unisonde.models.trace import Reading, Trace
from unisonde.train.bagel import AUTOENCODER, GENERATION, export, initialise, new_twin

# ------------------------------------------------------------------------------------------------------------ pictures and sizes


@pytest.mark.parametrize(
    ("size", "sizes", "stride", "wanted"),
    [
        ((1024, 1024), (1024, 512), 16, (1024, 1024)),
        ((4000, 3000), (1024, 512), 16, (1024, 768)),
        ((100, 60), (1024, 512), 16, (848, 512)),
        ((1024, 768), (980, 224), 14, (980, 728)),
        ((1, 1), (1024, 512), 16, (512, 512)),
        ((1, 3000), (1024, 512), 16, (16, 1024)),  # too long to keep its shape
    ],
)
def test_pictures_are_resized_as_published(size, sizes, stride, wanted) -> None:
    assert resized(Image.new("RGB", size), sizes, stride).size == wanted


def test_pixels_run_from_minus_one_to_one() -> None:
    picture = Image.new("RGB", (4, 2), (255, 0, 127))
    pixels = to_pixels(picture)
    assert pixels.shape == (3, 2, 4) and pixels[0].min() == 1 and pixels[1].max() == -1 and abs(float(pixels[2].mean())) < 0.005


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_squares_and_back(height, width, side, channels) -> None:
    picture = torch.randn(2, channels, height * side, width * side)
    tokens = squares(picture, side)
    assert tokens.shape == (2, height * width, side * side * channels)
    assert torch.equal(from_squares(tokens, (height, width), side), picture)
    row, column = height - 1, width - 1  # the last square, its first pixel
    assert torch.equal(tokens[0, row * width + column, :channels], picture[0, :, row * side, column * side])


def test_places_are_numbered_by_rows_of_the_table() -> None:
    assert places_of((2, 3), 70).tolist() == [0, 1, 2, 70, 71, 72]


def test_the_table_of_places_has_the_column_first() -> None:
    """Worked out entry by entry from arXiv 2111.06377."""
    table = sinusoids(3, 8)
    for row in range(3):
        for column in range(3):
            wanted = []
            for coordinate in (column, row):
                angles = [coordinate / 10000 ** (k / 2) for k in range(2)]
                wanted += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
            assert np.allclose(table[3 * row + column].numpy(), wanted, atol=1e-6)


def manifest(path: Path) -> dict[str, tuple[int, ...]]:
    pairs = (line.split("\t") for line in path.read_text().splitlines() if line)
    return {key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for key, shape in pairs}


def test_the_published_size_covers_the_manifest(shared) -> None:
    network = empty(lambda: BagelNetwork(BagelConfig()))
    ours = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    theirs = manifest(shared / "manifests" / "bagel_7b_mot.keys.txt")
    assert KEYS.shapes(theirs) == ours and len(ours) == 1223
    assert sum(p.numel() for p in network.parameters()) == 14_607_260_128


def test_the_published_autoencoder_covers_the_manifest(shared) -> None:
    config = flux_vae.FluxVaeConfig()
    vae = empty(lambda: flux_vae.build(config))
    official = {k: torch.empty(v, device="meta") for k, v in manifest(shared / "manifests" / "bagel_ae.keys.txt").items()}
    matrices = {key: tuple(tensor.shape) for key, tensor in flux_vae.as_matrices(official.items())}
    assert flux_vae.keys_of(config).shapes(matrices) == {key: tuple(value.shape) for key, value in vae.state_dict().items()}
    back = flux_vae.official_tensors(vae, config)
    assert {key: tensor.shape for key, tensor in back.items()} == {key: tensor.shape for key, tensor in official.items()}
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683 and config.reduction == 8


LLM = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
}
VIT = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}


def test_published_configurations_are_understood() -> None:
    assert BagelConfig.from_dicts(LLM, VIT) == BagelConfig()
    assert BagelConfig.from_dicts(*twin(100).to_dicts()) == twin(100)
    with pytest.raises(ValueError, match=r"llm_config\.json is of a model of type 'llama'; BAGEL's is 'qwen2'"):
        BagelConfig.from_dicts(LLM | {"model_type": "llama"}, VIT)
    with pytest.raises(ValueError, match="lacks 'patch_size', so it is not BAGEL's"):
        BagelConfig.from_dicts(LLM, {k: v for k, v in VIT.items() if k != "patch_size"})


# --------------------------------------------------------------------------------------------------------------------- loading

BROKEN = '{\n  "name": [\n    "BAGEL-7B-MoT"\n  ],\n}'
"""Of the shape in which config.json is published: a comma too many, and nothing of use."""

DRAW = {"steps": 3, "seed": 1}
PICTURE = Image.new("RGB", (40, 30), "red")


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A folder in the published layout: official names, a tokenizer of bytes, a config.json that is no JSON."""
    folder = tmp_path_factory.mktemp("hub") / "BAGEL"
    tokenizer = byte_tokenizer(SPECIAL_TOKENS)
    torch.manual_seed(0)
    network = BagelNetwork(replace(twin(len(tokenizer)), positions=1024))
    initialise(network, 0)
    torch.nn.init.normal_(network.llm2vae.weight, 0, 0.05)
    export(Bagel(network, new_twin(0).vae, tokenizer, "tiny"), folder)
    (folder / "config.json").write_text(BROKEN)
    settings = json.loads((folder / "unisonde.json").read_text())
    (folder / "unisonde.json").write_text(json.dumps({key: settings[key] for key in ("sizes", "autoencoder")}))
    return folder


def answers(model: Bagel) -> tuple:
    drawn = model.generate("ein Würfel", "image", **DRAW)
    changed = model.generate("ein Würfel", "image", image=PICTURE, **DRAW)
    return drawn.tobytes(), changed.tobytes(), model.generate("what?", image=PICTURE, tokens=4), model.generate("what?", tokens=4)


def test_a_folder_in_the_published_layout(hub) -> None:
    assert recognised(str(hub)) and not recognised(str(hub.parent))
    model = load(str(hub), "tiny")
    assert model.defaults("image") == Generation(guidance=4.0, steps=50) and model.guidance == Guidance()
    assert model.defaults("text") == Generation(tokens=1000, temperature=0.0)
    official = load_file(hub / "ema.safetensors")
    assert "language_model.model.layers.0.mlp_moe_gen.up_proj.weight" in official and len(official) == len(
        model.network.state_dict()
    )
    assert all(torch.equal(tensor, official[key].float()) for key, tensor in model.network.state_dict().items())
    latents = flux_vae.official_tensors(model.vae, AUTOENCODER)
    official = load_file(hub / "ae.safetensors")
    assert set(latents) == set(official) and all(torch.equal(tensor, official[key].float()) for key, tensor in latents.items())
    parts = (*model.network.parameters(), *model.network.buffers(), *model.vae.parameters())
    assert {p.dtype for p in parts} == {torch.float32} and not any(p.is_meta for p in parts)
    assert model.source == hub and model.identity()["weights"] == load(str(hub), "again").identity()["weights"]
    assert answers(model) == answers(load(str(hub), "again"))


def test_number_formats(hub) -> None:
    model = load(str(hub), "tiny", dtype=torch.bfloat16)
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}  # always
    answers(model)


def test_a_twin_comes_back(tmp_path) -> None:
    model = new_twin(1)
    torch.nn.init.normal_(model.network.llm2vae.weight, 0, 0.05)
    export(model, tmp_path / "twin", {"steps": 1})
    again = load(str(tmp_path / "twin"), "twin/bagel")
    assert again.config == model.config and again.guidance == model.guidance
    assert {task: again.defaults(task) for task in again.tasks} == GENERATION
    item = Item("a", "", "a red ring")
    [one], [other] = (m.respond([item], "image", m.settings("image", steps=3)) for m in (model, again))
    assert abs(np.asarray(one.image, int) - np.asarray(other.image, int)).max() <= 2  # the file is of half precision
    with pytest.raises(ValueError, match="already holds files"):
        export(model, tmp_path / "twin")


def test_weights_alone_find_the_rest_in_bagels_repository(hub, tmp_path, monkeypatch) -> None:
    """BAGEL-RecA's, under their own name."""
    folder = tmp_path / "BAGEL-RecA"
    folder.mkdir()
    tensors = load_file(hub / "ema.safetensors")
    tensors["llm2vae.bias"] += 1
    save_file(tensors, folder / "model_bf16.safetensors")
    shutil.copy(hub / "unisonde.json", folder)  # the sizes of this test
    with pytest.raises(ValueError, match=r"llm_config\.json is neither in .* nor can it be had from the hub"):
        load(str(folder), "tiny")
    monkeypatch.setattr(bagel, "REPOSITORY", str(hub))
    model = load(str(folder), "tiny")
    assert torch.equal(model.network.llm2vae.bias, tensors["llm2vae.bias"].float()) and model.source == folder
    assert answers(model)[0] != answers(load(str(hub), "tiny"))[0]


def copy(hub: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hub, tmp_path / "copy"))


def test_the_weights_of_two_models_in_one_folder(hub, tmp_path) -> None:
    folder = copy(hub, tmp_path)
    shutil.copy(folder / "ema.safetensors", folder / "model_bf16.safetensors")
    with pytest.raises(ValueError, match="the weights of two models; leave one of them there"):
        load(str(folder), "tiny")


@pytest.mark.parametrize("device", [None, "auto"])
@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("ema", lambda w: w.pop("vae2llm.weight"), "the checkpoint of tiny lacks vae2llm.weight"),
        ("ema", lambda w: w.update(extra=torch.zeros(1)), "has unknown extra"),
        ("ema", lambda w: w.update({"llm2vae.bias": torch.zeros(3)}), r"in another shape llm2vae.bias \(3,\) instead of \(64,\)"),
        ("ae", lambda w: w.pop("decoder.conv_in.bias"), r"tiny \(autoencoder\) lacks decoder.conv_in.bias"),
    ],
)
def test_keys_and_shapes_are_strict(hub, tmp_path, file, change, said, device) -> None:
    folder = copy(hub, tmp_path)
    weights = load_file(folder / f"{file}.safetensors")
    change(weights)
    save_file(weights, folder / f"{file}.safetensors")
    with pytest.raises(ValueError, match=said):
        load(str(folder), "tiny", device=device)


@pytest.mark.parametrize("file", ["ema.safetensors", "ae.safetensors"])
def test_a_file_cut_short(hub, tmp_path, file) -> None:
    folder = copy(hub, tmp_path)
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{file} is no whole safetensors file"):
        load(str(folder), "tiny")


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("ema.safetensors", r"has no weights: none of ema\.safetensors, model_bf16\.safetensors is there"),
        ("ae.safetensors", r"ae\.safetensors is neither in"),
        ("tokenizer.json", r"tokenizer\.json is neither in"),
        ("vit_config.json", r"vit_config\.json is neither in"),
    ],
)
def test_a_missing_file_is_named(hub, tmp_path, gone, said) -> None:
    folder = copy(hub, tmp_path)
    (folder / gone).unlink()
    with pytest.raises(ValueError, match=said):
        load(str(folder), "tiny")


def test_a_missing_shard_is_named(hub, tmp_path) -> None:
    folder = copy(hub, tmp_path)
    (folder / "ema.safetensors").unlink()
    index = {"weight_map": {"vae2llm.weight": "ema-00001-of-00002.safetensors"}}
    (folder / "ema.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks ema-00001-of-00002\.safetensors"):
        load(str(folder), "tiny")


@pytest.mark.parametrize("file", ["tokenizer.json", "llm_config.json"])
def test_a_damaged_file_is_named(hub, tmp_path, file) -> None:
    folder = copy(hub, tmp_path)
    (folder / file).write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer of .* cannot be read|llm_config\.json of .* is no JSON"):
        load(str(folder), "tiny")


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_pickle_with_code_in_it(hub, tmp_path, capsys) -> None:
    folder = copy(hub, tmp_path)
    (folder / "ema.safetensors").unlink()
    torch.save({"vae2llm.weight": Evil()}, folder / "ema.bin")
    with pytest.raises(ValueError, match="more than plain weights"):
        load(str(folder), "tiny")
    assert "never run" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- several devices

LAYERS = "language_model.model.layers"
REST = ("time_embedder", "vae2llm", "llm2vae", "latent_pos_embed", "connector", "vit_pos_embed")
SHARED = {"language_model.model.embed_tokens": "cpu", "language_model.lm_head": "disk", "vit_model": "disk"}
SHARED |= {"language_model.model.norm": "cpu", "language_model.model.norm_moe_gen": "disk"} | dict.fromkeys(REST, "cpu")
DIVIDED = SHARED | {f"{LAYERS}.{k}": "cpu" if k % 2 else "disk" for k in range(4)}


def recorded(model: Bagel) -> dict:
    states = {}
    trace = Trace(lambda s: states.__setitem__((s.step, s.layer), s.states.clone()), Reading(step="all"))
    model.respond([Item("a", "", "ein Würfel")], "image", model.settings("image", steps=3), 0, trace)
    return states


@pytest.mark.parametrize("device_map", [DIVIDED, {"": "disk"}, {"": "cpu"}, "auto"])
def test_parts_on_several_devices_answer_as_one(hub, device_map) -> None:
    """Memory and disk stand in for GPUs here: the hooks are the same."""
    whole, parted = load(str(hub), "tiny"), load(str(hub), "tiny", device=device_map)
    assert parted.device == torch.device("cpu") and parted.network.dtype == torch.float32
    on_disk = {name for name, p in parted.network.named_parameters() if p.is_meta}
    if device_map is DIVIDED:
        assert any(name.startswith(f"{LAYERS}.0.") for name in on_disk) and "vae2llm.weight" not in on_disk
        assert not any(name.startswith(f"{LAYERS}.1.") for name in on_disk)
    assert bool(on_disk) == (device_map not in ("auto", {"": "cpu"}))
    assert answers(parted) == answers(whole)
    assert {name for name, p in parted.network.named_parameters() if p.is_meta} == on_disk  # what was read in for a pass is gone
    ours, theirs = recorded(parted), recorded(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert parted.identity()["parameters"] == whole.identity()["parameters"]


def test_parts_left_on_disk_have_the_wanted_format(hub) -> None:
    """The file is of float16."""
    whole, parted = (load(str(hub), "tiny", device=d, dtype=torch.bfloat16) for d in (None, DIVIDED))
    assert answers(parted) == answers(whole)


@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        ({"language_model": "cpu"}, r"leaves out .*, .*, .* and \d+ more of tiny"),
        ({"": "cpu", "language": "disk"}, "names 'language', which tiny has not"),
        ({"": "somewhere"}, "puts '' on 'somewhere'; a place is cpu, disk, or a device"),
    ],
)
def test_device_maps_that_cannot_be_followed(hub, device_map, said) -> None:
    with pytest.raises(ValueError, match=said):
        load(str(hub), "tiny", device=device_map)


def test_pickles_cannot_be_left_on_disk(hub, tmp_path) -> None:
    folder = copy(hub, tmp_path)
    torch.save(load_file(folder / "ema.safetensors"), folder / "ema.bin")
    (folder / "ema.safetensors").unlink()
    assert answers(load(str(folder), "tiny", device={"": "cpu"})) == answers(load(str(hub), "tiny"))
    with pytest.raises(ValueError, match=r"ema\.bin is no safetensors file, so parts of tiny cannot be left on disk"):
        load(str(folder), "tiny", device={"": "disk"})
