"""Protocols: defaults, validation, hashes; estimates as numbers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from unisonde.measure import PROTOCOLS, Estimate, Protocol, named


def test_defaults() -> None:
    assert Protocol().to_dict() == {
        "alpha": 1.01,
        "kernel": "gaussian",
        "bandwidth": "median",
        "bandwidth_scale": 1.0,
        "bandwidth_from": "joint",
        "pca": 64,
        "ridge": 1e-6,
        "length": "trace",
        "draws": 10,
        "units": "bits",
        "method": "auto",
        "seed": 0,
    }


def test_the_digest_is_stable_and_tells_every_field_apart() -> None:
    # A literal: stored runs refer to protocols by it.
    assert Protocol().digest() == "2e827525c8bd"
    others: dict[str, Any] = {
        "alpha": 2,
        "kernel": "linear",
        "bandwidth": 1.0,
        "bandwidth_scale": 2.0,
        "bandwidth_from": "own",
        "pca": None,
        "ridge": 0,
        "length": "none",
        "draws": 3,
        "units": "nats",
        "method": "exact",
        "seed": 1,
    }
    assert set(others) == {f.name for f in dataclasses.fields(Protocol)}
    digests = {Protocol(**{name: value}).digest() for name, value in others.items()} | {Protocol().digest()}
    assert len(digests) == len(others) + 1


def test_equal_numbers_of_other_types_make_equal_protocols() -> None:
    a, b = Protocol(alpha=2, pca=8), Protocol(alpha=np.float32(2), pca=np.int64(8))  # type: ignore[arg-type]
    assert a == b and hash(a) == hash(b) and a.digest() == b.digest()
    assert Protocol(**json.loads(json.dumps(b.to_dict()))) == b


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", 0),
        ("alpha", -1.0),
        ("alpha", float("nan")),
        ("alpha", float("inf")),
        ("alpha", "1"),
        ("alpha", True),
        ("kernel", "rbf"),
        ("bandwidth", 0),
        ("bandwidth", -2.0),
        ("bandwidth", "mean"),
        ("bandwidth", None),
        ("bandwidth_scale", 0.0),
        ("bandwidth_from", "prompt"),
        ("pca", 0),
        ("pca", 2.5),
        ("ridge", -1e-9),
        ("length", "both"),
        ("draws", 0),
        ("units", "bit"),
        ("method", "slq"),
        ("seed", -1),
    ],
)
def test_bad_values_are_refused_in_one_sentence_that_names_them(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must .*") as caught:
        Protocol(**{field: value})
    assert repr(value) in str(caught.value) and "\n" not in str(caught.value)


def test_protocols_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Protocol().alpha = 2.0  # type: ignore[misc]


def test_named_protocols() -> None:
    assert named("default") == Protocol()
    assert named("supplement-algorithm-1") == Protocol(length="none", pca=None, bandwidth_from="own")
    assert named("fixed-bandwidth").bandwidth == 1.0
    assert set(PROTOCOLS) == {"default", "supplement-algorithm-1", "supplement-section-3", "fixed-bandwidth"}
    with pytest.raises(ValueError, match="no protocol is called 'x'; there are default"):
        named("x")


def test_estimates_are_numbers() -> None:
    e = Estimate(1.5, 2.0, 0.25, 9, "bits", "lanczos")
    assert float(e) == 1.5
    assert repr(e) == "Estimate(1.5 ± 0.25 bits of at most 2, n=9, lanczos)"
    assert repr(Estimate(0.5, units="nats", n=3)) == "Estimate(0.5 nats, n=3, exact)"
