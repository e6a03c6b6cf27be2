"""Janus-Pro (arXiv 2501.17811): one Llama that reads SigLIP features and text, and writes text or image codes one by one.

The parts are the `transformers` Janus classes at every size, so the twin and the published 1B and 7B are one code; `load` opens the
original format (`deepseek-ai`, `parts.janus_keys`) and the converted one (`deepseek-community`). What is ours: the published templates,
the spans, the sampling loop of images, the teacher-forced pass, and the two places where `transformers` departs from the official code:
the size of a resized picture and the codes of a picture. `generate(generation_mode="image")` of `transformers` cannot give hidden
states, has guidance always on and fails without a mask, so it is not used.

Prompt states: the positions of the prompt's text, or of the image's features (576 at full size), and of the question after it. Response
states: the positions at which a response token, or an image code, is the input (DESIGN.md, decision 3). Stack `llm`; one pass, step
`single`: attention is causal, so one pass over prompt and response gives every state that sampling went through, and the last
token's, which sampling never computes. Guidance: the conditional branch is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import JanusConfig, JanusForConditionalGeneration, PreTrainedTokenizerFast
from transformers.image_transforms import resize
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.llama.configuration_llama import LlamaConfig

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation, Model, Response, item_seed
from unisonde.models.parts.checkpoint import empty, fill, tensors_of, weight_files
from unisonde.models.parts.janus_keys import KEYS, ORIGINAL, configuration
from unisonde.models.parts.janus_marks import BEGIN_IMAGE, BOS, END_IMAGE, EOS, IMAGE, PAD, SYSTEM
from unisonde.models.parts.pictures import to_pictures
from unisonde.models.parts.pretrained import load_network, load_tokenizer, own_settings, part, reach, read_json, settled, source_of
from unisonde.models.parts.prompts import check_marks, check_prompt, check_words, picture_places
from unisonde.models.parts.sampling import draw, guided, uniforms
from unisonde.models.parts.segments import Segment, content, encode, spans_of, template
from unisonde.models.parts.text import Written, cut_to_window, pad, write_text
from unisonde.models.trace import Row, Span, Stack, Trace

USER, ASSISTANT = "<|User|>", "<|Assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, BEGIN_IMAGE, END_IMAGE, IMAGE, USER, ASSISTANT)

SIZES = {"1B": (2048, 5632, 24, 16), "7B": (4096, 11008, 30, 32)}
"""The published sizes, as `full_size` takes them."""


def full_size(hidden: int, ffn: int, layers: int, heads: int) -> JanusConfig:
    """The configuration of a published size. 2.089 billion parameters at 1B, 7.420 at 7B."""
    text = LlamaConfig(
        vocab_size=102400,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=16384,
        rms_norm_eps=1e-6,
    )
    vision = JanusVisionConfig(projection_dim=hidden)
    vq = JanusVQVAEConfig(projection_dim=hidden, image_token_embed_dim=hidden)
    return JanusConfig(text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=False)


def twin(vocabulary: int, image_token: int) -> JanusConfig:
    """The configuration of `twin/janus-pro`: 2.94 million parameters; 32 x 32 pictures drawn as 8 x 8 codes and read as 16 features."""
    hidden = 160
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=368,
        num_hidden_layers=5,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
    )
    vision = JanusVisionConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,  # of 64 features the twin learns far later which ones a question speaks of (docs/twins.md)
        num_image_tokens=16,
        mlp_ratio=2.0,
        projection_dim=hidden,
    )
    vq = JanusVQVAEConfig(
        embed_dim=16,
        num_embeddings=657,  # the distinct 4 x 4 patches of Tabletop
        latent_channels=32,
        base_channels=32,  # the least that the 32 groups of its norms allow
        channel_multiplier=[2, 1, 2],
        num_res_blocks=1,
        projection_dim=hidden,
        image_token_embed_dim=hidden,
    )
    more: dict[str, Any] = {"code_grid": 8, "tie_word_embeddings": False}
    return JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=image_token, **more)


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it: token ids, what they hold, its picture, and whether it was cut."""

    ids: list[int]
    spans: tuple[Span, ...]
    pixels: Tensor | None = None
    flags: tuple[str, ...] = ()


class ImageProcessor(JanusImageProcessorPil):
    """Pictures to pixel values as published: the long side resized, then a square with a margin of the mean colour.

    The official code cuts the short side down to whole pixels, where `transformers` rounds it.
    """

    def resize(  # type: ignore[override] # as the class above departs from its own
        self, image: np.ndarray, size: SizeDict, min_size: int, resample: Any = None, **kwargs: Any
    ) -> np.ndarray:
        """(3, h, w) bytes -> (3, H, W) bytes, the longer side `size`."""
        longest, first = max(image.shape[-2:]), ChannelDimension.FIRST
        height, width = (max(int(side / longest * size.height), min_size) for side in image.shape[-2:])
        return resize(image, (height, width), resample or self.resample, data_format=first, input_data_format=first)


def set_code_grid(network: JanusForConditionalGeneration) -> None:
    """As many image codes as the configuration's `code_grid` says, where it says so; else as many as the vision encoder has patches.

    The published models have 24 x 24 of both, and `transformers` knows no other way.
    """
    side = getattr(network.config, "code_grid", None)
    if side is not None:
        vq: Any = network.config.vq_config
        vq.num_patches = side
        network.model.vqmodel.quantize.quant_state_dims = [side, side]


class JanusPro(Model):
    """A Janus-Pro of any size.

    Args:
        network: the `transformers` model.
        tokenizer: its tokenizer, with the special tokens of the published one.
        image_processor: from pictures to pixel values.
        system: the system prompt of understanding and text.
        generation: sampling settings a task, where they differ from the published ones.
    """

    family = "janus-pro"
    tasks = ("text", "image")

    def __init__(
        self,
        network: JanusForConditionalGeneration,
        tokenizer: Any,
        image_processor: Any,
        name: str,
        source: Path | None = None,
        system: str = SYSTEM,
        generation: dict[Task, Generation] | None = None,
    ) -> None:
        self.network = network.eval()
        set_code_grid(network)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.name = name
        self.source = source
        self.system = system
        self._defaults: dict[Task, Generation] = {
            "text": Generation(tokens=512, temperature=0.0),
            "image": Generation(temperature=1.0, guidance=5.0),
        }
        self._defaults |= generation or {}
        check_marks(tokenizer, SPECIAL_TOKENS, name, "Janus-Pro")
        self.pad_id, self.bos_id, self.eos_id = (tokenizer.convert_tokens_to_ids(t) for t in (PAD, BOS, EOS))
        self.image_id = network.config.image_token_id

    @property
    def module(self) -> torch.nn.Module:
        return self.network

    @property
    def stacks(self) -> tuple[Stack, ...]:
        llm = self.network.model.language_model
        return (Stack("llm", tuple(llm.layers), llm.norm),)

    @property
    def codes(self) -> int:
        """The number of codes of an image."""
        return self.network.config.vq_config.num_patches**2

    @property
    def window(self) -> int:
        """The most positions of a sequence."""
        return self.network.config.text_config.max_position_embeddings

    def defaults(self, task: Task) -> Generation:
        return self._defaults[task]

    # ------------------------------------------------------------------------------------------------------------- prompts

    def segments(self, item: Item, task: Task) -> list[Segment]:
        """The published templates: (c) for image generation; (a) and (b) for text, with or without an image."""
        if task == "image":
            return [template(f"{USER}: "), content(item.prompt), template(f"\n\n{ASSISTANT}:{BEGIN_IMAGE}")]
        head = f"{self.system}\n\n" if self.system else ""
        if item.image is None:
            return [template(f"{head}{USER}: "), content(item.prompt), template(f"\n\n{ASSISTANT}:")]
        features = self.network.config.vision_config.num_image_tokens
        return [
            template(f"{head}{USER}: {BEGIN_IMAGE}"),
            content(IMAGE * features, "image"),
            template(f"{END_IMAGE}\n"),
            content(item.prompt),
            template(f"\n\n{ASSISTANT}:"),
        ]

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
        pixels = None
        if (picture := item.picture()) is not None:
            pixels = self.image_processor(picture, return_tensors="pt")["pixel_values"][0]
        return Encoded(ids, spans, pixels, flags)

    def embed(self, ids: Tensor, features: Tensor | None = None, where: Tensor | None = None) -> Tensor:
        """Input embeddings: ids (B, L) -> (B, L, D), some positions filled with features (..., D) in order.

        Args:
            where: those positions, (B, L) booleans; the positions of `<image_placeholder>` if None.
        """
        embeddings = self.network.get_input_embeddings()(ids)
        if features is None:
            return embeddings
        where = ids == self.image_id if where is None else where
        return embeddings.masked_scatter(where[..., None], features.to(embeddings).reshape(-1, features.shape[-1]))

    def see(self, pixels: Tensor) -> Tensor:
        """Features of image prompts: (B, 3, H, W) -> (B, n, D)."""
        return self.network.model.get_image_features(pixels.to(self.device, self.network.dtype)).pooler_output

    def code_features(self, codes: Tensor) -> Tensor:
        """Input features of image codes: (B, n) -> (B, n, D)."""
        return self.network.prepare_embeddings_for_image_generation(codes)

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
        room = self.codes if task == "image" else generation.tokens or 0
        prompts = [self.encode(item, task, room, truncate) for item in items]
        seeds = [item_seed(seed, item) for item in items]
        if task == "image":
            codes = self.draw_codes([p.ids for p in prompts], generation, seeds)
            tails = [[self.image_id] * self.codes] * len(items)
            features: Tensor | None = self.code_features(codes)
            held = [spans_of([("image", "content")] * self.codes, "response", len(p.ids)) for p in prompts]
            pictures = self.decode(codes)
            responses = [Response(self.codes, image=picture, flags=p.flags) for p, picture in zip(prompts, pictures, strict=True)]
        else:
            pixels = [p.pixels for p in prompts if p.pixels is not None]
            features = self.see(torch.stack(pixels)) if pixels else None
            written = self.write(prompts, features, generation, seeds)
            tails = [w.ids for w in written]
            held = [w.spans(len(p.ids)) for p, w in zip(prompts, written, strict=True)]
            responses = [w.response(p.flags) for p, w in zip(prompts, written, strict=True)]
        if trace is not None:
            ids = [p.ids + tail for p, tail in zip(prompts, tails, strict=True)]
            rows = [Row(k, p.spans + spans) for k, (p, spans) in enumerate(zip(prompts, held, strict=True))]
            with trace.record(self.stacks[0], rows):
                self.read(ids, rows, features)
        return responses

    def read(self, ids: Sequence[list[int]], rows: Sequence[Row], features: Tensor | None) -> Tensor:
        """The teacher-forced pass: states after the last norm, (B, L, D).

        Padding is on the right, where causal attention never looks.
        """
        padded, _ = pad(ids, self.pad_id, "right")
        where = picture_places([row.spans for row in rows], [0] * len(rows), padded.shape[1])
        embeddings = self.embed(padded.to(self.device), features, where.to(self.device))
        return self.network.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state

    def write(
        self, prompts: Sequence[Encoded], features: Tensor | None, generation: Generation, seeds: Sequence[int]
    ) -> list[Written]:
        """Text responses."""
        ids, mask = pad([p.ids for p in prompts], self.pad_id, "left")
        longest = ids.shape[1]
        where = picture_places([p.spans for p in prompts], [longest - len(p.ids) for p in prompts], longest)
        ids, mask = ids.to(self.device), mask.to(self.device)
        return write_text(
            self.network,
            self.tokenizer,
            ids,
            mask,
            generation,
            seeds,
            self.eos_id,
            self.pad_id,
            embeddings=self.embed(ids, features, where.to(self.device)),
        )

    def draw_codes(self, prompts: Sequence[list[int]], generation: Generation, seeds: Sequence[int]) -> Tensor:
        """Image codes of B prompts, drawn one after another with guidance: (B, codes)."""
        assert generation.guidance is not None and generation.temperature is not None
        temperature, chance = generation.temperature, uniforms(seeds, self.codes, self.device)
        return self.code_by_code(prompts, generation.guidance, lambda step, logits: draw(logits, temperature, chance[:, step]))

    @torch.inference_mode()
    def code_by_code(self, prompts: Sequence[list[int]], guidance: float, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The published loop, with guidance: B prompts -> (B, codes). Rows of other lengths are padded on the left and masked.

        Args:
            choose: from the number of a code and its guided logits (B, K) to the codes (B,).
        """
        ids, mask = pad(prompts, self.pad_id, "left")
        if guide := guidance != 1:
            ids = torch.cat([ids, pad([self.unconditional(prompt) for prompt in prompts], self.pad_id, "left")[0]])
            mask = torch.cat([mask, mask])
        mask = mask.to(self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        embeddings = self.embed(ids.to(self.device))
        chosen: list[Tensor] = []
        cache = None
        for step in range(self.codes):
            output = self.network.model.language_model(
                inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            logits = self.network.model.generation_head(output.last_hidden_state[:, -1]).float()
            if guide:
                conditional, unconditional = logits.chunk(2)
                logits = guided(conditional, unconditional, guidance)
            code = choose(step, logits)
            chosen.append(code)
            embeddings = self.code_features(torch.cat([code, code]) if guide else code)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
            positions = positions[:, -1:] + 1
        return torch.stack(chosen, 1)

    def unconditional(self, ids: Sequence[int]) -> list[int]:
        """The prompt with every token but the first (BOS) and the last (`<begin_of_image>`) replaced by padding, which is attended to."""
        return [ids[0], *[self.pad_id] * (len(ids) - 2), ids[-1]]

    # ------------------------------------------------------------------------------------------------------------ pictures

    @torch.inference_mode()
    def pixels_of(self, codes: Tensor) -> Tensor:
        """Pixel values of image codes: (B, codes) -> (B, 3, H, W), about [-1, 1]."""
        return self.network.model.vqmodel.decode(codes)

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Pictures of image codes: (B, codes) -> B pictures."""
        return to_pictures(self.pixels_of(codes))

    @torch.inference_mode()
    def codes_of(self, pixels: Tensor) -> Tensor:
        """Image codes of pictures: (B, 3, H, W) in [-1, 1] -> (B, codes).

        A code is the nearest in the codebook, both of unit length; `vqmodel.encode` of `transformers` leaves out the second part.
        """
        vq = self.network.model.vqmodel
        latents = vq.quant_conv(vq.encoder(pixels.to(self.device, self.network.dtype))).flatten(2).transpose(1, 2)
        return (F.normalize(latents, dim=-1) @ F.normalize(vq.quantize.embedding.weight, dim=-1).T).argmax(-1)


def load(path: str, name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> JanusPro:
    """The Janus-Pro of a local folder or hub id, in the layout of `deepseek-ai/Janus-Pro-1B` or of `deepseek-community/Janus-Pro-1B`.

    Raises:
        ValueError: a file is missing or damaged, the weights are not this model's, or the hub cannot be reached; the sentence says which.
    """
    config = read_json(path, "config.json")
    original = config.get("model_type") == ORIGINAL
    tokenizer = _tokenizer(path, original)
    if original:
        network = _original(path, config, tokenizer, name, device, dtype)
        processor = _original_processor(path)
    else:
        # The head is untied in every Janus-Pro; the default of JanusConfig would tie it.
        network = load_network(JanusForConditionalGeneration, path, device, dtype, strict=True, tie_word_embeddings=False)
        processor = part(path, "preprocessor_config.json", lambda: ImageProcessor.from_pretrained(path))
    source = source_of(path)
    generation, system = own_settings(source)
    return JanusPro(network, tokenizer, processor, name, source, SYSTEM if system is None else system, generation)


def _tokenizer(path: str, original: bool) -> Any:
    """The published tokenizer; it writes BOS first."""
    if original and reach(path, "tokenizer.json"):
        # Literally: the class that the original repositories name is a Llama's, which since transformers 5 cuts words its own way.
        tokenizer = part(path, "tokenizer.json", lambda: PreTrainedTokenizerFast.from_pretrained(path))
    else:
        tokenizer = load_tokenizer(path)
    bos = tokenizer.convert_tokens_to_ids(BOS)
    if tokenizer("a")["input_ids"][:1] != [bos]:
        tokenizer.bos_token = BOS
        tokenizer.add_bos_token = True
    return tokenizer


def _original(
    path: str, config: dict[str, Any], tokenizer: Any, name: str, device: str | torch.device | None, dtype: torch.dtype | None
) -> JanusForConditionalGeneration:
    device, dtype = settled(device, dtype)
    translated = configuration(config, tokenizer.convert_tokens_to_ids(IMAGE))
    network = empty(lambda: JanusForConditionalGeneration(translated))
    fill(network, tensors_of(weight_files(path)), KEYS, device, dtype, name)
    return network


def _original_processor(path: str) -> ImageProcessor:
    """Of the original preprocessor_config.json, which gives the side of the square as one number."""
    given = read_json(path, "preprocessor_config.json")
    try:
        size = given["image_size"]
        return ImageProcessor(
            size={"height": size, "width": size},
            min_size=given["min_size"],
            image_mean=given["image_mean"],
            image_std=given["image_std"],
            do_normalize=given.get("do_normalize", True),
        )
    except KeyError as error:
        raise ValueError(f"preprocessor_config.json of {path!r} has no entry {error}") from None
