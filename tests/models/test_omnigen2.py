"""OmniGen2: templates, sampler, spans, and the states that a trace shows in either stack, on a twin of random weights."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import byte_tokenizer
from transformers import Qwen2_5_VLForConditionalGeneration

from unisonde.data import corebench
from unisonde.data.item import Item
from unisonde.data.tabletop import question_item, text_item
from unisonde.measure import Protocol
from unisonde.models.base import Generation, item_seed
from unisonde.models.omnigen2 import (
    BEGIN_IMAGE,
    BOS,
    DRAW,
    END_IMAGE,
    EOS,
    IMAGE,
    NEGATIVE,
    SYSTEM,
    WINDOW,
    Drawing,
    OmniGen2,
    widened,
)
from unisonde.models.parts import omnigen2_mllm as mllm
from unisonde.models.parts.omnigen2_network import OmniGen2Transformer, flow_times, there
from unisonde.models.parts.sampling import normals
from unisonde.models.trace import LayerStates, Reading, Span, Trace, hooked
from unisonde.runs.readout import Readout
from unisonde.train.omnigen2 import PICTURES, SPECIAL_TOKENS, initialise, new_twin, new_vae, twin, twin_mllm

DRAWN = Generation(guidance=3.0, steps=4)
WRITE = Generation(tokens=10, temperature=0.0)
PROMPTS = [text_item("composition", "test", 3, k, count) for k, count in enumerate((1, 3, 2))]
QUESTIONS = [question_item(category, "test", 3, k) for k, category in enumerate(("attribute", "logic", "coarse"))]
STEPS = ["0000", "0001", "0002", "final"]


def alive(model: OmniGen2) -> OmniGen2:
    """Random weights throughout: the velocity of a new twin is zero, and its time changes nothing."""
    initialise(model.network, 0)
    with torch.no_grad():
        for name, weight in model.network.transformer.named_parameters():
            if "norm1.linear" in name or "norm_out" in name or "image_index" in name:
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.fixture(scope="module")
def model() -> OmniGen2:
    return alive(new_twin(0))


@pytest.fixture(scope="module")
def published() -> OmniGen2:
    """With a tokenizer of bytes, the published system prompt and the published negative prompt."""
    tokenizer = byte_tokenizer(SPECIAL_TOKENS)
    torch.manual_seed(0)
    return alive(
        OmniGen2(
            Qwen2_5_VLForConditionalGeneration(twin_mllm(tokenizer)),
            OmniGen2Transformer(twin()),
            new_vae(0),
            tokenizer,
            mllm.pictures_of(PICTURES),
            "tiny",
            drawing=Drawing(side=16),
        )
    )


def observed(model: OmniGen2, items: list[Item], task: str, settings: Generation, step: str = "all") -> tuple[dict, list]:
    """States by (stack, step, layer, item), and the responses."""
    states: dict[tuple[str, str, int, int], LayerStates] = {}

    def keep(seen: LayerStates) -> None:
        key = seen.stack, seen.step, seen.layer, seen.item
        assert key not in states
        states[key] = LayerStates(**{**vars(seen), "states": seen.states.clone()})

    trace = Trace(keep, Reading(step=step))  # type: ignore[arg-type]
    return states, model.respond(items, task, settings, 5, trace)  # type: ignore[arg-type]


def same(one, two) -> bool:
    return (one.text, one.image and one.image.tobytes()) == (two.text, two.image and two.image.tobytes())


# --------------------------------------------------------------------------------------------------------------------- templates


def test_the_template_of_drawing(published) -> None:
    ids = published.encode(Item("a", "", "a red ring"), "image").ids
    assert published.tokenizer.decode(ids) == f"{BOS}system\n{SYSTEM}{EOS}\n{BOS}user\na red ring{EOS}\n"
    assert published.drawing.negative == NEGATIVE and NEGATIVE.endswith("censor_bar")


def test_the_template_of_answering(published) -> None:
    head = f"{BOS}system\n{SYSTEM}{EOS}\n{BOS}user\n"
    ids = published.encode(Item("a", "", "what is this?"), "text").ids
    assert published.tokenizer.decode(ids) == f"{head}what is this?{EOS}\n{BOS}assistant\n"
    encoded = published.encode(Item("a", "", "what is this?", Image.new("RGB", (32, 32))), "text")
    shown = f"<img1>: {BEGIN_IMAGE}{IMAGE * 16}{END_IMAGE}"
    assert published.tokenizer.decode(encoded.ids) == f"{head}{shown}what is this?{EOS}\n{BOS}assistant\n"
    kinds = [(s.modality, s.kind, published.tokenizer.decode(encoded.ids[s.start : s.stop])) for s in encoded.spans]
    assert kinds == [
        ("text", "template", f"{head}<img1>: {BEGIN_IMAGE}"),
        ("image", "content", IMAGE * 16),
        ("text", "template", END_IMAGE),
        ("text", "content", "what is this?"),
        ("text", "template", f"{EOS}\n{BOS}assistant\n"),
    ]


def test_the_negative_prompt_has_the_template_of_drawing(published, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(mllm, "states", lambda network, ids, there: seen.append((ids, there)) or torch.zeros(*ids.shape, 128))
    item = Item("a", "", "a red ring")
    published.texts([published.encode(item, "image")], guide=True)
    ids, mask = seen[0]
    assert published.tokenizer.decode(ids[1][mask[1].bool()]) == f"{BOS}system\n{SYSTEM}{EOS}\n{BOS}user\n{NEGATIVE}{EOS}\n"
    published.texts([published.encode(item, "image")], guide=False)
    assert len(seen[1][0]) == 1


def test_a_placeholder_is_widened() -> None:
    spans = (Span(0, 2, "prompt", "text", "template"), Span(2, 3, "prompt", "image"), Span(3, 5, "prompt", "text"))
    ids, wide = widened([7, 8, 1, 9, 9], spans, 2, 3)
    assert ids == [7, 8, 1, 1, 1, 9, 9]
    assert [(s.start, s.stop) for s in wide] == [(0, 2), (2, 5), (5, 7)]


def test_an_answer_that_would_draw_ends_there(published) -> None:
    assert set(published.ends) >= {published.tokenizer.convert_tokens_to_ids(token) for token in (EOS, DRAW)}


def test_the_benchmarks_prompts_pass_through_the_template(published, shared: Path) -> None:
    """The stand-in tokenizer has a token for each byte, so that most prompts are longer than the window; cut, they have its length."""
    items = corebench.read(shared / "data" / "t2i-corebench")
    assert len(items) == 1080
    for item in items:
        encoded = published.encode(item, "image", truncate=True)
        [text] = [s for s in encoded.spans if s.kind == "content"]
        held = bytes(encoded.ids[text.start : text.stop])
        whole = len(encoded.ids) < WINDOW or not encoded.flags
        assert len(encoded.ids) == WINDOW or whole
        assert len(held) == len(text) and (not whole or len(held) == len(item.prompt.encode()))
        assert encoded.ids[text.stop] == published.tokenizer.convert_tokens_to_ids(EOS)
    short = replace(items[0], prompt="x" * (WINDOW - 121))
    length = len(published.encode(short, "image").ids)
    fitting = replace(items[0], prompt="x" * (WINDOW - 121 + WINDOW - length))
    assert len(published.encode(fitting, "image").ids) == WINDOW
    with pytest.raises(ValueError, match=r"takes 1025 positions .* has room for 1024"):
        published.encode(replace(items[0], prompt=fitting.prompt + "x"), "image")


# ------------------------------------------------------------------------------------------------------------------------ sampler


@torch.inference_mode()
def published_loop(model: OmniGen2, item: Item, guidance: float, steps: int, interval: tuple[float, float]) -> torch.Tensor:
    """The long way: one row, each branch by itself, times and Euler by hand."""
    transformer, network = model.network.transformer, model.network.mllm
    texts = []
    for prompt in (item, Item("", "", model.drawing.negative)):
        ids = [model.tokenizer.convert_tokens_to_ids(token) for token in (BOS, "user", "\n")] if not prompt.prompt else None
        ids = (
            model.encode(prompt, "image").ids
            if ids is None
            else [*ids, *[model.tokenizer.convert_tokens_to_ids(t) for t in (EOS, "\n")]]
        )
        features = network.model(input_ids=torch.tensor([ids])).last_hidden_state
        texts.append(transformer.read(features, [len(ids)]))
    latents = normals([item_seed(5, item)], model.latent)
    factor = np.sqrt(model.latent[1] * model.latent[2]) / 40
    times = [k / steps / (factor - factor * k / steps + k / steps) for k in range(steps + 1)]
    for step in range(steps):
        now = torch.tensor([times[step]])
        velocity = transformer.velocity(texts[0], latents, now)
        if interval[0] <= step / steps <= interval[1]:
            other = transformer.velocity(texts[1], latents, now)
            velocity = other + guidance * (velocity - other)
        latents = latents + (times[step + 1] - times[step]) * velocity
    return latents


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.6)])
def test_latents_equal_the_published_loop(model, monkeypatch, interval) -> None:
    monkeypatch.setattr(model, "drawing", replace(model.drawing, interval=interval))
    prompts, seeds = [model.encode(item, "image") for item in PROMPTS], [item_seed(5, item) for item in PROMPTS]
    passes = []
    with hooked(model.stacks[1], lambda layer, output: passes.append(len(output)) if layer == 0 else None):
        drawn = model.draw(prompts, DRAWN, seeds)
    assert passes == [6 if interval[0] <= step / 4 <= interval[1] else 3 for step in range(4)]
    latents = published_loop(model, PROMPTS[1], 3.0, 4, interval)
    assert (drawn[1] - latents[0]).abs().max() < 1e-4
    assert (drawn[0] - latents[0]).abs().max() > 1e-2
    assert model.decode(drawn)[0].size == (32, 32)


def test_no_guidance_is_the_conditional_branch(model) -> None:
    prompts, seeds = [model.encode(PROMPTS[0], "image")], [1]
    plain = model.draw(prompts, Generation(guidance=1.0, steps=4), seeds)
    assert torch.equal(plain, model.draw(prompts, Generation(guidance=0.0, steps=4), seeds))  # as published, below 1 there is none
    almost = model.draw(prompts, Generation(guidance=1.0 + 1e-9, steps=4), seeds)
    assert torch.allclose(plain, almost, atol=1e-5)
    assert (plain - model.draw(prompts, Generation(guidance=3.0, steps=4), seeds)).abs().max() > 1e-3


def test_seeds_are_the_items(model) -> None:
    images = [model.respond(PROMPTS[:1], "image", DRAWN, seed)[0].image.tobytes() for seed in (0, 0, 1)]
    assert images[0] == images[1] != images[2]


def test_reference_images_change_what_is_drawn(model) -> None:
    """They are of any size, several a row, and none in another row."""
    prompts = [model.encode(item, "image") for item in PROMPTS[:2]]
    latents, sizes = normals([1, 2], model.latent), [(3, 8, 12), (3, 16, 4)]
    references = [[normals([k], size)[0] for k, size in enumerate(sizes)], []]
    with torch.inference_mode():
        texts, _ = model.texts(prompts, guide=False)
        time = torch.full((2,), 0.4)
        plain = model.network.transformer.velocity(texts, latents, time)
        both = model.network.transformer.velocity(texts, latents, time, references)
        swapped = model.network.transformer.velocity(texts, latents, time, [references[0][::-1], []])
    assert (both[1] - plain[1]).abs().max() < 1e-4
    assert (both[0] - plain[0]).abs().max() > 1e-3 and (both[0] - swapped[0]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------- states of drawing


def test_spans_of_drawing(model) -> None:
    states, [response] = observed(model, PROMPTS[:1], "image", DRAWN)
    words = model.tokenizer.convert_ids_to_tokens(model.encode(PROMPTS[0], "image").ids)
    read, drawn = states["mllm", "single", 0, 0], states["dit", "final", 0, 0]
    for seen in (read, drawn):
        [text] = [s for s in seen.spans if s.kind == "content" and s.role == "prompt"]
        assert words[text.start : text.stop] == model.tokenizer.tokenize(PROMPTS[0].prompt)
        assert seen.modalities("prompt") == ("text",)
    assert read.modalities("response") == () and len(read.states) == len(words)
    assert [(s.start - len(words), s.stop - len(words), s.modality, s.kind) for s in drawn.spans if s.role == "response"] == [
        (0, 64, "image", "content")
    ]
    assert response.tokens == len(drawn.select("response", Reading())) == 64
    # The widths differ, as in the published model: a conditional entropy exists in one stack alone.
    assert (read.states.shape[1], drawn.states.shape[1]) == (128, 120)


def test_recorded_steps_are_the_passes_of_sampling(model) -> None:
    states, traced = observed(model, PROMPTS, "image", DRAWN)
    passes: dict[str, dict[int, list[torch.Tensor]]] = {stack.name: defaultdict(list) for stack in model.stacks}
    read, drawn = model.stacks
    with (
        hooked(read, lambda layer, output: passes["mllm"][layer].append(output.clone())),
        hooked(drawn, lambda layer, output: passes["dit"][layer].append(output.clone())),
    ):
        plain = model.respond(PROMPTS, "image", DRAWN, 5)
    assert all(same(one, two) for one, two in zip(traced, plain, strict=True))
    assert {(stack, step) for stack, step, _, _ in states} == {("mllm", "single"), *(("dit", s) for s in (*STEPS, "clean"))}
    for stack, steps in ((read, ["single"]), (drawn, STEPS)):
        for (number, step), layer, k in itertools.product(enumerate(steps), range(stack.depth + 2), range(len(PROMPTS))):
            seen = states[stack.name, step, layer, k].states
            assert (seen - passes[stack.name][layer][number][k, : len(seen)]).abs().max() < 1e-5
    seen = states["dit", "0002", 2, 0].states  # the comparison can fail: another step has other states
    assert (seen - passes["dit"][2][3][0, : len(seen)]).abs().max() > 1e-3


@torch.inference_mode()
def test_a_steps_input_run_again_gives_its_states(model) -> None:
    states, _ = observed(model, PROMPTS, "image", DRAWN)
    prompts, seeds = [model.encode(item, "image") for item in PROMPTS], [item_seed(5, item) for item in PROMPTS]
    texts, _ = model.texts(prompts, guide=False)
    times = flow_times(4, model.latent[1] * model.latent[2])
    finished = model.draw(prompts, DRAWN, seeds)
    for step, latents, t in (("0000", normals(seeds, model.latent), times[0]), ("clean", finished, times[-1])):
        layers = {}
        with hooked(model.stacks[1], lambda layer, output, layers=layers: layers.update({layer: output.clone()})):
            model.network.transformer.velocity(texts, latents, t.expand(3))
        for (layer, output), k in itertools.product(layers.items(), range(3)):
            seen = states["dit", step, layer, k].states
            assert (seen - output[k, : len(seen)]).abs().max() < 1e-5


def test_prompt_states_of_the_diffusion_transformer_change_with_the_step(model) -> None:
    """Text and image see each other there, so only what enters the first layer is the same; those of the language model are run once."""
    states, _ = observed(model, PROMPTS[:1], "image", DRAWN)
    prompt = len(model.encode(PROMPTS[0], "image").ids)
    for step in (*STEPS[1:], "clean"):
        assert (states["dit", step, 0, 0].states[:prompt] - states["dit", "0000", 0, 0].states[:prompt]).abs().max() < 1e-5
        assert (states["dit", step, 2, 0].states[:prompt] - states["dit", "0000", 2, 0].states[:prompt]).abs().max() > 1e-3


def test_the_state_after_the_last_norm(model) -> None:
    """Normalised, times one plus a scale that the time gives: and a linear map of it is the velocity."""
    states, _ = observed(model, PROMPTS[:1], "image", DRAWN)
    last, final = (states["dit", "0000", layer, 0].states for layer in (3, 4))
    out, time = model.network.transformer.norm_out, model.network.transformer.time_caption_embed.time(torch.zeros(1))
    with torch.inference_mode():
        scale = out.linear_1(torch.nn.functional.silu(time))
        normal = (last - last.mean(-1, keepdim=True)) / (last.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(final, normal * (1 + scale), atol=1e-4) and scale.abs().max() > 0.1


def test_the_reading_decides_what_is_run(model) -> None:
    for step in ("final", "clean"):
        states, _ = observed(model, PROMPTS[:1], "image", DRAWN, step)
        assert {(stack, name) for stack, name, _, _ in states} == {("mllm", "single"), ("dit", step)}
    calls: Counter[str] = Counter()
    read, drawn = model.stacks
    with (
        hooked(read, lambda layer, _: calls.update(["mllm"])),
        hooked(drawn, lambda layer, _: calls.update(["dit"] * (layer == 0))),
    ):
        model.respond(PROMPTS[:1], "image", DRAWN, 5)
    assert calls == {"mllm": 6, "dit": 4}  # four layers of one pass, what enters them and what leaves the norm


def test_what_the_paper_leaves_out_can_be_left_out(model) -> None:
    seen: dict[tuple[str, ...] | None, set[tuple[str, str]]] = {}
    pictures = {}
    for stacks in (("mllm",), ("dit",), None):
        passes = seen[stacks] = set()
        trace = Trace(lambda s, passes=passes: passes.add((s.stack, s.step)), Reading(step="clean", stacks=stacks))
        pictures[stacks] = model.respond(PROMPTS[:1], "image", DRAWN, 5, trace)[0]
    assert seen == {("mllm",): {("mllm", "single")}, ("dit",): {("dit", "clean")}, None: {("mllm", "single"), ("dit", "clean")}}
    assert same(pictures["mllm",], pictures[None]) and same(pictures["dit",], pictures[None])


def test_measurements_tell_the_stacks_apart(model) -> None:
    """Each stack has its own prompt entropy; the conditional entropy and its terms are those of the diffusion transformer."""
    readout = Readout(PROMPTS, Protocol(pca=8), Reading(), {"task": "image"})
    model.respond(PROMPTS, "image", DRAWN, 5, Trace(readout))
    rows = [row for item in readout.rows for row in item]
    found = Counter((row["stack"], row["step"], row["quantity"], row["layer"]) for row in rows)
    assert set(found.values()) == {3}
    assert {(stack, step, quantity) for stack, step, quantity, _ in found} == {
        ("mllm", "single", "entropy"),
        *(("dit", "final", quantity) for quantity in ("entropy", "conditional_entropy", "joint_entropy", "prompt_term")),
    }
    assert {layer for stack, _, _, layer in found if stack == "mllm"} == set(range(6))
    assert {layer for stack, _, _, layer in found if stack == "dit"} == set(range(5))
    assert all(row["n_response"] == 64 for row in rows if row["level"] == "response")


# ------------------------------------------------------------------------------------------------------------- states of writing


@pytest.mark.parametrize("items", [QUESTIONS, PROMPTS])
def test_teacher_forcing_gives_the_states_of_writing(model, items) -> None:
    for item in items:
        states, [traced] = observed(model, [item], "text", WRITE)
        passes = defaultdict(list)
        with hooked(model.stacks[0], lambda layer, output, passes=passes: passes[layer].append(output[0].clone())):
            [plain] = model.respond([item], "text", WRITE, 5)
        assert same(traced, plain) and {key[0] for key in states} == {"mllm"} == {k[0] for k in states if k[1] == "single"}
        for layer, outputs in passes.items():
            once = torch.cat(outputs)
            seen = states["mllm", "single", layer, 0].states
            assert len(once) == len(seen) - 1  # writing never runs its last token
            assert (seen[:-1] - once).abs().max() < 1e-5


def test_the_pass_over_a_prompt_equals_the_stock_model(model) -> None:
    """Positions of pictures and text, with padding, and from a batch of several."""
    prompts = [model.encode(item, "text") for item in (*QUESTIONS, PROMPTS[0])]
    longest = max(len(p.ids) for p in prompts)
    ids = torch.tensor([p.ids + [model.pad_id] * (longest - len(p.ids)) for p in prompts])
    mask = there([len(p.ids) for p in prompts]).long()
    where = torch.zeros_like(ids, dtype=torch.bool)
    for row, p in enumerate(prompts):
        for span in p.spans:
            where[row, span.start : span.stop] = span.modality == "image"
    pictures = {key: torch.cat([p.picture[key] for p in prompts if p.picture]) for key in prompts[0].picture}
    with torch.inference_mode():
        ours = mllm.states(model.network.mllm, ids, mask, where, pictures)
        for row, p in enumerate(prompts):
            alone = torch.tensor([p.ids])
            marks = {"mm_token_type_ids": (alone == model.image_id).int()} if p.picture else {}
            stock = model.network.mllm.model(input_ids=alone, **p.picture, **marks).last_hidden_state[0]
            assert (ours[row, : len(p.ids)] - stock).abs().max() < 1e-5


def test_a_model_may_write_the_placeholder_itself(model) -> None:
    """Features go where the picture is, whatever the response says."""
    prompt = model.encode(QUESTIONS[0], "text")
    seen = []
    with torch.inference_mode(), hooked(model.stacks[0], lambda layer, output: seen.append(output) if layer == 0 else None):
        model.read(prompt, [model.image_id] * 3)
    embedded = model.network.mllm.get_input_embeddings().weight[model.image_id]
    [image] = [s for s in prompt.spans if s.modality == "image"]
    assert torch.equal(seen[0][0, -3:], embedded.expand(3, -1)) and len(image) == 16
    assert not torch.isclose(seen[0][0, image.start : image.stop], embedded).all(-1).any()


def test_spans_of_writing(model) -> None:
    states, [response] = observed(model, QUESTIONS[:1], "text", WRITE)
    seen = states["mllm", "single", 0, 0]
    assert seen.modalities("prompt") == ("image", "text") and seen.modalities("response") in ((), ("text",))
    assert len(seen.select("response", Reading())) == response.tokens


@pytest.mark.parametrize(
    ("task", "items", "settings"),
    [
        ("image", PROMPTS, DRAWN),
        *(("text", [PROMPTS[0], QUESTIONS[1], QUESTIONS[0]], replace(WRITE, temperature=t)) for t in (0.0, 1.0)),
    ],
)
def test_batch_of_one_equals_batch_of_many(model, task, items, settings) -> None:
    together, responses = observed(model, items, task, settings)
    for k, item in enumerate(items):
        alone, [response] = observed(model, [item], task, settings)
        assert response.text == responses[k].text
        if response.image is not None:  # the same latents up to rounding; a pixel may fall to the neighbouring level
            assert abs(np.asarray(response.image, int) - np.asarray(responses[k].image, int)).max() <= 1
        for (stack, step, layer, _), seen in alone.items():
            assert seen.spans == together[stack, step, layer, k].spans
            assert (seen.states - together[stack, step, layer, k].states).abs().max() < 2e-5


# --------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("item", "task", "said"),
    [
        (Item("a", "c", "  "), "image", "item 'a' has an empty prompt"),
        (Item("a", "c", "a large green dragon"), "image", "does not know the words dragon of item 'a'"),
        (Item("a", "c", "a red ring", Image.new("RGB", (4, 4))), "image", "draws from text prompts alone"),
        (Item("a", "c", f"a red ring {IMAGE}"), "image", r"the text of item 'a' holds <\|image_pad\|>"),
        (Item("a", "c", "a red ring " * 200), "text", "takes 60. positions .* room for 502"),
        (Item("a", "c", "a red ring " * 400), "image", "takes 1205 positions .* room for 1024"),
        (Item("a", "c", "what?", Image.new("RGB", (900, 2))), "text", "the image of item 'a', 900 x 2, cannot be taken"),
    ],
)
def test_prompts_that_cannot_be_taken(model, item, task, said) -> None:
    with pytest.raises(ValueError, match=said):
        model.respond([item], task, WRITE if task == "text" else DRAWN)


def test_a_long_prompt_is_cut_and_flagged(model) -> None:
    encoded = model.encode(Item("a", "c", "a red ring " * 400), "image", truncate=True)
    assert encoded.flags == ("cut",) and len(encoded.ids) == WINDOW
    assert encoded.ids[-2:] == model.encode(PROMPTS[0], "image").ids[-2:]


def test_a_padded_prompt_is_the_prompt(model) -> None:
    """Beside a longer one, in either stack."""
    states, _ = observed(model, PROMPTS, "image", DRAWN, "final")
    lengths = {len(states["mllm", "single", 0, k].states) for k in range(3)}
    assert len(lengths) == 3 == len({len(states["dit", "final", 0, k].states) for k in range(3)})
    for (stack, step, layer, k), seen in states.items():
        alone = observed(model, [PROMPTS[k]], "image", DRAWN, "final")[0] if layer == 0 and stack == "mllm" else None
        if alone is not None:
            assert (alone[stack, step, 1, 0].states - states[stack, step, 1, k].states).abs().max() < 2e-5
        assert torch.isfinite(seen.states).all()


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "1", "L"])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (40, 24)])
def test_pictures_of_any_kind(model, mode, size) -> None:
    picture = Image.new("I;16", size, 30000) if mode == "I;16" else Image.new("RGB", size, (200, 30, 30)).convert(mode)
    encoded = model.encode(Item("a", "c", "what is in the picture?", picture), "text")
    pixels = encoded.picture["pixel_values"]
    assert pixels.shape[1] == 3 * 2 * 4 * 4 and int(encoded.picture["image_grid_thw"].prod()) == len(pixels)
    assert sum(len(s) for s in encoded.spans if s.modality == "image") == len(pixels) // 4
    if mode == "RGBA":  # red, whatever the size; were height taken for channels, it would not be
        means = pixels.unflatten(1, (3, -1)).mean((0, 2)) * torch.tensor([0.2686, 0.2613, 0.2758]) + torch.tensor(
            [0.4815, 0.4578, 0.4082]
        )
        assert torch.allclose(means * 255, torch.tensor([200.0, 30.0, 30.0]), atol=0.5)


def test_a_side_is_a_whole_number_of_tokens(model, monkeypatch) -> None:
    monkeypatch.setattr(model, "drawing", replace(model.drawing, side=30))
    with pytest.raises(ValueError, match="a side of a multiple of 4 pixels, got 30"):
        model.respond(PROMPTS[:1], "image", DRAWN)


def test_parts_that_do_not_fit(model) -> None:
    parts = (model.vae, model.tokenizer, model.pictures, "tiny")
    with pytest.raises(ValueError, match="states of width 128, its diffusion transformer takes 64"):
        OmniGen2(model.network.mllm, OmniGen2Transformer(replace(twin(), text_feat_dim=64)), *parts)
    with pytest.raises(ValueError, match=r"lacks .*it is not OmniGen2's"):
        OmniGen2(model.network.mllm, model.network.transformer, model.vae, byte_tokenizer(), model.pictures, "tiny")


# ----------------------------------------------------------------------------------------------------------------------- sizes


def test_the_twin_is_small(model) -> None:
    count = sum(p.numel() for network in model.networks for p in network.parameters())
    assert 1e6 < count < 4e6 and count == model.identity()["parameters"]


def test_rounded_weights_make_the_same_prompts() -> None:
    """In bfloat16 every part takes what the others give, and latents stay whole."""
    half = new_twin(0)
    half.network.to(torch.bfloat16)
    [response] = half.respond(PROMPTS[:1], "image", Generation(guidance=2.0, steps=3))
    assert response.image.size == (32, 32)
    assert half.draw([half.encode(PROMPTS[0], "image")], Generation(guidance=2.0, steps=2), [1]).dtype == torch.float32
    assert isinstance(half.respond([QUESTIONS[0]], "text", Generation(tokens=3, temperature=0.0))[0].text, str)
