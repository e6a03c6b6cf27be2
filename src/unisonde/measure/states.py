"""States as the measures take them: checked, in float64, on the device they came from.

Every public function of `measure` takes arrays `(n, d)`, n states of width d, as torch tensors of any floating type, device and
layout, as numpy arrays or as nested lists. Float64 is not a luxury: at order 1.01 an error in a power sum is multiplied by a
hundred, and the float32 expansion of a squared distance is off by more than a nat on states that share an offset.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = Any
"""A torch tensor, a numpy array or nested lists of numbers."""


def as_states(states: Array, name: str = "states") -> Tensor:
    """`states` as a float64 tensor `(n, d)` without gradient, on the same device.

    Raises:
        ValueError: not two-dimensional, no states, no width, not real numbers, or not all finite.
    """
    tensor = as_float64(states, name)
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have the shape (n, d), one state a row, got {tuple(tensor.shape)}")
    if 0 in tensor.shape:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} hold nothing to measure; at least one state and one channel are needed"
        )
    return _finite(tensor, name)


def as_pair(prompt: Array, response: Array, names: tuple[str, str] = ("prompt", "response")) -> tuple[Tensor, Tensor]:
    """Two sets of states `(n_1, d)`, `(n_2, d)` of one width.

    Raises:
        ValueError: as `as_states`, or the widths differ.
    """
    first, second = as_states(prompt, names[0]), as_states(response, names[1])
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{names[0]} {tuple(first.shape)} and {names[1]} {tuple(second.shape)} differ in width; both must come from one stack"
        )
    if first.device != second.device:
        raise ValueError(f"{names[0]} is on {first.device} and {names[1]} on {second.device}; move them to one device")
    return first, second


def as_samples(x: Array, y: Array, names: tuple[str, str] = ("x", "y")) -> tuple[Tensor, Tensor]:
    """Two views `(n, d_x)`, `(n, d_y)` of the same n samples, row i of one belonging to row i of the other; widths may differ.

    Raises:
        ValueError: as `as_states`, or the numbers of rows differ.
    """
    first, second = as_states(x, names[0]), as_states(y, names[1])
    if first.shape[0] != second.shape[0]:
        raise ValueError(f"{names[0]} {tuple(first.shape)} and {names[1]} {tuple(second.shape)} must be paired row by row")
    return first, second.to(first.device)


def as_gram(gram: Array, name: str = "gram") -> Tensor:
    """A kernel matrix `(n, n)` given from outside, as float64.

    Raises:
        ValueError: not square, empty, not finite, not symmetric, or with no positive trace. Whether it is positive semi-definite
            shows when its eigenvalues are taken (`spectrum.settle`).
    """
    tensor = as_float64(gram, name)
    if tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1] or tensor.shape[0] == 0:
        raise ValueError(f"{name} must be a square matrix (n, n), got {tuple(tensor.shape)}")
    _finite(tensor, name)
    gap, size = (float(v) for v in torch.stack([(tensor - tensor.mT).abs().max(), tensor.abs().max()]).tolist())
    if gap > 1e-8 * size:
        raise ValueError(
            f"{name} {tuple(tensor.shape)} must be symmetric, but entries differ from the transposed ones by {gap:.3g}"
        )
    trace = float(tensor.diagonal().sum())
    if trace <= 0:
        raise ValueError(f"{name} {tuple(tensor.shape)} must have a positive trace, got {trace:.3g}")
    return (tensor + tensor.mT) / 2


def as_float64(values: Array, name: str) -> Tensor:
    """Any array of real numbers as a float64 tensor on its own device.

    Raises:
        ValueError: not an array of real numbers.
    """
    if isinstance(values, Tensor):
        if values.is_complex():
            raise ValueError(f"{name} must be real, got {values.dtype}")
        tensor = values.detach()
        # Apple's GPUs have no float64 at all; there alone the numbers are made on the CPU.
        return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of real numbers, got {type(values).__name__}: {error}") from None
    return torch.from_numpy(array)


def _finite(tensor: Tensor, name: str) -> Tensor:
    # One sum is several times cheaper than a look at every value; only an overflow can make it raise a false alarm.
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name} {tuple(tensor.shape)} hold {bad} values that are not finite; no entropy can be taken of them")
    return tensor
