"""JanusFlow (arXiv 2411.07975): one Llama that reads SigLIP features and text, writes text, and draws by rectified flow.

Pictures are drawn in the latent space of the SDXL autoencoder. At each of N steps a shallow U-ViT turns the noisy latent and the time
into tokens, the Llama reads them after the prompt, and the U-ViT's decoder turns the last states into a velocity. Llama and SigLIP are
those of `transformers`, the autoencoder and the time embedding those of `diffusers`; U-ViT, templates, masks and sampler are ours.

What the states are. Stack `llm`, causal throughout. Prompt: the positions of the prompt's text, or of the image's features (576 at full
size; the begin-of-image slot, which holds a learned embedding, is template) and of the question after it. Response in text: the
positions at which a response token is the input, from one teacher-forced pass over prompt and response, step `single`. Response in
images: the positions of the latent's patches (576) in each pass of the sampler; the time token just before them is template. Prompt
states depend neither on noise nor on time, so the prompt is run once and recorded as `single`, and its keys and values serve every
step; the published loop runs it again each time and gets the same. The last step (t = 29/30) is `final`; `clean` is one more pass on the
finished latent at t = 1, which the sampler never makes. Of guidance the conditional branch is read.

The published templates name the roles plainly, `User` and `Assistant`. That of drawing ends in a token that the published loop cuts off
again, to put the time token there; it is never made here. Noise, times and the latent stay in float32 whatever the weights are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation, Model, Response, item_seed
from unisonde.models.parts.checkpoint import Keys, Rename, empty, fill, tensors_of, weight_files
from unisonde.models.parts.flow_llama import KEYS, Flow, JanusFlowConfig, JanusFlowNetwork, even_times
from unisonde.models.parts.janus_marks import BEGIN_IMAGE, BOS, END_IMAGE, EOS, IMAGE, PAD, SYSTEM
from unisonde.models.parts.pictures import to_pictures
from unisonde.models.parts.pretrained import load_tokenizer, own_settings, reach, read_json, settled, source_of
from unisonde.models.parts.prompts import check_marks, check_prompt, check_words, picture_places
from unisonde.models.parts.sampling import euler, normals
from unisonde.models.parts.segments import Segment, content, encode, template
from unisonde.models.parts.siglip import Pictures
from unisonde.models.parts.text import Written, cut_to_window, pad, write_text
from unisonde.models.trace import Row, Span, Stack, Trace, recorded, step_name

USER, ASSISTANT = "User", "Assistant"
SPECIAL_TOKENS = (PAD, BOS, EOS, BEGIN_IMAGE, END_IMAGE, IMAGE)

AUTOENCODER = "stabilityai/sdxl-vae"
"""The autoencoder, published apart from the model. A local folder may hold it, or its own, in `vae/`."""

AUTOENCODER_KEYS = Keys(
    tuple(
        Rename(rf"(.*\.attentions\.\d+)\.{theirs}\.(\w+)", rf"\1.{ours}.\2")
        for theirs, ours in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items()
    )
)
"""Attention in the autoencoder has other names in files from before 2023."""


def twin_autoencoder() -> AutoencoderKL:
    """The twin's autoencoder: 32 x 32 pictures to 32 x 32 latents of 4 channels.

    It keeps the grid, for pictures as small as these show single pixels, which the published way down and up (strided, then nearest
    neighbours) blurs. Norms have one group: with several, each takes the level of its few channels out, and with it the colour of a
    plain picture.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=32,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


# ------------------------------------------------------------------------------------------------------------------------ model


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it: token ids, what they hold, its picture, and whether it was cut."""

    ids: list[int]
    spans: tuple[Span, ...]
    pixels: Tensor | None = None
    flags: tuple[str, ...] = ()


class JanusFlow(Model):
    """A JanusFlow of any size.

    Args:
        network: the network, without its autoencoder.
        autoencoder: of the latents that it draws.
        tokenizer: its tokenizer, with the special tokens of the published one.
        pictures: how image prompts are prepared.
        system: the system prompt of understanding and text.
        generation: sampling settings a task, where they differ from the published ones.
    """

    family = "janusflow"
    tasks = ("text", "image")

    def __init__(
        self,
        network: JanusFlowNetwork,
        autoencoder: AutoencoderKL,
        tokenizer: Any,
        pictures: Pictures,
        name: str,
        source: Path | None = None,
        system: str = SYSTEM,
        generation: dict[Task, Generation] | None = None,
    ) -> None:
        self.network = network.eval()
        self.autoencoder = autoencoder.eval()
        self.tokenizer = tokenizer
        self.pictures = pictures
        self.name = name
        self.source = source
        self.system = system
        self._defaults: dict[Task, Generation] = {
            "text": Generation(tokens=512, temperature=0.0),
            "image": Generation(guidance=2.0, steps=30),
        }
        self._defaults |= generation or {}
        check_marks(tokenizer, SPECIAL_TOKENS, name, "JanusFlow")
        self.pad_id, self.eos_id = (tokenizer.convert_tokens_to_ids(t) for t in (PAD, EOS))

    @property
    def module(self) -> nn.Module:
        return self.network

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.network, self.autoencoder)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return (self.network.stack,)

    @property
    def window(self) -> int:
        """The most positions of a sequence."""
        return self.network.config.language.max_position_embeddings

    @property
    def latent(self) -> tuple[int, int, int]:
        """The shape of a latent. Pictures are as large as those that the vision encoder reads."""
        config = self.network.config
        side = config.side // 2 ** (len(self.autoencoder.config.block_out_channels) - 1)
        return config.uvit.latent_channels, side, side

    @property
    def patches(self) -> int:
        """The number of content positions of an image response."""
        return (self.latent[1] // self.network.config.uvit.patch) ** 2

    def defaults(self, task: Task) -> Generation:
        return self._defaults[task]

    # ------------------------------------------------------------------------------------------------------------- prompts

    def segments(self, item: Item, task: Task) -> list[Segment]:
        """The published templates: (c) for drawing; (a) and (b) for text, with or without an image."""
        system = f"{self.system}\n\n" if self.system and task == "text" else ""
        seen = []
        if item.image is not None:
            features = content(IMAGE * self.network.config.features, "image")
            seen = [template(BEGIN_IMAGE), features, template(f"{END_IMAGE}\n")]
        return [template(f"{system}{USER}: "), *seen, content(item.prompt), template(f"\n\n{ASSISTANT}:")]

    def encode(self, item: Item, task: Task, room: int, truncate: bool = False) -> Encoded:
        """The prompt of an item.

        Args:
            room: positions to leave for the response.

        Raises:
            ValueError: the prompt is empty, has words that the tokenizer does not know, or is longer than the window.
        """
        check_prompt(item, task, self.name)
        ids, spans = encode(self.tokenizer, self.segments(item, task))
        check_words(self.tokenizer, ids, item, self.name)
        ids, spans, flags = cut_to_window(ids, spans, self.window - room, truncate, self.name, item.id)
        picture = item.picture()
        return Encoded(ids, spans, None if picture is None else self.pictures(picture), flags)

    # ----------------------------------------------------------------------------------------------------------- responses

    @torch.inference_mode()
    def respond(
        self,
        items: Sequence[Item],
        task: Task,
        generation: Generation,
        seed: int = 0,
        trace: Trace | None = None,
        truncate: bool = False,
    ) -> list[Response]:
        self.check_task(task)
        room = 1 + self.patches if task == "image" else generation.tokens or 0
        prompts = [self.encode(item, task, room, truncate) for item in items]
        seeds = [item_seed(seed, item) for item in items]
        if task == "image":
            pictures = self.decode(self.draw(prompts, generation, normals(seeds, self.latent), trace))
            return [Response(self.patches, image=picture, flags=p.flags) for p, picture in zip(prompts, pictures, strict=True)]
        pixels = [p.pixels for p in prompts if p.pixels is not None]
        features = self.network.see(torch.stack(pixels).to(self.device)) if pixels else None
        written = self.write(prompts, features, generation, seeds)
        if trace is not None:
            rows = [Row(k, p.spans + w.spans(len(p.ids))) for k, (p, w) in enumerate(zip(prompts, written, strict=True))]
            with trace.record(self.network.stack, rows):
                self.read([p.ids + w.ids for p, w in zip(prompts, written, strict=True)], [row.spans for row in rows], features)
        return [w.response(p.flags) for p, w in zip(prompts, written, strict=True)]

    def write(
        self, prompts: Sequence[Encoded], features: Tensor | None, generation: Generation, seeds: Sequence[int]
    ) -> list[Written]:
        """Text responses."""
        ids, mask = pad([p.ids for p in prompts], self.pad_id, "left")
        longest = ids.shape[1]
        where = image_slots([p.spans for p in prompts], [longest - len(p.ids) for p in prompts], longest)
        embeddings = self.network.embed(ids.to(self.device), features, where.to(self.device))
        return write_text(
            self.network.language_model,
            self.tokenizer,
            ids.to(self.device),
            mask.to(self.device),
            generation,
            seeds,
            self.eos_id,
            self.pad_id,
            embeddings=embeddings,
        )

    def read(self, ids: Sequence[list[int]], spans: Sequence[Sequence[Span]], features: Tensor | None) -> Tensor:
        """The teacher-forced pass: states after the last norm, (B, L, D). Padding is on the right, where nobody looks."""
        padded, _ = pad(ids, self.pad_id, "right")
        where = image_slots(spans, [0] * len(ids), padded.shape[1])
        embeddings = self.network.embed(padded.to(self.device), features, where.to(self.device))
        return self.network.llm(inputs_embeds=embeddings, use_cache=False).last_hidden_state

    @torch.inference_mode()
    def draw(self, prompts: Sequence[Encoded], generation: Generation, z: Tensor, trace: Trace | None = None) -> Tensor:
        """Latents from noise, both (B, c, H, W), by Euler's method."""
        assert generation.guidance is not None and generation.steps is not None
        stack, steps = self.network.stack, generation.steps
        flow = Flow(self.network, [p.ids for p in prompts], self.pad_id, generation.guidance)
        unread = [None] * (len(prompts) if flow.guide else 0)
        spans = (Span(0, 1, "response", "image", "template"), Span(1, 1 + self.patches, "response", "image"))
        rows = [*(Row(k, spans) for k in range(len(prompts))), *unread]
        with recorded(trace, stack, [*(Row(k, p.spans) for k, p in enumerate(prompts)), *unread]):
            flow.read()
        z = euler(
            flow.velocity,
            z.to(self.device),
            even_times(steps),
            lambda step: recorded(trace, stack, rows, step_name(step, steps)),
        )
        if trace is not None and trace.wants("clean"):
            with trace.record(stack, rows, "clean"):
                flow.velocity(z, 1.0)
        return z

    @torch.inference_mode()
    def decode(self, z: Tensor) -> list[Image.Image]:
        """Pictures of latents: (B, c, H, W) -> B pictures."""
        scaled = z / self.autoencoder.config.scaling_factor
        return to_pictures(self.autoencoder.decode(scaled.to(self.autoencoder.dtype)).sample)


def image_slots(spans: Sequence[Sequence[Span]], starts: Sequence[int], length: int) -> Tensor:
    """Where image features go, the begin-of-image slot before them included: (B, length) booleans."""
    return picture_places(spans, starts, length, before=1)


# ---------------------------------------------------------------------------------------------------------------------- loading


def load(path: str, name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> JanusFlow:
    """The JanusFlow of a local folder or hub id, in the layout of `deepseek-ai/JanusFlow-1.3B`.

    The autoencoder is that of the folder `vae/` beside the weights, or the published one from the hub.

    Args:
        dtype: None takes float32 on a CPU, else bfloat16.

    Raises:
        ValueError: a file is missing or damaged, or the hub cannot be reached; the sentence names the file.
    """
    device, dtype = settled(device, dtype)
    config = JanusFlowConfig.from_dict(read_json(path, "config.json"))
    tokenizer = load_tokenizer(path)
    pictures = Pictures.from_dict(read_json(path, "preprocessor_config.json"), config.side)
    network = empty(lambda: JanusFlowNetwork(config))
    fill(network, tensors_of(weight_files(path)), KEYS, device, dtype, name)
    autoencoder = load_autoencoder(path, device, dtype)
    source = source_of(path)
    generation, system = own_settings(source)
    system = SYSTEM if system is None else system
    return JanusFlow(network, autoencoder, tokenizer, pictures, name, source, system, generation)


def load_autoencoder(path: str, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """The autoencoder of a folder's `vae/`, or the published one.

    Raises:
        ValueError: neither is there.
    """
    inside = Path(path).is_dir() and reach(path, "vae/config.json") is not None
    where, prefix = (path, "vae/") if inside else (AUTOENCODER, "")
    if not inside and reach(AUTOENCODER, "config.json") is None:
        raise ValueError(
            f"the autoencoder of {path!r} is published apart, as {AUTOENCODER}, and cannot be had from the hub; put its config.json "
            "and diffusion_pytorch_model.safetensors into a folder vae beside the weights"
        )
    raw = read_json(where, f"{prefix}config.json")
    autoencoder = empty(lambda: AutoencoderKL.from_config(raw))
    files = weight_files(where, f"{prefix}diffusion_pytorch_model")
    # The published one overflows in float16.
    kind = torch.bfloat16 if dtype == torch.float16 else dtype
    fill(autoencoder, tensors_of(files), AUTOENCODER_KEYS, device, kind, f"the autoencoder {where}")
    return autoencoder.requires_grad_(False)
