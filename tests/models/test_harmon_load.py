"""Loading Harmon from folders in the published layouts, written here with official key names; its autoencoder; what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import byte_tokenizer
from torch import Tensor

from unisonde.models import harmon
from unisonde.models.base import Generation
from unisonde.models.harmon import IMAGE, SPECIAL_TOKENS, Harmon, load, locate
from unisonde.models.parts import harmon_network, kl16
from unisonde.models.parts.harmon_network import HarmonConfig, HarmonNetwork, QwenSizes
from unisonde.models.parts.mar import MarSizes
from unisonde.train.harmon import export, new_twin

CONFIG = HarmonConfig(
    QwenSizes(32, 48, 2, 4, 2, 300, 512),
    MarSizes(8, 2, 1, 24, 2, 4, 24, 2, 4, 2.0, 4, buffer_size=3, diffloss_d=1, diffloss_w=32, num_sampling_steps="4"),
    grid=4,
)
VAE = {
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [32, 64],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.2325,
}
"""A KL-16 of two levels, with attention where the published one has it."""

NAMES = (
    (r"encoder\.down_blocks\.(\d+)", r"encoder.down.\1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"resnets", "block"),
    (r"attentions", "attn"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])", r"\1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"(down|up)samplers\.0\.conv", r"\1sample.conv"),
)
"""From names of `diffusers` to the original ones: the way back of the table that is tested."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published sizes are these small ones, and nothing is had from the hub."""
    monkeypatch.setattr(kl16, "PUBLISHED", VAE)
    monkeypatch.setattr(harmon_network, "SIZES", {"tiny": CONFIG})
    monkeypatch.setattr(harmon, "LANGUAGE_MODELS", {32: "Qwen/Qwen2.5-Tiny-Instruct"})


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the official names, the tied head and the unused classes too."""
    generator = torch.Generator().manual_seed(seed)
    state = HarmonNetwork(CONFIG).state_dict()
    made = {key: torch.randn(tensor.shape, generator=generator) * 0.1 for key, tensor in state.items()}
    made["llm.lm_head.weight"] = made["llm.model.embed_tokens.weight"]
    made["mar.class_emb.weight"] = torch.zeros(1000, 24)
    return made


def vae_weights(seed: int = 1) -> dict[str, Tensor]:
    """Random tensors of the autoencoder under their original names."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for key, tensor in kl16.build().state_dict().items():
        value = torch.randn(tensor.shape, generator=generator) * 0.1 + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
        matrix = "attentions" in key and value.ndim == 2
        name = re.sub(r"decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{1 - int(m[1])}", key)
        for pattern, to in NAMES:
            name = re.sub(pattern, to, name)
        made[name] = value[..., None, None] if matrix else value
    return made


def hub_layout(folder: Path, inside: bool = True, form: str = "model.safetensors") -> Path:
    """As `wusize/Harmon-1_5B`: a configuration that says little, all weights in one place, a tokenizer."""
    folder.mkdir(parents=True)
    raw = {"model_type": "harmon", "architectures": ["HarmonModel"], "auto_map": {"AutoModel": "modeling_harmon.HarmonModel"}}
    (folder / "config.json").write_text(json.dumps(raw | {"llm": {}, "mar": {}}))
    state = weights() | ({f"vae.{k}": t for k, t in vae_weights().items()} if inside else {})
    save(state, folder, form)
    byte_tokenizer(SPECIAL_TOKENS).save_pretrained(folder)
    return folder


def save(state: dict[str, Tensor], folder: Path, form: str) -> None:
    if form.endswith(".safetensors"):
        save_file({key: tensor.clone() for key, tensor in state.items()}, folder / form)
    elif form == "shards":
        names, index = sorted(state), {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"model-0000{number}-of-00002.safetensors"
            save_file({name: state[name].clone() for name in part}, folder / file)
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        torch.save(state, folder / form)


def original_layout(folder: Path, *files: str) -> Path:
    """As `wusize/harmon`: `.pth` without the autoencoder, `kl16.ckpt`; and the tokenizer beside, as it is published."""
    folder.mkdir(parents=True)
    for seed, file in enumerate(files):
        torch.save(weights(seed), folder / file)
    torch.save({"model": vae_weights() | {"loss.logvar": torch.zeros(())}}, folder / "kl16.ckpt")
    qwen = folder.parent / "Qwen2.5-Tiny-Instruct"
    byte_tokenizer([t for t in SPECIAL_TOKENS if t != IMAGE]).save_pretrained(qwen)
    (qwen / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return folder


def check(model: Harmon, seed: int = 0) -> None:
    """It holds these very weights, and works."""
    theirs = weights(seed)
    for key, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, theirs[key]), key
    llm = model.network.llm
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    assert not any(p.is_meta for network in model.networks for p in (*network.parameters(), *network.buffers()))
    ours, original = model.vae.state_dict(), vae_weights()
    assert torch.equal(ours["decoder.up_blocks.0.resnets.2.conv1.weight"], original["decoder.up.1.block.2.conv1.weight"])
    assert torch.equal(
        ours["encoder.down_blocks.1.attentions.1.to_k.weight"], original["encoder.down.1.attn.1.k.weight"][..., 0, 0]
    )
    assert model.generate("a red ring", "image", steps=3, seed=1).size == (8, 8)
    assert isinstance(model.generate("a red ring", tokens=3), str)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin", "shards"])
@pytest.mark.parametrize("inside", [True, False])
def test_the_layout_of_the_hub(tmp_path, form, inside) -> None:
    """With the autoencoder among the weights, or beside them."""
    folder = hub_layout(tmp_path / "model", inside, form)
    if not inside:
        torch.save({"model": vae_weights()}, folder / "kl16.ckpt")
    model = load(str(folder), "tiny")
    check(model)
    assert model.source == folder and model.config == CONFIG
    assert model.defaults("image") == Generation(temperature=1.0, guidance=3.0, steps=64)
    assert model.defaults("text") == Generation(tokens=1024, temperature=0.0)


def test_the_original_layout(tmp_path) -> None:
    folder = original_layout(tmp_path / "harmon", "harmon_1.5b.pth")
    for path in (folder, folder / "harmon_1.5b.pth"):
        model = load(str(path), "tiny")
        check(model)
    tokenizer = model.tokenizer  # of Qwen2.5, with one more
    assert tokenizer.convert_tokens_to_ids(IMAGE) == len(tokenizer) - 1 and tokenizer.decode([len(tokenizer) - 1]) == IMAGE


def test_one_of_several_models_must_be_named(tmp_path) -> None:
    folder = original_layout(tmp_path / "harmon", "harmon_1.5b.pth", "harmon_1.5b-o.pth")
    with pytest.raises(ValueError, match=r"holds several models; name one of them: .*harmon_1.5b-o.pth, .*harmon_1.5b.pth"):
        load(str(folder), "tiny")
    check(load(str(folder / "harmon_1.5b-o.pth"), "tiny"), seed=1)


def test_other_weights_of_the_same_network(tmp_path) -> None:
    """RecA's repository holds weights alone, under a name of its own; the autoencoder and the tokenizer are the published ones."""
    folder = original_layout(tmp_path / "reca")
    torch.save({"state_dict": weights(7)}, folder / "Harmon-1.5B-RecA.pth")
    check(load(str(folder), "tiny"), seed=7)
    (folder / "Harmon-1.5B-RecA.pth").unlink()
    save(weights(8), folder, "reca.safetensors")
    check(load(str(folder), "tiny"), seed=8)


def test_files_of_the_hub_are_named_with_their_repository(monkeypatch, tmp_path) -> None:
    asked = []

    def reach(path: str, *files: str) -> None:
        asked.append((path, files))

    monkeypatch.setattr("unisonde.models.parts.checkpoint.reach", reach)
    monkeypatch.setattr(harmon, "reach", reach)
    with pytest.raises(ValueError, match=r"none of harmon_1.5b.pth of 'wusize/harmon'"):
        locate("wusize/harmon/harmon_1.5b.pth")
    assert asked[0] == ("wusize/harmon", ("harmon_1.5b.pth",))
    monkeypatch.setattr(
        harmon.HfApi, "list_repo_files", lambda self, path: ["kl16.ckpt", "harmon_0.5b.pth", "harmon_1.5b.pth", "x/y.pth"]
    )
    with pytest.raises(ValueError, match=r"name one of them: wusize/harmon/harmon_0.5b.pth, wusize/harmon/harmon_1.5b.pth$"):
        locate("wusize/harmon")


def test_number_formats(tmp_path) -> None:
    model = load(str(hub_layout(tmp_path / "model")), "tiny", dtype=torch.bfloat16)
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}  # always
    assert model.network.llm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.generate("a red ring", "image", steps=3).size == (8, 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("proj_in.2.bias"), r"the checkpoint of tiny lacks proj_in.2.bias"),
        (lambda s: s.pop("vae.quant_conv.bias"), r"the checkpoint of tiny \(autoencoder\) lacks quant_conv.bias"),
        (lambda s: s.update({"mar.surplus": torch.zeros(1)}), "has unknown mar.surplus"),
        (lambda s: s.update({"vae.surplus": torch.zeros(1)}), "has unknown surplus"),
        (lambda s: s.update({"mar.z_proj.bias": torch.zeros(3)}), r"in another shape mar.z_proj.bias \(3,\) instead of \(24,\)"),
        (lambda s: s.clear(), "holds no llm.model.norm.weight"),
        (lambda s: s.update({k: torch.zeros(48) for k in s if k.endswith("norm.weight")}), "the width 48 is of no known Harmon"),
    ],
)
def test_weights_that_are_not_this_models(tmp_path, change, said) -> None:
    folder = hub_layout(tmp_path / "model")
    state = weights() | {f"vae.{k}": t for k, t in vae_weights().items()}
    change(state)
    save(state, folder, "model.safetensors")
    with pytest.raises(ValueError, match=said):
        load(str(folder), "tiny")


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.parametrize("file", ["harmon_1.5b.pth", "kl16.ckpt"])
def test_a_pickle_with_code_in_it(tmp_path, capsys, file) -> None:
    folder = original_layout(tmp_path / "harmon", "harmon_1.5b.pth")
    torch.save({"model": {"proj_in.2.bias": Evil()}}, folder / file)
    with pytest.raises(ValueError, match="more than plain weights"):
        load(str(folder / "harmon_1.5b.pth"), "tiny")
    assert "never run" not in capsys.readouterr().out


def test_files_that_are_missing_or_cut_short(tmp_path) -> None:
    folder = hub_layout(tmp_path / "model", inside=False, form="shards")
    with pytest.raises(ValueError, match=r"the autoencoder of tiny is neither among its weights nor in .*put kl16.ckpt of wusize"):
        load(str(folder), "tiny")
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"00002-of-00002.safetensors is no whole safetensors file"):
        load(str(folder), "tiny")
    shard.unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002.safetensors"):
        load(str(folder), "tiny")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no weights: none of model.safetensors, pytorch_model.safetensors"):
        load(str(tmp_path / "empty"), "tiny")
    original = original_layout(tmp_path / "harmon", "harmon_1.5b.pth")
    (original / "kl16.ckpt").write_bytes((original / "kl16.ckpt").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"kl16.ckpt is no whole checkpoint"):
        load(str(original), "tiny")


def test_a_twin_comes_back_from_its_folder(tmp_path, monkeypatch) -> None:
    def no_hub(*args, **kwargs):
        raise AssertionError("all that a twin needs is in its folder")

    monkeypatch.setattr("unisonde.models.parts.pretrained.cached_file", no_hub)
    model = new_twin(0)
    export(model, tmp_path / "twin", {"seed": 0})
    again = load(str(tmp_path / "twin"), "twin/harmon")
    assert again.config == model.config
    assert again.defaults("image") == model.defaults("image") and again.defaults("text") == model.defaults("text")
    for network, other in zip(model.networks, again.networks, strict=True):
        for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
            assert torch.equal(ours.half().float(), theirs)
    assert again.vae.config.scaling_factor == model.vae.config.scaling_factor
    assert again.generate("a red ring at the top left", "image", steps=2).size == (32, 32)
    with pytest.raises(ValueError, match="already holds files"):
        export(model, tmp_path / "twin")


# ------------------------------------------------------------------------------------------------------------------ autoencoder


def by_hand(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The mode that the encoder of latent diffusion gives, from the original tensors and nothing of ours."""

    def conv(name: str, x: Tensor, **how) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **how)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def block(name: str, x: Tensor) -> Tensor:
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)), padding=1)
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)), padding=1)
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)

    def attention(name: str, x: Tensor) -> Tensor:
        q, k, v = (conv(f"{name}.{part}", norm(f"{name}.norm", x)).flatten(2) for part in "qkv")
        share = (torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5).softmax(-1)
        return x + conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", share, v).view(x.shape))

    x = conv("encoder.conv_in", x, padding=1)
    for level in range(2):
        for number in range(2):
            x = block(f"encoder.down.{level}.block.{number}", x)
            if level == 1:
                x = attention(f"encoder.down.{level}.attn.{number}", x)
        if level == 0:
            x = conv("encoder.down.0.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = block("encoder.mid.block_2", attention("encoder.mid.attn_1", block("encoder.mid.block_1", x)))
    x = conv("encoder.conv_out", F.silu(norm("encoder.norm_out", x)), padding=1)
    return conv("quant_conv", x)[:, :4]


@torch.inference_mode()
def test_attention_at_the_last_level_of_the_encoder() -> None:
    """The recorded outputs of the official code are of a variant without it."""
    w = vae_weights()
    vae = kl16.filled(w.items(), "cpu", "tiny")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(kl16.encode(vae, pixels) / 0.2325, by_hand(w, pixels), atol=1e-4, rtol=1e-4)
    w["encoder.down.1.attn.0.proj_out.weight"] *= -1
    assert not torch.allclose(kl16.encode(vae, pixels) / 0.2325, by_hand(w, pixels), atol=1e-3)
    assert kl16.decode(vae, torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16) and kl16.stride(vae) == 2


def test_sizes_are_told_by_the_weights(tmp_path, monkeypatch) -> None:
    other = replace(CONFIG, llm=replace(CONFIG.llm, hidden_size=64))
    monkeypatch.setattr(harmon_network, "SIZES", {"other": other, "tiny": CONFIG})
    assert load(str(hub_layout(tmp_path / "model")), "tiny").config == CONFIG
