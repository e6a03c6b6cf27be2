"""Recordings: any rate, format and number of channels becomes mono float32 at 16 kHz; what holds no speech is refused."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisonde.data.item import Item
from unisonde.data.sound import RATE, Sound, is_clipped, read_sound

from ..conftest import absent

try:
    import soundfile
except ImportError:  # the extra [speech]
    soundfile = None


@pytest.fixture
def files() -> None:
    if soundfile is None:
        absent("soundfile is not installed")


def tone(rate: int = RATE, seconds: float = 0.5, frequency: float = 440.0, loud: float = 0.5) -> np.ndarray:
    return loud * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def put(path: Path, samples: np.ndarray, rate: int = RATE, **options: str) -> Path:
    soundfile.write(path, samples, rate, **options)
    return path


def refused(source: Sound | Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        read_sound(source)
    assert "\n" not in str(caught.value)


# What a recording becomes


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_every_rate_becomes_16_khz(rate: int) -> None:
    sound = read_sound(Sound(tone(rate), rate))
    assert sound.rate == RATE and sound.samples.dtype == np.float32 and sound.flags == ()
    assert abs(sound.seconds - 0.5) < 1e-3
    inner = slice(800, 7200)  # the filter rings at both ends
    np.testing.assert_allclose(sound.samples[inner], tone()[: len(sound.samples)][inner], atol=2e-3)


def test_what_16_khz_cannot_hold_is_filtered_out() -> None:
    """A tone of 12 kHz would fold to 4 kHz if samples were merely dropped."""
    sound = read_sound(Sound(tone(48_000, frequency=12_000) + tone(48_000, frequency=300, loud=0.01), 48_000))
    assert np.abs(sound.samples[800:-800]).max() < 0.012


def test_channels_are_averaged() -> None:
    left, right = tone(), tone(frequency=1000)
    sound = read_sound(Sound(np.stack([left, right], 1), RATE))
    np.testing.assert_allclose(sound.samples, (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("kind", ["uint8", "int16", "int32"])
def test_integers_are_scaled_by_their_format(kind: str) -> None:
    limits = np.iinfo(kind)
    full, middle = (limits.max - limits.min + 1) / 2, (limits.max + limits.min + 1) / 2
    sound = read_sound(Sound((tone() * full + middle).round().astype(kind), RATE))
    np.testing.assert_allclose(sound.samples, tone(), atol=1 / full)
    quiet = read_sound(Sound((tone(loud=0.05) * full + middle).round().astype(kind), RATE))
    assert np.abs(quiet.samples).max() < 0.06  # the scale is the format's, not the recording's


def test_16_khz_mono_is_unchanged() -> None:
    samples = tone().astype(np.float32)
    assert read_sound(Sound(samples, RATE)) == Sound(samples, RATE)


def test_reading_twice_changes_nothing() -> None:
    loud = np.clip(3 * tone(8_000), -1, 1)
    once = read_sound(Sound(loud, 8_000))
    assert read_sound(once) == once and once.flags == ("clipped",)


@pytest.mark.parametrize(
    ("suffix", "subtype"), [("wav", "PCM_16"), ("wav", "FLOAT"), ("wav", "PCM_U8"), ("flac", "PCM_24"), ("ogg", "VORBIS")]
)
def test_files(files: None, tmp_path: Path, suffix: str, subtype: str) -> None:
    path = put(tmp_path / f"a.{suffix}", np.stack([tone(8_000)] * 2, 1), 8_000, subtype=subtype)
    sound = read_sound(path)
    assert sound.rate == RATE and sound.flags == ()
    tolerance = {"PCM_U8": 0.02, "VORBIS": 0.05}.get(subtype, 2e-3)
    np.testing.assert_allclose(sound.samples[800:7200], tone()[800:7200], atol=tolerance)


def test_ten_minutes_are_read(files: None, tmp_path: Path) -> None:
    """Whether they are too long is for the model to say."""
    sound = read_sound(put(tmp_path / "long.flac", tone(8_000, 600), 8_000))
    assert abs(sound.seconds - 600) < 1e-3


@settings(deadline=None, max_examples=30)
@given(st.integers(1000, 100_000), st.integers(1, 3), st.floats(0.1, 0.3))
def test_any_rate(rate: int, channels: int, seconds: float) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, (round(rate * seconds) + 1, channels))
    sound = read_sound(Sound(samples, rate))
    assert sound.samples.ndim == 1 and abs(sound.seconds - len(samples) / rate) <= 1 / RATE


# Clipping


@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_clipped_peaks_are_flagged(rate: int) -> None:
    assert read_sound(Sound(np.clip(tone(rate, loud=1.5), -1, 1), rate)).flags == ("clipped",)
    assert read_sound(Sound(np.clip(tone(rate, loud=1.5) * 32768, -32768, 32767).astype(np.int16), rate)).flags == ("clipped",)


@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_a_recording_normalised_to_full_scale_is_not(rate: int) -> None:
    assert read_sound(Sound((tone(rate, loud=1.0) * 32767).astype(np.int16), rate)).flags == ()


def test_one_clipped_channel_of_two_is_enough() -> None:
    assert is_clipped(np.stack([tone(), np.clip(tone(loud=2.0), -1, 1)], 1))
    assert not is_clipped(np.stack([tone(), tone()], 1))
    assert not is_clipped(np.ones((2, 1)))


# What is refused


@pytest.mark.parametrize(
    "samples", [np.zeros(8000), np.full(8000, 0.3), 3e-5 * tone(), np.zeros(8000, np.int16), np.full(8000, 128, np.uint8)]
)
def test_silence(samples: np.ndarray) -> None:
    refused(Sound(samples, RATE), r"is silent \(its loudest sample is .* of full scale\)")


def test_too_short() -> None:
    refused(Sound(tone(seconds=0.05), RATE), r"is 0\.050 s long; speech takes 0\.1 s at least")
    refused(Sound(np.zeros(0), RATE), r"is 0\.000 s long")
    assert read_sound(Sound(tone(seconds=0.1), RATE)).seconds == 0.1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_numbers(value: float) -> None:
    samples = np.stack([tone(), tone()], 1)
    samples[1600, 1] = value
    refused(Sound(samples, RATE), r"holds .*(nan|inf).* at 0\.100 s")


@pytest.mark.parametrize("rate", [0, -1, 999, 16_000.5, True, 10**9])
def test_impossible_rates(rate: int) -> None:
    refused(Sound(tone(), rate), "has a rate of")


@pytest.mark.parametrize(
    "samples",
    [np.zeros((2, 3, 4)), np.zeros((2, 100)), np.zeros((100, 0)), np.array(0.5), np.array(["a"] * 9), np.ones(9000, bool)],
)
def test_impossible_samples(samples: np.ndarray) -> None:
    refused(Sound(samples, RATE), "has (samples of|100 channels)")


def test_files_that_are_none(files: None, tmp_path: Path) -> None:
    refused(tmp_path / "gone.wav", r"gone\.wav does not exist")
    refused(tmp_path, "cannot be read")
    whole = put(tmp_path / "whole.flac", tone()).read_bytes()
    for name, content in {"empty.wav": b"", "text.wav": b"not a recording", "cut.flac": whole[:40]}.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, rf"{name} \({len(content)} bytes\) cannot be read: ")


def test_errors_name_the_file(files: None, tmp_path: Path) -> None:
    refused(put(tmp_path / "hush.wav", np.zeros(8000)), r"the recording .*hush\.wav is silent")


def test_without_soundfile_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "a.wav").write_bytes(b"x")
    refused(tmp_path / "a.wav", r"soundfile, which is not installed: pip install 'unisonde\[speech\]'$")
    assert read_sound(Sound(tone(), RATE)).rate == RATE  # samples in memory need no package


# Items


def test_an_item_with_a_recording() -> None:
    sound = Sound(tone(8_000), 8_000)
    item = Item("a", "c", "", audio=sound)
    assert item.modality == "audio" and item.picture() is None
    assert item.sound() == read_sound(sound)
    assert Item("a", "c", "p").sound() is None
    assert item == Item("a", "c", "", audio=Sound(tone(8_000), 8_000)) != Item("a", "c", "", audio=Sound(-tone(8_000), 8_000))


def test_an_image_and_a_recording_are_refused() -> None:
    with pytest.raises(ValueError, match="item 'a' has both an image and a recording"):
        Item("a", "c", "p", Path("a.png"), audio=Path("a.wav"))


def test_digest_sees_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    item = Item("a", "c", "p", audio=path)
    digests = [item.digest()]
    for content in (b"", b"one", b"two"):
        path.write_bytes(content)
        digests.append(item.digest())
    picture = Item("a", "c", "p", path)
    assert len({*digests, picture.digest(), Item("a", "c", "p").digest()}) == 6


def test_digest_sees_samples_and_rate() -> None:
    samples = tone().astype(np.float32)
    sounds = [
        Sound(samples, RATE),
        Sound(samples, 8_000),
        Sound(-samples, RATE),
        Sound(samples[:-1], RATE),
        Sound(samples.astype(float), RATE),
    ]
    assert len({Item("a", "c", "p", audio=sound).digest() for sound in sounds}) == 5
    assert (
        Item("a", "c", "p", audio=Sound(samples[::-1], RATE)).digest()
        == Item("a", "c", "p", audio=Sound(samples[::-1].copy(), RATE)).digest()
    )


def test_digest_of_other_items_is_as_before() -> None:
    assert Item("a", "c", "p").digest() == hashlib.sha256(b"a\0c\0p\0").hexdigest()
