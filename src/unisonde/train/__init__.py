"""Training: the small models that ship with the package, and interventions on others."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

RECIPES: dict[str, tuple[str, str, str]] = {
    "janus-pro": ("unisonde.train.janus_pro", "codes", "joint"),
    "speech-smollm": ("unisonde.train.speech_smollm", "spell", "write"),
    "vision-smollm-aligned": ("unisonde.train.vision_smollm", "encoder", "write"),
    "vision-smollm-masked": ("unisonde.train.vision_smollm", "encoder", "write"),
}
"""What can be made: the module with its `Recipe` and `train`, and the schedules of its first and of its last stage in the recipe."""

TWINS = tuple(RECIPES)


def train_twin(
    name: str,
    out: Path | None = None,
    *,
    seed: int = 0,
    precision: str = "auto",
    steps: int | None = None,
    code_steps: int | None = None,
) -> Path:
    """Make a small model by its recipe and write it to `out` (`twins/NAME` if None).

    Args:
        steps: of the last stage; the recipe's if None.
        code_steps: of the first stage; the recipe's if None.

    Raises:
        ValueError: there is no such model, `out` holds something else, or what the recipe needs is missing.
    """
    if name not in RECIPES:
        raise ValueError(f"no twin is called {name!r}; there are {', '.join(TWINS)}")
    module, first, last = RECIPES[name]
    room = import_module(module)
    recipe = room.recipe_of(name, seed, precision) if hasattr(room, "recipe_of") else room.Recipe(seed=seed, precision=precision)
    for stage, count in ((last, steps), (first, code_steps)):
        if count is not None:
            recipe = replace(recipe, **{stage: replace(getattr(recipe, stage), steps=count)})
    return room.train(out or Path("twins") / name, recipe)
