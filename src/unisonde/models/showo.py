"""Show-o (arXiv 2408.12528): one Phi-1.5 that writes text word by word and draws pictures by unmasking their codes all at once.

Words and image codes (MAGVIT-v2) are tokens of one vocabulary. Drawing begins with every code masked; each step guesses all of them,
keeps the surest and masks the rest again. The picture sees all of itself and the prompt, the prompt only what is before it, so the
prompt runs once and its keys and values serve every step. Pictures that are read stand in front as codes, or as CLIP features in the
variants `-w-clip-vit`, and every later position sees all of them.

Prompt states: of a drawing, the text's positions, pass `single`; they cannot depend on the step. Of a question, the positions of the
picture (256 or 1024 codes, or 576 CLIP features) and of the question's text. Response states: of a drawing, the code positions in the
denoising steps `0000`, `0001`, ..., `final`, at which the last guess is made with the fewest masks, and in `clean`, one more pass on the
finished codes, which sampling never makes; of text, the positions at which a response token is the input, in one teacher-forced
pass, `single`, over prompt and response (DESIGN.md, decision 3). Stack `llm`. Begin- and end-of-image are template. Guidance: the
conditional branch is read.

`Generation.guidance` has the meaning that it has everywhere here, u + g (c - u), 1 being none. The published scale w writes the same
as (1 + w) c - w u, so that g = 1 + w: the published 5 is a guidance of 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionModel, DynamicCache
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation, Model, Response, item_seed
from unisonde.models.parts import magvit2
from unisonde.models.parts.checkpoint import empty, fill, tensors_of, weight_files
from unisonde.models.parts.magvit2 import Magvit2, Magvit2Config
from unisonde.models.parts.pictures import centre_square, to_pictures
from unisonde.models.parts.pretrained import (
    VOCABULARIES,
    load_network,
    load_tokenizer,
    own_settings,
    part,
    reach,
    read_json,
    settled,
    source_of,
)
from unisonde.models.parts.prompts import check_prompt, check_words
from unisonde.models.parts.sampling import draw, guided, uniforms
from unisonde.models.parts.segments import content, encode, spans_of, template
from unisonde.models.parts.showo_network import PhiSizes, Showo, ShowoConfig, keys_of, visibility
from unisonde.models.parts.text import Written, cut_to_window, pad
from unisonde.models.trace import Kind, Modality, Row, Span, Stack, Trace, recorded, step_name

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The published system prompt of the variants with CLIP; the others have none."""

TEXT, IMAGE_TOKENIZER, CLIP = "microsoft/phi-1_5", "showlab/magvitv2", "openai/clip-vit-large-patch14-336"
"""Where the parts are that a published checkpoint only names."""

WEIGHTS = ("pytorch_model", "model", "diffusion_pytorch_model")
"""Names that weight files go by; the first is the published one."""


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it.

    Attributes:
        ids: token ids; padding where a picture's codes or features go.
        picture: those positions, empty without a picture.
        everywhere: the positions that every other one sees.
        pixels: the picture's pixel values.
    """

    ids: list[int]
    spans: tuple[Span, ...]
    picture: range = range(0)
    everywhere: range = range(0)
    pixels: Tensor | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clip:
    """The vision tower of a variant with CLIP: the states before the last layer, without the class token."""

    network: CLIPVisionModel
    processor: Any

    @property
    def features(self) -> int:
        sizes: Any = self.network.config
        return (sizes.image_size // sizes.patch_size) ** 2

    def pixels(self, picture: Image.Image) -> Tensor:
        return self.processor(picture, return_tensors="pt")["pixel_values"][0]

    def see(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, features, width)."""
        seen = self.network(pixels.to(self.network.device, self.network.dtype), output_hidden_states=True)
        return seen.hidden_states[-2][:, 1:]


class ShowO(Model):
    """A Show-o of any size.

    Args:
        network: the transformer.
        image_codes: the image tokenizer.
        tokenizer: of its text.
        clip: the vision tower, for a variant with CLIP.
        generation: sampling settings a task, where they differ from the published ones.

    Raises:
        ValueError: the parts do not belong together.
    """

    family = "showo"
    tasks = ("text", "image")

    def __init__(
        self,
        network: Showo,
        image_codes: Magvit2,
        tokenizer: Any,
        name: str,
        source: Path | None = None,
        clip: Clip | None = None,
        generation: dict[Task, Generation] | None = None,
    ) -> None:
        self.network = network.eval()
        self.image_codes = image_codes.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        self.clip = clip
        self.config = config = network.config
        self._defaults: dict[Task, Generation] = {
            "text": Generation(tokens=100, temperature=0.0),
            "image": Generation(temperature=1.0, guidance=6.0, steps=50),
        }
        self._defaults |= generation or {}
        if len(tokenizer) != config.llm_vocab_size:
            raise ValueError(f"the tokenizer of {name} has {len(tokenizer)} tokens, its Show-o {config.llm_vocab_size} words")
        if config.w_clip_vit != (clip is not None):
            raise ValueError(f"{name} {'needs' if config.w_clip_vit else 'takes no'} CLIP features")
        if 2**image_codes.config.bits != config.codebook_size:
            raise ValueError(f"the image tokenizer of {name} has {2**image_codes.config.bits} codes, not {config.codebook_size}")
        self.pad_id = config.mark("[PAD]")
        self.bos_id, self.eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id

    @property
    def module(self) -> nn.Module:
        return self.network

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.network, self.image_codes, *([self.clip.network] if self.clip else []))

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return (self.network.stack,)

    @property
    def codes(self) -> int:
        """The number of codes of an image."""
        return self.config.num_vq_tokens

    @property
    def side(self) -> int:
        """The side of a picture in pixels."""
        return self.image_codes.config.patch * math.isqrt(self.codes)

    def defaults(self, task: Task) -> Generation:
        return self._defaults[task]

    # ------------------------------------------------------------------------------------------------------------- prompts

    def encode(self, item: Item, task: Task, room: int = 0, truncate: bool = False) -> Encoded:
        """The prompt of an item, by the published template of its task.

        Args:
            room: positions to leave for a text response.

        Raises:
            ValueError: the prompt is empty, has words that the tokenizer does not know, or is longer than the window.
        """
        check_prompt(item, task, self.name)
        picture = item.picture()
        pixels = None
        if picture is not None:
            pixels = self.clip.pixels(picture) if self.clip else centre_square(picture, self.side)
        encoded = self.assemble(item.prompt, task, pixels)
        check_words(self.tokenizer, encoded.ids, item, self.name)
        window = self.config.prompt_window if task == "image" else self.config.llm.max_position_embeddings - room
        ids, spans, flags = cut_to_window(encoded.ids, encoded.spans, window, truncate, self.name, item.id)
        return Encoded(ids, spans, encoded.picture, encoded.everywhere, pixels, flags)

    def assemble(self, prompt: str, task: Task, pixels: Tensor | None = None) -> Encoded:
        """The published templates: (c) for drawing, (a) for a picture with a question, (b) for text alone."""
        mark = self.config.mark
        words, spans = encode(self.tokenizer, [content(prompt)], special=False)
        if task == "image":
            ids = [mark("<|t2i|>"), self.bos_id, *words, self.eos_id]
            return Encoded(ids, _framed(spans, 2, 1))
        if pixels is None:
            return Encoded([self.bos_id, *words], _framed(spans, 1, 0))
        if self.clip:
            system = self.tokenizer(SYSTEM, add_special_tokens=False)["input_ids"]
            before, after, count = [mark("<|mmu|>"), *system, mark("<|soi|>")], [mark("<|eoi|>")], self.clip.features
            segments = [template("USER: "), content(prompt), template(" ASSISTANT:")]
        else:
            before, after, count = [mark("<|mmu|>"), mark("<|soi|>")], [mark("<|eoi|>"), self.bos_id], self.codes
            segments = [template("USER: \n"), content(prompt), template(" ASSISTANT:")]
        words, spans = encode(self.tokenizer, segments, special=False)
        picture = range(len(before), len(before) + count)
        shown = (*spans_of([("text", "template")] * len(before)), Span(picture.start, picture.stop, "prompt", "image"))
        ids = [*before, *[self.pad_id] * count, *after, *words]
        # With codes the picture's marks are seen from everywhere as well; with CLIP its features alone.
        everywhere = picture if self.clip else range(picture.stop + 1)
        return Encoded(ids, (*shown, *_framed(spans, len(after), 0, picture.stop)), picture, everywhere, pixels)

    def see(self, pixels: Tensor) -> Tensor:
        """Input features of image prompts: pixel values (B, 3, H, W) -> (B, n, D)."""
        if self.clip:
            return self.network.mm_projector(self.clip.see(pixels).to(self.network.dtype))
        return self.embed_codes(self.image_codes.encode(pixels.to(self.device)))

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Input features of image codes: (B, n) -> (B, n, D)."""
        return self.network.embed(codes + self.config.first_code)

    def embed(self, prompts: Sequence[Encoded], features: Tensor | None) -> list[Tensor]:
        """Input embeddings, (L, D) a prompt, with `features` (pictures, n, D) where the pictures are."""
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
            codes = self.draw_codes(prompts, generation, seeds, trace)
            pictures = to_pictures(self.image_codes.decode(codes))
            return [Response(self.codes, image=picture, flags=p.flags) for p, picture in zip(prompts, pictures, strict=True)]
        pixels = [p.pixels for p in prompts if p.pixels is not None]
        embedded = self.embed(prompts, self.see(torch.stack(pixels)) if pixels else None)
        written = self.write(prompts, embedded, generation, seeds)
        if trace is not None:
            rows = [Row(k, p.spans + w.spans(len(p.ids))) for k, (p, w) in enumerate(zip(prompts, written, strict=True))]
            with trace.record(self.stacks[0], rows):
                self.read(prompts, embedded, [w.ids for w in written])
        return [w.response(p.flags) for p, w in zip(prompts, written, strict=True)]

    def read(self, prompts: Sequence[Encoded], embedded: Sequence[Tensor], responses: Sequence[list[int]]) -> Tensor:
        """The teacher-forced pass over prompts and text responses: states after the last norm, (B, L, D), padded on the right."""
        tails = [self.network.embed(torch.tensor(ids, dtype=torch.long, device=self.device)) for ids in responses]
        whole = [torch.cat(pair) for pair in zip(embedded, tails, strict=True)]
        there, everywhere = self.layout(prompts, [len(row) for row in whole])
        positions = torch.arange(there.shape[1], device=self.device).expand(there.shape)
        return self.network(pad_sequence(whole, batch_first=True), visibility(there, everywhere), positions)

    def layout(self, prompts: Sequence[Encoded], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Which positions are there, and which are seen from everywhere: (B, L) each."""
        places = torch.arange(max(lengths), device=self.device)
        there = places < torch.tensor(lengths, device=self.device)[:, None]
        first, last = torch.tensor([[p.everywhere.start, p.everywhere.stop] for p in prompts], device=self.device).T[..., None]
        return there, (places >= first) & (places < last)

    def write(
        self, prompts: Sequence[Encoded], embedded: Sequence[Tensor], generation: Generation, seeds: Sequence[int]
    ) -> list[Written]:
        """Text responses, token by token, the rows side by side."""
        assert generation.tokens is not None and generation.temperature is not None
        there, everywhere = self.layout(prompts, [len(row) for row in embedded])
        lengths = there.sum(1)
        positions = torch.arange(there.shape[1], device=self.device).expand(there.shape)
        cache = DynamicCache()
        states = self.network(pad_sequence(list(embedded), batch_first=True), visibility(there, everywhere), positions, cache)
        last = states[torch.arange(len(lengths)), lengths - 1]
        chance = uniforms(seeds, generation.tokens, self.device)
        tokens: list[Tensor] = []
        ended = torch.zeros_like(lengths, dtype=torch.bool)
        for step in range(generation.tokens):
            token = draw(self.network.logits(last).float(), generation.temperature, chance[:, step])
            tokens.append(token)
            ended |= token == self.eos_id
            if ended.all() or step == generation.tokens - 1:
                break
            there = torch.cat([there, torch.ones_like(ended)[:, None]], 1)
            last = self.network(self.network.embed(token)[:, None], there[:, None], (lengths + step)[:, None], cache)[:, 0]
        return [self._written(row, generation.tokens) for row in torch.stack(tokens, 1).tolist()]

    def _written(self, ids: list[int], limit: int) -> Written:
        stop = ids.index(self.eos_id) if self.eos_id in ids else len(ids)
        words = [token for token in ids[:stop] if token < self.config.llm_vocab_size]  # marks and image codes have no letters
        text = self.tokenizer.decode(words, skip_special_tokens=True).strip()
        return Written(ids[: stop + 1], stop, text, full=stop == limit)

    # ------------------------------------------------------------------------------------------------------------- drawing

    def draw_codes(
        self, prompts: Sequence[Encoded], generation: Generation, seeds: Sequence[int], trace: Trace | None = None
    ) -> Tensor:
        """Image codes by unmasking, with guidance: B prompts -> (B, codes)."""
        assert generation.guidance is not None and generation.temperature is not None and generation.steps is not None
        count, steps = len(prompts), generation.steps
        guide = generation.guidance != 1
        sequences = [p.ids for p in prompts] + [self.assemble("", "image").ids] * (count * guide)
        unread: list[Row | None] = [None] * (count * guide)
        written = [Row(k, p.spans) for k, p in enumerate(prompts)] + unread
        drawn = [Row(k, _picture_spans(self.codes)) for k in range(count)] + unread

        stack = self.network.stack
        drawing = Drawing(self.network, *pad(sequences, self.pad_id, "right"))
        with recorded(trace, stack, written):
            drawing.read_prompts()
        chance = uniforms(seeds, 2 * steps * self.codes, self.device).view(count, steps, 2, self.codes)
        codes = torch.zeros(count, self.codes, dtype=torch.long, device=self.device)
        masked = torch.ones_like(codes, dtype=torch.bool)
        for step in range(steps):
            with recorded(trace, stack, drawn, step_name(step, steps)):
                logits = drawing.step(codes, masked).float()
            if guide:
                conditional, unconditional = logits.chunk(2)
                logits = guided(conditional, unconditional, generation.guidance)
            codes = guess(logits, codes, masked, generation.temperature, chance[:, step, 0])
            masked = remask(logits, codes, masked, step, steps, generation.temperature, chance[:, step, 1])
        if trace is not None and trace.wants("clean"):
            with trace.record(stack, drawn, "clean"):
                drawing.step(codes, torch.zeros_like(masked))
        return codes


def _framed(spans: tuple[Span, ...], before: int, after: int, start: int = 0) -> tuple[Span, ...]:
    """Prompt spans from `start` on, with template positions before and after them."""
    kinds: list[tuple[Modality, Kind]] = [(s.modality, s.kind) for s in spans for _ in range(len(s))]
    mark: tuple[Modality, Kind] = ("text", "template")
    return spans_of([mark] * before + kinds + [mark] * after, start=start)


def _picture_spans(codes: int) -> tuple[Span, ...]:
    """What a denoising pass holds: the picture's codes between their marks."""
    return (
        Span(0, 1, "response", "image", "template"),
        Span(1, codes + 1, "response", "image"),
        Span(codes + 1, codes + 2, "response", "image", "template"),
    )


class Drawing:
    """Pictures being drawn: the prompts' keys and values, and a denoising step behind them.

    Args:
        ids, mask: of the prompts, (B, P), padded on either side.
    """

    def __init__(self, network: Showo, ids: Tensor, mask: Tensor) -> None:
        device = network.showo.lm_head.weight.device
        config = network.config
        self.network = network
        self.ids = ids.to(device)
        there = mask.to(device).bool()
        self.length = ids.shape[1]
        picture = torch.ones(len(ids), config.num_vq_tokens + 2, dtype=torch.bool, device=device)
        self.sees = visibility(torch.cat([there, picture], 1), None, torch.cat([torch.zeros_like(there), picture], 1))
        window = config.prompt_window
        # A prompt ends where the picture begins, so a short one begins late.
        places = torch.arange(self.length, device=device)
        self.positions = places + window - (there * (places + 1)).amax(1, keepdim=True)
        self.picture_positions = (window + torch.arange(picture.shape[1], device=device)).expand(picture.shape)
        self.cache = DynamicCache()

    def read_prompts(self) -> Tensor:
        """The prompts' states after the last norm, (B, P, D)."""
        seen = self.sees[:, : self.length, : self.length]
        return self.network(self.network.embed(self.ids), seen, self.positions, self.cache)

    def picture_ids(self, codes: Tensor, masked: Tensor) -> Tensor:
        """Token ids of a picture between its marks: codes and what is masked (b, n) -> (B, n + 2), repeated for guidance."""
        config = self.network.config
        tokens = torch.where(masked, config.mask, codes + config.first_code)
        first, last = (torch.full_like(tokens[:, :1], config.mark(name)) for name in ("<|soi|>", "<|eoi|>"))
        return torch.cat([first, tokens, last], 1).repeat(len(self.ids) // len(codes), 1)

    def states(self, codes: Tensor, masked: Tensor) -> Tensor:
        """The picture's states after the last norm, marks included: (B, n + 2, D)."""
        embeddings = self.network.embed(self.picture_ids(codes, masked))
        states = self.network(embeddings, self.sees[:, self.length :], self.picture_positions, self.cache)
        self.cache.crop(-embeddings.shape[1])  # the prompts alone stay
        return states

    def step(self, codes: Tensor, masked: Tensor) -> Tensor:
        """Logits of the codes: (b, n) -> (B, n, codebook)."""
        return self.network.code_logits(self.states(codes, masked)[:, 1:-1])


def guess(logits: Tensor, codes: Tensor, masked: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Codes drawn where they are masked: logits (B, n, codebook), uniform (B, n) in [0, 1) -> (B, n).

    As published, the temperature is not of this draw; but 0 takes the likeliest codes.
    """
    drawn = draw(logits.flatten(0, 1), 1.0 if temperature else 0.0, uniform.flatten()).view_as(codes)
    return torch.where(masked, drawn, codes)


def remask(logits: Tensor, codes: Tensor, masked: Tensor, step: int, steps: int, temperature: float, uniform: Tensor) -> Tensor:
    """Which codes are masked after a step of the published sampler (MaskGIT, arXiv 2202.04200): the least sure guesses.

    The share that stays masked falls as a cosine to nothing, but at least one stays, so that the last step's masks are not used.
    How sure a guess is, is its log probability with Gumbel noise, whose temperature falls faster at every step.

    Args:
        logits: (B, n, codebook).
        codes, masked: (B, n), guesses included; what was masked before.
        temperature: of the noise, at the start.
        uniform: (B, n), numbers in [0, 1) for the noise.
    """
    share = torch.cos(torch.tensor((step + 1) / steps) * math.pi * 0.5)
    stay = (codes.shape[1] * share).floor().long().to(codes.device)
    stay = torch.minimum(masked.sum(-1, keepdim=True) - 1, stay).clamp(min=1)
    sure = logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    if heat := temperature * math.prod(1 - (k + 1) / steps for k in range(step + 1)):
        sure = sure - heat * torch.log(-torch.log(uniform.clamp(min=1e-20))).to(sure)
    sure = sure.masked_fill(~masked, torch.inf)
    return sure < sure.sort(-1).values.gather(-1, stay)


# ---------------------------------------------------------------------------------------------------------------------- loading


def load(path: str, name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> ShowO:
    """The Show-o of a local folder or hub id, in the layout of `showlab/show-o`.

    What a checkpoint only names (`microsoft/phi-1_5`, `showlab/magvitv2`, `openai/clip-vit-large-patch14-336`) is looked for in the
    folder and beside it, under its last name (`magvitv2`), and then on the hub. The image tokenizer stays in float32: its codes are
    signs, and rounding turns those near zero.

    Args:
        dtype: None takes float32 on the CPU and bfloat16 elsewhere.

    Raises:
        ValueError: a file is missing or damaged, holds other tensors than this model's, or the hub cannot be reached.
    """
    device, kind = settled(device, dtype)
    raw = read_json(path, "config.json")
    own_words = reach(path, *VOCABULARIES) is not None
    language = path if own_words and "llm" in raw else _named(path, raw.get("llm_model_path") or TEXT, TEXT)
    config = part(path, "config.json", lambda: ShowoConfig.of(raw, _phi(raw, language)))
    tokenizer = load_tokenizer(path if own_words else language)
    network = empty(lambda: Showo(config))
    fill(network, tensors_of(weight_files(path, *WEIGHTS)), keys_of(config), device, kind, name)
    codes = load_image_codes(_named(path, IMAGE_TOKENIZER), device)
    clip = load_clip(_named(path, CLIP), device, kind) if config.w_clip_vit else None
    source = source_of(path)
    generation, _ = own_settings(source)
    return ShowO(network, codes, tokenizer, name, source, clip, generation)


def load_image_codes(path: str, device: str | torch.device) -> Magvit2:
    """The image tokenizer of a folder or hub id, in float32."""
    config = Magvit2Config.of(read_json(path, "config.json"))
    network = empty(lambda: Magvit2(config))
    fill(network, tensors_of(weight_files(path, *WEIGHTS)), magvit2.KEYS, device, torch.float32, path)
    return network


def load_clip(path: str, device: str | torch.device, dtype: torch.dtype) -> Clip:
    """The vision tower of a folder or hub id, with its image processor."""
    processor = part(path, "preprocessor_config.json", lambda: CLIPImageProcessorPil.from_pretrained(path))
    return Clip(load_network(CLIPVisionModel, path, device, dtype), processor)


def _phi(raw: dict[str, Any], language: str) -> PhiSizes:
    """The sizes of the Phi: our own export names them, the published checkpoint leaves them to the Phi that it names."""
    if "llm" in raw:
        return PhiSizes.of(raw["llm"])
    return PhiSizes.of(read_json(language, "config.json")) if reach(language, "config.json") else PhiSizes()


def _named(path: str, *names: str) -> str:
    """Where a part is: the first of `names` that is a folder in or beside `path`, a folder by itself, or can be had from the hub."""
    for name in names:
        last = Path(name).name
        for folder in (Path(path) / last, Path(path).parent / last, Path(name)):
            if Path(path).is_dir() and (folder / "config.json").is_file():
                return str(folder)
    return next((name for name in names[:-1] if reach(name, "config.json")), names[-1])
