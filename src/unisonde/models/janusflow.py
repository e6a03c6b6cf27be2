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

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation, Model, Response, fingerprint, item_seed
from unisonde.models.parts.checkpoint import Keys, Rename, empty, fill, tensors_of, weight_files
from unisonde.models.parts.flow_llama import KEYS, Flow, JanusFlowConfig, JanusFlowNetwork
from unisonde.models.parts.pretrained import load_tokenizer, reach, read_json, source_of
from unisonde.models.parts.segments import Segment, content, encode, template
from unisonde.models.parts.siglip import Pictures
from unisonde.models.parts.text import Written, cut_to_window, pad, write_text
from unisonde.models.trace import Row, Span, Stack, Trace

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BEGIN_IMAGE, END_IMAGE, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
USER, ASSISTANT = "User", "Assistant"
SPECIAL_TOKENS = (PAD, BOS, EOS, BEGIN_IMAGE, END_IMAGE, IMAGE)

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
"""The published system prompt of understanding and text. Drawing has none, and the twin has none at all."""

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
        autoencoder_source: the folder of the autoencoder's weights, if it is not in `source`.
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
        autoencoder_source: Path | None = None,
    ) -> None:
        self.network = network.eval()
        self.autoencoder = autoencoder.eval()
        self.tokenizer = tokenizer
        self.pictures = pictures
        self.name = name
        self.source = source
        self.autoencoder_source = autoencoder_source
        self.system = system
        self._defaults: dict[Task, Generation] = {
            "text": Generation(tokens=512, temperature=0.0),
            "image": Generation(guidance=2.0, steps=30),
        }
        self._defaults |= generation or {}
        unknown = [t for t in SPECIAL_TOKENS if tokenizer.convert_tokens_to_ids(t) in (None, tokenizer.unk_token_id)]
        if unknown:
            raise ValueError(f"the tokenizer of {name} lacks {', '.join(unknown)}: it is not JanusFlow's")
        self.pad_id, self.eos_id = (tokenizer.convert_tokens_to_ids(t) for t in (PAD, EOS))

    @property
    def module(self) -> nn.Module:
        return self.network

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
        side = config.vision.image_size // 2 ** (len(self.autoencoder.config.block_out_channels) - 1)
        return config.uvit.latent_channels, side, side

    @property
    def patches(self) -> int:
        """The number of content positions of an image response."""
        return (self.latent[1] // self.network.config.uvit.patch) ** 2

    def defaults(self, task: Task) -> Generation:
        return self._defaults[task]

    def identity(self) -> dict[str, Any]:
        apart = self.autoencoder_source
        return super().identity() | ({"autoencoder": fingerprint(apart)} if apart else {})

    # ------------------------------------------------------------------------------------------------------------- prompts

    def segments(self, item: Item, task: Task) -> list[Segment]:
        """The published templates: (c) for drawing; (a) and (b) for text, with or without an image."""
        system = f"{self.system}\n\n" if self.system and task == "text" else ""
        seen = []
        if item.image is not None:
            features = self.network.config.vision.image_size // self.network.config.vision.patch_size
            seen = [template(BEGIN_IMAGE), content(IMAGE * features**2, "image"), template(f"{END_IMAGE}\n")]
        return [template(f"{system}{USER}: "), *seen, content(item.prompt), template(f"\n\n{ASSISTANT}:")]

    def encode(self, item: Item, task: Task, room: int, truncate: bool = False) -> Encoded:
        """The prompt of an item.

        Args:
            room: positions to leave for the response.

        Raises:
            ValueError: the prompt is empty, has words that the tokenizer does not know, or is longer than the window.
        """
        if task == "image" and item.image is not None:
            raise ValueError(f"item {item.id!r} has an image prompt; {self.name} draws from text prompts alone")
        if not item.prompt.strip() and item.image is None:
            raise ValueError(f"item {item.id!r} has an empty prompt")
        ids, spans = encode(self.tokenizer, self.segments(item, task))
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids:
            pieces = dict.fromkeys(re.findall(r"\w+|[^\w\s]", item.prompt))
            words = [w for w in pieces if self.tokenizer.convert_tokens_to_ids(w.lower()) == unknown]
            raise ValueError(
                f"{self.name} does not know the words {', '.join(words[:8])} of item {item.id!r}; it was trained on few"
            )
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
            pictures = self.decode(self.draw(prompts, generation, noise(seeds, self.latent), trace))
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
        record = trace.record if trace is not None else lambda *_: nullcontext()
        flow = Flow(self.network, [p.ids for p in prompts], self.pad_id, generation.guidance)
        unread = [None] * (len(prompts) if flow.guide else 0)
        spans = (Span(0, 1, "response", "image", "template"), Span(1, 1 + self.patches, "response", "image"))
        rows = [*(Row(k, spans) for k in range(len(prompts))), *unread]
        with record(self.network.stack, [*(Row(k, p.spans) for k, p in enumerate(prompts)), *unread], "single"):
            flow.read()
        z = z.to(self.device)
        for step in range(generation.steps):
            name = "final" if step == generation.steps - 1 else f"{step:04d}"
            with record(self.network.stack, rows, name):
                velocity = flow.velocity(z, step / generation.steps)
            z = z + velocity / generation.steps
        if trace is not None and trace.wants("clean"):
            with record(self.network.stack, rows, "clean"):
                flow.velocity(z, 1.0)
        return z

    @torch.inference_mode()
    def decode(self, z: Tensor) -> list[Image.Image]:
        """Pictures of latents: (B, c, H, W) -> B pictures."""
        scaled = z / self.autoencoder.config.scaling_factor
        pixels = self.autoencoder.decode(scaled.to(self.autoencoder.dtype)).sample  # (B, 3, H, W), about [-1, 1]
        values = ((pixels.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(array) for array in values]


def noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal, float32: (B, *shape). Row b depends on `seeds[b]` alone; drawn on the CPU, so every device sees the same."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def image_slots(spans: Sequence[Sequence[Span]], starts: Sequence[int], length: int) -> Tensor:
    """Where image features go: (B, length) booleans. The prompt's image span and the begin-of-image slot before it.

    Spans decide, and not where the placeholder stands: a user or the model may write that token.

    Args:
        starts: where each row's sequence begins.
    """
    where = torch.zeros(len(spans), length, dtype=torch.bool)
    for row, (held, start) in enumerate(zip(spans, starts, strict=True)):
        for span in held:
            if span.modality == "image" and span.kind == "content":
                where[row, start + span.start - 1 : start + span.stop] = True
    return where


# ---------------------------------------------------------------------------------------------------------------------- loading


def load(path: str, name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> JanusFlow:
    """The JanusFlow of a local folder or hub id, in the layout of `deepseek-ai/JanusFlow-1.3B`.

    The autoencoder is that of the folder `vae/` beside the weights, or the published one from the hub.

    Args:
        dtype: None takes float32 on a CPU, else bfloat16.

    Raises:
        ValueError: a file is missing or damaged, or the hub cannot be reached; the sentence names the file.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    config = JanusFlowConfig.from_dict(read_json(path, "config.json"))
    tokenizer = load_tokenizer(path)
    pictures = Pictures.from_dict(read_json(path, "preprocessor_config.json"), config.vision.image_size)
    network = empty(lambda: JanusFlowNetwork(config))
    fill(network, tensors_of(weight_files(path)), KEYS, device, dtype, name)
    autoencoder, apart = load_autoencoder(path, device, dtype)
    source = source_of(path)
    own = source / "unisonde.json"  # the twin's: what differs from the published model
    settings = json.loads(own.read_text()) if own.is_file() else {"generation": {}, "system": SYSTEM}
    generation = {task: Generation(**values) for task, values in settings["generation"].items()}
    return JanusFlow(network, autoencoder, tokenizer, pictures, name, source, settings["system"], generation, apart)


def load_autoencoder(path: str, device: torch.device, dtype: torch.dtype) -> tuple[AutoencoderKL, Path | None]:
    """The autoencoder of a folder's `vae/`, or the published one and the folder that it was found in.

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
    return autoencoder.requires_grad_(False), None if inside else source_of(AUTOENCODER)
