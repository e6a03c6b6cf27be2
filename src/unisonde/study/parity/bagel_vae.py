"""Parity of BAGEL's autoencoder, whose weights are a fixture of their own and whose arrays (`vae.*`) stand in BAGEL's."""

from __future__ import annotations

from typing import Any

import torch

from unisonde.models.parts import flux_vae
from unisonde.models.parts.flux_vae import FluxVaeConfig
from unisonde.study.parity.fixture import Fixture, weights_of

NAME = "bagel_vae"


def config_of(raw: dict[str, Any]) -> FluxVaeConfig:
    return FluxVaeConfig(
        widths=tuple(raw["ch"] * mult for mult in raw["ch_mult"]),
        blocks=raw["num_res_blocks"],
        latent_channels=raw["z_channels"],
        scale=raw["scale_factor"],
        shift=raw["shift_factor"],
    )


def build(fixture: Fixture) -> Any:
    """The tiny autoencoder, filled as a checkpoint is."""
    weights = weights_of(fixture.folder, NAME)
    return flux_vae.filled(config_of(fixture.config["vae"]), weights.items(), "cpu", fixture.name)


def check(fixture: Fixture) -> None:
    """The posterior's mean and log-variance of a picture, by way of what `encode` makes of them."""
    vae = build(fixture)
    pixels = fixture.feed("vae.x")
    mean = flux_vae.encode(vae, pixels) / vae.config.scaling_factor + vae.config.shift_factor
    posterior = vae.encode(pixels).latent_dist
    # A sample less the mode, for a noise of one, is the deviation.
    one = torch.ones_like(posterior.mean)
    std = (flux_vae.encode(vae, pixels, one) - flux_vae.encode(vae, pixels)) / vae.config.scaling_factor
    fixture.compare("vae.moments", torch.cat([posterior.mean, posterior.logvar], 1))
    fixture.compare("vae.moments", torch.cat([mean, 2 * std.log()], 1))
