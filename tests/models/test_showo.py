"""Show-o: templates, masks, sampler, spans, and the states that a trace shows, on an untrained twin and a tiny variant with CLIP."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import byte_tokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from unisonde.data.item import Item
from unisonde.data.tabletop import question_item, text_item
from unisonde.models.base import Generation, item_seed
from unisonde.models.parts.magvit2 import Magvit2, Magvit2Config
from unisonde.models.parts.sampling import draw, uniforms
from unisonde.models.parts.showo_network import MARKS, PhiSizes, Showo, ShowoConfig, full_size, keys_of, visibility
from unisonde.models.showo import SYSTEM, Clip, ShowO
from unisonde.models.trace import LayerStates, Reading, Trace, hooked
from unisonde.train.showo import END, new_twin

STEPS = 5
DRAW = Generation(temperature=1.0, guidance=3.0, steps=STEPS)
WRITE = Generation(tokens=10, temperature=0.0)
PROMPTS = [text_item("composition", "test", 3, k, count) for k, count in enumerate((1, 3, 2))]
QUESTIONS = [question_item(category, "test", 3, k) for k, category in enumerate(("attribute", "logic", "coarse"))]
NAMES = [*(f"{step:04d}" for step in range(STEPS - 1)), "final"]


@pytest.fixture(scope="module")
def model() -> ShowO:
    return new_twin(0)


@pytest.fixture(scope="module")
def clip_model() -> ShowO:
    """A tiny variant with CLIP: 9 features of pictures of 42 x 42."""
    llm = PhiSizes(32, 64, 3, 4, max_position_embeddings=512)
    tokenizer = byte_tokenizer()
    config = ShowoConfig(True, len(tokenizer) + len(MARKS) + 16 + 1, len(tokenizer), 16, 4, llm=llm, clip_width=32)
    torch.manual_seed(0)
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=42, patch_size=14
        )
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})
    codes = Magvit2(Magvit2Config(32, (1, 1), (1, 1), (1, 1), (1, 1), bits=4))
    return ShowO(Showo(config), codes, tokenizer, "tiny-clip", clip=Clip(vision.eval(), processor))


def observed(model: ShowO, items: list[Item], task: str, settings: Generation, step: str = "all") -> tuple[dict, list]:
    """States by (step, layer, item), and the responses."""
    states: dict[tuple[str, int, int], LayerStates] = {}

    def keep(seen: LayerStates) -> None:
        states[seen.step, seen.layer, seen.item] = LayerStates(**{**vars(seen), "states": seen.states.clone()})

    trace = Trace(keep, Reading(step=step))  # type: ignore[arg-type]
    return states, model.respond(items, task, settings, 5, trace)  # type: ignore[arg-type]


def same(one, two) -> bool:
    return (one.text, one.image and one.image.tobytes()) == (two.text, two.image and two.image.tobytes())


# --------------------------------------------------------------------------------------------------------------------- templates


def words_of(model: ShowO, ids: list[int]) -> list[str]:
    """Token ids as text: words by the tokenizer, marks by name, codes as `<code>`."""
    config = model.config
    return [
        model.tokenizer.convert_ids_to_tokens(i)
        if i < config.llm_vocab_size
        else MARKS[i - config.llm_vocab_size]
        if i < config.first_code
        else "<code>"
        for i in ids
    ]


def test_the_template_of_drawing(model) -> None:
    encoded = model.encode(PROMPTS[0], "image")
    text = model.tokenizer.tokenize(PROMPTS[0].prompt)
    assert words_of(model, encoded.ids) == ["<|t2i|>", END, *text, END]
    assert [(s.start, s.stop, s.kind) for s in encoded.spans] == [
        (0, 2, "template"),
        (2, 2 + len(text), "content"),
        (2 + len(text), 3 + len(text), "template"),
    ]


def test_the_template_of_a_question(model) -> None:
    encoded = model.encode(QUESTIONS[0], "text", 10)
    words = words_of(model, encoded.ids)
    text = model.tokenizer.tokenize(QUESTIONS[0].prompt)
    assert words[:2] == ["<|mmu|>", "<|soi|>"] and words[66:] == ["<|eoi|>", END, "USER", ":", "\n", *text, "ASSISTANT", ":"]
    image, question = (s for s in encoded.spans if s.kind == "content")
    assert (image.modality, image.start, len(image)) == ("image", 2, 64)
    assert words[question.start : question.stop] == text
    assert encoded.everywhere == range(67) and encoded.spans[-1].stop == len(words)


def test_the_template_of_text(model) -> None:
    encoded = model.encode(PROMPTS[0], "text", 10)
    assert words_of(model, encoded.ids) == [END, *model.tokenizer.tokenize(PROMPTS[0].prompt)]
    assert len(encoded.everywhere) == 0


def test_the_template_with_clip(clip_model) -> None:
    item = Item("a", "c", "what is it?", Image.new("RGB", (60, 50), "red"))
    encoded = clip_model.encode(item, "text", 10)
    system = clip_model.tokenizer(SYSTEM)["input_ids"]
    first = 2 + len(system)
    asked = clip_model.tokenizer("USER: what is it? ASSISTANT:")["input_ids"]
    mark = clip_model.config.mark
    assert encoded.ids[:first] == [mark("<|mmu|>"), *system, mark("<|soi|>")]
    assert encoded.ids[first + 9 :] == [mark("<|eoi|>"), *asked]
    assert encoded.picture == encoded.everywhere == range(first, first + 9)
    image, question = (s for s in encoded.spans if s.kind == "content")
    assert (image.modality, image.start, image.stop) == ("image", first, first + 9)
    assert clip_model.tokenizer.decode(encoded.ids[question.start : question.stop]) == "what is it?"


def test_marks_follow_the_words() -> None:
    config = full_size()
    assert [config.mark(m) for m in ("[PAD]", "<|soi|>", "<|eoi|>", "<|t2i|>", "<|mmu|>")] == [50295, 50296, 50297, 50300, 50301]
    assert (config.first_code, config.mask, config.prompt_window) == (50305, 58497, 129)


# ------------------------------------------------------------------------------------------------------------------------- masks


def test_masks_position_by_position() -> None:
    """The rules, written out for one layout each: padding, three words, a picture of four; and a picture in front of words."""
    kinds = "ppwwwIIIICC"[:9]
    there = torch.tensor([[k != "p" for k in kinds]])
    image = torch.tensor([[k == "I" for k in kinds]])
    drawn = visibility(there, None, image)[0]
    for i, row in enumerate(kinds):
        for j, column in enumerate(kinds):
            if row == "p":
                expected = column == "p" and j <= i
            elif row == "w":
                expected = column == "w" and j <= i
            else:
                expected = column != "p"
            assert bool(drawn[i, j]) == expected
    read = visibility(torch.ones(1, 9, dtype=torch.bool), torch.arange(9)[None] < 5)[0]
    assert all(bool(read[i, j]) == (j < 5 or j <= i) for i in range(9) for j in range(9))


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
    assert (states["0003", 2, 0].states - passes[2][STEPS][0]).abs().max() > 1e-3  # another step has other states


def recorded_ids(model: ShowO, items: list[Item], settings: Generation) -> list[torch.Tensor]:
    """The token ids that entered each pass of sampling, prompts first."""
    entered: list[torch.Tensor] = []
    table = model.network.showo.model.embed_tokens
    handle = table.register_forward_hook(lambda module, args, output: entered.append(args[0].clone()))
    model.respond(items, "image", settings, 5)
    handle.remove()
    return entered


@torch.inference_mode()
def whole_pass(model: ShowO, prompt: list[int], picture: list[int]) -> list[torch.Tensor]:
    """The official pass: the prompt padded on the left to its window, the picture behind it, no cache: states by layer, (L, D)."""
    window = model.config.prompt_window
    ids = torch.tensor([[model.pad_id] * (window - len(prompt)) + prompt + picture])
    drawn = torch.arange(ids.shape[1])[None] >= window
    sees = visibility(ids != model.pad_id, None, drawn)
    layers: dict[int, torch.Tensor] = {}
    with hooked(model.stacks[0], lambda layer, output: layers.__setitem__(layer, output[0].clone())):
        model.network(model.network.embed(ids), sees, torch.arange(ids.shape[1])[None])
    return [layers[layer] for layer in sorted(layers)]


def test_a_recorded_steps_input_run_again_in_one_piece(model) -> None:
    states, _ = observed(model, PROMPTS[:2], "image", DRAW)
    entered = recorded_ids(model, PROMPTS[:2], DRAW)
    window = model.config.prompt_window
    for item in range(2):
        prompt = model.encode(PROMPTS[item], "image").ids
        for number, step in enumerate(NAMES, start=1):
            again = whole_pass(model, prompt, entered[number][item].tolist())
            for layer, layer_states in enumerate(again):
                assert (layer_states[window:] - states[step, layer, item].states).abs().max() < 1e-5
                # The prompt's states do not depend on the step.
                assert (layer_states[window - len(prompt) : window] - states["single", layer, item].states).abs().max() < 1e-5


def test_the_clean_pass_holds_the_finished_codes(model) -> None:
    states, _ = observed(model, PROMPTS[:1], "image", DRAW, "clean")
    assert {step for step, _, _ in states} == {"single", "clean"}
    prompt = model.encode(PROMPTS[0], "image")
    [codes] = model.draw_codes([prompt], DRAW, [item_seed(5, PROMPTS[0])]).tolist()
    config = model.config
    picture = [config.mark("<|soi|>"), *(config.first_code + code for code in codes), config.mark("<|eoi|>")]
    for layer, layer_states in enumerate(whole_pass(model, prompt.ids, picture)):
        assert (layer_states[config.prompt_window :] - states["clean", layer, 0].states).abs().max() < 1e-5


def test_spans_of_drawing(model) -> None:
    states, responses = observed(model, PROMPTS[:2], "image", DRAW)
    for item in range(2):
        prompt, final = states["single", 0, item], states["final", 0, item]
        assert {s.role for s in prompt.spans} == {"prompt"} and {s.role for s in final.spans} == {"response"}
        assert prompt.modalities("prompt") == ("text",) and final.modalities("response") == ("image",)
        assert len(final.select("response", Reading())) == 64 and len(final.states) == 66
        assert responses[item].tokens == 64
    assert {item for _, _, item in states} == {0, 1}  # the unconditional half is never seen
    assert {step for step, _, _ in observed(model, PROMPTS[:1], "image", DRAW, "final")[0]} == {"single", "final"}


@torch.inference_mode()
def test_codes_equal_the_published_loop(model) -> None:
    """The published sampler, written the long way: whole sequences, one row after the other, no cache, numbers in plain Python."""
    settings = Generation(temperature=0.7, guidance=3.0, steps=4)
    items = [PROMPTS[1], PROMPTS[0]]
    prompts = [model.encode(item, "image") for item in items]
    drawn = model.draw_codes(prompts, settings, [11, 12])[0].tolist()
    config, n = model.config, model.codes
    mark, weight = config.mark, settings.guidance - 1
    chance = uniforms([11], 2 * 4 * n, torch.device("cpu")).view(4, 2, n)
    tokens = [config.mask] * n
    temperature = settings.temperature
    for step in range(4):
        rows = []
        for prompt in (prompts[0].ids, [mark("<|t2i|>"), model.bos_id, model.eos_id]):
            final = whole_pass(model, prompt, [mark("<|soi|>"), *tokens, mark("<|eoi|>")])[-1]
            rows.append(model.network.logits(final)[-n - 1 : -1, config.first_code : config.mask])
        logits = (1 + weight) * rows[0] - weight * rows[1]
        probabilities = logits.softmax(-1)
        sampled, confidence = [], []
        temperature *= 1 - (step + 1) / 4
        for place in range(n):
            known = tokens[place] != config.mask
            code = (
                tokens[place] - config.first_code
                if known
                else int(draw(logits[place : place + 1], 1.0, chance[step, 0, place : place + 1]))
            )
            gumbel = -math.log(-math.log(chance[step, 1, place]))
            sampled.append(code)
            confidence.append(math.inf if known else math.log(probabilities[place, code]) + temperature * gumbel)
        unknown = sum(token == config.mask for token in tokens)
        stay = max(1, min(unknown - 1, math.floor(n * math.cos((step + 1) / 4 * math.pi / 2))))
        again = set(sorted(range(n), key=confidence.__getitem__)[:stay])
        tokens = [config.mask if place in again else config.first_code + code for place, code in enumerate(sampled)]
    assert sampled == drawn


def test_guidance_of_one_is_the_conditional_branch(model) -> None:
    prompts = [model.encode(PROMPTS[0], "image")]
    plain = model.draw_codes(prompts, Generation(temperature=0.0, guidance=1.0, steps=3), [0])
    almost = model.draw_codes(prompts, Generation(temperature=0.0, guidance=1.0 + 1e-9, steps=3), [0])
    assert torch.equal(plain, almost)


def test_one_step_draws_everything_at_once(model) -> None:
    settings = Generation(temperature=1.0, guidance=2.0, steps=1)
    states, [response] = observed(model, PROMPTS[:1], "image", settings)
    assert {step for step, _, _ in states} == {"single", "final", "clean"} and response.image.size == (32, 32)


def test_seeds_are_the_items(model) -> None:
    images = [model.respond(PROMPTS[:1], "image", DRAW, seed)[0].image.tobytes() for seed in (0, 0, 1)]
    assert images[0] == images[1] != images[2]


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
        assert len(forced) - len(generated) in (0, 1)  # the last token's state is in the teacher-forced pass alone
        assert (forced[: len(generated)] - generated).abs().max() < 1e-5


def test_a_picture_is_seen_from_everywhere_and_sees_no_question(model) -> None:
    """The first mark's state depends on the picture, and on no word behind it."""
    other = Item("x", "attribute", QUESTIONS[0].prompt, Image.new("RGB", (32, 32), "green"))
    reworded = Item("y", "attribute", "what is it", QUESTIONS[0].image)
    first, painted, worded = (
        observed(model, [i], "text", WRITE)[0]["single", 3, 0].states for i in (QUESTIONS[0], other, reworded)
    )
    assert (first[0] - painted[0]).abs().max() > 1e-3
    assert (first[:67] - worded[:67]).abs().max() < 1e-5


def test_all_networks_count_as_its_parameters(model, clip_model) -> None:
    for made, parts in (
        (model, [model.network, model.image_codes]),
        (clip_model, [clip_model.network, clip_model.image_codes, clip_model.clip.network]),
    ):
        assert made.identity()["parameters"] == sum(p.numel() for part in parts for p in part.parameters())


def test_with_clip_only_the_features_are_seen_from_everywhere(clip_model) -> None:
    item = Item("a", "c", "what is it?", Image.new("RGB", (60, 50), "red"))
    states, [response] = observed(clip_model, [item], "text", WRITE)
    assert response.tokens > 0
    first = clip_model.encode(item, "text", 10).picture.start
    reading = Reading()
    assert len(states["single", 0, 0].select("prompt", reading, "image")) == 9
    features = clip_model.see(clip_model.clip.pixels(item.picture())[None])[0]
    assert (states["single", 0, 0].states[first : first + 9] - features).abs().max() < 1e-6
    # The penultimate layer, without the class token.
    vision = clip_model.clip.network
    hidden: list[torch.Tensor] = []
    handle = vision.encoder.layers[1].register_forward_hook(
        lambda m, a, out: hidden.append(out[0] if isinstance(out, tuple) else out)
    )
    clip_model.clip.see(clip_model.clip.pixels(item.picture())[None])
    handle.remove()
    assert torch.equal(clip_model.network.mm_projector(hidden[0][:, 1:])[0], features)
    [image] = clip_model.respond([Item("b", "c", "a cat")], "image", DRAW)
    assert image.image.size == (4, 4)


@pytest.mark.parametrize(
    ("task", "items", "settings"),
    [
        ("image", PROMPTS, DRAW),
        *(("text", i, Generation(tokens=10, temperature=t)) for i in (QUESTIONS, PROMPTS) for t in (0.0, 1.0)),
    ],
)
def test_batch_of_one_equals_batch_of_many(model, task, items, settings) -> None:
    together, responses = observed(model, items, task, settings)
    for k, item in enumerate(items):
        alone, [response] = observed(model, [item], task, settings)
        assert response.text == responses[k].text
        if response.image is not None:  # the same codes; a pixel may round to the neighbouring level
            assert abs(np.asarray(response.image, int) - np.asarray(responses[k].image, int)).max() <= 1
        for (step, layer, _), seen in alone.items():
            assert seen.spans == together[step, layer, k].spans
            assert (seen.states - together[step, layer, k].states).abs().max() < 1e-5


def test_pictures_and_texts_in_one_batch(model) -> None:
    items = [PROMPTS[0], QUESTIONS[0]]
    together = model.respond(items, "text", WRITE)
    assert [r.text for r in together] == [model.respond([item], "text", WRITE)[0].text for item in items]


def test_marks_and_codes_have_no_letters(model) -> None:
    known = model.tokenizer.convert_tokens_to_ids("red")
    written = model._written([known, model.config.first_code, known, model.eos_id, 5], 10)
    assert (written.text, written.content, written.full) == ("red red", 3, False)
    assert model._written([known] * 10, 10).full


# -------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("item", "task", "said"),
    [
        (Item("a", "c", "  "), "image", "item 'a' has an empty prompt"),
        (Item("a", "c", "a large green dragon"), "image", "does not know the words dragon of item 'a'"),
        (Item("a", "c", "a red ring", Image.new("RGB", (4, 4))), "image", "draws from text prompts alone"),
        (Item("a", "c", "a red ring " * 50), "image", "takes 153 positions .* room for 129"),
        (Item("a", "c", "a red ring " * 200), "text", "takes 60. positions .* room for 502"),
    ],
)
def test_prompts_that_cannot_be_taken(model, item, task, said) -> None:
    with pytest.raises(ValueError, match=said):
        model.respond([item], task, WRITE if task == "text" else DRAW)


def test_a_long_prompt_is_cut_as_published(model) -> None:
    """Cut to 129 positions, the last of which is the end."""
    item = Item("a", "c", "a red ring " * 50)
    encoded = model.encode(item, "image", truncate=True)
    assert len(encoded.ids) == 129 and encoded.ids[-1] == model.eos_id and encoded.flags == ("cut",)
    [response] = model.respond([item], "image", DRAW, truncate=True)
    assert response.flags == ("cut",)


def test_parts_must_belong_together(model, clip_model) -> None:
    with pytest.raises(ValueError, match=r"has 25\d tokens, its Show-o"):
        ShowO(model.network, model.image_codes, clip_model.tokenizer, "x")
    with pytest.raises(ValueError, match="x takes no CLIP"):
        ShowO(model.network, model.image_codes, model.tokenizer, "x", clip=clip_model.clip)
    with pytest.raises(ValueError, match="16 codes, not 2048"):
        ShowO(model.network, clip_model.image_codes, model.tokenizer, "x")
    with pytest.raises(ValueError, match="is not 100"):
        ShowoConfig(vocab_size=100)


# ------------------------------------------------------------------------------------------------------------------- full sizes


def manifest(path) -> dict[str, tuple[int, ...]]:
    pairs = (line.split("\t") for line in path.read_text().splitlines() if line)
    return {key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for key, shape in pairs}


@pytest.mark.parametrize("resolution", [256, 512])
@pytest.mark.parametrize(("clip", "billions"), [(False, 1.448), (True, 1.454)])
def test_published_sizes_cover_the_manifest(shared, resolution, clip, billions) -> None:
    config = full_size(resolution, clip)
    assert config.num_vq_tokens == {256: 256, 512: 1024}[resolution]
    with torch.device("meta"):
        network = Showo(config)
    ours = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert keys_of(config).shapes(manifest(shared / "manifests" / "showo.keys.txt")) == ours
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, abs=0.0006)


def test_the_image_tokenizer_covers_its_manifest(shared) -> None:
    with torch.device("meta"):
        network = Magvit2(Magvit2Config())
    ours = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert ours == manifest(shared / "manifests" / "showo_magvitv2.keys.txt")
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(95.4, abs=0.05)
