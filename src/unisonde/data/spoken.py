"""Spoken sentences: a small grammar of English, synthesised by espeak-ng in many voices, rates and pitches.

| category | an example |
|---|---|
| place | the old dog sleeps under the table |
| deed | my brother paints a green boat today |
| count | there are seven brown horses near the river |
| state | your kitchen is warm and clean |
| question | can you see the yellow bird |
| request | please bring the heavy basket |
| digits | four nine zero seven two |

Sentences have four to eight words out of `WORDS`, no two of which sound alike. One sentence in eight, by a hash of its text, belongs
to `test`, the others to `train`, so none is in both. What a sentence says and who says it are drawn independently. The sound depends on
the text, the voice and the release of espeak-ng, and on nothing else.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import subprocess
import wave
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from unisonde.data.item import Item, Task
from unisonde.data.sound import REQUEST, Sound, read_sound
from unisonde.data.speech import DIGITS

Split = Literal["train", "test"]

PROGRAM = "espeak-ng"
INSTALL = "apt-get install espeak-ng (macOS: brew install espeak-ng)"

PER_CATEGORY = 30
CATEGORIES = ("place", "deed", "count", "state", "question", "request", "digits")

NAMES = ("peter", "anna", "david", "maria", "thomas", "susan", "robert", "helen", "oscar", "julia")
OWNERS = ("the", "a", "my", "your", "this", "every")
PEOPLE = (
    *("brother", "sister", "mother", "father", "teacher", "doctor", "farmer", "king", "queen", "soldier"),
    *("driver", "singer", "girl", "boy", "woman", "captain", "judge", "nurse"),
)
ANIMALS = ("dog", "cat", "bird", "horse", "cow", "fish", "mouse", "rabbit", "tiger", "snake", "duck", "monkey")
OBJECTS = (
    *("table", "chair", "basket", "bottle", "box", "cup", "knife", "lamp", "letter", "picture", "book", "shirt"),
    *("hammer", "guitar", "piano", "camera", "phone", "coat", "hat", "ring", "carpet", "pencil", "blanket", "mirror"),
    *("boat", "truck", "bicycle", "apple", "lemon", "cake"),
)
PLACES = (
    *("kitchen", "garden", "river", "forest", "mountain", "bridge", "school", "church", "market", "station"),
    *("island", "castle", "window", "door", "tower", "field", "village", "office"),
)
ADJECTIVES = (
    *("old", "young", "small", "large", "heavy", "empty", "broken", "clean", "dirty", "warm", "cold", "quiet", "happy", "angry"),
    *("green", "yellow", "brown", "black", "purple", "orange", "golden", "silver", "strange", "lucky", "gentle", "hungry"),
)
STAYS = ("sleeps", "waits", "stands", "sits", "sings", "dances", "hides", "works", "plays", "smiles")
DOES = ("paints", "carries", "finds", "sells", "opens", "cleans", "watches", "breaks", "loves", "throws", "follows", "holds")
ORDERS = ("bring", "take", "open", "move", "wash", "show", "hold", "find")
SIDES = ("under", "behind", "near", "on", "in", "above", "beside", "before")
TIMES = ("today", "yesterday", "tomorrow", "now", "again", "often", "always", "never")
MANY = (*DIGITS[2:], "ten", "twelve", "twenty", "many")
PLURAL = {"fish": "fish", "mouse": "mice", "box": "boxes", "knife": "knives"}
SMALL_WORDS = ("there", "are", "is", "and", "very", "can", "you", "see", "please", "where", "who", "has")

ACCENTS = ("en-us", "en-029", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
VARIANTS = ("m1", "m3", "m5", "m7", "f2", "f4")
RATES = (130, 190)
PITCHES = (25, 75)


@dataclass(frozen=True)
class Voice:
    """Who speaks.

    Attributes:
        accent: a language of espeak-ng.
        variant: the timbre; `m1`, ... are male, `f2`, ... female.
        rate: words a minute.
        pitch: 0 to 99.
    """

    accent: str
    variant: str
    rate: int
    pitch: int

    @property
    def name(self) -> str:
        return f"{self.accent}+{self.variant}"


def plural(noun: str) -> str:
    """More than one of it."""
    return PLURAL.get(noun, noun + "s")


WORDS: tuple[str, ...] = tuple(
    sorted(
        {*NAMES, *OWNERS, *PEOPLE, *ANIMALS, *OBJECTS, *PLACES, *ADJECTIVES, *STAYS, *DOES, *ORDERS, *SIDES, *TIMES, *MANY, *DIGITS}
        | {*SMALL_WORDS}
        | {plural(noun) for noun in (*ANIMALS, *OBJECTS)}
    )
)
"""Every word of the grammar."""


def items(task: Task = "text", split: Split = "test", seed: int = 0, per_category: int = PER_CATEGORY) -> list[Item]:
    """Random sentences of a split, category after category, each spoken by a random voice.

    Labels: `sentence` (its text), `voice` (`en-us+m3`), `accent`, `variant`, `rate` (words a minute), `pitch` (0 to 99).

    Raises:
        ValueError: espeak-ng is not installed.
    """
    check_program()
    wanted = [(category, number) for category in CATEGORIES for number in range(per_category)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a thread waits for each run of the program
        return list(pool.map(lambda one: item(one[0], split, seed, one[1]), wanted))


def item(category: str, split: Split, seed: int, number: int) -> Item:
    """One spoken sentence."""
    name = f"{category}-{seed}-{number:04d}"
    rng = random.Random(f"{split}/{name}")
    text, voice = sentence(rng, split, category), draw_voice(rng)
    labels: dict[str, str | int] = {"sentence": text, "voice": voice.name, "accent": voice.accent, "variant": voice.variant}
    labels |= {"rate": voice.rate, "pitch": voice.pitch}
    return Item(name, category, REQUEST, labels=labels, audio=speak(text, voice))


def sentence(rng: random.Random, split: Split, category: str | None = None) -> str:
    """A random sentence of a split, of a category or of any."""
    while True:
        text = " ".join(_words(rng, category or rng.choice(CATEGORIES)))
        if split_of(text) == split:
            return text


def split_of(text: str) -> Split:
    """The split that a sentence belongs to."""
    return "test" if hashlib.sha256(text.encode()).digest()[0] % 8 == 0 else "train"


def _words(rng: random.Random, category: str) -> list[str]:
    pick = rng.choice
    if category == "place":
        return [*_subject(rng), pick(STAYS), pick(SIDES), pick(("the", "my", "your", "this")), pick(PLACES + OBJECTS)]
    if category == "deed":
        return [*_subject(rng, short=True), pick(DOES), pick(("the", "a", "every")), pick(ADJECTIVES), pick(OBJECTS), pick(TIMES)]
    if category == "count":
        things = [pick(MANY), pick(ADJECTIVES), plural(pick(OBJECTS + ANIMALS))]
        if rng.random() < 0.5:
            return [pick(NAMES), "has", *things, pick(TIMES)]
        return ["there", "are", *things, pick(SIDES), "the", pick(PLACES)]
    if category == "state":
        first, second = rng.sample(ADJECTIVES, 2)
        described = [pick(("the", "my", "your", "this")), pick(PLACES + PEOPLE + OBJECTS), "is"]
        return [*described, first, "and", second] if rng.random() < 0.6 else [*described, "very", first]
    if category == "question":
        asked = pick((["can", "you", "see"], ["where", "is"], ["who", "has"]))
        return [*asked, pick(("the", "my", "your")), pick(ADJECTIVES), pick(ANIMALS + OBJECTS)]
    if category == "request":
        return [
            "please",
            pick(ORDERS),
            pick(("the", "my", "this")),
            pick(ADJECTIVES),
            pick(OBJECTS),
            *([pick(TIMES)] * rng.randint(0, 1)),
        ]
    if category == "digits":
        return [pick(DIGITS) for _ in range(rng.randint(4, 7))]
    raise ValueError(f"no category of sentences is called {category!r}; there are {', '.join(CATEGORIES)}")


def _subject(rng: random.Random, short: bool = False) -> list[str]:
    if rng.random() < 0.3:
        return [rng.choice(NAMES)]
    adjective = [] if short or rng.random() < 0.4 else [rng.choice(ADJECTIVES)]
    return [rng.choice(OWNERS[:1] + OWNERS[2:]), *adjective, rng.choice(PEOPLE + ANIMALS)]


def draw_voice(rng: random.Random) -> Voice:
    """A random voice, at a random rate and pitch."""
    return Voice(rng.choice(ACCENTS), rng.choice(VARIANTS), rng.randint(*RATES), rng.randint(*PITCHES))


def check_program() -> None:
    """Raises ValueError if espeak-ng is not installed."""
    if shutil.which(PROGRAM) is None:
        raise ValueError(f"spoken sentences are synthesised by {PROGRAM}, which is not installed: {INSTALL}")


def speak(text: str, voice: Voice) -> Sound:
    """A text, spoken: mono, 16 kHz.

    Raises:
        ValueError: espeak-ng is not installed, or does not know the voice.
    """
    check_program()
    command = [PROGRAM, "-v", voice.name, "-s", str(voice.rate), "-p", str(voice.pitch), "-z", "-b", "1", "--stdin", "--stdout"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    if done.returncode or not done.stdout:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"{PROGRAM} cannot speak with the voice {voice.name!r}: {said[0]}")
    with wave.open(io.BytesIO(done.stdout)) as opened:
        # Written to a pipe, the header gives no true length; reading stops at the end.
        samples = np.frombuffer(opened.readframes(opened.getnframes()), "<i2")
        return read_sound(Sound(samples, opened.getframerate()))
