"""Any causal language model: states against `output_hidden_states` and against generation, spans, batches, errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from torch import nn

from unisonde.data.item import Item
from unisonde.models.base import Generation
from unisonde.models.causal_lm import CausalLM, load
from unisonde.models.parts.decoder import find_stack
from unisonde.models.trace import Trace

ITEMS = [Item("a", "", "a red circle"), Item("b", "", "two blue squares over a green one"), Item("c", "", "no")]
GREEDY = Generation(tokens=7, temperature=0.0)
SAMPLED = Generation(tokens=7, temperature=1.3)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def model(family: str = "llama", template: str | None = None, **changes: Any) -> CausalLM:
    tokenizer = tiny.byte_tokenizer(["<|im_start|>", "<|im_end|>"], template)
    return CausalLM(tiny.causal(family, **changes), tokenizer, f"tiny/{family}")


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_states_equal_output_hidden_states(family: str) -> None:
    lm = model(family)
    [stack] = lm.stacks
    assert stack.depth == 3 and (stack.norm is None) == (family == "opt-post-norm")
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), tiny.generation_states(stack) as passes:
        expected = lm.network(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    if family == "mamba":  # its hidden_states begin behind the first layer and hold the last layer's once more, after the norm
        expected = (lm.network.get_input_embeddings()(ids), *expected)
    for layer in range(stack.depth):
        torch.testing.assert_close(passes[layer][0], expected[layer], rtol=0, atol=0)
    last = stack.final if stack.norm is not None else stack.depth
    if family != "opt-post-norm":  # its hidden_states end after a projection to the width of the embeddings
        torch.testing.assert_close(passes[last][0], expected[-1], rtol=0, atol=0)
    assert not torch.equal(passes[3][0], passes[2][0])


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_the_teacher_forced_pass_has_the_states_of_generation(family: str) -> None:
    lm = model(family)
    [stack] = lm.stacks
    kept = tiny.Kept()
    with tiny.generation_states(stack) as passes:
        responses = lm.respond(ITEMS, "text", GREEDY)
    observed = lm.respond(ITEMS, "text", GREEDY, trace=Trace(kept))
    assert [r.text for r in observed] == [r.text for r in responses]
    longest = max(len(lm.encode(item, 7).ids) for item in ITEMS)
    for k, item in enumerate(ITEMS):
        start = longest - len(lm.encode(item, 7).ids)
        for layer, outputs in passes.items():
            written = torch.cat([output[k] for output in outputs])[start:]
            states = kept.states[k, layer]
            n = min(len(states), len(written))  # a row that ends early goes on as padding; the last token is never run
            assert n >= len(lm.encode(item, 7).ids) + responses[k].tokens - 1
            torch.testing.assert_close(states[:n], written[:n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_batches_change_nothing(family: str, generation: Generation) -> None:
    lm = model(family)
    together, alone = tiny.Kept(), [tiny.Kept() for _ in ITEMS]
    batch = lm.respond(ITEMS, "text", generation, seed=3, trace=Trace(together))
    for k, (item, kept) in enumerate(zip(ITEMS, alone, strict=True)):
        [response] = lm.respond([item], "text", generation, seed=3, trace=Trace(kept))
        assert response == batch[k]
        assert kept.spans() == together.spans(k)
        for layer in range(4):
            torch.testing.assert_close(kept.states[0, layer], together.states[k, layer], rtol=1e-5, atol=1e-5)


def test_a_repetition_penalty_does_not_see_padding() -> None:
    lm = model("qwen2")
    lm.network.generation_config.repetition_penalty = 1.5
    lm.pad_id = 97  # a letter of the prompts
    batch = lm.respond(ITEMS, "text", GREEDY)
    assert batch == [lm.respond([item], "text", GREEDY)[0] for item in ITEMS]


def test_seeds_change_samples() -> None:
    lm = model()
    texts = {lm.respond(ITEMS[:1], "text", SAMPLED, seed=seed)[0].text for seed in range(5)}
    assert len(texts) > 1
    assert lm.respond(ITEMS[:1], "text", SAMPLED, seed=1) == lm.respond(ITEMS[:1], "text", SAMPLED, seed=1)


# -- spans ----------------------------------------------------------------------------------------------------------------------


def read(lm: CausalLM, item: Item, generation: Generation = GREEDY) -> list[tuple[str, str, str]]:
    """Role, kind and text of each span."""
    kept = tiny.Kept()
    [response] = lm.respond([item], "text", generation, trace=Trace(kept))
    ids = lm.encode(item, 0).ids
    spans = kept.spans()
    assert [s.start for s in spans] == [0, *(s.stop for s in spans[:-1])]
    assert sum(len(s) for s in spans if s.role == "response" and s.kind == "content") == response.tokens
    return [(s.role, s.kind, lm.tokenizer.decode(ids[s.start : s.stop])) for s in spans if s.role == "prompt"]


def test_without_a_template_everything_is_content() -> None:
    assert read(model(), ITEMS[0]) == [("prompt", "content", "a red circle")]


def test_bos_is_template() -> None:
    lm = CausalLM(tiny.causal("llama"), tiny.byte_tokenizer(bos=True), "tiny")
    assert read(lm, ITEMS[0]) == [("prompt", "template", "<s>"), ("prompt", "content", "a red circle")]


@pytest.mark.parametrize("prompt", ["a red circle", "  spaced\n", "user", "<|im_end", "日本 😀", "{{ m.role }}"])
def test_chat_templates_surround_the_prompt(prompt: str) -> None:
    lm = model(template=CHATML)
    assert read(lm, Item("i", "", prompt)) == [
        ("prompt", "template", "<|im_start|>user\n"),
        ("prompt", "content", prompt.strip()),
        ("prompt", "template", "<|im_end|>\n<|im_start|>assistant\n"),
    ]


def test_a_template_that_writes_bos_gets_no_second_one() -> None:
    tokenizer = tiny.byte_tokenizer(bos=True, template="<s>{% for m in messages %}[{{ m.content }}]{% endfor %}")
    lm = CausalLM(tiny.causal("llama"), tokenizer, "tiny")
    assert lm.encode(ITEMS[0], 7).ids == [256, *tokenizer("[a red circle]", add_special_tokens=False)["input_ids"]]


def test_the_end_of_a_turn_ends_a_response() -> None:
    lm = model(template=CHATML)
    assert lm.ends == [257, lm.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert model().ends == [257]


def test_the_token_that_ends_a_response_is_template() -> None:
    lm = model()
    [free] = lm.respond(ITEMS[:1], "text", GREEDY)
    assert free.flags == ("full",) and free.tokens == 7
    sequence = lm.network.generate(
        **lm.tokenizer("a red circle", return_tensors="pt"), max_new_tokens=7, do_sample=False, pad_token_id=0
    )
    third = sequence[0, -5].item()
    lm.ends = [third]
    kept = tiny.Kept()
    [ended] = lm.respond(ITEMS[:1], "text", GREEDY, trace=Trace(kept))
    first = sequence[0, -7:].tolist().index(third)
    assert ended.tokens == first and ended.flags == ()
    last = kept.spans()[-1]
    assert (last.role, last.kind, len(last)) == ("response", "template", 1)
    assert len(kept.states[0, 0]) == 12 + first + 1


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "rewrites the prompt of item 'a'"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "writes the prompt of item 'a' 2 times"),
        ("nothing", "writes the prompt of item 'a' 0 times"),
        ("{{ raise_exception('no users here') }}", "refuses item 'a': no users here"),
    ],
)
def test_templates_that_hide_the_prompt_are_refused(template: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        model(template=template).respond(ITEMS[:1], "text", GREEDY)


# -- items and settings ---------------------------------------------------------------------------------------------------------


def test_the_window() -> None:
    lm = model(max_position_embeddings=20)
    long = Item("long", "", "x" * 30)
    with pytest.raises(ValueError, match=r"item 'long' takes 30 positions.*has room for 13"):
        lm.respond([ITEMS[0], long], "text", GREEDY)
    fits, cut = lm.respond([ITEMS[0], long], "text", GREEDY, truncate=True)
    assert "cut" in cut.flags and "cut" not in fits.flags
    assert len(lm.encode(long, 7, truncate=True).ids) == 13
    assert model("gpt2").window == model("mpt").window == 256 and model("bloom").window is None


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        (Item("e", "", " \n"), "item 'e' has an empty prompt"),
        (Item("p", "", "what?", Image.new("RGB", (4, 4))), "item 'p' has an image prompt"),
    ],
)
def test_items_that_it_cannot_take(item: Item, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        model().respond([ITEMS[0], item], "text", GREEDY)


def test_it_draws_nothing() -> None:
    with pytest.raises(ValueError, match="cannot do the task 'image'"):
        model().respond(ITEMS, "image", GREEDY)


def test_published_settings() -> None:
    lm = model()
    assert lm.defaults("text") == Generation(tokens=64, temperature=0.0)
    network = tiny.causal("llama")
    network.generation_config.update(do_sample=True, temperature=0.6, max_new_tokens=32, eos_token_id=[5, 6])
    lm = CausalLM(network, tiny.byte_tokenizer(), "tiny")
    assert lm.defaults("text") == Generation(tokens=32, temperature=0.6) and lm.ends == [5, 6, 257]
    network.generation_config.do_sample = False
    assert CausalLM(network, tiny.byte_tokenizer(), "tiny").defaults("text").temperature == 0.0


# -- finding the layers ---------------------------------------------------------------------------------------------------------


def test_layers_that_cannot_be_told_are_an_error() -> None:
    network = tiny.causal("llama")
    network.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"cannot tell the layers of LlamaForCausalLM.*says 5.*layers \(3\)"):
        find_stack(network)
    network = tiny.causal("llama")
    network.model.others = nn.ModuleList([nn.Identity()] * 3)
    with pytest.raises(ValueError, match="cannot tell the layers"):
        find_stack(network)


def test_a_last_norm_of_an_unknown_name_is_an_error() -> None:
    network = tiny.causal("llama")
    network.model.closing = network.model.norm
    del network.model.norm
    with pytest.raises(ValueError, match=r"cannot tell the last norm.*closing"):
        find_stack(network)


# -- loading --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.causal("qwen2").save_pretrained(tmp_path)
    tiny.byte_tokenizer(["<|im_start|>", "<|im_end|>"], CHATML).save_pretrained(tmp_path)
    return tmp_path


def test_a_local_folder(folder: Path) -> None:
    lm = load(str(folder), "mine")
    again = load(str(folder), "mine")
    assert lm.name == "mine" and lm.chat and lm.source == folder and lm.network.dtype == torch.float32
    assert lm.generate("hello", tokens=4) == again.generate("hello", tokens=4)
    assert lm.identity()["weights"] == again.identity()["weights"] is not None
    assert load(str(folder), "mine", dtype=torch.bfloat16).identity()["dtype"] == "bfloat16"
    torch.testing.assert_close(lm.network.state_dict(), tiny.causal("qwen2").state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("absent", "sentence"),
    [
        ("config.json", "^config.json of .* is not in that folder; give the path of a local folder"),
        ("model.safetensors", "^model.safetensors of .* is not in that folder"),
        ("tokenizer.json", "^tokenizer.json of .* is not in that folder"),
    ],
)
def test_missing_files_are_named(folder: Path, absent: str, sentence: str) -> None:
    (folder / absent).unlink()
    with pytest.raises(ValueError, match=sentence):
        load(str(folder), "mine")


def test_truncated_weights_are_an_error(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load(str(folder), "mine")
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^config.json of 'nobody/nothing'.*local folder") as caught:
        load("nobody/nothing", "mine")
    assert "\n" not in str(caught.value)


def test_gaps_in_the_weights_are_an_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}))
    with pytest.raises(ValueError, match=r"lack model\.layers\.3.* and \d+ more"):
        load(str(folder), "mine")


def test_code_of_the_repository_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match=r"trust_remote_code|cannot be loaded"):
        load(str(folder), "mine")
