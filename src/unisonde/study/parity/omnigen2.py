"""Parity of OmniGen2: the diffusion transformer with its refiners, padded rows, reference images, and Euler sampling with guidance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unisonde.models.parts.omnigen2_network import OmniGen2Config, OmniGen2Transformer, filled, flow_times, there
from unisonde.models.trace import Stack, hooked
from unisonde.study.parity.fixture import Fixture

INPUTS = ("text", "text_mask", "neg", "neg_mask", "latents", r"ref\.\d\.\d")


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """What each module gives in every call inside, in order."""
    seen: list[list[Tensor]] = [[] for _ in modules]
    hooks = [m.register_forward_hook(lambda _, args, y, k=k: seen[k].append(y.clone())) for k, m in enumerate(modules)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def compared(fixture: Fixture, network: OmniGen2Transformer, *prefixes: str) -> Iterator[None]:
    """Compare the passes inside, in order, with the arrays of these prefixes: states of the joint layers, and what follows them.

    Of a pass with guidance the conditional rows come first, and were recorded alone.
    """
    passes: list[list[Tensor]] = []

    def take(layer: int, output: Tensor) -> None:
        if layer == 0:
            passes.append([])
        passes[-1].append(output.clone())

    with hooked(Stack("dit", tuple(network.layers)), take), outputs_of([network.norm_out]) as [tokens]:
        yield
    for prefix, layers, last in zip(prefixes, passes, tokens, strict=True):
        rows = len(fixture.arrays[f"{prefix}.h0"])
        for number, layer in enumerate(layers):
            fixture.compare(f"{prefix}.h{number}", layer[:rows])
        fixture.compare(f"{prefix}.velocity_tokens", last[:rows])


def texts_of(fixture: Fixture, name: str) -> tuple[Tensor, list[int]]:
    """Recorded text features and their lengths; the mask that is made from the lengths is compared."""
    features, mask = fixture.feed(name), fixture.feed(f"{name}_mask")
    lengths = mask.sum(1).tolist()
    fixture.compare(f"{name}_mask", there(lengths, features.shape[1]).long())
    return features, lengths


@torch.inference_mode()
def check(fixture: Fixture) -> None:
    run = fixture.config["run"]
    network = filled(OmniGen2Config.from_dict(fixture.config), fixture.weights.items(), "cpu", torch.float32, fixture.name)
    latents = fixture.feed("latents")
    count = len(latents)

    with outputs_of([*network.context_refiner, *network.noise_refiner]) as refined, compared(fixture, network, "single"):
        texts = network.read(*texts_of(fixture, "text"))
        fixture.compare("single.out", network.velocity(texts, latents, torch.full((count,), run["single"]["t"])))
    names = [f"single.{which}{k}" for which in ("ctx", "noise") for k in range(network.config.num_refiner_layers)]
    for name, [output] in zip(names, refined, strict=True):
        fixture.compare(name, output)

    steps = run["steps"]
    times = flow_times(steps, latents.shape[-2] * latents.shape[-1])
    fixture.compare("timesteps", times)
    with compared(fixture, network, *(f"step{step}" for step in range(steps))):
        negative = network.read(*texts_of(fixture, "neg"))
        fixture.compare("final", network.draw(texts, negative, latents, times, run["guidance"]))

    references = [[fixture.feed(name) for name in sorted(fixture.arrays) if name.startswith(f"ref.{row}.")] for row in range(count)]
    with compared(fixture, network, "ref"):
        time = torch.full((count,), run["single"]["t"])
        fixture.compare("ref.out", network.velocity(texts, latents, time, references))
