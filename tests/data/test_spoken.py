"""Spoken sentences: the grammar and its splits need no program; the voices need espeak-ng."""

from __future__ import annotations

import random
import shutil
from collections import Counter

import numpy as np
import pytest

from unisonde.data import open_data, spoken
from unisonde.data.spoken import CATEGORIES, WORDS, Voice, draw_voice, sentence, split_of

from ..conftest import absent


@pytest.fixture
def espeak() -> None:
    if shutil.which(spoken.PROGRAM) is None:
        absent("espeak-ng is not installed")


def draw(split: str, count: int, category: str | None = None) -> list[str]:
    rng = random.Random(f"{split}/{category}")
    return [sentence(rng, split, category) for _ in range(count)]


# Sentences


def test_the_vocabulary() -> None:
    assert len(WORDS) == len(set(WORDS)) >= 200 and all(word.isalpha() and word.islower() for word in WORDS)
    said = Counter(word for text in draw("train", 20_000) for word in text.split())
    assert set(said) == set(WORDS)
    assert min(said.values()) >= 20  # no word is so rare that nobody learns it


@pytest.mark.parametrize("category", CATEGORIES)
def test_sentences_are_short_and_many(category: str) -> None:
    texts = draw("train", 1000, category)
    assert {len(text.split()) for text in texts} <= {4, 5, 6, 7, 8}
    assert len(set(texts)) > 700


def test_no_word_is_another_by_ear() -> None:
    alike = [
        ("two", "to"),
        ("four", "for"),
        ("eight", "ate"),
        ("see", "sea"),
        ("one", "won"),
        ("where", "wear"),
        ("there", "their"),
    ]
    assert not [pair for pair in alike if set(pair) <= set(WORDS)]


def test_no_sentence_is_in_both_splits() -> None:
    train, test = set(draw("train", 5000)), set(draw("test", 1000))
    assert not train & test
    assert {split_of(text) for text in train} == {"train"} and {split_of(text) for text in test} == {"test"}
    assert {word for text in test for word in text.split()} <= {word for text in train for word in text.split()}


def test_an_unknown_category_is_refused() -> None:
    with pytest.raises(ValueError, match="no category of sentences is called 'song'; there are place"):
        draw("train", 1, "song")


def test_voices_are_many() -> None:
    rng = random.Random(0)
    voices = [draw_voice(rng) for _ in range(500)]
    assert len({voice.name for voice in voices}) == len(spoken.ACCENTS) * len(spoken.VARIANTS)
    assert min(v.rate for v in voices) < 140 < 180 < max(v.rate for v in voices) and len({v.pitch for v in voices}) > 40


# Sounds


def test_items(espeak: None, monkeypatch: pytest.MonkeyPatch) -> None:
    items = spoken.items("text", "test", seed=3, per_category=2)
    assert [item.category for item in items] == [category for category in CATEGORIES for _ in range(2)]
    assert items[-1] == spoken.item("digits", "test", 3, 1)
    monkeypatch.setattr(spoken, "CATEGORIES", ("place",))
    assert open_data("spoken:test").items("text", seed=3)[:2] == items[:2]
    for item in items:
        sound = item.sound()
        assert sound is not None and sound.rate == 16_000 and 0.8 < sound.seconds < 5 and item.modality == "audio"
        assert set(item.labels) == {"sentence", "voice", "accent", "variant", "rate", "pitch"}
        assert split_of(item.labels["sentence"]) == "test" and item.labels["sentence"] not in item.prompt


def test_the_seed_decides(espeak: None) -> None:
    first, again, other = (spoken.item("deed", "train", seed, 0) for seed in (0, 0, 1))
    assert first == again and first.digest() == again.digest() and first.id == "deed-0-0000"
    assert other.labels != first.labels and other != first
    assert spoken.item("deed", "test", 0, 0).labels != first.labels


def test_voice_rate_and_pitch_are_heard(espeak: None) -> None:
    voice = Voice("en-us", "m3", 150, 50)
    sound = spoken.speak("my brother paints a green boat today", voice)
    others = [
        Voice("en-gb", "m3", 150, 50),
        Voice("en-us", "f2", 150, 50),
        Voice("en-us", "m3", 190, 50),
        Voice("en-us", "m3", 150, 20),
    ]
    assert all(spoken.speak("my brother paints a green boat today", other) != sound for other in others)
    assert spoken.speak("my brother paints a green boat today", others[2]).seconds < 0.9 * sound.seconds


def test_every_voice_exists(espeak: None) -> None:
    """A timbre that espeak-ng does not know is passed over without a word: it would sound as the accent alone."""
    for accent in spoken.ACCENTS:
        sounds = [spoken.speak("seven", Voice(accent, variant, 150, 50)).samples for variant in (*spoken.VARIANTS, "nosuch")]
        assert not any(np.array_equal(a, b) for k, a in enumerate(sounds) for b in sounds[:k])


def test_an_unknown_voice_is_refused(espeak: None) -> None:
    with pytest.raises(ValueError, match=r"espeak-ng cannot speak with the voice 'xx\+m1': .*voice does not exist"):
        spoken.speak("seven", Voice("xx", "m1", 150, 50))


def test_text_is_never_an_option(espeak: None) -> None:
    assert spoken.speak("--version", Voice("en-us", "m1", 150, 50)).seconds > 0.3


def test_without_espeak_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"synthesised by espeak-ng, which is not installed: apt-get install espeak-ng") as caught:
        open_data("spoken").items("text")
    assert "\n" not in str(caught.value)
