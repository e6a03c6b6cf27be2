"""Show-o2: templates, masks, sampler, spans, and the states that a trace shows, on a twin of random weights."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import byte_tokenizer

from unisonde.data.item import Item
from unisonde.data.tabletop import question_item, text_item
from unisonde.models.base import Generation, item_seed
from unisonde.models.parts import wan_vae
from unisonde.models.parts.pictures import centre_square
from unisonde.models.parts.sampling import normals
from unisonde.models.parts.showo2_network import SIZES, Showo2Config, Showo2Network, additive, flow_times, keys_of, twin, visible
from unisonde.models.showo2 import (
    BEGIN_IMAGE,
    BOS,
    END_IMAGE,
    EOS,
    IMAGE,
    PAD,
    SPECIAL_TOKENS,
    SYSTEM,
    Encoded,
    Showo2,
    drawing,
    image_places,
    read_block,
)
from unisonde.models.trace import LayerStates, Reading, Trace, hooked
from unisonde.train.showo2 import initialise, new_twin, new_vae

DRAW = Generation(guidance=3.0, steps=5)
WRITE = Generation(tokens=10, temperature=0.0)
PROMPTS = [text_item("composition", "test", 3, k, count) for k, count in enumerate((1, 3, 2))]
QUESTIONS = [question_item(category, "test", 3, k) for k, category in enumerate(("attribute", "logic", "coarse"))]
STEPS = ["0000", "0001", "0002", "final"]


def alive(model: Showo2) -> Showo2:
    """Random weights throughout: the velocity of a new twin is zero, and its time changes nothing."""
    initialise(model.network, 0)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            if "adaLN_modulation" in name or "diffusion_head_b.linear" in name:
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=torch.Generator().manual_seed(len(name)))
        for weight in model.vae.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return model


@pytest.fixture(scope="module")
def model() -> Showo2:
    return alive(new_twin(0))


@pytest.fixture(scope="module")
def published() -> Showo2:
    """With a tokenizer that joins a question mark and a line break, as Qwen's does, and the published system prompt."""
    tokenizer = byte_tokenizer(SPECIAL_TOKENS)
    tokenizer.add_tokens(["?\n"])
    # Squares of 2 x 2 latents, as published; draws larger than it reads, as the HQ model does.
    config = replace(twin(len(tokenizer)), patch=2, grid=6, semantic_grid=4, window=128)
    torch.manual_seed(0)
    return alive(Showo2(Showo2Network(config), new_vae(0), tokenizer, "tiny"))


def observed(model: Showo2, items: list[Item], task: str, settings: Generation, step: str = "all") -> tuple[dict, list]:
    """States by (step, layer, item), and the responses."""
    states: dict[tuple[str, int, int], LayerStates] = {}

    def keep(seen: LayerStates) -> None:
        assert (seen.step, seen.layer, seen.item) not in states
        states[seen.step, seen.layer, seen.item] = LayerStates(**{**vars(seen), "states": seen.states.clone()})

    trace = Trace(keep, Reading(step=step))  # type: ignore[arg-type]
    return states, model.respond(items, task, settings, 5, trace)  # type: ignore[arg-type]


def same(one, two) -> bool:
    return (one.text, one.image and one.image.tobytes()) == (two.text, two.image and two.image.tobytes())


# --------------------------------------------------------------------------------------------------------------------- templates


def test_the_template_of_drawing(published) -> None:
    ids = published.encode(Item("a", "", "a red ring?"), "image").ids
    assert published.tokenizer.decode(ids) == f"{BOS}a red ring?{BEGIN_IMAGE}"
    whole = drawing(ids[1:-1], published.marks, published.config.tokens)
    assert published.tokenizer.decode(whole) == f"{BOS}a red ring?{BEGIN_IMAGE}{IMAGE * 37}{END_IMAGE}{EOS}"
    assert published.tokenizer.decode(drawing((), published.marks, 1)) == f"{BOS}{BEGIN_IMAGE}{IMAGE * 2}{END_IMAGE}{EOS}"


def test_the_template_of_a_question(published) -> None:
    item = Item("a", "", "what is this?", Image.new("RGB", (40, 32)))
    encoded = published.encode(item, "text")
    head = f"{BOS}system\n{SYSTEM}{EOS}\n{BOS}user\n{BEGIN_IMAGE}"
    assert published.tokenizer.decode(encoded.ids) == f"{head}{IMAGE * 17}{END_IMAGE}what is this?\n{BOS}assistant\n"
    assert encoded.ids[encoded.image - 1] == published.marks.begin_image
    # Piece by piece, as published: the question's last mark is not joined to the template's line break.
    joined = published.tokenizer.convert_tokens_to_ids("?\n")
    assert joined in published.tokenizer("what is this?\n")["input_ids"] and joined not in encoded.ids


def test_the_template_of_text(published) -> None:
    ids = published.encode(Item("a", "", "what is this?"), "text").ids
    assert published.tokenizer.decode(ids) == (f"{BOS}system\n{SYSTEM}{EOS}\n{BOS}user\nwhat is this?{EOS}\n{BOS}assistant\n")


def test_spans_of_a_question(model) -> None:
    encoded = model.encode(QUESTIONS[0], "text")
    words = model.tokenizer.convert_ids_to_tokens(encoded.ids)
    image, text = (s for s in encoded.spans if s.kind == "content")
    assert (image.modality, len(image)) == ("image", model.config.semantic_tokens) and words[image.start - 2 : image.start] == [
        BEGIN_IMAGE,
        IMAGE,
    ]
    assert words[image.stop] == END_IMAGE and encoded.image == image.start - 1
    assert words[text.start : text.stop] == model.tokenizer.tokenize(QUESTIONS[0].prompt)


def test_spans_of_drawing(model) -> None:
    states, _ = observed(model, PROMPTS[:1], "image", DRAW)
    words = model.tokenizer.convert_ids_to_tokens(model.encode(PROMPTS[0], "image").ids)
    prompt = states["single", 0, 0]
    [text] = [s for s in prompt.spans if s.kind == "content"]
    assert words[text.start : text.stop] == model.tokenizer.tokenize(PROMPTS[0].prompt)
    assert prompt.modalities("response") == () and prompt.modalities("prompt") == ("text",)
    response, count = states["final", 0, 0], model.config.tokens
    assert [(s.start - len(words), s.stop - len(words), s.modality, s.kind) for s in response.spans] == [
        (0, 1, "image", "template"),
        (1, count + 1, "image", "content"),
        (count + 1, count + 3, "text", "template"),
    ]
    assert {s.role for s in response.spans} == {"response"} and len(response.select("response", Reading())) == count


# ------------------------------------------------------------------------------------------------------------------------ masks


def test_masks_position_by_position() -> None:
    where = image_places(torch.tensor([2, 6]), 3, 6)
    assert where.int().tolist() == [[0, 0, 1, 1, 1, 0], [0] * 6]
    seen = visible(where)
    for query in range(6):
        for key in range(6):
            assert bool(seen[0, query, key]) == (key <= query or (2 <= query <= 4 and 2 <= key <= 4))
            assert bool(seen[1, query, key]) == (key <= query)
    # Where a picture is read: not the time token, but the mark after the picture.
    assert read_block(torch.tensor([2]), 3, 8).int().tolist() == [[0, 0, 0, 1, 1, 1, 0, 0]]
    there = torch.tensor([[0, 1, 1, 1, 1, 1]])
    padded = visible(torch.zeros(1, 6, dtype=torch.bool), there)[0]
    assert padded[:, 0].tolist() == [True, *[False] * 5] and torch.equal(padded[1:, 1:], visible(where[1:])[0, 1:, 1:])
    added = additive(seen, torch.bfloat16)
    assert added.shape == (2, 1, 6, 6) and torch.equal(added[:, 0] == 0, seen) and added.min() == -(2.0**63)
    assert additive(seen, torch.float16).min() == torch.finfo(torch.float16).min  # whose numbers end before


def test_times_begin_at_noise_and_end_at_data() -> None:
    t = flow_times(50)
    assert len(t) == 50 and t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()
    assert float(t[-2]) == pytest.approx(0.9412, abs=1e-4)
    assert float(flow_times(3)[1]) == 0.25


def test_positions_are_stretched_to_other_grids(published) -> None:
    network, table = published.network, published.network.position_embedding.weight
    assert torch.equal(network._positions(4, 4), table)
    assert network._positions(6, 6).shape == (36, table.shape[1])
    # Rows go down and columns across, and the middle stays the middle.
    with torch.no_grad():
        kept = table.clone()
        table[:, 0] = torch.arange(4.0).repeat_interleave(4)
        table[:, 1] = torch.arange(4.0).repeat(4)
        rows, columns = network._positions(8, 8)[:, :2].T.unflatten(-1, (8, 8))
        table.copy_(kept)
    assert (rows.diff(dim=0) > 0).all() and torch.allclose(rows, rows[:, :1].expand(-1, 8), atol=1e-6)
    assert torch.allclose(rows + rows.flip(0), torch.tensor(3.0), atol=1e-5) and torch.allclose(rows.T, columns, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- states of drawing


def test_recorded_steps_are_the_passes_of_sampling(model) -> None:
    states, traced = observed(model, PROMPTS, "image", DRAW)
    passes = defaultdict(list)
    with hooked(model.stacks[0], lambda layer, output: passes[layer].append(output.clone())):
        plain = model.respond(PROMPTS, "image", DRAW, 5)
    assert all(same(one, two) for one, two in zip(traced, plain, strict=True))
    assert {step for step, _, _ in states} == {"single", *STEPS, "clean"}
    for number, step in enumerate(STEPS):
        for layer in range(model.stacks[0].depth + 2):
            for k in range(len(PROMPTS)):
                seen = states[step, layer, k].states
                assert (seen - passes[layer][number][k, : len(seen)]).abs().max() < 1e-5
    # The comparison can fail: another step has other states.
    seen = states["0002", 2, 0].states
    assert (seen - passes[2][3][0, : len(seen)]).abs().max() > 1e-3


@torch.inference_mode()
def test_each_steps_input_run_again(model, monkeypatch) -> None:
    """One item at a time, without guidance and without the padding of the batch."""
    flow, entered = Showo2Network.flow, []

    def recorded(self: Showo2Network, ids, where, latents, t, mask):
        entered.append((ids, where, latents.clone(), t))
        return flow(self, ids, where, latents, t, mask)

    monkeypatch.setattr(Showo2Network, "flow", recorded)
    states, _ = observed(model, PROMPTS, "image", DRAW)
    assert len(entered) == len(STEPS) and [float(t[0]) for *_, t in entered] == flow_times(5)[:-1].tolist()
    for step, (ids, where, latents, t) in zip(STEPS, entered, strict=True):
        for k in range(len(PROMPTS)):
            length = states[step, 0, k].spans[-1].stop
            row, place = ids[k : k + 1, :length], where[k : k + 1, :length]
            embeddings, _ = model.network.embed(row, place, latents[k : k + 1], t[k : k + 1])
            layers: list[torch.Tensor] = []
            with hooked(model.stacks[0], lambda layer, output, held=layers: held.append(output[0].clone())):
                model.network.states(embeddings, additive(visible(place), torch.float32))
            for layer, again in enumerate(layers):
                assert (again - states[step, layer, k].states).abs().max() < 1e-5


def test_prompt_states_are_those_of_every_step(model) -> None:
    states, _ = observed(model, PROMPTS, "image", DRAW)
    for k, item in enumerate(PROMPTS):
        length = len(model.encode(item, "image").ids)
        for layer in range(model.stacks[0].depth + 2):
            prompt = states["single", layer, k].states
            assert len(prompt) == length
            for step in (*STEPS, "clean"):
                assert (states[step, layer, k].states[:length] - prompt).abs().max() < 1e-5


def test_the_reading_decides_what_is_run(model) -> None:
    for step, wanted in (("final", {"single", "final"}), ("clean", {"single", "clean"})):
        states, _ = observed(model, PROMPTS[:1], "image", DRAW, step)
        assert {name for name, _, _ in states} == wanted
    calls = []
    with hooked(model.stacks[0], lambda layer, output: calls.append(layer)):
        model.respond(PROMPTS[:1], "image", DRAW, 5)
    assert calls.count(0) == 4  # five points of time, four evaluations, and nothing else


@torch.inference_mode()
def published_loop(model: Showo2, item: Item, guidance: float, steps: int) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """The long way: rows one by one, padded to the window as published, Euler by hand; and the states of the conditional row."""
    config, network = model.config, model.network
    side = config.grid * config.patch
    latents = normals([item_seed(5, item)], (config.latent_channels, side, side))
    prompt = model.encode(item, "image").ids[1:-1]
    passes: list[list[torch.Tensor]] = []
    times = [k / (steps - 1) for k in range(steps)]
    times = [s / (s + 3 - 3 * s) for s in times]

    def velocity(text: list[int], t: float, into: list[torch.Tensor] | None) -> torch.Tensor:
        ids = drawing(text, model.marks, config.tokens)
        ids = torch.tensor([ids + [model.marks.pad] * (config.window - len(ids))])
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[0, len(text) + 2 : len(text) + 2 + config.tokens + 1] = True
        mask = torch.zeros(1, 1, config.window, config.window).masked_fill(~visible(where)[:, None], torch.finfo().min)
        with hooked(model.stacks[0], lambda layer, output: into.append(output[0].clone()) if into is not None else None):
            return network.flow(ids, where, latents, torch.tensor([t]), mask)

    for now, then in pairwise(times):
        passes.append([])
        conditional, unconditional = velocity(prompt, now, passes[-1]), velocity([], now, None)
        latents = latents + (then - now) * (unconditional + guidance * (conditional - unconditional))
    return latents, passes


def test_latents_and_states_equal_the_published_loop(model) -> None:
    states, _ = observed(model, PROMPTS, "image", DRAW)
    prompts = [model.encode(item, "image") for item in PROMPTS]
    drawn = model.draw(prompts, DRAW, [item_seed(5, item) for item in PROMPTS])
    latents, passes = published_loop(model, PROMPTS[1], 3.0, 5)
    assert (drawn[1] - latents[0]).abs().max() < 1e-4
    for step, layers in zip(STEPS, passes, strict=True):
        for layer, theirs in enumerate(layers):
            ours = states[step, layer, 1].states
            assert (ours - theirs[: len(ours)]).abs().max() < 1e-4
    assert model.decode(drawn)[0].size == (32, 32)


def test_the_clean_pass_holds_the_finished_latents(model) -> None:
    states, [response] = observed(model, PROMPTS[:1], "image", DRAW, "clean")
    prompt = model.encode(PROMPTS[0], "image")
    latents = model.draw([prompt], DRAW, [item_seed(5, PROMPTS[0])])
    assert model.decode(latents)[0].tobytes() == response.image.tobytes()
    start = len(prompt.ids)
    with torch.inference_mode():
        tokens = model.network.fused(latents)[0]
        time = model.network.time_embed_proj(model.network.time_embed(torch.ones(1)))[0]
    assert torch.allclose(states["clean", 0, 0].states[start : start + 1 + len(tokens)], torch.cat([time[None], tokens]), atol=1e-5)


def test_a_model_that_draws_larger_than_it_reads(published) -> None:
    states, [response] = observed(published, [Item("a", "", "a red ring")], "image", DRAW, "final")
    assert response.image.size == (48, 48) and response.tokens == 36
    assert len(states["final", 3, 0].select("response", Reading())) == 36
    [answer] = published.respond([QUESTIONS[0]], "text", WRITE)
    assert isinstance(answer.text, str)


def test_guidance_of_one_is_the_conditional_branch(model) -> None:
    prompts, seeds = [model.encode(PROMPTS[0], "image")], [1]
    plain = model.draw(prompts, Generation(guidance=1.0, steps=4), seeds)
    almost = model.draw(prompts, Generation(guidance=1.0 + 1e-9, steps=4), seeds)
    assert torch.allclose(plain, almost, atol=1e-5)
    assert (plain - model.draw(prompts, Generation(guidance=3.0, steps=4), seeds)).abs().max() > 1e-3


def test_seeds_are_the_items(model) -> None:
    images = [model.respond(PROMPTS[:1], "image", DRAW, seed)[0].image.tobytes() for seed in (0, 0, 1)]
    assert images[0] == images[1] != images[2]


def test_one_point_of_time_draws_nothing(model) -> None:
    with pytest.raises(ValueError, match="between at least 2 points of time, got steps=1"):
        model.respond(PROMPTS[:1], "image", Generation(guidance=1.0, steps=1))


# ------------------------------------------------------------------------------------------------------------- states of writing


@pytest.mark.parametrize("items", [QUESTIONS, PROMPTS])
def test_teacher_forcing_gives_the_states_of_writing(model, items) -> None:
    item = items[0]
    states, [response] = observed(model, [item], "text", WRITE)
    steps = defaultdict(list)
    with hooked(model.stacks[0], lambda layer, output: steps[layer].append(output[0].clone())):
        [again] = model.respond([item], "text", WRITE, 5)
    assert same(again, response)
    for layer in range(model.stacks[0].depth + 2):
        generated, forced = torch.cat(steps[layer]), states["single", layer, 0].states
        # The state of the last response token is the one that writing never computes.
        assert len(forced) - len(generated) == 1
        assert (forced[: len(generated)] - generated).abs().max() < 1e-5


def test_a_picture_is_read_both_ways_and_not_by_what_stands_before(model) -> None:
    """A change in the last token's square of latents reaches all of the picture, the mark after it, and no position before it."""
    prompt = model.encode(QUESTIONS[0], "text")
    latents = normals([1], (24, 8, 8))
    other = latents.clone()
    square = model.config.patch
    other[..., -square:, -square:] += 1
    with torch.inference_mode():
        # The picture's own path sees all of it, so the sequence is compared on inputs that differ in one token.
        starts = torch.tensor([prompt.image])
        first, block = model.embed(torch.tensor([prompt.ids]), starts, latents)
        second = first.clone()
        last = prompt.image + model.config.semantic_tokens
        second[0, last] = model.embed(torch.tensor([prompt.ids]), starts, other)[0][0, last]
        moved = [model.network.states(e, additive(visible(block), torch.float32))[0] for e in (first, second)]
    changed = (moved[0] - moved[1]).abs().amax(-1) > 1e-4
    assert not changed[: prompt.image + 1].any() and changed[prompt.image + 1 :].all()


def test_the_posterior_is_sampled_from_the_items_seed(model) -> None:
    pixels = torch.stack([centre_square(QUESTIONS[0].picture(), 32)] * 2)
    one, two = model.see(pixels, [1, 2])
    assert (one - two).abs().max() > 1e-3 and torch.allclose(model.see(pixels[:1], [1])[0], one, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("task", "items", "settings"),
    [
        ("image", PROMPTS, DRAW),
        *(("text", items, replace(WRITE, temperature=t)) for items in (QUESTIONS, PROMPTS) for t in (0.0, 1.0)),
        ("text", [PROMPTS[0], QUESTIONS[1], PROMPTS[2]], WRITE),
    ],
)
def test_batch_of_one_equals_batch_of_many(model, task, items, settings) -> None:
    together, responses = observed(model, items, task, settings)
    for k, item in enumerate(items):
        alone, [response] = observed(model, [item], task, settings)
        assert response.text == responses[k].text
        if response.image is not None:  # the same latents up to rounding; a pixel may fall to the neighbouring level
            assert abs(np.asarray(response.image, int) - np.asarray(responses[k].image, int)).max() <= 1
        for (step, layer, _), seen in alone.items():
            assert seen.spans == together[step, layer, k].spans
            assert (seen.states - together[step, layer, k].states).abs().max() < 2e-5


def test_rows_that_nobody_reads_are_never_seen(model) -> None:
    states, _ = observed(model, PROMPTS, "image", DRAW)
    assert {item for _, _, item in states} == {0, 1, 2}


# --------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("item", "task", "said"),
    [
        (Item("a", "c", "  "), "image", "item 'a' has an empty prompt"),
        (Item("a", "c", "a large green dragon"), "image", "does not know the words dragon of item 'a'"),
        (Item("a", "c", "a red ring", Image.new("RGB", (4, 4))), "image", "draws from text prompts alone"),
        (Item("a", "c", "a red ring " * 200), "text", "takes 60. positions .* room for 502"),
        (Item("a", "c", "a red ring " * 100), "image", r"takes 302 positions .* room for \d+;"),
    ],
)
def test_prompts_that_cannot_be_taken(model, item, task, said) -> None:
    with pytest.raises(ValueError, match=said):
        model.respond([item], task, WRITE if task == "text" else DRAW)


def test_a_long_prompt_is_cut_as_published(model) -> None:
    item = Item("a", "c", "a red ring " * 100)
    encoded = model.encode(item, "image", truncate=True)
    # The published length of the text: the window without the image, its time, and four marks.
    assert encoded.flags == ("cut",) and len(encoded.ids) - 2 == model.config.window - model.config.tokens - 1 - 4
    assert encoded.ids[-1] == model.marks.begin_image
    assert len(drawing(encoded.ids[1:-1], model.marks, model.config.tokens)) == model.config.window
    for size in SIZES.values():
        assert size.window - size.tokens - 1 - 4 == 290


def test_a_tokenizer_of_another_model_is_refused(model) -> None:
    with pytest.raises(ValueError, match=r"lacks \[PAD\], .* it is not Show-o2's"):
        Showo2(model.network, model.vae, byte_tokenizer(), "tiny")


def test_a_model_may_write_the_placeholder_itself(model) -> None:
    """Features go where the picture is, whatever the response says."""
    prompt = model.encode(QUESTIONS[0], "text")
    latents = model.see(prompt.pixels[None], [1])
    seen = []
    with torch.inference_mode(), hooked(model.stacks[0], lambda layer, output: seen.append(output) if layer == 0 else None):
        model.read([prompt], [[model.marks.image] * 3], latents)
    embedded = model.network.showo.model.embed_tokens.weight[model.marks.image]
    assert torch.equal(seen[0][0, -3:], embedded.expand(3, -1))
    assert not torch.isclose(seen[0][0, prompt.image + 1], embedded).all()


# ------------------------------------------------------------------------------------------------------------ pictures and sizes


def manifest(path) -> dict[str, tuple[int, ...]]:
    pairs = (line.split("\t") for line in path.read_text().splitlines() if line)
    return {key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for key, shape in pairs}


@pytest.mark.parametrize(("size", "file", "billions"), [("1.5B", "showo2_1_5b", 2.831), ("7B", "showo2_7b", 8.932)])
def test_published_sizes_cover_the_manifest(shared, size, file, billions) -> None:
    config = SIZES[size]
    with torch.device("meta"):
        network = Showo2Network(config)
    ours = {key: tuple(value.shape) for key, value in network.state_dict().items() if not keys_of(config).lacks(key)}
    theirs = manifest(shared / "manifests" / f"{file}.keys.txt")
    assert keys_of(config).shapes(theirs) == ours
    left = [key for key in theirs if keys_of(config).ignores(key)]
    assert left == (["showo.lm_head.weight"] if config.tied else [])
    count = sum(p.numel() for p in network.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.0006)


def test_the_twin_is_small(model) -> None:
    count = sum(p.numel() for part in (model.network, model.vae) for p in part.parameters())
    assert 1e6 < count < 4e6


PUBLISHED = {
    "_class_name": "Showo2Qwen2_5",
    "llm_vocab_size": 151669,
    "image_latent_dim": 16,
    "image_latent_height": 27,
    "image_latent_width": 27,
    "patch_size": 2,
    "hidden_size": 1536,
    "clip_latent_dim": 1152,
    "num_diffusion_layers": 10,
    "add_time_embeds": True,
    "add_qk_norm": True,
}


def test_published_configurations_are_understood() -> None:
    assert Showo2Config.from_dict(PUBLISHED) == SIZES["1.5B"]
    assert Showo2Config.from_dict(PUBLISHED | {"hidden_size": 3584}) == SIZES["7B"]
    for side, window in ((32, 1280), (64, 4352)):
        large = Showo2Config.from_dict(PUBLISHED | {"image_latent_height": side, "image_latent_width": side})
        assert (large.grid, large.window, large.semantic_grid) == (side, window, 27)
    assert Showo2Config.from_dict(twin(100).to_dict()) == twin(100)
    with pytest.raises(ValueError, match="the width 77 is of no known Show-o2"):
        Showo2Config.from_dict(PUBLISHED | {"hidden_size": 77})
    with pytest.raises(ValueError, match="pictures of 27 x 30 tokens"):
        Showo2Config.from_dict(PUBLISHED | {"image_latent_width": 30})


def test_every_part_runs_in_bfloat16() -> None:
    """Every part takes what the others give; the autoencoder stays in float32."""
    half = new_twin(0)
    half.network.to(torch.bfloat16)
    [response] = half.respond(PROMPTS[:1], "image", Generation(guidance=2.0, steps=3))
    assert response.image.size == (32, 32)
    assert isinstance(half.respond([QUESTIONS[0]], "text", Generation(tokens=3, temperature=0.0))[0].text, str)


def test_marks_of_the_twin(model) -> None:
    assert model.tokenizer.pad_token == PAD and model.marks.pad == model.tokenizer.pad_token_id
    assert wan_vae.reduction(model.vae) == 4 and model.seen_side == 32
    assert Encoded([1], ()).image is None
