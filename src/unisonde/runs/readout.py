"""From the states of a trace to rows of measurements, layer by layer.

`Readout` is the observer that a run gives to a model. Of every layer it takes the entropy of the prompt (each modality by itself) and,
where there is a response, the entropies of the response given the whole prompt; then the states are let go. Where prompt and response
come from separate passes, the prompt's states are held until the batch has been responded to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unisonde.data.item import Item
from unisonde.measure import Estimate, Protocol, layer_estimates
from unisonde.models.trace import LayerStates, Reading

SHORT = 8
"""Below this many tokens a median-rule entropy says nothing (DESIGN.md, decision 5)."""

RESPONSE_QUANTITIES = ("conditional_entropy", "joint_entropy", "prompt_term")


class Readout:
    """Measures the states of a batch of items as they come.

    Args:
        items: the batch; `LayerStates.item` counts in it.
        constant: columns that are the same in every row.
        keep: also keep the states themselves, on the CPU, in `states`.
    """

    def __init__(
        self, items: Sequence[Item], protocol: Protocol, reading: Reading, constant: dict[str, Any], keep: bool = False
    ) -> None:
        self.items = items
        self.protocol = protocol
        self.reading = reading
        self.constant = constant
        self.keep = keep
        self.rows: list[list[dict[str, Any]]] = [[] for _ in items]
        self.lengths: list[tuple[int, int]] = [(0, 0)] * len(items)
        self.states: dict[str, Tensor] = {}
        self._held: dict[tuple[int, str, int], Tensor] = {}

    def __call__(self, seen: LayerStates) -> None:
        """Measure one layer of one item.

        Raises:
            ValueError: the states are not finite; the sentence names the layer and the item.
        """
        item = self.items[seen.item]
        prompt = seen.select("prompt", self.reading)
        response = seen.select("response", self.reading)
        if self.keep:
            self._keep(seen, item)
        try:
            estimates = self._response_level(seen, item, prompt, response) if len(response) else None
            if len(prompt):
                self._prompt_level(seen, item, len(prompt), len(response), estimates)
                if not len(response):
                    # A copy: a view would change with a layer that adds in place, and would keep the whole batch alive.
                    self._held[seen.item, seen.stack, seen.layer] = prompt.clone()
        except ValueError as error:
            raise ValueError(f"{error} (layer {seen.layer} of {seen.stack}, step {seen.step}, item {item.id!r})") from error

    def _prompt_level(
        self, seen: LayerStates, item: Item, n_prompt: int, n_response: int, known: dict[str, Estimate] | None
    ) -> None:
        """The prompt's entropy, each modality by itself; `known` holds that of the whole prompt, if it was taken already."""
        for modality in seen.modalities("prompt"):
            states = seen.select("prompt", self.reading, modality)
            flags = ["question"] if modality != item.modality else []
            whole = known is not None and len(states) == n_prompt
            estimate = known["entropy"] if known and whole else layer_estimates(states, None, self.protocol)["entropy"]
            self._row(seen, "prompt", modality, "entropy", estimate, len(states), n_response, flags)

    def _response_level(self, seen: LayerStates, item: Item, prompt: Tensor, response: Tensor) -> dict[str, Estimate]:
        if not len(prompt):
            place = (seen.item, seen.stack, seen.layer)
            if place not in self._held:
                raise ValueError("the response came without a prompt: the family recorded no prompt pass of this stack before it")
            prompt = self._held[place]
        estimates = layer_estimates(prompt, response, self.protocol)
        for quantity in RESPONSE_QUANTITIES:
            self._row(seen, "response", item.modality, quantity, estimates[quantity], len(prompt), len(response), [])
        return estimates

    def _row(
        self,
        seen: LayerStates,
        level: str,
        modality: str,
        quantity: str,
        estimate: Estimate,
        n_prompt: int,
        n_response: int,
        flags: list[str],
    ) -> None:
        item = self.items[seen.item]
        counted = (n_prompt,) if level == "prompt" else (n_prompt, n_response)
        if min(counted) < SHORT:
            flags = [*flags, "short"]
        self.lengths[seen.item] = (max(self.lengths[seen.item][0], n_prompt), max(self.lengths[seen.item][1], n_response))
        self.rows[seen.item].append(
            self.constant
            | {
                "item": item.id,
                "category": item.category,
                "level": level,
                "modality": modality,
                "quantity": quantity,
                "stack": seen.stack,
                "layer": seen.layer,
                "step": seen.step,
                "value": estimate.value,
                "ceiling": estimate.ceiling,
                "stderr": estimate.stderr,
                "units": estimate.units,
                "n_prompt": n_prompt,
                "n_response": n_response,
                "flags": ",".join(flags),
            }
        )

    def _keep(self, seen: LayerStates, item: Item) -> None:
        name = f"{item.id}/{seen.stack}/{seen.step}/{seen.layer:03d}"
        self.states[name] = seen.states.to("cpu", copy=True).contiguous()
        spans = [[s.start, s.stop, s.role, s.modality, s.kind] for s in seen.spans]
        # The spans go beside the states as bytes of JSON, since safetensors holds tensors alone.
        self.states[f"{item.id}/{seen.stack}/{seen.step}/spans"] = torch.tensor(list(json.dumps(spans).encode()), dtype=torch.uint8)
