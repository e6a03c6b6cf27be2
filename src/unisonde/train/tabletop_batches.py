"""Training batches from Tabletop: word vocabulary, tokenizer, and examples of four kinds.

| kind | prompt | response |
|---|---|---|
| draw | a text prompt of any category | the picture |
| infer | the same | the description of the scene that follows from it |
| caption | a picture and a request | its description |
| answer | a picture and a question of any category | what it is about, and the conclusion |
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from unisonde.data.tabletop import grammar
from unisonde.data.tabletop.scene import Scene, Split, draw_scene

Kind = Literal["draw", "infer", "caption", "answer"]
KINDS: tuple[Kind, ...] = ("draw", "infer", "caption", "answer")

COMPOSITION_SHARE = 0.6
"""Share of direct descriptions among text prompts; the other three categories share the rest."""

ATTRIBUTE_SHARE = 0.7
"""Share of attribute questions among questions; the other five categories share the rest. They teach finding a thing by its name."""

_WORDS = Regex(r"\n\n|\n|\w+|[^\w\s]")


@dataclass(frozen=True)
class Example:
    """One training example: a text prompt, a scene that is shown or drawn or neither, and the text to write, if any."""

    kind: Kind
    prompt: str
    scene: Scene
    response: str | None


def example(rng: random.Random, kind: Kind, split: Split = "train") -> Example:
    """A random example of one kind."""
    if kind in ("draw", "infer"):
        direct = rng.random() < COMPOSITION_SHARE
        prompt = grammar.prompt(rng, split, "composition" if direct else rng.choice(grammar.TEXT_CATEGORIES[1:]))
        return Example(
            kind, prompt.text, prompt.scene, None if kind == "draw" else grammar.describe(prompt.scene, prompt.background)
        )
    if kind == "caption":
        scene = draw_scene(rng, split, rng.choice((1, 2, 3)))
        return Example(kind, rng.choice(grammar.CAPTION_REQUESTS), scene, grammar.describe(scene))
    asked = "attribute" if rng.random() < ATTRIBUTE_SHARE else rng.choice(grammar.IMAGE_CATEGORIES[1:])
    scene, question = grammar.question(rng, split, asked)
    return Example(kind, question.text, scene, grammar.answer(scene, question))


def word_tokenizer(special: Sequence[str], bos: str, eos: str, pad: str, unknown: str = "<unk>") -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words, marks and line breaks of the grammar; it writes BOS first."""
    rng = random.Random(0)
    words = {"\n", "\n\n", ":"}
    splitter = pre_tokenizers.Split(_WORDS, behavior="removed", invert=True)
    for _ in range(3000):
        for kind in KINDS:
            made = example(rng, kind)
            words |= {word for word, _ in splitter.pre_tokenize_str(f"{made.prompt} {made.response or ''}")}
    vocabulary = {token: index for index, token in enumerate([unknown, *special, *sorted(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = splitter
    # WordPiece's clean-up knows commas and full stops; the colon of descriptions is ours to mend.
    core.decoder = decoders.Sequence([decoders.WordPiece(cleanup=True), decoders.Fuse(), decoders.Replace(" :", ":")])
    core.add_special_tokens(list(special))
    core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=unknown, bos_token=bos, eos_token=eos, pad_token=pad, clean_up_tokenization_spaces=False
    )
