"""The Wan autoencoder: names of the original file, pictures as one frame, normalised latents."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file

from unisonde.models.parts import wan_vae
from unisonde.models.parts.showo2_network import SIZES

SMALL = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [False, True]}
SMALL |= {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [2.0, 0.5, 1.0, 3.0], "scale_factor_spatial": 4}


def original_names(levels: int, blocks: int) -> list[str]:
    """The keys of the original network, by its structure: lists of blocks counted through, levels of several blocks and a resampling."""
    conv = ("weight", "bias")

    def residual(at: str, shortcut: bool) -> list[str]:
        names = [f"{at}.residual.{k}.gamma" for k in (0, 3)] + [f"{at}.residual.{k}.{leaf}" for k in (2, 6) for leaf in conv]
        return names + [f"{at}.shortcut.{leaf}" for leaf in conv] * shortcut

    names = [f"conv{k}.{leaf}" for k in (1, 2) for leaf in conv]
    for half, levelled, count in (("encoder", "downsamples", blocks), ("decoder", "upsamples", blocks + 1)):
        names += [f"{half}.conv1.{leaf}" for leaf in conv]
        names += residual(f"{half}.middle.0", False) + residual(f"{half}.middle.2", False)
        names += [f"{half}.middle.1.norm.gamma", *(f"{half}.middle.1.{c}.{leaf}" for c in ("to_qkv", "proj") for leaf in conv)]
        names += [f"{half}.head.0.gamma", *(f"{half}.head.2.{leaf}" for leaf in conv)]
        number = 0
        for level in range(levels):
            # Multipliers are 1, 2, 4 and, of four levels, 4. In the decoder a resampling halves the width, and only 4 to 4 restores it.
            wider = level in (1, 2) if half == "encoder" else (level, levels) == (1, 4)
            for block in range(count):
                names += residual(f"{half}.{levelled}.{number}", wider and block == 0)
                number += 1
            if level < levels - 1:
                names += [f"{half}.{levelled}.{number}.resample.1.{leaf}" for leaf in conv]
                over_time = level >= 1 if half == "encoder" else level < levels - 2
                names += [f"{half}.{levelled}.{number}.time_conv.{leaf}" for leaf in conv] * over_time
                number += 1
    return names


def test_every_original_key_has_the_place_that_diffusers_gives_it() -> None:
    names = original_names(4, 2)
    with torch.device("meta"):
        ours = AutoencoderKLWan()
    renamed = {name: wan_vae.keys_of().of(name)[1] for name in names}
    assert sorted(key for keys in renamed.values() for key in keys) == sorted(ours.state_dict())
    theirs = convert_wan_vae_to_diffusers({name: name for name in names})
    assert {name: (key,) for key, name in theirs.items()} == renamed
    assert sum(p.numel() for p in ours.parameters()) / 1e6 == pytest.approx(126.9, abs=0.1)


def test_latents_fit_the_published_network() -> None:
    vae = wan_vae.build()
    config = SIZES["1.5B"]
    assert vae.config.z_dim == config.latent_channels == len(vae.config.latents_mean) and wan_vae.reduction(vae) == 8
    assert config.grid * config.patch * wan_vae.reduction(vae) == 432
    assert all(parameter.is_meta for parameter in vae.parameters())


@pytest.fixture
def small() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(**SMALL).eval()


@torch.inference_mode()
def test_a_picture_is_a_video_of_one_frame(small) -> None:
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = (torch.tensor(SMALL[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    raw = small.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    latents = wan_vae.encode(small, pixels)
    assert latents.shape == (2, 4, 4, 4) and torch.allclose(latents * std + mean, raw, atol=1e-6)
    decoded = wan_vae.decode(small, latents)
    assert decoded.shape == pixels.shape and torch.allclose(decoded, small.decode(raw[:, :, None]).sample[:, :, 0], atol=1e-5)
    # Frames after it change nothing of the first: the network is causal.
    video = torch.cat([pixels[:, :, None], torch.rand(2, 3, 4, 16, 16)], 2)
    assert torch.allclose(small.encode(video).latent_dist.mode()[:, :, 0], raw, atol=1e-5)


@torch.inference_mode()
def test_noise_of_the_posterior_is_not_divided_by_the_channels_deviation(small) -> None:
    """As Show-o2 publishes it: the mean is normalised, then noise of the posterior's own deviation is added."""
    pixels, noise = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 4, 4)
    sampled, mode = wan_vae.encode(small, pixels, noise), wan_vae.encode(small, pixels)
    posterior = small.encode(pixels[:, :, None]).latent_dist
    assert torch.allclose(sampled - mode, posterior.std[:, :, 0] * noise, atol=1e-6)


def test_both_layouts_give_the_same_network(small, tmp_path, monkeypatch) -> None:
    names = {ours: theirs for theirs in original_names(3, 1) for ours in wan_vae.keys_of(3, 1).of(theirs)[1]}
    assert set(names) == set(small.state_dict())
    first, second = tmp_path / "original", tmp_path / "diffusers"
    first.mkdir()
    torch.save({names[key]: tensor for key, tensor in small.state_dict().items()}, first / wan_vae.FILE)
    (second / "vae").mkdir(parents=True)
    small.save_config(second / "vae")
    save_file(small.state_dict(), second / "vae" / "diffusion_pytorch_model.safetensors")
    assert json.loads((second / "vae" / "config.json").read_text())["_class_name"] == "AutoencoderKLWan"

    build, keys_of = wan_vae.build, wan_vae.keys_of
    monkeypatch.setattr(wan_vae, "build", lambda config=None: build(config or SMALL))
    monkeypatch.setattr(wan_vae, "keys_of", partial(keys_of, 3, 1))
    for folder in (first, second):
        loaded = wan_vae.load(str(folder), "cpu", "tiny")
        assert not loaded.training and list(loaded.config.latents_std) == SMALL["latents_std"]
        for key, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, small.state_dict()[key])


def test_an_autoencoder_that_is_not_there(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"autoencoder of tiny is neither .* put Wan2.1_VAE.pth of Wan-AI/Wan2.1-T2V-14B there"):
        wan_vae.load(str(tmp_path), "cpu", "tiny")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.update({"encoder.conv9.weight": torch.zeros(1)}), r"tiny \(autoencoder\) has unknown encoder\.conv9\.weight"),
        (lambda w: w.pop("quant_conv.bias"), r"tiny \(autoencoder\) lacks quant_conv\.bias"),
    ],
)
def test_a_file_that_is_not_this_autoencoders(small, tmp_path, change, said) -> None:
    (tmp_path / "vae").mkdir()
    small.save_config(tmp_path / "vae")
    weights = small.state_dict()
    change(weights)
    save_file(weights, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=said):
        wan_vae.load(str(tmp_path), "cpu", "tiny")
