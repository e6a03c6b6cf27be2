"""Emu3 (arXiv 2409.18869): one transformer for which a picture is text, its codes being words of the vocabulary.

The network is the `transformers` one at every size, so the twin and the published 8 billion are one code. What is ours: the published
templates, the spans, the sampling of pictures and the teacher-forced pass. `generate` of `transformers` with its documented recipe is
not used for pictures: its guidance is off unless asked for, and in bfloat16 it takes one half of it in bfloat16 (docs/models/emu3.md
has the list); greedily and with the same settings, both draw the same codes.

Two checkpoints are published, each finished on one task: Emu3-Chat on answering in text, Emu3-Gen on drawing. The weights of both run
every route, their files do not say which they are, and both began as one network; so both tasks are open on either, and what a
checkpoint was not finished on is what its first training left, as docs/models/emu3.md and `unisonde models` say.

A picture, prompt or response, is `<|image start|>`, its size as `90*90`, `<|image token|>`, the codes row by row with `<|extra_200|>` at
the end of each, `<|extra_201|>`, `<|image end|>`. Codes are content; the marks around them and between rows are template.

Prompt states: the positions of the prompt's words, or of the picture's codes, and of the question after it. Response states: the
positions at which a response token, or a code, is the input (DESIGN.md, decision 3). Stack `llm`; one pass, step `single`: attention is
causal, so one pass over prompt and response gives every state that sampling went through, and that of the last token, which sampling
never computes. Guidance: the conditional branch is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Emu3Config, Emu3ForConditionalGeneration, GenerationConfig
from transformers.models.emu3.configuration_emu3 import Emu3TextConfig, Emu3VQVAEConfig
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation, Model, Response, item_seed
from unisonde.models.parts.checkpoint import Keys, Rename, empty, fill, tensors_of, weight_files
from unisonde.models.parts.pretrained import OWN, load_tokenizer, own_settings, part, reach, read_json, settled, source_of
from unisonde.models.parts.prompts import check_marks, check_prompt, check_words
from unisonde.models.parts.quiet import quiet
from unisonde.models.parts.sampling import draw, guided, uniforms
from unisonde.models.parts.segments import Segment, content, encode, spans_of, template
from unisonde.models.parts.text import Written, cut_to_window, pad, write_text
from unisonde.models.trace import Kind, Modality, Row, Span, Stack, Trace

BOS, EOS, PAD = "<|extra_203|>", "<|extra_204|>", "<|endoftext|>"
BEGIN_IMAGE, IMAGE_TOKEN, END_IMAGE = "<|image start|>", "<|image token|>", "<|image end|>"
END_ROW, END_FRAME = "<|extra_200|>", "<|extra_201|>"
IMAGE = "<image>"
"""What `transformers` writes where a picture goes; here the codes stand there at once."""
SPECIAL_TOKENS = (PAD, BOS, EOS, BEGIN_IMAGE, IMAGE_TOKEN, END_IMAGE, END_ROW, END_FRAME, IMAGE)

SYSTEM = "You are a helpful assistant."
POSITIVE = " masterpiece, film grained, best quality."
"""What the authors' recipe adds to the prompt of a drawing."""
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, low quality, "
    "normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
"""The prompt that guidance moves away from, in the authors' recipe."""
AREA = 720 * 720
"""Pixels of a drawing, as published; it is square."""
TOP_K = 2048
"""Only this many codes, the likeliest, may be drawn."""

WINDOWS = {"Emu3-Chat": 131072, "Emu3-Gen": 9216}
"""The published checkpoints, and the most positions of a sequence in each: all that tells their configurations apart."""


def code_word(code: int) -> str:
    """The word of the vocabulary that is an image code."""
    return f"<|visual token {code:06d}|>"


def full_size(window: int) -> Emu3Config:
    """The published configuration: 8.763 billion parameters, 0.271 of them the image tokenizer."""
    vq = Emu3VQVAEConfig()
    words = {IMAGE: 151646, END_ROW: 151846, END_FRAME: 151847, BOS: 151849, EOS: 151850}
    words |= {IMAGE_TOKEN: 151851, BEGIN_IMAGE: 151852, END_IMAGE: 151853, PAD: 151643}
    words |= {code_word(code): 151854 + code for code in range(vq.codebook_size)}
    return Emu3Config(text_config=Emu3TextConfig(max_position_embeddings=window), vq_config=vq, vocabulary_map=words)


def twin(vocabulary: dict[str, int], codes: int) -> Emu3Config:
    """The configuration of a twin: 32 x 32 pictures as 8 x 8 codes, 2.3 million parameters.

    Args:
        vocabulary: the words of its tokenizer, those of the codes among them.
        codes: the size of the codebook.
    """
    text = Emu3TextConfig(
        vocab_size=len(vocabulary),
        hidden_size=160,
        intermediate_size=368,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=vocabulary[PAD],
        bos_token_id=vocabulary[BOS],
        eos_token_id=vocabulary[EOS],
        attention_dropout=0.0,
    )
    vq = Emu3VQVAEConfig(
        codebook_size=codes,
        embed_dim=16,
        latent_channels=16,
        temporal_downsample_factor=1,  # a picture is a film of this many frames
        base_channels=32,  # the least that the 32 groups of its norms allow
        channel_multiplier=(1, 1, 2),
        num_res_blocks=1,
        attn_resolutions=(),
        hidden_size=64,
    )
    return Emu3Config(text_config=text, vq_config=vq, vocabulary_map=vocabulary)


KEYS = Keys(
    renames=(
        Rename(r"text_model\.lm_head\.weight", "lm_head.weight"),
        Rename(r"text_model\.model\.(.+)", r"model.text_model.\1"),
        Rename(r"vqmodel\.(.+)", r"model.vqmodel.\1"),
    )
)
"""Key names of transformers 4.48, in which the checkpoints are published, to those of today; today's stay."""


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it: token ids, what they hold, and whether it was cut."""

    ids: list[int]
    spans: tuple[Span, ...]
    flags: tuple[str, ...] = ()


class Emu3(Model):
    """An Emu3 of any size.

    Args:
        network: the `transformers` model.
        tokenizer: its tokenizer, with the special tokens of the published one and a word for every code.
        image_processor: from pictures to pixel values, and back.
        system: the system prompt of text responses; empty for none.
        positive: what is added to the prompt of a drawing.
        negative: the prompt of the unconditional branch of guidance.
        area: pixels of a drawing.
        generation: sampling settings a task, where they differ from the published ones.
    """

    family = "emu3"
    tasks = ("text", "image")

    def __init__(
        self,
        network: Emu3ForConditionalGeneration,
        tokenizer: Any,
        image_processor: Any,
        name: str,
        source: Path | None = None,
        system: str = SYSTEM,
        positive: str = POSITIVE,
        negative: str = NEGATIVE,
        area: int = AREA,
        generation: dict[Task, Generation] | None = None,
    ) -> None:
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.name = name
        self.source = source
        self.system = system
        self.positive = positive
        self.negative = negative
        self.area = area
        self._defaults: dict[Task, Generation] = {
            "text": Generation(tokens=320, temperature=0.0),
            "image": Generation(temperature=1.0, guidance=3.0),
        }
        self._defaults |= generation or {}
        self.code_ids = _code_ids(network, tokenizer, name)
        self.pad_id, self.eos_id = (tokenizer.convert_tokens_to_ids(t) for t in (PAD, EOS))
        self.end_row, self.end_frame, self.end_image = (tokenizer.convert_tokens_to_ids(t) for t in (END_ROW, END_FRAME, END_IMAGE))

    @property
    def module(self) -> torch.nn.Module:
        return self.network

    @property
    def stacks(self) -> tuple[Stack, ...]:
        llm = self.network.model.text_model
        return (Stack("llm", tuple(llm.layers), llm.norm),)

    @property
    def side(self) -> int:
        """Rows and columns of the codes of a drawing."""
        return round(self.area**0.5 / self.network.model.vqmodel.vision_spatial_factor)

    @property
    def codes(self) -> int:
        """The number of codes of a drawing."""
        return self.side**2

    @property
    def window(self) -> int:
        """The most positions of a sequence."""
        return self.network.model.text_model.config.max_position_embeddings

    def defaults(self, task: Task) -> Generation:
        return self._defaults[task]

    # ------------------------------------------------------------------------------------------------------------- prompts

    def segments(self, item: Item, task: Task, codes: Tensor | None = None) -> list[Segment]:
        """The published templates.

        Args:
            codes: of the item's picture, (h, w).
        """
        if task == "image":
            return [template(BOS), content(item.prompt), template(self.positive + self.opening(self.side, self.side))]
        head = template(f"{BOS}{self.system} USER: " if self.system else f"{BOS}USER: ")
        picture = [] if codes is None else self.picture_segments(codes)
        return [head, *picture, content(item.prompt), template(" ASSISTANT:")]

    def opening(self, height: int, width: int) -> str:
        """What stands before the codes of a picture."""
        return f"{BEGIN_IMAGE}{height}*{width}{IMAGE_TOKEN}"

    def picture_segments(self, codes: Tensor) -> list[Segment]:
        """A picture that is seen: codes (h, w), as text."""
        segments = [template(self.opening(*codes.shape))]
        for row in codes.tolist():
            segments += [content("".join(map(code_word, row)), "image"), Segment(END_ROW, "image")]
        return [*segments, Segment(END_FRAME + END_IMAGE, "image")]

    def encode(self, item: Item, task: Task, room: int, truncate: bool = False) -> Encoded:
        """The prompt of an item; its picture is turned into codes.

        Args:
            room: positions to leave for the response.

        Raises:
            ValueError: the prompt is empty, has words that the tokenizer does not know, or is longer than the window; or the picture
                cannot be taken.
        """
        check_prompt(item, task, self.name)
        codes = None
        if (picture := item.picture()) is not None:
            try:
                codes = self.codes_of(picture)
            except ValueError as error:
                raise ValueError(f"{self.name} cannot take the picture of item {item.id!r}: {error}") from error
            self.check_size(codes, item)
        ids, spans = encode(self.tokenizer, self.segments(item, task, codes), special=False)  # the template has its own BOS
        if self.tokenizer.unk_token_id != self.pad_id:  # published, it has bytes for everything
            check_words(self.tokenizer, ids, item, self.name)
        return Encoded(*cut_to_window(ids, spans, self.window - room, truncate, self.name, item.id))

    def check_size(self, codes: Tensor, item: Item) -> None:
        """Raises ValueError if a twin, which knows one size alone, has no words for that of a picture."""
        size = "{}*{}".format(*codes.shape)
        if self.tokenizer.unk_token_id in self.tokenizer(size, add_special_tokens=False)["input_ids"]:
            raise ValueError(
                f"{self.name} has no word for the size {size} of the codes of item {item.id!r}; give it a square picture"
            )

    def unconditional(self) -> list[int]:
        """The prompt of the unconditional branch: the negative one, opening the same picture."""
        text = f"{BOS}{self.negative}{self.opening(self.side, self.side)}"
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

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
        room = self.codes + self.side + 3 if task == "image" else generation.tokens or 0
        prompts = [self.encode(item, task, room, truncate) for item in items]
        seeds = [item_seed(seed, item) for item in items]
        if task == "image":
            codes = self.draw_codes([p.ids for p in prompts], generation, seeds)
            tails = [self.sequence_of(grid) for grid in codes]
            held = [self.response_spans(len(p.ids)) for p in prompts]
            pictures = self.decode(codes)
            responses = [Response(self.codes, image=picture, flags=p.flags) for p, picture in zip(prompts, pictures, strict=True)]
        else:
            written = self.write(prompts, generation, seeds)
            tails = [w.ids for w in written]
            held = [w.spans(len(p.ids)) for p, w in zip(prompts, written, strict=True)]
            responses = [w.response(p.flags) for p, w in zip(prompts, written, strict=True)]
        if trace is not None:
            rows = [Row(k, p.spans + spans) for k, (p, spans) in enumerate(zip(prompts, held, strict=True))]
            with trace.record(self.stacks[0], rows):
                self.read([p.ids + tail for p, tail in zip(prompts, tails, strict=True)])
        return responses

    def sequence_of(self, codes: Tensor) -> list[int]:
        """The token ids of a drawing: codes (h, w) with the ends of rows, of the frame, of the picture and of the text."""
        words = self.code_ids[codes.cpu()].tolist()
        return [word for row in words for word in [*row, self.end_row]] + [self.end_frame, self.end_image, self.eos_id]

    def response_spans(self, start: int) -> tuple[Span, ...]:
        """Spans of a drawing whose prompt has `start` positions."""
        mark: tuple[Modality, Kind] = ("image", "template")
        row: list[tuple[Modality, Kind]] = [("image", "content")] * self.side
        return spans_of([*[*row, mark] * self.side, mark, mark, mark], "response", start)

    def read(self, ids: Sequence[list[int]]) -> Tensor:
        """The teacher-forced pass: states after the last norm, (B, L, D). Padding is on the right, where causal attention never looks."""
        padded, _ = pad(ids, self.pad_id, "right")
        return self.network.model.text_model(input_ids=padded.to(self.device), use_cache=False).last_hidden_state

    def write(self, prompts: Sequence[Encoded], generation: Generation, seeds: Sequence[int]) -> list[Written]:
        """Text responses."""
        ids, mask = pad([p.ids for p in prompts], self.pad_id, "left")
        ids, mask = ids.to(self.device), mask.to(self.device)
        return write_text(self.network, self.tokenizer, ids, mask, generation, seeds, self.eos_id, self.pad_id)

    def draw_codes(self, prompts: Sequence[list[int]], generation: Generation, seeds: Sequence[int]) -> Tensor:
        """Codes of B prompts, drawn one after another with guidance, each from the likeliest `TOP_K`: (B, h, w)."""
        assert generation.guidance is not None and generation.temperature is not None
        temperature, chance = generation.temperature, uniforms(seeds, self.codes, self.device)

        def choose(number: int, logits: Tensor) -> Tensor:
            return draw(likeliest(logits, TOP_K), temperature, chance[:, number])

        return self.code_by_code(prompts, generation.guidance, choose)

    @torch.inference_mode()
    def code_by_code(self, prompts: Sequence[list[int]], guidance: float, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The published loop: B prompts -> codes (B, h, w). Rows of other lengths are padded on the left and masked.

        Only codes are chosen from; at the end of a row stands its mark, and after the last code nothing is left to choose.

        Args:
            choose: from the number of a code and its guided logits (B, K) to the codes (B,).
        """
        guide = guidance != 1
        rows = [*prompts, *[self.unconditional()] * len(prompts)] if guide else prompts
        ids, mask = (t.to(self.device) for t in pad(rows, self.pad_id, "left"))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        words, width = self.code_ids.to(self.device), self.side + 1
        chosen: list[Tensor] = []
        cache = None
        for step in range(self.side * width - 1):
            output = self.network.model.text_model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            if step % width == self.side:
                word = torch.full((len(prompts),), self.end_row, device=self.device)
            else:
                logits = self.network.lm_head(output.last_hidden_state[:, -1])[:, words].float()
                if guide:
                    conditional, unconditional = logits.chunk(2)
                    logits = guided(conditional, unconditional, guidance)
                code = choose(len(chosen), logits)
                chosen.append(code)
                word = words[code]
            ids = torch.cat([word, word] if guide else [word])[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
            positions = positions[:, -1:] + 1
        return torch.stack(chosen, 1).unflatten(1, (self.side, self.side))

    # ------------------------------------------------------------------------------------------------------------ pictures

    @torch.inference_mode()
    def codes_of(self, picture: Image.Image) -> Tensor:
        """The codes of a picture: (h, w). Each is taken by itself: beside a larger one it would be padded, and the encoder sees that.

        Raises:
            ValueError: it is more than 200 times as long as it is wide.
        """
        # Colours first: of a picture one or three pixels high the processor would take the height for them.
        with quiet():
            taken = self.image_processor(np.asarray(picture).transpose(2, 0, 1), return_tensors="pt")
        vq = self.network.model.vqmodel
        [codes] = vq.encode(taken["pixel_values"].to(self.device), taken["image_sizes"]).image_tokens
        return codes

    @torch.inference_mode()
    def pixels_of(self, codes: Tensor) -> Tensor:
        """Pixel values of codes: (B, h, w) -> (B, 3, H, W), about [-1, 1]."""
        return self.network.model.vqmodel.decode(codes)

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Pictures of codes: (B, h, w) -> B pictures, one after another, as the tokenizer draws each as a short film."""
        values = (self.pixels_of(grid[None])[0].float().cpu() for grid in codes)
        return [self.image_processor.postprocess([v], return_tensors="PIL.Image.Image")["pixel_values"][0] for v in values]


def likeliest(logits: Tensor, count: int) -> Tensor:
    """Logits (B, K) with all that is below the `count`-th largest of its row at minus infinity."""
    if count >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(count).values[:, -1:], -torch.inf)


def _code_ids(network: Emu3ForConditionalGeneration, tokenizer: Any, name: str) -> Tensor:
    """The token of each code, (K,), as the configuration and the tokenizer say.

    Raises:
        ValueError: the tokenizer is not this model's.
    """
    # Padding is left out: the published tokenizer has it for the unknown token as well.
    check_marks(tokenizer, [mark for mark in SPECIAL_TOKENS if mark != PAD], name, "Emu3")
    mapping = network.vocabulary_mapping
    codes = range(network.model.vqmodel.config.codebook_size)
    ids = [mapping.img2bpe.get(code) for code in codes]
    words = tokenizer.convert_tokens_to_ids([code_word(code) for code in codes])
    if ids != words or mapping.eol_token_id != tokenizer.convert_tokens_to_ids(END_ROW):
        raise ValueError(f"the tokenizer of {name} and the vocabulary_map of its config.json give image codes other token ids")
    if max(words) >= network.lm_head.out_features:
        raise ValueError(
            f"the tokenizer of {name} has token ids up to {max(words)}, its network {network.lm_head.out_features} words"
        )
    return torch.tensor(words)


def load(path: str, name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Emu3:
    """The Emu3 of a local folder or hub id, in the layout of `BAAI/Emu3-Gen-hf`.

    Args:
        dtype: of the language model; float32 on a CPU, else bfloat16, if None. The image tokenizer is always in float32, as its authors
            run it.

    Raises:
        ValueError: a file is missing or damaged, the weights are not this model's, or the hub cannot be reached; the sentence says which.
    """
    given = read_json(path, "config.json")
    if given.get("model_type") != Emu3Config.model_type:
        raise ValueError(
            f"{path!r} has model type {given.get('model_type')!r}, not {Emu3Config.model_type!r}; "
            "of Emu3, the repositories whose name ends in -hf are read (BAAI/Emu3-Chat-hf, BAAI/Emu3-Gen-hf)"
        )
    config = part(path, "config.json", lambda: Emu3Config.from_pretrained(path, tie_word_embeddings=False))
    tokenizer = load_tokenizer(path)
    processor = part(path, "preprocessor_config.json", lambda: Emu3ImageProcessor.from_pretrained(path))
    device, kind = settled(device, dtype)
    network = empty(lambda: Emu3ForConditionalGeneration(config))
    fill(network, _converted(tensors_of(weight_files(path)), kind), KEYS, device, None, name)
    if reach(path, "generation_config.json"):
        network.generation_config = part(path, "generation_config.json", lambda: GenerationConfig.from_pretrained(path))
    source = source_of(path)
    generation, system = own_settings(source)
    own = read_json(str(source), OWN) if (source / OWN).is_file() else {}
    others = {key: own[key] for key in ("positive", "negative", "area") if key in own}
    return Emu3(network, tokenizer, processor, name, source, SYSTEM if system is None else system, generation=generation, **others)


def _converted(tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in tensors:
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32 if "vqmodel." in key else dtype)
        yield key, tensor
