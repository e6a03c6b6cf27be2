"""JanusFlow: templates, spans, the sampler, the states that a trace shows, and loading, on untrained networks."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer
from tokenizers.processors import TemplateProcessing

import unisonde
from unisonde.data.item import Item
from unisonde.data.tabletop import question_item, text_item
from unisonde.models import janusflow
from unisonde.models.base import Generation, item_seed
from unisonde.models.janusflow import BEGIN_IMAGE, BOS, END_IMAGE, IMAGE, SPECIAL_TOKENS, SYSTEM, JanusFlow
from unisonde.models.parts.flow_llama import Flow, JanusFlowConfig, branches
from unisonde.models.parts.sampling import normals
from unisonde.models.parts.siglip import Pictures
from unisonde.models.trace import LayerStates, Reading, Trace, hooked
from unisonde.train.janusflow import export, new_twin, official_tensors, velocity_of

DRAW = Generation(guidance=3.0, steps=4)
WRITE = Generation(tokens=10, temperature=0.0)
PROMPTS = [text_item("composition", "test", 3, k, count) for k, count in enumerate((1, 3, 2))]
QUESTIONS = [question_item(category, "test", 3, k) for k, category in enumerate(("attribute", "logic", "coarse"))]


@pytest.fixture(scope="module")
def model() -> JanusFlow:
    return new_twin(0)


def observed(model: JanusFlow, items: list[Item], task: str, settings: Generation, step: str = "all") -> tuple[dict, list]:
    """States by (step, item, layer), and the responses."""
    states: dict[tuple[str, int, int], LayerStates] = {}

    def keep(seen: LayerStates) -> None:
        assert (seen.step, seen.item, seen.layer) not in states
        states[seen.step, seen.item, seen.layer] = LayerStates(**{**vars(seen), "states": seen.states.clone()})

    return states, model.respond(items, task, settings, 5, Trace(keep, Reading(step=step)))  # type: ignore[arg-type]


def ids_of(model: JanusFlow, text: str) -> list[int]:
    return model.tokenizer(text)["input_ids"]


# ---------------------------------------------------------------------------------------------------------------------- prompts


def test_templates_are_the_published_ones(model) -> None:
    system = JanusFlow(model.network, model.autoencoder, model.tokenizer, model.pictures, "x")  # the published system prompt
    item, question = Item("a", "c", "a red ring"), Item("b", "c", "which colour?", Image.new("RGB", (32, 32)))
    written = {task: "".join(s.text for s in system.segments(item, task)) for task in ("text", "image")}
    assert written["image"] == "User: a red ring\n\nAssistant:"
    assert written["text"] == f"{SYSTEM}\n\nUser: a red ring\n\nAssistant:"
    features = IMAGE * 64
    assert (
        "".join(s.text for s in system.segments(question, "text"))
        == f"{SYSTEM}\n\nUser: {BEGIN_IMAGE}{features}{END_IMAGE}\nwhich colour?\n\nAssistant:"
    )
    assert model.encode(item, "image", 0).ids == ids_of(model, "User: a red ring\n\nAssistant:")
    assert system.defaults("image") == Generation(guidance=2.0, steps=30)
    assert system.defaults("text") == Generation(tokens=512, temperature=0.0)


def test_spans_of_drawing(model) -> None:
    encoded = model.encode(PROMPTS[0], "image", 65)
    words = model.tokenizer.convert_ids_to_tokens(encoded.ids)
    [held] = [span for span in encoded.spans if span.kind == "content"]
    assert words[held.start : held.stop] == model.tokenizer.tokenize(PROMPTS[0].prompt) and held.modality == "text"
    assert words[:3] == [BOS, "User", ":"] and words[-3:] == ["\n\n", "Assistant", ":"]
    states, [response] = observed(model, PROMPTS[:1], "image", DRAW)
    reading = Reading()
    prompt, pass_ = states["single", 0, 0], states["final", 0, 0]
    assert len(prompt.select("prompt", reading)) == len(held) and prompt.modalities("response") == ()
    assert len(pass_.select("response", reading)) == 64 == response.tokens and pass_.modalities("prompt") == ()
    assert len(pass_.select("response", Reading(spans="all"))) == 65  # the time token is template
    assert pass_.modalities("response") == ("image",)


def test_spans_of_a_question(model) -> None:
    encoded = model.encode(QUESTIONS[0], "text", 10)
    words = model.tokenizer.convert_ids_to_tokens(encoded.ids)
    image, text = (s for s in encoded.spans if s.kind == "content")
    assert (image.modality, len(image)) == ("image", 64)
    assert words[image.start - 1] == BEGIN_IMAGE and words[image.stop] == END_IMAGE
    assert set(words[image.start : image.stop]) == {IMAGE}
    assert words[text.start : text.stop] == model.tokenizer.tokenize(QUESTIONS[0].prompt)


def test_features_go_where_the_spans_say(model, monkeypatch) -> None:
    """The begin slot holds its learned embedding; a placeholder that the model writes itself holds a word's."""
    from unisonde.models.parts.text import Written

    image_id = model.tokenizer.convert_tokens_to_ids(IMAGE)
    written = Written([image_id] * 3 + [model.eos_id], 3, "", False)
    monkeypatch.setattr(janusflow, "write_text", lambda *args, **kwargs: [written])
    states, _ = observed(model, QUESTIONS[:1], "text", WRITE)
    seen, reading = states["single", 0, 0], Reading()
    embedded = model.network.language_model.get_input_embeddings().weight[image_id]
    assert torch.equal(seen.select("response", reading), embedded.expand(3, -1))
    pixels = model.pictures(QUESTIONS[0].picture())[None]
    features = model.network.see(pixels)[0]
    start = next(s.start for s in seen.spans if s.modality == "image" and s.kind == "content")
    assert torch.allclose(seen.states[start - 1 : start + 64], features, atol=1e-6)
    assert torch.equal(features[0], model.network.beg_of_und_embed[0])


@pytest.mark.parametrize(
    ("item", "task", "said"),
    [
        (Item("a", "c", "  "), "image", "item 'a' has an empty prompt"),
        (Item("a", "c", "a large green dragon"), "image", "does not know the words dragon of item 'a'"),
        (Item("a", "c", "a red ring", Image.new("RGB", (4, 4))), "image", "draws from text prompts alone"),
        (Item("a", "c", "a red ring " * 200), "text", "takes 60. positions .* room for 502"),
        (Item("a", "c", "a red ring " * 200), "image", "takes 60. positions .* room for 447"),
    ],
)
def test_prompts_that_cannot_be_taken(model, item, task, said) -> None:
    with pytest.raises(ValueError, match=said):
        model.respond([item], task, WRITE if task == "text" else DRAW)


@pytest.mark.parametrize(("task", "settings", "room"), [("text", WRITE, 10), ("image", DRAW, 65)])
def test_a_long_prompt_is_cut_and_flagged_on_request(model, task, settings, room) -> None:
    item = Item("a", "c", "a red ring " * 200)
    [response] = model.respond([item], task, settings, truncate=True)
    assert "cut" in response.flags
    encoded = model.encode(item, task, room, truncate=True)
    assert len(encoded.ids) == model.window - room
    assert model.tokenizer.convert_ids_to_tokens(encoded.ids)[-3:] == ["\n\n", "Assistant", ":"]


def test_pictures_are_prepared_as_published() -> None:
    wide = Image.new("RGB", (100, 37), (255, 0, 0))
    pixels = Pictures(32, min_size=1)(wide)
    height = int(37 / 100 * 32)  # cut off, not rounded: 11
    top = (32 - height) // 2
    assert pixels.shape == (3, 32, 32)
    assert torch.equal(pixels[:, top : top + height], torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, height, 32))
    grey = 127 / 255 * 2 - 1
    assert torch.allclose(pixels[:, :top], torch.tensor(grey)) and torch.allclose(pixels[:, top + height :], torch.tensor(grey))
    tall = Pictures(32, min_size=14)(wide.rotate(90, expand=True))
    assert tall[0].eq(1).any(0).sum() == 14  # the least that a side may have
    raw = Pictures(384).to_dict()
    assert Pictures.from_dict(raw, 1) == Pictures(384) and Pictures.from_dict({}, 384) == Pictures(384)


# ----------------------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("item", [QUESTIONS[0], PROMPTS[0]])
def test_teacher_forcing_gives_the_states_of_generation(model, item) -> None:
    states, [response] = observed(model, [item], "text", WRITE)
    steps = defaultdict(list)
    with hooked(model.stacks[0], lambda layer, output: steps[layer].append(output[0])):
        [again] = model.respond([item], "text", WRITE, 5)
    assert again.text == response.text
    for layer in range(model.stacks[0].depth + 2):
        generated, forced = torch.cat(steps[layer]), states["single", 0, layer].states
        assert len(forced) - len(generated) in (0, 1)  # the last token's state is never computed by sampling
        assert (forced[: len(generated)] - generated).abs().max() < 1e-5


def test_recorded_steps_are_those_of_sampling(model) -> None:
    """Every pass of the sampler, seen by plain hooks without a trace; the clean pass by hand."""
    items, stack = PROMPTS[:2], model.stacks[0]
    states, traced = observed(model, items, "image", DRAW)
    assert [step for step in dict.fromkeys(key[0] for key in states)] == ["single", "0000", "0001", "0002", "final", "clean"]
    assert {item for _, item, _ in states} == {0, 1}  # the unconditional rows are nobody's
    passes = defaultdict(list)
    with hooked(stack, lambda layer, output: passes[layer].append(output.clone())):
        plain = model.respond(items, "image", DRAW, 5)
    assert [r.image.tobytes() for r in plain] == [r.image.tobytes() for r in traced]
    assert len(passes[0]) == 1 + DRAW.steps
    for number, step in enumerate(["single", "0000", "0001", "0002", "final"]):
        for layer in range(stack.depth + 2):
            for item in range(2):
                seen = states[step, item, layer].states
                assert (seen - passes[layer][number][item, : len(seen)]).abs().max() < 1e-5
    # It can fail: another step has other states.
    assert (states["0002", 0, 2].states - passes[2][4][0]).abs().max() > 1e-3

    prompts = [model.encode(item, "image", 65) for item in items]
    start = normals([item_seed(5, item) for item in items], model.latent)
    finished = model.draw(prompts, DRAW, start)
    flow = Flow(model.network, [p.ids for p in prompts], model.pad_id, 1.0)
    layers = {}
    with torch.inference_mode():
        flow.read()
        with hooked(stack, lambda layer, output: layers.__setitem__(layer, output.clone())):
            flow.velocity(finished, 1.0)
    for layer in range(stack.depth + 2):
        assert (states["clean", 1, layer].states - layers[layer][1]).abs().max() < 1e-5


@pytest.mark.parametrize(("step", "recorded"), [("final", {"single", "final"}), ("clean", {"single", "clean"})])
def test_only_what_the_reading_takes_is_recorded(model, step, recorded) -> None:
    calls = []
    handle = model.network.llm.norm.register_forward_hook(lambda *_: calls.append(1))
    states, _ = observed(model, PROMPTS[:1], "image", DRAW, step)
    handle.remove()
    assert {key[0] for key in states} == recorded
    assert len(calls) == 1 + DRAW.steps + (step == "clean")


@torch.inference_mode()
def test_each_steps_input_run_again_without_a_cache(model, monkeypatch) -> None:
    """Prompt and picture in one pass, as the published loop does it: prompt states are the same at every time, and those of the cache."""
    items, velocity = PROMPTS[:2], Flow.velocity
    entered: list[tuple[float, torch.Tensor]] = []

    def recorded(self: Flow, z: torch.Tensor, time: float) -> torch.Tensor:
        entered.append((time, z.clone()))
        return velocity(self, z, time)

    monkeypatch.setattr(Flow, "velocity", recorded)
    states, _ = observed(model, items, "image", DRAW)
    prompts = [model.encode(item, "image", 65) for item in items]
    longest = max(len(p.ids) for p in prompts)
    assert [time for time, _ in entered] == [0, 0.25, 0.5, 0.75, 1]
    assert torch.equal(entered[0][1], normals([item_seed(5, item) for item in items], model.latent))
    alone = branches([p.ids for p in prompts], model.pad_id, guide=False)
    for (time, z), name in zip(entered, ("0000", "0001", "0002", "final", "clean"), strict=True):
        layers = {}
        with hooked(model.stacks[0], lambda layer, output, held=layers: held.__setitem__(layer, output.clone())):
            velocity_of(model.network, alone, z, torch.full((2,), time))
        for layer in range(model.stacks[0].depth + 2):
            for item, prompt in enumerate(prompts):
                seen = states["single", item, layer].states
                assert (layers[layer][item, : len(prompt.ids)] - seen).abs().max() < 1e-5
                assert (layers[layer][item, longest:] - states[name, item, layer].states).abs().max() < 1e-5


def test_states_of_an_image_prompt_depend_on_the_picture(model) -> None:
    other = Item("x", "attribute", QUESTIONS[0].prompt, Image.new("RGB", (32, 32), "green"))
    first, second = (observed(model, [item], "text", WRITE)[0]["single", 0, 0] for item in (QUESTIONS[0], other))
    reading = Reading()
    assert (first.select("prompt", reading, "image") - second.select("prompt", reading, "image")).abs().max() > 1e-3
    assert torch.equal(first.select("prompt", reading, "text"), second.select("prompt", reading, "text"))


@pytest.mark.parametrize(
    ("task", "items", "settings"),
    [
        ("image", PROMPTS, DRAW),
        ("text", [*QUESTIONS, PROMPTS[0]], WRITE),
        ("text", QUESTIONS, Generation(tokens=10, temperature=1.0)),
    ],
)
def test_batch_of_one_equals_batch_of_many(model, task, items, settings) -> None:
    together, responses = observed(model, items, task, settings)
    for k, item in enumerate(items):
        alone, [response] = observed(model, [item], task, settings)
        assert response.text == responses[k].text
        if response.image is not None:  # a pixel may round to the neighbouring level
            assert abs(np.asarray(response.image, int) - np.asarray(responses[k].image, int)).max() <= 1
        for step, _, layer in alone:
            one, many = alone[step, 0, layer], together[step, k, layer]
            assert one.spans == many.spans
            # Four steps with guidance 3 carry rounding on.
            assert (one.states - many.states).abs().max() < (1e-5 if step in ("single", "0000") else 1e-4)


# ---------------------------------------------------------------------------------------------------------------------- sampler


@torch.inference_mode()
def test_latents_equal_the_published_loop(model) -> None:
    """Written the long way: two rows, whole sequences with a mask, no cache, the velocity as w c - (w - 1) u."""
    item, network = PROMPTS[1], model.network
    ids = model.encode(item, "image", 65).ids
    z0 = normals([7, 8], model.latent)
    ours = model.draw([model.encode(PROMPTS[0], "image", 65), model.encode(item, "image", 65)], DRAW, z0)[1:]
    rows = torch.tensor([ids, [ids[0]] + [model.pad_id] * (len(ids) - 1)])
    mask = torch.ones(2, len(ids) + 65, dtype=torch.int)
    mask[1, 1 : len(ids)] = 0
    z = z0[1:]
    for step in range(4):
        tokens, patches, embedded = network.enter(torch.cat([z, z]), torch.full((2,), step / 4))
        states = network.llm(inputs_embeds=torch.cat([network.embed(rows), tokens], 1), attention_mask=mask).last_hidden_state
        conditional, unconditional = network.leave(states[:, -64:], patches, embedded).chunk(2)
        z = z + 0.25 * (3.0 * conditional - 2.0 * unconditional)
    assert (z - ours).abs().max() < 1e-4 * z.abs().max()
    assert (z - z0[1:]).abs().max() > 0.1


def test_guidance_of_one_is_the_conditional_branch(model) -> None:
    prompts, z0 = [model.encode(PROMPTS[0], "image", 65)], normals([3], model.latent)
    plain, almost = (model.draw(prompts, Generation(guidance=w, steps=3), z0) for w in (1.0, 1.0 + 1e-7))
    assert torch.allclose(plain, almost, atol=1e-4)


def test_seeds_are_the_items(model) -> None:
    images = [model.respond([PROMPTS[0]], "image", DRAW, seed)[0].image.tobytes() for seed in (0, 0, 1)]
    assert images[0] == images[1] != images[2]
    assert torch.equal(normals([4, 9], (2, 2, 2))[1:], normals([9], (2, 2, 2)))


# ---------------------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def hub(model, tmp_path_factory) -> Path:
    """A folder in the hub's layout: a byte-level tokenizer that calls itself Llama's, official keys, an autoencoder in `vae`."""
    folder = tmp_path_factory.mktemp("hub") / "JanusFlow"
    export(model, folder, {})
    (folder / "unisonde.json").unlink()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    tokenizer = byte_tokenizer(SPECIAL_TOKENS)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    tokenizer.save_pretrained(folder)
    declared = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(declared))
    raw = json.loads((folder / "config.json").read_text())
    raw["language_config"] |= {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(raw))
    weights = load_file(folder / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = torch.randn(len(tokenizer), 160, generator=torch.Generator().manual_seed(1))
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_folder_in_the_hubs_layout_loads(hub) -> None:
    loaded = unisonde.load(hub)
    assert isinstance(loaded, JanusFlow) and loaded.system == SYSTEM
    assert loaded.defaults("image") == Generation(guidance=2.0, steps=30)
    official = load_file(hub / "model.safetensors")
    ours = official_tensors(loaded.network)
    assert set(ours) == set(official) and all(torch.equal(ours[k], official[k].float()) for k in official)
    assert any("vision_tower.blocks.1.attn.qkv" in key for key in official)
    assert loaded.network.dtype == loaded.autoencoder.dtype == torch.float32 and loaded.device.type == "cpu"
    ids = loaded.encode(Item("a", "c", "ein Würfel"), "image", 65).ids
    assert ids[0] == loaded.tokenizer.convert_tokens_to_ids(BOS)
    assert bytes(loaded.tokenizer.decode(ids[1:]), "utf8") == "User: ein Würfel\n\nAssistant:".encode()
    assert loaded.generate("ein Würfel", "image", steps=2).size == (32, 32)
    assert isinstance(loaded.generate("what?", image=Image.new("RGB", (40, 20)), tokens=3), str)
    before = loaded.identity()
    assert set(before) >= {"weights", "parameters"} and len(before["apart"]) == 1
    with torch.no_grad():
        loaded.autoencoder.decoder.conv_out.bias[0] += 1e-3
    assert loaded.identity()["apart"] != before["apart"]


def test_a_folder_with_files_is_not_written_over(model, hub) -> None:
    with pytest.raises(ValueError, match="already holds files"):
        export(model, hub, {})


def test_weights_may_be_bfloat16_or_in_a_pickle_of_plain_tensors(hub, tmp_path) -> None:
    folder = shutil.copytree(hub, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    loaded = unisonde.load(folder, dtype=torch.bfloat16)
    assert loaded.network.dtype == loaded.autoencoder.dtype == torch.bfloat16
    assert loaded.generate("a cube", "image", steps=2).size == (32, 32)
    assert isinstance(loaded.generate("a cube", tokens=2), str)


class Code:
    def __reduce__(self) -> tuple:
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("model", lambda w: w.pop("vision_gen_dec_aligner_norm.weight"), "lacks vision_gen_dec_aligner_norm.weight"),
        ("model", lambda w: w.update(extra=torch.zeros(1)), "has unknown extra"),
        ("model", lambda w: w.update(beg_of_und_embed=torch.zeros(1, 161)), r"beg_of_und_embed \(1, 161\) instead of \(1, 160\)"),
        ("vae/diffusion_pytorch_model", lambda w: w.pop("decoder.conv_in.bias"), "autoencoder .* lacks decoder.conv_in.bias"),
    ],
)
def test_keys_and_shapes_are_strict(hub, tmp_path, file, change, said) -> None:
    folder = shutil.copytree(hub, tmp_path / "copy")
    weights = load_file(folder / f"{file}.safetensors")
    change(weights)
    save_file(weights, folder / f"{file}.safetensors")
    with pytest.raises(ValueError, match=said):
        unisonde.load(folder)


def test_a_pickle_with_code_is_refused(hub, tmp_path, capsys) -> None:
    folder = shutil.copytree(hub, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"beg_of_und_embed": Code()}, protocol=2))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        unisonde.load(folder)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("vae", r"published apart, as stabilityai/sdxl-vae.* into a folder vae"),
        ("model.safetensors", "no weights: none of model.safetensors, pytorch_model.safetensors is there"),
        ("tokenizer.json", "tokenizer.json"),
        ("preprocessor_config.json", "preprocessor_config.json"),
    ],
)
def test_a_missing_file_is_named(hub, tmp_path, gone, said) -> None:
    folder = shutil.copytree(hub, tmp_path / "copy")
    shutil.rmtree(folder / gone) if (folder / gone).is_dir() else (folder / gone).unlink()
    with pytest.raises(ValueError, match=said):
        unisonde.load(folder)


def test_an_autoencoder_with_attention_loads_under_old_and_new_names(hub, tmp_path) -> None:
    """As the published one has it, which halves the grid as well."""
    folder = shutil.copytree(hub, tmp_path / "copy")
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=4,
    )
    autoencoder.save_config(folder / "vae")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = autoencoder.state_dict()
    renamed = {}
    for name, tensor in weights.items():
        key = name
        for ours, theirs in old.items():
            key = key.replace(ours, theirs)
        renamed[key] = tensor
    assert sum("proj_attn" in key for key in renamed) == 4
    for held in (weights, renamed):
        save_file(held, folder / "vae" / "diffusion_pytorch_model.safetensors")
        loaded = unisonde.load(folder)
        assert all(torch.equal(tensor, weights[key]) for key, tensor in loaded.autoencoder.state_dict().items())
    assert loaded.latent == (4, 16, 16) and loaded.patches == 16
    assert loaded.generate("a cube", "image", steps=1).size == (32, 32)


def test_a_tokenizer_without_the_special_tokens_is_refused(model) -> None:
    with pytest.raises(ValueError, match=r"lacks .*begin▁of▁sentence.*: it is not JanusFlow's"):
        JanusFlow(model.network, model.autoencoder, byte_tokenizer(), model.pictures, "x")


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("vision_gen_enc_config", "padding", 3, "has padding 3, where 0"),
        ("vision_gen_dec_config", "upsamples", 7, "has upsamples 7, where"),
        ("vision_und_enc_config", "model_name", None, None),
    ],
)
def test_a_configuration_of_something_else_is_refused(model, part, name, value, said) -> None:
    raw = model.network.config.to_dict()
    assert JanusFlowConfig.from_dict(raw).to_dict() == raw
    raw[part]["params"][name] = value
    if said is None:
        del raw[part]
        said = "lacks 'vision_und_enc_config'"
    with pytest.raises(ValueError, match=said):
        JanusFlowConfig.from_dict(raw)
