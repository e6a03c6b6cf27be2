"""Parity of Harmon's autoencoder: latents of a random picture, and the picture that they decode to.

Its fixture has weights alone; the arrays stand in Harmon's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unisonde.models.parts import kl16
from unisonde.study.parity.fixture import Fixture, weights_of


def config_of(official: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The configuration of `AutoencoderKL` that the official one says; this variant has attention in its middle alone."""
    levels = len(official["ch_mult"])
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [official["ch"] * factor for factor in official["ch_mult"]],
        "layers_per_block": official["num_res_blocks"],
        "latent_channels": official["z_channels"],
        "scaling_factor": scale,
    }


def autoencoder_of(fixture: Fixture) -> Any:
    """The autoencoder that goes with a fixture of Harmon."""
    weights: dict[str, Tensor] = {k.removeprefix("vae."): t for k, t in weights_of(fixture.folder, "harmon_vae").items()}
    return kl16.filled(weights.items(), "cpu", "harmon_vae", config_of(fixture.config["vae"], fixture.config["vae_scale"]))


def check(fixture: Fixture, vae: Any) -> None:
    """Encode and decode. The picture is decoded from our latents; the recorded ones are not scaled."""
    latents = kl16.encode(vae, fixture.feed("vae.x"))
    fixture.compare("vae.z", latents / vae.config.scaling_factor)
    fixture.compare("vae.dec", kl16.decode(vae, latents))
