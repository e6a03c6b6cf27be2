"""Prismatic: its folder, its pictures, its template, and its encoders against a `timm` tower written out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from bridges import TEXT, built, picture, timm_shapes, tower, write_prismatic
from PIL import Image
from safetensors.torch import load_file, save_file
from test_ultravox import linear, llama_keys
from torch import Tensor

from unisonde.data.item import Item
from unisonde.models import prismatic
from unisonde.models.base import Generation
from unisonde.models.parts.checkpoint import empty
from unisonde.models.prismatic import (
    SYSTEM,
    Prismatic,
    PrismaticConfig,
    PrismaticNetwork,
    Tower,
    full_size,
    keys,
    load,
    positions,
    prepared,
)
from unisonde.models.trace import Reading, Trace

GREEDY = Generation(tokens=5, temperature=0.0)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KINDS = ("dinov2", "siglip")


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prismatic, Any]:
    """A model, and what its folder was written from: the encoder's weights by the names of `timm`, the checkpoint's."""
    model, written = built(f"prismatic-{request.param}", tmp_path_factory.getbasetemp())
    assert isinstance(model, Prismatic)
    return model, written


# --------------------------------------------------------------------------------------------------------------------- by hand


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def vit(w: dict[str, Tensor], pixels: Tensor, blocks: int, heads: int = 4, patch: int = 4) -> list[Tensor]:
    """States of a vision transformer of `timm` (n, d): what enters the first of `blocks`, and what leaves each."""
    x = F.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)[0].flatten(1).T
    x = x + w["pos_embed"][0]  # the patches alone have positions
    if "cls_token" in w:
        x = torch.cat([w["cls_token"][0], w["reg_token"][0], x])
    states = [x]
    for k in range(blocks):
        at = f"blocks.{k}"
        q, key, value = (
            t.unflatten(-1, (heads, -1)).transpose(0, 1)
            for t in linear(norm(x, w, f"{at}.norm1"), w, f"{at}.attn.qkv").chunk(3, -1)
        )
        seen = ((q @ key.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ value).transpose(0, 1).flatten(1)
        x = x + linear(seen, w, f"{at}.attn.proj") * w.get(f"{at}.ls1.gamma", 1)
        h = linear(norm(x, w, f"{at}.norm2"), w, f"{at}.mlp.fc1")
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))  # not the approximation by tanh
        x = x + linear(h, w, f"{at}.mlp.fc2") * w.get(f"{at}.ls2.gamma", 1)
        states.append(x)
    return states


def by_hand(written: Any, pixels: Tensor, tokens: list[int]) -> Tensor:
    """Logits (L, V) of BOS, the features of a picture, and the other tokens."""
    vision, held = written
    patches = vit(vision, pixels, 2)[-1][-16:]  # the last layer but one, without the last norm
    h = linear(patches, held["projector"], "projector.0")
    h = linear(0.5 * h * (1 + torch.erf(h / math.sqrt(2))), held["projector"], "projector.2")
    decoder = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()
    decoder.load_state_dict({k.removeprefix("llm."): t for k, t in held["llm_backbone"].items()})
    with torch.inference_mode():
        words = decoder.get_input_embeddings()(torch.tensor(tokens))
        return decoder(inputs_embeds=torch.cat([words[:1], h, words[1:]])[None]).logits[0]


def test_the_network_is_the_one_written_out_by_hand(made) -> None:
    model, written = made
    item = Item("i", "", "what is it?", picture(24, 15))
    prompted = model.prepare(item, 5)
    with torch.inference_mode():
        logits = model.language_model(inputs_embeds=model.embed(prompted)).logits[0]
    tokens = model.tokenizer(f"{SYSTEM} USER: what is it? ASSISTANT:")["input_ids"]
    torch.testing.assert_close(logits, by_hand(written, prompted.inputs["pixels"], tokens), **CLOSE)


def test_what_the_stacks_show(made) -> None:
    model, (vision, _) = made
    item = Item("i", "", "what is it?", picture(24, 15))
    kept = tiny.Kept()
    model.respond([item], "text", GREEDY, trace=Trace(kept))
    seen = {(s.stack, s.layer): s for s in kept.seen}
    states = vit(vision, model.prepare(item, 5).inputs["pixels"], 2)
    assert model.encoder.depth == 2 and model.encoder.norm is None
    for layer, expected in enumerate(states):
        torch.testing.assert_close(seen["encoder", layer].states, expected, **CLOSE)
    torch.testing.assert_close(seen["adapter", 0].select("prompt", Reading()), states[-1][-16:], **CLOSE)
    kinds = [(len(s), s.modality, s.kind) for s in seen["encoder", 0].spans]
    lead = [(5, "image", "template")] if "cls_token" in vision else []
    assert kinds == [*lead, (16, "image", "content")]


def test_the_spans_of_a_prompt(made) -> None:
    model, _ = made
    prompt = model.prepare(Item("i", "", " what is it? ", picture(24, 15)), 5)
    read = [(s.modality, s.kind, model.tokenizer.decode(prompt.ids[s.start : s.stop])) for s in prompt.spans]
    assert read[0] == ("text", "template", "<s>") and read[1][:2] == ("image", "content") and len(prompt.slots) == 16
    assert prompt.slots == list(range(1, 17))
    assert read[2:] == [
        ("text", "template", f"{SYSTEM} USER: "),
        ("text", "content", "what is it?"),
        ("text", "template", " ASSISTANT:"),
    ]
    assert model.window == 512 and model.defaults("text") == Generation(tokens=512, temperature=0.0)


# --------------------------------------------------------------------------------------------------------------------- pictures


def config(resize: str, mean: tuple[float, float, float] = (0.485, 0.456, 0.406)) -> PrismaticConfig:
    sizes = Tower("dinov2", "", 32, 3, 4, 64, 16, 4, mean, (0.2, 0.3, 0.4))
    return PrismaticConfig(sizes, transformers.LlamaConfig(**TEXT), resize)


def pixels(picture: Image.Image) -> np.ndarray:
    """Normalised by hand, (3, H, W)."""
    values = np.asarray(picture, np.float64) / 255
    return np.moveaxis((values - [0.485, 0.456, 0.406]) / [0.2, 0.3, 0.4], 2, 0)


def test_a_letterbox() -> None:
    wide = picture(40, 20)
    page = Image.new("RGB", (40, 40), (123, 116, 103))
    page.paste(wide, (0, 10))
    expected = pixels(page.resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(prepared(wide, config("letterbox")).numpy(), expected, atol=1e-5)
    # An odd difference leaves one line too many on the long side, which is cut off after resizing.
    odd = picture(40, 21)
    page = Image.new("RGB", (40, 39), (123, 116, 103))
    page.paste(odd, (0, 9))
    expected = pixels(page.resize((16, 16), Image.Resampling.BICUBIC))  # 16 x 40 / 39 is 16 and a bit
    np.testing.assert_allclose(prepared(odd, config("letterbox")).numpy(), expected, atol=1e-5)
    even = picture(16, 16)
    np.testing.assert_allclose(prepared(even, config("letterbox")).numpy(), pixels(even), atol=1e-5)


def test_other_ways_to_make_a_square() -> None:
    tall = picture(20, 50)
    resized = tall.resize((16, 40), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(prepared(tall, config("resize-crop")).numpy(), pixels(resized.crop((0, 12, 16, 28))), atol=1e-5)
    naive = tall.resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(prepared(tall, config("resize-naive")).numpy(), pixels(naive), atol=1e-5)


def test_a_table_of_positions_at_another_grid() -> None:
    """As a picture of floats is resized by PIL, which knows nothing of it."""
    table = torch.randn(1, 64, 5, generator=torch.Generator().manual_seed(0))
    made = positions(table, Tower("siglip", "", 5, 2, 1, 8, 16, 4))
    for channel in range(5):
        square = Image.fromarray(table[0, :, channel].reshape(8, 8).numpy())
        expected = np.asarray(square.resize((4, 4), Image.Resampling.BICUBIC)).flatten()
        np.testing.assert_allclose(made[0, :, channel].numpy(), expected, atol=1e-5)
    classed = positions(table, Tower("dinov2", "", 5, 2, 1, 8, 16, 4))
    assert torch.equal(classed[:, 1:], made) and not classed[:, 0].any()
    assert torch.equal(positions(made, Tower("siglip", "", 5, 2, 1, 8, 16, 4)), made)


def test_weights_for_larger_pictures(tmp_path: Path) -> None:
    """As DINOv2's, which are published for 518 pixels."""
    vision, _ = write_prismatic(tmp_path, "dinov2", positions=49)
    model = load(str(tmp_path), "large", "cpu")
    prompted = model.prepare(Item("i", "", "", picture(16, 16)), 5)
    table = positions(vision["pos_embed"], Tower(**tower("siglip")))
    with torch.inference_mode():
        states = model.network.vision_tower(prompted.inputs["pixels"]).last_hidden_state[0]
    torch.testing.assert_close(states, vit(vision | {"pos_embed": table}, prompted.inputs["pixels"], 2)[-1], **CLOSE)


# ----------------------------------------------------------------------------------------------------------------------- loading


def test_identity_knows_the_checkpoint_and_the_encoder(tmp_path: Path) -> None:
    write_prismatic(tmp_path, "siglip")
    model = load(str(tmp_path), "mine", "cpu")
    before = model.identity()
    assert set(model.apart) == {"vision_tower"} and before["vision_tower"]
    held = torch.load(tmp_path / "checkpoints" / "latest-checkpoint.pt", weights_only=True)
    held["model"]["projector"]["projector.0.bias"] += 1
    torch.save(held, tmp_path / "checkpoints" / "latest-checkpoint.pt")
    after = model.identity()
    assert after["weights"] != before["weights"] and after["vision_tower"] == before["vision_tower"]


def test_number_formats(tmp_path: Path) -> None:
    write_prismatic(tmp_path, "dinov2")
    model = load(str(tmp_path), "half", "cpu", torch.bfloat16)
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    items = [Item("i", "", "what?", picture(24, 15))]
    assert len(model.respond(items, "text", GREEDY)) == 1
    assert torch.isfinite(model.answer_scores(items, ["a", "b"])).all()


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("projector", "projector.2.bias", None, "lacks projector.2.bias"),
        ("llm_backbone", "llm.model.norm.weight", None, "lacks language_model.model.norm.weight"),
        ("llm_backbone", "llm.model.extra", torch.ones(1), "has unknown llm_backbone.llm.model.extra"),
        ("projector", "projector.0.bias", torch.ones(3), r"in another shape projector.projector.0.bias \(3,\)"),
    ],
)
def test_a_checkpoint_that_is_not_this_models(tmp_path: Path, part: str, key: str, value, said: str) -> None:
    _, held = write_prismatic(tmp_path, "siglip")
    held[part].pop(key, None)
    if value is not None:
        held[part][key] = value
    torch.save({"model": held}, tmp_path / "checkpoints" / "latest-checkpoint.pt")
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path), "mine", "cpu")


@pytest.mark.parametrize(
    ("kind", "key"), [("dinov2", "blocks.1.ls2.gamma"), ("siglip", "blocks.0.attn.qkv.bias"), ("dinov2", "reg_token")]
)
def test_an_encoder_that_is_not_whole(tmp_path: Path, kind: str, key: str) -> None:
    write_prismatic(tmp_path, kind)
    state = load_file(tmp_path / "vision" / "model.safetensors")
    del state[key]
    save_file(state, tmp_path / "vision" / "model.safetensors")
    with pytest.raises(ValueError, match="lacks vision_tower"):
        load(str(tmp_path), "mine", "cpu")


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_pickle_with_code_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prismatic(tmp_path, "siglip")
    torch.save({"model": {"projector": Evil()}}, tmp_path / "checkpoints" / "latest-checkpoint.pt")
    with pytest.raises(ValueError, match="more than plain weights"):
        load(str(tmp_path), "mine", "cpu")
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"vision": None, "vision_backbone_id": "clip-vit-l"},
            "vision_backbone_id of config.json is 'clip-vit-l'; known here is dinov2-vit-l",
        ),
        ({"llm": None, "llm_backbone_id": "phi-2-3b"}, "llm_backbone_id of config.json is 'phi-2-3b'; known here is vicuna-v15-7b"),
        ({"arch_specifier": "no-align+fused-gelu-mlp"}, "arch_specifier of config.json is 'no-align.fused-gelu-mlp'"),
        ({"image_resize_strategy": "stretch"}, "known are letterbox, resize-crop, resize-naive"),
        ({"arch_specifier": None}, "has no entry model.arch_specifier"),
        ({"vision": {"width": 3}}, "model.vision of config.json does not describe an encoder"),
    ],
)
def test_another_kind_of_prismatic(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    write_prismatic(tmp_path, "siglip")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["model"] = {key: value for key, value in (raw["model"] | change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path), "mine", "cpu")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json of 'TRI-ML/prismatic-vlms' .* cannot be had|dinov2-224px\+7b/config.json"):
        load("TRI-ML/prismatic-vlms/dinov2-224px+7b", "published", "cpu")
    write_prismatic(tmp_path, "siglip")
    (tmp_path / "checkpoints" / "latest-checkpoint.pt").unlink()
    with pytest.raises(ValueError, match=r"has no weights: none of checkpoints/latest-checkpoint.pt"):
        load(str(tmp_path), "mine", "cpu")
    tiny.byte_tokenizer(["<PAD>"]).save_pretrained(tmp_path)
    torch.save({"model": {}}, tmp_path / "checkpoints" / "latest-checkpoint.pt")
    with pytest.raises(ValueError, match=r"something else than named tensors|lacks"):
        load(str(tmp_path), "mine", "cpu")


def test_a_tokenizer_without_bos(tmp_path: Path) -> None:
    write_prismatic(tmp_path, "siglip")
    tiny.byte_tokenizer(["<PAD>"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="puts no BOS before a text"):
        load(str(tmp_path), "mine", "cpu")


# --------------------------------------------------------------------------------------------------------------------- full size


@pytest.mark.parametrize(
    ("encoder", "kind", "sizes", "vision", "total"),
    [
        ("dinov2-vit-l", "dinov2", (1024, 24, 4096, 14, 1369), 304_370_688, 7_050_551_296),
        ("siglip-vit-so400m", "siglip", (1152, 27, 4304, 14, 256), 412_442_352, 7_157_644_448),
    ],
)
def test_the_full_size_has_the_published_keys(encoder: str, kind: str, sizes: tuple[int, ...], vision: int, total: int) -> None:
    config = full_size(encoder)
    network = empty(lambda: PrismaticNetwork(config))
    width = sizes[0]
    timm = timm_shapes(kind, *sizes, head=False)
    assert sum(map(math.prod, timm.values())) == vision
    checkpoint = {f"vision_backbone.featurizer.{name}": shape for name, shape in timm.items()}
    maps = {"0.weight": (4096, width), "0.bias": (4096,), "2.weight": (4096, 4096), "2.bias": (4096,)}
    checkpoint |= {f"projector.projector.{name}": shape for name, shape in maps.items()}
    checkpoint |= llama_keys("llm_backbone.llm.", 32, 4096, 11008, 32064)
    checkpoint["vision_backbone.featurizer.pos_embed"] = tuple(positions(torch.zeros(1, sizes[4], width), config.tower).shape)
    table = keys(config.tower)
    assert table.shapes(checkpoint) == {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert sum(p.numel() for p in network.parameters()) == total
    left_out = sorted({key.split(".")[2] + "." + key.split(".")[3] for key in checkpoint if table.ignores(key)})
    assert left_out == [f"blocks.{sizes[1] - 1}", "norm.bias", "norm.weight"]
    assert len(network.encoder.layers) == sizes[1] - 1 and config.tower.grid == 16
    assert prismatic.TOWERS[encoder].lead == (5 if kind == "dinov2" else 0)
