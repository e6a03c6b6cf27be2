"""How `twin/janus-pro` is made: image codes and what patches show first, then one Llama for drawing, inferring, captioning and
answering together.

`unisonde train janus-pro` runs this file from nothing to a folder that `unisonde.load` opens; the shipped weights came from it.
"""

from __future__ import annotations

import json
import platform
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation
from unisonde.models.janus_pro import BOS, EOS, IMAGE, PAD, SPECIAL_TOKENS, JanusPro, twin
from unisonde.models.parts.text import pad
from unisonde.train.export import new_folder, save_hub_layout, save_own
from unisonde.train.image_codes import SCHEDULE as CODES
from unisonde.train.image_codes import code_weights, patch_codes, pixels_of, train_image_codes
from unisonde.train.loop import Effort, Schedule, autocast, autocast_dtype, fit
from unisonde.train.patch_words import SCHEDULE as VISION
from unisonde.train.patch_words import train_patch_words
from unisonde.train.tabletop_batches import Example, Kind, example, word_tokenizer

GENERATION: dict[Task, Generation] = {
    "text": Generation(tokens=96, temperature=0.0),
    "image": Generation(temperature=0.5, guidance=2.0),
}
"""The twin's sampling settings. Its world is small and exact, so it draws cooler and with less guidance than the published model."""


JOINT = Schedule(steps=2500, rate=3e-3, matrix_rate=0.015, warmup=60, weight_decay=0.02)

FIGURE = 4.0
"""What a code of a figure counts in the loss of a drawing against one of the plain background. Most codes are background, soon known."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out.

    Attributes:
        mix: sequences of each kind in a batch.
        batches: batches in a step.
        unconditional: share of drawings that are learnt without a prompt, for guidance.
        precision: `auto`, `bf16` or `fp32`.
    """

    seed: int = 0
    precision: str = "auto"
    mix: dict[Kind, int] = field(default_factory=lambda: {"draw": 14, "infer": 4, "caption": 3, "answer": 34})
    batches: int = 2
    unconditional: float = 0.1
    codes: Schedule = CODES
    vision: Schedule = VISION
    joint: Schedule = JOINT


def new_twin(seed: int) -> JanusPro:
    """An untrained twin."""
    tokenizer = word_tokenizer(SPECIAL_TOKENS, BOS, EOS, PAD)
    config = twin(len(tokenizer), SPECIAL_TOKENS.index(IMAGE) + 1)
    torch.manual_seed(seed)
    # Eager attention: on a CPU, at these lengths and in bfloat16, a step took 0.57 s against 0.83 s with the fused kernel.
    network = JanusForConditionalGeneration._from_config(config, attn_implementation="eager")
    processor = JanusImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_size=1)
    initialise(network, seed)
    return JanusPro(network, tokenizer, processor, "twin/janus-pro", system="", generation=GENERATION)


LIKENESS = 0.8
"""Share of what patches look like in the variance of the embeddings and of the head of untrained codes. The rest sets each apart."""

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "projection_layer.weight", "fc2.weight")


@torch.no_grad()
def initialise(network: JanusForConditionalGeneration, seed: int) -> None:
    """Weights that keep the scale of what they are given (LeCun), embeddings of about unit size, quiet residual branches, and image codes
    that are alike where their patches look alike (`LIKENESS`).

    With the default of `transformers`, 0.02 for everything, the features of image codes begin at 2e-4, which the first norm lifts to a
    fifth of unit size, and attention logits of unit inputs spread by 0.06; the twin learns several times slower (docs/twins.md).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if weight.ndim < 2 or name.startswith("model.vqmodel."):  # norms and biases are right; the tokenizer has its own
            continue
        std = {"model.language_model.embed_tokens.weight": 0.5, "model.generation_embeddings.weight": 1.0}.get(
            name, weight[0].numel() ** -0.5
        )
        inside = ".layers." in name and name.endswith(RESIDUAL_OUTPUTS)
        weight.normal_(std=0.3 * std if inside else std, generator=generator)
    look = patch_codes().look(40)
    for codes in (network.model.generation_embeddings.weight, network.model.generation_head.vision_head.weight):
        spread = torch.randn(look.shape[1], codes.shape[1], generator=generator, dtype=look.dtype) / look.shape[1] ** 0.5
        codes.copy_(codes * (1 - LIKENESS) ** 0.5 + look / look.std() @ spread * codes.std() * LIKENESS**0.5)


@dataclass(frozen=True)
class Batch:
    """Sequences of one kind, padded on the right: ids (B, L), and the token after each position, -100 where nothing is learnt."""

    ids: Tensor
    next_token: Tensor
    pixels: Tensor | None = None
    codes: Tensor | None = None


def collate(model: JanusPro, examples: Sequence[Example], rng: random.Random, unconditional: float) -> Batch:
    """Examples of one kind as the model will see them in use: its own templates, the response after them."""
    kind = examples[0].kind
    sequences, starts = [], []
    for made in examples:
        shown = made.kind in ("caption", "answer")
        item = Item("", "", made.prompt, Path() if shown else None)  # the path stands for a picture; pixels come below
        text = "".join(segment.text for segment in model.segments(item, "image" if kind == "draw" else "text"))
        ids = model.tokenizer(text)["input_ids"]
        if kind == "draw":
            if rng.random() < unconditional:
                ids = [ids[0], *[model.pad_id] * (len(ids) - 2), ids[-1]]
            response = [model.image_id] * model.codes
        else:
            response = [*model.tokenizer(made.response, add_special_tokens=False)["input_ids"], model.eos_id]
        sequences.append(ids + response)
        starts.append(len(ids))
    ids, mask = pad(sequences, model.pad_id, "right")
    positions = torch.arange(ids.shape[1])
    learnt = (positions + 1 >= torch.tensor(starts)[:, None]) & (mask.roll(-1, 1) == 1) & (positions + 1 < ids.shape[1])
    next_token = torch.where(learnt, ids.roll(-1, 1), -100)
    scenes = [made.scene for made in examples]
    if kind == "draw":
        return Batch(ids, next_token, codes=patch_codes().of(scenes))
    return Batch(ids, next_token, pixels=None if kind == "infer" else pixels_of(scenes))


def learn_words(
    model: JanusPro, checkpoint: Path, seed: int, precision: torch.dtype | None = None, schedule: Schedule = VISION
) -> Effort:
    """The vision encoder and its aligner learn to tell what patches show."""
    config = model.network.config
    encoder = nn.ModuleList([model.network.model.vision_model, model.network.model.aligner])
    width, patch = config.text_config.hidden_size, config.vision_config.patch_size
    return train_patch_words(encoder, model.see, width, patch, checkpoint, seed, precision, schedule)


def joint_parts(model: JanusPro) -> nn.ModuleList:
    """What is trained jointly: everything but the image tokenizer and the vision encoder, which have had their lessons."""
    inner = model.network.model
    generation = [inner.generation_embeddings, inner.generation_aligner, inner.generation_head]
    return nn.ModuleList([*generation, inner.language_model, model.network.lm_head])


def joint_loss(model: JanusPro, batch: Batch) -> Tensor:
    """Cross-entropy of the response, in nats a token: of image codes for `draw`, those of figures weighted; of words for the others."""
    network = model.network
    features = None
    if batch.codes is not None:
        features = model.code_features(batch.codes)
    elif batch.pixels is not None:
        with torch.no_grad():
            features = model.see(batch.pixels)
    states = network.model.language_model(inputs_embeds=model.embed(batch.ids, features), use_cache=False).last_hidden_state
    learnt = batch.next_token != -100
    if batch.codes is not None:
        each = F.cross_entropy(network.model.generation_head(states[learnt]).float(), batch.codes.flatten(), reduction="none")
        weight = code_weights(batch.codes, FIGURE).flatten()
        return (each * weight).sum() / weight.sum()
    return F.cross_entropy(network.lm_head(states[learnt]).float(), batch.next_token[learnt])


def train(out: Path, recipe: Recipe | None = None) -> Path:
    """Make the twin and write it to the folder `out`; go on where an earlier call with the same recipe was killed.

    Raises:
        ValueError: `out` holds the beginnings of another recipe, or something else.
    """
    recipe = recipe or Recipe()
    written = json.dumps(asdict(recipe), indent=1)
    work = out.with_name(out.name + ".training")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} already holds files; name another folder with --out, or remove it")
    work.mkdir(parents=True, exist_ok=True)
    begun = work / "recipe.json"
    if begun.exists() and begun.read_text() != written:
        raise ValueError(f"{work} was begun with another recipe; go on with that one, or remove the folder")
    begun.write_text(written)

    model = new_twin(recipe.seed)
    network = model.network
    code_effort = train_image_codes(network.model.vqmodel, work / "codes.pt", recipe.seed, recipe.codes)
    precision = autocast_dtype(recipe.precision)
    vision_effort = learn_words(model, work / "vision.pt", recipe.seed, precision, recipe.vision)

    def loss(number: int) -> Tensor:
        rng = random.Random(f"{recipe.seed}/joint/{number}")
        total = torch.zeros(())
        sequences = sum(recipe.mix.values())
        for kind, count in recipe.mix.items():
            batch = collate(model, [example(rng, kind) for _ in range(count)], rng, recipe.unconditional)
            with autocast(precision, model.device.type):
                total = total + joint_loss(model, batch) * (count / sequences)
        return total

    samples = sum(recipe.mix.values()) * recipe.batches
    joint_effort = fit("twin", joint_parts(model).train(), loss, recipe.joint, work / "joint.pt", samples, recipe.batches)
    record = {
        "recipe": asdict(recipe),
        "effort": {"codes": asdict(code_effort), "vision": asdict(vision_effort), "joint": asdict(joint_effort)},
        "precision": str(precision or torch.float32).removeprefix("torch."),
        "torch": torch.__version__,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "finished": time.strftime("%Y-%m-%d"),
    }
    export(model, out, record)
    shutil.rmtree(work)
    return out


def export(model: JanusPro, out: Path, record: dict[str, Any] | None = None) -> None:
    """Write a folder that `unisonde.load` opens: weights in float16, configuration, tokenizer, image processor, settings, record.

    Raises:
        ValueError: `out` already holds files.
    """
    with new_folder(out) as folder:
        save_hub_layout(model, folder)
        save_own(model, folder, record, system=model.system)
