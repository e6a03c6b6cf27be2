"""Harmon: templates, spans, sampler, buffers, and the states that a trace shows, on an untrained twin."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import byte_tokenizer

from unisonde.data import corebench
from unisonde.data.item import Item
from unisonde.data.tabletop import question_item, text_item
from unisonde.models.base import Generation, item_seed
from unisonde.models.harmon import SPECIAL_TOKENS, Harmon, prepare
from unisonde.models.parts import kl16
from unisonde.models.parts.checkpoint import empty
from unisonde.models.parts.harmon_network import KEYS, SIZES, Drawing, HarmonConfig, HarmonNetwork, last_ones, masked_counts, twin
from unisonde.models.parts.mar import MarSizes, stretched, to_latents, to_tokens
from unisonde.models.parts.text import pad
from unisonde.models.parts.token_diffusion import NoiseSchedule
from unisonde.models.trace import LayerStates, Reading, Trace, hooked
from unisonde.train.harmon import new_twin

STEPS = 5
DRAW = Generation(temperature=1.0, guidance=3.0, steps=STEPS)
WRITE = Generation(tokens=10, temperature=0.0)
PROMPTS = [text_item("composition", "test", 3, k, count) for k, count in enumerate((1, 3, 2))]
QUESTIONS = [question_item(category, "test", 3, k) for k, category in enumerate(("attribute", "logic", "coarse"))]
NAMES = [*(f"{step:04d}" for step in range(STEPS - 1)), "final"]
VISIBLE = [0, 4, 13, 27, 45]
"""Of 64 tokens in five steps: 64 - floor(64 cos(pi k / 10))."""


@pytest.fixture(scope="module")
def model() -> Harmon:
    return new_twin(0)


@pytest.fixture(scope="module")
def published() -> Harmon:
    """With a tokenizer of bytes, and pictures larger than positions are learnt for."""
    tokenizer = byte_tokenizer(SPECIAL_TOKENS)
    small = twin(len(tokenizer))
    config = HarmonConfig(small.llm, MarSizes.of({"img_size": 16}, small.mar), grid=6)
    torch.manual_seed(0)
    return Harmon(HarmonNetwork(config), new_twin(0).vae, tokenizer, "tiny")


def observed(model: Harmon, items: list[Item], task: str, settings: Generation, step: str = "all") -> tuple[dict, list]:
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
    encoded = published.encode(Item("a", "", "a red ring?"), "image")
    said = "<|im_start|>user\nGenerate an image: a red ring?<|im_end|>\n<|im_start|>assistant\n"
    assert published.tokenizer.decode(encoded.ids) == said
    [wish] = [s for s in encoded.spans if s.kind == "content"]
    assert published.tokenizer.decode(encoded.ids[wish.start : wish.stop]) == "a red ring?"
    nothing = published.assemble(Item("", "", ""), "image")
    assert published.tokenizer.decode(nothing.ids) == "<|im_start|>user\nGenerate an image.<|im_end|>\n<|im_start|>assistant\n"
    assert {s.kind for s in nothing.spans} == {"template"}


def test_the_template_of_a_question(published) -> None:
    encoded = published.encode(Item("a", "", "what is this?", Image.new("RGB", (40, 32))), "text")
    buffers = published.config.buffers
    marks = "<image>" * (36 + buffers)
    assert published.tokenizer.decode(encoded.ids) == (
        f"<|im_start|>user\n{marks}\nwhat is this?<|im_end|>\n<|im_start|>assistant\n"
    )
    shown = [(s.start, s.stop, s.kind) for s in encoded.spans if s.modality == "image"]
    first = encoded.picture.start
    assert shown == [(first, first + 36, "content"), (first + 36, first + 36 + buffers, "template")]
    assert len(encoded.picture) == 36 + buffers
    [question] = [s for s in encoded.spans if s.kind == "content" and s.modality == "text"]
    assert published.tokenizer.decode(encoded.ids[question.start : question.stop]) == "what is this?"


def test_the_template_of_text(published) -> None:
    encoded = published.encode(Item("a", "", "what is this?"), "text")
    assert published.tokenizer.decode(encoded.ids) == "<|im_start|>user\nwhat is this?<|im_end|>\n<|im_start|>assistant\n"
    assert not encoded.picture


def test_the_placeholder_may_be_written_by_a_user(published) -> None:
    """Features go where the picture is, whatever the question says."""
    encoded = published.encode(Item("a", "", "an <image> of what?", Image.new("RGB", (9, 9), "red")), "text")
    shown = 36 + published.config.buffers
    assert encoded.ids.count(published.tokenizer.convert_tokens_to_ids("<image>")) == shown + 1 and len(encoded.picture) == shown
    assert isinstance(published.respond([Item("a", "", "an <image>?", Image.new("RGB", (9, 9)))], "text", WRITE)[0].text, str)


def test_every_prompt_of_corebench_fits(shared) -> None:
    """Through the template of the published size, with a tokenizer of bytes, which makes far more tokens than the published one."""
    config = SIZES["1.5B"]
    model = Harmon(empty(lambda: HarmonNetwork(config)), kl16.build(), byte_tokenizer(SPECIAL_TOKENS), "Harmon-1.5B")
    items = corebench.read(shared / "data" / "t2i-corebench")
    assert len(items) == 1080 and config.window == 32768 - 1024 - 64
    for item in items:
        encoded = model.encode(item, "image")
        assert encoded.flags == () and [s.start for s in encoded.spans] == [0, *[s.stop for s in encoded.spans[:-1]]]
        [wish] = [s for s in encoded.spans if s.kind == "content"]
        assert model.tokenizer.decode(encoded.ids[wish.start : wish.stop]) == item.prompt
        assert encoded.spans[-1].stop == len(encoded.ids) and not encoded.picture


# ----------------------------------------------------------------------------------------------------- buffers, positions, order


def test_buffers_come_first_for_the_encoder_and_last_for_the_language_model(model) -> None:
    """The buffers' features change with the picture, so they are told apart by what stands in their place at the encoder's start."""
    config, b = model.config, model.config.buffers
    tokens = torch.randn(1, 64, config.mar.channels, generator=torch.Generator().manual_seed(0))
    seen, features = model.network.see(tokens)
    assert seen.shape == (1, 64 + b, config.mar.encoder_embed_dim) and features.shape == (1, 64 + b, config.llm.hidden_size)
    projected = model.network.proj_in(seen)
    assert torch.equal(features[:, 64:], projected[:, :b]) and torch.equal(features[:, :64], projected[:, b:])
    # And back, for the decoder: what the language model says of a buffer is added to that buffer.
    states = torch.zeros_like(features)
    with torch.no_grad():
        plain = model.network.vectors(seen, states, torch.ones(1, 64, dtype=torch.bool))
        states[:, 65] = 1.0  # the second buffer
        entered = []
        handle = model.network.mar.decoder_embed.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        moved = model.network.vectors(seen, states, torch.ones(1, 64, dtype=torch.bool))
        model.network.vectors(seen, torch.zeros_like(states), torch.ones(1, 64, dtype=torch.bool))
        handle.remove()
    changed = (entered[0] - entered[1]).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [1] and not torch.allclose(plain, moved)


def test_positions_skip_padding(model) -> None:
    rows = [model.encode(item, "image").ids for item in PROMPTS]
    ids, mask = pad(rows, model.end_id, "right")
    drawing = Drawing(model.network, ids, mask)
    there, places = drawing.layout(9)
    longest = max(map(len, rows))
    assert len({len(row) for row in rows}) > 1
    for k, row in enumerate(rows):
        assert there[k].tolist() == [True] * len(row) + [False] * (longest - len(row)) + [True] * 9
        assert places[k].tolist() == list(range(len(row), len(row) + 9))


@torch.inference_mode()
def test_a_padded_prompt_equals_the_same_prompt_unpadded(model) -> None:
    rows = [model.encode(item, "image").ids for item in PROMPTS]
    features = torch.randn(3, 12, 160, generator=torch.Generator().manual_seed(0))
    together = Drawing(model.network, *pad(rows, model.end_id, "right"))
    prompts, states = together.read_prompts(), together.states(features)
    again = together.states(features)  # the prompts alone stay in the cache
    for k, row in enumerate(rows):
        alone = Drawing(model.network, *pad([row], model.end_id, "right"))
        assert (alone.read_prompts()[0] - prompts[k, : len(row)]).abs().max() < 1e-5
        assert (alone.states(features[k : k + 1])[0] - states[k]).abs().max() < 1e-5
    assert torch.allclose(states, again, atol=1e-6)


def test_tokens_fall_as_a_cosine_to_one_and_last_to_none() -> None:
    counts = list(masked_counts(1024, 64))
    assert counts[0] == 1023 and counts[-2:] == [25, 0] and 1024 - counts[-2] == 999
    assert all(a > b for a, b in zip([1024, *counts], counts, strict=False))
    assert list(masked_counts(64, STEPS)) == [64 - v for v in VISIBLE[1:]] + [0]
    assert list(masked_counts(16, 4)) == [14, 11, 6, 0] and list(masked_counts(7, 1)) == [0]
    assert list(masked_counts(2, 5)) == [1, 1, 1, 1, 0]  # more steps than tokens: some draw nothing


def test_the_first_of_an_order_are_drawn_last() -> None:
    orders = torch.tensor([[2, 0, 3, 1], [1, 2, 0, 3]])
    assert last_ones(orders, 2).int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]
    assert last_ones(orders, 4).all() and not last_ones(orders, 0).any()


# ----------------------------------------------------------------------------------------------------------------------- drawing


def test_recorded_steps_are_the_passes_of_sampling(model) -> None:
    states, traced = observed(model, PROMPTS, "image", DRAW)
    passes = defaultdict(list)
    with hooked(model.stacks[0], lambda layer, output: passes[layer].append(output.clone())):
        plain = model.respond(PROMPTS, "image", DRAW, 5)
    assert all(same(a, b) for a, b in zip(traced, plain, strict=True))
    assert {step for step, _, _ in states} == {"single", *NAMES, "clean"}
    for layer in range(model.stacks[0].depth + 2):
        assert len(passes[layer]) == 1 + STEPS
        for number, step in enumerate(["single", *NAMES]):
            for item in range(3):
                seen = states[step, layer, item].states
                assert (seen - passes[layer][number][item, : len(seen)]).abs().max() < 1e-5
    assert (states["0003", 2, 0].states[:4] - passes[2][STEPS][0, :4]).abs().max() > 1e-3  # another step has other states


def test_visible_tokens_of_each_step(model) -> None:
    states, responses = observed(model, PROMPTS[:2], "image", DRAW)
    buffers = model.config.buffers
    for item in range(2):
        for step, visible in [*zip(NAMES, VISIBLE, strict=True), ("clean", 64)]:
            seen = states[step, 0, item]
            assert len(seen.states) == visible + buffers and len(seen.select("response", Reading())) == visible
            assert {(s.role, s.modality) for s in seen.spans} == {("response", "image")}
            assert [(s.start, s.stop) for s in seen.spans if s.kind == "template"] == [(visible, visible + buffers)]
        prompt = states["single", 0, item]
        assert prompt.modalities("prompt") == ("text",) and {s.role for s in prompt.spans} == {"prompt"}
        assert responses[item].tokens == 64
    assert {item for _, _, item in states} == {0, 1}  # the unconditional half is never seen
    assert {step for step, _, _ in observed(model, PROMPTS[:1], "image", DRAW, "final")[0]} == {"single", "final"}
    assert {step for step, _, _ in observed(model, PROMPTS[:1], "image", DRAW, "clean")[0]} == {"single", "clean"}


@torch.inference_mode()
def whole_pass(model: Harmon, prompt: list[int], features: torch.Tensor) -> list[torch.Tensor]:
    """The long way: prompt and image features in one causal pass without a cache: states by layer, (L, D)."""
    inputs = torch.cat([model.network.embed(torch.tensor(prompt)), features])[None]
    layers: dict[int, torch.Tensor] = {}
    with hooked(model.stacks[0], lambda layer, output: layers.__setitem__(layer, output[0].clone())):
        model.network.llm.model(inputs_embeds=inputs, position_ids=torch.arange(inputs.shape[1])[None], use_cache=False)
    return [layers[layer] for layer in sorted(layers)]


@torch.inference_mode()
def long_way(model: Harmon, item: Item, settings: Generation) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The published sampler written out for one item: rows one by one, tokens one by one, no cache, numbers in plain Python; its
    tokens (n, c) and the features that entered each step of the conditional branch."""
    network, config = model.network, model.config
    table = NoiseSchedule.named(config.mar.num_sampling_steps)
    n, channels, inner = config.tokens, config.mar.channels, len(table)
    generator = torch.Generator().manual_seed(item_seed(5, item))
    order = torch.randperm(n, generator=generator).tolist()
    prompts = [model.encode(item, "image").ids, model.assemble(Item("", "", ""), "image").ids]
    known: dict[int, torch.Tensor] = {}
    entered = {}
    for step in range(settings.steps):
        stay = max(1, min(n - len(known) - 1, math.floor(n * math.cos(math.pi / 2 * (step + 1) / settings.steps))))
        wanted = sorted(place for place in order[0 if step == settings.steps - 1 else stay :] if place not in known)
        grid = torch.zeros(1, n, channels)
        visible = torch.zeros(1, n, dtype=torch.bool)
        for place, token in known.items():
            grid[0, place], visible[0, place] = token, True
        seen, features = network.see(grid, visible)
        entered[NAMES[step]] = features[0]
        vectors = []
        for prompt in prompts:
            states = whole_pass(model, prompt, features[0])[-1][len(prompt) :]
            vectors.append(network.vectors(seen, states[None], visible)[0])
        noise = torch.randn(inner + 1, len(wanted), channels, generator=generator)
        for number, place in enumerate(wanted):
            x = noise[0, number]
            for count, k in enumerate(reversed(range(inner)), 1):
                t = torch.tensor([int(table.timesteps[k])])
                (eps, share), (other, _) = (network.mar.diffloss.net(x[None], t, v[None, place])[0].chunk(2) for v in vectors)
                eps = other + settings.guidance * (eps - other)
                alpha, before = float(table.kept[k]), float(table.kept[k - 1]) if k else 1.0
                beta = 1 - alpha / before
                data = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
                x = (math.sqrt(before) * beta * data + math.sqrt(alpha / before) * (1 - before) * x) / (1 - alpha)
                if k:
                    low, high = math.log(beta * (1 - before) / (1 - alpha)), math.log(beta)
                    x = x + settings.temperature * torch.exp((low + (share + 1) / 2 * (high - low)) / 2) * noise[count, number]
            known[place] = x
    return torch.stack([known[place] for place in range(n)]), entered


def test_tokens_and_states_equal_the_published_loop(model) -> None:
    settings = Generation(temperature=0.9, guidance=2.0, steps=STEPS)
    items = [PROMPTS[1], PROMPTS[0]]
    states, _ = observed(model, items, "image", settings)
    drawn = model.draw([model.encode(item, "image") for item in items], settings, [item_seed(5, item) for item in items])
    tokens, entered = long_way(model, items[0], settings)
    assert (drawn[0] - tokens).abs().max() < 1e-3 * tokens.abs().max()
    prompt = model.encode(items[0], "image").ids
    for step in NAMES[:3]:
        for layer, theirs in enumerate(whole_pass(model, prompt, entered[step])):
            scale = max(1.0, float(theirs.abs().max()))
            assert (theirs[len(prompt) :] - states[step, layer, 0].states).abs().max() < 1e-3 * scale


def test_a_recorded_steps_input_run_again_in_one_piece(model) -> None:
    states, _ = observed(model, PROMPTS[:2], "image", DRAW)
    for item in range(2):
        prompt = model.encode(PROMPTS[item], "image").ids
        for step in (*NAMES, "clean"):
            for layer, again in enumerate(whole_pass(model, prompt, states[step, 0, item].states)):
                assert (again[len(prompt) :] - states[step, layer, item].states).abs().max() < 1e-5
                # The prompt's states do not depend on the step.
                assert (again[: len(prompt)] - states["single", layer, item].states).abs().max() < 1e-5


def test_the_clean_pass_sees_the_finished_picture(model) -> None:
    """As the picture is seen when it is read, but behind the text."""
    states, _ = observed(model, PROMPTS[:1], "image", DRAW, "clean")
    prompt = model.encode(PROMPTS[0], "image")
    drawn = model.draw([prompt], DRAW, [item_seed(5, PROMPTS[0])])
    with torch.inference_mode():
        [features] = model.network.see(drawn)[1]
    for layer, layer_states in enumerate(whole_pass(model, prompt.ids, features)):
        assert (layer_states[len(prompt.ids) :] - states["clean", layer, 0].states).abs().max() < 1e-5


def test_guidance_of_one_is_the_conditional_branch() -> None:
    model = new_twin(0)
    with torch.no_grad():  # an untrained head takes everything for noise, whatever it is told
        for weight in model.network.mar.diffloss.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    prompts = [model.encode(PROMPTS[0], "image")]
    plain = model.draw(prompts, Generation(temperature=1.0, guidance=1.0, steps=3), [0])
    almost = model.draw(prompts, Generation(temperature=1.0, guidance=1.0 + 1e-9, steps=3), [0])
    other = model.draw(prompts, Generation(temperature=1.0, guidance=3.0, steps=3), [0])
    size = plain.abs().max()  # an untrained head draws large tokens
    assert (plain - almost).abs().max() < 1e-5 * size and (plain - other).abs().max() > 1e-2 * size


def test_one_step_sees_nothing_of_the_picture(model) -> None:
    settings = Generation(temperature=1.0, guidance=2.0, steps=1)
    states, [response] = observed(model, PROMPTS[:1], "image", settings)
    assert {step for step, _, _ in states} == {"single", "final", "clean"} and response.image.size == (32, 32)
    assert len(states["final", 0, 0].select("response", Reading())) == 0
    assert len(states["clean", 0, 0].select("response", Reading())) == 64


def test_seeds_are_the_items(model) -> None:
    images = [model.respond(PROMPTS[:1], "image", DRAW, seed)[0].image.tobytes() for seed in (0, 0, 1)]
    assert images[0] == images[1] != images[2]


def test_pictures_larger_than_positions_are_learnt_for(published) -> None:
    states, [response] = observed(published, [Item("a", "", "a red ring")], "image", DRAW, "clean")
    assert response.image.size == (24, 24) and response.tokens == 36
    assert len(states["clean", 0, 0].select("response", Reading())) == 36


# -------------------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("items", [QUESTIONS, PROMPTS])
def test_teacher_forcing_gives_the_states_of_writing(model, items) -> None:
    states, [response] = observed(model, items[:1], "text", WRITE)
    steps = defaultdict(list)
    with hooked(model.stacks[0], lambda layer, output: steps[layer].append(output[0].clone())):
        [again] = model.respond(items[:1], "text", WRITE, 5)
    assert same(response, again)
    for layer in range(model.stacks[0].depth + 2):
        generated, forced = torch.cat(steps[layer]), states["single", layer, 0].states
        assert len(forced) - len(generated) == 1  # the last token's state is in the teacher-forced pass alone
        assert (forced[: len(generated)] - generated).abs().max() < 1e-5


def test_a_picture_is_read_through_the_encoder(model) -> None:
    states, _ = observed(model, QUESTIONS[:1], "text", WRITE)
    prompt = model.encode(QUESTIONS[0], "text")
    seen = states["single", 0, 0]
    assert len(seen.select("prompt", Reading(), "image")) == 64
    with torch.inference_mode():
        [features] = model.network.see(model.tokens_of(prompt.pixels[None]))[1]
    at = slice(prompt.picture.start, prompt.picture.stop)
    assert torch.allclose(seen.states[at], features, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "items", "settings"),
    [
        ("image", PROMPTS, DRAW),
        *(("text", i, Generation(tokens=10, temperature=t)) for i in (QUESTIONS, PROMPTS) for t in (0.0, 1.0)),
        ("text", [PROMPTS[0], QUESTIONS[1], PROMPTS[2]], WRITE),
    ],
)
def test_batch_of_one_equals_batch_of_many(model, task, items, settings) -> None:
    together, responses = observed(model, items, task, settings)
    for k, item in enumerate(items):
        alone, [response] = observed(model, [item], task, settings)
        assert response.text == responses[k].text
        if response.image is not None:  # the same tokens up to rounding; a pixel may fall to the neighbouring level
            assert abs(np.asarray(response.image, int) - np.asarray(responses[k].image, int)).max() <= 1
        for (step, layer, _), seen in alone.items():
            assert seen.spans == together[step, layer, k].spans
            assert (seen.states - together[step, layer, k].states).abs().max() < 5e-5


# -------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("item", "task", "said"),
    [
        (Item("a", "c", "  "), "image", "item 'a' has an empty prompt"),
        (Item("a", "c", "a large green dragon"), "image", "does not know the words dragon of item 'a'"),
        (Item("a", "c", "a red ring", Image.new("RGB", (4, 4))), "image", "draws from text prompts alone"),
        (Item("a", "c", "a red ring " * 200), "text", "takes 60. positions .* room for 502"),
        (Item("a", "c", "a red ring " * 200), "image", "takes 61. positions .* room for 432"),
    ],
)
def test_prompts_that_cannot_be_taken(model, item, task, said) -> None:
    with pytest.raises(ValueError, match=said):
        model.respond([item], task, WRITE if task == "text" else DRAW)


def test_a_long_prompt_is_cut(model) -> None:
    item = Item("a", "c", "a red ring " * 200)
    encoded = model.encode(item, "image", truncate=True)
    template = model.assemble(Item("", "", "a"), "image").ids
    assert encoded.flags == ("cut",) and len(encoded.ids) == 512 - 64 - model.config.buffers and encoded.ids[-4:] == template[-4:]
    [response] = model.respond([item], "image", Generation(temperature=1.0, guidance=1.0, steps=2), truncate=True)
    assert response.flags == ("cut",)


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "L", "1"])
@pytest.mark.parametrize("size", [(1, 1), (50, 20)])
def test_pictures_of_any_kind_are_read(model, mode, size) -> None:
    item = Item("a", "c", QUESTIONS[0].prompt, Image.new(mode, size))
    assert isinstance(model.respond([item], "text", Generation(tokens=2, temperature=0.0))[0].text, str)


def test_parts_must_belong_together(model) -> None:
    with pytest.raises(ValueError, match=r"lacks <\|im_start\|>, .* it is not Harmon's"):
        Harmon(model.network, model.vae, byte_tokenizer(), "x")
    with pytest.raises(ValueError, match=r"has 26\d tokens, its network \d+"):
        Harmon(model.network, model.vae, byte_tokenizer([*SPECIAL_TOKENS]), "x")
    with pytest.raises(ValueError, match="makes 16 channels of 16 pixels a side, its network takes 3 of 1"):
        Harmon(model.network, kl16.build(), model.tokenizer, "x")


# ------------------------------------------------------------------------------------------------------------ pictures and sizes


def test_pictures_are_made_square_with_grey() -> None:
    picture = Image.new("RGB", (64, 32), (255, 0, 0))
    pixels = prepare(picture, 64)
    assert pixels.shape == (3, 64, 64)
    assert torch.equal(pixels[:, 16:48], torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 32, 64))
    grey = torch.cat([pixels[:, :16], pixels[:, 48:]])
    assert torch.allclose(grey, torch.tensor(127 / 127.5 - 1))
    assert prepare(Image.new("RGB", (100, 70), "white"), 32).shape == (3, 32, 32)
    assert prepare(Image.new("RGB", (7, 7), "white"), 32).min() == 1


def test_squares_of_latents_and_back() -> None:
    latents = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    tokens = to_tokens(latents, 4)
    assert tokens.shape == (2, 4, 48) and torch.equal(to_latents(tokens, 4), latents)
    # The channel is the slowest within a token, then the row; tokens go row by row.
    assert torch.equal(tokens[0, 1].view(3, 4, 4), latents[0, :, :4, 4:])
    assert torch.equal(to_tokens(latents, 1), latents.flatten(2).transpose(1, 2))


def test_positions_are_stretched() -> None:
    rows = torch.arange(4.0).repeat_interleave(4)
    table = torch.stack([rows, rows.view(4, 4).T.flatten()], -1)[None]
    assert torch.equal(stretched(table, 4, 4), table)
    wide = stretched(table, 4, 8)[0].T.unflatten(-1, (8, 8))
    assert torch.allclose(wide[0], wide[1].T) and (wide[0].diff(dim=0) >= 0).all()
    assert wide[0, :, 0].tolist() == [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]


def test_the_noise_schedule() -> None:
    full, few = NoiseSchedule.named(1000), NoiseSchedule.named("100")
    assert few.timesteps[0] == 0 and few.timesteps[-1] == 999 and len(set(few.timesteps)) == 100
    assert np.allclose(few.kept, full.kept[few.timesteps]) and full.betas.max() == 0.999
    assert np.allclose(full.kept[:-1], np.cos((np.arange(1, 1000) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(
        0.008 / 1.008 * np.pi / 2) ** 2)  # fmt: skip
    # The mean of the step before, given the data exactly, is that data where no noise was added.
    assert few.data_weight[0] == pytest.approx(1) and few.noisy_weight[0] == 0
    assert (few.least[1:] < few.most[1:]).all() and few.least[0] == few.least[1]
    assert NoiseSchedule.named("ddim50").timesteps.tolist() == list(range(0, 1000, 20))
    for wrong in ("1001", "0", "ddim7", "fast", "-3"):
        with pytest.raises(ValueError, match=f"of 1000 diffusion steps .* got '{wrong}'"):
            NoiseSchedule.named(wrong)
    assert len(NoiseSchedule.named(1)) == 1


def manifest(path) -> dict[str, tuple[int, ...]]:
    pairs = (line.split("\t") for line in path.read_text().splitlines() if line)
    return {key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for key, shape in pairs}


@pytest.mark.parametrize(("size", "file", "billions"), [("1.5B", "harmon_1_5b", 2.561), ("0.5B", "harmon_0_5b", None)])
def test_published_sizes_cover_the_manifest(shared, size, file, billions) -> None:
    theirs = manifest(shared / "manifests" / f"{file}.keys.txt")
    inside = {key.removeprefix("vae."): shape for key, shape in theirs.items() if key.startswith("vae.")}
    rest = {key: shape for key, shape in theirs.items() if not key.startswith("vae.")}
    with torch.device("meta"):
        network = HarmonNetwork(SIZES[size])
    ours = {key: tuple(value.shape) for key, value in network.state_dict().items() if not KEYS.lacks(key)}
    assert KEYS.shapes(rest) == ours
    assert [key for key in rest if KEYS.ignores(key)] == ["llm.lm_head.weight", "mar.class_emb.weight"]

    flat = dict(kl16.as_matrices((key, torch.empty(shape, device="meta")) for key, shape in inside.items()))
    keys, vae = kl16.keys_of(), kl16.build()
    assert keys.shapes({key: tuple(t.shape) for key, t in flat.items()}) == {k: tuple(v.shape) for k, v in vae.state_dict().items()}
    assert not any(keys.ignores(key) for key in inside)
    counted = [math.prod(shape) for key, shape in theirs.items() if key != "llm.lm_head.weight"]
    parts = sum(p.numel() for part in (network, vae) for p in part.parameters())
    assert parts == sum(counted) - math.prod(theirs["mar.class_emb.weight"])
    if billions:
        assert sum(counted) / 1e9 == pytest.approx(billions, abs=0.0006)
        assert sum(p.numel() for p in vae.parameters()) / 1e6 == pytest.approx(66.5, abs=0.05)


def test_the_twin_is_small(model) -> None:
    assert 1e6 < sum(p.numel() for network in model.networks for p in network.parameters()) < 4e6


def test_rounded_weights(model) -> None:
    """In bfloat16 every part takes what the others give; the autoencoder stays in float32."""
    half = new_twin(0)
    half.network.to(torch.bfloat16)
    assert half.respond(PROMPTS[:1], "image", Generation(temperature=1.0, guidance=2.0, steps=3))[0].image.size == (32, 32)
    assert isinstance(half.respond([QUESTIONS[0]], "text", Generation(tokens=3, temperature=0.0))[0].text, str)


def test_configurations() -> None:
    assert HarmonConfig.of({}, 1536) == SIZES["1.5B"] and HarmonConfig.of({}, 896) == SIZES["0.5B"]
    raw = {"model_type": "harmon", "llm": {"rope_theta": 1e5}, "mar": {"num_sampling_steps": "50", "class_num": 1000}}
    changed = HarmonConfig.of(raw, 896)
    assert (changed.llm.rope_theta, changed.mar.num_sampling_steps, changed.mar.diffloss_w) == (1e5, "50", 1024)
    assert HarmonConfig.of(twin(100).to_dict(), 160) == twin(100)
    with pytest.raises(ValueError, match=r"the width 77 is of no known Harmon; there are 1536 \(1.5B\), 896 \(0.5B\)"):
        HarmonConfig.of({}, 77)
    assert SIZES["1.5B"].mar.grid == 16 and SIZES["1.5B"].tokens == 1024
