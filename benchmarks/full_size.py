"""A published size run for real, on the CPU, with random weights: `python benchmarks/full_size.py NAME [--steps 4] [--tokens 8]`.

`NAME` is `showo` or `harmon`. Random bfloat16 weights in place of a download, one item a task, few sampling steps: says how long a
probe takes and how much memory it needs at its peak. Words come from a stand-in tokenizer of bytes with as many tokens as the
published one.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import unisonde
from unisonde.data.item import Item, Task
from unisonde.models.base import Model
from unisonde.models.parts.checkpoint import empty

ITEMS: dict[Task, list[Item]] = {
    "image": [Item("drawing", "composition", "a red circle above a blue square on a wooden table by the window")],
    "text": [
        Item(
            "question",
            "attribute",
            "What is in the middle of the picture?",
            Image.effect_mandelbrot((320, 240), (-2, -1, 1, 1), 50),
        )
    ],
}


def stand_in(size: int, end: str = "<|endoftext|>", marks: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with `size` tokens, most of which are never used, among them the end and other marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [end, *(mark for mark in marks if mark != end)]
    vocabulary = [*letters, *special, *(f"<unused{k}>" for k in range(size - len(letters) - len(special)))]
    core = Tokenizer(models.BPE(vocab={token: k for k, token in enumerate(vocabulary)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end)


@torch.no_grad()
def random_weights(network: nn.Module, dtype: torch.dtype, seed: int = 0) -> None:
    """Fill a module of `empty` with small random numbers, norms with ones, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(network.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        value = torch.zeros(parameter.shape, dtype=dtype)
        if value.ndim > 1:
            value.normal_(std=0.02, generator=generator)
        elif leaf == "weight":
            value.fill_(1.0)
        setattr(network.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def showo(dtype: torch.dtype) -> Model:
    """`showlab/show-o`: 256 x 256 pictures, no CLIP."""
    from unisonde.models.parts.magvit2 import Magvit2, Magvit2Config
    from unisonde.models.parts.showo_network import Showo, full_size
    from unisonde.models.showo import ShowO

    config = full_size()
    network, codes = empty(lambda: Showo(config)), empty(lambda: Magvit2(Magvit2Config()))
    random_weights(network, dtype)
    random_weights(codes, torch.float32)
    return ShowO(network, codes, stand_in(config.llm_vocab_size), "showo (random weights)")


DIFFUSION_STEPS = 10
"""Of Harmon's diffusion head for each token, in place of the published 100: at 1024 tokens it is most of the work."""


def harmon(dtype: torch.dtype) -> Model:
    """`wusize/Harmon-1_5B`: 512 x 512 pictures."""
    from unisonde.models.harmon import END, SPECIAL_TOKENS, Harmon
    from unisonde.models.parts import kl16
    from unisonde.models.parts.harmon_network import SIZES, HarmonNetwork

    full = SIZES["1.5B"]
    config = replace(full, mar=replace(full.mar, num_sampling_steps=str(DIFFUSION_STEPS)))
    network, vae = empty(lambda: HarmonNetwork(config)), kl16.build()
    random_weights(network, dtype)
    random_weights(vae, torch.float32)
    network.llm.tie_weights()
    return Harmon(network, vae, stand_in(config.llm.vocab_size, END, SPECIAL_TOKENS), "harmon (random weights)")


FAMILIES: dict[str, Callable[[torch.dtype], Model]] = {"showo": showo, "harmon": harmon}


def peak() -> float:
    """The most memory this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` gives, and its seconds by the clock and of the processors."""
    start, processors = time.monotonic(), time.process_time()
    result = work()
    return result, {
        "seconds": round(time.monotonic() - start, 1),
        "processor_seconds": round(time.process_time() - processors, 1),
        "peak_gb": round(peak(), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8)
    options = parser.parse_args()
    model, built = timed(lambda: FAMILIES[options.family](torch.bfloat16))
    parameters = model.identity()["parameters"]
    print(json.dumps({"family": options.family, "parameters": parameters, "threads": torch.get_num_threads()} | built), flush=True)
    given = {"steps": options.steps, "tokens": options.tokens}
    with tempfile.TemporaryDirectory() as folder:
        for task, items in ITEMS.items():
            settings = {k: v for k, v in given.items() if getattr(model.defaults(task), k) is not None}
            ask = partial(unisonde.probe, model, items, task, Path(folder) / task, generation=settings, progress=False)
            run, effort = timed(ask)
            rows = run.measurements()
            found = {"task": task, "rows": len(rows), "layers": rows["layer"].n_unique(), "settings": settings}
            print(json.dumps(found | effort), flush=True)


if __name__ == "__main__":
    main()
