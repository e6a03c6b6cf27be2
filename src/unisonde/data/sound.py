"""Recorded speech as every model here takes it: one channel at 16 kHz, float32 between -1 and 1.

`read_sound` brings files and samples to that form. It mixes channels, resamples and scales integers; it refuses what holds no speech;
and it flags what a reader of the numbers must know. How long a recording may be is the model's to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np

RATE = 16_000
"""Samples a second after `read_sound`."""

SHORTEST = 0.1
"""Seconds; a recording below this holds no word."""

SILENCE = 1e-4
"""A recording whose samples all lie this close to their mean (-80 dB, three steps of 16 bits) is silent."""

FULL_SCALE = 0.99
"""Where clipping is looked for."""

FLAT = 3
"""So many equal samples in a row at full scale are a clipped peak; a peak that only touches full scale (normalised) has one or two."""

RECORDINGS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au")
"""File names that are taken for recordings."""

REQUEST = "Transcribe the speech."
"""What is asked about a recording that comes without a request."""

INSTALL = "pip install 'unisonde[speech]'"

Wrong = Callable[[str], ValueError]


@dataclass(frozen=True, eq=False)
class Sound:
    """A recording in memory.

    Attributes:
        samples: (n,), or (n, channels) before `read_sound`; integers, or floats of full scale 1.
        rate: samples a second.
        flags: `clipped` if peaks were cut off when it was recorded; set by `read_sound`.
    """

    samples: np.ndarray
    rate: int
    flags: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sound):
            return NotImplemented
        same = self.rate == other.rate and self.flags == other.flags and self.samples.dtype == other.samples.dtype
        return same and np.array_equal(self.samples, other.samples)

    def __repr__(self) -> str:
        return f"Sound({self.seconds:.2f} s, {self.rate} Hz{''.join(f', {flag}' for flag in self.flags)})"


def read_sound(source: Sound | Path) -> Sound:
    """A recording as mono float32 samples at 16 kHz; float samples beyond full scale stay as they are.

    Files are whatever libsndfile reads (WAV, FLAC, Ogg, MP3, ...). Channels are averaged, rates converted by a polyphase filter.

    Raises:
        ValueError: the file is missing or damaged, `soundfile` is not installed, or the recording is silent, shorter than 0.1 s, or
            holds values that are no numbers.
    """
    what = f"the recording {source}" if isinstance(source, Path) else "the recording"

    def wrong(said: str) -> ValueError:
        return ValueError(f"{what} {said}")

    sound = _open(source, wrong) if isinstance(source, Path) else source
    samples = _as_float(sound.samples, wrong)
    if isinstance(sound.rate, bool) or not isinstance(sound.rate, (int, np.integer)) or not 1_000 <= sound.rate <= 1_000_000:
        raise wrong(f"has a rate of {sound.rate!r}; give whole samples a second, 1000 to 1000000")
    if len(samples) < SHORTEST * sound.rate:
        raise wrong(f"is {len(samples) / sound.rate:.3f} s long; speech takes {SHORTEST} s at least")
    finite = np.isfinite(samples).all(axis=1)
    if not finite.all():
        first = int(finite.argmin())
        raise wrong(f"holds {samples[first].tolist()} at {first / sound.rate:.3f} s, which is no sound; record or convert it again")
    flags = ("clipped",) if "clipped" in sound.flags or is_clipped(samples) else ()
    mono = samples.mean(axis=1, dtype=np.float32)
    loudest = float(np.abs(mono - mono.mean()).max())
    if loudest < SILENCE:
        raise wrong(f"is silent (its loudest sample is {loudest:.1g} of full scale); give one with speech in it")
    return Sound(_resampled(mono, int(sound.rate)), RATE, flags)


def is_clipped(samples: np.ndarray) -> bool:
    """Whether a channel of (n, channels) float samples has `FLAT` equal values in a row at full scale."""
    flat = np.abs(samples[FLAT - 1 :]) >= FULL_SCALE
    for back in range(1, FLAT):
        flat &= samples[FLAT - 1 - back : len(samples) - back] == samples[FLAT - 1 :]
    return bool(flat.any())


def _open(path: Path, wrong: Wrong) -> Sound:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package without its library
        raise ValueError(f"recordings are read with the package soundfile, which is not installed: {INSTALL}") from error
    if not path.exists():
        raise wrong("does not exist")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except Exception as error:  # a damaged file has several types of error
        size = path.stat().st_size if path.is_file() else 0
        raise wrong(f"({size} bytes) cannot be read: {_reason(error)}") from error
    return Sound(samples, rate)


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", None) or error).strip().rstrip(".")


def _as_float(samples: np.ndarray, wrong: Wrong) -> np.ndarray:
    """(n,) or (n, channels) of any number format -> (n, channels) float32 of full scale 1."""
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[1] == 0):
        raise wrong(f"has samples of shape {samples.shape}; give (n,) or (n, channels)")
    if samples.ndim == 2 and samples.shape[1] > samples.shape[0] > 0:
        raise wrong(f"has {samples.shape[1]} channels of {samples.shape[0]} samples; give (n, channels), the transpose")
    if samples.dtype.kind in "iu":
        limits = np.iinfo(samples.dtype)
        middle = 0.0 if limits.min < 0 else (limits.max + 1) / 2
        samples = (samples - middle) / (limits.max + 1 - middle)
    elif samples.dtype.kind != "f":
        raise wrong(f"has samples of type {samples.dtype}; give integers or floats")
    samples = samples.astype(np.float32)
    return samples[:, None] if samples.ndim == 1 else samples


def _resampled(mono: np.ndarray, rate: int) -> np.ndarray:
    if rate == RATE:
        return mono
    from scipy.signal import resample_poly  # here, so that listing data sets does not import scipy

    common = gcd(rate, RATE)
    return resample_poly(mono, RATE // common, rate // common).astype(np.float32)
