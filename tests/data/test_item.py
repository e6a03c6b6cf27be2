"""Items: what a picture becomes, what an item's digest sees, and how `evenly` shares out a limit."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unisonde.data.item import Item, evenly, read_picture


def pixels(picture: Image.Image) -> list[list[tuple[int, ...]]]:
    assert picture.mode == "RGB"
    return [[tuple(pixel) for pixel in row] for row in np.asarray(picture).tolist()]


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def stored(tmp_path: Path, picture: Image.Image, suffix: str = ".png", **options: Any) -> Path:
    path = tmp_path / f"picture{suffix}"
    picture.save(path, **options)
    return path


# Pictures


def test_rgb_is_unchanged(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(read_picture(stored(tmp_path, Image.fromarray(values)))), values)


def test_one_pixel(tmp_path: Path) -> None:
    assert pixels(read_picture(stored(tmp_path, Image.new("RGB", (1, 1), (1, 2, 3))))) == [[(1, 2, 3)]]


@pytest.mark.parametrize(
    ("colour", "shown"),
    [
        ((200, 0, 50, 255), (200, 0, 50)),
        ((200, 0, 50, 0), (255, 255, 255)),  # wholly transparent: the page, not the colour hidden beneath
        ((200, 0, 50, 51), (244, 204, 214)),  # a fifth of the colour on four fifths of white
    ],
)
def test_alpha_is_laid_on_white(tmp_path: Path, colour: tuple[int, ...], shown: tuple[int, ...]) -> None:
    assert pixels(read_picture(stored(tmp_path, Image.new("RGBA", (1, 1), colour)))) == [[shown]]


def test_grey_with_alpha(tmp_path: Path) -> None:
    picture = Image.new("LA", (2, 1), (10, 255))
    picture.putpixel((1, 0), (10, 0))
    assert pixels(read_picture(stored(tmp_path, picture))) == [[(10, 10, 10), (255, 255, 255)]]


def test_premultiplied_alpha() -> None:
    assert pixels(read_picture(Image.new("RGBA", (1, 1), (200, 0, 50, 51)).convert("RGBa"))) == [[(244, 204, 214)]]
    assert pixels(read_picture(Image.new("LA", (1, 1), (10, 255)).convert("La"))) == [[(10, 10, 10)]]


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_palette_with_a_transparent_colour(tmp_path: Path, suffix: str) -> None:
    picture = Image.new("P", (3, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255, 7, 8, 9])
    picture.putdata([0, 1, 2])
    assert pixels(read_picture(stored(tmp_path, picture, suffix))) == [[(255, 0, 0), (0, 0, 255), (7, 8, 9)]]
    path = stored(tmp_path, picture, suffix, transparency=1)
    assert pixels(read_picture(path)) == [[(255, 0, 0), (255, 255, 255), (7, 8, 9)]]


def test_rgb_with_a_transparent_colour(tmp_path: Path) -> None:
    picture = Image.new("RGB", (2, 1), (1, 2, 3))
    picture.putpixel((1, 0), (4, 5, 6))
    path = stored(tmp_path, picture, transparency=(4, 5, 6))
    assert pixels(read_picture(path)) == [[(1, 2, 3), (255, 255, 255)]]


def test_one_bit(tmp_path: Path) -> None:
    picture = Image.new("1", (2, 1))
    picture.putpixel((1, 0), 1)
    assert pixels(read_picture(stored(tmp_path, picture))) == [[(0, 0, 0), (255, 255, 255)]]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_values_are_divided_by_257(tmp_path: Path, suffix: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    read = np.asarray(read_picture(stored(tmp_path, Image.fromarray(values), suffix)))
    assert np.array_equal(read, np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_picture_that_is_dark_stays_dark(tmp_path: Path, suffix: str) -> None:
    """No value above 255: nearly black in 16 bits, not an 8-bit picture in disguise."""
    path = stored(tmp_path, Image.fromarray(np.array([[0, 100, 255]], np.uint16)), suffix)
    assert pixels(read_picture(path)) == [[(0, 0, 0), (0, 0, 0), (1, 1, 1)]]


def test_16_bit_of_the_other_byte_order(tmp_path: Path) -> None:
    values = np.array([[0, 0x1234, 65535]], ">u2")
    path = tmp_path / "big.tif"
    Image.frombytes("I;16B", (3, 1), values.tobytes()).save(path)
    with Image.open(path) as opened:
        assert opened.mode == "I;16B"
    assert pixels(read_picture(path)) == [[(0,) * 3, (18,) * 3, (255,) * 3]]


def test_16_bit_with_a_transparent_value(tmp_path: Path) -> None:
    path = stored(tmp_path, Image.fromarray(np.array([[257, 40000]], np.uint16)), transparency=40000)
    assert pixels(read_picture(path)) == [[(1, 1, 1), (255, 255, 255)]]


def test_values_without_a_white_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="floating-point pixels have no defined white"):
        read_picture(stored(tmp_path, Image.new("F", (1, 1), 0.5), ".tif"))
    with pytest.raises(ValueError, match="its values, 70000 to 70000, exceed 16 bits"):
        read_picture(stored(tmp_path, Image.new("I", (1, 1), 70000), ".tif"))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (2, 1), (255, 0, 0))
    picture.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    path = stored(tmp_path, picture, exif=exif)
    assert pixels(read_picture(path)) == [[(255, 0, 0)], [(0, 0, 255)]]
    with Image.open(path) as opened:
        assert read_picture(opened).size == (1, 2)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
    path = stored(tmp_path, first, ".gif", save_all=True, append_images=[second])
    assert pixels(read_picture(path))[0][0] == (255, 0, 0)


def test_reading_does_not_change_the_picture() -> None:
    picture = Image.new("RGBA", (2, 2), (1, 2, 3, 0))
    before = picture.tobytes()
    read_picture(picture).putpixel((0, 0), (9, 9, 9))
    assert picture.mode == "RGBA" and picture.tobytes() == before
    plain = Image.new("RGB", (1, 1))
    read_picture(plain).putpixel((0, 0), (9, 9, 9))
    assert plain.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    "content", [b"", b"not a picture", png(Image.effect_noise((64, 64), 50))[:500]], ids=["empty", "text", "cut"]
)
def test_broken_file_names_itself_and_its_size(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.png \({len(content)} bytes\) cannot be read: "):
        read_picture(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.png does not exist"):
        read_picture(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="cannot be read"):
        read_picture(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_picture(Path("a\0b.png"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.filterwarnings("ignore")
def test_damage_is_a_value_error_or_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Whatever a decoder raises at a damaged file, the reader raises ValueError and nothing else."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # damage can claim any size; do not allocate it
    rng = np.random.default_rng(1)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(buffer, kind)
    path = tmp_path / "damaged"
    failed = 0
    for _ in range(150):
        content = bytearray(buffer.getvalue()[: rng.integers(1, len(buffer.getvalue()) + 1)])
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(0, 256)
        path.write_bytes(bytes(content))
        try:
            assert read_picture(path).mode == "RGB"
        except ValueError as error:
            assert str(path) in str(error)
            failed += 1
    assert failed > 10


# Items


def test_modality_and_picture(tmp_path: Path) -> None:
    assert Item("a", "c", "text").modality == "text" and Item("a", "c", "text").picture() is None
    path = tmp_path / "empty.png"
    path.touch()
    item = Item("a", "c", "text", path)
    assert item.modality == "image"
    with pytest.raises(ValueError, match=r"empty\.png \(0 bytes\)"):
        item.picture()


def test_digest_sees_all_that_is_shown(tmp_path: Path) -> None:
    path, other = tmp_path / "a.png", tmp_path / "b.png"
    path.write_bytes(png(Image.new("RGB", (1, 1), "red")))
    other.write_bytes(png(Image.new("RGB", (1, 1), "blue")))
    palettes = [Image.new("P", (1, 1)), Image.new("P", (1, 1)), Image.new("P", (1, 1))]
    for palette, colours in zip(palettes, ([255, 0, 0], [0, 255, 0], [255, 0, 0]), strict=True):
        palette.putpalette(colours)
    palettes[2].info["transparency"] = 0
    turned = Image.new("RGB", (2, 2))
    turned.getexif()[0x0112] = 3
    items = [
        Item("a", "c", "p"),
        Item("b", "c", "p"),
        Item("a", "d", "p"),
        Item("a", "c", "q"),
        Item("a", "cp", ""),
        Item("a", "c", "p", path),
        Item("a", "c", "p", other),
        Item("a", "c", "p", tmp_path / "missing.png"),
        Item("a", "c", "p", Image.new("RGB", (1, 2))),
        Item("a", "c", "p", Image.new("RGB", (2, 1))),
        Item("a", "c", "p", Image.new("RGB", (2, 2))),
        Item("a", "c", "p", turned),
        *(Item("a", "c", "p", palette) for palette in palettes),
    ]
    assert len({item.digest() for item in items}) == len(items)


def test_digest_is_blind_to_labels_and_paths(tmp_path: Path) -> None:
    assert Item("a", "c", "p", labels={"answer": 1}).digest() == Item("a", "c", "p").digest()
    content = png(Image.new("RGB", (1, 1)))
    for name in ("x.png", "y.png"):
        (tmp_path / name).write_bytes(content)
    assert Item("a", "c", "p", tmp_path / "x.png").digest() == Item("a", "c", "p", tmp_path / "y.png").digest()


def test_digest_is_stable() -> None:
    """It is stored in run folders: were it made otherwise, every stored run would seem to have seen other input."""
    assert Item("a", "c", "p").digest() == hashlib.sha256(b"a\0c\0p\0").hexdigest()


# evenly


def items_of(categories: str) -> list[Item]:
    return [Item(str(index), category, "p") for index, category in enumerate(categories)]


def ids(items: list[Item]) -> str:
    return "".join(item.id for item in items)


def test_evenly_without_a_limit_or_with_a_large_one() -> None:
    items = items_of("abc")
    assert evenly(items, None) == evenly(items, 3) == evenly(items, 99) == items
    assert evenly([], 5) == []


def test_evenly_takes_turns_and_keeps_the_order() -> None:
    assert ids(evenly(items_of("aaaabbbb"), 4)) == "0145"
    assert ids(evenly(items_of("aaabbbccc"), 5)) == "01346"  # the first categories get what does not divide
    assert ids(evenly(items_of("cba"), 2)) == "01"  # in order of appearance, not of the alphabet


def test_evenly_gives_the_turns_of_a_short_category_to_the_others() -> None:
    assert ids(evenly(items_of("aaaabccc"), 6)) == "012456"


@pytest.mark.parametrize("limit", [0, -1])
def test_evenly_refuses_less_than_one(limit: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {limit}"):
        evenly(items_of("ab"), limit)


@given(st.text("abcd", max_size=30), st.integers(1, 40))
def test_evenly_is_balanced(categories: str, limit: int) -> None:
    items = items_of(categories)
    taken = evenly(items, limit)
    assert len(taken) == min(limit, len(items))
    positions = [int(item.id) for item in taken]
    assert positions == sorted(set(positions))
    have, got = Counter(categories), Counter(item.category for item in taken)
    # No category may get two more than another that still has items to give.
    for category, count in have.items():
        if got[category] < count:
            assert max(got.values()) <= got[category] + 1
    for category in got:  # and of each, the first ones
        assert [i for i in items if i.category == category][: got[category]] == [i for i in taken if i.category == category]


@given(st.text("abcd", max_size=30), st.integers(1, 29))
def test_evenly_grows_by_adding(categories: str, limit: int) -> None:
    """A larger limit keeps what a smaller one took, so that a run can be extended."""
    items = items_of(categories)
    assert {item.id for item in evenly(items, limit)} <= {item.id for item in evenly(items, limit + 1)}
