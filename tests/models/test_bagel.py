"""BAGEL: templates, layouts, guidance, spans, and the states that a trace shows, on a twin of random weights."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import byte_tokenizer

from unisonde.data import corebench
from unisonde.data.item import Item
from unisonde.data.tabletop import question_item, text_item
from unisonde.models.bagel import (
    BEGIN_IMAGE,
    BOS,
    END_IMAGE,
    EOS,
    SPECIAL_TOKENS,
    Bagel,
    Encoded,
    arrange,
    normals,
    read_rows,
)
from unisonde.models.base import Generation, item_seed
from unisonde.models.parts.bagel_flow import EDITING, Canvas, Context, Contexts, Guidance, flow_times
from unisonde.models.parts.bagel_network import (
    BagelNetwork,
    Owners,
    routed,
    squares,
    twin,
    visible,
)
from unisonde.models.trace import LayerStates, Reading, Span, Trace, hooked
from unisonde.train.bagel import initialise, new_twin

DRAW = Generation(guidance=3.0, steps=5)
WRITE = Generation(tokens=10, temperature=0.0)
PROMPTS = [text_item("composition", "test", 3, k, count) for k, count in enumerate((1, 3, 2))]
QUESTIONS = [question_item(category, "test", 3, k) for k, category in enumerate(("attribute", "logic", "coarse"))]
STEPS = ["0000", "0001", "0002", "final"]


def alive(model: Bagel) -> Bagel:
    """Random weights throughout, the experts different: those of a new twin are alike, and its velocity is zero."""
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            if "_moe_gen" in name or name.startswith("llm2vae"):
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
                weight.add_(0.5 * noise * weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.2 * noise)
    return model


@pytest.fixture(scope="module")
def model() -> Bagel:
    return alive(new_twin(0))


@pytest.fixture(scope="module")
def bytewise(model) -> Bagel:
    """With a tokenizer of bytes, and a window as large as the published one."""
    tokenizer = byte_tokenizer(SPECIAL_TOKENS)
    config = replace(twin(len(tokenizer)), positions=32768)
    torch.manual_seed(0)
    network = BagelNetwork(config)
    initialise(network, 0)
    return alive(Bagel(network, model.vae, tokenizer, "tiny"))


def observed(model: Bagel, items: list[Item], task: str, settings: Generation, step: str = "all") -> tuple[dict, list]:
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


def test_the_templates(bytewise) -> None:
    def written(item: Item, task: str) -> str:
        return bytewise.tokenizer.decode(bytewise.encode(item, task).ids)

    assert written(Item("a", "", "a red ring?"), "image") == f"{BOS}a red ring?{EOS}"
    assert written(Item("a", "", "a red ring?"), "text") == f"{BOS}a red ring?{EOS}{BOS}"
    shown = Item("a", "", "what is this?", Image.new("RGB", (32, 32)))
    assert written(shown, "text") == f"{BEGIN_IMAGE}{BEGIN_IMAGE * 64}{END_IMAGE}{BOS}what is this?{EOS}{BOS}"
    picture = f"{BEGIN_IMAGE}{BEGIN_IMAGE * 64}{END_IMAGE}"
    assert written(shown, "image") == f"{picture}{picture}{BOS}what is this?{EOS}"  # as latents, and as it is seen
    assert bytewise.defaults("image") == Generation(guidance=4.0, steps=50)
    assert bytewise.defaults("text") == Generation(tokens=1000, temperature=0.0)
    assert bytewise.guidance == Guidance(4.0, 1.0, 0.4, 1.0, "global", 0.0)
    assert Guidance(4.0, 2.0, 0.0, 1.0, "text_channel", 0.0) == EDITING


def test_spans_of_a_question(model) -> None:
    encoded = model.encode(QUESTIONS[0], "text")
    words = model.tokenizer.convert_ids_to_tokens(encoded.ids)
    image, text = (s for s in encoded.spans if s.kind == "content")
    assert (image.start, len(image), image.modality) == (1, 64, "image") and words[0] == BEGIN_IMAGE and words[65] == END_IMAGE
    assert words[text.start : text.stop] == model.tokenizer.tokenize(QUESTIONS[0].prompt) and words[text.start - 1] == BOS
    assert words[text.stop :] == [EOS, BOS]


def test_spans_of_drawing(model) -> None:
    states, [response] = observed(model, PROMPTS[:1], "image", DRAW)
    words = model.tokenizer.convert_ids_to_tokens(model.encode(PROMPTS[0], "image").ids)
    prompt = states["single", 0, 0]
    [text] = [s for s in prompt.spans if s.kind == "content"]
    assert words[text.start : text.stop] == model.tokenizer.tokenize(PROMPTS[0].prompt)
    assert prompt.modalities("response") == () and prompt.modalities("prompt") == ("text",)
    spans = states["final", 0, 0].spans
    assert [(s.start, s.stop, s.role, s.modality, s.kind) for s in spans] == [
        (0, 1, "response", "text", "template"),
        (1, 65, "response", "image", "content"),
        (65, 66, "response", "text", "template"),
    ]
    assert response.tokens == 64 == len(states["final", 5, 0].select("response", Reading()))


def test_a_picture_takes_one_place() -> None:
    spans = [
        Span(0, 1, "prompt", "text"),
        Span(1, 4, "prompt", "image"),
        Span(4, 7, "prompt", "text"),
        Span(7, 9, "prompt", "image"),
    ]
    layout = arrange([*spans, Span(9, 12, "prompt", "text")], latents=1)
    assert layout.places == [0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 3, 4]
    assert layout.blocks == [0, 0, 0, 0, 0, -1, 1, 1, 1, 1, -1, -1]
    assert [int(k) for k in layout.filled] == [0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0]
    assert [int(k) for k in layout.drawn] == [0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    words = arrange([Span(0, 3, "prompt", "text")])
    assert words.places == [0, 1, 2] and words.blocks == [-1] * 3 and not any(words.filled)


def test_a_picture_is_seen_whole_and_text_from_before() -> None:
    blocks = torch.tensor([[-1, 0, 0, 0, 1, 1, -1]])
    there = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    seen = visible(blocks.expand(2, -1), there)
    for query in range(7):
        for key in range(7):
            inside = (1 <= query <= 3 and 1 <= key <= 3) or (4 <= query <= 5 and 4 <= key <= 5)
            assert bool(seen[0, 0, query, key]) == (key <= query or inside)
            assert bool(seen[1, 0, query, key]) == (((key <= query or inside) and key < 5) or key == query)


def test_all_published_prompts_are_taken(bytewise, shared) -> None:
    items = corebench.read(shared / "data" / "t2i-corebench")
    assert len(items) == 1080
    for item in items:
        encoded = bytewise.encode(item, "image")
        [text] = [span for span in encoded.spans if span.kind == "content"]
        assert bytes(bytewise.tokenizer.decode(encoded.ids[text.start : text.stop]), "utf8") == item.prompt.encode()
        assert encoded.flags == () and (text.start, text.stop) == (1, len(encoded.ids) - 1)
        assert encoded.layout().places == list(range(len(encoded.ids)))


# ----------------------------------------------------------------------------------------------------------------------- experts


def test_each_position_goes_to_its_expert() -> None:
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    und, gen = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    drawn = torch.tensor([[False, True, True, False, False], [True, False, True, False, True]])
    out = routed(x, Owners.of(drawn), und, gen)
    assert torch.allclose(out, torch.where(drawn[..., None], gen(x), und(x)), atol=1e-6)
    assert Owners.of(torch.zeros(2, 5, dtype=torch.bool)) is None and torch.equal(routed(x, None, und, gen), und(x))
    out.sum().backward()
    assert und.weight.grad is not None and gen.weight.grad is not None


@torch.inference_mode()
def test_a_state_is_that_of_the_expert_that_owns_the_position(model) -> None:
    """Without one expert's weights, its positions alone do not change in the last part of a layer and in the last norm."""
    network, stack = model.network, model.network.stack
    prompt, canvas = (
        model.encode(PROMPTS[0], "image"),
        Canvas(model.network, model.marks.begin_image, model.marks.end_image, (8, 8)),
    )
    _, context = read_rows(network, [prompt.ids], [prompt.layout()], [], 0, "right")
    latents = normals([1], (64, 64))
    layers: dict[int, torch.Tensor] = {}
    with hooked(stack, lambda layer, states: layers.__setitem__(layer, states[0].clone())):
        canvas.velocity(latents, torch.tensor(0.5), context)
    last = layers[stack.depth]
    decoder = network.language_model.model
    assert torch.allclose(layers[stack.final][1:-1], decoder.norm_moe_gen(last[1:-1]), atol=1e-6)
    assert torch.allclose(layers[stack.final][[0, -1]], decoder.norm(last[[0, -1]]), atol=1e-6)
    assert not torch.allclose(layers[stack.final][1:-1], decoder.norm(last[1:-1]), atol=1e-2)
    # The residual stream is one: what a latent token takes out of the feed-forward part is its expert's.
    final = decoder.layers[-1]
    inside: dict[str, torch.Tensor] = {}
    hooks = [
        final.mlp.register_forward_hook(lambda m, a, out: inside.__setitem__("und", out.clone())),
        final.mlp_moe_gen.register_forward_hook(lambda m, a, out: inside.__setitem__("gen", out.clone())),
    ]
    canvas.velocity(latents, torch.tensor(0.5), context)
    for hook in hooks:
        hook.remove()
    assert inside["und"].shape[0] == 2 and inside["gen"].shape[0] == 64


# ---------------------------------------------------------------------------------------------------------------- guidance, time


def test_times_run_from_noise_to_data() -> None:
    t = flow_times(50)
    assert len(t) == 50 and t[0] == 1 and t[-1] == 0 and (t.diff() < 0).all()
    assert float(t[-2]) == pytest.approx(0.0588, abs=1e-4)
    assert float(flow_times(3)[1]) == 0.75


def test_guidance_holds_in_its_interval(model) -> None:
    """Of the 49 published steps those at t > 0.4 make a second pass."""
    guidance = Guidance()
    times = flow_times(50)[:-1]
    guided = [guidance.applies(t) for t in times]
    assert guided == [float(t) > 0.4 for t in times] and sum(guided) == 41
    assert not guidance.applies(torch.tensor(0.4)) and guidance.applies(torch.tensor(1.0))
    assert not Guidance(text=1.0).applies(torch.tensor(1.0)) and Guidance(above=0.0).applies(torch.tensor(0.01))
    passes = []
    with hooked(model.network.stack, lambda layer, states: passes.append(layer) if layer == 0 else None):
        model.respond(PROMPTS[:1], "image", Generation(guidance=4.0, steps=50))
    assert len(passes) == 1 + 49 + 41


@given(st.integers(0, 10**6), st.sampled_from(["global", "channel", "text_channel"]), st.sampled_from([1.0, 2.0]))
@settings(max_examples=30, deadline=None)
def test_guidance_against_its_definition(seed, norm, image) -> None:
    c, u, i = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    guidance = Guidance(4.0, image, 0.0, 1.0, norm, 0.3)
    ours = guidance(c, u, i) if image > 1 else guidance(c, u)
    for row in range(2):
        v = u[row] + 4 * (c[row] - u[row])
        if norm == "text_channel":
            v = v * (c[row].norm(dim=-1) / v.norm(dim=-1)).clamp(0.3, 1)[:, None]
        if image > 1:
            v = i[row] + image * (v - i[row])
        if norm == "channel":
            v = v * (c[row].norm(dim=-1) / v.norm(dim=-1)).clamp(0.3, 1)[:, None]
        if norm == "global":
            v = v * (c[row].norm() / v.norm()).clamp(0.3, 1)
        assert torch.allclose(ours[row], v, atol=1e-6)


def test_renormalisation_shortens_and_never_lengthens() -> None:
    c, u = torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    assert torch.allclose(Guidance(4.0)(c, u), c, atol=1e-6)  # four times as long, cut back
    assert torch.allclose(Guidance(4.0, least=1.0)(c, u), 4 * c)  # none at all
    assert torch.allclose(Guidance(1.5)(c, 2 * c), 0.5 * c, atol=1e-6)  # shorter than the conditional one: left alone


def test_guidance_of_one_is_the_conditional_branch(model) -> None:
    prompts = [model.encode(PROMPTS[0], "image")]
    [plain] = model.draw(prompts, Generation(guidance=1.0, steps=4), [1])
    [almost] = model.draw(prompts, Generation(guidance=1.0 + 1e-7, steps=4), [1])
    [guided] = model.draw(prompts, Generation(guidance=3.0, steps=4), [1])
    assert torch.allclose(plain, almost, atol=1e-4) and (plain - guided).abs().max() > 1e-3


@torch.inference_mode()
def published_loop(model: Bagel, item: Item, guidance: Guidance, steps: int) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """The long way: each pass over the whole sequence, without keys and values kept; and the states of its picture."""
    network, marks, stack = model.network, model.marks, model.network.stack
    prompt = model.encode(item, "image")
    x = normals([item_seed(5, item)], (64, model.config.values))
    times = [3 * (1 - k / (steps - 1)) / (1 + 2 * (1 - k / (steps - 1))) for k in range(steps)]
    passes: list[list[torch.Tensor]] = []

    def velocity(before: list[int], t: float) -> torch.Tensor:
        ids = torch.tensor([[*before, marks.begin_image, *[0] * 64, marks.end_image]])
        start = len(before)
        embeddings = network.words(ids).clone()
        embeddings[:, start + 1 : -1] = network.drawn(x, torch.tensor([t]), (8, 8))
        places = torch.tensor([[*range(start), *[start] * 66]])
        seen = torch.ones(start + 66, start + 66).tril().bool()
        seen[start:] = True
        drawn = torch.zeros_like(ids, dtype=torch.bool)
        drawn[:, start + 1 : -1] = True
        passes.append([])
        with hooked(stack, lambda layer, states: passes[-1].append(states[0, start:].clone())):
            states, _ = network.read(embeddings, places, seen[None, None], Owners.of(drawn))
        return network.llm2vae(states[:, start + 1 : -1])

    for now, then in pairwise(times):
        v = velocity(prompt.ids, now)
        if guidance.above < now <= guidance.until:
            u = velocity([], now)
            passes.pop()
            mixed = u + guidance.text * (v - u)
            v = mixed * (v.norm() / mixed.norm()).clamp(0, 1)
        x = x - (now - then) * v
    return x, passes


def test_latents_and_states_equal_the_published_loop(model) -> None:
    states, responses = observed(model, PROMPTS, "image", DRAW)
    drawn = model.draw([model.encode(i, "image") for i in PROMPTS], DRAW, [item_seed(5, i) for i in PROMPTS])
    latents, passes = published_loop(model, PROMPTS[1], replace(model.guidance, text=3.0), 5)
    assert (squares(drawn[1], 4) - latents[0]).abs().max() < 1e-4
    assert model.decode(drawn[1]).tobytes() == responses[1].image.tobytes()
    for step, layers in zip(STEPS, passes, strict=True):
        for layer, theirs in enumerate(layers):
            assert (states[step, layer, 1].states - theirs).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------------------- states of drawing


def test_recorded_steps_are_those_of_sampling(model) -> None:
    """Every pass of the sampler, seen by plain hooks without a trace: the conditional ones are those recorded."""
    items, stack = PROMPTS[:2], model.stacks[0]
    states, traced = observed(model, items, "image", DRAW)
    assert list(dict.fromkeys(key[0] for key in states)) == ["single", *STEPS, "clean"]
    passes = defaultdict(list)
    with hooked(stack, lambda layer, output: passes[layer].append(output.clone())):
        plain = model.respond(items, "image", DRAW, 5)
    assert all(same(one, other) for one, other in zip(plain, traced, strict=True))
    assert len(passes[0]) == 1 + 4 + 4  # the prompt; steps at t = 1, 0.9, 0.75, 0.5, all of them guided
    for number, step in enumerate(["single", *STEPS]):
        call = 0 if number == 0 else 2 * number - 1
        for layer in range(stack.depth + 2):
            for item in range(2):
                seen = states[step, layer, item].states
                assert (seen - passes[layer][call][item, : len(seen)]).abs().max() < 1e-5
    # The comparison can fail: another step has other states.
    assert (states["0002", 2, 0].states - passes[2][7][0]).abs().max() > 1e-3


@torch.inference_mode()
def test_a_recorded_steps_input_run_again_gives_its_states(model) -> None:
    """And prompt states in one sequence with the picture are those of the prompt alone, at every time."""
    states, _ = observed(model, PROMPTS[:1], "image", DRAW)
    prompt, network = model.encode(PROMPTS[0], "image"), model.network
    start = len(prompt.ids)
    for step in (*STEPS, "clean"):
        x = torch.cat([states["single", 0, 0].states, states[step, 0, 0].states])[None]
        places = torch.tensor([[*range(start), *[start] * 66]])
        seen = torch.ones(start + 66, start + 66).tril().bool()
        seen[start:] = True
        drawn = torch.zeros(1, start + 66, dtype=torch.bool)
        drawn[:, start + 1 : -1] = True
        layers = {}
        with hooked(network.stack, lambda layer, out, held=layers: held.__setitem__(layer, out[0].clone())):
            network.read(x, places, seen[None, None], Owners.of(drawn))
        for layer in range(network.stack.depth + 2):
            assert (layers[layer][:start] - states["single", layer, 0].states).abs().max() < 1e-5
            assert (layers[layer][start:] - states[step, layer, 0].states).abs().max() < 1e-5


def test_the_clean_pass_takes_the_finished_latents_in(model) -> None:
    states, [response] = observed(model, PROMPTS[:1], "image", DRAW, "clean")
    assert {key[0] for key in states} == {"single", "clean"}
    [latents] = model.draw([model.encode(PROMPTS[0], "image")], DRAW, [item_seed(5, PROMPTS[0])])
    assert model.decode(latents).tobytes() == response.image.tobytes()
    with torch.inference_mode():
        tokens = model.network.drawn(squares(latents[None], 4), torch.zeros(1), (8, 8))[0]
    assert torch.allclose(states["clean", 0, 0].states[1:-1], tokens, atol=1e-5)


def test_the_reading_decides_what_is_run(model) -> None:
    states, _ = observed(model, PROMPTS[:1], "image", DRAW, "final")
    assert {key[0] for key in states} == {"single", "final"}


def test_seeds_are_the_items(model) -> None:
    images = [model.respond(PROMPTS[:1], "image", DRAW, seed)[0].image.tobytes() for seed in (0, 0, 1)]
    assert images[0] == images[1] != images[2]
    assert torch.equal(normals([4, 9], (2, 2))[1:], normals([9], (2, 2)))


def test_one_point_of_time_draws_nothing(model) -> None:
    with pytest.raises(ValueError, match="between at least 2 points of time, got steps=1"):
        model.respond(PROMPTS[:1], "image", Generation(guidance=1.0, steps=1))


# ----------------------------------------------------------------------------------------------------------- changing a picture


def test_a_picture_is_changed_with_guidance_by_text_and_picture(model) -> None:
    item = Item("a", "", PROMPTS[0].prompt, QUESTIONS[0].picture().resize((32, 16)))
    states, [response] = observed(model, [item], "image", DRAW)
    assert response.image.size == (32, 16) and response.tokens == 32
    prompt = states["single", 0, 0]
    assert [len(s) for s in prompt.spans if s.modality == "image"] == [32, 32] and prompt.modalities("prompt") == ("image", "text")
    encoded = model.encode(item, "image")
    assert encoded.layout().places[:69] == [*[0] * 34, *[1] * 34, 2]
    passes = []
    with hooked(model.network.stack, lambda layer, out: passes.append(out.shape[1]) if layer == 0 else None):
        model.respond([item], "image", DRAW, 5)
    length = len(encoded.ids)
    # The contexts with all, without the text, without the picture; then three passes at each time, down to the last.
    assert passes == [length, 68, length - 68, *[34] * 12]

    network, seed, noise = model.network, item_seed(5, item), normals([item_seed(5, item)], (32, model.config.values))
    canvas = Canvas(network, model.marks.begin_image, model.marks.end_image, (4, 8))
    pictures = (Span(0, 1, "prompt", "text"), Span(1, 33, "prompt", "image"), Span(33, 35, "prompt", "text"))
    pictures += (Span(35, 67, "prompt", "image"), Span(67, 68, "prompt", "text"))
    with torch.inference_mode():  # the first step, each context read by itself
        features = [model.taken_in(encoded.changed, seed ^ 1), network.seen(encoded.pixels)]
        velocities = []
        for ids, spans, tokens in (
            (encoded.ids, encoded.spans, features),
            (encoded.ids[:68], pictures, features),
            (encoded.ids[68:], (Span(0, length - 68, "prompt", "text"),), []),
        ):
            _, context = read_rows(network, [ids], [arrange(spans, 1)], tokens, 0, "right")
            velocities.append(canvas.velocity(noise, torch.tensor(1.0), context))
        latents = noise - (1 - flow_times(5)[1]) * replace(EDITING, text=3.0)(*velocities)
        entered = network.drawn(latents, flow_times(5)[1:2], (4, 8))[0]
    assert torch.allclose(entered, states["0001", 0, 0].states[1:-1], atol=1e-4)
    assert all((one - other).abs().max() > 1e-3 for one, other in pairwise(velocities))


def test_pictures_of_different_sizes_are_changed_side_by_side(model) -> None:
    items = [
        Item("a", "", PROMPTS[0].prompt, QUESTIONS[0].picture()),
        PROMPTS[1],
        Item("c", "", PROMPTS[2].prompt, QUESTIONS[1].picture().resize((32, 16))),
        Item("d", "", PROMPTS[1].prompt, QUESTIONS[2].picture()),
    ]
    together = model.respond(items, "image", DRAW, 5)
    assert [r.image.size for r in together] == [(32, 32), (32, 32), (32, 16), (32, 32)]
    for item, response in zip(items, together, strict=True):
        [alone] = model.respond([item], "image", DRAW, 5)
        assert abs(np.asarray(alone.image, int) - np.asarray(response.image, int)).max() <= 1
    with pytest.raises(ValueError, match="item 'a' has an empty prompt"):
        model.respond([replace(items[0], prompt=" ")], "image", DRAW)


# ------------------------------------------------------------------------------------------------------------- states of writing


@pytest.mark.parametrize("items", [QUESTIONS, PROMPTS])
def test_teacher_forcing_gives_the_states_of_writing(model, items) -> None:
    states, [response] = observed(model, items[:1], "text", WRITE)
    steps = defaultdict(list)
    with hooked(model.stacks[0], lambda layer, output: steps[layer].append(output[0].clone())):
        [again] = model.respond(items[:1], "text", WRITE, 5)
    assert same(again, response)
    for layer in range(model.stacks[0].depth + 2):
        generated, forced = torch.cat(steps[layer]), states["single", layer, 0].states
        assert len(forced) - len(generated) == 1  # writing never computes the state of the last token
        assert (forced[: len(generated)] - generated).abs().max() < 1e-5


def test_states_of_a_question_depend_on_the_picture(model) -> None:
    other = replace(QUESTIONS[0], image=Image.new("RGB", (32, 32), "green"))
    first, second = (observed(model, [item], "text", WRITE)[0] for item in (QUESTIONS[0], other))
    reading = Reading()
    assert (first["single", 0, 0].states - second["single", 0, 0].states)[1:65].abs().max() > 1e-3
    words = [seen["single", 3, 0].select("prompt", reading, "text") for seen in (first, second)]
    assert (words[0] - words[1]).abs().max() > 1e-4


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
    assert {item for _, _, item in together} == {0, 1, 2}
    for k, item in enumerate(items):
        alone, [response] = observed(model, [item], task, settings)
        assert response.text == responses[k].text
        if response.image is not None:  # the same latents up to rounding; a pixel may fall to the neighbouring level
            assert abs(np.asarray(response.image, int) - np.asarray(responses[k].image, int)).max() <= 1
        for (step, layer, _), seen in alone.items():
            assert seen.spans == together[step, layer, k].spans
            assert (seen.states - together[step, layer, k].states).abs().max() < 5e-5


# --------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("item", "task", "said"),
    [
        (Item("a", "c", "  "), "image", "item 'a' has an empty prompt"),
        (Item("a", "c", "a large green dragon"), "image", "does not know the words dragon of item 'a'"),
        (Item("a", "c", "a red ring " * 200), "text", "takes 603 positions .* room for 502"),
        (Item("a", "c", "a red ring " * 200), "image", "takes 602 positions .* room for 511"),
        (Item("a", "c", "a red ring " * 200, Image.new("RGB", (32, 32))), "text", "takes 669 positions .* room for 567"),
    ],
)
def test_prompts_that_cannot_be_taken(model, item, task, said) -> None:
    with pytest.raises(ValueError, match=said):
        model.respond([item], task, WRITE if task == "text" else DRAW)


def test_a_long_prompt_is_cut_and_flagged_on_request(model) -> None:
    for item, task, room in (
        (Item("a", "c", "a red ring " * 200), "image", 1),
        (replace(QUESTIONS[0], prompt="ring " * 600), "text", 10),
    ):
        encoded = model.encode(item, task, room, truncate=True)
        assert encoded.flags == ("cut",) and encoded.layout().places[-1] + 1 + room == model.config.positions
        [response] = model.respond([item], task, WRITE if task == "text" else DRAW, truncate=True)
        assert "cut" in response.flags


def test_a_tokenizer_of_another_model_is_refused(model) -> None:
    with pytest.raises(ValueError, match=r"lacks <\|im_start\|>, .* it is not BAGEL's"):
        Bagel(model.network, model.vae, byte_tokenizer(), "tiny")
    with pytest.raises(ValueError, match=rf"has \d+ tokens, its network {len(model.tokenizer)}"):
        Bagel(model.network, model.vae, byte_tokenizer((*SPECIAL_TOKENS, *map(str, range(3998)))), "tiny")


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "L", "1"])
def test_pictures_of_any_kind_are_read(model, mode) -> None:
    picture = Image.new(mode, (1, 1) if mode == "L" else (40, 30))
    [response] = model.respond([replace(QUESTIONS[0], image=picture)], "text", WRITE)
    assert isinstance(response.text, str)


def test_rounded_weights_answer(model) -> None:
    """In bfloat16 every part takes what the others give."""
    half = alive(new_twin(0))
    half.network.to(torch.bfloat16)
    [response] = half.respond(PROMPTS[:1], "image", Generation(guidance=2.0, steps=3))
    assert response.image.size == (32, 32)
    assert isinstance(half.respond([QUESTIONS[0]], "text", Generation(tokens=3, temperature=0.0))[0].text, str)
    changed = Item("a", "", PROMPTS[0].prompt, QUESTIONS[0].picture())
    assert half.respond([changed], "image", Generation(guidance=2.0, steps=3))[0].image.size == (32, 32)


def test_contexts_of_equal_lengths_need_no_mask(model) -> None:
    """So that a GPU takes its fast attention; and an empty context is one of no positions."""
    ids = model.encode(PROMPTS[0], "image").ids
    _, equal = read_rows(model.network, [ids, ids], [arrange([Span(0, len(ids), "prompt", "text")])] * 2, [], 0, "right")
    assert equal.mask(66) is None and equal.places.tolist() == [len(ids)] * 2
    nothing = Context.nothing(3, torch.device("cpu"))
    assert nothing.mask(66) is None and nothing.places.tolist() == [0, 0, 0]
    assert Contexts(equal, nothing).without_image is None
    assert Encoded([1], (Span(0, 1, "prompt", "text"),)).layout().places == [0]
