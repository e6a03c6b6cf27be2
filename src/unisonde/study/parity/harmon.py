"""Parity of Harmon: the MAR encoder on two grids, a question with its answer, four steps of drawing, the diffusion head, the autoencoder.

Tokens drawn by this random network are as large as 7e4, for the first of ten steps divides by the square root of 2e-9. Neighbouring
float32 numbers are up to 8e-3 apart there, so those five arrays may differ by 32 machine epsilons of their largest number (0.2); a
temperature that is wrong by two hundredths differs by more. Everything else is compared as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor

from unisonde.models.base import Generation
from unisonde.models.harmon import Encoded, Harmon
from unisonde.models.parts import kl16
from unisonde.models.parts.checkpoint import Keys
from unisonde.models.parts.harmon_network import KEYS, Drawing, HarmonConfig, HarmonNetwork, filled
from unisonde.models.parts.mar import to_latents
from unisonde.models.parts.text import pad, write_text
from unisonde.models.trace import hooked
from unisonde.study.parity import harmon_vae
from unisonde.study.parity.fixture import TOLERANCE, Fixture

INPUTS = (
    r"und6?\.latent",
    r"und\.input_ids",
    r"t2i\.input_ids",
    r"t2i\.orders",
    r"(t2i|dl)\.draw\d+",
    r"dl\.(x|t|c|temperature_cfg)",
    r"vae\.x",
)


def config_of(official: Mapping[str, Any]) -> HarmonConfig:
    grid = official["run"]["t2i"]["grid"][0]
    return HarmonConfig.of({"llm": official["qwen2"], "mar": official["mar"], "grid": grid}, official["qwen2"]["hidden_size"])


def network_of(official: Mapping[str, Any], weights: Mapping[str, Tensor], keys: Keys = KEYS) -> HarmonNetwork:
    return filled(config_of(official), weights.items(), "cpu", torch.float32, "harmon", keys)


@torch.inference_mode()
def check(fixture: Fixture) -> None:
    network = network_of(fixture.config, fixture.weights)
    vae = harmon_vae.autoencoder_of(fixture)
    check_question(fixture, network)
    check_head(fixture, network)
    check_drawing(fixture, network, vae)
    harmon_vae.check(fixture, vae)


@contextmanager
def passes_of(network: HarmonNetwork) -> Iterator[list[list[Tensor]]]:
    """The passes that run inside: for each, what entered and left the layers, and what left the last norm."""
    passes: list[list[Tensor]] = []

    def take(layer: int, output: Tensor) -> None:
        if layer == 0:
            passes.append([])
        passes[-1].append(output.clone())

    with hooked(network.stack, take):
        yield passes


ROUNDING = 32 * torch.finfo(torch.float32).eps
"""What drawn tokens may differ by, as a share of the largest of them."""


def large(fixture: Fixture, name: str, ours: Tensor) -> None:
    """Compare drawn tokens, in a unit of which the tolerance is their rounding."""
    fixture.compare(name, ours, unit=max(1.0, ROUNDING * float(abs(fixture.arrays[name]).max()) / TOLERANCE))


class Silent:
    """A tokenizer that spells nothing: what is compared are the ids."""

    @staticmethod
    def decode(ids: list[int], **_: Any) -> str:
        return ""


def check_question(fixture: Fixture, network: HarmonNetwork) -> None:
    """Image and text to text: the features of a picture, the words that are written, and one pass over all of it."""
    latents = {name: fixture.feed(f"{name}.latent").flatten(1, 2) for name in ("und", "und6")}
    features = network.see(latents["und"])[1]
    fixture.compare("und.z_enc", features)
    seen, wide = network.see(latents["und6"])
    fixture.compare("und6.x_enc", seen)
    fixture.compare("und6.z_enc", wide)

    run = fixture.config["run"]
    ids = fixture.feed("und.input_ids")
    places = [place for place, token in enumerate(ids[0].tolist()) if token == run["ids"]["image"]]
    prompt = Encoded(ids[0].tolist(), (), range(places[0], places[-1] + 1))
    model = _Parts(network)
    [embedded] = Harmon.embed(model, [prompt], features)  # type: ignore[arg-type]  # it needs the network alone
    fixture.compare("und.inputs_embeds", embedded[None])
    settings = Generation(tokens=run["und"]["greedy_tokens"], temperature=0.0)
    with passes_of(network) as passes:
        [written] = write_text(
            network.llm, Silent(), ids, torch.ones_like(ids), settings, [0], run["ids"]["eos"], run["ids"]["pad"], embedded[None]
        )
    fixture.compare("und.generated", torch.tensor([written.ids]))
    for step, layers in enumerate(passes):
        fixture.states(f"und.gen{step}", layers)
    with passes_of(network) as passes:
        states = Harmon.read(model, [embedded], [written.ids[:-1]])  # type: ignore[arg-type]
    length = ids.shape[1]
    fixture.states("und.prefill", [layer[:, :length] for layer in passes[0]])
    fixture.compare("und.logits", network.llm.lm_head(states[:, :length]))
    for step in range(1, len(written.ids)):
        fixture.states(f"und.gen{step}", [layer[:, length + step - 1 : length + step] for layer in passes[0]])


class _Parts:
    """What of a model `embed` and `read` need."""

    device = torch.device("cpu")

    def __init__(self, network: HarmonNetwork) -> None:
        self.network = network


def check_head(fixture: Fixture, network: HarmonNetwork) -> None:
    """The diffusion head alone, once and through all its steps; its draws are in the order of sampling."""
    head = network.mar.diffloss
    fixture.compare("dl.timestep_map", torch.from_numpy(head.schedule.timesteps))
    fixture.compare("dl.betas", torch.from_numpy(head.schedule.betas))
    condition = fixture.feed("dl.c")
    fixture.compare("dl.out", head.net(fixture.feed("dl.x"), fixture.feed("dl.t"), condition))
    temperature, guidance = fixture.feed("dl.temperature_cfg").tolist()
    draws = (fixture.feed(f"dl.draw{k}") for k in count())
    large(fixture, "dl.sample", head.sample(condition, noise_of(draws, len(head.schedule)), temperature, guidance))


def noise_of(draws: Iterator[Tensor], steps: int) -> Tensor:
    """One sampling's noise: its start, which both branches share, and what is added at each step."""
    start = next(draws)
    return torch.stack([start.repeat(2, 1), *(next(draws) for _ in range(steps))])


class Watched(Drawing):
    """A drawing that compares what each step sees and makes; its passes are numbered as they come."""

    def __init__(self, fixture: Fixture, network: HarmonNetwork, ids: Tensor, mask: Tensor) -> None:
        super().__init__(network, ids, mask)
        self.fixture, self.grid, self.step = fixture, network.config.grid, 0

    def vectors(self, tokens: Tensor, visible: Tensor) -> Tensor:
        name = f"t2i.step{self.step}"
        large(self.fixture, f"{name}.tokens", tokens.unflatten(1, (self.grid, self.grid)))
        self.fixture.compare(f"{name}.mask", (~visible).float())
        with passes_of(self.network) as passes:
            made = super().vectors(tokens, visible)
        self.fixture.states(name, passes[0])
        self.fixture.compare(f"{name}.z_enc", self.network.see(tokens, visible)[1])
        there, places = self.layout(passes[0][0].shape[1])
        self.fixture.compare(f"{name}.full_mask", there)
        self.fixture.compare(f"{name}.position_ids", places)
        self.fixture.compare(f"{name}.dec_z", made)
        self.step += 1
        return made


def check_drawing(fixture: Fixture, network: HarmonNetwork, vae: Any) -> None:
    """Text to image: our own loop with the recorded orders and draws."""
    run, ids = fixture.config["run"], fixture.feed("t2i.input_ids")
    rows = []
    for row in ids.tolist():  # the prompts without their padding, which is laid out anew
        while row[-1] == run["ids"]["pad"]:
            row.pop()
        rows.append(row)
    again, mask = pad(rows, run["ids"]["pad"], "right")
    if not torch.equal(again, ids):
        raise ValueError("t2i.input_ids: our padding gives other token ids")
    fixture.compare("t2i.attention_mask", mask.bool())
    drawing = Watched(fixture, network, again, mask)
    with passes_of(network) as passes:
        drawing.read_prompts()
    fixture.states("t2i.prefill", passes[0])
    settings, half = run["t2i"], len(rows) // 2
    draws = (fixture.feed(f"t2i.draw{k}") for k in count())
    orders = fixture.feed("t2i.orders")
    if not torch.equal(orders[:half], orders[half:]):
        raise ValueError("t2i.orders: the two branches draw in different orders")
    tokens = drawing.draw(
        orders[:half],
        settings["iterations"],
        lambda each: noise_of(draws, len(network.mar.diffloss.schedule)),
        settings["temperature"],
        settings["cfg"],
    )
    large(fixture, "t2i.latent", tokens.unflatten(1, (network.config.grid, network.config.grid)))
    fixture.compare("t2i.image", kl16.decode(vae, to_latents(tokens[:half], network.config.mar.patch_size)))
