"""BAGEL (arXiv 2505.14683) and BAGEL-RecA: one expert of a Qwen2.5-7B reads and writes, another draws by flow matching on FLUX latents.

Both attend to each other in every layer and write to one residual stream (`parts.bagel_network`); how a picture is drawn is in
`parts.bagel_flow`, the autoencoder in `parts.flux_vae`; here are the published templates, the spans, sampling and reading. There are no
roles: a text is `<|im_start|>` text `<|im_end|>`, a picture `<|vision_start|>` tokens `<|vision_end|>`, and an answer begins with another
`<|im_start|>`. A picture, marks included, stands at one rotary position and sees all of itself.

Prompt states: of a drawing, the text's positions; of a question, the picture's positions, as many as its size makes (70 x 70 patches
at most), and those of its text. They belong to the expert `und`, do not depend on the step, and are recorded once, as `single`; their
keys and values serve every step. Response states: of a drawing, the positions of the latent tokens (4096 at 1024 x 1024), which belong
to the expert `gen`, in each conditional pass, `0000`, `0001`, ..., `final`, the last (at t = 0.06 of the 50 published points, which make
49 passes; by then guidance is off), and of `clean`, one more pass on the finished latents at t = 0, as the model itself takes pictures
in; of text, the positions at which a response token is the input, in one teacher-forced pass, `single`. Stack `llm`: a state, the one
after the last norm included, is that of the expert which owns the position. The marks around a picture belong to `und` and are template.

A picture for the task `image` is changed as its text says, with guidance by text and by picture as published. It enters twice, as a
sample of the latents' posterior (from the item's seed, expert `gen`) and as it is seen; both are prompt.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation, Model, Response, item_seed
from unisonde.models.parts import flux_vae
from unisonde.models.parts.bagel_flow import EDITING, Canvas, Context, Contexts, Guidance, flow_times
from unisonde.models.parts.bagel_network import (
    KEYS,
    WHOLE,
    BagelConfig,
    BagelNetwork,
    Owners,
    filled,
    from_squares,
    squares,
    visible,
)
from unisonde.models.parts.checkpoint import empty, tensors_of, weight_files
from unisonde.models.parts.flux_vae import FluxVaeConfig
from unisonde.models.parts.pretrained import reach, read_json
from unisonde.models.parts.sampling import draw, uniforms
from unisonde.models.parts.segments import spans_of
from unisonde.models.parts.spread import DeviceMap, several, spread
from unisonde.models.parts.text import Written, cut_to_window, pad
from unisonde.models.trace import Kind, Modality, Row, Span, Stack, Trace

BOS, EOS = "<|im_start|>", "<|im_end|>"
BEGIN_IMAGE, END_IMAGE = "<|vision_start|>", "<|vision_end|>"
SPECIAL_TOKENS = (BOS, EOS, BEGIN_IMAGE, END_IMAGE)

REPOSITORY = "ByteDance-Seed/BAGEL-7B-MoT"
"""Where the files are that a folder or hub id with weights alone, such as BAGEL-RecA's, does not have."""

LLM, VIT, OWN = "llm_config.json", "vit_config.json", "unisonde.json"
WEIGHTS = ("ema", "model_bf16")
"""The weights as BAGEL and as BAGEL-RecA name them."""

MOST_PIXELS = 14 * 14 * 9 * 1024
"""Of a picture after it has been resized."""


@dataclass(frozen=True)
class Marks:
    """Token ids of what is no word."""

    bos: int
    eos: int
    begin_image: int
    end_image: int

    @classmethod
    def of(cls, tokenizer: Any) -> Marks:
        return cls(*tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))


# --------------------------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """What the positions of one sequence are to the network.

    Attributes:
        places: rotary positions.
        blocks: number of the picture that a position belongs to, marks included; -1 outside pictures.
        filled: whether it holds a picture's token.
        drawn: whether that token is of latents.
    """

    places: list[int]
    blocks: list[int]
    filled: list[bool]
    drawn: list[bool]


def arrange(spans: Sequence[Span], latents: int = 0) -> Layout:
    """The layout of a sequence, from what it holds: a picture, with the mark before and after it, takes one place.

    Args:
        latents: how many of its pictures, the first ones, are latents.
    """
    pictures = [span for span in spans if span.modality == "image" and span.kind == "content"]
    runs: list[tuple[int, int, int, bool]] = []  # words, then tokens of a picture; its number; whether it is of latents
    position = 0
    for number, span in enumerate(pictures):
        runs.append((span.start - 1 - position, len(span), number, number < latents))
        position = span.stop + 1
    last = max(span.stop for span in spans) - position
    layout = Layout([], [], [], [])
    place = 0
    for words, tokens, number, drawn in runs:
        layout.places.extend([*range(place, place + words), *[place + words] * (tokens + 2)])
        layout.blocks.extend([-1] * words + [number] * (tokens + 2))
        layout.filled.extend([False] * (words + 1) + [True] * tokens + [False])
        layout.drawn.extend([False] * (words + 1) + [drawn] * tokens + [False])
        place += words + 1
    layout.places.extend(range(place, place + last))
    for row, value in ((layout.blocks, -1), (layout.filled, False), (layout.drawn, False)):
        row.extend([value] * last)  # type: ignore[list-item]
    return layout


def read_rows(
    network: BagelNetwork,
    ids: Sequence[list[int]],
    layouts: Sequence[Layout],
    features: Sequence[Tensor],
    pad_id: int,
    side: Any,
) -> tuple[Tensor, Context]:
    """Sequences in one pass: states after the last norm, (B, L, D), and the context that they are for what follows.

    Args:
        features: the tokens of their pictures, (n, D) each, in the order in which they stand.
        side: on which rows are padded.
    """
    device = network.device
    tokens, there = (t.to(device) for t in pad(ids, pad_id, side))
    there = there.bool()
    places = pad([layout.places for layout in layouts], 0, side)[0].to(device)
    blocks = pad([layout.blocks for layout in layouts], -1, side)[0].to(device)
    full, drawn = (
        pad([list(map(int, row)) for row in rows], 0, side)[0].to(device).bool()
        for rows in ([layout.filled for layout in layouts], [layout.drawn for layout in layouts])
    )
    x = network.words(tokens).to(device)
    if features:
        x = x.masked_scatter(full[..., None], torch.cat([part.to(x) for part in features]))
    states, past = network.read(x, places, visible(blocks, there), Owners.of(drawn))
    after = torch.tensor([layout.places[-1] + 1 for layout in layouts], device=device)
    return states, Context(past, there, after)


def drawing_contexts(network: BagelNetwork, ids: Sequence[list[int]], layouts: Sequence[Layout], pad_id: int) -> Contexts:
    """The contexts of drawings from text alone: without the text there is nothing."""
    _, whole = read_rows(network, ids, layouts, [], pad_id, "right")
    return Contexts(whole, Context.nothing(len(ids), network.device))


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it: token ids, what they hold, its picture as seen and as changed, and whether it was cut."""

    ids: list[int]
    spans: tuple[Span, ...]
    pixels: Tensor | None = None
    changed: Tensor | None = None
    flags: tuple[str, ...] = ()

    def layout(self, tail: tuple[Span, ...] = ()) -> Layout:
        """With the spans of what follows it."""
        return arrange(self.spans + tail, 0 if self.changed is None else 1)


Piece = tuple[list[int], Modality, Kind]


class Bagel(Model):
    """A BAGEL of any size.

    Args:
        network: everything but the autoencoder.
        vae: the autoencoder, `diffusers.AutoencoderKL`.
        tokenizer: of Qwen2.5.
        generation: sampling settings a task, where they differ from the published ones.
        guidance: of drawing from text, but for its weight, which is a sampling setting.

    Raises:
        ValueError: the tokenizer lacks a mark or has more tokens than the network.
    """

    family = "bagel"
    tasks = ("text", "image")

    def __init__(
        self,
        network: BagelNetwork,
        vae: Any,
        tokenizer: Any,
        name: str,
        source: Path | None = None,
        generation: dict[Task, Generation] | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        self.network = network.eval()
        self.vae = vae.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        self.config = network.config
        self.guidance = guidance or Guidance()
        self._defaults: dict[Task, Generation] = {
            "text": Generation(tokens=1000, temperature=0.0),
            "image": Generation(guidance=self.guidance.text, steps=50),
        }
        self._defaults |= generation or {}
        unknown = [t for t in SPECIAL_TOKENS if tokenizer.convert_tokens_to_ids(t) in (None, tokenizer.unk_token_id)]
        if unknown:
            raise ValueError(f"the tokenizer of {name} lacks {', '.join(unknown)}: it is not BAGEL's")
        if len(tokenizer) > self.config.vocabulary:
            raise ValueError(f"the tokenizer of {name} has {len(tokenizer)} tokens, its network {self.config.vocabulary}")
        self.marks = Marks.of(tokenizer)

    @property
    def module(self) -> torch.nn.Module:
        return self.network

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return (self.network.stack,)

    @property
    def grid(self) -> tuple[int, int]:
        """The tokens of a picture that is drawn from text."""
        return (self.config.side // self.config.stride,) * 2

    def defaults(self, task: Task) -> Generation:
        return self._defaults[task]

    # ------------------------------------------------------------------------------------------------------------- prompts

    def pieces(self, item: Item, task: Task, seen: int = 0, changed: int = 0) -> list[Piece]:
        """The published template: the picture, the text, and for text the mark that an answer begins with.

        The words of a prompt are tokenised by themselves, and marks put around them. Where a picture's tokens go, the ids say nothing.

        Args:
            seen, changed: tokens of the picture as it is seen, and as latents.
        """
        marks = self.marks
        pieces: list[Piece] = []
        for tokens in filter(None, (changed, seen)):
            pieces.append(([marks.begin_image], "text", "template"))
            pieces.append(([marks.begin_image] * tokens, "image", "content"))
            pieces.append(([marks.end_image], "text", "template"))
        pieces.append(([marks.bos], "text", "template"))
        pieces.append((self.tokenizer(item.prompt, add_special_tokens=False)["input_ids"], "text", "content"))
        pieces.append(([marks.eos], "text", "template"))
        if task == "text":
            pieces.append(([marks.bos], "text", "template"))
        return pieces

    def encode(self, item: Item, task: Task, room: int = 1, truncate: bool = False) -> Encoded:
        """The prompt of an item.

        Args:
            room: rotary positions to leave for the response.

        Raises:
            ValueError: the prompt is empty, has words that the tokenizer does not know, or is longer than the window.
        """
        if not item.prompt.strip() and (item.image is None or task == "image"):
            raise ValueError(f"item {item.id!r} has an empty prompt")
        config, picture = self.config, item.picture()
        seen = changed = None
        if picture is not None:
            # As published: first for latents, and what comes of that for the tower.
            picture = resized(picture, config.drawn_sizes, config.stride)
            changed = to_pixels(picture) if task == "image" else None
            seen = to_pixels(resized(picture, config.vision_sizes, config.vision_patch))
        pieces = self.pieces(item, task, tokens_of(seen, config.vision_patch), tokens_of(changed, config.stride))
        ids = [token for piece, _, _ in pieces for token in piece]
        spans = spans_of([(modality, kind) for piece, modality, kind in pieces for _ in piece])
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids:
            words = dict.fromkeys(re.findall(r"\w+|[^\w\s]", item.prompt))
            strange = [w for w in words if self.tokenizer.convert_tokens_to_ids(w.lower()) == unknown]
            raise ValueError(
                f"{self.name} does not know the words {', '.join(strange[:8])} of item {item.id!r}; it was trained on few"
            )
        # A picture takes one place of the window, however many positions it has.
        spare = sum(len(span) + 1 for span in spans if span.modality == "image")
        ids, spans, flags = cut_to_window(ids, spans, config.positions - room + spare, truncate, self.name, item.id)
        return Encoded(ids, spans, seen, changed, flags)

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
        room = 1 if task == "image" else generation.tokens or 0
        prompts = [self.encode(item, task, room, truncate) for item in items]
        seeds = [item_seed(seed, item) for item in items]
        if task == "image":
            drawn = self.draw(prompts, generation, seeds, trace)
            return [
                Response(latents[0].numel() // self.config.latent_patch**2, image=self.decode(latents), flags=p.flags)
                for p, latents in zip(prompts, drawn, strict=True)
            ]
        features = [self.network.seen(p.pixels.to(self.device)) for p in prompts if p.pixels is not None]
        written = self.write(prompts, features, generation, seeds)
        if trace is not None:
            rows = [Row(k, p.spans + w.spans(len(p.ids))) for k, (p, w) in enumerate(zip(prompts, written, strict=True))]
            with trace.record(self.network.stack, rows):
                self.read(prompts, [w.ids for w in written], features)
        return [w.response(p.flags) for p, w in zip(prompts, written, strict=True)]

    def read(self, prompts: Sequence[Encoded], responses: Sequence[list[int]], features: Sequence[Tensor]) -> Tensor:
        """The teacher-forced pass over prompts and text responses: states after the last norm, (B, L, D), padded on the right."""
        pairs = list(zip(prompts, responses, strict=True))
        layouts = [p.layout((Span(len(p.ids), len(p.ids) + len(tail), "response", "text"),)) for p, tail in pairs]
        return read_rows(self.network, [p.ids + tail for p, tail in pairs], layouts, features, self.marks.eos, "right")[0]

    def write(
        self, prompts: Sequence[Encoded], features: Sequence[Tensor], generation: Generation, seeds: Sequence[int]
    ) -> list[Written]:
        """Text responses, the rows side by side."""
        assert generation.tokens is not None and generation.temperature is not None
        temperature, chance = generation.temperature, uniforms(seeds, generation.tokens, self.device)
        layouts = [p.layout() for p in prompts]
        states, context = read_rows(self.network, [p.ids for p in prompts], layouts, features, self.marks.eos, "left")
        tokens = self.network.write(
            states[:, -1],
            context.past or (),
            context.places,
            context.there,
            lambda logits, step: draw(logits, temperature, chance[:, step]),
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
    def draw(
        self, prompts: Sequence[Encoded], generation: Generation, seeds: Sequence[int], trace: Trace | None = None
    ) -> list[Tensor]:
        """Latents of drawn pictures, (c, h, w) each. Pictures of one size are drawn side by side.

        Raises:
            ValueError: fewer than two steps, which are the points of time between which the flow is followed.
        """
        if generation.steps is None or generation.steps < 2:
            raise ValueError(f"{self.name} draws between at least 2 points of time, got steps={generation.steps}")
        sizes: dict[tuple[int, ...] | None, list[int]] = defaultdict(list)
        for k, prompt in enumerate(prompts):
            sizes[None if prompt.changed is None else tuple(prompt.changed.shape)].append(k)
        drawn: dict[int, Tensor] = {}
        for members in sizes.values():
            drawn |= self._draw(prompts, members, generation, seeds, trace)
        return [drawn[k] for k in range(len(prompts))]

    def _draw(
        self, prompts: Sequence[Encoded], members: list[int], generation: Generation, seeds: Sequence[int], trace: Trace | None
    ) -> dict[int, Tensor]:
        """Of the prompts `members`, whose pictures have one size."""
        assert generation.guidance is not None and generation.steps is not None
        config, points, shown = self.config, generation.steps, [prompts[k] for k in members]
        record = _recorder(trace, self.network.stack)
        prompt_rows = [Row(k, prompts[k].spans) for k in members]
        if shown[0].changed is None:
            grid, guidance = self.grid, self.guidance
            with record("single", prompt_rows):
                contexts = drawing_contexts(self.network, [p.ids for p in shown], [p.layout() for p in shown], self.marks.eos)
        else:
            grid = (shown[0].changed.shape[1] // config.stride, shown[0].changed.shape[2] // config.stride)
            guidance = EDITING
            contexts = self._editing_contexts(shown, [seeds[k] ^ 1 for k in members], lambda: record("single", prompt_rows))
        canvas = Canvas(self.network, self.marks.begin_image, self.marks.end_image, grid)
        marks = [Span(at, at + 1, "response", "text", "template") for at in (0, canvas.tokens + 1)]
        rows = [Row(k, (marks[0], Span(1, canvas.tokens + 1, "response", "image"), marks[1])) for k in members]
        latents = canvas.draw(
            contexts,
            normals([seeds[k] for k in members], (canvas.tokens, config.values)).to(self.device),
            flow_times(points),
            replace(guidance, text=generation.guidance),
            lambda step: record("final" if step == points - 2 else f"{step:04d}", rows),
        )
        if trace is not None and trace.wants("clean"):
            with record("clean", rows):
                canvas.velocity(latents, torch.zeros(()), contexts.whole)
        return dict(zip(members, from_squares(latents, grid, config.latent_patch), strict=True))

    def _editing_contexts(
        self, prompts: Sequence[Encoded], seeds: Sequence[int], around: Callable[[], AbstractContextManager[Any]]
    ) -> Contexts:
        """The contexts of pictures that are changed: with all, without the text, and the text alone."""
        features: list[Tensor] = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            assert prompt.changed is not None and prompt.pixels is not None
            features += [self.taken_in(prompt.changed, seed), self.network.seen(prompt.pixels.to(self.device))]
        with around():
            _, whole = read_rows(
                self.network, [p.ids for p in prompts], [p.layout() for p in prompts], features, self.marks.eos, "right"
            )
        # Each prompt is cut behind its picture, which is what is left without the text; what follows is left without the picture.
        cuts = [(p, [s.stop for s in p.spans if s.modality == "image"][-1] + 1) for p in prompts]
        shown = [arrange(spans_of(_held(p.spans)[:cut]), 1) for p, cut in cuts]
        told = [arrange(spans_of(_held(p.spans)[cut:])) for p, cut in cuts]
        _, without_text = read_rows(self.network, [p.ids[:cut] for p, cut in cuts], shown, features, self.marks.eos, "right")
        _, without_image = read_rows(self.network, [p.ids[cut:] for p, cut in cuts], told, [], self.marks.eos, "right")
        return Contexts(whole, without_text, without_image)

    def taken_in(self, pixels: Tensor, seed: int) -> Tensor:
        """A picture as latent tokens at t = 0, a sample of the posterior: (3, H, W) -> (n, D)."""
        config = self.config
        shape = (config.latent_channels, *(side // config.reduction for side in pixels.shape[1:]))
        latents = flux_vae.encode(self.vae, pixels[None].to(self.vae.device), normals([seed], shape))
        grid = (pixels.shape[1] // config.stride, pixels.shape[2] // config.stride)
        tokens = squares(latents, config.latent_patch).to(self.device)
        return self.network.drawn(tokens, torch.zeros(1, device=self.device), grid)[0]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Image.Image:
        """The picture of latents (c, h, w)."""
        pixels = flux_vae.decode(self.vae, latents[None].to(self.vae.device)).float()[0] * 0.5 + 0.5
        values = (pixels.clamp(0, 1) * 255).to(torch.uint8)  # cut down, not rounded, as published
        return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


def _held(spans: Sequence[Span]) -> list[tuple[Modality, Kind]]:
    return [(span.modality, span.kind) for span in spans for _ in range(len(span))]


def _recorder(trace: Trace | None, stack: Stack) -> Callable[[str, Sequence[Row | None]], AbstractContextManager[None]]:
    return lambda step, rows: nullcontext() if trace is None else trace.record(stack, rows, step)


def normals(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, float32: (B, *shape). Row b depends on `seeds[b]` alone; drawn on the CPU, the same for every device."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


# -------------------------------------------------------------------------------------------------------------------- pictures


def resized(picture: Image.Image, sizes: tuple[int, int], stride: int) -> Image.Image:
    """An RGB picture with sides that are multiples of `stride`, as published (bicubic).

    The longest side is made no longer than `sizes[0]`, then the shortest no shorter than `sizes[1]`; what is too large after that is made
    smaller again, so that a very long picture ends with a short side below `sizes[1]`.
    """
    longest, shortest = sizes

    def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
        width, height = (max(stride, round(round(side * scale) / stride) * stride) for side in size)
        return width, height

    size = scaled(picture.size, max(min(longest / max(picture.size), 1.0), shortest / min(picture.size)))
    if size[0] * size[1] > MOST_PIXELS:
        size = scaled(size, MOST_PIXELS / (size[0] * size[1]))
    if max(size) > longest:
        size = scaled(size, longest / max(size))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)


def to_pixels(picture: Image.Image) -> Tensor:
    """An RGB picture as (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)


def tokens_of(pixels: Tensor | None, stride: int) -> int:
    """Tokens of a picture; 0 without one."""
    return 0 if pixels is None else (pixels.shape[1] // stride) * (pixels.shape[2] // stride)


# --------------------------------------------------------------------------------------------------------------------- loading


def recognised(path: str) -> bool:
    """Whether a folder or hub id is in BAGEL's layout. Its config.json says nothing, and is no valid JSON as published."""
    return reach(path, LLM) is not None and reach(path, VIT) is not None


def load(path: str, name: str, device: str | torch.device | DeviceMap | None = None, dtype: torch.dtype | None = None) -> Bagel:
    """The BAGEL of a local folder or hub id, in the layout of `ByteDance-Seed/BAGEL-7B-MoT`.

    What is not there beside the weights (`ema.safetensors`, or `model_bf16.safetensors` of BAGEL-RecA) comes from that repository.

    Args:
        device: one device; or `auto` or a device map of `accelerate`, for several (`parts.spread`).
        dtype: of the network; bfloat16 on a GPU and float32 on a CPU if None. The autoencoder is always float32.

    Raises:
        ValueError: a file is missing or damaged, or the hub cannot be reached; the sentence names the file.
    """
    path = str(path)
    found = reach(path, OWN)  # a twin's: what differs from the published model
    own = json.loads(found.read_text(encoding="utf-8")) if found is not None else {}
    config = BagelConfig.from_dicts(read_json(home(path, LLM), LLM), read_json(home(path, VIT), VIT), own.get("sizes"))
    sizes: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in own.get("autoencoder", {}).items()
    }
    if several(device):
        network = empty(lambda: BagelNetwork(config))
        main = spread(network, weights_of(path), KEYS, device, WHOLE, dtype, name)  # type: ignore[arg-type]
        network.main = main
    else:
        main = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
        kind = dtype or (torch.float32 if main.type == "cpu" else torch.bfloat16)
        network = filled(config, tensors_of(weights_of(path)), main, kind, name)
    files = weight_files(home(path, flux_vae.FILE), flux_vae.FILE)
    vae = flux_vae.filled(FluxVaeConfig(**sizes), tensors_of(files), main, name)
    source = weights_of(path)[0].parent
    generation = {task: Generation(**values) for task, values in own.get("generation", {}).items()}
    guidance = Guidance(**own["guidance"]) if "guidance" in own else None
    return Bagel(network, vae, tokenizer_of(path), name, source, generation, guidance)


def home(path: str, *files: str) -> str:
    """Where the first of these files is: in a folder or hub id itself, or in BAGEL's repository.

    Raises:
        ValueError: it is in neither.
    """
    for place in (path, REPOSITORY):
        if reach(place, *files) is not None:
            return place
    raise ValueError(f"{files[0]} is neither in {path!r} nor can it be had from the hub; put that of {REPOSITORY} there")


def weights_of(path: str) -> list[Path]:
    """The weight files of a folder or hub id.

    Raises:
        ValueError: there are none, or a folder holds both BAGEL's and BAGEL-RecA's, which are two models.
    """
    if Path(path).is_dir() and all(reach(path, f"{stem}.safetensors") for stem in WEIGHTS):
        names = " and ".join(f"{stem}.safetensors" for stem in WEIGHTS)
        raise ValueError(f"{path!r} holds {names}, the weights of two models; leave one of them there")
    return weight_files(path, *WEIGHTS)


def tokenizer_of(path: str) -> Any:
    """The tokenizer of a folder or hub id, or BAGEL's. It is opened by its own files alone, for config.json is no JSON as published.

    Raises:
        ValueError: there is none, or its file is damaged.
    """
    place = home(path, "tokenizer.json", "vocab.json")
    kind: Any = PreTrainedTokenizerFast if reach(place, "tokenizer.json") is not None else Qwen2Tokenizer
    try:
        return kind.from_pretrained(place)
    except Exception as error:  # the parser of tokenizer.json raises bare exceptions
        raise ValueError(
            f"the tokenizer of {place!r} cannot be read ({str(error).strip().splitlines()[0]}); download it again"
        ) from error
