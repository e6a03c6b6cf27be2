"""A protocol: the numeric choices behind an entropy, frozen, named and hashed.

Two numbers may be compared only if their protocols agree, so every stored number carries `Protocol.digest()`. The named protocols
in `PROTOCOLS` are the readings that the texts of "Pseudo-Unification" allow; they contradict each other, which is why the choice
has a name.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Kernel = Literal["gaussian", "linear"]
Source = Literal["joint", "own"]
LengthRule = Literal["trace", "none", "weighted", "subsample"]
Units = Literal["bits", "nats"]
Method = Literal["auto", "exact", "lanczos"]


@dataclass(frozen=True)
class Protocol:
    """The numeric choices of one entropy.

    Attributes:
        alpha: the order of the Rényi entropy, above zero; 1 is the von Neumann limit.
        kernel: `gaussian`, exp(-|x - y|^2 / 2 sigma^2), or `linear`, the inner product of centred states.
        bandwidth: sigma of the Gaussian kernel: `median` of the pairwise distances, or a positive number.
        bandwidth_scale: multiplies the median; a bandwidth given as a number is taken as it is.
        bandwidth_from: where the subtracted term of a conditional entropy takes PCA and bandwidth from: the union of prompt and
            response (`joint`), or the prompt alone (`own`).
        pca: keep at most this many principal components; None keeps the states as they are.
        ridge: added to the diagonal of the kernel matrix before the trace is divided out.
        length: what makes up for unequal lengths of prompt and response (DESIGN.md, "Numbers, exactly").
        draws: how many draws `subsample` averages.
        units: `bits` or `nats`.
        method: `exact` eigenvalues, `lanczos` (stochastic quadrature for long sequences), or `auto`, the faster that is safe.
        seed: of everything random: the draws of `subsample`, the probes of `lanczos`.

    Raises:
        ValueError: a value is of the wrong kind or out of range.
    """

    alpha: float = 1.01
    kernel: Kernel = "gaussian"
    bandwidth: float | Literal["median"] = "median"
    bandwidth_scale: float = 1.0
    bandwidth_from: Source = "joint"
    pca: int | None = 64
    ridge: float = 1e-6
    length: LengthRule = "trace"
    draws: int = 10
    units: Units = "bits"
    method: Method = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        # Numbers are brought to one type, so that Protocol(alpha=1) and Protocol(alpha=1.0) are equal and hash alike.
        for name in ("alpha", "bandwidth_scale"):
            object.__setattr__(self, name, _number(name, getattr(self, name), "above zero"))
        object.__setattr__(self, "ridge", _number("ridge", self.ridge, "zero or above"))
        if self.bandwidth != "median":
            if isinstance(self.bandwidth, str):
                raise ValueError(f"bandwidth must be 'median' or a positive number, got {self.bandwidth!r}")
            object.__setattr__(self, "bandwidth", _number("bandwidth", self.bandwidth, "above zero"))
        if self.pca is not None:
            object.__setattr__(self, "pca", _integer("pca", self.pca, least=1))
        object.__setattr__(self, "draws", _integer("draws", self.draws, least=1))
        object.__setattr__(self, "seed", _integer("seed", self.seed, least=0))

    @property
    def unit(self) -> float:
        """One unit of this protocol in nats: ln 2 for bits, 1 for nats."""
        return math.log(2.0) if self.units == "bits" else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Every field by name; `Protocol(**d)` gives the protocol back."""
        return asdict(self)

    def digest(self) -> str:
        """12 hexadecimal characters that stand for all fields: sha256 of the sorted JSON."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def named(name: str) -> Protocol:
    """The protocol of that name in `PROTOCOLS`.

    Raises:
        ValueError: there is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"no protocol is called {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def _number(name: str, value: object, range_: Literal["above zero", "zero or above"]) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number {range_}, got {value!r}")
    if value < 0 or (value == 0 and range_ == "above zero"):
        raise ValueError(f"{name} must be {range_}, got {value!r}")
    return float(value)


def _integer(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


_CHOICES: dict[str, tuple[str, ...]] = {
    "kernel": get_args(Kernel),
    "bandwidth_from": get_args(Source),
    "length": get_args(LengthRule),
    "units": get_args(Units),
    "method": get_args(Method),
}
assert set(_CHOICES) <= {f.name for f in fields(Protocol)}

DEFAULT = Protocol()

PROTOCOLS: dict[str, Protocol] = {
    # Supplement, sections 3 and 5: trace normalisation of each block, PCA to 64, one median for the union.
    "default": DEFAULT,
    # Algorithm 1 to the letter: one trace over the concatenation, no PCA, and line 9 repeats every step on the prompt alone.
    "supplement-algorithm-1": Protocol(length="none", pca=None, bandwidth_from="own"),
    # What section 3 calls the default of the main text. It is today's default; the name stays if the default moves.
    "supplement-section-3": Protocol(length="trace", pca=64, bandwidth_from="joint"),
    # The main text gives sigma as a parameter and no PCA. At sigma = 1 the kernel of most states is saturated, and entropy is
    # log n: which is what the main text's Table 1 looks like.
    "fixed-bandwidth": Protocol(bandwidth=1.0, length="none", pca=None),
}
