"""`watch`: the states of any torch module's layers, kept while a block runs, for those who bring a network and no family.

    with watch(network, layers="model.layers.*") as watched:
        network(...)
    watched.entropy()

What is kept is a copy, call by call, batch row by batch row and layer by layer, under `(call, row, layer)`; two calls or two rows
never enter one number. The network is only listened to: it is neither moved nor changed, and the hooks go when the block ends.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from unisonde.measure import DEFAULT, Estimate, Protocol, conditional_entropy, entropy
from unisonde.models.trace import first_tensor

Key: TypeAlias = tuple[int, int, str]
"""The number of the call, the batch row, the name of the layer."""


class Watched:
    """What a watched block left behind.

    Attributes:
        layers: the names of the layers that were listened to, in the order of the module.
        calls: how many calls ran.
    """

    def __init__(self, layers: Sequence[str], device: torch.device | str | None) -> None:
        self.layers = tuple(layers)
        self.calls = 0
        self._device = device
        self._states: dict[Key, Tensor] = {}
        self._times: dict[str, int] = {}
        self._inside = False

    @property
    def states(self) -> Mapping[Key, Tensor]:
        """The states of each layer, `(n, d)`, under `(call, row, layer)`; one that runs again in a call is `layer#2`."""
        return MappingProxyType(self._states)

    def entropy(self, protocol: Protocol = DEFAULT, mask: Any = None) -> dict[Key, Estimate]:
        """The entropy of each layer's states.

        Args:
            mask: `(B, n)`, true where a state counts (an `attention_mask`); None counts all, padding too.

        Raises:
            ValueError: the mask has another shape than a call's states, or leaves none.
        """
        return {key: entropy(self._kept(key, mask), protocol) for key in self._states}

    def conditional_entropy(self, prompt: slice, response: slice, protocol: Protocol = DEFAULT) -> dict[Key, Estimate]:
        """The conditional entropy of each layer's states in the positions `response`, given those in `prompt`.

        Raises:
            ValueError: one of them covers no state of a call.
        """
        return {key: conditional_entropy(states[prompt], states[response], protocol) for key, states in self._states.items()}

    def _kept(self, key: Key, mask: Any) -> Tensor:
        states = self._states[key]
        if mask is None:
            return states
        rows = torch.as_tensor(mask).to(states.device).bool()
        call, row, layer = key
        if rows.ndim != 2 or row >= len(rows) or rows.shape[1] != len(states):
            raise ValueError(
                f"the mask has shape {tuple(rows.shape)}, but {layer} has {len(states)} states in row {row} of call {call}; "
                "give one of shape (rows, states)"
            )
        return states[rows[row]]

    def _begin(self) -> None:
        self.calls += 1
        self._times = {}

    def _enter(self) -> None:
        self._inside = True
        self._begin()

    def _leave(self) -> None:
        self._inside = False

    def _keep(self, layer: str, output: Any) -> None:
        states = first_tensor(output).detach()
        if states.ndim not in (2, 3):
            raise ValueError(f"{layer} gave a tensor of shape {tuple(states.shape)}; watched layers give (n, d) or (B, n, d)")
        if not self._inside and (self.calls == 0 or layer in self._times):
            # Layers that run without the watched module itself: the first one to come round again begins another call.
            self._begin()
        times = self._times[layer] = self._times.get(layer, 0) + 1
        name = layer if times == 1 else f"{layer}#{times}"
        # A copy: networks add to their residual stream in place.
        for row, sequence in enumerate(states[None] if states.ndim == 2 else states):
            self._states[self.calls - 1, row, name] = sequence.to(self._device or sequence.device, copy=True)


@contextmanager
def watch(
    module: nn.Module, layers: str | Sequence[str] = "model.layers.*", device: torch.device | str | None = None
) -> Iterator[Watched]:
    """Keep the states that leave the layers of `module` while the block runs.

    Args:
        module: any torch module. Each call of it is a call of its own; `generate` makes one for each token.
        layers: patterns of names as `named_modules` gives them; `*` stands for one part of a name, never for a dot.
        device: where the copies are kept; None leaves them where they are.

    Raises:
        ValueError: no layer has such a name, or a layer's output is not a sequence of states.
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    named = {name: child for name, child in module.named_modules() if name}
    chosen = {name: child for name, child in named.items() if any(_matches(name, pattern) for pattern in patterns)}
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in chosen):
            raise ValueError(f"no layer of {type(module).__name__} is called {pattern!r}; {_near(pattern, list(named))}")
    watched = Watched(list(chosen), device)

    def listen(name: str, child: nn.Module) -> Any:
        return child.register_forward_hook(lambda _module, _args, output: watched._keep(name, output))

    with ExitStack() as hooks:
        hooks.callback(module.register_forward_pre_hook(lambda *_: watched._enter()).remove)
        # Also after an error in the call, which the block may catch.
        hooks.callback(module.register_forward_hook(lambda *_: watched._leave(), always_call=True).remove)
        for name, child in chosen.items():
            hooks.callback(listen(name, child).remove)
        yield watched


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _near(pattern: str, names: list[str]) -> str:
    # Numbers as stars, so that one of forty layers stands for all.
    general = list(dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names))
    near = difflib.get_close_matches(pattern, general, n=3, cutoff=0.5)
    return (
        f"did you mean {', '.join(near)}?"
        if near
        else f"there are {', '.join(general[:6]) or 'none'}{', ...' if len(general) > 6 else ''}"
    )
