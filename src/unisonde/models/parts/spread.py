"""One network over several devices: some layers on one GPU, some on another, the rest in memory or left on disk.

    main = spread(network, files, KEYS, "auto", WHOLE, dtype, name)

Where each module goes is a device map of `accelerate`: names of modules -> 0, "cuda:1", "cpu" or "disk", or "auto", which fills the
GPUs evenly, then memory, then the disk. Hooks of `accelerate` bring inputs to a module's device, and for a pass bring in the weights that
are in memory while a GPU computes, or on disk. What is left on disk is never copied: it is read from the checkpoint itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import Tensor, nn

from unisonde.models.parts.checkpoint import Keys, fill, tensors_of

DeviceMap = Literal["auto"] | Mapping[str, int | str | torch.device]


def several(device: Any) -> bool:
    """Whether `device` asks for several: `auto`, or a device map."""
    return device == "auto" or isinstance(device, Mapping)


def spread(
    network: nn.Module,
    files: Sequence[Path],
    keys: Keys,
    device_map: DeviceMap,
    whole: Sequence[str],
    dtype: torch.dtype | None,
    name: str,
) -> torch.device:
    """Fill a module of `checkpoint.empty` from official files, each tensor straight on its device; gives the device that takes inputs.

    Args:
        keys: how official keys become ours. Of parts on disk a key may be renamed, but not split.
        whole: classes of modules that are never divided.
        dtype: number format of parameters; bfloat16 where a GPU takes part and float32 where none does, if None.
        name: of the model, for the errors.

    Raises:
        ValueError: the device map leaves a module out, names none or an unknown device, or parts on disk are not in safetensors files;
            and as `checkpoint.fill`.
    """
    told = _auto(network, whole, dtype) if device_map == "auto" else _told(network, device_map, name)
    places = _apart(network, told)
    computing = [torch.device(place) for place in dict.fromkeys(places.values()) if place not in ("cpu", "disk")]
    main = computing[0] if computing else torch.device("cpu")
    kind = dtype or (torch.bfloat16 if computing else torch.float32)
    index: dict[str, dict[str, str]] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for file in files:
            for key, tensor in tensors_of([file]):
                _, names = keys.of(key)
                place = places.get(_owner(names[0], places) or "", "cpu")  # an unknown key is told of by `fill`
                if place != "disk":
                    yield key, tensor.to(torch.device(place))
                    continue
                if file.suffix != ".safetensors":
                    raise ValueError(f"{file} is no safetensors file, so parts of {name} cannot be left on disk; put them on cpu")
                index[names[0]] = {"safetensors_file": str(file), "weight_name": key, "dtype": str(kind).removeprefix("torch.")}
                yield key, tensor.to("meta")

    fill(network, tensors(), keys, None, kind, name)
    if len(set(places.values())) > 1 or index:
        dispatch_model(network, places, main_device=str(main), offload_index=index or None)
    return main


def _owner(key: str, places: Mapping[str, Any]) -> str | None:
    """The module of a device map that a parameter belongs to: the longest name that its own begins with."""
    owners = [module for module in places if not module or key == module or key.startswith(f"{module}.")]
    return max(owners, key=len, default=None)


def _apart(network: nn.Module, told: Mapping[str, Any]) -> dict[str, Any]:
    """A device map of modules that do not lie in each other and are called as they are, so that each brings its inputs to itself."""
    places: dict[str, Any] = {}

    def walk(name: str, module: nn.Module) -> None:
        prefix = f"{name}." if name else ""
        inner = any(other != name and other.startswith(prefix) for other in told)
        if inner or type(module).forward is nn.Module.forward:  # a mere container, whose parts are called
            for child, part in module.named_children():
                walk(prefix + child, part)
        elif (owner := _owner(name, told)) is not None and any(True for _ in module.parameters()):
            places[name] = told[owner]

    walk("", network)
    return places


def _auto(network: nn.Module, whole: Sequence[str], dtype: torch.dtype | None) -> dict[str, Any]:
    kind = dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    memory = get_balanced_memory(network, dtype=kind, no_split_module_classes=list(whole))
    return dict(infer_auto_device_map(network, memory, no_split_module_classes=list(whole), dtype=kind))


def _told(network: nn.Module, device_map: Mapping[str, Any], name: str) -> dict[str, Any]:
    modules = dict(network.named_modules())
    unknown = [module for module in device_map if module not in modules]
    if unknown:
        raise ValueError(
            f"the device map names {', '.join(map(repr, unknown[:3]))}, which {name} has not; name modules such as {_some(modules)}"
        )
    places: dict[str, Any] = {}
    for module, place in device_map.items():
        try:
            places[module] = place if place == "disk" else _place(torch.device(place))
        except (RuntimeError, TypeError):
            raise ValueError(
                f"the device map puts {module!r} on {place!r}; a place is cpu, disk, or a device such as cuda:0"
            ) from None
    lost = [key for key in network.state_dict() if _owner(key, places) is None]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ValueError(f"the device map leaves out {', '.join(lost[:3])}{more} of {name}; {''!r} names all that is left")
    return places


def _place(device: torch.device) -> str:
    """As `accelerate` tells places apart."""
    return "cuda:0" if device.type == "cuda" and device.index is None else str(device)


def _some(modules: Mapping[str, nn.Module]) -> str:
    return ", ".join(repr(name) for name in list(modules)[1:4])
