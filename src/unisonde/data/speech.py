"""Recorded speech with known labels: the Free Spoken Digit Dataset and the Berlin Database of Emotional Speech, from their files.

Neither is part of the package. Their labels stand in the names of the files:

| data set | name | an example |
|---|---|---|
| `fsdd` | `{digit}_{speaker}_{take}` | `7_theo_12.wav`: "seven", by theo, his take 12 |
| `emodb` | `{speaker}{sentence}{emotion}{take}` | `03a01Wa.wav`: speaker 03, sentence a01, anger (Wut), take a |
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Literal

from unisonde.data.item import Item
from unisonde.data.sound import RECORDINGS, REQUEST

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_TAKES = 5
"""Of each digit and speaker, takes 0 to 4 are the published test split of `fsdd`."""

EMOTIONS = {
    "W": "anger",
    "L": "boredom",
    "E": "disgust",
    "A": "fear",
    "F": "happiness",
    "N": "neutral",
    "T": "sadness",
}
"""The letters of Emo-DB, from the German words."""

VARIABLES = {"fsdd": "UNISONDE_FSDD", "emodb": "UNISONDE_EMODB"}
"""Environment variables that name the folders."""

SUBFOLDERS = {"fsdd": "recordings", "emodb": "wav"}
"""Where the recordings lie in the data sets as published."""

_FSDD = re.compile(r"([0-9])_([a-z]+)_([0-9]+)")
_EMODB = re.compile(r"([0-9]{2})([ab][0-9]{2})([A-Z])([a-z])")


def fsdd(folder: Path | str | None = None, split: Literal["all", "test", "train"] = "all") -> list[Item]:
    """Spoken digits, by take, then speaker, then digit.

    The category is the digit, as a word. Labels: `digit` (`seven`), `speaker` (`theo`), `take` (a number).

    Args:
        folder: where the recordings are; by default, see `find`.

    Raises:
        ValueError: there are no recordings, or one is not named as in the data set.
    """
    found = []
    for path in find("fsdd", folder):
        digit, speaker, take = _named(path, _FSDD, "fsdd", "7_theo_12")
        if split == "all" or (int(take) < TEST_TAKES) == (split == "test"):
            found.append((int(take), speaker, int(digit), path))
    if not found:
        raise ValueError(
            f"{find('fsdd', folder)[0].parent} holds no take of the split {split!r}; takes 0 to 4 are test, others train"
        )
    return [
        Item(path.stem, DIGITS[digit], REQUEST, labels={"digit": DIGITS[digit], "speaker": speaker, "take": take}, audio=path)
        for take, speaker, digit, path in sorted(found)
    ]


def emodb(folder: Path | str | None = None) -> list[Item]:
    """Acted emotions, in an order that mixes speakers and sentences (that of a hash), so that a limit takes some of each.

    The category is the emotion. Labels: `speaker` (`03`), `sentence` (`a01`), `emotion` (`anger`), `take` (`a`).

    Args:
        folder: where the recordings are; by default, see `find`.

    Raises:
        ValueError: there are no recordings, or one is not named as in the data set.
    """
    items = []
    for path in sorted(find("emodb", folder), key=lambda path: hashlib.sha256(path.stem.encode()).digest()):
        speaker, sentence, letter, take = _named(path, _EMODB, "emodb", "03a01Wa")
        if letter not in EMOTIONS:
            raise ValueError(f"{path}: {letter} is no emotion of Emo-DB ({', '.join(EMOTIONS)}); take the file out of the folder")
        labels = {"speaker": speaker, "sentence": sentence, "emotion": EMOTIONS[letter], "take": take}
        items.append(Item(path.stem, EMOTIONS[letter], REQUEST, labels=labels, audio=path))
    return items


def find(name: Literal["fsdd", "emodb"], folder: Path | str | None = None) -> list[Path]:
    """The recordings of a data set, sorted: in `folder`, else where its environment variable says, else in `../shared/data/NAME`.

    The folder of the data set as published works as well as the one in it that holds the recordings.

    Raises:
        ValueError: there are none, or two are called alike.
    """
    variable = os.environ.get(VARIABLES[name])
    place = Path(folder or variable or Path("../shared/data") / name).expanduser()
    for inside in (place, place / SUBFOLDERS[name]):
        paths = sorted(path for path in inside.glob("*") if path.suffix.lower() in RECORDINGS and not path.name.startswith("."))
        twice = [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1]
        if twice:
            raise ValueError(f"{inside} holds {twice[0]} in two formats; keep one of them")
        if paths:
            return paths
    if folder is None and not variable:
        raise ValueError(
            f"the recordings of {name} are not part of unisonde: write {name}:FOLDER, or set the environment variable "
            f"{VARIABLES[name]} to the folder that holds them"
        )
    named = f" (named by {VARIABLES[name]})" if folder is None else ""
    state = "holds no recordings" if place.is_dir() else "is no folder"
    raise ValueError(f"{place}{named} {state}; give the folder with the recordings of {name}")


def _named(path: Path, pattern: re.Pattern[str], name: str, example: str) -> tuple[str, ...]:
    if (match := pattern.fullmatch(path.stem)) is None:
        raise ValueError(f"{path} is not named as in {name} (such as {example}{path.suffix}); take it out of the folder")
    return match.groups()
