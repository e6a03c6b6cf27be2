"""The seam between models and measurements: hidden states, as soon as a layer has run.

A model family does not know what is measured, and a measurement does not know the family. Between them goes a `Trace`: the family
says "this forward pass runs that stack, at this step of sampling, and its batch rows hold these spans"; forward hooks then hand
each layer's states to an observer, one batch row at a time, and nothing is kept.

    with trace.record(self.llm, rows, step="single"):
        self.language_model(inputs_embeds=...)

The same call serves every kind of model. Autoregressive: one teacher-forced pass, `step="single"`. Flow, diffusion and masked models:
one pass a sampling step, `"0000"`, `"0001"`, ..., the last of them `"final"`, and one more on the finished image, `"clean"`; a family
asks `trace.wants(step)` before it records. Models whose prompt and response come from separate passes record the prompt once as
`"single"`, with prompt spans alone, and each response pass with response spans alone. Two-stage models record two stacks.
Rows that nobody reads (the unconditional half of guidance) are `None`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Role = Literal["prompt", "response"]
Modality = Literal["text", "image", "audio"]
Kind = Literal["content", "template"]


@dataclass(frozen=True)
class Span:
    """Positions `start` to `stop` (excluded) of one sequence, and what they hold."""

    start: int
    stop: int
    role: Role
    modality: Modality
    kind: Kind = "content"

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Reading:
    """Which states are taken.

    Attributes:
        spans: `content`, or `all` to count template positions (BOS, role names, begin-of-image marks, ...) in.
        step: of models that sample an image in many passes: the last step of sampling, one more pass on the finished image, or
            all of them. Of others this says nothing: their one pass is `single`.
        stacks: names of the stacks that are read, of models that have several; all of them if None.
    """

    spans: Literal["content", "all"] = "content"
    step: Literal["final", "clean", "all"] = "final"
    stacks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.spans not in ("content", "all"):
            raise ValueError(f'Reading.spans is "content" or "all", got {self.spans!r}')
        if self.step not in ("final", "clean", "all"):
            raise ValueError(f'Reading.step is "final", "clean" or "all", got {self.step!r}')
        if self.stacks is not None and (isinstance(self.stacks, str) or not self.stacks):
            raise ValueError(f"Reading.stacks is a tuple of names of stacks, or None for all, got {self.stacks!r}")

    def check(self, name: str, stacks: Sequence[Stack]) -> None:
        """Refuse a reading of stacks that the model `name` has not.

        Raises:
            ValueError: there is no such stack.
        """
        known = [stack.name for stack in stacks]
        if unknown := sorted(set(self.stacks or ()) - set(known)):
            raise ValueError(f"{name} has no stack {', '.join(unknown)}; it has {', '.join(known)}")

    def to_dict(self) -> dict[str, Any]:
        held = {"spans": self.spans, "step": self.step}
        return held if self.stacks is None else held | {"stacks": sorted(self.stacks)}

    def digest(self) -> str:
        """A short hash that is stored with every number."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Row:
    """One batch row of a pass: the item that it belongs to (its index in the batch of items) and what its positions hold.

    Positions that no span covers (padding on the right) are never handed on.
    """

    item: int
    spans: tuple[Span, ...]

    @property
    def length(self) -> int:
        return max((span.stop for span in self.spans), default=0)


@dataclass(frozen=True)
class Stack:
    """A transformer of a model: its layers in order, and its last norm if it has one."""

    name: str
    layers: tuple[nn.Module, ...]
    norm: nn.Module | None = None

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def final(self) -> int:
        """The layer number under which states after the last norm are stored."""
        return self.depth + 1


@dataclass(frozen=True)
class LayerStates:
    """The states of one item after one layer of one pass.

    `layer` 0 is what enters the first layer, k what leaves layer k - 1, `stack.final` what leaves the last norm.
    """

    stack: str
    step: str
    layer: int
    item: int
    spans: tuple[Span, ...]
    states: Tensor

    def select(self, role: Role, reading: Reading, modality: Modality | None = None) -> Tensor:
        """The states of one role, of one modality or of all: (n, d). Nothing is copied where one span covers them."""
        chosen = [
            span
            for span in self.spans
            if span.role == role and (reading.spans == "all" or span.kind == "content") and modality in (None, span.modality)
        ]
        parts = [self.states[span.start : span.stop] for span in chosen]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else self.states[:0]

    def modalities(self, role: Role) -> tuple[Modality, ...]:
        """The modalities of this role's content, in the order of their positions."""
        return tuple(dict.fromkeys(s.modality for s in self.spans if s.role == role and s.kind == "content" and len(s)))


Observer = Callable[[LayerStates], None]


class Trace:
    """Hands the states of recorded passes to `observe`, layer by layer and row by row.

    Args:
        threads: how many rows of a layer are observed at once, each on a thread of its own that torch does not divide further. The pass
            goes on when the layer's last row is done. No two rows of a pass are of one item, so an observer that keeps items apart needs
            no lock.
    """

    def __init__(self, observe: Observer, reading: Reading | None = None, threads: int = 1) -> None:
        self.observe = observe
        self.reading = reading or Reading()
        self.threads = threads

    def wants(self, step: str, stack: str | None = None) -> bool:
        """Whether the reading takes this step, of this stack: `single` always, others as `Reading.step` says."""
        read = stack is None or self.reading.stacks is None or stack in self.reading.stacks
        return read and (step == "single" or self.reading.step in ("all", step))

    @contextmanager
    def record(
        self,
        stack: Stack,
        rows: Sequence[Row | None],
        step: str = "single",
        unpack: Callable[[Tensor], Sequence[Tensor]] = torch.unbind,
    ) -> Iterator[None]:
        """Observe the one forward pass that runs inside.

        Args:
            rows: what each batch row holds; None for a row that nobody reads.
            unpack: from the tensor that a layer gives to one (n, d) tensor a row; the default splits (B, n, d). A model that packs
                its sequences into one axis gives its own.

        Raises:
            RuntimeError: the pass ran a layer twice or never, or gave another number of rows.
        """
        if not self.wants(step, stack.name):
            yield
            return
        seen: set[int] = set()
        inference = torch.is_inference_mode_enabled()

        def observe(states: LayerStates) -> None:
            with torch.inference_mode(inference):  # which is a thread's own
                self.observe(states)

        def deliver(layer: int, output: Tensor) -> None:
            if layer in seen:
                raise RuntimeError(f"layer {layer} of {stack.name!r} ran twice in one recorded pass; record each pass by itself")
            seen.add(layer)
            sequences = unpack(output.detach())
            if len(sequences) != len(rows):
                raise RuntimeError(f"layer {layer} of {stack.name!r} gave {len(sequences)} rows, {len(rows)} were announced")
            read = (
                LayerStates(stack.name, step, layer, row.item, row.spans, states[: row.length])
                for row, states in zip(rows, sequences, strict=True)
                if row is not None
            )
            for _ in map(self.observe, read) if self.threads == 1 else pool.map(observe, read):
                pass

        with ThreadPoolExecutor(self.threads, "row", torch.set_num_threads, (1,)) as pool, hooked(stack, deliver):
            yield
        expected = stack.depth + 1 + (stack.norm is not None)
        if len(seen) != expected:
            raise RuntimeError(f"a recorded pass of {stack.name!r} gave {len(seen)} of {expected} layers (step {step!r})")


def recorded(trace: Trace | None, stack: Stack, rows: Sequence[Row | None], step: str = "single") -> AbstractContextManager[None]:
    """`trace.record` where there is a trace, and nothing where there is none."""
    return nullcontext() if trace is None else trace.record(stack, rows, step)


def step_name(step: int, steps: int) -> str:
    """What a sampling step is called, counted from 0 of `steps`: `0000`, `0001`, ..., `final`."""
    return "final" if step == steps - 1 else f"{step:04d}"


@contextmanager
def hooked(stack: Stack, deliver: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While inside, call `deliver(layer, output)` for what enters the first layer, leaves each layer and leaves the last norm."""
    with ExitStack() as hooks:

        def on_exit(layer: int) -> Callable[..., None]:
            return lambda module, args, output: deliver(layer, first_tensor(output))

        def on_entry(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            deliver(0, first_tensor(args if args else kwargs.get("hidden_states", kwargs)))

        hooks.callback(stack.layers[0].register_forward_pre_hook(on_entry, with_kwargs=True).remove)
        for number, layer in enumerate(stack.layers, start=1):
            hooks.callback(layer.register_forward_hook(on_exit(number)).remove)
        if stack.norm is not None:
            hooks.callback(stack.norm.register_forward_hook(on_exit(stack.final)).remove)
        yield


def first_tensor(output: Any) -> Tensor:
    """The hidden states of a module's output: the output itself, or the first tensor of a tuple, list or mapping.

    Raises:
        TypeError: there is no tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"a layer gave {type(output).__name__}, which holds no tensor to read")
