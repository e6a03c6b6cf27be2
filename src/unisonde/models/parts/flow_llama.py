"""The network of JanusFlow: sizes, modules under their official names, and the velocity field that prompts make.

`JanusFlowNetwork` holds everything but the autoencoder. `Flow` is what a sampler needs of it: prompts are run once, then each noisy
latent and time gives a velocity. `branches` makes the masks and positions of both halves of guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRMSNorm

from unisonde.models.parts import siglip
from unisonde.models.parts.checkpoint import Keys
from unisonde.models.parts.sampling import guided
from unisonde.models.parts.text import pad
from unisonde.models.parts.uvit import ShallowUViTDecoder, ShallowUViTEncoder, UViTConfig
from unisonde.models.trace import Stack

TIME_SCALE = 1000.0
"""The U-ViT takes times from 0 (noise) to 1000 (picture)."""

TOWER = "vision_und_enc_model.vision_tower"
KEYS = Keys(siglip.renames(TOWER, "vision_und_enc_model"), siglip.ignored(TOWER))


# ---------------------------------------------------------------------------------------------------------------- configuration


LANGUAGE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
)
"""What is read of `language_config`; `transformers` knows the rest as the defaults of Llama."""


@dataclass(frozen=True)
class JanusFlowConfig:
    """Sizes of a JanusFlow: language model, vision encoder, U-ViT."""

    language: LlamaConfig
    vision: SiglipVisionConfig
    uvit: UViTConfig

    @property
    def side(self) -> int:
        """The side of a picture, read or drawn, in pixels."""
        return siglip.sides(self.vision)[0]

    @property
    def features(self) -> int:
        """The number of features of a picture that is read, without the begin slot."""
        picture, patch = siglip.sides(self.vision)
        return (picture // patch) ** 2

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> JanusFlowConfig:
        """Of a published config.json. A tower of another size than the published one says `width`, `layers`, `heads`, `patch_size`.

        Raises:
            ValueError: an entry is missing, or it is another kind of model.
        """
        try:
            tower, encoder, decoder = (raw[f"vision_{part}_config"]["params"] for part in ("und_enc", "gen_enc", "gen_dec"))
            language = LlamaConfig(**{k: v for k, v in raw["language_config"].items() if k in LANGUAGE and v is not None})
            uvit = UViTConfig(
                latent_channels=encoder["input_channels"],
                patch=encoder["stride"],
                channels=encoder["block_out_channels"][0],
                blocks=encoder["layers_in_middle"],
                hidden=encoder.get("hidden_size", language.hidden_size),
                eps=encoder.get("norm_eps", 1e-6),
            )
            sizes = siglip.TOWERS[tower["model_name"]] if "width" not in tower else {k: tower[k] for k in siglip.SIZES}
        except KeyError as error:
            raise ValueError(f"the configuration of JanusFlow lacks {error}, or knows more than is known here") from None
        wrong = {
            "kernel_size": (encoder.get("kernel_size"), uvit.patch),
            "padding": (encoder.get("padding"), 0),
            "stride": (uvit.patch, 2**uvit.doublings),
            "upsamples": (decoder.get("upsamples"), uvit.doublings),
            "in_channels of the decoder": (decoder.get("in_channels"), uvit.channels),
            "out_channels of the decoder": (decoder.get("out_channels"), uvit.latent_channels),
            "layers_in_middle of the decoder": (decoder.get("layers_in_middle"), uvit.blocks),
            "hidden_size of the encoder": (uvit.hidden, language.hidden_size),
        }
        for name, (there, here) in wrong.items():
            if there is not None and there != here:
                raise ValueError(f"the configuration of JanusFlow has {name} {there}, where {here} is what this code computes")
        return cls(language, siglip.vision_config(**sizes), uvit)

    def to_dict(self) -> dict[str, Any]:
        """As published."""
        uvit, vision = self.uvit, self.vision
        common = {
            "block_out_channels": [uvit.channels],
            "layers_in_middle": uvit.blocks,
            "hidden_size": uvit.hidden,
            "norm_eps": uvit.eps,
        }
        params = {
            "vision_und_enc": {
                "model_name": f"siglip_{vision.hidden_size}_patch{vision.patch_size}_{vision.image_size}",
                "select_feature": "same",
                "select_layer": -1,
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "width": vision.hidden_size,
                "layers": vision.num_hidden_layers,
                "heads": vision.num_attention_heads,
            },
            "vision_gen_enc": {
                "input_channels": uvit.latent_channels,
                "stride": uvit.patch,
                "kernel_size": uvit.patch,
                "padding": 0,
            }
            | common,
            "vision_gen_dec": {"in_channels": uvit.channels, "out_channels": uvit.latent_channels, "upsamples": uvit.doublings}
            | common,
        }
        classes = {
            "vision_und_enc": "CLIPVisionTower",
            "vision_gen_enc": "ShallowUViTEncoder",
            "vision_gen_dec": "ShallowUViTDecoder",
        }
        language = {name: getattr(self.language, name) for name in LANGUAGE if not name.startswith("rope")}
        rope = self.language.rope_parameters
        assert rope is not None, "transformers fills it in"
        language |= {"model_type": "llama", "rope_theta": rope["rope_theta"]}
        return {
            "model_type": "multi_modality",
            "architectures": ["MultiModalityCausalLM"],
            "language_config": language,
        } | {f"{part}_config": {"cls": classes[part], "model_type": part, "params": params[part]} for part in classes}


def full_size() -> JanusFlowConfig:
    """The published size: 2.046 billion parameters, of which 24 layers of width 2048 are the language model."""
    language = LlamaConfig(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=16384,
        rms_norm_eps=1e-6,
    )
    return JanusFlowConfig(language, siglip.vision_config(**siglip.TOWERS["siglip_large_patch16_384"]), UViTConfig())


def twin(vocabulary: int) -> JanusFlowConfig:
    """The twin: 32 x 32 pictures as 32 x 32 latents and 8 x 8 patches of them."""
    language = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=160,
        intermediate_size=368,
        num_hidden_layers=5,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
    )
    vision = siglip.vision_config(width=96, layers=2, heads=4, image_size=32, patch_size=4)
    return JanusFlowConfig(language, vision, UViTConfig(latent_channels=4, patch=4, channels=96, hidden=160))


# ---------------------------------------------------------------------------------------------------------------------- network


class JanusFlowNetwork(nn.Module):
    """The network under its official names; the autoencoder is apart."""

    def __init__(self, config: JanusFlowConfig) -> None:
        super().__init__()
        self.config = config
        width = config.language.hidden_size
        self.vision_und_enc_model = SiglipVisionModel(config.vision)
        self.vision_und_enc_aligner = nn.Linear(config.vision.hidden_size, width)
        self.beg_of_und_embed = nn.Parameter(torch.zeros(1, width))
        self.vision_gen_enc_model = ShallowUViTEncoder(config.uvit)
        self.vision_gen_enc_aligner = nn.Linear(config.uvit.channels, width)
        self.vision_gen_dec_model = ShallowUViTDecoder(config.uvit)
        self.vision_gen_dec_aligner_norm = LlamaRMSNorm(width, config.language.rms_norm_eps)
        self.vision_gen_dec_aligner = nn.Linear(width, config.uvit.channels)
        self.language_model = LlamaForCausalLM(config.language)

    @property
    def llm(self) -> LlamaModel:
        return self.language_model.model

    @property
    def dtype(self) -> torch.dtype:
        return self.beg_of_und_embed.dtype

    @property
    def stack(self) -> Stack:
        return Stack("llm", tuple(self.llm.layers), self.llm.norm)

    def see(self, pixels: Tensor) -> Tensor:
        """The begin slot and the features of image prompts: (B, 3, H, W) -> (B, 1 + n, D)."""
        features = self.vision_und_enc_aligner(self.vision_und_enc_model(pixels.to(self.dtype)).last_hidden_state)
        return torch.cat([self.beg_of_und_embed.expand(len(features), 1, -1), features], 1)

    def embed(self, ids: Tensor, features: Tensor | None = None, where: Tensor | None = None) -> Tensor:
        """Input embeddings (B, L) -> (B, L, D); the positions of `where`, (B, L) booleans, hold `features` (..., D) in order."""
        embeddings = self.language_model.get_input_embeddings()(ids)
        if features is None or where is None:
            return embeddings
        return embeddings.masked_scatter(where[..., None], features.to(embeddings).reshape(-1, features.shape[-1]))

    def enter(self, z: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, c, H, W) at times (B,), 0 to 1 -> tokens (B, 1 + n, D), and what the decoder needs: patches and time embedding."""
        patches, embedded = self.vision_gen_enc_model(z.to(self.dtype), TIME_SCALE * time)
        tokens = self.vision_gen_enc_aligner(patches.flatten(2).transpose(1, 2))
        return torch.cat([embedded[:, None], tokens], 1), patches, embedded

    def leave(self, states: Tensor, patches: Tensor, embedded: Tensor) -> Tensor:
        """States of the patches (B, n, D), after the last norm -> velocity (B, c, H, W)."""
        states = self.vision_gen_dec_aligner(self.vision_gen_dec_aligner_norm(states))
        grid = states.transpose(1, 2).unflatten(2, patches.shape[2:])
        return self.vision_gen_dec_model(grid, patches, embedded)


# ------------------------------------------------------------------------------------------------------------------------- flow


@dataclass(frozen=True)
class Branches:
    """Prompts for drawing as the language model takes them, padded on the right: ids and mask (B, L), lengths (B,).

    With guidance the unconditional half comes after the conditional one.
    """

    ids: Tensor
    mask: Tensor
    lengths: Tensor

    def attention(self, response: int) -> Tensor:
        """The mask over prompt and response: (B, L + response)."""
        return F.pad(self.mask, (0, response), value=1)

    def positions(self, response: int) -> Tensor:
        """Positions of the response: (B, response). They go on where each prompt ends; what is masked counts."""
        return self.lengths[:, None] + torch.arange(response, device=self.lengths.device)


def branches(prompts: Sequence[list[int]], pad_id: int, guide: bool) -> Branches:
    """Prompts, and with guidance the same number of empty ones: all but BOS is padding, and masked; positions stay as they are."""
    ids, mask = pad(prompts, pad_id, "right")
    lengths = mask.sum(1)
    if guide:
        nothing, bos_alone = torch.full_like(ids, pad_id), torch.zeros_like(mask)
        nothing[:, 0], bos_alone[:, 0] = ids[:, 0], 1
        ids, mask, lengths = torch.cat([ids, nothing]), torch.cat([mask, bos_alone]), torch.cat([lengths, lengths])
    return Branches(ids, mask, lengths)


def even_times(steps: int) -> list[float]:
    """The times of sampling: from 0 (noise) to 1 (picture) in `steps` equal steps."""
    return [step / steps for step in range(steps + 1)]


class Flow:
    """The velocity field that a batch of prompts makes, guidance included. `read` the prompts once, then ask for velocities."""

    def __init__(self, network: JanusFlowNetwork, prompts: Sequence[list[int]], pad_id: int, guidance: float) -> None:
        self.network = network
        self.guidance = guidance
        made = branches(prompts, pad_id, self.guide)
        device = network.beg_of_und_embed.device
        self.branches = Branches(*(tensor.to(device) for tensor in (made.ids, made.mask, made.lengths)))

    @property
    def guide(self) -> bool:
        return self.guidance != 1

    def read(self) -> None:
        """Run the prompts and keep their keys and values."""
        made = self.branches
        positions = torch.arange(made.ids.shape[1], device=made.ids.device).expand_as(made.ids)
        self.cache = self.network.llm(
            inputs_embeds=self.network.embed(made.ids), attention_mask=made.mask, position_ids=positions, use_cache=True
        ).past_key_values

    def velocity(self, z: Tensor, time: float) -> Tensor:
        """At latents (B, c, H, W) and a time from 0 (noise) to 1 (picture)."""
        entered = self.network.enter(z, z.new_full((len(z),), time))
        tokens, patches, embedded = (torch.cat([part, part]) if self.guide else part for part in entered)
        response = tokens.shape[1]
        states = self.network.llm(
            inputs_embeds=tokens,
            attention_mask=self.branches.attention(response),
            position_ids=self.branches.positions(response),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.cache.crop(-response)
        velocity = self.network.leave(states[:, 1:], patches, embedded).float()
        if not self.guide:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return guided(conditional, unconditional, self.guidance)
