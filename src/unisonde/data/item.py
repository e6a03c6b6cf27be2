"""An item: one input to a model, with what is known about it.

Everything that is probed is a sequence of items, whoever made them: a benchmark's reader, the Tabletop world, a folder of the
user's own. An item knows nothing of models; a model turns it into token positions (`unisonde.models`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import ExifTags, Image, ImageOps

from unisonde.data.sound import Sound, read_sound

Task = Literal["text", "image"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True)
class Item:
    """One input.

    Attributes:
        id: unique in its data set; measurements carry it.
        category: the group that tables and `--limit` balance over.
        prompt: the text. May be empty only if there is an image or a recording.
        image: the image prompt, if any: a picture, or the path of one (read when it is needed, so that a broken file costs one
            item and not the run).
        labels: what is known about the answer (`scene`, `answer`, ...); never shown to the model.
        audio: the audio prompt, if any: a recording, or the path of one, read when it is needed.

    Raises:
        ValueError: it has both an image and a recording.
    """

    id: str
    category: str
    prompt: str
    image: Image.Image | Path | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    audio: Sound | Path | None = None

    def __post_init__(self) -> None:
        if self.image is not None and self.audio is not None:
            raise ValueError(f"item {self.id!r} has both an image and a recording; give it one of them")

    @property
    def modality(self) -> Literal["text", "image", "audio"]:
        """The modality of the prompt: `image` or `audio` if there is one, whatever question comes with it."""
        return "image" if self.image is not None else "audio" if self.audio is not None else "text"

    def picture(self) -> Image.Image | None:
        """The image prompt as RGB (transparent pixels on white), or None.

        Raises:
            ValueError: the file cannot be read as an image.
        """
        return None if self.image is None else read_picture(self.image)

    def sound(self) -> Sound | None:
        """The audio prompt as mono samples at 16 kHz, or None.

        Raises:
            ValueError: the file cannot be read as a recording, or holds no speech (`unisonde.data.sound.read_sound`).
        """
        return None if self.audio is None else read_sound(self.audio)

    def digest(self) -> str:
        """sha256 over everything that a model is shown, so that two runs can tell whether they saw the same input."""
        h = hashlib.sha256()
        for part in (self.id, self.category, self.prompt):
            h.update(part.encode() + b"\0")
        if isinstance(self.image, Path):
            # The bytes, not the decoded picture: a file that cannot be decoded still has an identity.
            h.update(self.image.read_bytes() if self.image.is_file() else b"missing")
        elif self.image is not None:
            palette = self.image.getpalette("RGBA")
            upright = self.image.getexif().get(ExifTags.Base.Orientation)
            shown = (self.image.mode, self.image.size, palette, self.image.info.get("transparency"), upright)
            h.update(repr(shown).encode() + self.image.tobytes())
        if isinstance(self.audio, Path):
            h.update(b"audio\0" + (self.audio.read_bytes() if self.audio.is_file() else b"missing"))
        elif self.audio is not None:
            samples = np.ascontiguousarray(self.audio.samples)
            h.update(repr(("audio", self.audio.rate, samples.dtype.str, samples.shape)).encode() + samples.tobytes())
        return h.hexdigest()


def read_picture(image: Image.Image | Path) -> Image.Image:
    """A picture as 8-bit RGB, the right way up; palette, grey, 16-bit and alpha are converted, transparent pixels become white.

    Of an animation, the first frame.

    Raises:
        ValueError: the file is missing, empty or not an image, or its values have no defined white.
    """
    try:
        if isinstance(image, Path):
            with Image.open(image) as opened:
                return _as_rgb(opened)
        return _as_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"the image {image} does not exist") from None
    except Exception as error:  # decoders answer a damaged file with almost any type of error
        what = f"{image} ({_size(image)} bytes)" if isinstance(image, Path) else f"of mode {image.mode}"
        raise ValueError(f"the image {what} cannot be read: {error}") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _as_rgb(image: Image.Image) -> Image.Image:
    # Photographs are often stored on their side, with a note in EXIF that says so.
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bit(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        page = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(page, rgba)
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey 0..65535 to 0..255. The scale is that of the format, never of the values: a dark picture stays dark."""
    levels = np.asarray(image.convert("I"))
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"its values, {levels.min()} to {levels.max()}, exceed 16 bits; save it with 8 or 16 bits")
    grey = np.rint(levels / 257).astype(np.uint8)
    if "transparency" in image.info:
        grey[levels == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, taken evenly over categories in a fixed order (DESIGN.md, "Numbers, exactly").

    Categories take turns in the order in which they first appear; one that runs out leaves its turns to the others. The
    result keeps the order of `items`.
    """
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    queues: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        queues.setdefault(item.category, []).append(index)
    chosen: list[int] = []
    depth = 0
    while len(chosen) < limit:
        turn = [queue[depth] for queue in queues.values() if depth < len(queue)]
        chosen += turn[: limit - len(chosen)]
        depth += 1
    return [items[index] for index in sorted(chosen)]
