"""Image-and-text-to-text models from folders in the hub's layout: LLaVA with its processor, Qwen2-VL and Qwen2.5-VL without."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from PIL import Image

from unisonde.data.item import Item
from unisonde.models.base import Generation
from unisonde.models.image_text import ImageTextLM, load
from unisonde.models.trace import Trace

VISION = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: "
    "{% for c in m.content %}{% if c.type == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }} {% endif %}{% endfor %}"
    "{% else %}ASSISTANT: {% for c in m.content %}{{ c.text }}</s>{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
GREEDY = Generation(tokens=5, temperature=0.0)


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


ITEMS = [
    Item("wide", "", "what is it?", picture(32, 16)),
    Item("text", "", "two blue squares"),
    Item("tall", "", "which colour has the circle?", picture(16, 40, seed=1)),
]


def write_qwen(folder: Path, kind: str) -> None:
    tokenizer = tiny.byte_tokenizer(VISION, QWEN_CHAT)
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}
    text = tiny.GROUPED | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        settings, build = transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration
    else:
        vision |= {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 16,
        }
        settings, build = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
    torch.manual_seed(0)
    tiny.enliven(build(settings(text_config=text, vision_config=vision, **ids))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "patch_size": 4,
        "merge_size": 2,
    }
    settings |= {"temporal_patch_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def write_llava(folder: Path) -> None:
    tokenizer = tiny.byte_tokenizer(["<image>"], bos=True)
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**tiny.GROUPED),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    tiny.enliven(transformers.LlavaForConditionalGeneration(config)).save_pretrained(folder)
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )
    processor.save_pretrained(folder)


@cache
def built(kind: str, where: Path) -> ImageTextLM:
    folder = where / kind
    folder.mkdir()
    write_llava(folder) if kind == "llava" else write_qwen(folder, kind)
    return load(str(folder), f"tiny/{kind}")


KINDS = ("llava", "qwen2_vl", "qwen2_5_vl")


@pytest.fixture(scope="module", params=KINDS)
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageTextLM:
    return built(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> ImageTextLM:
    return built("llava", tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> ImageTextLM:
    return built("qwen2_vl", tmp_path_factory.getbasetemp())


def read(lm: ImageTextLM, item: Item) -> list[tuple[str, str, str]]:
    """Modality, kind and text of the spans of a prompt."""
    prompt = lm.encode(item, 5)
    assert [s.start for s in prompt.spans] == [0, *(s.stop for s in prompt.spans[:-1])] and prompt.spans[-1].stop == len(prompt.ids)
    return [(s.modality, s.kind, lm.tokenizer.decode(prompt.ids[s.start : s.stop])) for s in prompt.spans]


def test_how_they_were_loaded(llava: ImageTextLM, qwen: ImageTextLM) -> None:
    assert llava.processor is not None and llava.image_processor is None
    assert (qwen.processor is None) == (qwen.image_processor is not None)
    assert qwen.stacks[0].depth == llava.stacks[0].depth == 3 and qwen.stacks[0].norm is not None
    assert llava.ends == [257] and qwen.ends == [257, qwen.tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_the_spans_of_llava(llava: ImageTextLM) -> None:
    # 16 x 16 pixels in patches of 4 are 16 features, whatever the picture's size; the template writes no BOS, the tokenizer does.
    assert read(llava, ITEMS[0]) == [
        ("text", "template", "<s>USER: "),
        ("image", "content", "<image>" * 16),
        ("text", "template", "\n"),
        ("text", "content", "what is it?"),
        ("text", "template", " ASSISTANT:"),
    ]
    assert read(llava, ITEMS[1]) == [
        ("text", "template", "<s>USER: "),
        ("text", "content", "two blue squares"),
        ("text", "template", " ASSISTANT:"),
    ]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_spans_of_qwen(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    qwen = built(kind, tmp_path_factory.getbasetemp())
    # One feature is 8 x 8 pixels: 32 x 16 are 8 of them, 16 x 40 are 10.
    for item, features in ((ITEMS[0], 8), (ITEMS[2], 10)):
        assert read(qwen, item) == [
            ("text", "template", "<|im_start|>user\n<|vision_start|>"),
            ("image", "content", "<|image_pad|>" * features),
            ("text", "template", "<|vision_end|>"),
            ("text", "content", item.prompt),
            ("text", "template", "<|im_end|>\n<|im_start|>assistant\n"),
        ]


def test_states_equal_output_hidden_states(lm: ImageTextLM) -> None:
    [stack] = lm.stacks
    for item in ITEMS:
        kept = tiny.Kept()
        [response] = lm.respond([item], "text", GREEDY, trace=Trace(kept))
        prompt = lm.encode(item, 5)
        length = len(kept.states[0, 0])
        assert length >= len(prompt.ids) + response.tokens
        ids = torch.tensor([prompt.ids])
        inputs = dict(prompt.inputs)
        if inputs and "qwen" in lm.name:
            inputs["mm_token_type_ids"] = (ids == lm.image_id).int()
        with torch.inference_mode():
            expected = lm.network(input_ids=ids, output_hidden_states=True, use_cache=False, **inputs).hidden_states
        for layer in range(stack.depth):
            torch.testing.assert_close(kept.states[0, layer][: len(prompt.ids)], expected[layer][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kept.states[0, stack.final][: len(prompt.ids)], expected[-1][0], rtol=1e-5, atol=1e-5)


def test_the_teacher_forced_pass_has_the_states_of_generation(lm: ImageTextLM) -> None:
    for item in ITEMS:
        kept = tiny.Kept()
        with tiny.generation_states(lm.stacks[0]) as passes:
            [written] = lm.respond([item], "text", GREEDY)
        [response] = lm.respond([item], "text", GREEDY, trace=Trace(kept))
        assert response == written
        for layer, outputs in passes.items():
            once = torch.cat([output[0] for output in outputs])
            assert len(once) == len(kept.states[0, layer]) - 1  # generation never runs its last token
            torch.testing.assert_close(kept.states[0, layer][: len(once)], once, rtol=1e-5, atol=1e-5)


def test_a_batch_is_its_items_one_by_one(lm: ImageTextLM) -> None:
    for generation in (GREEDY, Generation(tokens=5, temperature=1.2)):
        together = tiny.Kept()
        batch = lm.respond(ITEMS, "text", generation, seed=1, trace=Trace(together))
        for k in (2, 1, 0):  # another order: what one item leaves in the model must not reach the next
            alone = tiny.Kept()
            assert lm.respond([ITEMS[k]], "text", generation, seed=1, trace=Trace(alone)) == [batch[k]]
            for layer in range(4):
                assert torch.equal(alone.states[0, layer], together.states[k, layer])


def test_the_picture_matters_and_the_words_alone_are_text(lm: ImageTextLM) -> None:
    states = []
    for seed in (3, 4):
        kept = tiny.Kept()
        lm.respond([Item("i", "", "what?", picture(seed=seed))], "text", GREEDY, trace=Trace(kept))
        [seen] = [s for s in kept.seen if s.layer == 0]
        states.append((seen.select("prompt", Trace(kept).reading, "image"), seen.select("prompt", Trace(kept).reading, "text")))
        assert seen.modalities("prompt") == ("image", "text")
    (image, text), (other_image, other_text) = states
    assert not torch.equal(image, other_image)
    assert torch.equal(text, other_text) and len(text) == len("what?")


def test_a_picture_without_words(lm: ImageTextLM) -> None:
    assert [kind for _, kind, _ in read(lm, Item("i", "", "", picture()))] == ["template", "content", "template"]


def test_what_it_cannot_take(lm: ImageTextLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="item 'e' has an empty prompt"):
        lm.respond([Item("e", "", " ")], "text", GREEDY)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken.png"):
        lm.respond([Item("b", "", "what?", tmp_path / "broken.png")], "text", GREEDY)
    with pytest.raises(ValueError, match=r"item 'long' takes .* has room for 251"):
        lm.respond([Item("long", "", "x" * 300, picture())], "text", GREEDY)
    [cut] = lm.respond([Item("long", "", "x" * 300, picture())], "text", GREEDY, truncate=True)
    assert "cut" in cut.flags


def test_a_family_that_needs_its_processor_says_so(qwen: ImageTextLM) -> None:
    qwen.network.config.model_type, kept = "smolvlm", qwen.network.config.model_type
    try:
        with pytest.raises(ValueError, match=r"mine \(smolvlm\) needs its published processor.*pip install torchvision"):
            ImageTextLM(qwen.network, qwen.tokenizer, "mine")
    finally:
        qwen.network.config.model_type = kept


def test_a_processor_that_rewrites_the_text_is_refused(llava: ImageTextLM) -> None:
    prompt = llava.encode(ITEMS[0], 5)
    ids = prompt.ids[:1] + prompt.ids[-30:]
    spans = (prompt.spans[0].__class__(0, len(ids), "prompt", "text", "content"),)
    with pytest.raises(ValueError, match="rewrites the text of item 'wide'"):
        llava._follow(prompt.ids, [*ids[:-3], 65, *ids[-3:]], spans, "wide")


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_qwen(tmp_path, "qwen2_vl")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"^preprocessor_config.json of .* is not in that folder"):
        load(str(tmp_path), "mine")
