"""One parity fixture: the official configuration, weights, inputs and outputs of a tiny model, and what ours agreed with.

A fixture `X` is three files: `X.json` (configuration), `X.safetensors` (official weights), `X.npz` (arrays). A family's check takes
inputs by `feed` and hands each output to `compare`. Only inputs and random draws may be fed: a recorded state or result that
went into a computation would prove nothing, so `feed` refuses every name that is not among the family's inputs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 2e-4
"""The largest difference of floating-point outputs; integers must be equal."""


@dataclass(frozen=True)
class Difference:
    """How far one output is from the official one; infinite if shapes differ or a number is not finite."""

    name: str
    largest: float
    exact: bool

    @property
    def ok(self) -> bool:
        return self.largest == 0 if self.exact else self.largest <= TOLERANCE


@dataclass
class Fixture:
    """A fixture of the folder `folder` with the name `name`.

    Attributes:
        inputs: patterns of the arrays that may be fed.
        fed: the names that were.
        differences: of the outputs compared so far, by name.
    """

    folder: Path
    name: str
    inputs: Sequence[str]
    fed: set[str] = field(default_factory=set)
    differences: dict[str, Difference] = field(default_factory=dict)

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / f"{self.name}.json").read_text())

    @cached_property
    def arrays(self) -> Mapping[str, np.ndarray]:
        with np.load(self.folder / f"{self.name}.npz", allow_pickle=False) as held:
            return {key: held[key] for key in held.files}

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The official tensors; those stored in float16 as float32."""
        return weights_of(self.folder, self.name)

    def feed(self, name: str) -> Tensor:
        """An input.

        Raises:
            ValueError: it is an output, or the fixture has no such array.
        """
        if name not in self.arrays:
            raise ValueError(f"{self.name}.npz has no array {name!r}")
        if not any(re.fullmatch(pattern, name) for pattern in self.inputs):
            raise ValueError(f"{name} of {self.name} is an output; it is compared and never fed")
        self.fed.add(name)
        return torch.from_numpy(self.arrays[name].copy())

    def compare(self, name: str, ours: Tensor, unit: float = 1.0) -> None:
        """Hold our value of an array against the official one; of several comparisons of one array the worst counts.

        Args:
            unit: what the difference is measured in. Another than 1 is for values so large that neighbouring float32 numbers are
                further apart than the tolerance.

        Raises:
            ValueError: the fixture has no such array.
        """
        if name not in self.arrays:
            raise ValueError(f"{self.name}.npz has no array {name!r}; ours has the shape {tuple(ours.shape)}")
        known = ours.float() if ours.dtype == torch.bfloat16 else ours  # numpy has no bfloat16
        theirs, value = self.arrays[name], known.detach().cpu().numpy()
        exact = not np.issubdtype(theirs.dtype, np.floating)
        if theirs.shape != value.shape or not np.isfinite(value).all():
            largest = np.inf
        else:
            largest = float(np.abs(value.astype(np.float64) - theirs.astype(np.float64)).max(initial=0.0)) / unit
            largest = largest if np.isfinite(largest) else np.inf  # theirs is not finite
        before = self.differences.get(name)
        if before is None or largest > before.largest:
            self.differences[name] = Difference(name, largest, exact)

    def states(self, prefix: str, layers: Sequence[Tensor]) -> None:
        """Compare `prefix.h0` to `prefix.hL` and `prefix.final` with what entered and left the layers, and the last norm."""
        for number, layer in enumerate(layers[:-1]):
            self.compare(f"{prefix}.h{number}", layer)
        self.compare(f"{prefix}.final", layers[-1])

    @property
    def left(self) -> list[str]:
        """Arrays that were neither fed nor compared."""
        return [name for name in self.arrays if name not in self.fed and name not in self.differences]


def weights_of(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of `name.safetensors`, floating-point ones in float32.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        held = load_file(folder / f"{name}.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder / name}.safetensors is no whole safetensors file ({error})") from None
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in held.items()}
