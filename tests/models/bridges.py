"""Tiny random bridged models as folders in the published layout, and items for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from unisonde.data.item import Item
from unisonde.data.sound import RATE, Sound
from unisonde.models import llava, prismatic, qwen2_audio, ultravox
from unisonde.models.bridged import Bridged

TEXT = tiny.GROUPED | {"max_position_embeddings": 512, "model_type": "llama"}
MELS = 16
WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": MELS,
    "max_source_positions": 50,  # one second
}
LLAMA_MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA_CHAT = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def sound(seconds: float, seed: int = 0, rate: int = RATE) -> Sound:
    """A tone whose pitch drifts, with a little noise."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.02, len(time))
    return Sound((0.3 * np.sin(2 * np.pi * (220 + 40 * seed + 90 * time) * time) + noise).astype(np.float32), rate)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors; norms near one, biases near zero, large enough that every part changes the outcome."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) * 0.15 for name, shape in shapes.items()}
    return {name: 1 + t if t.ndim == 1 and name.endswith(("weight", "gamma")) else t for name, t in made.items()}


def shapes_of(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def llm(seed: int = 0) -> Any:
    """A tiny Llama."""
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    network.load_state_dict(drawn(shapes_of(network), seed))
    return network.eval()


# -------------------------------------------------------------------------------------------------------------- writing folders


def write_ultravox(folder: Path, middle: bool = True, inside: bool = False, old: bool = False) -> dict[str, Tensor]:
    """The folder of an Ultravox; its checkpoint.

    Args:
        middle: whether the second norm stands before the second map.
        inside: whether the checkpoint holds the decoder.
        old: whether the encoder is that of a Whisper published apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = ultravox.UltravoxConfig.from_dict({"hidden_size": 24, "stack_factor": 8, "projector_ln_mid": middle}, WHISPER, TEXT)
    state = drawn(shapes_of(ultravox.UltravoxNetwork(config)), 1)
    decoder = {k: t for k, t in state.items() if k.startswith("language_model.")}
    tower = {k: t for k, t in state.items() if k.startswith("audio_tower.")}
    raw: dict[str, Any] = {"model_type": "ultravox", "hidden_size": 24, "stack_factor": 8, "projector_act": "swiglu"}
    raw |= {"projector_ln_mid": middle, "norm_init": 0.4, "audio_latency_block_size": None, "torch_dtype": "bfloat16"}
    raw |= {
        "audio_model_id": "openai/whisper-tiny" if old else None,
        "audio_config": None if old else WHISPER | {"model_type": "whisper"},
    }
    raw |= {"auto_map": {"AutoConfig": "ultravox_config.UltravoxConfig", "AutoModel": "ultravox_model.UltravoxModel"}}
    raw |= {"custom_pipelines": {"ultravox-pipeline": {"impl": "ultravox_pipeline.UltravoxPipeline", "pt": ["AutoModel"]}}}
    raw |= {"text_model_id": None if inside else "meta-llama/Llama-3.1-8B-Instruct", "text_config": TEXT if inside else None}
    (folder / "config.json").write_text(json.dumps(raw))
    apart = ({} if inside else decoder) | (tower if old else {})
    save_file({k: t for k, t in state.items() if k not in apart}, folder / "model.safetensors")
    if not inside:
        (folder / "llm").mkdir(exist_ok=True)
        (folder / "llm" / "config.json").write_text(json.dumps(TEXT))
        save_file({k.removeprefix("language_model."): t for k, t in decoder.items()}, folder / "llm" / "model.safetensors")
    if old:
        whisper = {k.replace("audio_tower.", "model.encoder."): t for k, t in tower.items()}
        whisper |= {"model.decoder.layer_norm.weight": torch.ones(16), "proj_out.weight": torch.ones(4, 16)}
        (folder / "whisper").mkdir(exist_ok=True)
        (folder / "whisper" / "config.json").write_text(json.dumps(WHISPER | {"model_type": "whisper"}))
        save_file(whisper, folder / "whisper" / "model.safetensors")
    tiny.byte_tokenizer(LLAMA_MARKS, LLAMA_CHAT).save_pretrained(folder)
    return state


def write_qwen2_audio(folder: Path) -> Any:
    """The folder of a Qwen2-Audio; the network of `transformers` that it was written from."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.byte_tokenizer(["<|endoftext|>", *qwen2_audio.MARKS])
    audio = WHISPER | {"model_type": "qwen2_audio_encoder", "activation_function": "gelu", "scale_embedding": False}
    raw = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_config": audio,
        "text_config": TEXT | {"model_type": "qwen2", "rope_theta": 10000, "torch_dtype": "bfloat16", "use_mrope": False},
        "audio_token_index": tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        "ignore_index": -100,
        "vocab_size": 320,
    }
    network = transformers.Qwen2AudioForConditionalGeneration(transformers.Qwen2AudioConfig(**raw)).float()
    network.load_state_dict(drawn(shapes_of(network), 2))
    save_file({as_published(k): t.clone() for k, t in network.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    transformers.WhisperFeatureExtractor(feature_size=MELS, chunk_length=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return network.eval()


def write_llava(folder: Path) -> Any:
    """The folder of a LLaVA; the network of `transformers` that it was written from."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.byte_tokenizer(["<image>", "<pad>"], bos=True)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    raw = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": TEXT | {"torch_dtype": "float16"},
        "vision_config": vision | {"image_size": 16, "patch_size": 4, "model_type": "clip_vision_model", "projection_dim": 8},
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
    }
    network = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**raw)).float()
    network.load_state_dict(drawn(shapes_of(network), 3))
    save_file({as_published(k): t.clone() for k, t in network.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return network.eval()


def as_published(key: str) -> str:
    """The name on the hub of a weight of LLaVA or Qwen2-Audio, from that of `transformers` 5."""
    for new, old in (
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ):
        if key.startswith(new):
            return old + key.removeprefix(new)
    return key


def tower(kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "hub_id": "timm/none",
        "width": 32,
        "layers": 3,
        "heads": 4,
        "ffn": 64 if kind == "dinov2" else 40,
        "image_size": 16,
        "patch_size": 4,
        "mean": [0.485, 0.456, 0.406] if kind == "dinov2" else [0.5, 0.5, 0.5],
        "std": [0.229, 0.224, 0.225] if kind == "dinov2" else [0.5, 0.5, 0.5],
    }


def timm_shapes(
    kind: str, width: int, layers: int, ffn: int, patch: int, positions: int, head: bool = True
) -> dict[str, tuple[int, ...]]:
    """The weights of an encoder under the names of `timm`."""
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, positions, width)}
    if kind == "dinov2":
        shapes |= {"cls_token": (1, 1, width), "reg_token": (1, 4, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for k in range(layers):
        block = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm2": (width,)}
        block |= {"mlp.fc1": (ffn, width), "mlp.fc2": (width, ffn)}
        for name, shape in block.items():
            shapes |= {f"blocks.{k}.{name}.weight": shape, f"blocks.{k}.{name}.bias": shape[:1]}
        if kind == "dinov2":
            shapes |= {f"blocks.{k}.ls1.gamma": (width,), f"blocks.{k}.ls2.gamma": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    if kind == "siglip" and head:
        shapes |= {"attn_pool.latent": (1, 1, width), "attn_pool.q.weight": (width, width), "attn_pool.mlp.fc1.bias": (ffn,)}
    return shapes


def write_prismatic(folder: Path, kind: str, positions: int = 16) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The folder of a Prismatic; the encoder's weights under the names of `timm`, and the checkpoint's."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "vision").mkdir(exist_ok=True)
    sizes = tower(kind)
    vision = drawn(timm_shapes(kind, 32, 3, sizes["ffn"], 4, positions), 4)
    save_file(vision, folder / "vision" / "model.safetensors")
    maps = {"projector.0.weight": (32, 32), "projector.0.bias": (32,), "projector.2.weight": (32, 32), "projector.2.bias": (32,)}
    held = {"projector": drawn(maps, 5), "llm_backbone": {f"llm.{k}": t for k, t in llm(6).state_dict().items()}}
    torch.save({"model": held}, folder / "checkpoints" / "latest-checkpoint.pt")
    model = {"model_id": "tiny", "vision_backbone_id": "tiny", "llm_backbone_id": "tiny", "arch_specifier": "no-align+gelu-mlp"}
    model |= {"image_resize_strategy": "letterbox", "llm_max_length": 512}
    (folder / "config.json").write_text(json.dumps({"model": model | {"vision": sizes, "llm": TEXT}, "seed": 7}))
    tiny.byte_tokenizer(["<PAD>"], bos=True).save_pretrained(folder)
    return vision, held


WRITERS: dict[str, tuple[Callable[[Path], Any], Callable[..., Bridged]]] = {
    "ultravox": (write_ultravox, ultravox.load),
    "qwen2-audio": (write_qwen2_audio, qwen2_audio.load),
    "llava": (write_llava, llava.load),
    "prismatic-dinov2": (lambda folder: write_prismatic(folder, "dinov2"), prismatic.load),
    "prismatic-siglip": (lambda folder: write_prismatic(folder, "siglip"), prismatic.load),
}


@cache
def built(kind: str, where: Path) -> tuple[Bridged, Any]:
    """A loaded model, and what its folder was written from."""
    write, load = WRITERS[kind]
    folder = where / "bridges" / kind
    made = write(folder)
    return load(str(folder), f"tiny/{kind}", device="cpu"), made


def items_for(model: Bridged) -> list[Item]:
    """Two items with sound or picture, of different lengths, and one of text between them."""
    text = Item("words", "", "two blue squares")
    if model.takes == "audio":
        return [Item("short", "", "who speaks?", audio=sound(0.42)), text, Item("long", "", "", audio=sound(0.97, 1))]
    return [Item("wide", "", "what is it?", picture(24, 15)), text, Item("tall", "", "", picture(9, 20, 1))]
