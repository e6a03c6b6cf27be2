"""Does a decoder learn texture once it is as strong as all else? `python benchmarks/equal_scale.py [--pictures N] [--steps N]`.

A probe finds the texture of a picture at the adapter of `vision-smollm-masked`, and LoRA on the decoder does not make it usable; texture
explains next to nothing of the variance of what the adapter hands on. Here the decoder learns from the same pictures twice: with the
features as they are, and with all their principal directions brought to the same variance (whitened; their mean and their total variance
stay). A whitening mixes linearly what a linear probe could mix as well, so it adds nothing to what is there. It takes about an hour a
seed on one core, half of it for the control. The result is in docs/decoding.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

import unisonde
from unisonde.data.item import Item
from unisonde.data.tabletop import textured
from unisonde.models.bridged import Bridged
from unisonde.study.decoding.experiments import Setting
from unisonde.study.decoding.lora import Objective, lora
from unisonde.train.loop import Schedule
from unisonde.train.lora import LoraRecipe

LEARNT, CONTROL = "texture", "colour"
FAINTEST = 1e-6
"""Directions with a smaller share of the largest variance than this are not brought up further."""


def whitening(vectors: Tensor) -> Callable[[Tensor], Tensor]:
    """The edit of features that brings all principal directions of vectors (n, d) to one variance and keeps their mean and their sum."""
    mean = vectors.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov((vectors - mean).T))
    variances = variances.clamp(min=FAINTEST * variances.max())
    scale = (variances.sum() / len(variances)).sqrt() / variances.sqrt()
    mixing = (directions * scale) @ directions.T
    return lambda features: ((features.double() - mean) @ mixing + mean).to(features.dtype)


def handed_on(model: Bridged, items: Sequence[Item]) -> Tensor:
    """The adapter's features of items, position by position (n, d)."""
    features = [model.ahead(model.prepare(item, 0)).features for item in items]
    return torch.cat([one[0] for one in features if one is not None]).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0].partition("`")[0])
    parser.add_argument("--pictures", type=int, default=2400, help="to learn from")
    parser.add_argument("--judged", type=int, default=152)
    parser.add_argument("--steps", type=int, default=300, help="of 8 pictures")
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()

    model = unisonde.load("vision-smollm-masked")
    assert isinstance(model, Bridged)

    def asking(items: list[Item]) -> Setting:
        return Setting(model, items, (), Path(), (LEARNT, CONTROL), group="layout")

    learnt = asking(textured.items(split="train", seed=7, count=given.pictures))
    judged = asking(textured.items(count=given.judged))

    def objective(attribute: str) -> Objective:
        return Objective(attribute, learnt.asked(attribute), [f"{learnt.label(item, attribute)}." for item in learnt.items])

    recipe = LoraRecipe(schedule=Schedule(given.steps, rate=1e-3, warmup=12))
    equal = model.edited(whitening(handed_on(model, learnt.items)))
    for what, edited in (("features as they are", nullcontext()), ("all directions at one variance", equal)):
        with edited:
            questions = [judged.question(name) for name in judged.attributes]
            found = lora(model, objective(LEARNT), objective(CONTROL), questions, seeds=given.seeds, recipe=recipe, folds=3)
        print(f"{what}: {found.sentence}", flush=True)


if __name__ == "__main__":
    main()
