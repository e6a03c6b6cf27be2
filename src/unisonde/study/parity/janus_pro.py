"""Janus-Pro against the official code: understanding (prefill and greedy tokens), drawing with guidance, and the image tokenizer.

What runs is a whole `JanusPro` with the official weights: its embedding of pictures, its teacher-forced pass, its writer, its assembly of
unconditional prompts, its sampling loop and its image tokenizer. Fed are token ids, pixel values and drawn codes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

from unisonde.models.base import Generation
from unisonde.models.janus_pro import (
    BEGIN_IMAGE,
    BOS,
    END_IMAGE,
    EOS,
    IMAGE,
    PAD,
    SPECIAL_TOKENS,
    Encoded,
    ImageProcessor,
    JanusPro,
)
from unisonde.models.parts.checkpoint import empty, fill
from unisonde.models.parts.janus_keys import KEYS, configuration
from unisonde.models.parts.segments import spans_of
from unisonde.models.trace import Row, Stack, hooked
from unisonde.study.parity.fixture import Fixture

INPUTS = ("und.input_ids", "und.pixel_values", "t2i.tokens", "t2i.generated", "vq.encode_x")


@torch.inference_mode()
def check(fixture: Fixture) -> None:
    """Compare every output of the fixture."""
    model = build(fixture)
    understanding(fixture, model)
    drawing(fixture, model)
    fixture.compare("vq.encode_idx", model.codes_of(fixture.feed("vq.encode_x")).flatten())


def build(fixture: Fixture) -> JanusPro:
    """Our model with the official weights."""
    ids = fixture.config["run"]["ids"]
    network = empty(lambda: JanusForConditionalGeneration(configuration(fixture.config, ids["image"])))
    fill(network, fixture.weights.items(), KEYS, "cpu", torch.float32, fixture.name)
    return JanusPro(network, tokenizer_of(fixture), ImageProcessor(), fixture.name)


def tokenizer_of(fixture: Fixture) -> PreTrainedTokenizerFast:
    """A tokenizer of numbers, with the special tokens under the ids of the fixture; those that it does not use come last."""
    size, ids = fixture.config["language_config"]["vocab_size"], fixture.config["run"]["ids"]
    special = {BOS: ids["bos"], PAD: ids["pad"], BEGIN_IMAGE: ids["boi"], END_IMAGE: ids["eoi"], IMAGE: ids["image"]}
    # Beyond the vocabulary, so that the recorded writing cannot meet the end of a text.
    special |= {token: size + k for k, token in enumerate(token for token in SPECIAL_TOKENS if token not in special)}
    assert special[EOS] >= size
    words = {str(k): k for k in range(size) if k not in special.values()}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words | special)), bos_token=BOS, pad_token=PAD)


def understanding(fixture: Fixture, model: JanusPro) -> None:
    """Picture and text in, text out."""
    ids, pixels = fixture.feed("und.input_ids"), fixture.feed("und.pixel_values")
    features = model.see(pixels[:, 0])
    fixture.compare("und.inputs_embeds", model.embed(ids, features))

    row = ids[0].tolist()
    spans = spans_of([("image" if token == model.image_id else "text", "content") for token in row])
    with recorded(model.stacks[0]) as passes:
        last = model.read([row], [Row(0, spans)], features)
    fixture.states("und.prefill", layers(passes, 0))
    fixture.compare("und.logits", model.network.lm_head(last))

    tokens = fixture.config["run"]["und"]["greedy_tokens"]
    with recorded(model.stacks[0]) as passes:
        [written] = model.write([Encoded(row, spans)], features, Generation(tokens=tokens, temperature=0.0), [0])
    fixture.compare("und.generated", torch.tensor([written.ids]))
    for step in range(tokens):
        fixture.states(f"und.gen{step}", layers(passes, step))


def drawing(fixture: Fixture, model: JanusPro) -> None:
    """Text in, image codes out. Official rows alternate conditional and unconditional; ours are first the one half, then the other."""
    run, tokens, codes = fixture.config["run"]["t2i"], fixture.feed("t2i.tokens").long(), fixture.feed("t2i.generated").long()
    prompts = tokens[::2].tolist()
    ours = torch.tensor([row for prompt in prompts for row in (prompt, model.unconditional(prompt))])
    fixture.compare("t2i.tokens", ours)

    logits: list[Tensor] = []

    def recorded_code(step: int, guided: Tensor) -> Tensor:
        logits.append(guided)
        return codes[:, step]

    with recorded(model.stacks[0]) as passes:
        model.code_by_code(prompts, run["cfg_weight"], recorded_code)
    alternating = torch.arange(2 * len(prompts)).view(2, -1).T.flatten()
    for step in range(run["codes"]):
        fixture.states(f"t2i.step{step}", [states[alternating] for states in layers(passes, step)])
    fixture.compare("t2i.cfg_logits", torch.stack(logits, 1))
    fixture.compare("t2i.image", model.pixels_of(codes))


@contextmanager
def recorded(stack: Stack) -> Iterator[dict[int, list[Tensor]]]:
    """By layer, what it gave in each pass inside."""
    passes: dict[int, list[Tensor]] = defaultdict(list)
    with hooked(stack, lambda layer, output: passes[layer].append(output.clone())):
        yield passes


def layers(passes: dict[int, list[Tensor]], number: int) -> list[Tensor]:
    """All layers of one pass, in order."""
    return [passes[layer][number] for layer in sorted(passes)]
