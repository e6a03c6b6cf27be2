"""Training: the small models that ship with the package, and interventions on others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

TWINS = ("janus-pro",)


def train_twin(
    name: str,
    out: Path | None = None,
    *,
    seed: int = 0,
    precision: str = "auto",
    steps: int | None = None,
    code_steps: int | None = None,
) -> Path:
    """Make a twin by its recipe and write it to `out` (`twins/NAME` if None).

    Raises:
        ValueError: there is no such twin, or `out` holds something else.
    """
    if name not in TWINS:
        raise ValueError(f"no twin is called {name!r}; there are {', '.join(TWINS)}")
    from unisonde.train.janus_pro import Recipe, train

    recipe = Recipe(seed=seed, precision=precision)
    if steps is not None:
        recipe = replace(recipe, joint=replace(recipe.joint, steps=steps))
    if code_steps is not None:
        recipe = replace(recipe, codes=replace(recipe.codes, steps=code_steps))
    return train(out or Path("twins") / name, recipe)
