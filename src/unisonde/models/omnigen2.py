"""OmniGen2 (arXiv 2506.18871): a Qwen2.5-VL that reads and writes, and a diffusion transformer that draws what it has read.

Text and pictures are read, and text is written, by the language model alone. To draw, it reads the prompt once; the states after its
last norm go into the diffusion transformer, which refines them and the noisy latents of the FLUX autoencoder apart and then runs them
through joint layers, text and picture seeing each other, at each of N steps. The language model is that of `transformers`
(`parts.omnigen2_mllm`), the autoencoder that of `diffusers`; the diffusion transformer and its sampler are ours
(`parts.omnigen2_network`). Here are the published templates, the spans, drawing and writing.

Two stacks, of layers that have nothing to do with each other; every measurement names its own.

`mllm`: the 36 layers of the language model, causal. Prompt states: the positions of the prompt's words and of its picture's features;
of a drawing in one pass over the prompt, `single`, which no step of sampling changes. Response states: of text, the positions at which
a response token is the input, in one teacher-forced pass over prompt and response (DESIGN.md, decision 3). A drawing has none here.

`dit`: the 32 joint layers of the diffusion transformer, at each evaluation of the velocity, `0000`, `0001`, ..., `final`, the last (at
t = 0.94 of the 50 published ones), and `clean`, one more on the finished latents at t = 1, which sampling never makes. The paper that
unisonde follows (arXiv 2604.10949) leaves OmniGen2's layer-wise response out: no layer of the language model holds one. Here it is
defined where prompt and response share a width: prompt states are the text part of the joint sequence, one position for each token
of the prompt, and response states its image part. Attention goes both ways, so these prompt states change from step to step, and
are recorded with each. `Reading(stacks=("mllm",))` leaves out what the paper leaves out. The refiners before the joint layers are
not read. Layer 33 is the state after the last norm, which the time scales. Marks and roles of the template are template in both
stacks. Of guidance the conditional branch is read.

Noise, latents and times stay in float32 whatever the weights are in; the published loop rounds them with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation, Model, Response, item_seed
from unisonde.models.parts import omnigen2_mllm as mllm
from unisonde.models.parts.checkpoint import Keys, empty, fill, tensors_of, weight_files
from unisonde.models.parts.decoder import find_stack
from unisonde.models.parts.omnigen2_network import OmniGen2Config, OmniGen2Transformer, filled, flow_times, guides
from unisonde.models.parts.pictures import to_pictures
from unisonde.models.parts.pretrained import OWN, ends_of, own_settings, pad_of, published, reach, read_json, settled, window_of
from unisonde.models.parts.prompts import check_marks, check_prompt, check_words, picture_places
from unisonde.models.parts.sampling import normals
from unisonde.models.parts.segments import Segment, content, encode, template
from unisonde.models.parts.text import Written, cut_to_window, pad, write_text
from unisonde.models.trace import Row, Span, Stack, Trace, recorded

BOS, EOS = "<|im_start|>", "<|im_end|>"
BEGIN_IMAGE, END_IMAGE, IMAGE = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
DRAW = "<|img|>"
"""What the language model answers where it would have a picture drawn; an answer ends there."""

SYSTEM = "You are a helpful assistant that generates high-quality images based on user instructions."
"""The published system prompt, of drawing and of answering."""

NEGATIVE = (
    "(((deformed))), blurry, over saturation, bad anatomy, disfigured, poorly drawn face, mutation, mutated, (extra_limb), (ugly), "
    "(poorly drawn hands), fused fingers, messy drawing, broken legs censor, censored, censor_bar"
)
"""The published prompt of guidance's other branch."""

WINDOW = 1024
"""The most tokens of a prompt to be drawn, its template counted."""


PIPELINES = ("OmniGen2Pipeline", "OmniGen2ChatPipeline")
"""What a published model_index.json says that it is."""

WEIGHTS = "diffusion_pytorch_model"
"""What `diffusers` calls weights."""

SCHEDULER = "FlowMatchEulerDiscreteScheduler"


class Network(nn.Module):
    """The language model and the diffusion transformer, in one module."""

    def __init__(self, language_model: Any, transformer: OmniGen2Transformer) -> None:
        super().__init__()
        self.mllm = language_model
        self.transformer = transformer


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn, where it is no sampling setting of `Generation`.

    Attributes:
        side: of a picture, in pixels.
        negative: the prompt of guidance's other branch.
        interval: the share of the steps made from which and up to which there is guidance; published is all of them.
        shift: whether times are moved towards noise, as the published scheduler says.
    """

    side: int = 1024
    negative: str = NEGATIVE
    interval: tuple[float, float] = (0.0, 1.0)
    shift: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"guidance is given over an interval within [0, 1], got {list(self.interval)}")


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it: token ids, what they hold, its picture, and whether it was cut."""

    ids: list[int]
    spans: tuple[Span, ...]
    picture: dict[str, Tensor] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


class OmniGen2(Model):
    """An OmniGen2 of any size.

    Args:
        language_model: a Qwen2.5-VL.
        transformer: the diffusion transformer; its text features are as wide as the states of the language model.
        vae: the autoencoder of its latents.
        tokenizer: of the language model, with character offsets.
        pictures: how image prompts are prepared.
        system: the system prompt; none if empty.
        generation: sampling settings a task, where they differ from the published ones.
        drawing: the rest of how pictures are drawn.

    Raises:
        ValueError: the parts do not fit each other.
    """

    family = "omnigen2"
    tasks = ("text", "image")

    def __init__(
        self,
        language_model: Any,
        transformer: OmniGen2Transformer,
        vae: Any,
        tokenizer: Any,
        pictures: Any,
        name: str,
        source: Path | None = None,
        system: str = SYSTEM,
        generation: dict[Task, Generation] | None = None,
        drawing: Drawing | None = None,
    ) -> None:
        text = language_model.config.get_text_config()
        if text.hidden_size != transformer.config.text_feat_dim:
            raise ValueError(
                f"the language model of {name} has states of width {text.hidden_size}, its diffusion transformer takes "
                f"{transformer.config.text_feat_dim}"
            )
        check_marks(tokenizer, (BOS, EOS, BEGIN_IMAGE, END_IMAGE, IMAGE), name, "OmniGen2")
        if len(tokenizer) > text.vocab_size:
            raise ValueError(f"the tokenizer of {name} has {len(tokenizer)} tokens, its network {text.vocab_size}")
        self.network = Network(language_model, transformer).eval()
        self.vae = vae.eval()
        self.tokenizer = tokenizer
        self.pictures = pictures
        self.name = name
        self.source = source
        self.system = system
        self.drawing = drawing or Drawing()
        self._stacks = (find_stack(language_model, "mllm"), transformer.stack)
        self._defaults: dict[Task, Generation] = {
            "text": Generation(tokens=256, temperature=published(language_model).temperature),
            "image": Generation(guidance=4.0, steps=50),
        }
        self._defaults |= generation or {}
        ends = [tokenizer.convert_tokens_to_ids(token) for token in (EOS, DRAW) if token in tokenizer.get_vocab()]
        self.ends = sorted({*ends, *ends_of(language_model, tokenizer, None)})
        self.pad_id = pad_of(language_model, tokenizer, self.ends)
        self.image_id = language_model.config.image_token_id

    @property
    def module(self) -> nn.Module:
        return self.network

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return self.network, self.vae

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return self._stacks

    @property
    def latent(self) -> tuple[int, int, int]:
        """The shape of a drawn latent.

        Raises:
            ValueError: a picture's side is not a whole number of tokens.
        """
        config, reduction = self.network.transformer.config, 2 ** (len(self.vae.config.block_out_channels) - 1)
        unit = reduction * config.patch_size
        if self.drawing.side < 1 or self.drawing.side % unit:
            raise ValueError(f"{self.name} draws pictures with a side of a multiple of {unit} pixels, got {self.drawing.side}")
        side = self.drawing.side // reduction
        return config.in_channels, side, side

    @property
    def tokens(self) -> int:
        """The number of content positions of an image response."""
        return (self.latent[1] // self.network.transformer.config.patch_size) ** 2

    def defaults(self, task: Task) -> Generation:
        return self._defaults[task]

    def identity(self) -> dict[str, Any]:
        drawing = {**vars(self.drawing), "interval": list(self.drawing.interval)}
        return super().identity() | {"drawing": drawing}

    # ------------------------------------------------------------------------------------------------------------- prompts

    def segments(self, item: Item, task: Task) -> list[Segment]:
        """The published templates: of drawing, up to the end of the user's turn; of answering, up to the assistant's."""
        head = (f"{BOS}system\n{self.system}{EOS}\n" if self.system else "") + f"{BOS}user\n"
        if task == "image":
            return [template(head), content(item.prompt), template(f"{EOS}\n")]
        seen = []
        if item.image is not None:
            seen = [template(f"<img1>: {BEGIN_IMAGE}"), content(IMAGE, "image"), template(END_IMAGE)]
        return [template(head), *seen, content(item.prompt), template(f"{EOS}\n{BOS}assistant\n")]

    def encode(self, item: Item, task: Task, room: int = 0, truncate: bool = False) -> Encoded:
        """The prompt of an item.

        Args:
            room: positions to leave for a text response.

        Raises:
            ValueError: the prompt is empty, has words that the tokenizer does not know or a token that stands for a picture, or is
                longer than the window.
        """
        check_prompt(item, task, self.name)
        ids, spans = encode(self.tokenizer, self.segments(item, task), special=False)
        check_words(self.tokenizer, ids, item, self.name)
        picture: dict[str, Tensor] = {}
        if ids.count(self.image_id) != (item.image is not None):
            raise ValueError(f"the text of item {item.id!r} holds {IMAGE}, which stands for a picture; leave it out")
        if (shown := item.picture()) is not None:
            picture, features = mllm.prepare(self.pictures, shown, item.id)
            ids, spans = widened(ids, spans, ids.index(self.image_id), features)
        window = WINDOW if task == "image" else (window_of(self.network.mllm) or 0) - room
        ids, spans, flags = cut_to_window(ids, spans, window, truncate, self.name, item.id)
        return Encoded(ids, spans, picture, flags)

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
            return [Response(self.tokens, image=picture, flags=p.flags) for p, picture in zip(prompts, pictures, strict=True)]
        responses = []
        # One by one: pictures differ in size, and the published settings look back at the prompt, of which padding is no part.
        for k, prompt in enumerate(prompts):
            written = self.write(prompt, generation, seeds[k])
            if trace is not None and trace.wants("single", "mllm"):
                with trace.record(self._stacks[0], [Row(k, prompt.spans + written.spans(len(prompt.ids)))]):
                    self.read(prompt, written.ids)
            responses.append(written.response(prompt.flags))
        return responses

    def write(self, prompt: Encoded, generation: Generation, seed: int) -> Written:
        """A text response."""
        ids = torch.tensor([prompt.ids], device=self.device)
        inputs = self._placed(prompt)
        if inputs:
            inputs["mm_token_type_ids"] = (ids == self.image_id).int()
        [written] = write_text(
            self.network.mllm, self.tokenizer, ids, torch.ones_like(ids), generation, [seed], self.ends, self.pad_id, **inputs
        )
        return written

    def read(self, prompt: Encoded, response: Sequence[int]) -> Tensor:
        """The teacher-forced pass over a prompt and a text response: states after the last norm, (1, L, D)."""
        ids = torch.tensor([[*prompt.ids, *response]], device=self.device)
        where = picture_places([prompt.spans], [0], ids.shape[1]).to(self.device)
        return mllm.states(self.network.mllm, ids, torch.ones_like(ids), where, self._placed(prompt))

    def _placed(self, prompt: Encoded) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in prompt.picture.items()}

    # ------------------------------------------------------------------------------------------------------------- drawing

    @torch.inference_mode()
    def draw(self, prompts: Sequence[Encoded], generation: Generation, seeds: Sequence[int], trace: Trace | None = None) -> Tensor:
        """Latents of drawn pictures, float32: B prompts -> (B, c, h, w)."""
        assert generation.guidance is not None and generation.steps is not None
        transformer, steps, count = self.network.transformer, generation.steps, len(prompts)
        texts, negative = self.texts(prompts, generation.guidance > 1, trace)
        drawn = [(*p.spans, Span(len(p.ids), len(p.ids) + self.tokens, "response", "image")) for p in prompts]
        rows = [Row(k, spans) for k, spans in enumerate(drawn)]

        def around(step: int) -> AbstractContextManager[Any]:
            name = "final" if step == steps - 1 else f"{step:04d}"
            unread = count * guides(step, steps, generation.guidance or 1.0, self.drawing.interval)
            return recorded(trace, self._stacks[1], [*rows, *[None] * unread], name)

        noise = normals(seeds, self.latent).to(self.device)
        times = flow_times(steps, self.latent[1] * self.latent[2], self.drawing.shift)
        latents = transformer.draw(texts, negative * count, noise, times, generation.guidance, self.drawing.interval, around)
        if trace is not None and trace.wants("clean", "dit"):
            with trace.record(self._stacks[1], rows, "clean"):
                transformer.velocity(texts, latents, torch.ones(count))
        return latents

    def texts(self, prompts: Sequence[Encoded], guide: bool, trace: Trace | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """What the diffusion transformer takes of the prompts, and of the negative prompt if there is guidance."""
        sequences = [p.ids for p in prompts]
        if guide:
            sequences.append(encode(self.tokenizer, self.segments(Item("", "", self.drawing.negative), "image"), special=False)[0])
        ids, there = pad(sequences, self.pad_id, "right")
        rows = [*(Row(k, p.spans) for k, p in enumerate(prompts)), *[None] * guide]
        with recorded(trace, self._stacks[0], rows):
            features = mllm.states(self.network.mllm, ids.to(self.device), there.to(self.device))
        read = self.network.transformer.read(features, [len(sequence) for sequence in sequences])
        return read[: len(prompts)], read[len(prompts) :]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents: (B, c, h, w) -> B pictures."""
        scaled = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return to_pictures(self.vae.decode(scaled.to(self.vae.dtype)).sample)


def widened(ids: list[int], spans: tuple[Span, ...], at: int, count: int) -> tuple[list[int], tuple[Span, ...]]:
    """A prompt with its picture's placeholder, at position `at`, repeated for each of its features."""
    more = count - 1
    moved = (Span(s.start + more * (s.start > at), s.stop + more * (s.stop > at), s.role, s.modality, s.kind) for s in spans)
    return ids[:at] + [ids[at]] * count + ids[at + 1 :], tuple(moved)


# ---------------------------------------------------------------------------------------------------------------------- loading


def load(
    path: str,
    name: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> OmniGen2:
    """The OmniGen2 of a local folder or hub id, in the layout of `OmniGen2/OmniGen2`: that of `diffusers`.

    `model_index.json` and the folders `mllm/`, `transformer/`, `vae/`, `scheduler/` and `processor/`.

    Args:
        dtype: of the language model and the diffusion transformer; bfloat16 on a GPU and float32 on a CPU if None. The autoencoder is
            always float32.

    Raises:
        ValueError: a file is missing or damaged, or the hub cannot be reached; the sentence names the file.
    """
    path = str(path)
    device, dtype = settled(device, dtype)
    made_by = read_json(path, "model_index.json").get("_class_name")
    if made_by not in PIPELINES:
        raise ValueError(f"{name} is a {made_by}, where OmniGen2 is an {PIPELINES[0]}")
    config = OmniGen2Config.from_dict(read_json(path, "transformer/config.json"))
    tokenizer, pictures = mllm.load_tokenizer(path), mllm.load_pictures(path)
    shift = time_shift(read_json(path, "scheduler/scheduler_config.json"), name)
    language_model = mllm.load_network(path, device, dtype, name)
    weights = tensors_of(weight_files(path, f"transformer/{WEIGHTS}"))
    transformer = filled(config, weights, device, dtype, f"{name} (diffusion transformer)")
    vae = load_autoencoder(path, device, name)
    if vae.config.latent_channels != config.in_channels:
        raise ValueError(
            f"the autoencoder of {name} has latents of {vae.config.latent_channels} channels, its transformer takes {config.in_channels}"
        )
    index = reach(path, "model_index.json")
    source = Path(path) if index is None else index.parent
    generation, system = own_settings(source)  # the twin's: what differs from the published model
    drawing = Drawing(shift=shift)
    if generation:
        own = read_json(str(source), OWN)["drawing"]
        drawing = Drawing(**own | {"interval": tuple(own["interval"]), "shift": shift})
    return OmniGen2(
        language_model,
        transformer,
        vae,
        tokenizer,
        pictures,
        name,
        source,
        SYSTEM if system is None else system,
        generation,
        drawing,
    )


def time_shift(raw: dict[str, Any], name: str) -> bool:
    """Whether a published scheduler moves times towards noise, the more, the larger the picture.

    Raises:
        ValueError: it is another scheduler.
    """
    if raw.get("_class_name") != SCHEDULER:
        raise ValueError(f"{name} draws with a {raw.get('_class_name')}, where OmniGen2 has a {SCHEDULER}")
    return bool(raw.get("dynamic_time_shift", True))


def load_autoencoder(path: str, device: torch.device, name: str) -> Any:
    """The autoencoder in `vae/` of a folder or hub id, in float32.

    Raises:
        ValueError: it is not there, or its tensors do not fill it exactly.
    """
    raw = read_json(path, "vae/config.json")
    vae = empty(lambda: AutoencoderKL.from_config(raw))
    fill(vae, tensors_of(weight_files(path, f"vae/{WEIGHTS}")), Keys(), device, torch.float32, f"{name} (autoencoder)")
    return vae.requires_grad_(False)
