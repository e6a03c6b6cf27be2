"""Show-o2 from a folder in the published layout, written here: small and random, with the official key names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import byte_tokenizer
from torch import Tensor

import unisonde
from unisonde.models import showo2
from unisonde.models.base import Generation
from unisonde.models.parts import wan_vae
from unisonde.models.parts.showo2_network import Showo2Config, Showo2Network
from unisonde.models.registry import family_of
from unisonde.models.showo2 import ADDED_TOKENS, PAD, SPECIAL_TOKENS, SYSTEM

CONFIG = Showo2Config(
    hidden=32,
    ffn=48,
    layers=2,
    heads=4,
    kv_heads=2,
    vocabulary=300,
    tied=True,
    positions=256,
    latent_channels=4,
    grid=4,
    window=64,
    semantic_width=16,
    semantic_ffn=24,
    semantic_layers=2,
    semantic_heads=2,
    semantic_grid=4,
    flow_width=24,
    flow_ffn=32,
    flow_layers=2,
    flow_heads=2,
    flow_kv_heads=1,
)
VAE = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [False, True]}
VAE |= {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [2.0, 0.5, 1.0, 3.0], "scale_factor_spatial": 4}


def weights(config: Showo2Config = CONFIG) -> dict[str, Tensor]:
    """Random tensors under the official names, the tied head too, as the published pickles hold it."""
    torch.manual_seed(0)
    state = Showo2Network(config).state_dict()
    made = {key: torch.randn(tensor.shape) * 0.1 for key, tensor in state.items()}
    if config.tied:
        made["showo.lm_head.weight"] = made["showo.model.embed_tokens.weight"]
    return made


def write(folder: Path, state: dict[str, Tensor], config: Showo2Config = CONFIG, kind: str = "bin") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif kind == "shards":
        names = sorted(state)
        index = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"pytorch_model-0000{number}-of-00002.bin"
            torch.save({name: state[name] for name in part}, folder / file)
            index |= dict.fromkeys(part, file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        save_file({key: tensor.clone() for key, tensor in state.items()}, folder / "model.safetensors")
    byte_tokenizer((*SPECIAL_TOKENS, *ADDED_TOKENS)).save_pretrained(folder)
    torch.manual_seed(1)
    vae = wan_vae.AutoencoderKLWan(**VAE)
    (folder / "vae").mkdir()
    vae.save_config(folder / "vae")
    save_file(vae.state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["bin", "shards", "safetensors"])
def test_the_published_layout(tmp_path, kind) -> None:
    state = weights()
    folder = write(tmp_path / "model", state, kind=kind)
    assert family_of(json.loads((folder / "config.json").read_text())) == "showo2"
    model = unisonde.load(folder)
    assert model.family == "showo2" and model.system == SYSTEM
    assert model.defaults("image") == Generation(guidance=5.0, steps=50)
    assert model.defaults("text") == Generation(tokens=300, temperature=0.0)
    for key, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, state[key])
    assert model.network.showo.lm_head.weight is model.network.showo.model.embed_tokens.weight
    assert not any(p.is_meta for part in (model.network, model.vae) for p in (*part.parameters(), *part.buffers()))
    assert model.generate("a red ring", "image", steps=3).size == (32, 32)
    assert isinstance(model.generate("a red ring", tokens=3), str)


def test_an_untied_head_is_its_own(tmp_path) -> None:
    config = replace(CONFIG, tied=False)
    state = weights(config)
    model = unisonde.load(write(tmp_path / "model", state, config))
    assert torch.equal(model.network.showo.lm_head.weight, state["showo.lm_head.weight"])


def test_number_formats(tmp_path) -> None:
    model = unisonde.load(write(tmp_path / "model", weights()), dtype=torch.bfloat16)
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}  # always
    assert model.network.flow_rotary.inv_freq.dtype == torch.float32
    assert model.generate("a red ring", "image", steps=3).size == (32, 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("fusion_proj.1.weight"), "lacks fusion_proj.1.weight"),
        (lambda s: s.update({"fusion_proj.9.weight": torch.zeros(1)}), "has unknown fusion_proj.9.weight"),
        (lambda s: s.update({"time_embed.mlp.0.bias": torch.zeros(3)}), r"in another shape time_embed.mlp.0.bias \(3,\)"),
    ],
)
def test_a_checkpoint_that_is_not_this_models(tmp_path, change, said) -> None:
    state = weights()
    change(state)
    with pytest.raises(ValueError, match=said):
        unisonde.load(write(tmp_path / "model", state))


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_pickle_with_code_in_it(tmp_path, capsys) -> None:
    folder = write(tmp_path / "model", weights())
    torch.save({"fusion_proj.1.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than plain weights"):
        unisonde.load(folder)
    assert "never run" not in capsys.readouterr().out


def test_without_an_autoencoder(tmp_path) -> None:
    folder = write(tmp_path / "model", weights())
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"the autoencoder of .* is neither in"):
        unisonde.load(folder)


def test_the_tokenizer_of_qwen_gets_the_tokens_of_showo2(monkeypatch, tmp_path) -> None:
    """The published repositories hold none: it is Qwen2.5's, with four tokens more."""
    asked = []

    def qwen(path: str):
        asked.append(path)
        return byte_tokenizer([t for t in SPECIAL_TOKENS if t != PAD])

    monkeypatch.setattr(showo2, "load_tokenizer", qwen)
    (tmp_path / "config.json").write_text("{}")
    tokenizer = showo2.tokenizer_of(str(tmp_path), Showo2Config())
    assert asked == ["Qwen/Qwen2.5-1.5B-Instruct"]
    first = tokenizer.convert_tokens_to_ids(PAD)
    assert (
        tokenizer.convert_tokens_to_ids([*ADDED_TOKENS])
        == [first + 1, first + 2, first + 3]
        == list(range(first + 1, len(tokenizer)))
    )
    assert tokenizer.pad_token == PAD
