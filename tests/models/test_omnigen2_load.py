"""OmniGen2 from a folder in the published layout, that of diffusers, written here: small and random, with the official key names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import byte_tokenizer
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from unisonde.data.tabletop import question_item, text_item
from unisonde.models.base import Generation
from unisonde.models.omnigen2 import NEGATIVE, SYSTEM, Drawing, load
from unisonde.models.parts.omnigen2_network import OmniGen2Config, OmniGen2Transformer
from unisonde.train.omnigen2 import SPECIAL_TOKENS, export, new_twin, new_vae, twin_mllm

TRANSFORMER = OmniGen2Config(
    patch_size=2,
    in_channels=3,
    hidden_size=36,
    num_layers=2,
    num_refiner_layers=1,
    num_attention_heads=3,
    num_kv_heads=1,
    multiple_of=8,
    axes_dim_rope=(4, 4, 4),
    text_feat_dim=32,
)
DREW = Generation(guidance=2.0, steps=2)
WROTE = Generation(tokens=4, temperature=0.0)

FILES: dict[str, dict] = {
    "model_index.json": {
        "_class_name": "OmniGen2Pipeline",
        "_diffusers_version": "0.33.1",
        "mllm": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "processor": ["transformers", "Qwen2_5_VLProcessor"],
        "scheduler": ["scheduling_flow_match_euler_discrete_time_shifting", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["transformer_omnigen2", "OmniGen2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000},
    "mllm/generation_config.json": {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05, "eos_token_id": [258]},
    "processor/preprocessor_config.json": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "min_pixels": 1024,
        "max_pixels": 4096,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
}


def mllm_config(tied: bool = True) -> Qwen2_5_VLConfig:
    small = twin_mllm(byte_tokenizer(SPECIAL_TOKENS)).to_dict()
    small["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300}
    del small["text_config"]["layer_types"]  # follow from their number
    small["text_config"]["rope_parameters"] |= {"mrope_section": [1, 1, 2]}
    small["vision_config"] |= {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    return Qwen2_5_VLConfig.from_dict(small | {"tie_word_embeddings": tied})


def weights(tied: bool = True) -> dict[str, dict[str, Tensor]]:
    """Random tensors of each part under its published names; the language model's are those of transformers 4.51."""
    torch.manual_seed(0)
    parts = {
        "mllm": Qwen2_5_VLForConditionalGeneration(mllm_config(tied)).state_dict(),
        "transformer": OmniGen2Transformer(TRANSFORMER).state_dict(),
        "vae": new_vae(0).state_dict(),
    }
    made = {part: {k: torch.randn(v.shape) * 0.1 for k, v in held.items()} for part, held in parts.items()}
    if tied:
        del made["mllm"]["lm_head.weight"]
    made["mllm"] = {re.sub(r"^model\.(visual|language_model)", before, key): v for key, v in made["mllm"].items()}
    return made


def before(match: re.Match[str]) -> str:
    return {"visual": "visual", "language_model": "model"}[match[1]]


def flat(config: Qwen2_5_VLConfig) -> dict:
    """A configuration as it was written before version 4.52: the text's settings stand with the rest."""
    raw = config.to_dict()
    text = {key: value for key, value in raw.pop("text_config").items() if key != "layer_types"}
    rope = text.pop("rope_parameters")
    scaling = {"rope_type": "default", "type": "default", "mrope_section": rope["mrope_section"]}
    return {**text, **raw, "model_type": "qwen2_5_vl", "rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def write(folder: Path, made: dict[str, dict[str, Tensor]], tied: bool = True, shards: bool = False) -> Path:
    for part in ("mllm", "transformer", "vae", "scheduler", "processor"):
        (folder / part).mkdir(parents=True)
    for part, tensors in made.items():
        stem = "model" if part == "mllm" else "diffusion_pytorch_model"
        if not shards or part == "vae":
            save_file(tensors, folder / part / f"{stem}.safetensors")
            continue
        index, names = {}, sorted(tensors)
        for number, held in enumerate((names[::2], names[1::2]), 1):
            file = f"{stem}-0000{number}-of-00002.safetensors"
            save_file({name: tensors[name] for name in held}, folder / part / file)
            index |= dict.fromkeys(held, file)
        (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    raw = TRANSFORMER.to_dict() | {"axes_lens": [1024, 1664, 1664], "ffn_dim_multiplier": None, "out_channels": None}
    files = FILES | {"mllm/config.json": flat(mllm_config(tied)), "transformer/config.json": raw}
    for file, held in files.items():
        (folder / file).write_text(json.dumps(held))
    new_vae(0).save_config(folder / "vae")
    byte_tokenizer(SPECIAL_TOKENS).save_pretrained(folder / "processor")
    return folder


def opened(folder: Path, **options):
    model = load(str(folder), "tiny", **options)
    model.drawing = Drawing(side=16, shift=model.drawing.shift)
    return model


@pytest.mark.parametrize("shards", [False, True])
def test_the_published_layout(tmp_path, shards) -> None:
    made = weights()
    model = opened(write(tmp_path / "model", made, shards=shards))
    assert (model.family, model.system, model.drawing.negative) == ("omnigen2", SYSTEM, NEGATIVE)
    assert model.defaults("image") == Generation(guidance=4.0, steps=50)
    assert model.defaults("text") == Generation(tokens=256, temperature=1e-6)
    assert model.network.mllm.generation_config.repetition_penalty == 1.05 and 258 in model.ends
    assert model.source == tmp_path / "model" and model.pictures.size["longest_edge"] == 4096
    for key, tensor in model.network.transformer.state_dict().items():
        assert torch.equal(tensor, made["transformer"][key])
    language = model.network.mllm.model.language_model
    assert torch.equal(language.layers[1].mlp.up_proj.weight, made["mllm"]["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(model.network.mllm.model.visual.merger.ln_q.weight, made["mllm"]["visual.merger.ln_q.weight"])
    assert model.network.mllm.lm_head.weight is language.embed_tokens.weight
    assert not any(p.is_meta for network in model.networks for p in (*network.parameters(), *network.buffers()))
    [drawn] = model.respond([text_item("composition", "test", 3, 0, 1)], "image", DREW)
    assert drawn.image.size == (16, 16) and drawn.tokens == 64
    assert isinstance(model.respond([question_item("attribute", "test", 3, 0)], "text", WROTE)[0].text, str)


def test_names_of_later_versions_and_a_head_of_its_own(tmp_path) -> None:
    made = weights(tied=False)
    later = {"visual.": "model.visual.", "model.": "model.language_model."}
    theirs = {next((k.replace(a, b, 1) for a, b in later.items() if k.startswith(a)), k): v for k, v in made["mllm"].items()}
    model = opened(write(tmp_path / "model", made | {"mllm": theirs}, tied=False))
    assert torch.equal(model.network.mllm.lm_head.weight, made["mllm"]["lm_head.weight"])
    assert torch.equal(model.network.mllm.get_input_embeddings().weight, made["mllm"]["model.embed_tokens.weight"])


def test_number_formats(tmp_path) -> None:
    model = opened(write(tmp_path / "model", weights()), dtype=torch.bfloat16)
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}  # always
    assert model.network.mllm.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.respond([text_item("composition", "test", 3, 0, 1)], "image", DREW)[0].image.size == (16, 16)


def test_the_scheduler_says_whether_times_are_moved(tmp_path) -> None:
    folder = write(tmp_path / "model", weights())
    assert opened(folder).drawing.shift  # published
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(FILES["scheduler/scheduler_config.json"] | {"dynamic_time_shift": False}))
    assert not opened(folder).drawing.shift
    file.write_text(json.dumps({"_class_name": "DPMSolverMultistepScheduler"}))
    with pytest.raises(ValueError, match="tiny draws with a DPMSolverMultistepScheduler, where OmniGen2 has a FlowMatch"):
        opened(folder)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("transformer", lambda s: s.pop("x_embedder.bias"), r"tiny \(diffusion transformer\) lacks x_embedder.bias"),
        ("transformer", lambda s: s.update({"x": torch.zeros(1)}), r"\(diffusion transformer\) has unknown x"),
        ("transformer", lambda s: s.update({"x_embedder.bias": torch.zeros(3)}), r"in another shape x_embedder.bias \(3,\)"),
        ("mllm", lambda s: s.pop("model.norm.weight"), r"tiny \(language model\) lacks model.language_model.norm.weight"),
        ("mllm", lambda s: s.pop("model.embed_tokens.weight"), r"\(language model\) lacks .*embed_tokens.weight"),
        ("mllm", lambda s: s.update({"visual.extra": torch.zeros(1)}), r"\(language model\) has unknown visual.extra"),
        ("vae", lambda s: s.pop("decoder.conv_out.bias"), r"tiny \(autoencoder\) lacks decoder.conv_out.bias"),
    ],
)
def test_a_checkpoint_that_is_not_this_models(tmp_path, part: str, change: Callable[[dict], object], said: str) -> None:
    made = weights()
    change(made[part])
    with pytest.raises(ValueError, match=said):
        opened(write(tmp_path / "model", made))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model_index.json", "model_index.json of .* is not in that folder"),
        ("transformer/config.json", "transformer/config.json of .* is not in that folder"),
        ("mllm/config.json", "mllm/config.json of .* is not in that folder"),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json of .* is not in that folder"),
        ("processor/preprocessor_config.json", "processor/preprocessor_config.json of .* is not in that folder"),
        ("processor/tokenizer.json", "has no tokenizer: processor/tokenizer.json is not there"),
        ("vae/diffusion_pytorch_model.safetensors", "has no weights: none of vae/diffusion_pytorch_model.safetensors is there"),
        ("transformer/diffusion_pytorch_model-00002-of-00002.safetensors", "lacks diffusion_pytorch_model-00002-of-00002"),
        ("mllm/model-00001-of-00002.safetensors", "lacks model-00001-of-00002"),
    ],
)
def test_what_is_missing_is_named(tmp_path, file, said) -> None:
    folder = write(tmp_path / "model", weights(), shards=True)
    (folder / file).unlink()
    with pytest.raises(ValueError, match=said):
        opened(folder)


def test_a_shard_that_is_cut_short(tmp_path) -> None:
    folder = write(tmp_path / "model", weights(), shards=True)
    file = folder / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"00001-of-00002.safetensors is no whole safetensors file"):
        opened(folder)


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_pickle_with_code_in_it(tmp_path, capsys) -> None:
    folder = write(tmp_path / "model", weights())
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"x_embedder.bias": Evil()}, folder / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="more than plain weights"):
        opened(folder)
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "held", "said"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "tiny is a FluxPipeline, where OmniGen2 is an OmniGen2Pipeline"),
        ("mllm/config.json", {"model_type": "llama"}, "of type 'llama', where OmniGen2 has a qwen2_5_vl"),
        ("transformer/config.json", {"hidden_size": 36}, "lacks patch_size, .*; it is not OmniGen2's"),
    ],
)
def test_another_model(tmp_path, file, held, said) -> None:
    folder = write(tmp_path / "model", weights())
    (folder / file).write_text(json.dumps(held))
    with pytest.raises(ValueError, match=said):
        opened(folder)


def test_a_twin_comes_back(tmp_path) -> None:
    model = new_twin(0)
    for network in model.networks:  # to what a file of float16 holds; rotary frequencies are in no file
        for weight in network.parameters():
            weight.data = weight.data.half().float()
    export(model, tmp_path / "twin", {"note": "untrained"})
    again = load(str(tmp_path / "twin"), "twin/omnigen2")
    assert (again.system, again.drawing) == ("", model.drawing) and again.defaults("image") == model.defaults("image")
    items = [text_item("composition", "test", 3, 0, 1)], [question_item("attribute", "test", 3, 0)]
    for task, given in zip(("image", "text"), items, strict=True):
        one, two = (
            m.respond(given, task, m.settings(task, **({"steps": 2} if task == "image" else {"tokens": 4}))) for m in (model, again)
        )
        assert one[0].text == two[0].text
        assert one[0].image is None or one[0].image.tobytes() == two[0].image.tobytes()
    with pytest.raises(ValueError, match="already holds files"):
        export(model, tmp_path / "twin")
