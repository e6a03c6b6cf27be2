"""A prompt list of our own: 64 everyday prompts, sixteen in each of four categories, shipped with the package.

The categories are those of T2I-CoReBench; the prompts were written for unisonde and are free of its terms. Each can be answered
in words or by a picture: composition describes a scene, deductive gives facts and rules from which one follows, inductive gives
examples of a rule or an analogy to carry over, abductive gives traces to explain or a situation to fill in.
"""

from __future__ import annotations

from importlib.resources import as_file, files

from unisonde.data.folder import read_jsonl
from unisonde.data.item import Item


def read() -> list[Item]:
    """The 64 prompts, by category.

    Labels: `skill`, a finer group (four prompts in composition and deductive, eight in the others); and, except in composition,
    `answer`: what the reply should say or show.
    """
    with as_file(files("unisonde.data") / "prompts.jsonl") as path:
        return read_jsonl(path)
