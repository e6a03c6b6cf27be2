"""Loading Show-o from folders in the hub's layout, written here with official key names; and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from unisonde.models.parts.magvit2 import Magvit2, Magvit2Config
from unisonde.models.parts.showo_network import PhiSizes, Showo, ShowoConfig
from unisonde.models.showo import ShowO, load
from unisonde.train.showo import export, new_twin

WORDS = len(byte_tokenizer())
LLM = PhiSizes(32, 64, 2, 4, max_position_embeddings=256)
PICTURE = Image.new("RGB", (30, 20), "red")


def written(folder: Path, clip: bool = False, form: str = "pytorch_model.safetensors", apart: bool = False) -> Path:
    """A tiny Show-o as published: the parts that it names inside its folder, or beside it."""
    torch.manual_seed(0)
    config = ShowoConfig(clip, WORDS + 10 + 16 + 1, WORDS, 16, 4, llm=LLM, clip_width=1024 if not clip else 32)
    here = folder / "show-o"
    parts = folder if apart else here
    here.mkdir(parents=True)
    raw = config.to_dict() | {"llm_model_path": "microsoft/phi-1_5", "load_from_showo": True, "_diffusers_version": "0.30.1"}
    del raw["llm"], raw["clip_width"], raw["max_seq_length"]  # the published file names none of these
    if clip:
        raw["clip_width"] = 32
    (here / "config.json").write_text(json.dumps(raw))
    save(Showo(config).state_dict(), here / form)
    sizes = Magvit2Config(32, (1, 1), (1, 1), (1, 1), (1, 1), bits=4)
    (parts / "magvitv2").mkdir()
    (parts / "magvitv2" / "config.json").write_text(json.dumps(sizes.to_dict()))
    save(Magvit2(sizes).state_dict(), parts / "magvitv2" / form)
    byte_tokenizer().save_pretrained(parts / "phi-1_5")
    phi = {"model_type": "phi", "vocab_size": 51200, "qk_layernorm": False} | LLM.__dict__
    (parts / "phi-1_5" / "config.json").write_text(json.dumps(phi))
    if clip:
        vision = CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
        )
        CLIPVisionModel(vision).save_pretrained(parts / "clip-vit-large-patch14-336")
        processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        processor.save_pretrained(parts / "clip-vit-large-patch14-336")
    return here


def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file({k: v.contiguous() for k, v in tensors.items()}, file)


def responses(model: ShowO) -> tuple:
    drawn = model.generate("a cat", "image", seed=1, steps=3)
    return model.generate("what is it?", image=PICTURE, tokens=5), model.generate("a cat", tokens=5), drawn.tobytes()


@pytest.mark.parametrize("form", ["pytorch_model.safetensors", "pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_folder_in_the_published_layout(tmp_path, form, apart) -> None:
    here = written(tmp_path, form=form, apart=apart)
    model = load(str(here), "tiny")
    assert model.config.llm == LLM and model.side == 4 and model.network.dtype == torch.float32
    assert model.source == here and model.defaults("image").to_dict() == {
        "tokens": None, "temperature": 1.0, "guidance": 6.0, "steps": 50
    }  # fmt: skip
    assert responses(model) == responses(load(str(here), "tiny"))


def test_the_variant_with_clip(tmp_path) -> None:
    model = load(str(written(tmp_path, clip=True)), "tiny")
    assert model.clip.features == 4
    assert isinstance(model.generate("what?", image=PICTURE, tokens=4), str)


def test_half_precision_keeps_the_image_tokenizer_whole(tmp_path) -> None:
    model = load(str(written(tmp_path)), "tiny", dtype=torch.bfloat16)
    assert model.network.dtype == torch.bfloat16
    assert {p.dtype for p in model.image_codes.parameters()} == {torch.float32}
    assert isinstance(model.generate("what?", image=PICTURE, tokens=4), str)
    assert model.generate("a cat", "image", steps=2).size == (4, 4)


def test_a_variant_without_clip_ignores_a_projector(tmp_path) -> None:
    here = written(tmp_path)
    change(here, lambda t: t | {"mm_projector.0.weight": torch.zeros(2, 2)})
    load(str(here), "tiny")


def change(folder: Path, edit, file: str = "pytorch_model.safetensors") -> None:
    save_file(edit(load_file(folder / file)), folder / file)


BIAS = "showo.lm_head.bias"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: {k: v for k, v in t.items() if k != BIAS}, f"lacks {BIAS}"),
        (lambda t: t | {"showo.surplus": torch.zeros(1)}, "has unknown showo.surplus"),
        (lambda t: t | {BIAS: torch.zeros(3)}, rf"has in another shape {BIAS} \(3,\) instead of"),
    ],
)
def test_weights_that_are_not_this_models(tmp_path, edit, said) -> None:
    here = written(tmp_path)
    change(here, edit)
    with pytest.raises(ValueError, match=f"the checkpoint of tiny {said}"):
        load(str(here), "tiny")


def test_an_image_tokenizer_that_is_not_whole(tmp_path) -> None:
    here = written(tmp_path)
    change(here / "magvitv2", lambda t: {k: v for k, v in t.items() if k != "decoder.conv_out.bias"})
    with pytest.raises(ValueError, match=r"magvitv2 lacks decoder.conv_out.bias"):
        load(str(here), "tiny")


class Code:
    def __reduce__(self):
        return print, ("code has run",)


def test_a_pickle_with_code_is_not_run(tmp_path, capsys) -> None:
    here = written(tmp_path)
    (here / "pytorch_model.safetensors").unlink()
    (here / "pytorch_model.bin").write_bytes(pickle.dumps({BIAS: Code()}, protocol=2))
    with pytest.raises(ValueError, match=r"more than plain weights|no whole checkpoint"):
        load(str(here), "tiny")
    torch.save({BIAS: Code()}, here / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than plain weights"):
        load(str(here), "tiny")
    assert "code has run" not in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path) -> None:
    here = written(tmp_path)
    raw = json.loads((here / "config.json").read_text())
    (here / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "num_vq_tokens"}))
    with pytest.raises(ValueError, match=r"lacks num_vq_tokens: it is not Show-o's"):
        load(str(here), "tiny")
    (here / "config.json").write_text(json.dumps(raw))
    (here / "magvitv2" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json of 'showlab/magvitv2'"):
        load(str(here), "tiny")
    (here / "pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights: none of pytorch_model.safetensors"):
        load(str(here), "tiny")


def test_a_twin_comes_back_from_its_folder(tmp_path, monkeypatch) -> None:
    def no_hub(*args, **kwargs):
        raise AssertionError("all that a twin needs is in its folder")

    monkeypatch.setattr("unisonde.models.parts.pretrained.cached_file", no_hub)
    model = new_twin(0)
    export(model, tmp_path / "twin", {"seed": 0})
    again = load(str(tmp_path / "twin"), "twin/showo")
    assert again.config == model.config and again.image_codes.config == model.image_codes.config
    assert again.defaults("image") == model.defaults("image") and again.defaults("text") == model.defaults("text")
    for ours, theirs in zip(model.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(ours.half().float(), theirs)
    assert again.generate("a red ring at the top left", "image", steps=2).size == (32, 32)
    with pytest.raises(ValueError, match="already holds files"):
        export(model, tmp_path / "twin")
