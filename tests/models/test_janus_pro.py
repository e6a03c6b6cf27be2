"""Janus-Pro: templates, spans, sampling, and the states that a trace shows, on an untrained twin."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import JanusForConditionalGeneration

import unisonde
from unisonde.data.item import Item
from unisonde.data.tabletop import question_item, text_item
from unisonde.models.base import Generation, item_seed
from unisonde.models.janus_pro import ASSISTANT, BEGIN_IMAGE, BOS, END_IMAGE, IMAGE, SIZES, USER, JanusPro, full_size, set_code_grid
from unisonde.models.parts.sampling import draw, guided, uniforms
from unisonde.models.trace import LayerStates, Reading, Trace, hooked
from unisonde.train.janus_pro import new_twin

DRAW = Generation(temperature=1.0, guidance=3.0)
WRITE = Generation(tokens=10, temperature=0.0)
PROMPTS = [text_item("composition", "test", 3, k, count) for k, count in enumerate((1, 3, 2))]
QUESTIONS = [question_item(category, "test", 3, k) for k, category in enumerate(("attribute", "logic", "coarse"))]


@pytest.fixture(scope="module")
def model() -> JanusPro:
    return new_twin(0)


def observed(model: JanusPro, items: list[Item], task: str, settings: Generation) -> tuple[dict, list]:
    """States by (item, layer), and the responses."""
    states: dict[tuple[int, int], LayerStates] = {}

    def keep(seen: LayerStates) -> None:
        states[seen.item, seen.layer] = LayerStates(**{**vars(seen), "states": seen.states.clone()})

    return states, model.respond(items, task, settings, 5, Trace(keep))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "items", "settings"), [("image", PROMPTS, DRAW), ("text", QUESTIONS, WRITE), ("text", PROMPTS, WRITE)]
)
def test_teacher_forcing_gives_the_states_of_generation(model, task, items, settings) -> None:
    item = items[0]
    states, [response] = observed(model, [item], task, settings)
    steps = defaultdict(list)
    with hooked(model.stacks[0], lambda layer, output: steps[layer].append(output[0])):
        [again] = model.respond([item], task, settings, 5)
    assert (again.text, again.image and again.image.tobytes()) == (response.text, response.image and response.image.tobytes())
    for layer in range(model.stacks[0].depth + 2):
        generated = torch.cat(steps[layer])
        forced = states[0, layer].states
        # The state of the last response token is the one that sampling never computes.
        assert len(forced) - len(generated) in (0, 1)
        assert (forced[: len(generated)] - generated).abs().max() < 1e-5


def test_the_wrong_position_is_noticed(model) -> None:
    """The comparison above can fail: states one position late differ by far more."""
    states, _ = observed(model, PROMPTS[:1], "image", DRAW)
    last = states[0, 3].states
    assert (last[1:] - last[:-1]).abs().max() > 1e-2


# Greedy drawing is left out: untrained, the two best codes may be nearer than rounding.
@pytest.mark.parametrize(
    ("task", "items", "settings", "temperature"),
    [("image", PROMPTS, DRAW, 1.0), *(("text", items, WRITE, t) for items in (QUESTIONS, PROMPTS) for t in (0.0, 1.0))],
)
def test_batch_of_one_equals_batch_of_many(model, task, items, settings, temperature) -> None:
    settings = Generation(**settings.to_dict() | {"temperature": temperature})
    together, responses = observed(model, items, task, settings)
    for k, item in enumerate(items):
        alone, [response] = observed(model, [item], task, settings)
        assert response.text == responses[k].text
        if response.image is not None:  # the same codes; a pixel may round to the neighbouring level
            assert abs(np.asarray(response.image, int) - np.asarray(responses[k].image, int)).max() <= 1
        for layer in range(model.stacks[0].depth + 2):
            assert alone[0, layer].spans == together[k, layer].spans
            assert (alone[0, layer].states - together[k, layer].states).abs().max() < 1e-5


def test_spans_of_drawing(model) -> None:
    encoded = model.encode(PROMPTS[0], "image", 64)
    words = model.tokenizer.convert_ids_to_tokens(encoded.ids)
    held = {(s.modality, s.kind): words[s.start : s.stop] for s in encoded.spans if s.kind == "content"}
    assert " ".join(held["text", "content"]) == " ".join(model.tokenizer.tokenize(PROMPTS[0].prompt))
    assert words[:3] == [BOS, USER, ":"] and words[-4:] == ["\n\n", ASSISTANT, ":", BEGIN_IMAGE]
    states, _ = observed(model, PROMPTS[:1], "image", DRAW)
    reading = Reading()
    assert len(states[0, 0].select("response", reading)) == 64
    assert states[0, 0].modalities("response") == ("image",)


def test_spans_of_a_question(model) -> None:
    encoded = model.encode(QUESTIONS[0], "text", 10)
    words = model.tokenizer.convert_ids_to_tokens(encoded.ids)
    image, text = (s for s in encoded.spans if s.kind == "content")
    assert (image.modality, len(image)) == ("image", 16)
    assert words[image.start - 1] == BEGIN_IMAGE and words[image.stop] == END_IMAGE
    assert set(words[image.start : image.stop]) == {IMAGE}
    assert words[text.start : text.stop] == model.tokenizer.tokenize(QUESTIONS[0].prompt)


def test_the_twin_draws_more_codes_than_it_reads_features(model) -> None:
    for name, small in (("twin/janus-pro", unisonde.load("twin/janus-pro")), ("untrained", model)):
        assert small.codes == 64 and small.network.config.vision_config.num_image_tokens == 16, name
        assert small.pixels_of(torch.zeros(2, 64, dtype=torch.long)).shape == (2, 3, 32, 32)
    with torch.device("meta"):
        published = JanusForConditionalGeneration(full_size(*SIZES["1B"]))
    set_code_grid(published)  # which says nothing of it
    assert published.config.vq_config.num_patches == 24 and published.model.vqmodel.quantize.quant_state_dims == [24, 24]


def test_states_of_an_image_prompt_depend_on_the_picture(model) -> None:
    other = Item("x", "attribute", QUESTIONS[0].prompt, Image.new("RGB", (32, 32), "green"))
    first, second = (observed(model, [item], "text", WRITE)[0][0, 0] for item in (QUESTIONS[0], other))
    reading = Reading()
    assert (first.select("prompt", reading, "image") - second.select("prompt", reading, "image")).abs().max() > 1e-3
    assert torch.equal(first.select("prompt", reading, "text"), second.select("prompt", reading, "text"))


@torch.inference_mode()
def test_codes_equal_a_loop_without_cache_or_batch(model) -> None:
    """The published loop, written the long way: whole sequences, one row after the other."""
    item = PROMPTS[1]
    ids = model.encode(item, "image", 64).ids
    codes = model.draw_codes([ids, model.encode(PROMPTS[0], "image", 64).ids], DRAW, [11, 12])[0]
    empty = [ids[0], *[model.pad_id] * (len(ids) - 2), ids[-1]]
    chance = uniforms([11], 64, torch.device("cpu"))[0]
    drawn: list[int] = []
    for step in range(64):
        logits = []
        for prompt in (ids, empty):
            embeddings = model.embed(torch.tensor([prompt]))
            if drawn:
                embeddings = torch.cat([embeddings, model.code_features(torch.tensor([drawn]))], 1)
            states = model.network.model.language_model(inputs_embeds=embeddings).last_hidden_state
            logits.append(model.network.model.generation_head(states[:, -1]))
        drawn.append(int(draw(guided(*logits, 3.0), 1.0, chance[step : step + 1])))
    assert drawn == codes.tolist()


def test_guidance_of_one_is_the_conditional_branch(model) -> None:
    ids = [model.encode(PROMPTS[0], "image", 64).ids]
    plain = model.draw_codes(ids, Generation(temperature=0.0, guidance=1.0), [0])
    almost = model.draw_codes(ids, Generation(temperature=0.0, guidance=1.0 + 1e-9), [0])
    assert torch.equal(plain, almost)


def test_seeds_are_the_items(model) -> None:
    item = PROMPTS[0]
    images = [model.respond([item], "image", DRAW, seed)[0].image.tobytes() for seed in (0, 0, 1)]
    assert images[0] == images[1] != images[2]
    assert item_seed(0, item) != item_seed(0, PROMPTS[1])


@pytest.mark.parametrize(
    ("item", "task", "said"),
    [
        (Item("a", "c", "  "), "image", "item 'a' has an empty prompt"),
        (Item("a", "c", "a large green dragon"), "image", "does not know the words dragon of item 'a'"),
        (Item("a", "c", "a red ring", Image.new("RGB", (4, 4))), "image", "draws from text prompts alone"),
        (Item("a", "c", "a red ring " * 200), "text", "takes 60. positions .* room for 502"),
    ],
)
def test_prompts_that_cannot_be_taken(model, item, task, said) -> None:
    with pytest.raises(ValueError, match=said):
        model.respond([item], task, WRITE if task == "text" else DRAW)


def test_a_long_prompt_is_cut_and_flagged_on_request(model) -> None:
    item = Item("a", "c", "a red ring " * 200)
    [response] = model.respond([item], "text", WRITE, truncate=True)
    assert "cut" in response.flags
    encoded = model.encode(item, "text", 10, truncate=True)
    assert len(encoded.ids) == model.window - 10
    assert model.tokenizer.convert_ids_to_tokens(encoded.ids)[-3:] == ["\n\n", ASSISTANT, ":"]


def test_a_word_of_the_prompt_may_be_upper_case(model) -> None:
    assert (
        model.encode(Item("a", "c", "A Large RED ring"), "image", 64).ids
        == model.encode(Item("a", "c", "a large red ring"), "image", 64).ids
    )


@pytest.mark.parametrize(("size", "billions"), [((2048, 5632, 24, 16), 2.089), ((4096, 11008, 30, 32), 7.420)])
def test_published_sizes(size, billions) -> None:
    from transformers import JanusForConditionalGeneration

    with torch.device("meta"):
        network = JanusForConditionalGeneration(full_size(*size))
    unused = 12_597_248 + 1024  # the published totals hold the pooling head of SigLIP, which nothing uses
    count = sum(p.numel() for p in network.parameters()) + unused
    assert count / 1e9 == pytest.approx(billions, abs=0.0006)


def test_a_model_may_write_the_placeholder_itself(model, monkeypatch) -> None:
    """Untrained, a model writes any token; one that stands for image features in prompts is no place for features in a response."""
    from unisonde.models import janus_pro
    from unisonde.models.parts.text import Written

    written = Written([model.image_id] * 3 + [model.eos_id], 3, "", False)
    monkeypatch.setattr(janus_pro, "write_text", lambda *args, **kwargs: [written])
    states, _ = observed(model, QUESTIONS[:1], "text", WRITE)
    reading = Reading()
    embedded = model.network.get_input_embeddings().weight[model.image_id]
    assert torch.equal(states[0, 0].select("response", reading), embedded.expand(3, -1))
    assert not torch.isclose(states[0, 0].select("prompt", reading, "image"), embedded).all()


def test_a_user_may_write_the_placeholder(model) -> None:
    """It stands for features where the template puts it; in the prompt's own text it is a word like any other."""
    items = [
        Item("a", "c", f"{IMAGE} is there a shape?", QUESTIONS[0].image),
        QUESTIONS[1],
        Item("b", "c", f"a red ring {IMAGE}"),
    ]
    together = model.respond(items, "text", WRITE)
    assert [r.text for r in together] == [model.respond([item], "text", WRITE)[0].text for item in items]
    states, _ = observed(model, items[:1], "text", WRITE)
    steps = defaultdict(list)
    with hooked(model.stacks[0], lambda layer, output: steps[layer].append(output[0])):
        model.respond(items[:1], "text", WRITE, 5)
    written = torch.cat(steps[3])
    assert (states[0, 3].states[: len(written)] - written).abs().max() < 1e-5
