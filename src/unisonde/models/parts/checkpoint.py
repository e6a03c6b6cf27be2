"""Official checkpoints into our modules: found on the hub or in a folder, renamed by a table, streamed one tensor at a time, strictly.

    network = empty(lambda: Showo(config))
    fill(network, tensors_of(files), KEYS, device, dtype, name)

A module is built without memory for its parameters; each tensor goes from its file straight to its device and number format, so
the peak is the model and its largest tensor. Every key of the checkpoint must land and every parameter must be filled, but for the few
that a family names with the reason. Pickles are opened by `torch.load(weights_only=True)` alone, which runs no code of theirs.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from unisonde.models.parts.pretrained import reach

Module = TypeVar("Module", bound=nn.Module)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rename:
    """Keys that match `pattern` as a whole become `to`, groups as in `re.sub`.

    Attributes:
        to: one name, or several that share the tensor in equal parts along its first dimension (a fused q, k, v).
        squeeze: drop a leading dimension of one.
    """

    pattern: str
    to: str | tuple[str, ...]
    squeeze: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.to,) if isinstance(self.to, str) else self.to


@dataclass(frozen=True)
class Keys:
    """How official keys become ours.

    Attributes:
        renames: tried in order; a key that none matches keeps its name.
        ignored: patterns of official keys that are left out, with the reason.
        absent: patterns of our parameters that the checkpoint does not hold (a tied head), with the reason.
    """

    renames: tuple[Rename, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    def ignores(self, key: str) -> bool:
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)

    def lacks(self, key: str) -> bool:
        return any(re.fullmatch(pattern, key) for pattern in self.absent)

    def of(self, key: str) -> tuple[Rename | None, tuple[str, ...]]:
        """The rule that an official key falls under, and its names with us."""
        for rename in self.renames:
            if match := re.fullmatch(rename.pattern, key):
                return rename, tuple(match.expand(name) for name in rename.names)
        return None, (key,)

    def tensors(self, key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """An official tensor under our names; views of it. One that does not split into equal parts goes to each name as a whole."""
        rename, names = self.of(key)
        if rename is not None and rename.squeeze:
            tensor = tensor.squeeze(0)
        if len(names) == 1 or tensor.ndim == 0 or tensor.shape[0] % len(names):
            return [(name, tensor) for name in names]
        return list(zip(names, tensor.chunk(len(names)), strict=True))

    def shapes(self, manifest: Mapping[str, Shape]) -> dict[str, Shape]:
        """The names and shapes that a checkpoint of these official keys and shapes fills; nothing is loaded."""
        filled: dict[str, Shape] = {}
        for key, shape in manifest.items():
            if not self.ignores(key):
                filled |= {name: tuple(t.shape) for name, t in self.tensors(key, torch.empty(shape, device="meta"))}
        return filled


# ---------------------------------------------------------------------------------------------------------------------- finding


SHARDED = (".safetensors", ".bin")


def weight_files(path: str, *stems: str) -> list[Path]:
    """The weight files of a folder or hub id: the first of `stems` that is there, whole or in shards with an index.

    Args:
        stems: names without an extension such as `model`, or whole file names such as `kl16.ckpt`.

    Raises:
        ValueError: none of them is there.
    """
    wanted = stems or ("model", "pytorch_model")
    for stem in wanted:
        for file in [stem] if Path(stem).suffix else [stem + extension for extension in SHARDED]:
            if (whole := reach(path, file)) is not None:
                return [whole]
            if (index := reach(path, file + ".index.json")) is not None:
                return _shards(path, index, stem)
    names = ", ".join(stem if Path(stem).suffix else f"{stem}.safetensors" for stem in wanted)
    if Path(path).is_dir():
        raise ValueError(f"{path!r} has no weights: none of {names} is there, whole or in shards")
    raise ValueError(
        f"none of {names} of {path!r}, whole or in shards, is in the hub's cache on this machine or can be had from the hub; "
        "give the path of a local folder that holds all files of the model"
    )


def _shards(path: str, index: Path, stem: str) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards ({type(error).__name__}: {error}); download it again") from None
    found = [reach(path, str(Path(stem).with_name(name))) for name in names]  # beside their index
    lacking = [name for name, file in zip(names, found, strict=True) if file is None]
    if lacking:
        raise ValueError(f"{path!r} lacks {', '.join(lacking[:3])}, which {index.name} names; download the checkpoint again")
    return [file for file in found if file is not None]


# ---------------------------------------------------------------------------------------------------------------------- reading


def tensors_of(files: Iterable[Path], inside: Sequence[str] = ("state_dict", "model", "module")) -> Iterator[tuple[str, Tensor]]:
    """The tensors of weight files, one at a time; those of a pickle are mapped, not read, until they are used.

    Args:
        inside: where the weights stand in a pickle that holds more than weights.

    Raises:
        ValueError: a file is damaged, or a pickle holds something else than plain weights.
    """
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118 - not a dict
                        yield key, opened.get_tensor(key)
            except SafetensorError as error:
                raise ValueError(f"{file} is no whole safetensors file ({error}); download it again") from None
        else:
            yield from _unpickled(file, inside)


def _unpickled(file: Path, inside: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    with file.open("rb") as opened:
        start = opened.read(16)
    if not start.startswith((b"PK", b"\x80")):  # of an archive, of a bare pickle
        raise ValueError(f"{file} is no checkpoint (it begins with {start!r}); download it again")
    try:
        try:
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            held = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # The message goes on to say how to open it all the same; only what it found is handed on.
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {code[1]}" if code else "it is not what torch.save writes"
        raise ValueError(
            f"{file} holds more than plain weights ({what}), and opening it could run its code, which is never done here; "
            "convert it to safetensors first"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        said = (str(error).strip() or type(error).__name__).split(". ")[0]
        raise ValueError(f"{file} is no whole checkpoint ({said}); download it again") from None
    for name in inside:
        if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
            held = held[name]
    if not isinstance(held, Mapping) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
        raise ValueError(f"{file} holds something else than named tensors")
    yield from held.items()


# ---------------------------------------------------------------------------------------------------------------------- filling


def empty(build: Callable[[], Module]) -> Module:
    """A module whose parameters take no memory yet; buffers that it computes (rotary frequencies, positions) are real.

    Parameters that the module makes one (a tied head) are one here, too, which is why accelerate's context is not used.
    """
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        return build()
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill(
    network: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    keys: Keys,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    name: str,
) -> None:
    """Fill a module of `empty` in place from official tensors, and put all of it on `device`.

    Parameters that are one (a head tied to the embeddings) stay one, and the checkpoint may hold them once. Every parameter has memory
    of its own, so a file may go once it is read. What the checkpoint is said to lack stays as it was built.

    Args:
        device: None leaves each tensor where it is, and buffers where they were built.
        dtype: number format of parameters; as in the checkpoint if None. Buffers keep theirs.
        name: of the model, for the errors.

    Raises:
        ValueError: a key is unknown, a parameter is not filled, or a shape differs; the sentence names the first few.
    """
    persistent = set(network.state_dict())
    parameters = dict(network.named_parameters(remove_duplicate=False))
    buffers = {key: buffer for key, buffer in network.named_buffers(remove_duplicate=False) if key in persistent}
    tied: dict[int, list[str]] = defaultdict(list)
    for ours, held in (parameters | buffers).items():
        tied[id(held)].append(ours)
    unknown: list[str] = []
    misshapen: list[str] = []
    filled: set[str] = set()
    for key, tensor in tensors:
        for ours, value in [] if keys.ignores(key) else keys.tensors(key, tensor):
            target = parameters.get(ours, buffers.get(ours))
            if target is None:
                unknown.append(key)
                continue
            names = tied[id(target)]
            filled.update(names)
            if target.shape != value.shape:
                misshapen.append(f"{key} {tuple(value.shape)} instead of {tuple(target.shape)}")
                continue
            kind = target.dtype if ours in buffers else dtype if dtype is not None and value.is_floating_point() else value.dtype
            _set(network, names, value.to(device=device, dtype=kind, copy=True))
            del value  # and below: or this tensor would still be there while the next one is read
        del tensor
    missing = sorted(key for key in persistent - filled if not keys.lacks(key))
    for said, which in (("lacks", missing), ("has unknown", sorted(set(unknown))), ("has in another shape", misshapen)):
        if which:
            more = f" and {len(which) - 4} more" if len(which) > 4 else ""
            raise ValueError(f"the checkpoint of {name} {said} {', '.join(which[:4])}{more}; it is not this model's, or not whole")
    for key, buffer in network.named_buffers():
        if device is not None and buffer.device != torch.device(device):
            _set(network, [key], buffer.to(device))


def _set(network: nn.Module, names: Sequence[str], value: Tensor) -> None:
    """Put a tensor under these names, as one parameter or buffer."""
    parameter = nn.Parameter(value, requires_grad=False)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        module = network.get_submodule(parent)
        if leaf in module._parameters:
            module._parameters[leaf] = parameter
        else:
            module._buffers[leaf] = value
