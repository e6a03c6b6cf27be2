"""States that somebody saved: arrays in .npy, .npz or .safetensors files, by name."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".npy", ".npz", ".safetensors")


def read_states(path: Path) -> dict[str, Tensor]:
    """The arrays of a file, each (n, d); one of (layers, n, d) is taken layer by layer.

    Raises:
        ValueError: the file is missing, damaged, of another kind, or holds no such array.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        arrays = _read(path)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) cannot be read: {error}") from None
    except Exception as error:  # safetensors raises a class of its own
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is no whole safetensors file: {error}") from None
    found: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if array.ndim == 2:
            found[name] = array
        elif array.ndim == 3:
            found |= {f"{name}[{k}]": layer for k, layer in enumerate(array)}
        else:
            raise ValueError(f"{name} in {path} has the shape {tuple(array.shape)}; states are (n, d) or (layers, n, d)")
    if not found:
        raise ValueError(f"{path} holds no arrays")
    return found


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    loaded = np.load(path, allow_pickle=False)
    arrays = {path.stem: loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{name} holds {array.dtype}, not numbers")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def response_of(name: str, prompts: Mapping[str, Tensor], responses: Mapping[str, Tensor]) -> Tensor:
    """The response that goes with the prompt states of that name: the one of the same name, or the only one of one.

    Raises:
        ValueError: there is none.
    """
    if name in responses:
        return responses[name]
    if len(prompts) == len(responses):
        return list(responses.values())[list(prompts).index(name)]
    raise ValueError(f"no response goes with {name!r}; the response file has {', '.join(list(responses)[:6])}")
