"""Traps that other implementations fall into: each test shows the naive value wrong and ours right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plain
import pytest
import torch
from torch.overrides import TorchFunctionMode

from unisonde.measure import (
    Protocol,
    eigen,
    entropy,
    gram_entropy,
    layer_by_layer_entropy,
    layer_estimates,
    paired_conditional_entropy,
    vendi,
    vendi_of_gram,
)
from unisonde.measure.rank import LINEAR

NATS = Protocol(alpha=1.0, kernel="linear", ridge=0.0, pca=None, units="nats")


def unit(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=0)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_1_an_elementwise_clamp_is_no_kernel(rng: np.random.Generator) -> None:
    states = rng.normal(size=(300, 40))
    x = unit(states)
    gram = x @ x.T
    exact = plain.renyi(gram / 300, 1.0, base=math.e)
    clamped = np.clip(gram, 0, None)
    assert np.linalg.eigvalsh(clamped).min() < -0.1  # not positive semi-definite any more
    naive = plain.renyi(clamped / np.trace(clamped), 1.0, base=math.e)
    assert naive - exact > 0.3
    assert layer_by_layer_entropy(states).value == pytest.approx(exact, abs=1e-9)
    with pytest.raises(ValueError, match="positive semi-definite"):
        gram_entropy(clamped)


def test_1_there_is_no_jump_where_states_outnumber_channels(rng: np.random.Generator) -> None:
    x = rng.normal(size=(66, 64))
    values = [layer_by_layer_entropy(x[:n]).value for n in (63, 64, 65, 66)]
    assert max(abs(a - b) for a, b in zip(values[1:], values[:-1], strict=True)) < 0.02


def test_2_a_gram_matrix_in_the_models_type_is_off(rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.normal(size=(100, 64)) + 8.0).to(torch.bfloat16)
    z = x.double() - x.double().mean(0)
    exact = plain.renyi(plain.density((z @ z.T).numpy()), 1.0, base=math.e)
    low = (x - x.mean(0)) @ (x - x.mean(0)).T
    naive = plain.renyi(plain.density(low.double().numpy()), 1.0, base=math.e)
    assert abs(naive - exact) > 1e-3
    assert entropy(x, NATS).value == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("normalise", ["raw", "logN", "logD", "logNlogD", "maxEntropy"])
def test_3_one_state_and_identical_states_are_zero_not_nan(normalise: str) -> None:
    assert layer_by_layer_entropy(np.ones((1, 5)), normalise=normalise).value == 0.0
    assert layer_by_layer_entropy(np.full((6, 5), 0.1), normalise=normalise).value == 0.0


def test_4_order_two_divides_by_the_trace_and_not_by_n(rng: np.random.Generator) -> None:
    x = rng.normal(size=(64, 16)) * 3
    z = x - x.mean(0)
    exact = plain.renyi(plain.density(z @ z.T), 2.0, base=math.e)
    naive = -math.log(((z @ z.T) ** 2).sum() / 64**2)
    covariance = z.T @ z / (z**2).sum() * 64  # trace n, size d: off by 2 ln(n / d)
    assert naive < 0 < exact
    assert -math.log((covariance**2).sum() / 16**2) == pytest.approx(exact - 2 * math.log(64 / 16), abs=1e-9)
    assert entropy(x, Protocol(alpha=2, kernel="linear", ridge=0, pca=None, units="nats")).value == pytest.approx(exact, abs=1e-10)
    assert gram_entropy(z @ z.T, Protocol(alpha=2, ridge=0, units="nats")).value == pytest.approx(exact, abs=1e-10)


def test_5_the_second_argument_is_the_condition_and_unequal_counts_are_said(rng: np.random.Generator) -> None:
    fine, coarse = np.repeat(np.eye(4), 3, axis=0) * 1e3, np.repeat(np.eye(2), 6, axis=0) * 1e3
    p = Protocol(alpha=1, bandwidth=1.0, ridge=0, pca=None)
    assert paired_conditional_entropy(fine, coarse, p).value == pytest.approx(1.0, abs=1e-9)
    assert paired_conditional_entropy(coarse, fine, p).value == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match=r"\(12, 4\).*\(11, 2\).*paired"):
        paired_conditional_entropy(fine, coarse[:11], p)


class OnlyNumbersLeave(TorchFunctionMode):
    """Fails when more than a few numbers of a tensor are brought to the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("cpu", "numpy", "tolist", "__array__") and args[0].numel() > 4:
            raise AssertionError(f"{name} of a tensor {tuple(args[0].shape)}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [Protocol(), Protocol(pca=8), Protocol(kernel="linear"), Protocol(length="subsample", draws=2)])
def test_6_a_layer_stays_on_its_device(p: Protocol, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigen, "_on_cpu", lambda matrix: False)  # on a CPU scipy shares the memory of a tensor, and nothing travels
    x, y = torch.from_numpy(rng.normal(size=(20, 30))), torch.from_numpy(rng.normal(size=(30, 30)))
    with OnlyNumbersLeave():
        layer_estimates(x, y, p)
        with pytest.raises(AssertionError, match="tolist"):
            x.tolist()


def test_7_a_shared_offset_does_not_cost_a_nat(rng: np.random.Generator) -> None:
    x = (rng.normal(size=(300, 256)) * np.arange(1, 257) ** -0.5 + 50).astype(np.float32)
    x[:, 7] = 3000.0
    exact = plain.entropy(x, k=None)
    raw = torch.from_numpy(x)
    squared = (raw.square().sum(1)[:, None] + raw.square().sum(1) - 2 * raw @ raw.T).clamp_min(0)
    sigma = squared.sqrt()[np.triu_indices(300, 1)].median()
    naive = plain.renyi(plain.density(torch.exp(-squared / (2 * sigma**2)).double().numpy()), 1.01)
    assert abs(naive - exact) > 0.5
    assert entropy(x, Protocol(pca=None)).value == pytest.approx(exact, abs=1e-9)


def test_7_one_massive_token_keeps_its_digits(rng: np.random.Generator) -> None:
    x = (rng.normal(size=(200, 128)) * np.arange(1, 129) ** -0.5).astype(np.float32)
    x[0, 5] = 3000.0
    assert entropy(x, Protocol(pca=None)).value == pytest.approx(plain.entropy(x, k=None), abs=1e-9)
    assert entropy(x).value == pytest.approx(plain.entropy(x), abs=1e-8)


def test_8_the_conventions_of_public_code_are_far_apart_and_ours_is_named(rng: np.random.Generator) -> None:
    x = rng.normal(size=(60, 10))
    d2, s = plain.distances(x) ** 2, plain.median(x)
    halved = plain.renyi(plain.density(np.exp(-d2 / (2 * s**2))), 1.01)
    whole = plain.renyi(plain.density(np.exp(-d2 / s)), 1.01)
    assert abs(halved - whole) > 0.5
    e = entropy(x, Protocol(ridge=0, pca=None))
    assert e.value == pytest.approx(halved, abs=1e-9)
    assert e.units == "bits"
    assert entropy(x, Protocol(ridge=0, pca=None, units="nats")).value == pytest.approx(halved * math.log(2), abs=1e-9)


def test_9_the_median_adapts_where_the_square_root_of_the_width_collapses(rng: np.random.Generator) -> None:
    d = 1024
    x = rng.normal(size=(100, d)) * np.arange(1, d + 1) ** -1.0
    collapsed = entropy(x, Protocol(bandwidth=math.sqrt(d / 2), pca=None, units="nats"))
    assert collapsed.value < 0.1
    assert entropy(x, Protocol(pca=None, units="nats")).value > 1.0


def test_10_the_order_of_the_vendi_score_is_used(rng: np.random.Generator) -> None:
    x = rng.normal(size=(20, 5))
    assert vendi(x, q=2.0).value < vendi(x, q=1.0).value - 0.1
    y = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert vendi_of_gram(y @ y.T, q=2.0).value == pytest.approx(vendi(x, q=2.0).value, abs=1e-9)
    assert vendi(x).value == pytest.approx(math.exp(plain.renyi(y @ y.T / 20, 1.0, base=math.e)), abs=1e-9)


def test_linear_default_is_in_nats() -> None:
    assert LINEAR.units == "nats" and LINEAR.ridge == 0.0
