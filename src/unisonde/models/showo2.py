"""Show-o2 (arXiv 2506.15564): a Qwen2.5 that writes text word by word and draws pictures by flow matching on latents of the Wan VAE.

A picture enters the sequence as a time token and one token for each 2 x 2 square of its latents, 729 at 432 x 432 pixels. Attention is
causal, and both ways within a picture, so what stands before a picture knows nothing of it and a prompt's states are the same at every
step of sampling. Where a picture is read, the published block of mutual attention lies one position further (`read_block`). A head of
blocks modulated by the time turns the states of the image positions into a velocity. The network is in `parts.showo2_network`, the
autoencoder in `parts.wan_vae`; here are the published templates, the spans, sampling and reading.

Prompt states: of a drawing, the text's positions, pass `single`. Of a question, the picture's positions (729) and those of its text.
Response states: of a drawing, the image positions of each evaluation of the velocity, `0000`, `0001`, ..., `final`, the last (at
t = 0.94 of the 50 published points, which make 49 evaluations), and of `clean`, one more pass on the finished latents at t = 1, as the
model itself reads pictures; of text, the positions at which a response token is the input, in one teacher-forced pass, `single`, over
prompt and response (DESIGN.md, decision 3). Stack `llm`; the flow head is not shown. The time token and the marks around a picture are
template. Guidance: the conditional branch is read.

Reading a picture takes a sample of the VAE's posterior, as published; it is drawn from the item's seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation, Model, Response, item_seed
from unisonde.models.parts import wan_vae
from unisonde.models.parts.checkpoint import tensors_of, weight_files
from unisonde.models.parts.pictures import centre_square, to_pictures
from unisonde.models.parts.pretrained import VOCABULARIES, load_tokenizer, own_settings, reach, read_json, settled, source_of
from unisonde.models.parts.prompts import check_marks, check_prompt, check_words
from unisonde.models.parts.sampling import draw, normals, uniforms
from unisonde.models.parts.segments import Segment, content, spans_of, template
from unisonde.models.parts.showo2_network import Showo2Config, Showo2Network, additive, filled, flow_times, visible
from unisonde.models.parts.text import Written, cut_to_window, pad
from unisonde.models.trace import Kind, Modality, Row, Span, Stack, Trace, recorded, step_name

BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "[PAD]"
BEGIN_IMAGE, END_IMAGE, IMAGE = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, BEGIN_IMAGE, END_IMAGE, IMAGE)

ADDED_TOKENS = ("<image>", "<|vid_start|>", "<|vid_end|>")
"""What Show-o2 adds to the vocabulary of Qwen2.5, after its padding token; the ids follow from the order."""

SYSTEM = "You are a helpful assistant."
"""The published system prompt of understanding. Image generation has none, and the twin was trained without one."""

LANGUAGE_MODELS = {1536: "Qwen/Qwen2.5-1.5B-Instruct", 3584: "Qwen/Qwen2.5-7B-Instruct"}
"""Width -> where the tokenizer is, which the published checkpoints do not hold."""


@dataclass(frozen=True)
class Marks:
    """Token ids of what is no word."""

    bos: int
    eos: int
    begin_image: int
    end_image: int
    image: int
    pad: int

    @classmethod
    def of(cls, tokenizer: Any) -> Marks:
        return cls(*(tokenizer.convert_tokens_to_ids(token) for token in (BOS, EOS, BEGIN_IMAGE, END_IMAGE, IMAGE, PAD)))


def drawing(prompt: Sequence[int], marks: Marks, tokens: int) -> list[int]:
    """The published sequence of image generation, without the padding after it, which nothing sees. An empty prompt is unconditional."""
    return [marks.bos, *prompt, marks.begin_image, *[marks.image] * (tokens + 1), marks.end_image, marks.eos]


def image_places(starts: Tensor, count: int, length: int) -> Tensor:
    """Which positions hold an image: starts (B,) -> (B, length) booleans. A row without one starts at `length`."""
    places = torch.arange(length, device=starts.device)
    return (places >= starts[:, None]) & (places < starts[:, None] + count)


def read_block(starts: Tensor, count: int, length: int) -> Tensor:
    """Which positions see each other where a picture is read: (B, length).

    As published they lie one further than the picture: without its time token, and with the mark after it.
    """
    return image_places(starts + 1, count, length)


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it: token ids, what they hold, its picture, and whether it was cut."""

    ids: list[int]
    spans: tuple[Span, ...]
    pixels: Tensor | None = None
    flags: tuple[str, ...] = ()

    @property
    def image(self) -> int | None:
        """Where the picture begins, with its time token; None without one."""
        return next((span.start for span in self.spans if span.modality == "image"), None)


class Showo2(Model):
    """A Show-o2 of any size.

    Args:
        network: everything but the autoencoder.
        vae: the autoencoder, `diffusers.AutoencoderKLWan`.
        tokenizer: of Qwen2.5, with the tokens that Show-o2 adds.
        system: the system prompt of understanding and text; empty for none.
        generation: sampling settings a task, where they differ from the published ones.

    Raises:
        ValueError: the tokenizer lacks a mark.
    """

    family = "showo2"
    tasks = ("text", "image")

    def __init__(
        self,
        network: Showo2Network,
        vae: Any,
        tokenizer: Any,
        name: str,
        source: Path | None = None,
        system: str = SYSTEM,
        generation: dict[Task, Generation] | None = None,
    ) -> None:
        self.network = network.eval()
        self.vae = vae.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        self.system = system
        self.config = network.config
        self._defaults: dict[Task, Generation] = {
            "text": Generation(tokens=300, temperature=0.0),
            "image": Generation(guidance=5.0, steps=50),
        }
        self._defaults |= generation or {}
        check_marks(tokenizer, SPECIAL_TOKENS, name, "Show-o2")
        if len(tokenizer) > self.config.vocabulary:
            raise ValueError(f"the tokenizer of {name} has {len(tokenizer)} tokens, its network {self.config.vocabulary}")
        self.marks = Marks.of(tokenizer)

    @property
    def module(self) -> torch.nn.Module:
        return self.network

    @property
    def networks(self) -> tuple[torch.nn.Module, ...]:
        return (self.network, self.vae)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        llm = self.network.showo.model
        return (Stack("llm", tuple(llm.layers), llm.norm),)

    def defaults(self, task: Task) -> Generation:
        return self._defaults[task]

    # ------------------------------------------------------------------------------------------------------------- prompts

    def segments(self, item: Item, task: Task) -> list[Segment]:
        """The published templates: (c) for image generation, (a) for a picture with a question.

        After a question about a picture no `<|im_end|>` is published. Text alone has no published template: it has that of Qwen2.5.
        """
        if task == "image":
            return [template(BOS), content(item.prompt), template(BEGIN_IMAGE)]
        system = f"{BOS}system\n{self.system}{EOS}\n" if self.system else ""
        if item.image is None:
            return [template(f"{system}{BOS}user\n"), content(item.prompt), template(f"{EOS}\n{BOS}assistant\n")]
        return [
            template(f"{system}{BOS}user\n{BEGIN_IMAGE}"),
            Segment(IMAGE, "image"),  # the time
            content(IMAGE * self.config.semantic_tokens, "image"),
            template(END_IMAGE),
            content(item.prompt),
            template(f"\n{BOS}assistant\n"),
        ]

    def tokens_of(self, segments: Sequence[Segment]) -> tuple[list[int], tuple[Span, ...]]:
        """Token ids and prompt spans. The published code tokenises piece by piece, so that no token reaches over two pieces."""
        pieces = [self.tokenizer(segment.text, add_special_tokens=False)["input_ids"] for segment in segments]
        held = [(s.modality, s.kind) for s, piece in zip(segments, pieces, strict=True) for _ in piece]
        return [token for piece in pieces for token in piece], spans_of(held)

    def encode(self, item: Item, task: Task, room: int = 0, truncate: bool = False) -> Encoded:
        """The prompt of an item.

        Args:
            room: positions to leave for a text response.

        Raises:
            ValueError: the prompt is empty, has words that the tokenizer does not know, or is longer than the window.
        """
        check_prompt(item, task, self.name)
        ids, spans = self.tokens_of(self.segments(item, task))
        check_words(self.tokenizer, ids, item, self.name)
        # Of a sequence that draws, four positions are for marks, two of them in the prompt.
        window = self.config.window - self.config.tokens - 3 if task == "image" else self.config.positions - room
        ids, spans, flags = cut_to_window(ids, spans, window, truncate, self.name, item.id)
        picture = item.picture()
        return Encoded(ids, spans, None if picture is None else centre_square(picture, self.seen_side), flags)

    @property
    def seen_side(self) -> int:
        """Side of a picture that is read, in pixels."""
        return self.config.semantic_grid * self.config.patch * wan_vae.reduction(self.vae)

    def see(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Latents of image prompts, sampled: (K, 3, H, W) -> (K, c, h, w)."""
        side = self.config.semantic_grid * self.config.patch
        return wan_vae.encode(self.vae, pixels.to(self.device), normals(seeds, (self.config.latent_channels, side, side)))

    def embed(self, ids: Tensor, starts: Tensor, latents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Input embeddings of text and pictures that are read (t = 1): ids (B, L) -> (B, L, D), and which positions see each other.

        Args:
            starts: (B,) where each row's picture begins, L if it has none.
            latents: (K, c, h, w) of the rows that have one.
        """
        place = starts.to(self.device), self.config.semantic_tokens + 1, ids.shape[1]
        time = torch.ones(0 if latents is None else len(latents), device=self.device)
        return self.network.embed(ids.to(self.device), image_places(*place), latents, time)[0], read_block(*place)

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
        prompts = [self.encode(item, task, generation.tokens or 0, truncate) for item in items]
        seeds = [item_seed(seed, item) for item in items]
        if task == "image":
            pictures = self.decode(self.draw(prompts, generation, seeds, trace))
            return [Response(self.config.tokens, image=p, flags=e.flags) for e, p in zip(prompts, pictures, strict=True)]
        shown = [k for k, prompt in enumerate(prompts) if prompt.pixels is not None]
        latents = None
        if shown:
            pixels = torch.stack([p.pixels for p in prompts if p.pixels is not None])
            latents = self.see(pixels, [seeds[k] ^ 1 for k in shown])  # other draws than those of the words
        written = self.write(prompts, latents, generation, seeds)
        if trace is not None:
            rows = [Row(k, p.spans + w.spans(len(p.ids))) for k, (p, w) in enumerate(zip(prompts, written, strict=True))]
            with trace.record(self.stacks[0], rows):
                self.read(prompts, [w.ids for w in written], latents)
        return [w.response(p.flags) for p, w in zip(prompts, written, strict=True)]

    def read(self, prompts: Sequence[Encoded], responses: Sequence[list[int]], latents: Tensor | None) -> Tensor:
        """The teacher-forced pass over prompts and text responses: states after the last norm, (B, L, D), padded on the right."""
        ids, _ = pad([p.ids + tail for p, tail in zip(prompts, responses, strict=True)], self.marks.pad, "right")
        starts = torch.tensor([ids.shape[1] if p.image is None else p.image for p in prompts])
        embeddings, block = self.embed(ids, starts, latents)
        return self.network.states(embeddings, additive(visible(block), self.network.dtype))

    def write(
        self, prompts: Sequence[Encoded], latents: Tensor | None, generation: Generation, seeds: Sequence[int]
    ) -> list[Written]:
        """Text responses, the rows side by side."""
        assert generation.tokens is not None and generation.temperature is not None
        temperature, chance = generation.temperature, uniforms(seeds, generation.tokens, self.device)
        ids, there = pad([p.ids for p in prompts], self.marks.pad, "left")
        length = ids.shape[1]
        starts = torch.tensor([length if p.image is None else p.image + length - len(p.ids) for p in prompts])
        embeddings, block = self.embed(ids, starts, latents)
        tokens = self.network.write(
            embeddings,
            block,
            there.to(self.device),
            lambda logits, step: draw(logits.float(), temperature, chance[:, step]),
            generation.tokens,
            self.marks.eos,
        )
        return [self._written(row, generation.tokens) for row in tokens.tolist()]

    def _written(self, ids: list[int], limit: int) -> Written:
        stop = ids.index(self.marks.eos) if self.marks.eos in ids else len(ids)
        text = self.tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()
        return Written(ids[: stop + 1], stop, text, full=stop == limit)

    # ------------------------------------------------------------------------------------------------------------- drawing

    @torch.inference_mode()
    def draw(self, prompts: Sequence[Encoded], generation: Generation, seeds: Sequence[int], trace: Trace | None = None) -> Tensor:
        """Latents of drawn pictures: B prompts -> (B, c, h, w).

        Raises:
            ValueError: fewer than two steps, which are the points of time between which the flow is followed.
        """
        assert generation.guidance is not None and generation.steps is not None
        if (points := generation.steps) < 2:
            raise ValueError(f"{self.name} draws between at least 2 points of time, got steps={points}")
        config, guide = self.config, generation.guidance != 1
        conditional = [drawing(p.ids[1:-1], self.marks, config.tokens) for p in prompts]
        unconditional = [drawing((), self.marks, config.tokens)] * (len(prompts) * guide)
        ids, _ = pad(conditional + unconditional, self.marks.pad, "right")
        ids = ids.to(self.device)
        starts = torch.tensor([row.index(self.marks.begin_image) + 1 for row in unconditional])
        starts = torch.cat([torch.tensor([len(p.ids) for p in prompts]), starts.long()]).to(self.device)
        where = image_places(starts, config.tokens + 1, ids.shape[1])
        stack = self.stacks[0]
        if trace is not None:
            with trace.record(stack, [Row(k, p.spans) for k, p in enumerate(prompts)]):
                self.read(prompts, [[]] * len(prompts), None)
        rows = [Row(k, self._drawn_spans(len(p.ids))) for k, p in enumerate(prompts)]
        side = config.grid * config.patch
        latents = self.network.draw(
            ids,
            where,
            normals(seeds, (config.latent_channels, side, side)).to(self.device),
            flow_times(points, self.device),
            generation.guidance,
            lambda step: recorded(trace, stack, [*rows, *[None] * len(unconditional)], step_name(step, points - 1)),
        )
        if trace is not None and trace.wants("clean"):
            count = len(prompts)
            embeddings, _ = self.network.embed(ids[:count], where[:count], latents, torch.ones(count, device=self.device))
            with trace.record(stack, rows, "clean"):
                self.network.states(embeddings, additive(visible(where[:count]), self.network.dtype))
        return latents

    def _drawn_spans(self, start: int) -> tuple[Span, ...]:
        """What follows a prompt: the time, the picture, and two marks."""
        time: list[tuple[Modality, Kind]] = [("image", "template")]
        picture: list[tuple[Modality, Kind]] = [("image", "content")] * self.config.tokens
        marks: list[tuple[Modality, Kind]] = [("text", "template")] * 2
        return spans_of(time + picture + marks, "response", start)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents: (B, c, h, w) -> B pictures."""
        return to_pictures(wan_vae.decode(self.vae, latents), cut=True)  # as published


def tokenizer_of(path: str, config: Showo2Config) -> Any:
    """The tokenizer in a folder or hub id, or that of the Qwen2.5 which Show-o2 was made from, with the tokens that it adds.

    Raises:
        ValueError: there is none, and it is not known which Qwen2.5 it was.
    """
    place = path if reach(path, *VOCABULARIES) else LANGUAGE_MODELS.get(config.hidden, path)
    tokenizer = load_tokenizer(place)
    known = tokenizer.get_vocab()
    if PAD not in known:
        tokenizer.add_special_tokens({"pad_token": PAD})
    if place != path:
        tokenizer.add_tokens([token for token in ADDED_TOKENS if token not in known])
    return tokenizer


def load(path: str, name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Showo2:
    """The Show-o2 of a local folder or hub id, in the layout of `showlab/show-o2-1.5B`.

    The tokenizer and the autoencoder may lie in the same folder (`vae/` or `Wan2.1_VAE.pth`); else they come from their publishers.

    Args:
        dtype: of the network; bfloat16 on a GPU and float32 on a CPU if None. The autoencoder is always float32.

    Raises:
        ValueError: a file is missing or damaged, or the hub cannot be reached; the sentence names the file.
    """
    path = str(path)
    device, kind = settled(device, dtype)
    config = Showo2Config.from_dict(read_json(path, "config.json"))
    tokenizer = tokenizer_of(path, config)
    network = filled(config, tensors_of(weight_files(path)), device, kind, name)
    vae = wan_vae.load(path, device, name)
    source = source_of(path)
    generation, system = own_settings(source)
    return Showo2(network, vae, tokenizer, name, source, SYSTEM if system is None else system, generation)
