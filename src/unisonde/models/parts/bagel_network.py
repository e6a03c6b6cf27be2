"""The network of BAGEL (arXiv 2505.14683): two Qwen2 experts, one that understands and one that draws, which share every attention.

Each position of a sequence belongs to one expert. Words, the marks around pictures and the tokens of a picture that is seen (SigLIP)
belong to `und`; the latent tokens of a picture that is drawn belong to `gen`. An expert has its own projections, norms and feed-forward
part in every layer; queries of both see keys of both, and both write to one residual stream. Embeddings and the head are shared.

    pixels  -> patches -> SigLIP layers -> connector + table of places  --+
    latents -> squares -> linear + time + table of places  ---------------+-> layers -> the last norm of each position's expert
    words   -> embedding  ------------------------------------------------+

Feed-forward part, norms and rotary positions are those of `transformers`' Qwen2, the layers of the vision tower its SigLIP; names are the
official ones throughout. A picture, marks included, stands at one rotary position; where its tokens lie in it, a fixed table of
two-dimensional sinusoids says. Attention is causal, and both ways within a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from transformers import Qwen2Config, SiglipVisionConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, Qwen2RotaryEmbedding, apply_rotary_pos_emb
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from unisonde.models.parts.checkpoint import Keys, empty, fill
from unisonde.models.trace import Stack

FREQUENCIES = 256
"""Width of the sinusoids of the time."""

KEYS = Keys()
"""Official keys are ours."""

Past = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of what came before, (B, kv heads, L, d) each, a pair a layer."""


@dataclass(frozen=True)
class BagelConfig:
    """Sizes of a BAGEL; the published ones by default.

    Attributes:
        hidden, ffn, layers, heads, kv_heads, vocabulary, positions, rope_theta, norm_eps: of each expert.
        vision_*: of the SigLIP tower. Its own table has `vision_grid` squared places; `vision_places` are the places a side of the
            numbering that this table and the second one, after the connector, are read with. `vision_sizes`: the longest and the shortest
            side of a picture that is seen, in pixels.
        latent_channels, latent_patch, latent_places: of latents, the side of the square of them that becomes one token, and the places a
            side of their table.
        reduction: pixels a latent, along a side.
        side: of a drawn picture, in pixels.
        drawn_sizes: the longest and shortest side of a picture that enters as latents.
    """

    hidden: int = 3584
    ffn: int = 18944
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    vocabulary: int = 152064
    positions: int = 32768
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    vision_width: int = 1152
    vision_ffn: int = 4304
    vision_layers: int = 26
    vision_heads: int = 16
    vision_patch: int = 14
    vision_grid: int = 70
    vision_places: int = 70
    vision_sizes: tuple[int, int] = (980, 224)
    latent_channels: int = 16
    latent_patch: int = 2
    latent_places: int = 64
    reduction: int = 8
    side: int = 1024
    drawn_sizes: tuple[int, int] = (1024, 512)

    @property
    def stride(self) -> int:
        """Pixels a latent token, along a side."""
        return self.reduction * self.latent_patch

    @property
    def values(self) -> int:
        """Latents a token."""
        return self.latent_channels * self.latent_patch**2

    @classmethod
    def from_dicts(cls, llm: Mapping[str, Any], vit: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> BagelConfig:
        """Of the published llm_config.json and vit_config.json, which leave the last SigLIP layer to be dropped.

        Args:
            own: sizes that those files do not say, where they are not the published ones; of a twin.

        Raises:
            ValueError: a file is of something else, or a size that is needed is not said.
        """
        for name, raw, kind in (("llm_config.json", llm, "qwen2"), ("vit_config.json", vit, "siglip_vision_model")):
            if raw.get("model_type", kind) != kind:
                raise ValueError(f"{name} is of a model of type {raw['model_type']!r}; BAGEL's is {kind!r}")
        told: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in (own or {}).items()}
        try:
            return cls(
                hidden=llm["hidden_size"],
                ffn=llm["intermediate_size"],
                layers=llm["num_hidden_layers"],
                heads=llm["num_attention_heads"],
                kv_heads=llm["num_key_value_heads"],
                vocabulary=llm["vocab_size"],
                positions=llm.get("max_position_embeddings", cls.positions),
                rope_theta=llm.get("rope_theta", cls.rope_theta),
                norm_eps=llm.get("rms_norm_eps", cls.norm_eps),
                vision_width=vit["hidden_size"],
                vision_ffn=vit["intermediate_size"],
                vision_layers=vit["num_hidden_layers"] - 1,
                vision_heads=vit["num_attention_heads"],
                vision_patch=vit["patch_size"],
                vision_grid=vit["image_size"] // vit["patch_size"],
                **told,
            )
        except KeyError as error:
            raise ValueError(f"llm_config.json or vit_config.json lacks {error}, so it is not BAGEL's; download it again") from None

    def to_dicts(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """What `from_dicts` takes."""
        llm = _llm(self).to_dict() | {"rope_theta": self.rope_theta, "model_type": "qwen2"}
        vit = _vision(self).to_dict() | {"num_hidden_layers": self.vision_layers + 1}
        said = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        more = ("num_key_value_heads", "vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps")
        own = (
            "vision_places",
            "vision_sizes",
            "latent_channels",
            "latent_patch",
            "latent_places",
            "reduction",
            "side",
            "drawn_sizes",
        )
        return (
            {key: llm[key] for key in (*said, *more)},
            {key: vit[key] for key in (*said, "image_size", "patch_size")},
            {key: value for key, value in asdict(self).items() if key in own},
        )


def twin(vocabulary: int) -> BagelConfig:
    """The configuration of the twin: 32 x 32 pictures, seen and drawn as 8 x 8 tokens; 2.2 million parameters."""
    return BagelConfig(
        hidden=160,
        ffn=320,
        layers=4,
        heads=4,
        kv_heads=2,
        vocabulary=vocabulary,
        positions=512,
        vision_width=96,
        vision_ffn=192,
        vision_layers=2,
        vision_heads=4,
        vision_patch=4,
        vision_grid=8,
        vision_places=8,
        vision_sizes=(32, 32),
        latent_channels=4,
        latent_patch=4,
        latent_places=8,
        reduction=1,
        side=32,
        drawn_sizes=(32, 32),
    )


# ---------------------------------------------------------------------------------------------------------------------- experts


class Owners(NamedTuple):
    """The positions of a batch that each expert owns: indices into its B x L positions."""

    und: Tensor
    gen: Tensor

    @classmethod
    def of(cls, drawn: Tensor) -> Owners | None:
        """From booleans (B, L), true where `gen` owns; None if `und` owns all."""
        flat = drawn.flatten()
        return cls((~flat).nonzero()[:, 0], flat.nonzero()[:, 0]) if bool(flat.any()) else None


def routed(x: Tensor, owners: Owners | None, und: nn.Module, gen: nn.Module) -> Tensor:
    """Each position through the module of the expert that owns it: (B, L, ...) -> (B, L, ...)."""
    if owners is None:
        return und(x)
    flat = x.flatten(0, 1)
    understood, drawn = und(flat[owners.und.to(x.device)]), gen(flat[owners.gen.to(x.device)])
    out = understood.new_empty(len(flat), *understood.shape[1:])
    out[owners.und.to(out.device)] = understood
    out[owners.gen.to(out.device)] = drawn.to(out)
    return out.unflatten(0, x.shape[:2])


class JointAttention(nn.Module):
    """Grouped-query attention over positions of both experts, queries and keys normalised head by head."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        width, size = config.hidden, config.hidden // config.heads
        inner, shared = config.heads * size, config.kv_heads * size
        self.size = size
        self.num_key_value_groups = config.heads // config.kv_heads
        self.q_proj, self.q_proj_moe_gen = nn.Linear(width, inner), nn.Linear(width, inner)
        self.k_proj, self.k_proj_moe_gen = nn.Linear(width, shared), nn.Linear(width, shared)
        self.v_proj, self.v_proj_moe_gen = nn.Linear(width, shared), nn.Linear(width, shared)
        self.o_proj, self.o_proj_moe_gen = nn.Linear(inner, width, bias=False), nn.Linear(inner, width, bias=False)
        self.q_norm, self.q_norm_moe_gen = Qwen2RMSNorm(size, config.norm_eps), Qwen2RMSNorm(size, config.norm_eps)
        self.k_norm, self.k_norm_moe_gen = Qwen2RMSNorm(size, config.norm_eps), Qwen2RMSNorm(size, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        owners: Owners | None,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q = routed(x, owners, self.q_proj, self.q_proj_moe_gen).unflatten(-1, (-1, self.size))
        k = routed(x, owners, self.k_proj, self.k_proj_moe_gen).unflatten(-1, (-1, self.size))
        v = routed(x, owners, self.v_proj, self.v_proj_moe_gen).unflatten(-1, (-1, self.size)).transpose(1, 2)
        # Norms and rotation in float32, as published where pictures are drawn.
        q = routed(q.float(), owners, self.q_norm, self.q_norm_moe_gen)
        k = routed(k.float(), owners, self.k_norm, self.k_norm_moe_gen)
        q, k = (y.transpose(1, 2).to(v) for y in apply_rotary_pos_emb(q, k, *rotary, unsqueeze_dim=2))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y, _ = sdpa_attention_forward(self, q, k, v, mask, is_causal=False)
        return routed(y.flatten(2), owners, self.o_proj, self.o_proj_moe_gen), (k, v)


class MoTLayer(nn.Module):
    """A layer of both experts: (B, L, D) -> (B, L, D), and its keys and values."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        llm = _llm(config)
        self.self_attn = JointAttention(config)
        self.mlp, self.mlp_moe_gen = Qwen2MLP(llm), Qwen2MLP(llm)
        self.input_layernorm, self.input_layernorm_moe_gen = _norm(config), _norm(config)
        self.post_attention_layernorm, self.post_attention_layernorm_moe_gen = _norm(config), _norm(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        owners: Owners | None = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y = routed(x, owners, self.input_layernorm, self.input_layernorm_moe_gen)
        y, kept = self.self_attn(y, rotary, mask, owners, past)
        x = x + y
        y = routed(x, owners, self.post_attention_layernorm, self.post_attention_layernorm_moe_gen)
        return x + routed(y, owners, self.mlp, self.mlp_moe_gen), kept


class Decoder(nn.Module):
    """The layers of both experts between the shared embedding and their last norms."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(MoTLayer(config) for _ in range(config.layers))
        self.norm, self.norm_moe_gen = _norm(config), _norm(config)
        self.states = nn.Identity()  # what leaves the two last norms passes here, where it can be read as one
        self.rotary_emb = Qwen2RotaryEmbedding(_llm(config))

    def forward(
        self,
        x: Tensor,
        places: Tensor,
        mask: Tensor | None = None,
        owners: Owners | None = None,
        past: Past | None = None,
    ) -> tuple[Tensor, Past]:
        """States after the last norm, and keys and values with those of `past` before them.

        Args:
            x: (B, L, D).
            places: (B, L) rotary positions.
            mask: booleans, what each position sees of `past` and x, broadcast to (B, 1, L, L past + L); everything if None.
        """
        rotary = self.rotary_emb(torch.empty(0, device=places.device), places)
        kept = []
        for number, layer in enumerate(self.layers):
            x, pair = layer(x, rotary, mask, owners, None if past is None else past[number])
            kept.append(pair)
        return self.states(routed(x, owners, self.norm, self.norm_moe_gen)), tuple(kept)


class LanguageModel(nn.Module):
    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)


# --------------------------------------------------------------------------------------------------------------------- pictures


class VisionEmbeddings(nn.Module):
    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(3 * config.vision_patch**2, config.vision_width)
        self.position_embedding = nn.Embedding(config.vision_grid**2, config.vision_width)

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        embedded = self.patch_embedding(patches)
        return embedded + self.position_embedding(places).to(embedded)


class Vision(nn.Module):
    """The SigLIP tower, on the patches of one picture: (n, 3 p p) -> (n, d)."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = SiglipEncoder(_vision(config))  # type: ignore[arg-type]  # the vision half of its configuration
        self.post_layernorm = nn.LayerNorm(config.vision_width, eps=1e-6)

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        states = self.encoder(self.embeddings(patches, places)[None]).last_hidden_state
        return self.post_layernorm(states)[0]


class Connector(nn.Module):
    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.vision_width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PlaceTable(nn.Module):
    """A fixed table of places; the checkpoint holds it."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(sinusoids(side, width), requires_grad=False)

    def forward(self, places: Tensor) -> Tensor:
        return self.pos_embed[places.to(self.pos_embed.device)]


class TimeEmbed(nn.Module):
    """Times (B,) in [0, 1], 1 being noise -> (B, D): sinusoids, cosines first, and two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        waves = get_timestep_embedding(t, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.mlp(waves.to(self.mlp[2].bias.dtype))


def sinusoids(side: int, width: int) -> Tensor:
    """Two-dimensional sinusoids of the places of a square, row by row: (side^2, width).

    As in masked autoencoders (arXiv 2111.06377): half of the width for the column, then half for the row; of either half, first the sines
    and then the cosines of the coordinate times 10000^(-2 k / (width / 2)).
    """
    quarter = width // 4
    rates = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    angles = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], -1)  # of one coordinate
    both = torch.cat([waves.expand(side, -1, -1), waves[:, None].expand(-1, side, -1)], -1)
    return both.flatten(0, 1).float()


def squares(picture: Tensor, side: int) -> Tensor:
    """Squares of a picture row by row, the channel last in each: (..., c, H, W) -> (..., n, side side c)."""
    cut = picture.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))  # (..., c, h, side, w, side)
    return cut.movedim(-5, -1).transpose(-4, -3).flatten(-3).flatten(-3, -2)


def from_squares(tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The inverse of `squares`: (..., n, side side c) -> (..., c, H, W), n = grid[0] grid[1]."""
    cut = tokens.unflatten(-1, (side, side, -1)).unflatten(-4, grid)  # (..., h, w, side, side, c)
    return cut.transpose(-4, -3).movedim(-1, -5).flatten(-2).flatten(-3, -2)


def places_of(grid: tuple[int, int], numbering: int) -> Tensor:
    """The places of a grid in a table that counts `numbering` of them a row: (n,)."""
    rows, columns = (torch.arange(size) for size in grid)
    return (rows[:, None] * numbering + columns).flatten()


# ---------------------------------------------------------------------------------------------------------------------- network


class BagelNetwork(nn.Module):
    """BAGEL without its autoencoder."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = LanguageModel(config)
        self.time_embedder = TimeEmbed(config.hidden)
        self.vae2llm = nn.Linear(config.values, config.hidden)
        self.llm2vae = nn.Linear(config.hidden, config.values)
        self.latent_pos_embed = PlaceTable(config.latent_places, config.hidden)
        self.vit_model = nn.ModuleDict({"vision_model": Vision(config)})
        self.connector = Connector(config)
        self.vit_pos_embed = PlaceTable(config.vision_places, config.hidden)
        self.main: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where inputs go: where the weights are, or `main` if they are on several devices."""
        return self.main or self.vae2llm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vae2llm.weight.dtype

    @property
    def stack(self) -> Stack:
        decoder = self.language_model.model
        return Stack("llm", tuple(decoder.layers), decoder.states)

    def words(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids."""
        return self.language_model.model.embed_tokens(ids)

    def logits(self, states: Tensor) -> Tensor:
        """Of the next token, float32, from states after the last norm."""
        return self.language_model.lm_head(states).float()

    def seen(self, pixels: Tensor) -> Tensor:
        """Tokens of a picture that is seen: (3, H, W) in [-1, 1] -> (n, D)."""
        patch = self.config.vision_patch
        places = places_of((pixels.shape[1] // patch, pixels.shape[2] // patch), self.config.vision_places).to(pixels.device)
        features = self.connector(self.vit_model["vision_model"](squares(pixels, patch).to(self.dtype), places))
        return features + self.vit_pos_embed(places).to(features)

    def drawn(self, latents: Tensor, t: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens of latents at times t (B,), 0 for a finished picture: (B, n, p p c), as `squares` cuts them -> (B, n, D)."""
        tokens = self.vae2llm(latents.to(self.dtype))
        places = places_of(grid, self.config.latent_places).to(tokens.device)
        return tokens + self.time_embedder(t)[:, None].to(tokens) + self.latent_pos_embed(places).to(tokens)

    def read(
        self,
        x: Tensor,
        places: Tensor,
        mask: Tensor | None = None,
        owners: Owners | None = None,
        past: Past | None = None,
    ) -> tuple[Tensor, Past]:
        """One pass of the experts; see `Decoder.forward`."""
        return self.language_model.model(x, places, mask, owners, past)

    def velocity(self, states: Tensor) -> Tensor:
        """From data to noise, float32: states of latent tokens after the last norm (B, n, D) -> (B, n, p p c)."""
        return self.llm2vae(states).float()

    @torch.inference_mode()
    def write(
        self,
        states: Tensor,
        past: Past,
        places: Tensor,
        there: Tensor,
        pick: Callable[[Tensor, int], Tensor],
        limit: int,
        end: int,
    ) -> Tensor:
        """Tokens one after another, until every row has ended: (B, T), T at most `limit`; what follows `end` in a row is of no use.

        Args:
            states: (B, D) after the last norm, of the last position of prompts that end together (padded on the left).
            places: (B,) rotary positions of the first tokens.
            there: (B, L) booleans, where the prompt is no padding.
            pick: from logits (B, V) and the step to tokens (B,).
        """
        written: list[Tensor] = []
        ended = torch.zeros(len(there), dtype=torch.bool, device=there.device)
        for step in range(limit):
            written.append(pick(self.logits(states).to(there.device), step))
            ended |= written[-1] == end
            if bool(ended.all()) or step == limit - 1:
                break
            there = torch.cat([there, there.new_ones(len(there), 1)], 1)
            mask = None if bool(there.all()) else there[:, None, None]
            x, past = self.read(self.words(written[-1][:, None]), places[:, None] + step, mask, past=past)
            states = x[:, -1]
        return torch.stack(written, 1)


def visible(blocks: Tensor, there: Tensor) -> Tensor:
    """What each position sees: booleans (B, 1, L, L). What came before, and all of its own picture; of padding, itself alone.

    Args:
        blocks: (B, L) number of the picture that a position belongs to, -1 outside pictures.
        there: (B, L) booleans, False at padding.
    """
    diagonal = torch.eye(blocks.shape[1], dtype=torch.bool, device=blocks.device)
    picture = (blocks[:, :, None] == blocks[:, None, :]) & (blocks >= 0)[:, None, :]
    seen = (torch.ones_like(diagonal).tril() | picture) & there[:, None, :]
    return (seen | diagonal)[:, None]


def filled(
    config: BagelConfig, tensors: Iterable[tuple[str, Tensor]], device: str | torch.device, dtype: torch.dtype | None, name: str
) -> BagelNetwork:
    """The network of official tensors.

    Raises:
        ValueError: they do not fill it exactly.
    """
    network = empty(lambda: BagelNetwork(config))
    fill(network, tensors, KEYS, device, dtype, name)
    return network.eval()


WHOLE: Sequence[str] = ("MoTLayer", "SiglipEncoderLayer", "VisionEmbeddings", "Connector", "TimeEmbed")
"""Classes of modules that several devices do not share."""


def _norm(config: BagelConfig) -> Qwen2RMSNorm:
    return Qwen2RMSNorm(config.hidden, config.norm_eps)


def _llm(config: BagelConfig) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=config.vocabulary,
        hidden_size=config.hidden,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.positions,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def _vision(config: BagelConfig) -> SiglipVisionConfig:
    vision = SiglipVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=config.vision_ffn,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_heads,
        image_size=config.vision_grid * config.vision_patch,
        patch_size=config.vision_patch,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    )
    vision._attn_implementation = "sdpa"
    return vision
