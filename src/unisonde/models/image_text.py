"""Any image-and-text-to-text model of `transformers`: LLaVA, Qwen2-VL, Qwen2.5-VL and their like.

Prompt states: of the picture, the positions at which its features enter the decoder (their token is the configuration's
`image_token_id`); of the text, the positions of the user's own words. Marks around the picture, breaks between its rows and the
chat template are template. Response states: the positions at which a response token is the input (DESIGN.md, decision 3). Stack
`llm`: the decoder, one teacher-forced pass, step `single`; the vision tower is not part of it.

Items run one at a time: pictures differ in size and number of positions, families differ in how they batch them, and a batch of one
needs no padding. Pictures go through the published processor; where that cannot be built because its video half wants torchvision,
the image processor and the tokenizer do its work for the families in `PLAIN`, whose placeholder is only repeated.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation, Response, item_seed
from unisonde.models.parts.chat import chat_segments
from unisonde.models.parts.pretrained import load_network, load_tokenizer, part, source_of
from unisonde.models.parts.segments import Segment, content, encode, spans_of, template
from unisonde.models.parts.text import cut_to_window, write_text
from unisonde.models.parts.text_decoder import TextDecoder
from unisonde.models.trace import Kind, Modality, Row, Span, Trace

PLAIN = ("qwen2_vl", "qwen2_5_vl")
"""Families in which a picture of n features is the placeholder n times and nothing else."""

ALONG = ("token_type_ids", "mm_token_type_ids")
"""Inputs with a number a position: 1 where a picture's feature stands, 0 elsewhere."""


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it: token ids, what they hold, what else the model is given, and whether it was cut."""

    ids: list[int]
    spans: tuple[Span, ...]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


class ImageTextLM(TextDecoder):
    """A model that reads a picture and a text, or a text alone, and writes text.

    Args:
        network: the `transformers` model.
        tokenizer: its tokenizer, one that gives character offsets.
        image_processor: from a picture to pixel values; used where there is no processor.
        processor: the published processor of pictures and text, None for a family of `PLAIN` that does without.
        generation: sampling settings, where they differ from the published ones.

    Raises:
        ValueError: there is no processor and the family needs one, or it cannot be told which modules are the layers.
    """

    family = "image-text-to-text"
    pictures = True

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        name: str,
        image_processor: Any = None,
        processor: Any = None,
        source: Path | None = None,
        generation: Generation | None = None,
    ) -> None:
        kind = network.config.model_type
        if processor is None and kind not in PLAIN:
            raise ValueError(
                f"{name} ({kind}) needs its published processor for pictures, and that needs torchvision: pip install torchvision"
            )
        chat = next((t for t in (processor, tokenizer) if getattr(t, "chat_template", None)), None)
        super().__init__(network, tokenizer, name, chat, source, generation)
        self.image_processor = image_processor
        self.processor = processor
        token = getattr(network.config, "image_token_id", None)
        self.image_id = network.config.image_token_index if token is None else token
        self._along = [key for key in ALONG if key in inspect.signature(network.forward).parameters]

    # ------------------------------------------------------------------------------------------------------------- prompts

    def segments(self, item: Item) -> list[Segment]:
        """The prompt with one placeholder for its picture, by the chat template if there is one."""
        if self.chat is not None:
            return chat_segments(self.chat, item.prompt, item.id, image=item.image is not None)
        if item.image is None:
            return [content(item.prompt)]
        return [template(self.tokenizer.convert_ids_to_tokens(self.image_id) + "\n"), content(item.prompt)]

    def encode(self, item: Item, room: int, truncate: bool = False) -> Encoded:
        """The prompt of an item.

        Args:
            room: positions to leave for the response.

        Raises:
            ValueError: there is neither text nor picture, more than the window holds, or a processor whose text cannot be followed.
        """
        if not item.prompt.strip() and item.image is None:
            raise ValueError(f"item {item.id!r} has an empty prompt")
        segments = self.segments(item)
        text = "".join(s.text for s in segments)
        # A template that writes BOS itself must not get a second one.
        special = not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))
        ids, spans = encode(self.tokenizer, segments, special=special)
        inputs: dict[str, Tensor] = {}
        if (picture := item.picture()) is not None:
            whole, inputs = self.look(picture, text, ids, special)
            spans = self._follow(whole, ids, spans, item.id)
            ids = whole
        flags: tuple[str, ...] = ()
        if self.window is not None:
            ids, spans, flags = cut_to_window(ids, spans, self.window - room, truncate, self.name, item.id)
        return Encoded(ids, spans, inputs, flags)

    @torch.inference_mode()
    def look(self, picture: Image.Image, text: str, ids: list[int], special: bool) -> tuple[list[int], dict[str, Tensor]]:
        """The ids of a prompt with its picture's positions, and the inputs that carry the picture."""
        if self.processor is not None:
            given = dict(self.processor(images=[picture], text=[text], return_tensors="pt", add_special_tokens=special))
            whole = given.pop("input_ids")[0]
            for key in ALONG:
                marks = given.pop(key, None)
                if marks is not None and not torch.equal(marks[0].long(), (whole == self.image_id).long()):
                    raise ValueError(
                        f"{self.name} marks its positions with {key} in a way that is not known here, so it cannot be read"
                    )
            given.pop("attention_mask", None)
            return whole.tolist(), self._place(given)
        inputs = self._place(dict(self.image_processor(images=[picture], return_tensors="pt")))
        features = sum(len(f) for f in self.network.get_image_features(**inputs).pooler_output)
        at = ids.index(self.image_id)
        return ids[:at] + [self.image_id] * features + ids[at + 1 :], inputs

    def _place(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
        return {k: v.to(self.device, self.network.dtype if v.is_floating_point() else v.dtype) for k, v in tensors.items()}

    def _follow(self, whole: list[int], ids: list[int], spans: tuple[Span, ...], item: str) -> tuple[Span, ...]:
        """The spans of a prompt in which a processor has made the one placeholder many tokens.

        The text behind the picture is tokenised alike with and without it, so its positions are counted from the end.
        """
        same = next(
            (k for k, (a, b) in enumerate(zip(reversed(whole), reversed(ids), strict=False)) if a != b), min(len(whole), len(ids))
        )
        kinds: list[tuple[Modality, Kind]] = [(s.modality, s.kind) for s in spans for _ in range(len(s))]
        words = [k for k, (_, kind) in enumerate(kinds) if kind == "content" and ids[k] != self.image_id]
        if self.image_id not in whole or (words and words[0] < len(ids) - same):
            raise ValueError(f"the processor of {self.name} rewrites the text of item {item!r}, so its positions cannot be told")
        outside: tuple[Modality, Kind] = ("text", "template")
        feature: tuple[Modality, Kind] = ("image", "content")
        kinds = [outside] * (len(whole) - same) + kinds[len(kinds) - same :]
        return spans_of([feature if token == self.image_id else kind for token, kind in zip(whole, kinds, strict=True)])

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
        # All items first: one that cannot be taken is known before any is run.
        prompts = [self.encode(item, generation.tokens or 0, truncate) for item in items]
        responses = []
        for k, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
            ids, inputs = self._inputs(prompt.ids, prompt.inputs)
            seeds = [item_seed(seed, item)]
            [written] = write_text(
                self.network, self.tokenizer, ids, torch.ones_like(ids), generation, seeds, self.ends, self.pad_id, **inputs
            )
            if trace is not None:
                with trace.record(self._stack, [Row(k, prompt.spans + written.spans(len(prompt.ids)))]):
                    self.read(prompt.ids + written.ids, prompt.inputs)
            responses.append(written.response(prompt.flags))
        return responses

    def read(self, sequence: list[int], picture: dict[str, Tensor]) -> None:
        """The teacher-forced pass over a prompt and its response."""
        ids, inputs = self._inputs(sequence, picture)
        self.network.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs)

    def _inputs(self, sequence: list[int], picture: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        ids = torch.tensor([sequence], device=self.device)
        marks = {key: (ids == self.image_id).int() for key in self._along} if picture else {}
        return ids, picture | marks


def load(path: str, name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> ImageTextLM:
    """The image-and-text-to-text model of a local folder or hub id.

    Raises:
        ValueError: a file is missing or cannot be reached (the sentence names it), or the processor needs torchvision.
    """
    path = str(path)
    tokenizer = load_tokenizer(path)
    image_processor = processor = None
    try:
        processor = part(path, "preprocessor_config.json", lambda: AutoProcessor.from_pretrained(path, trust_remote_code=False))
    except ImportError:
        # Its video half needs torchvision, and is built whether there is a video or not.
        image_processor = part(path, "preprocessor_config.json", lambda: AutoImageProcessor.from_pretrained(path, backend="pil"))
    network = load_network(AutoModelForImageTextToText, path, device, dtype)
    return ImageTextLM(network, getattr(processor, "tokenizer", tokenizer), name, image_processor, processor, source_of(path))
