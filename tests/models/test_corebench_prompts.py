"""The 1,080 prompts of T2I-CoReBench through each family's template of drawing, at its published sizes, with a stand-in tokenizer.

Its tokens are words and marks, so lengths are those of words: a published tokenizer makes somewhat more of them. No network has memory
for its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

from unisonde.data import corebench
from unisonde.data.item import Item
from unisonde.models import janus_pro, janusflow, showo, showo2
from unisonde.models.parts import flow_llama, janus_marks, magvit2, showo2_network, showo_network, siglip, wan_vae
from unisonde.models.parts.checkpoint import empty


@dataclass(frozen=True)
class Family:
    """A model, the positions that its drawing takes, the window of a prompt, and how many of the 1,080 prompts are longer."""

    model: Any
    room: int
    window: int
    longer: int


def tokenizer_of(items: list[Item], special: tuple[str, ...], bos: str | None = None) -> PreTrainedTokenizerFast:
    """Words and marks of these prompts and of the templates; BOS first if there is one."""
    splitter = pre_tokenizers.Split(Regex(r"\w+|\S|\n"), behavior="removed", invert=True)
    texts = [item.prompt for item in items] + ["User: Assistant:\n"]
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}))
    core.pre_tokenizer = splitter
    core.add_special_tokens(list(special))
    if bos:
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=special[0], eos_token=special[0])


def janus_pro_1b(items: list[Item]) -> Family:
    network = empty(lambda: JanusForConditionalGeneration(janus_pro.full_size(*janus_pro.SIZES["1B"])))
    tokenizer = tokenizer_of(items, janus_pro.SPECIAL_TOKENS, janus_marks.BOS)
    return Family(janus_pro.JanusPro(network, tokenizer, None, "Janus-Pro"), 576, 16384 - 576, 0)


def janusflow_1_3b(items: list[Item]) -> Family:
    network = empty(lambda: flow_llama.JanusFlowNetwork(flow_llama.full_size()))
    tokenizer = tokenizer_of(items, janusflow.SPECIAL_TOKENS, janus_marks.BOS)
    model = janusflow.JanusFlow(network, janusflow.twin_autoencoder(), tokenizer, siglip.Pictures(384), "JanusFlow")
    return Family(model, 577, 16384 - 577, 0)


def show_o(items: list[Item]) -> Family:
    tokenizer = tokenizer_of(items, ("<|endoftext|>",))
    full, words = showo_network.full_size(), len(tokenizer)
    config = replace(full, llm_vocab_size=words, vocab_size=full.vocab_size - full.llm_vocab_size + words)
    codes = empty(lambda: magvit2.Magvit2(magvit2.Magvit2Config()))
    return Family(showo.ShowO(empty(lambda: showo_network.Showo(config)), codes, tokenizer, "Show-o"), 0, 129, 738)


def show_o2(items: list[Item]) -> Family:
    network = empty(lambda: showo2_network.Showo2Network(showo2_network.SIZES["1.5B"]))
    tokenizer = tokenizer_of(items, showo2.SPECIAL_TOKENS)
    return Family(showo2.Showo2(network, wan_vae.build(), tokenizer, "Show-o2"), 0, 290 + 2, 90)


@pytest.fixture(scope="module")
def items(shared: Path) -> list[Item]:
    return corebench.read(shared / "data" / "t2i-corebench")


@pytest.mark.parametrize("build", [janus_pro_1b, janusflow_1_3b, show_o, show_o2])
def test_every_prompt_is_taken_refused_or_cut(items: list[Item], build: Callable[[list[Item]], Family]) -> None:
    family = build(items)
    model, tokenizer = family.model, family.model.tokenizer
    longer, lengths = [], []
    for item in items:
        words = tokenizer(item.prompt, add_special_tokens=False)["input_ids"]
        encoded = model.encode(item, "image", family.room, truncate=True)
        [text] = [span for span in encoded.spans if span.kind == "content"]
        # Spans cover every position once, and the content is the prompt's own words, from the first on.
        assert [s.start for s in encoded.spans] == [0, *[s.stop for s in encoded.spans[:-1]]]
        assert encoded.spans[-1].stop == len(encoded.ids)
        assert (text.role, text.modality) == ("prompt", "text") and encoded.ids[text.start : text.stop] == words[: len(text)]
        around = len(encoded.ids) - len(text)
        lengths.append(around + len(words))
        if lengths[-1] <= family.window:
            assert len(text) == len(words) and encoded.flags == ()
            assert model.encode(item, "image", family.room) == encoded
        else:
            longer.append(item.id)
            assert len(encoded.ids) == family.window and encoded.flags == ("cut",)
            with pytest.raises(ValueError, match=rf"item '{item.id}' takes {lengths[-1]} positions .* room for {family.window};"):
                model.encode(item, "image", family.room)
    print(f"{model.name}: {min(lengths)} to {max(lengths)} positions, {len(longer)} of {len(items)} cut to {family.window}")
    assert len(items) == 1080 and len(longer) == family.longer
