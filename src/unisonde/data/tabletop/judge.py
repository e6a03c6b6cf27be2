"""Reading a Tabletop scene back from its pixels, and judging a drawn picture against the scene that was wanted.

The judge is handed pictures that a model drew, so it trusts nothing: it shares the facts of `scene` with `render` and no code.
It knows each shape by its chords (how wide the shape is at each height), finds for every cell the shape, size and colour that
explain the pixels best (least squares, which is maximum likelihood under Gaussian noise), redraws what it has read and looks at
what is left over. A picture is legible if nothing is left over, from single pixels to wide patches, and if no other shape in no
other colour explains a cell much better. `read` says what is there; `judge` says what of it was wanted.

Pictures are best judged as they were drawn, or from PNG. JPEG with full colour resolution (4:4:4) is read as well; the usual 4:2:0
smears the colour of small things, and many such pictures are not legible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, uniform_filter
from scipy.optimize import linear_sum_assignment

from unisonde.data.item import read_picture
from unisonde.data.tabletop.scene import BACKGROUNDS, CELL, COLOURS, COLUMNS, PITCH, ROWS, SHAPES, SIDE, SIZES, Scene, Thing, places

Picture = Image.Image | np.ndarray

_Chord = Callable[[np.ndarray], np.ndarray]
_CHORDS: dict[str, tuple[_Chord, _Chord]] = {
    "square": (lambda y: np.ones_like(y), lambda y: np.zeros_like(y)),
    "circle": (lambda y: np.sqrt(1 - y**2), lambda y: np.zeros_like(y)),
    "triangle": (lambda y: (1 + y) / 2, lambda y: np.zeros_like(y)),
    "cross": (lambda y: np.where(3 * abs(y) < 1, 1, 1 / 3), lambda y: np.zeros_like(y)),
    "ring": (lambda y: np.sqrt(1 - y**2), lambda y: np.sqrt(np.clip(0.25 - y**2, 0, None))),
}
"""For each shape in the box [-1, 1] x [-1, 1], y downwards: at height y it reaches from the second to the first, left and right."""

# The thresholds below were put between two sets of pictures. To be read: thousands of scenes of 0 to 9 things, as drawn; with
# Gaussian noise (sigma 13 of 255), blur (sigma 0.3 to 0.8 pixels) or both; with a tokenizer's errors (smooth error of sigma 4, and
# heavy-tailed error on single pixels). Not to be read: halves of things, foreign colours, two colours in a thing, pale or smeared
# things, things shifted by 2 pixels or more, stray pixels and blobs, gradients, noise. The comments say what each set reached.

_BLURS = (0.0, 0.4, 0.5, 0.6, 0.7)
"""Blurs (standard deviation, pixels) that are tried on the whole picture: a tokenizer's decoder softens edges."""

_SMEARS = (1.3, 2.0)
"""Blurs that are never read, and are tried only to tell a smear from a soft shape."""

_PATCHES = {1: 85.0, 3: 30.0, 7: 18.0}
"""Side of a patch (pixels): how far its mean may be from the redrawn reading, in any channel. To be read: 69, 28, 17. The faintest
contrast is 90 (purple on grey): one pixel of it is seen; half a thing is 1.27 times what is tolerated at least. The widest patch
also says how far the background may be from its name."""

_WIDE = max(_PATCHES)

_ROUGH = 22.0
"""How large the root mean square of what is left over may be in the widest patch: texture, unseen by means. To be read: 20."""

_TINT = 24.0
"""How far the colour that fits a thing may be from its name, in any channel. To be read: 19. The nearest two names are 80 apart."""

_DOUBT = (3000.0, 0.02)
"""How much squared error another shape in whatever colour, or a smear, may save over the shape that was read: so much, and this
share of what the reading explains. To be read: 0.4 of it. A sharp disc in half its colour, much like a soft ring: 1.3 at least."""

_EXPLAINED = 0.45
"""Share of a cell's squared contrast that a thing must explain to be one at all. To be read: 0.51 (a soft, noisy small ring)."""

_GROUND = 48.0
"""Between the cells, most pixels must be this near to the background, or there is none. Noise of sigma 13 stays within it."""

_CELLS = tuple(places())
_KINDS = tuple((shape, size) for shape in SHAPES for size in SIZES)


@dataclass(frozen=True)
class Seen:
    """What a picture shows.

    Attributes:
        scene: the best reading, of 0 to 9 things, on the nearest of the world's backgrounds; what is like no known thing is left
            out. None if there is no background for things to stand on.
        background: the background's name; None if it is not plain or is none of the world's.
        residual: the largest deviation of the picture from the redrawn reading, as a share of what is tolerated: near 0 for a
            perfect picture, above 1 for one that is not legible.
        faults: why the picture is not a clean Tabletop scene, a sentence each; none if it is.
    """

    scene: Scene | None
    background: str | None
    residual: float
    faults: tuple[str, ...] = ()

    @property
    def legible(self) -> bool:
        """Whether the picture is a clean Tabletop scene: whatever is in it has been read."""
        return not self.faults


@dataclass(frozen=True)
class Verdict:
    """How a picture compares with the scene that was wanted.

    Wanted and seen things are paired so that they agree as much as possible. A pair shares its place, or at least two of shape,
    colour and size. `shapes` to `places` are shares of the wanted things, 0 to 1; they are 1 if nothing was wanted.

    Attributes:
        exact: all that was wanted is there, as it was wanted, and nothing else, on a plain background in a legible picture.
        missing: wanted things with no counterpart in the picture.
        extra: things in the picture that are no counterpart of a wanted one.
        wrong: the faults, a sentence each. Empty if and only if `exact`.
        shapes: things drawn with their shape.
        colours: things drawn with their colour.
        sizes: things drawn with their size.
        places: things drawn in their place.
        count: whether as many things can be read as were wanted.
        background: whether the background is the wanted one, required or not.
        seen: what was read.
    """

    exact: bool
    missing: tuple[Thing, ...]
    extra: tuple[Thing, ...]
    wrong: tuple[str, ...]
    shapes: float
    colours: float
    sizes: float
    places: float
    count: bool
    background: bool
    seen: Seen

    @property
    def scores(self) -> dict[str, float]:
        """The columns of a score table, each 0 to 1, to be averaged over pictures."""
        names = ("exact", "shapes", "colours", "sizes", "places", "count", "background")
        return {name: float(getattr(self, name)) for name in names} | {"legible": float(self.seen.legible)}


def read(picture: Picture) -> Seen:
    """What a picture shows.

    Args:
        picture: 32 x 32, as an image or as an array (32, 32, 3) uint8.

    Raises:
        ValueError: the picture is not 32 x 32, or the array is not 8-bit RGB.
    """
    return read_all([picture])[0]


def read_all(pictures: Sequence[Picture] | np.ndarray) -> list[Seen]:
    """What each of several pictures shows, a sequence or an array (n, 32, 32, 3); errors as in `read`."""
    batch = [_pixels(picture) for picture in pictures]
    chunk = 256  # pictures at a time: bounds the memory
    return [seen for start in range(0, len(batch), chunk) for seen in _read_batch(np.stack(batch[start : start + chunk]))]


def judge(picture: Picture | Seen, wanted: Scene, background: bool = False) -> Verdict:
    """What is right and wrong in a picture of which `wanted` was asked.

    Args:
        picture: the picture, or what `read` has read in it.
        wanted: the scene.
        background: whether an exact picture must have the wanted background, too. It must be plain in any case.

    Raises:
        ValueError: the picture is not 32 x 32 RGB.
    """
    seen = picture if isinstance(picture, Seen) else read(picture)
    found = seen.scene.things if seen.scene else ()
    pairs = _pair(wanted.things, found)
    missing = tuple(thing for thing in wanted.things if thing not in {want for want, _ in pairs})
    extra = tuple(thing for thing in found if thing not in {have for _, have in pairs})

    wrong = [sentence for want, have in pairs for sentence in _differences(want, have)]
    wrong += [f"there is no {_name(thing)} at {thing.place}" for thing in missing]
    wrong += [f"there is an extra {_name(thing)} at {thing.place}" for thing in extra]
    same_background = seen.background == wanted.background
    if background and seen.background and not same_background:
        wrong.append(f"the background is {seen.background}, wanted {wanted.background}")
    wrong += seen.faults

    def share(attribute: str) -> float:
        right = sum(getattr(want, attribute) == getattr(have, attribute) for want, have in pairs)
        return right / len(wanted.things) if wanted.things else 1.0

    return Verdict(
        exact=not wrong,
        missing=missing,
        extra=extra,
        wrong=tuple(wrong),
        shapes=share("shape"),
        colours=share("colour"),
        sizes=share("size"),
        places=share("cell"),
        count=seen.scene is not None and len(found) == len(wanted.things),
        background=same_background,
        seen=seen,
    )


def _pixels(picture: Picture) -> np.ndarray:
    """One picture as (32, 32, 3) uint8."""
    pixels = np.asarray(read_picture(picture) if isinstance(picture, Image.Image) else picture)
    if pixels.shape != (SIDE, SIDE, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"a Tabletop picture is ({SIDE}, {SIDE}, 3) uint8, got {pixels.shape} {pixels.dtype}: convert it first")
    return pixels


# ---- what could be in a cell ----


def area(shape: str, size: str) -> np.ndarray:
    """The part of each pixel of a cell inside a shape, (8, 8), from its chords: exact along x, along y by the midpoint rule."""
    lines, half = 96, SIZES[size] / 2  # lines a pixel: a multiple of 3, so that the arms of a cross are exact, too
    y = (np.arange(CELL * lines) + 0.5) / lines - CELL / 2
    inside = abs(y) < half
    outer, inner = (np.where(inside, half * chord(np.clip(y / half, -1, 1)), 0)[:, None] for chord in _CHORDS[shape])
    left = np.arange(CELL) - CELL / 2  # pixels from left to left + 1; a chord covers [-outer, -inner] and [inner, outer]

    def overlap(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        return np.clip(np.minimum(stop, left + 1) - np.maximum(start, left), 0, None)

    return (overlap(-outer, -inner) + overlap(inner, outer)).reshape(CELL, lines, CELL).mean(1)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Each kind of thing in each cell, on the whole picture, at each blur and smear: (blurs, cells, kinds, 32 * 32), 0 to 1.

    Also the sum of squares of each.
    """
    sharp = np.zeros((len(_CELLS), len(_KINDS), SIDE, SIDE))
    for c, (row, column) in enumerate(_CELLS):
        for k, kind in enumerate(_KINDS):
            sharp[c, k, PITCH * row : PITCH * row + CELL, PITCH * column : PITCH * column + CELL] = area(*kind)
    blurred = [gaussian_filter(sharp, (0, 0, blur, blur), mode="nearest") for blur in _BLURS + _SMEARS]
    templates = np.stack(blurred).reshape(len(blurred), len(_CELLS), len(_KINDS), SIDE * SIDE)
    return templates, (templates**2).sum(-1)


@cache
def _regions() -> tuple[np.ndarray, np.ndarray]:
    """For each pixel: the index of the nearest cell, and whether the pixel lies between the cells; both (32, 32)."""
    along = np.arange(SIDE)
    nearest = (along + (PITCH - CELL) // 2) // PITCH
    between = along % PITCH >= CELL
    return nearest[:, None] * len(COLUMNS) + nearest, between[:, None] | between


# ---- reading ----


class _Fit(NamedTuple):
    """What explains one picture best, for its cells in the order of `places`."""

    level: np.ndarray  # (3,): the median colour between the cells
    ground: str  # the background nearest to it
    uneven: float  # the pixels between the cells that are far from the ground: above 1, there is no background
    offset: float  # how far the level is from the ground's colour, as a share of what is tolerated
    kind: np.ndarray  # (cells,): index in _KINDS
    colour: np.ndarray  # (cells,): index in COLOURS
    there: np.ndarray  # (cells,): whether this explains the cell at all
    fitted: np.ndarray  # (cells, 3): the colour that fits the kind best
    doubt: np.ndarray  # (cells,): how much better something else explains it, as a share of what is tolerated
    tint: np.ndarray  # (cells,): how far `fitted` is from the colour's name, as a share of what is tolerated
    left: np.ndarray  # (32, 32, 3): the picture less what was read, redrawn
    excess: np.ndarray  # (32, 32): what is left over around each pixel, as a share of what is tolerated


def _read_batch(pixels: np.ndarray) -> list[Seen]:
    """What pictures (n, 32, 32, 3) show."""
    return [_tell(fit) for fit in _fit(pixels.astype(np.float64))]


def _fit(pixels: np.ndarray) -> list[_Fit]:
    """The least-squares reading of pictures (n, 32, 32, 3)."""
    n, cells = len(pixels), np.arange(len(_CELLS))
    region, between = _regions()
    names, palette = tuple(BACKGROUNDS), np.array(list(BACKGROUNDS.values()), float)
    colours = np.array(list(COLOURS.values()), float)

    # Things stand on the background as it should be; where it is none of the world's, on whatever it is.
    level = np.median(pixels[:, between], axis=1)
    distance = abs(level[:, None] - palette).max(-1)
    offset = distance.min(1) / _PATCHES[_WIDE]
    ground = np.where(offset[:, None] <= 1, palette[distance.argmin(1)], level)
    picture = pixels - ground[:, None, None]
    uneven = 2 * (abs(picture[:, between]).max(-1) > _GROUND).mean(-1)

    # A template m in colour a changes the squared error |picture|^2 by |m|^2 |a|^2 - 2 a . (m picture): least over a at
    # a = m picture / |m|^2, by -|m picture|^2 / |m|^2.
    templates, norm = _templates()
    flat = picture.reshape(n, SIDE * SIDE, 3)
    product = (templates.reshape(-1, SIDE * SIDE) @ flat).reshape(n, *templates.shape[:3], 3)
    free = (product**2).sum(-1) / norm
    contrast = colours - ground[:, None]
    named = product[:, : len(_BLURS)]
    square = norm[: len(_BLURS), ..., None] * (contrast**2).sum(-1)[:, None, None, None]
    saved = 2 * named @ contrast.transpose(0, 2, 1)[:, None, None] - square
    saved = saved.reshape(n, len(_BLURS), len(_CELLS), -1)
    best, saved = saved.argmax(-1), saved.max(-1)
    blur = saved.clip(min=0).sum(-1).argmax(-1)[:, None]  # one blur for the whole picture
    one = np.arange(n)[:, None]
    kind, colour = np.divmod(best[one, blur, cells], len(COLOURS))
    saved = saved[one, blur, cells]

    energy = np.stack([(picture[:, region == c] ** 2).sum((1, 2)) for c in cells], axis=1)
    there = saved > _EXPLAINED * energy
    off = product[one, blur, cells, kind] / norm[blur, cells, kind][..., None]
    tint = abs(off - contrast[one, colour]).max(-1) / _TINT
    doubt = (free.max((1, 3)) - free[one, blur, cells, kind]) / (_DOUBT[0] + _DOUBT[1] * saved.clip(min=0))

    drawn = templates[blur, cells, kind] * there[..., None]
    left = flat - drawn.transpose(0, 2, 1) @ contrast[one, colour]
    left = left.reshape(n, SIDE, SIDE, 3)
    means = [abs(uniform_filter(left, (0, side, side, 0))).max(-1) / limit for side, limit in _PATCHES.items()]
    rough = (
        np.sqrt(uniform_filter((left**2).mean(-1), (0, _WIDE, _WIDE)).clip(min=0)) / _ROUGH
    )  # the running sum may round below zero
    excess = np.max([*means, rough], axis=0)
    return [
        _Fit(level[i], names[distance[i].argmin()], uneven[i], offset[i], *of_cells)
        for i, of_cells in enumerate(
            zip(kind, colour, there, off + ground[:, None], doubt * there, tint * there, left, excess, strict=True)
        )
    ]


def _tell(fit: _Fit) -> Seen:
    """A fit in the words of the world."""
    things = tuple(
        Thing(row, column, shape=_KINDS[kind][0], colour=tuple(COLOURS)[colour], size=_KINDS[kind][1])
        for (row, column), kind, colour, there in zip(_CELLS, fit.kind, fit.colour, fit.there, strict=True)
        if there
    )
    plain = fit.uneven <= 1 and (fit.excess[_regions()[1]] <= 1).mean() > 2 / 3
    return Seen(
        scene=Scene(things, fit.ground) if fit.uneven <= 1 else None,
        background=fit.ground if plain and fit.offset <= 1 else None,
        residual=float(max(fit.uneven, fit.offset, fit.doubt.max(), fit.tint.max(), fit.excess.max())),
        faults=_faults(fit, {thing.cell: thing for thing in things}) if plain else ("the background is not plain",),
    )


def _faults(fit: _Fit, things: dict[tuple[int, int], Thing]) -> tuple[str, ...]:
    """What keeps a picture with a plain background from being a clean scene."""
    faults = []
    if fit.offset > 1:
        faults.append(f"the background has the colour {_rgb(fit.level)}, which is none of {', '.join(BACKGROUNDS)}")
    region, between = _regions()
    marks = _marks(fit)
    for c, cell in enumerate(_CELLS):
        place = f"{ROWS[cell[0]]} {COLUMNS[cell[1]]}"
        if fit.tint[c] > 1:
            faults.append(
                f"the {things[cell].shape} at {place} has the colour {_rgb(fit.fitted[c])}, which is not {things[cell].colour}"
            )
        elif fit.doubt[c] > 1 or marks[(region == c) & ~between].any():
            faults.append(
                f"the {_name(things[cell])} at {place} is not clean" if cell in things else f"what is at {place} is no known thing"
            )
        elif marks[region == c].any():
            faults.append(f"there is a stray mark beside {place}")
    return tuple(faults)


def _marks(fit: _Fit) -> np.ndarray:
    """Which pixels are to blame where too much is left over: the largest deviation in the patch around, (32, 32)."""
    reach = _WIDE // 2
    deviation = np.pad(abs(fit.left).max(-1), reach, constant_values=-1)
    y, x = np.nonzero(fit.excess > 1)
    patches = np.lib.stride_tricks.sliding_window_view(deviation, (_WIDE, _WIDE))[y, x].reshape(-1, _WIDE**2)
    down, right = np.divmod(patches.argmax(-1), _WIDE)
    marks = np.zeros((SIDE, SIDE), bool)
    marks[y + down - reach, x + right - reach] = True
    return marks


def _rgb(colour: np.ndarray) -> str:
    return f"({', '.join(f'{value:.0f}' for value in colour)})"


# ---- judging ----


def _name(thing: Thing) -> str:
    return f"{thing.size} {thing.colour} {thing.shape}"


def _pair(wanted: Sequence[Thing], found: Sequence[Thing]) -> list[tuple[Thing, Thing]]:
    """Wanted things with their counterparts, so that the pairs agree in as much as possible."""

    def agreement(want: Thing, have: Thing) -> float:
        # A shared place outweighs one attribute, not two: a thing that was merely moved is still that thing.
        alike = (want.shape == have.shape) + (want.colour == have.colour) + (want.size == have.size)
        total = alike + 1.5 * (want.cell == have.cell)
        return total if total >= 1.5 else 0.0

    scores = np.array([[agreement(want, have) for have in found] for want in wanted]).reshape(len(wanted), len(found))
    return [(wanted[i], found[j]) for i, j in zip(*linear_sum_assignment(scores, maximize=True), strict=True) if scores[i, j]]


def _differences(want: Thing, have: Thing) -> list[str]:
    """A sentence for each attribute in which a thing is not as it was wanted."""
    faults = []
    if have.cell != want.cell:
        faults.append(f"the {_name(have)} is at {have.place}, wanted at {want.place}")
    if have.shape != want.shape:
        faults.append(f"the {have.shape} at {have.place} should be a {want.shape}")
    if have.colour != want.colour:
        faults.append(f"the {have.shape} at {have.place} is {have.colour}, wanted {want.colour}")
    if have.size != want.size:
        faults.append(f"the {have.shape} at {have.place} is {have.size}, wanted {want.size}")
    return faults
