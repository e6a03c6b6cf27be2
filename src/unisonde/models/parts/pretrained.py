"""Models as published on the hub: loading them from a folder or the hub's cache, and what their configurations say.

Never `trust_remote_code`, and weights as safetensors or, in old repositories, by `torch.load(weights_only=True)`. Weights must fill
the network: `transformers` fills gaps with random numbers and a warning, here a gap is an error.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils import cached_file

from unisonde.data.item import Task
from unisonde.models.base import Generation
from unisonde.models.parts.quiet import quiet

T = TypeVar("T")

TOKENS = 64
"""The most tokens of a response where the model's publisher names no number."""

OWN = "unisonde.json"
"""The file beside the weights that replaces published settings."""

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.txt",
)
"""Files that a tokenizer can be made from."""


def settled(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """Where a published network runs and in what number format, where that is left open: a GPU if there is one, in bfloat16;
    else the CPU, in float32."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)


def load_network(
    auto: Any, path: str, device: str | torch.device | None, dtype: torch.dtype | None, strict: bool = False, **options: Any
) -> Any:
    """The network of a folder or hub id, with `auto` (`AutoModelForCausalLM`, ...), ready to run.

    Args:
        device: None takes a GPU if there is one.
        dtype: None takes float32 on the CPU, else the published one.
        strict: whether weights that the network has no place for are an error, as gaps always are.
        options: of the configuration, in place of the published ones.

    Raises:
        ValueError: a file is missing or cannot be reached, or the weights do not fill the network.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind: Any = dtype or (torch.float32 if device.type == "cpu" else "auto")
    with quiet():
        network, found = part(
            path,
            "model.safetensors",
            # Tensors of another shape are to be found among what is told of the loading, and not in an error of many lines.
            lambda: auto.from_pretrained(
                path,
                dtype=kind,
                device_map={"": device},  # each tensor goes there as it is read, and none is held on the CPU meanwhile
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            ),
        )
    for key, held, wanted in sorted(found["mismatched_keys"]):
        raise ValueError(f"{key} in the weights of {path!r} is of shape {tuple(held)}, where the network has {tuple(wanted)}")
    if gaps := sorted(found["missing_keys"]):
        raise ValueError(
            f"the weights of {path!r} lack {', '.join(gaps[:5])}" + (f" and {len(gaps) - 5} more" if len(gaps) > 5 else "")
        )
    if strict and (over := sorted(found["unexpected_keys"])):
        more = f" and {len(over) - 5} more" if len(over) > 5 else ""
        raise ValueError(f"the weights of {path!r} hold {', '.join(over[:5])}{more}, which {type(network).__name__} has not")
    return network.eval()


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a folder or hub id; it must give character offsets, from which spans are made.

    Raises:
        ValueError: a file is missing or cannot be reached, or the tokenizer gives no offsets.
    """
    if reach(path, "config.json") and not reach(path, *VOCABULARIES):
        # Without one `transformers` makes an empty tokenizer, and says nothing.
        raise ValueError(_absent(path, "tokenizer.json"))
    tokenizer = part(path, "tokenizer.json", lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {path!r} gives no character offsets; a tokenizer.json is needed")
    return tokenizer


def part(path: str, file: str, load: Callable[[], T]) -> T:
    """What `load` gives; its errors as one sentence that names the file that was wanted."""
    if reach(path, "config.json") is None:
        raise ValueError(_absent(path, "config.json"))
    try:
        return load()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, OSError) and reach(path, file) is None:
            raise ValueError(_absent(path, file)) from error
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{path!r} runs only with code from its own repository (trust_remote_code), which is never run here"
            ) from None
        raise ValueError(f"{path!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def reach(path: str, *files: str) -> Path | None:
    """The first of these files that a folder or hub id has; None if it has none, or the hub cannot be reached.

    Raises:
        ValueError: there is no space left to put it into the hub's cache.
    """
    for file in files:
        if Path(path).is_dir():
            found = str(Path(path) / file) if (Path(path) / file).is_file() else None
        else:
            try:
                found = cached_file(path, file, _raise_exceptions_for_missing_entries=False)
            except (OSError, ValueError) as error:  # not reached, or not a name that the hub allows
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise ValueError(
                        f"there is no space left for {file} of {path!r} in the hub's cache, {HF_HUB_CACHE}; make room, or name "
                        "another folder in the variable HF_HOME"
                    ) from None
                return None
        if found:
            return Path(found)
    return None


def read_json(path: str, file: str) -> dict[str, Any]:
    """A JSON file of a folder or hub id.

    Raises:
        ValueError: it is not there, or it holds no JSON object.
    """
    found = reach(path, file)
    if found is None:
        raise ValueError(_absent(path, file))
    try:
        held = json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} of {path!r} is no JSON ({error}); download it again") from None
    if not isinstance(held, dict):
        raise ValueError(f"{file} of {path!r} holds no JSON object; download it again")
    return held


def _absent(path: str, file: str) -> str:
    folder = Path(path).is_dir()
    where = "is not in that folder" if folder else "is not in the hub's cache on this machine and cannot be had from the hub"
    return (
        f"{file} of {path!r} {where}; give the path of a local folder with config.json, the .safetensors weights and the tokenizer"
    )


def own_settings(source: Path) -> tuple[dict[Task, Generation], str | None]:
    """What `unisonde.json` in a folder of weights sets in place of what is published: sampling settings a task, and the system
    prompt, None where it says nothing of it. A twin has such a file.

    Raises:
        ValueError: it is there and holds something else.
    """
    if not (source / OWN).is_file():
        return {}, None
    held = read_json(str(source), OWN)
    try:
        return {task: Generation(**values) for task, values in held.get("generation", {}).items()}, held.get("system")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"the generation of {source / OWN} is no table of settings for each task ({error})") from None


def source_of(path: str) -> Path:
    """The folder in which the files of a folder or hub id lie."""
    config = reach(path, "config.json")
    assert config is not None, "only asked for what was loaded"
    return config.parent


def published(network: Any) -> Generation:
    """The sampling settings of generation_config.json; without one, greedy."""
    config = network.generation_config
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    return Generation(tokens=config.max_new_tokens or TOKENS, temperature=temperature if config.do_sample else 0.0)


def ends_of(network: Any, tokenizer: Any, turn: int | None) -> list[int]:
    """The tokens that end a response: the published ones, the tokenizer's, and the end of a turn."""
    eos = network.generation_config.eos_token_id
    return sorted({*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, turn} - {None})


def pad_of(network: Any, tokenizer: Any, ends: list[int]) -> int:
    """A token to pad with; it is always masked, so any will do."""
    known = (tokenizer.pad_token_id, network.generation_config.pad_token_id, *ends, 0)
    return next(token for token in known if token is not None and 0 <= token < network.get_input_embeddings().num_embeddings)


def window_of(network: Any) -> int | None:
    """The most positions of a sequence; None where the configuration sets no bound (Bloom, Mamba)."""
    config = network.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
