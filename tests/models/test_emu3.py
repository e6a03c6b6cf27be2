"""Emu3: templates, spans, sampling, and the states that a trace shows, on an untrained twin. What `transformers` does is in
test_emu3_load.py."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import byte_tokenizer
from transformers.models.emu3.modeling_emu3 import Emu3ImageVocabularyMapping

from unisonde.data import corebench
from unisonde.data.item import Item
from unisonde.data.tabletop import question_item, text_item
from unisonde.data.tabletop.grammar import CAPTION_REQUESTS
from unisonde.models.base import Generation, item_seed
from unisonde.models.emu3 import BOS, EOS, NEGATIVE, POSITIVE, SPECIAL_TOKENS, SYSTEM, Emu3, code_word
from unisonde.models.parts.sampling import draw, guided, uniforms
from unisonde.models.trace import LayerStates, Reading, Span, Trace, hooked
from unisonde.train.emu3 import new_twin

DRAW = Generation(temperature=1.0, guidance=3.0)
WRITE = Generation(tokens=10, temperature=0.0)
PROMPTS = [text_item("composition", "test", 3, k, count) for k, count in enumerate((1, 3, 2))]
QUESTIONS = [question_item(category, "test", 3, k) for k, category in enumerate(("attribute", "logic", "coarse"))]
ROW = 9
"""Positions of a row of eight codes."""


@pytest.fixture(scope="module")
def model() -> Emu3:
    return new_twin(0)


@pytest.fixture(scope="module")
def published() -> Emu3:
    """The twin's network behind the published templates, with a tokenizer of bytes, and pictures of 4 x 4 codes."""
    twin = new_twin(0)
    codes = len(twin.code_ids)
    tokenizer = byte_tokenizer((*SPECIAL_TOKENS, *map(code_word, range(codes))))
    words = (*map(code_word, range(codes)), "<|extra_200|>", "<image>")
    twin.network.model.vocabulary_mapping = Emu3ImageVocabularyMapping({w: tokenizer.convert_tokens_to_ids(w) for w in words})
    twin.network.resize_token_embeddings(len(tokenizer))
    return Emu3(twin.network, tokenizer, twin.image_processor, "tiny", area=16 * 16)


def observed(model: Emu3, items: list[Item], task: str, settings: Generation) -> tuple[dict, list]:
    """States by (item, layer), and the responses."""
    states: dict[tuple[int, int], LayerStates] = {}

    def keep(seen: LayerStates) -> None:
        states[seen.item, seen.layer] = LayerStates(**{**vars(seen), "states": seen.states.clone()})

    return states, model.respond(items, task, settings, 5, Trace(keep))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- templates and spans


def test_the_template_of_drawing(published) -> None:
    encoded = published.encode(Item("a", "c", "a cat."), "image", 19)
    text = published.tokenizer.decode(encoded.ids)
    assert text == "<|extra_203|>a cat. masterpiece, film grained, best quality.<|image start|>4*4<|image token|>"
    [words] = (s for s in encoded.spans if s.kind == "content")
    assert published.tokenizer.decode(encoded.ids[words.start : words.stop]) == "a cat." and words.modality == "text"
    assert published.tokenizer.decode(published.unconditional()) == f"<|extra_203|>{NEGATIVE}<|image start|>4*4<|image token|>"


def test_the_template_of_text(published) -> None:
    encoded = published.encode(Item("a", "c", "Who are you?"), "text", 10)
    text = "<|extra_203|>You are a helpful assistant. USER: Who are you? ASSISTANT:"
    assert published.tokenizer.decode(encoded.ids) == text
    [words] = (s for s in encoded.spans if s.kind == "content")
    assert published.tokenizer.decode(encoded.ids[words.start : words.stop]) == "Who are you?"


def test_the_template_of_a_question(published) -> None:
    """The authors' layout: start, size, mark, rows with an end each, end of frame, end of picture."""
    item = Item("a", "c", "What is it?", Image.new("RGB", (64, 16), "red"))
    codes = published.codes_of(item.picture())
    assert codes.shape == (4, 16)  # as wide as the picture, of as many pixels
    rows = "".join("".join(f"<|visual token {code:06d}|>" for code in row) + "<|extra_200|>" for row in codes.tolist())
    picture = f"<|image start|>4*16<|image token|>{rows}<|extra_201|><|image end|>"
    encoded = published.encode(item, "text", 10)
    text = f"<|extra_203|>You are a helpful assistant. USER: {picture}What is it? ASSISTANT:"
    assert published.tokenizer.decode(encoded.ids) == text
    held = [s for s in encoded.spans if s.kind == "content"]
    assert [(s.modality, len(s)) for s in held] == [("image", 16)] * 4 + [("text", len("What is it?"))]
    seen = [i for s in held[:-1] for i in encoded.ids[s.start : s.stop]]
    assert seen == published.code_ids[codes.flatten()].tolist()
    marks = [s for s in encoded.spans if s.kind == "template" and s.modality == "image"]
    assert [len(s) for s in marks] == [1, 1, 1, 3] and [s.start - held[0].start for s in marks] == [16, 33, 50, 67]


def test_no_image_is_a_question_without_a_picture(model) -> None:
    words = model.tokenizer.convert_ids_to_tokens(model.encode(PROMPTS[0], "text", 10).ids)
    assert words == [BOS, "USER", ":", *model.tokenizer.tokenize(PROMPTS[0].prompt), "ASSISTANT", ":"]


def test_spans_cover_every_position_once(model) -> None:
    for task, items, settings in (("image", PROMPTS, DRAW), ("text", QUESTIONS, WRITE)):
        states, _ = observed(model, items, task, settings)
        for item in range(len(items)):
            spans = states[item, 0].spans
            assert [s.start for s in spans] == [0, *(s.stop for s in spans[:-1])]
            assert spans[-1].stop == len(states[item, 0].states)


def test_spans_of_a_drawing(model) -> None:
    states, [response] = observed(model, PROMPTS[:1], "image", DRAW)
    seen = states[0, 0]
    start = len(model.encode(PROMPTS[0], "image", 0).ids)
    drawn = [s for s in seen.spans if s.role == "response"]
    rows = [(start + k, start + k + 8) for k in range(0, 8 * ROW, ROW)]
    assert [(s.start, s.stop) for s in drawn if s.kind == "content"] == rows
    assert [(s.start, s.stop) for s in drawn if s.kind == "template"] == [(b, b + 1) for _, b in rows[:-1]] + [
        (rows[-1][1], start + 75)
    ]
    assert {s.modality for s in drawn} == {"image"} and response.tokens == 64
    assert seen.select("response", Reading()).shape == (64, 160)
    assert seen.select("response", Reading(spans="all")).shape == (8 * ROW + 3, 160)


def test_what_enters_the_stack_is_the_drawing(model) -> None:
    """Response states of layer 0 are the embeddings of the codes that the picture is decoded from."""
    states, [response] = observed(model, PROMPTS[:1], "image", DRAW)
    entered = states[0, 0].select("response", Reading())
    words = torch.cdist(entered, model.network.get_input_embeddings().weight).argmin(-1)
    codes = torch.stack([(model.code_ids == word).nonzero()[0, 0] for word in words]).view(1, 8, 8)
    assert model.decode(codes)[0].tobytes() == response.image.tobytes()


def test_states_of_an_image_prompt_depend_on_the_picture(model) -> None:
    other = Item("x", "attribute", QUESTIONS[0].prompt, Image.new("RGB", (32, 32), "green"))
    first, second = (observed(model, [item], "text", WRITE)[0] for item in (QUESTIONS[0], other))
    pictures = [seen[0, 0].select("prompt", Reading(), "image") for seen in (first, second)]
    assert pictures[0].shape == (64, 160) and (pictures[0] - pictures[1]).abs().max() > 1e-3
    # The question comes after the picture: its embeddings are the same, its states are not.
    assert torch.equal(*(seen[0, 0].select("prompt", Reading(), "text") for seen in (first, second)))
    assert not torch.equal(*(seen[0, 1].select("prompt", Reading(), "text") for seen in (first, second)))


# ---------------------------------------------------------------------------------------------------------------------- states


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
        # What sampling never computes: the state of the last token of a text; of the last code and of the marks that end a drawing.
        if task == "image":  # the first pass runs both branches of guidance; hooks see the conditional one first
            assert len(forced) - len(generated) == 5
        else:
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
        if response.image is not None:
            assert abs(np.asarray(response.image, int) - np.asarray(responses[k].image, int)).max() <= 1
        for layer in range(model.stacks[0].depth + 2):
            assert alone[0, layer].spans == together[k, layer].spans
            assert (alone[0, layer].states - together[k, layer].states).abs().max() < 1e-5


def test_a_picture_and_a_text_may_share_a_batch(model) -> None:
    items = [QUESTIONS[0], PROMPTS[0]]
    together, responses = observed(model, items, "text", WRITE)
    assert together[0, 0].modalities("prompt") == ("image", "text") and together[1, 0].modalities("prompt") == ("text",)
    assert [r.text for r in responses] == [model.respond([item], "text", WRITE, 5)[0].text for item in items]


# -------------------------------------------------------------------------------------------------------------------- sampling


@torch.inference_mode()
def test_codes_equal_a_loop_without_cache_or_batch(model) -> None:
    """The published loop, written the long way: whole sequences, one row after the other."""
    item = PROMPTS[1]
    ids = model.encode(item, "image", 75).ids
    codes = model.draw_codes([ids, model.encode(PROMPTS[0], "image", 75).ids], DRAW, [11, 12])[0]
    chance = uniforms([11], 64, torch.device("cpu"))[0]
    drawn: list[int] = []
    response: list[int] = []
    while len(drawn) < 64:
        if len(response) % ROW == 8:
            response.append(model.end_row)
            continue
        logits = []
        for prompt in (ids, model.unconditional()):
            states = model.network.model.text_model(input_ids=torch.tensor([prompt + response])).last_hidden_state
            logits.append(model.network.lm_head(states[:, -1])[:, model.code_ids])
        drawn.append(int(draw(guided(*logits, 3.0), 1.0, chance[len(drawn)][None])))
        response.append(int(model.code_ids[drawn[-1]]))
    assert drawn == codes.flatten().tolist()
    assert model.sequence_of(codes)[: len(response)] == response


def test_guidance_of_one_is_the_conditional_branch(model) -> None:
    ids = [model.encode(PROMPTS[0], "image", 75).ids]
    plain = model.draw_codes(ids, Generation(temperature=0.0, guidance=1.0), [0])
    almost = model.draw_codes(ids, Generation(temperature=0.0, guidance=1.0 + 1e-9), [0])
    assert torch.equal(plain, almost)


def test_the_negative_prompt_is_what_guidance_moves_away_from(model, monkeypatch) -> None:
    ids = [model.encode(PROMPTS[0], "image", 75).ids]
    settings = Generation(temperature=0.0, guidance=3.0)
    empty = model.draw_codes(ids, settings, [0])
    monkeypatch.setattr(model, "negative", "a red ring")
    assert not torch.equal(model.draw_codes(ids, settings, [0]), empty)
    # Away from the prompt itself there is no direction.
    monkeypatch.setattr(model, "negative", PROMPTS[0].prompt)
    plain = model.draw_codes(ids, Generation(temperature=0.0, guidance=1.0), [0])
    assert torch.equal(model.draw_codes(ids, settings, [0]), plain)


def test_only_the_likeliest_codes_are_drawn(model, monkeypatch) -> None:
    ids = [model.encode(PROMPTS[0], "image", 75).ids]
    monkeypatch.setattr("unisonde.models.emu3.TOP_K", 1)
    greedy = model.draw_codes(ids, Generation(temperature=0.0, guidance=3.0), [0])
    assert torch.equal(model.draw_codes(ids, Generation(temperature=5.0, guidance=3.0), [0]), greedy)


def test_seeds_are_the_items(model) -> None:
    item = PROMPTS[0]
    images = [model.respond([item], "image", DRAW, seed)[0].image.tobytes() for seed in (0, 0, 1)]
    assert images[0] == images[1] != images[2]
    assert item_seed(0, item) != item_seed(0, PROMPTS[1])


# ----------------------------------------------------------------------------------------------------------- prompts, pictures


@pytest.mark.parametrize(
    ("item", "task", "said"),
    [
        (Item("a", "c", "  "), "image", "item 'a' has an empty prompt"),
        (Item("a", "c", "a large green dragon"), "image", "does not know the words dragon of item 'a'"),
        (Item("a", "c", "a red ring", Image.new("RGB", (4, 4))), "image", "draws from text prompts alone"),
        (Item("a", "c", "a red ring " * 200), "text", "takes 60. positions .* room for 502"),
        (Item("a", "c", "a red ring " * 200), "image", "takes 60. positions .* room for 437"),
        (Item("a", "c", "what?", Image.new("RGB", (1, 300))), "text", "cannot take the picture of item 'a': absolute aspect ratio"),
        (Item("a", "c", "what?", Image.new("RGB", (64, 16))), "text", r"no word for the size 4\*16 of the codes of item 'a'"),
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
    assert model.tokenizer.convert_ids_to_tokens(encoded.ids)[-2:] == ["ASSISTANT", ":"]
    drawn = model.encode(item, "image", 75, truncate=True)
    assert len(drawn.ids) == model.window - 75
    assert model.tokenizer.convert_ids_to_tokens(drawn.ids)[-3:] == ["<|image start|>", "8*8", "<|image token|>"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "I;16", "1", "CMYK"])
@pytest.mark.parametrize("size", [(32, 32), (1, 1), (3, 3), (90, 90)])
def test_pictures_of_every_kind(model, mode, size) -> None:
    grey = Image.new("L", size, 200)
    picture = grey.convert("I").convert("I;16") if mode == "I;16" else grey.convert(mode)
    encoded = model.encode(Item("a", "c", CAPTION_REQUESTS[0], picture), "text", 10)
    assert sum(len(s) for s in encoded.spans if s.modality == "image" and s.kind == "content") == 64


def test_prompts_of_the_benchmark(published, shared: Path) -> None:
    """All 1,080: every one is in its template once, whole, and its words are content."""
    items = corebench.read(shared / "data" / "t2i-corebench")
    assert len(items) == 1080
    published_window, limit = published.window, published.network.model.text_model.config
    limit.max_position_embeddings = 9216
    for item in items:
        for task in ("image", "text"):
            encoded = published.encode(item, task, 20)
            [words] = (s for s in encoded.spans if s.kind == "content")
            assert published.tokenizer.decode(encoded.ids[words.start : words.stop]) == item.prompt
            rest = published.tokenizer.decode(encoded.ids[: words.start] + encoded.ids[words.stop :])
            frame = POSITIVE + published.opening(4, 4) if task == "image" else " ASSISTANT:"
            assert rest == (BOS if task == "image" else f"{BOS}{SYSTEM} USER: ") + frame
    limit.max_position_embeddings = published_window


def test_marks_in_a_text_response_end_it(model, monkeypatch) -> None:
    """A model may write the words of a picture; they are part of its answer's positions, and not of its text."""
    from unisonde.models import emu3
    from unisonde.models.parts.text import Written

    word = int(model.code_ids[3])
    written = Written([word, word, model.eos_id], 2, "", False)
    monkeypatch.setattr(emu3, "write_text", lambda *args, **kwargs: [written])
    states, [response] = observed(model, QUESTIONS[:1], "text", WRITE)
    assert response.tokens == 2 and response.text == ""
    assert states[0, 0].spans[-2:] == (
        Span(len(states[0, 0].states) - 3, len(states[0, 0].states) - 1, "response", "text", "content"),
        Span(len(states[0, 0].states) - 1, len(states[0, 0].states), "response", "text", "template"),
    )
    assert model.tokenizer.convert_tokens_to_ids(EOS) == model.eos_id
