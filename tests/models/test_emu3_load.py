"""Loading Emu3 from folders in the published layout, and the same answers as `transformers` gives with the documented recipe.

The folders are written here, small and random, with the key names of transformers 4.48 made from today's by rules of this file's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Emu3ForConditionalGeneration, Emu3Processor
from transformers.generation import TopKLogitsWarper
from transformers.models.emu3.configuration_emu3 import Emu3Config, Emu3TextConfig, Emu3VQVAEConfig

import unisonde.models.emu3 as emu3
from unisonde.data.item import Item
from unisonde.models.emu3 import (
    KEYS,
    NEGATIVE,
    POSITIVE,
    SPECIAL_TOKENS,
    SYSTEM,
    WINDOWS,
    Emu3,
    code_word,
    full_size,
    likeliest,
    load,
)
from unisonde.models.parts.checkpoint import empty
from unisonde.models.parts.text import pad
from unisonde.train.emu3 import export, new_twin

CODES = 24
NAMED = {
    "image_token": "<image>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
}
LAYOUT = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Emu3ImageProcessor",
    "max_pixels": 64 * 64,
    "min_pixels": 24 * 24,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "spatial_factor": 8,
}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 41, 3), np.uint8))
OTHER = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 50, 3), np.uint8))


def tokenizer_files(folder: Path) -> dict[str, int]:
    """Bytes and special tokens, in the class and with the names of the published tokenizer; returns its vocabulary."""
    special = [*SPECIAL_TOKENS, *map(code_word, range(CODES))]
    vocabulary = {word: k for k, word in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    core.save(str(folder / "tokenizer.json"))
    marks = {"bos_token": "<|extra_203|>", "eos_token": "<|extra_204|>", "pad_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "padding_side": "left"}
    settings |= {"clean_up_tokenization_spaces": False, "extra_special_tokens": NAMED} | marks | NAMED
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary


def old_name(key: str) -> str:
    """What transformers 4.48 called a weight."""
    if key == "lm_head.weight":
        return "text_model.lm_head.weight"
    return key.replace("model.text_model.", "text_model.model.").removeprefix("model.")


def published(folder: Path, old: bool = True, shards: int = 1) -> Path:
    """A tiny Emu3 as published."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = tokenizer_files(folder)
    text = Emu3TextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=vocabulary["<|endoftext|>"],
        bos_token_id=vocabulary["<|extra_203|>"],
        eos_token_id=vocabulary["<|extra_204|>"],
    )
    vq = Emu3VQVAEConfig(codebook_size=CODES, base_channels=32, channel_multiplier=[1, 1, 1, 1], num_res_blocks=1, hidden_size=32)
    config = Emu3Config(text_config=text, vq_config=vq, vocabulary_map=vocabulary)
    torch.manual_seed(0)
    network = Emu3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in [*network.model.text_model.parameters(), network.lm_head.weight]:
            if weight.ndim > 1:  # at 0.02 two layers hardly change a state
                weight.normal_(0, 0.15)
    raw = json.loads(config.to_json_string(use_diff=False)) | {"architectures": ["Emu3ForConditionalGeneration"]}
    # As transformers 4.48 wrote it.
    raw["text_config"]["rope_scaling"] = {"rope_type": "default"}
    for late in ("rope_parameters", "tie_word_embeddings"):
        raw["text_config"].pop(late, None)
    raw.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float32", "transformers_version": "4.48.0.dev0"}))
    (folder / "preprocessor_config.json").write_text(json.dumps(LAYOUT))
    generation = {"do_sample": True, "top_k": 2048, "max_new_tokens": 50000}
    generation |= {"eos_token_id": text.eos_token_id, "pad_token_id": text.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    tensors = {old_name(key) if old else key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = {key: f"model-{1 + k % shards:05d}-of-{shards:05d}.safetensors" for k, key in enumerate(tensors)}
    for file in set(names.values()):
        save_file({k: t for k, t in tensors.items() if names[k] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("emu3") / "Emu3-tiny-hf")


@pytest.fixture(scope="module")
def model(folder: Path) -> Emu3:
    model = load(str(folder), "tiny")
    model.area = 32 * 32
    return model


@pytest.fixture(scope="module")
def stock(folder: Path) -> tuple[Any, Any]:
    """The network and the processor of `transformers`, by its own loading."""
    network, found = Emu3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values())
    return network.eval(), Emu3Processor.from_pretrained(folder)


# ----------------------------------------------------------------------------------------------------- as transformers has it


@pytest.mark.parametrize(("old", "shards"), [(True, 1), (True, 3), (False, 1)])
def test_weights_are_those_that_transformers_loads(tmp_path, stock, old, shards) -> None:
    loaded = load(str(published(tmp_path / "m", old, shards)), "tiny").network.state_dict()
    theirs = stock[0].state_dict()
    assert loaded.keys() == theirs.keys()
    assert all(torch.equal(loaded[key], theirs[key]) for key in theirs)


def test_what_is_published_is_taken(model, folder) -> None:
    assert model.source == folder and model.network.dtype == torch.float32 and model.window == 512
    assert (model.system, model.positive, model.negative) == (SYSTEM, POSITIVE, NEGATIVE)
    assert model.network.generation_config.top_k == 2048
    text, image = model.defaults("text").to_dict(), model.defaults("image").to_dict()
    assert text == {"tokens": 320, "temperature": 0.0, "guidance": None, "steps": None}
    assert image == {"tokens": None, "temperature": 1.0, "guidance": 3.0, "steps": None}
    assert load(str(folder), "tiny").side == 90
    rope = model.network.config.text_config.rope_parameters
    assert rope["rope_theta"] == 1e6 and rope["rope_type"] == "default"


@pytest.mark.parametrize("picture", [PICTURE, OTHER, None])
def test_token_ids_are_those_of_the_processor(model, stock, picture) -> None:
    network, processor = stock
    item = Item("a", "c", "What is this?", picture)
    prompt = f"You are a helpful assistant. USER: {'' if picture is None else '<image>'}What is this? ASSISTANT:"
    given = processor(images=None if picture is None else [picture], text=[prompt], return_tensors="pt")
    [ids] = given["input_ids"]
    if picture is not None:
        places = ids == network.model.vocabulary_mapping.image_token_id
        ids[places] = network.model.get_image_tokens(given["pixel_values"], given["image_sizes"]).to(ids.dtype)
    assert model.encode(item, "text", 10).ids == ids.tolist()


def test_the_prompt_of_a_drawing_is_that_of_the_processor(model, stock) -> None:
    wanted = {"return_for_image_generation": True, "image_area": 32 * 32, "return_tensors": "pt"}
    given = stock[1](text=["a cat" + POSITIVE], **wanted)
    assert model.encode(Item("a", "c", "a cat"), "image", 40).ids == given["input_ids"][0].tolist()
    assert list(given["image_sizes"][0]) == [model.side, model.side]
    assert model.unconditional() == stock[1](text=[NEGATIVE], **wanted)["input_ids"][0].tolist()


@torch.inference_mode()
def test_states_are_those_of_the_stock_forward(model, stock) -> None:
    network, processor = stock
    prompt = f"{SYSTEM} USER: <image>What is this? ASSISTANT:"
    given = processor(images=[PICTURE], text=[prompt], return_tensors="pt")
    theirs = network(**given, output_hidden_states=True).hidden_states[-1][0]
    ours = model.read([model.encode(Item("a", "c", "What is this?", PICTURE), "text", 10).ids])[0]
    assert (theirs - ours).abs().max() < 1e-5


def test_answers_are_those_of_generate(model, stock) -> None:
    network, processor = stock
    items = [Item("a", "c", "What is this?", PICTURE), Item("b", "c", "And that, what may it be?", OTHER)]
    ours = model.respond(items, "text", model.settings("text", tokens=12))
    for item, response in zip(items, ours, strict=True):
        given = processor(images=[item.image], text=[f"{SYSTEM} USER: <image>{item.prompt} ASSISTANT:"], return_tensors="pt")
        # What is published for both checkpoints would sample.
        out = network.generate(**given, do_sample=False, top_k=None, max_new_tokens=12)
        assert response.text == processor.tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def recipe(model: Emu3, stock: tuple[Any, Any], prompts: list[str], **settings: Any) -> Any:
    """The documented recipe of `transformers`: constrained generation with a negative prompt, which opens the picture too."""
    network, processor = stock
    wanted = {"return_for_image_generation": True, "image_area": model.area, "return_tensors": "pt", "padding": True}
    inputs = processor(text=[p + POSITIVE for p in prompts], **wanted)
    negative = processor(text=[NEGATIVE] * len(prompts), **wanted)
    height, width = inputs.pop("image_sizes")[0]
    tokens = {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in NAMED.items()}
    end_row, end = processor.tokenizer.convert_tokens_to_ids(["<|extra_200|>", "<|extra_204|>"])

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        offset = int(len(ids) - (ids == tokens["image_wrapper_token"]).nonzero()[0, 0])
        tail = {height * (width + 1) + 1: tokens["eof_token"], height * (width + 1) + 2: tokens["eoi_token"]}
        if offset % (width + 1) == 0:
            return [end_row]
        if offset > height * (width + 1):
            return [tail.get(offset, end)]
        return network.vocabulary_mapping.image_tokens

    return network.generate(
        **inputs,
        max_new_tokens=height * (width + 1) + 3,
        prefix_allowed_tokens_fn=allowed,
        negative_prompt_ids=negative["input_ids"],
        negative_prompt_attention_mask=negative["attention_mask"],
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )


DRAWN = ["a cat", "a red circle above a blue square, on grass"]


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_greedy_drawings_are_those_of_generate(model, stock, guidance) -> None:
    """Codes, marks and pictures, of one prompt and of two of different lengths together."""
    for prompts in (DRAWN[1:], DRAWN):
        out = recipe(model, stock, prompts, do_sample=False, top_k=None, guidance_scale=guidance)
        drawn = out.sequences[:, -model.side * (model.side + 1) - 3 :]
        ids = [model.encode(Item("a", "c", prompt), "image", 40).ids for prompt in prompts]
        codes = model.draw_codes(ids, model.settings("image", temperature=0.0, guidance=guidance), [0] * len(ids))
        assert [model.sequence_of(grid) for grid in codes] == drawn.tolist()
        network, processor = stock
        theirs = network.decode_image_tokens(image_tokens=drawn, height=model.side, width=model.side)
        pictures = processor.postprocess(list(theirs), return_tensors="PIL.Image.Image")["pixel_values"]
        assert [p.tobytes() for p in model.decode(codes)] == [p.tobytes() for p in pictures]


def test_chances_are_those_of_generate(model, stock) -> None:
    """Sampled by `transformers`, of the likeliest seven; ours gives every code the same chance at every step."""
    torch.manual_seed(3)
    out = recipe(model, stock, DRAWN, do_sample=True, top_k=7, guidance_scale=3.0)
    drawn = out.sequences[:, -model.side * (model.side + 1) - 3 :]
    number = {int(word): code for code, word in enumerate(model.code_ids)}
    where = [k for k in range(drawn.shape[1]) if int(drawn[0, k]) in number]
    codes = torch.tensor([[number[int(row[k])] for k in where] for row in drawn])
    apart = []

    def choose(step: int, logits: torch.Tensor) -> torch.Tensor:
        theirs = out.scores[where[step]].softmax(-1)
        assert torch.isclose(theirs[:, model.code_ids].sum(-1), torch.ones(2)).all()
        apart.append((likeliest(logits, 7).softmax(-1) - theirs[:, model.code_ids]).abs().max())
        return codes[:, step]

    ids = [model.encode(Item("a", "c", prompt), "image", 40).ids for prompt in DRAWN]
    grid = model.code_by_code(ids, 3.0, choose)
    assert torch.equal(grid.flatten(1), codes) and len(apart) == model.codes
    assert max(apart) < 1e-5
    wrong = model.code_by_code(ids, 2.0, choose)
    assert torch.equal(wrong, grid) and max(apart[model.codes :]) > 1e-3  # it can fail: with another guidance the chances differ


def test_the_likeliest_are_those_of_transformers() -> None:
    logits = torch.randn(5, 50)
    logits[0, 3] = logits[0].sort().values[-7]  # two equal ones at the limit stay
    assert torch.equal(likeliest(logits, 7), TopKLogitsWarper(7)(None, logits))
    assert torch.equal(likeliest(logits, 50), logits) and torch.equal(likeliest(logits, 2048), logits)


@torch.inference_mode()
def test_codes_of_a_picture_do_not_depend_on_its_neighbour(model, stock) -> None:
    """The batch of `transformers` pads a smaller picture, and its encoder sees the padding; ours takes each by itself."""
    network, processor = stock
    alone = processor.image_processor([PICTURE], return_tensors="pt")
    together = processor.image_processor([PICTURE, OTHER], return_tensors="pt")
    [first] = network.model.vqmodel.encode(**alone).image_tokens
    beside = network.model.vqmodel.encode(**together).image_tokens[0]
    assert torch.equal(model.codes_of(PICTURE), first)
    assert first.shape == beside.shape and not torch.equal(first, beside)


def test_guidance_of_transformers_is_off_unless_it_is_asked_for(model, stock) -> None:
    """The documented example names a negative prompt and no weight; nothing published names one."""
    left_out = recipe(model, stock, DRAWN, do_sample=False, top_k=None)
    off = recipe(model, stock, DRAWN, do_sample=False, top_k=None, guidance_scale=1.0)
    assert torch.equal(left_out.sequences, off.sequences)


# ------------------------------------------------------------------------------------------------------------------- full size


@pytest.mark.parametrize("checkpoint", WINDOWS)
def test_full_size(checkpoint) -> None:
    network = empty(lambda: Emu3ForConditionalGeneration(full_size(WINDOWS[checkpoint])))
    assert {p.device.type for p in network.parameters()} == {"meta"}
    count = sum(p.numel() for p in network.parameters())
    assert count == 8_762_751_807 and sum(p.numel() for p in network.model.vqmodel.parameters()) == 270_740_287
    # The eight published shards, in gigabytes of float32.
    assert count * 4 / 1e9 == pytest.approx(4.94 + 4.83 + 5 + 5 + 4.83 + 5 + 2.43 + 3.02, abs=0.02)
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert KEYS.shapes({old_name(key): shape for key, shape in shapes.items()}) == shapes
    assert shapes["model.text_model.embed_tokens.weight"] == shapes["lm_head.weight"] == (184622, 4096)
    mapping = network.vocabulary_mapping
    assert (mapping.img2bpe[0], mapping.img2bpe[32767], mapping.eol_token_id) == (151854, 184621, 151846)


# -------------------------------------------------------------------------------------------------------------- number formats


def test_half_precision_keeps_the_image_tokenizer_whole(folder) -> None:
    model = load(str(folder), "tiny", dtype=torch.bfloat16)
    model.area = 16 * 16
    assert model.network.dtype == torch.bfloat16 and model.network.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.network.model.vqmodel.parameters()} == {torch.float32}
    assert torch.equal(model.codes_of(PICTURE), load(str(folder), "tiny").codes_of(PICTURE))
    assert isinstance(model.generate("what?", image=PICTURE, tokens=4), str)
    assert model.generate("a cat", "image").size == (16, 16)


# --------------------------------------------------------------------------------------------------------------------- refusals


def change(folder: Path, edit, file: str = "model.safetensors") -> None:
    save_file(edit(load_file(folder / file)), folder / file, metadata={"format": "pt"})


HEAD = "text_model.lm_head.weight"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: {k: v for k, v in t.items() if k != HEAD}, "lacks lm_head.weight"),
        (lambda t: t | {"text_model.surplus": torch.zeros(1)}, "has unknown text_model.surplus"),
        (lambda t: t | {HEAD: torch.zeros(3, 32)}, rf"has in another shape {HEAD} \(3, 32\) instead of"),
        (lambda t: {"model.layers.0.weight": torch.zeros(1)}, "lacks lm_head.weight"),
    ],
)
def test_weights_that_are_not_this_models(tmp_path, edit, said) -> None:
    here = published(tmp_path / "m")
    change(here, edit)
    with pytest.raises(ValueError, match=f"the checkpoint of tiny {said}"):
        load(str(here), "tiny")


def test_shards_that_are_missing_or_cut_short(tmp_path) -> None:
    here = published(tmp_path / "m", shards=3)
    second = here / "model-00002-of-00003.safetensors"
    second.write_bytes(second.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors is no whole safetensors file"):
        load(str(here), "tiny")
    second.unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00003.safetensors, which model.safetensors.index.json names"):
        load(str(here), "tiny")


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_file_that_is_missing_is_named(tmp_path, file) -> None:
    here = published(tmp_path / "m")
    (here / file).unlink()
    with pytest.raises(ValueError, match=f"{file} of .* is not in that folder"):
        load(str(here), "tiny")


@pytest.mark.parametrize("kind", ["Emu3", "janus", "llama", None])
def test_a_checkpoint_of_another_family_or_format(tmp_path, kind) -> None:
    here = published(tmp_path / "m")
    raw = json.loads((here / "config.json").read_text())
    (here / "config.json").write_text(json.dumps(raw | {"model_type": kind}))
    with pytest.raises(ValueError, match=f"has model type {kind!r}, not 'emu3'; of Emu3, the repositories whose name ends in -hf"):
        load(str(here), "tiny")


def test_a_tokenizer_of_another_model(tmp_path) -> None:
    from tiny import byte_tokenizer

    here = published(tmp_path / "m")
    byte_tokenizer().save_pretrained(here)
    with pytest.raises(ValueError, match=r"the tokenizer of tiny lacks .*<\|image start\|>.*: it is not Emu3's"):
        load(str(here), "tiny")


@pytest.mark.parametrize(("word", "moved"), [(code_word(3), 0), ("<|extra_200|>", 0), (code_word(CODES - 1), None)])
def test_codes_that_tokenizer_and_configuration_name_differently(tmp_path, word, moved) -> None:
    here = published(tmp_path / "m")
    raw = json.loads((here / "config.json").read_text())
    raw["vocabulary_map"] = {
        k: moved if k == word else v for k, v in raw["vocabulary_map"].items() if k != word or moved is not None
    }
    (here / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"tokenizer of tiny and the vocabulary_map of its config.json give image codes other"):
        load(str(here), "tiny")


# ------------------------------------------------------------------------------------------------------------------------- twin


def test_a_twin_comes_back_from_its_folder(tmp_path, monkeypatch) -> None:
    def no_hub(*args, **kwargs):
        raise AssertionError("all that a twin needs is in its folder")

    monkeypatch.setattr("unisonde.models.parts.pretrained.cached_file", no_hub)
    model = new_twin(0)
    export(model, tmp_path / "twin", {"seed": 0})
    again = load(str(tmp_path / "twin"), "twin/emu3")
    for key in ("system", "positive", "negative", "area", "side", "window"):
        assert getattr(again, key) == getattr(model, key)
    assert again.defaults("image") == model.defaults("image") and again.defaults("text") == model.defaults("text")
    for ours, theirs in zip(model.network.state_dict().values(), again.network.state_dict().values(), strict=True):
        assert torch.equal(ours.half().to(ours), theirs)
    item = Item("a", "c", "a red ring at the top left", Image.new("RGB", (32, 32), "red"))
    assert again.encode(item, "text", 10).ids[-8:] == model.encode(item, "text", 10).ids[-8:]
    assert again.generate(item.prompt, "image").size == (32, 32)
    with pytest.raises(ValueError, match="already holds files"):
        export(model, tmp_path / "twin")


def test_a_part_of_the_settings_may_be_set(tmp_path) -> None:
    here = published(tmp_path / "m")
    (here / "unisonde.json").write_text(
        json.dumps({"area": 64 * 64, "positive": "", "generation": {"image": {"temperature": 0.5, "guidance": 2.0}}})
    )
    model = load(str(here), "tiny")
    assert (model.side, model.positive, model.negative, model.system) == (8, "", NEGATIVE, SYSTEM)
    assert model.defaults("image").guidance == 2.0 and model.defaults("text").tokens == 320


def test_padding_of_the_negative_prompt(model) -> None:
    """Rows of guidance are as long as the longest; shorter ones are padded on the left, and masked."""
    ids, mask = pad([[1, 2], model.unconditional()], model.pad_id, "left")
    assert ids.shape == mask.shape and mask[0].sum() == 2 and ids[0, 0] == model.pad_id
    assert emu3.TOP_K == 2048
