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

import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from unisonde.data import speech, spoken
from unisonde.data.item import Item
from unisonde.models.bridged import Prompted
from unisonde.models.speech_smollm import Projector, ProjectorConfig, SpeechSmolLM, assemble
from unisonde.train.loop import Schedule, autocast_dtype
from unisonde.train.projector import Encoded, Stage, Writer, export, fit_stages, initialise, record_of, workshop


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
    spell: Schedule = field(default_factory=lambda: Schedule(steps=300, rate=1e-3, warmup=50, weight_decay=0.01))
    write: Schedule = field(default_factory=lambda: Schedule(steps=300, rate=1e-3, warmup=20, weight_decay=0.01))


# ---------------------------------------------------------------------------------------------------------------- recordings


@torch.inference_mode()
def hear_all(model: SpeechSmolLM, items: Sequence[Item], texts: Sequence[str], what: str) -> list[Encoded]:
    """Recordings through the encoder, shortest first."""
    heard = []
    for item, text in track(list(zip(items, texts, strict=True)), f"hearing {what}", console=Console(stderr=True)):
        prompted = model.prepare(item, 1)
        joined = model.join(model.hear(prompted.inputs["mel"].to(model.device)), prompted.frames)[0]
        heard.append(Encoded(joined.half().cpu(), model.tokens_of(text), model.tokens_of(f" {text}")))
    return sorted(heard, key=lambda one: len(one.joined))


def draw(rng: random.Random, pools: Sequence[Sequence[Encoded]], share: float, size: int) -> list[Encoded]:
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

    def loss(self, features: Sequence[Tensor], batch: Sequence[Encoded]) -> Tensor:
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


# ------------------------------------------------------------------------------------------------------------------ training


def train(out: Path, recipe: Recipe | None = None) -> Path:
    """Make the projector and write it to the folder `out`; go on where an earlier call with the same recipe was killed.

    Raises:
        ValueError: `out` holds files, or the beginnings of another recipe; espeak-ng, a package with weights or the digits are missing.
    """
    recipe = recipe or Recipe()
    spoken.check_program()
    digits, held_digits = speech.fsdd(split="train"), speech.fsdd(split="test")
    model = assemble(Projector(recipe.projector), recipe.projector, device="cpu", dtype=torch.float32)
    with workshop(out, recipe) as work:
        started = time.monotonic()
        sentences = spoken.items("text", "train", recipe.seed, recipe.sentences)
        pools = [
            hear_all(model, digits, [item.labels["digit"] for item in digits], "digits"),
            hear_all(model, sentences, [item.labels["sentence"] for item in sentences], "sentences"),
        ]
        hearing = time.monotonic() - started
        efforts = fit_projector(model, pools, recipe, model.prepare(digits[0], 1), work)
        held = {"digits": held_digits, "sentences": spoken.items("text", "test", recipe.seed, recipe.held_out)}
        recordings = {"digits": len(digits), "sentences": len(sentences), "words": len(spoken.WORDS)}
        record = record_of(recipe, {"hearing": {"seconds": hearing}, **efforts}, recordings=recordings)
        export(model.network.projector, model.config.to_dict(), out, record, scores(model, held))
    return out


def fit_projector(
    model: SpeechSmolLM, pools: Sequence[Sequence[Encoded]], recipe: Recipe, prompted: Prompted, work: Path
) -> dict[str, dict[str, float]]:
    """Both stages, in place; the time that each took.

    Args:
        pools: recordings of digits and of sentences.
        prompted: any prompt with a recording, for its template.
        work: the folder of the checkpoints.
    """
    embeddings = model.language_model.get_input_embeddings().weight.detach()
    initialise(model.network.projector, embeddings, recipe.seed)
    words = sorted({token for pool in pools for one in pool for token in one.words})
    spell = Stage("spell", recipe.spell, Speller(embeddings, words, recipe.sharpness).loss)
    write = Stage("write", recipe.write, Writer(model, prompted, autocast_dtype(recipe.precision)).loss)

    def batch(rng: random.Random) -> list[Encoded]:
        return draw(rng, pools, recipe.digits, recipe.size)

    return fit_stages(model, (spell, write), batch, recipe.seed, recipe.precision, recipe.size, recipe.batches, work)


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
