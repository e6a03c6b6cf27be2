"""Harmon (arXiv 2503.21979) and its RecA variant (arXiv 2509.07295): a Qwen2.5 that reads and draws pictures through one MAR encoder.

A picture is 32 x 32 continuous tokens (KL-16 latents of 512 x 512 pixels). What of it is there goes through the encoder, with 64
buffer tokens that stand for nothing, and into the language model: first the image tokens row by row, then the buffers. Reading shows all
of it. Drawing begins with the buffers alone and makes the tokens in random order, some at every step, fewer at first; a decoder
and a diffusion head make them from what the language model says. The network is in `parts.harmon_network`, `parts.mar` and
`parts.token_diffusion`, the autoencoder in `parts.kl16`; here are the published templates, the spans, sampling and reading.

Prompt states: of a drawing, the text's positions, pass `single`: attention is causal and the text stands in front, so they do not depend
on the step. Of a question, the picture's positions (1024) and those of its text. Response states: of a drawing, the image tokens that
are visible in each step, `0000` (none), `0001`, ..., `final` (999 of 1024 with the published 64 steps), and in `clean`, one more pass
in which all are, which sampling never makes; of text, the positions at which a response token is the input, in one teacher-forced pass,
`single`, over prompt and response (DESIGN.md, decision 3). Stack `llm`; MAR's layers are not shown. Buffers and the words of the
template ("Generate an image: ", too) are template. Guidance: the conditional branch is read.

`Generation.steps` are the steps that make tokens; the diffusion head takes its own 100 for each token. `Generation.temperature` of a
drawing scales the noise that the head adds, as published; what it begins from is noise at any temperature.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation, Model, Response, item_seed
from unisonde.models.parts import kl16
from unisonde.models.parts.checkpoint import Keys, fill, tensors_of, weight_files
from unisonde.models.parts.harmon_network import Drawing, HarmonConfig, HarmonNetwork, filled, normals, without
from unisonde.models.parts.mar import to_latents, to_tokens
from unisonde.models.parts.pictures import to_pictures
from unisonde.models.parts.pretrained import VOCABULARIES, load_tokenizer, own_settings, reach, read_json, settled
from unisonde.models.parts.prompts import check_marks, check_prompt, check_words
from unisonde.models.parts.segments import Segment, content, encode, spans_of, template
from unisonde.models.parts.text import Written, cut_to_window, pad, write_text
from unisonde.models.trace import Kind, Modality, Row, Span, Stack, Trace, recorded, step_name

START, END, IMAGE = "<|im_start|>", "<|im_end|>", "<image>"
"""The marks of Qwen2.5's conversations, and the placeholder of image features, which Harmon adds to the vocabulary (id 151665)."""

SPECIAL_TOKENS = (START, END, IMAGE)

ASKED, UNASKED = "Generate an image: ", "Generate an image."
"""The published words in front of what is to be drawn, and those of the unconditional branch."""

GREY = (127, 127, 127)
"""What pictures are made square with."""

KL16, KL16_REPOSITORY = "kl16.ckpt", "wusize/harmon"
"""The autoencoder's file, where the weights do not hold it, and where it is published."""

LANGUAGE_MODELS = {896: "Qwen/Qwen2.5-0.5B-Instruct", 1536: "Qwen/Qwen2.5-1.5B-Instruct"}
"""Width -> where the tokenizer is, for weights that come without one."""


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it: token ids, what they hold, the positions of its picture (buffers too), and whether it was cut."""

    ids: list[int]
    spans: tuple[Span, ...]
    picture: range = range(0)
    pixels: Tensor | None = None
    flags: tuple[str, ...] = ()


class Harmon(Model):
    """A Harmon of any size.

    Args:
        network: everything but the autoencoder.
        vae: the autoencoder, `diffusers.AutoencoderKL`.
        tokenizer: of Qwen2.5, with `<image>`.
        generation: sampling settings a task, where they differ from the published ones.

    Raises:
        ValueError: the parts do not belong together.
    """

    family = "harmon"
    tasks = ("text", "image")

    def __init__(
        self,
        network: HarmonNetwork,
        vae: Any,
        tokenizer: Any,
        name: str,
        source: Path | None = None,
        generation: dict[Task, Generation] | None = None,
    ) -> None:
        self.network = network.eval()
        self.vae = vae.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        self.config = config = network.config
        self._defaults: dict[Task, Generation] = {
            "text": Generation(tokens=1024, temperature=0.0),
            "image": Generation(temperature=1.0, guidance=3.0, steps=64),
        }
        self._defaults |= generation or {}
        check_marks(tokenizer, SPECIAL_TOKENS, name, "Harmon")
        if len(tokenizer) > config.llm.vocab_size:
            raise ValueError(f"the tokenizer of {name} has {len(tokenizer)} tokens, its network {config.llm.vocab_size}")
        if (kl16.stride(vae), vae.config.latent_channels) != (config.mar.vae_stride, config.mar.vae_embed_dim):
            raise ValueError(
                f"the autoencoder of {name} makes {vae.config.latent_channels} channels of {kl16.stride(vae)} pixels a side, its "
                f"network takes {config.mar.vae_embed_dim} of {config.mar.vae_stride}"
            )
        self.end_id = tokenizer.convert_tokens_to_ids(END)

    @property
    def module(self) -> nn.Module:
        return self.network

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.network, self.vae)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return (self.network.stack,)

    @property
    def side(self) -> int:
        """The side of a picture in pixels, read or drawn."""
        return self.config.grid * self.config.mar.patch_size * self.config.mar.vae_stride

    def defaults(self, task: Task) -> Generation:
        return self._defaults[task]

    # ------------------------------------------------------------------------------------------------------------- prompts

    def segments(self, item: Item, task: Task) -> list[Segment]:
        """The published template, Qwen2.5's without its system turn, around (a) a picture with a question, (b) text, (c) a wish.

        An empty wish is the unconditional branch's.
        """
        before, after = template(f"{START}user\n"), template(f"{END}\n{START}assistant\n")
        if task == "image":
            return [before, *([template(ASKED), content(item.prompt)] if item.prompt else [template(UNASKED)]), after]
        if item.image is None:
            return [before, content(item.prompt), after]
        picture = content(IMAGE * self.config.tokens, "image"), Segment(IMAGE * self.config.buffers, "image")
        return [before, *picture, template("\n"), content(item.prompt), after]

    def assemble(self, item: Item, task: Task) -> Encoded:
        """The prompt of an item as it is, without a look at its picture."""
        ids, spans = encode(self.tokenizer, self.segments(item, task), special=False)
        shown = [span for span in spans if span.modality == "image"]
        return Encoded(ids, spans, range(shown[0].start, shown[-1].stop) if shown else range(0))

    def encode(self, item: Item, task: Task, room: int = 0, truncate: bool = False) -> Encoded:
        """The prompt of an item.

        Args:
            room: positions to leave for a text response.

        Raises:
            ValueError: the prompt is empty, has words that the tokenizer does not know, or is longer than the window.
        """
        check_prompt(item, task, self.name)
        made = self.assemble(item, task)
        check_words(self.tokenizer, made.ids, item, self.name)
        window = self.config.window if task == "image" else self.config.llm.max_position_embeddings - room
        ids, spans, flags = cut_to_window(made.ids, made.spans, window, truncate, self.name, item.id)
        picture = item.picture()
        return Encoded(ids, spans, made.picture, None if picture is None else prepare(picture, self.side), flags)

    def tokens_of(self, pixels: Tensor) -> Tensor:
        """Image tokens of pictures, the mode of their latents: (B, 3, H, W) -> (B, n, c)."""
        return to_tokens(kl16.encode(self.vae, pixels.to(self.device)), self.config.mar.patch_size)

    def embed(self, prompts: Sequence[Encoded], features: Tensor | None) -> list[Tensor]:
        """Input embeddings, (L, D) a prompt, with `features` (pictures, n + b, D) where the pictures are."""
        pictures = iter(features if features is not None else ())
        embedded = []
        for prompt in prompts:
            words = self.network.embed(torch.tensor(prompt.ids, device=self.device))
            if prompt.picture:
                words = torch.cat([words[: prompt.picture.start], next(pictures), words[prompt.picture.stop :]])
            embedded.append(words)
        return embedded

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
        pixels = [p.pixels for p in prompts if p.pixels is not None]
        embedded = self.embed(prompts, self.network.see(self.tokens_of(torch.stack(pixels)))[1] if pixels else None)
        written = self.write(prompts, embedded, generation, seeds)
        if trace is not None:
            rows = [Row(k, p.spans + w.spans(len(p.ids))) for k, (p, w) in enumerate(zip(prompts, written, strict=True))]
            with trace.record(self.stacks[0], rows):
                self.read(embedded, [w.ids for w in written])
        return [w.response(p.flags) for p, w in zip(prompts, written, strict=True)]

    def read(self, embedded: Sequence[Tensor], responses: Sequence[list[int]]) -> Tensor:
        """The teacher-forced pass over prompts and text responses: states after the last norm, (B, L, D), padded on the right.

        Padding needs no mask: attention is causal.
        """
        tails = [self.network.embed(torch.tensor(ids, dtype=torch.long, device=self.device)) for ids in responses]
        whole = pad_sequence([torch.cat(pair) for pair in zip(embedded, tails, strict=True)], batch_first=True)
        return self.network.llm.model(inputs_embeds=whole, use_cache=False).last_hidden_state

    def write(
        self, prompts: Sequence[Encoded], embedded: Sequence[Tensor], generation: Generation, seeds: Sequence[int]
    ) -> list[Written]:
        """Text responses, the rows side by side."""
        ids, mask = pad([p.ids for p in prompts], self.end_id, "left")
        rows = pad_sequence(list(embedded), batch_first=True, padding_side="left")
        inputs = (ids.to(self.device), mask.to(self.device), generation, seeds, self.end_id, self.end_id, rows)
        return write_text(self.network.llm, self.tokenizer, *inputs)

    # ------------------------------------------------------------------------------------------------------------- drawing

    @torch.inference_mode()
    def draw(self, prompts: Sequence[Encoded], generation: Generation, seeds: Sequence[int], trace: Trace | None = None) -> Tensor:
        """Image tokens of drawn pictures: B prompts -> (B, n, c)."""
        assert generation.guidance is not None and generation.temperature is not None and generation.steps is not None
        count, steps, tokens = len(prompts), generation.steps, self.config.tokens
        copies = 1 + (generation.guidance != 1)
        unread: list[Row | None] = [None] * (count * (copies - 1))
        nothing = self.assemble(Item("", "", ""), "image").ids
        drawing = Drawing(self.network, *pad([p.ids for p in prompts] + [nothing] * len(unread), self.end_id, "right"))
        stack = self.stacks[0]
        with recorded(trace, stack, [Row(k, p.spans) for k, p in enumerate(prompts)] + unread):
            drawing.read_prompts()

        def shown(visible: int) -> list[Row | None]:
            return [Row(k, self._drawn_spans(visible)) for k in range(count)] + unread

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        orders = torch.stack([torch.randperm(tokens, generator=generator) for generator in generators]).to(self.device)

        def noise(each: int) -> Tensor:
            drawn = normals(generators, 1 + len(self.network.mar.diffloss.schedule), each, self.config.mar.channels)
            return drawn.transpose(0, 1).flatten(1, 2).repeat(1, copies, 1).to(self.device)

        made = drawing.draw(
            orders,
            steps,
            noise,
            generation.temperature,
            generation.guidance,
            lambda step, visible: recorded(trace, stack, shown(visible), step_name(step, steps)),
        )
        if trace is not None and trace.wants("clean"):
            _, features = self.network.see(made)
            with trace.record(stack, shown(tokens), "clean"):
                drawing.states(features)
        return made[:count]

    def _drawn_spans(self, visible: int) -> tuple[Span, ...]:
        """What a pass of drawing holds: the visible tokens, row by row, and the buffers."""
        tokens: list[tuple[Modality, Kind]] = [("image", "content")] * visible
        buffers: list[tuple[Modality, Kind]] = [("image", "template")] * self.config.buffers
        return spans_of(tokens + buffers, "response")

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> list[Image.Image]:
        """Pictures of image tokens: (B, n, c) -> B pictures."""
        return to_pictures(kl16.decode(self.vae, to_latents(tokens, self.config.mar.patch_size)))


def prepare(picture: Image.Image, side: int) -> Tensor:
    """An RGB picture as published: made square with grey, resized to `side` (bicubic), [-1, 1]: (3, side, side)."""
    width, height = picture.size
    long = max(width, height)
    if width != height:
        square = Image.new("RGB", (long, long), GREY)
        square.paste(picture, ((long - width) // 2, (long - height) // 2))
        picture = square
    if long != side:
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------- loading


def load(path: str, name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Harmon:
    """The Harmon of a local folder, a hub id, or one weight file in either (`wusize/harmon/harmon_1.5b.pth`).

    Opened are the layout of `wusize/Harmon-1_5B` (`config.json`, weights, tokenizer) and that of `wusize/harmon`, where `.pth` files
    hold neither the autoencoder, which is beside them as `kl16.ckpt`, nor a tokenizer. The size is told by the weights. Other weights
    of the same network (RecA) need no more than either. What is not there comes from its publisher.

    Args:
        dtype: of the network; bfloat16 on a GPU and float32 on a CPU if None. The autoencoder is always float32.

    Raises:
        ValueError: a file is missing or damaged, holds other tensors than this model's, or the hub cannot be reached.
    """
    device, kind = settled(device, dtype)
    folder, files = locate(str(path))
    raw = read_json(folder, "config.json") if reach(folder, "config.json") else {}
    config = HarmonConfig.of(raw, _width(files, name))
    tokenizer = tokenizer_of(folder, config)
    inside: dict[str, Tensor] = {}
    network = filled(config, without(tensors_of(files), "vae.", inside), device, kind, name)
    vae = load_vae(folder, inside, device, name)
    source = files[0].parent
    return Harmon(network, vae, tokenizer, name, source, own_settings(source)[0])


def locate(path: str) -> tuple[str, list[Path]]:
    """The folder or hub id of a model, and its weight files.

    Raises:
        ValueError: there are none, or the files of several models and none is named.
    """
    if Path(path).is_file():
        return str(Path(path).parent), [Path(path)]
    if match := re.fullmatch(r"([\w.-]+/[\w.-]+)/([\w.-]+\.(?:pth|safetensors|bin))", path):
        return match[1], weight_files(match[1], match[2])
    for stem in ("model", "pytorch_model"):
        if any(reach(path, stem + end) for end in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")):
            return path, weight_files(path, stem)
    named = [file for file in _listed(path) if file.endswith((".pth", ".safetensors", ".bin"))]
    if len(named) > 1:
        raise ValueError(f"{path!r} holds several models; name one of them: {', '.join(f'{path}/{file}' for file in named)}")
    return path, weight_files(path, *(named or ["model", "pytorch_model"]))


def _listed(path: str) -> list[str]:
    """The files at the top of a folder or hub id, none if the hub cannot be reached."""
    if Path(path).is_dir():
        return sorted(file.name for file in Path(path).iterdir() if file.is_file())
    try:
        return sorted(file for file in HfApi().list_repo_files(path) if "/" not in file)
    except Exception:  # not reached, or not a name that the hub allows: each has errors of its own
        return []


def _width(files: Sequence[Path], name: str) -> int:
    """The width of the language model in weight files.

    Raises:
        ValueError: they hold none.
    """
    for key, tensor in tensors_of(files):
        if re.fullmatch(r"llm\.model\..*norm\.weight", key) and tensor.ndim == 1:
            return len(tensor)
    raise ValueError(f"the checkpoint of {name} holds no llm.model.norm.weight; it is not this model's, or not whole")


def tokenizer_of(folder: str, config: HarmonConfig) -> Any:
    """The tokenizer in a folder or hub id, or that of the Qwen2.5 which Harmon was made from, with the placeholder that it adds.

    Raises:
        ValueError: there is none, and it is not known which Qwen2.5 it was.
    """
    published = LANGUAGE_MODELS.get(config.llm.hidden_size, "")
    last = Path(published).name
    places = [folder, *(str(Path(folder, *way)) for way in ((last,), ("..", last)) if published and Path(folder).is_dir())]
    place = next((p for p in places if reach(p, "config.json") and reach(p, *VOCABULARIES)), published or folder)
    tokenizer = load_tokenizer(place)
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE], special_tokens=True)
    return tokenizer


def load_vae(folder: str, inside: dict[str, Tensor], device: str | torch.device, name: str) -> Any:
    """The autoencoder that goes with the model of a folder or hub id, in float32.

    Taken is what the weights hold of it, or what lies in `vae/` beside them in the layout of `diffusers` (a twin's), or `kl16.ckpt`
    there, or that file from its publisher.

    Args:
        inside: the autoencoder's tensors among the weights.

    Raises:
        ValueError: there is none, or its tensors do not fill the network exactly.
    """
    if inside:
        return kl16.filled(inside.items(), device, name)
    if reach(folder, "vae/config.json") is not None:
        network = kl16.build(read_json(folder, "vae/config.json"))
        files = weight_files(folder, "vae/diffusion_pytorch_model")
        fill(network, tensors_of(files), Keys(), device, torch.float32, f"{name} (autoencoder)")
        return network.eval()
    where = next((place for place in (folder, KL16_REPOSITORY) if reach(place, KL16) is not None), None)
    if where is None:
        raise ValueError(
            f"the autoencoder of {name} is neither among its weights nor in {folder!r} nor can it be had from the hub; "
            f"put {KL16} of {KL16_REPOSITORY} there"
        )
    return kl16.filled(tensors_of(weight_files(where, KL16)), device, name)
