"""Where the transformer of a `transformers` model is: its layers in order and its last norm, found without a table of families.

Names differ (`layers`, `h`, `blocks`; `norm`, `ln_f`, `final_layer_norm`), the structure does not: the configuration says how many
layers there are, one list of modules in the decoder has that length, and the last norm stands beside that list. What cannot be told
for certain is an error, for a wrong layer would give numbers that look right.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from unisonde.models.trace import Stack

LAST_NORMS = (
    "norm",
    "ln_f",
    "norm_f",
    "final_layernorm",
    "final_layer_norm",
    "final_norm",
    "layer_norm",
    "embedding_norm",
    "ln_out",
)
"""Names that last norms go by. `embedding_norm` is LFM2's, `layer_norm` XGLM's, `ln_out` RWKV's."""


def find_stack(network: Any, name: str = "llm") -> Stack:
    """The decoder's layers and last norm; `norm` is None if it has none (OPT of the post-norm kind).

    Raises:
        ValueError: it cannot be told which modules they are.
    """
    decoder = network.get_decoder()
    family = type(network).__name__
    depth = network.config.get_text_config(decoder=True).num_hidden_layers
    lists = {path: module for path, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    # Experts and heads are lists too, but lie inside a layer, hence inside another list.
    outer = {path: m for path, m in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}
    found = [path for path, module in outer.items() if len(module) == depth]
    if len(found) != 1:
        seen = ", ".join(f"{path} ({len(module)})" for path, module in outer.items()) or "none"
        raise ValueError(
            f"cannot tell the layers of {family}: the configuration says {depth}, lists of modules are {seen}; use unisonde.watch"
        )
    parent = decoder.get_submodule(found[0].rpartition(".")[0])
    children = list(parent.named_children())
    norms = [module for child, module in children if child in LAST_NORMS]
    if not norms:
        # A norm before the layers is the embeddings'; after them it can only be the last one, under a name that is not known here.
        behind = [child for child, module in children[[m for _, m in children].index(outer[found[0]]) + 1 :] if _is_norm(module)]
        if behind:
            raise ValueError(f"cannot tell the last norm of {family}: perhaps {', '.join(behind)}; use unisonde.watch")
    if len(norms) > 1:
        raise ValueError(f"cannot tell the last norm of {family}: {len(norms)} modules have names of one; use unisonde.watch")
    return Stack(name, tuple(outer[found[0]]), norms[0] if norms else None)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
