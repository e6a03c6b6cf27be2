"""An estimate: a number with what is needed to read it."""

from __future__ import annotations

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
