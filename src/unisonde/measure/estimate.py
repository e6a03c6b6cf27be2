"""An estimate: a number with what is needed to read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """One number of `measure`.

    Attributes:
        value: the number, in `units`.
        ceiling: the largest value that the protocol and the lengths allow whatever the states are; infinite if there is none.
        stderr: standard error of the method (draws, probes, folds), 0.0 if the value is exact given the states.
        n: how many states (or samples) the number was taken from.
        units: `bits`, `nats`, or another word where the number is not an entropy.
        method: how it was computed, e.g. `exact` or `lanczos`.
    """

    value: float
    ceiling: float = float("inf")
    stderr: float = 0.0
    n: int = 0
    units: str = "bits"
    method: str = "exact"

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        error = f" ± {self.stderr:.2g}" if self.stderr else ""
        ceiling = f" of at most {self.ceiling:.6g}" if self.ceiling != float("inf") else ""
        return f"Estimate({self.value:.6g}{error} {self.units}{ceiling}, n={self.n}, {self.method})"


@dataclass(frozen=True, repr=False)
class Tested(Estimate):
    """An estimate held against what chance gives: its own value under random re-pairing or re-labelling.

    Attributes:
        p: the share of permutations, the observed one included, that reach the value; never below 1 / (permutations + 1).
        null_mean: mean of the permuted values.
        null_std: their standard deviation.
        permutations: how many.
    """

    p: float = 1.0
    null_mean: float = 0.0
    null_std: float = 0.0
    permutations: int = 0

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, p={self.p:.3g} against {self.null_mean:.4g} ± {self.null_std:.2g})"


def p_value(observed: float, null: Sequence[float]) -> float:
    """The share of values, the observed one among them, that are as large as the observed one (Phipson and Smyth 2010)."""
    # Permuted sums are added up in another order; a tie must stay one.
    slack = 1e-12 * max(1.0, abs(observed))
    return (1 + sum(value >= observed - slack for value in null)) / (1 + len(null))
