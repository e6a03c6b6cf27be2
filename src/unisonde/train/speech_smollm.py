"""How `speech-smollm` is made: a projector from the encoder of Whisper tiny.en to SmolLM2-135M, both frozen, learns to transcribe.

Nothing is learnt but transcription: digits of the Free Spoken Digit Dataset (its training takes) and sentences of `unisonde.data.spoken`.
Encoder and decoder never change, so the encoder's states of every recording are worked out once. Two stages, both trained on what
was said and on nothing else:

| stage | the loss | runs |
|---|---|---|
| spell | connectionist temporal classification (Graves et al., ICML 2006) of features, read as embeddings of words | projector |
| write | cross-entropy of the transcript, as the decoder writes it after features and request | projector and decoder |

Spelling costs a hundredth of writing a step and brings features to where the decoder's words are; writing alone has to find that out
through thirty layers.
"""

from __future__ import annotations

import copy
import json
import platform
import random
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache

from unisonde.data import speech, spoken
from unisonde.data.item import Item
from unisonde.models.bridged import Prompted
from unisonde.models.speech_smollm import Projector, ProjectorConfig, SpeechSmolLM, assemble
from unisonde.train.loop import Schedule, autocast_dtype, fit


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out.

    Attributes:
        precision: `auto`, `bf16` or `fp32`, of projector and decoder in training.
        sentences: training sentences a category of `unisonde.data.spoken`.
        held_out: held-out sentences a category, for the figures.
        digits: share of batches that hold digits.
        size: recordings in a batch.
        batches: batches in a step.
        sharpness: of spelling, what the cosine of a feature and an embedding is multiplied by.
    """

    seed: int = 0
    precision: str = "auto"
    sentences: int = 560
    held_out: int = 30
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    digits: float = 0.2
    size: int = 16
    batches: int = 2
    sharpness: float = 20.0
    spell: Schedule = field(default_factory=lambda: Schedule(steps=1200, rate=2e-3, warmup=50, weight_decay=0.01))
    write: Schedule = field(default_factory=lambda: Schedule(steps=300, rate=1e-3, warmup=20, weight_decay=0.01))


# ---------------------------------------------------------------------------------------------------------------- recordings


@dataclass(frozen=True)
class Heard:
    """A recording as the encoder gives it, and what was said.

    Attributes:
        joined: what enters the projector, (n, stack d), float16.
        ids: the tokens of the transcript, without an end.
        words: the same, as they stand inside a sentence.
    """

    joined: Tensor
    ids: list[int]
    words: list[int]


@torch.inference_mode()
def hear_all(model: SpeechSmolLM, items: Sequence[Item], texts: Sequence[str], what: str) -> list[Heard]:
    """Recordings through the encoder, shortest first."""
    heard = []
    for item, text in track(list(zip(items, texts, strict=True)), f"hearing {what}", console=Console(stderr=True)):
        prompted = model.prepare(item, 1)
        joined = model.join(model.hear(prompted.inputs["mel"].to(model.device)), prompted.frames)[0]
        heard.append(Heard(joined.half().cpu(), model.tokens_of(text), model.tokens_of(f" {text}")))
    return sorted(heard, key=lambda one: len(one.joined))


def draw(rng: random.Random, pools: Sequence[Sequence[Heard]], share: float, size: int) -> list[Heard]:
    """A batch out of the first pool with probability `share`, else out of the second: recordings of about one length."""
    pool = pools[0 if rng.random() < share else 1]
    stretch = min(len(pool), 8 * size)
    start = rng.randrange(len(pool) - stretch + 1)
    return rng.sample(pool[start : start + stretch], min(size, stretch))


# -------------------------------------------------------------------------------------------------------------------- losses


class Speller:
    """Features as words: the cosine of each feature with the decoder's embeddings, both centred, and a constant for no word at all."""

    def __init__(self, embeddings: Tensor, words: Sequence[int], sharpness: float) -> None:
        self.centre = embeddings.mean(0)
        self.table = F.normalize(embeddings[list(words)] - self.centre, dim=1)
        self.number = {token: 1 + k for k, token in enumerate(words)}
        self.sharpness = sharpness

    def loss(self, features: Sequence[Tensor], batch: Sequence[Heard]) -> Tensor:
        """Mean nats a token of the most likely ways to spell the transcripts: features (n, D) each."""
        lengths = torch.tensor([len(one) for one in features])
        padded = nn.utils.rnn.pad_sequence(list(features)).float()
        logits = self.sharpness * F.normalize(padded - self.centre, dim=-1) @ self.table.T
        blank = torch.full_like(logits[..., :1], 0.25 * self.sharpness)
        targets = [[self.number[token] for token in one.words] for one in batch]
        counts = torch.tensor([len(target) for target in targets])
        flat = torch.tensor([number for target in targets for number in target])
        scores = torch.cat([blank, logits], -1).log_softmax(-1)
        # A recording too short for its words can be spelt in no way.
        return F.ctc_loss(scores, flat, lengths, counts, reduction="mean", zero_infinity=True)


class Writer:
    """The frozen decoder: what it would write after the template's beginning, features and the request.

    The beginning is the same for all, so its keys and values are worked out once.
    """

    def __init__(self, model: SpeechSmolLM, prompted: Prompted, dtype: torch.dtype | None) -> None:
        decoder = model.language_model
        self.decoder = decoder if dtype is None else copy.deepcopy(decoder).to(dtype)
        slots = prompted.slots
        head, self.tail = prompted.ids[: slots[0]], prompted.ids[slots[-1] + 1 :]
        self.end = model.tokenizer.eos_token_id
        with torch.no_grad():
            cache = self.decoder.model(input_ids=torch.tensor([head]), use_cache=True).past_key_values
        self.beginning = [(layer.keys, layer.values) for layer in cache.layers]

    def words(self, ids: Sequence[int]) -> Tensor:
        return self.decoder.get_input_embeddings()(torch.tensor(list(ids)))

    def loss(self, features: Sequence[Tensor], batch: Sequence[Heard]) -> Tensor:
        """Mean nats a token of the transcripts, their end counted in: features (n, D) each."""
        rows = []
        for given, one in zip(features, batch, strict=True):
            words = self.words([*self.tail, *one.ids])
            rows.append(torch.cat([given.to(words.dtype), words]))
        # Padding is on the right, where no position that counts looks.
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.beginning):
            cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer)
        states = self.decoder.model(inputs_embeds=padded, past_key_values=cache, use_cache=True).last_hidden_state
        read = [state[len(row) - len(one.ids) - 1 : len(row)] for state, row, one in zip(states, rows, batch, strict=True)]
        wanted = torch.tensor([token for one in batch for token in [*one.ids, self.end]])
        return F.cross_entropy(self.decoder.lm_head(torch.cat(read)).float(), wanted)


def project(projector: nn.Module, batch: Sequence[Heard], dtype: torch.dtype | None) -> list[Tensor]:
    """Features (n, D) of each recording, all by one pass."""
    joined = torch.cat([one.joined for one in batch]).float()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
        together = projector(joined)
    return list(together.split([len(one.joined) for one in batch]))


# ------------------------------------------------------------------------------------------------------------------ training


@torch.no_grad()
def initialise(projector: Projector, embeddings: Tensor, seed: int) -> None:
    """Weights that keep the scale of what they are given (LeCun); features of the mean size of the decoder's embeddings."""
    generator = torch.Generator().manual_seed(seed)
    for linear in (projector.gate, projector.up, projector.down):
        linear.weight.normal_(std=linear.in_features**-0.5, generator=generator)
    projector.norm_out.weight.fill_(float(embeddings.square().mean().sqrt()))


def train(out: Path, recipe: Recipe | None = None) -> Path:
    """Make the projector and write it to the folder `out`; go on where an earlier call with the same recipe was killed.

    Raises:
        ValueError: `out` holds files, or the beginnings of another recipe; espeak-ng, a package with weights or the digits are missing.
    """
    recipe = recipe or Recipe()
    written = json.dumps(asdict(recipe), indent=1)
    work = out.with_name(out.name + ".training")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} already holds files; name another folder with --out, or remove it")
    begun = work / "recipe.json"
    if begun.exists() and begun.read_text() != written:
        raise ValueError(f"{work} was begun with another recipe; go on with that one, or remove the folder")
    spoken.check_program()
    digits, held_digits = speech.fsdd(split="train"), speech.fsdd(split="test")
    model = assemble(Projector(recipe.projector), recipe.projector, device="cpu", dtype=torch.float32)
    work.mkdir(parents=True, exist_ok=True)
    begun.write_text(written)

    started = time.monotonic()
    sentences = spoken.items("text", "train", recipe.seed, recipe.sentences)
    pools = [
        hear_all(model, digits, [item.labels["digit"] for item in digits], "digits"),
        hear_all(model, sentences, [item.labels["sentence"] for item in sentences], "sentences"),
    ]
    hearing = time.monotonic() - started

    efforts = fit_projector(model, pools, recipe, model.prepare(digits[0], 1), work)
    held = {"digits": held_digits, "sentences": spoken.items("text", "test", recipe.seed, recipe.held_out)}
    record = {
        "recipe": asdict(recipe),
        "recordings": {"digits": len(digits), "sentences": len(sentences), "words": len(spoken.WORDS)},
        "effort": {"hearing": {"seconds": hearing}, **efforts},
        "precision": str(autocast_dtype(recipe.precision) or torch.float32).removeprefix("torch."),
        "torch": torch.__version__,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "finished": time.strftime("%Y-%m-%d"),
    }
    export(model, out, record, scores(model, held))
    shutil.rmtree(work)
    return out


def fit_projector(
    model: SpeechSmolLM, pools: Sequence[Sequence[Heard]], recipe: Recipe, prompted: Prompted, work: Path
) -> dict[str, dict[str, float]]:
    """Both stages, in place; the time that each took.

    Args:
        pools: recordings of digits and of sentences.
        prompted: any prompt with a recording, for its template.
        work: the folder of the checkpoints.
    """
    projector, dtype = model.network.projector, autocast_dtype(recipe.precision)
    embeddings = model.language_model.get_input_embeddings().weight.detach()
    initialise(projector, embeddings, recipe.seed)
    words = sorted({token for pool in pools for one in pool for token in one.words})
    judges: dict[str, Any] = {"spell": Speller(embeddings, words, recipe.sharpness), "write": Writer(model, prompted, dtype)}
    efforts = {}
    for stage, schedule in (("spell", recipe.spell), ("write", recipe.write)):

        def loss(number: int, stage: str = stage) -> Tensor:
            batch = draw(random.Random(f"{recipe.seed}/{stage}/{number}"), pools, recipe.digits, recipe.size)
            return judges[stage].loss(project(projector, batch, dtype), batch)

        projector.requires_grad_(True).train()
        effort = fit(stage, projector, loss, schedule, work / f"{stage}.pt", recipe.size * recipe.batches, recipe.batches)
        efforts[stage] = asdict(effort)
    projector.requires_grad_(False).eval()
    return efforts


# ------------------------------------------------------------------------------------------------------------------- figures


def scores(model: SpeechSmolLM, held: dict[str, list[Item]]) -> dict[str, Any]:
    """What the model writes of held-out recordings: share of digits right, word error rate of sentences, and each transcript."""
    made: dict[str, Any] = {}
    for what, items in held.items():
        rows = []
        for item in track(items, f"transcribing held-out {what}", console=Console(stderr=True)):
            [response] = model.respond([item], "text", model.defaults("text"))
            wanted = item.labels["digit" if what == "digits" else "sentence"]
            rows.append((item.id, wanted, plain(response.text or "")))
        errors = sum(word_errors(said.split(), wanted.split()) for _, wanted, said in rows)
        made[what] = {
            "n": len(rows),
            "right": sum(said == wanted for _, wanted, said in rows),
            "words": sum(len(wanted.split()) for _, wanted, _ in rows),
            "errors": errors,
            "wrong": {id: [wanted, said] for id, wanted, said in rows if said != wanted},
        }
        made[what] |= {"accuracy": made[what]["right"] / len(rows), "word_error_rate": errors / made[what]["words"]}
    return made


def plain(text: str) -> str:
    """A transcript in small letters, without marks."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def word_errors(said: Sequence[str], wanted: Sequence[str]) -> int:
    """The fewest words to insert, drop or replace that turn one transcript into the other (Levenshtein)."""
    row = list(range(len(wanted) + 1))
    for count, word in enumerate(said, start=1):
        diagonal, row[0] = row[0], count
        for k, other in enumerate(wanted, start=1):
            diagonal, row[k] = row[k], min(row[k] + 1, row[k - 1] + 1, diagonal + (word != other))
    return row[-1]


def export(model: SpeechSmolLM, out: Path, record: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write a folder that `unisonde.load` opens: the projector in float16, its sizes, the record of its training, its figures."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name: tensor.half().contiguous() for name, tensor in model.network.projector.state_dict().items()}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config", model.config.to_dict()), ("training", record), ("scores", figures)):
        (partial / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    if out.exists():
        out.rmdir()  # empty, or train() would have refused
    partial.rename(out)
