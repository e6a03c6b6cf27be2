"""Entropies against closed forms, against a plain second opinion, and their laws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unisonde.measure import (
    PROTOCOLS,
    Protocol,
    conditional_entropy,
    entropy,
    gram_entropy,
    layer_estimates,
    renyi,
    sweep,
)

EXACT = Protocol(ridge=0.0, pca=None)


def clusters(k: int, each: int, far: float = 1e3) -> np.ndarray:
    return np.repeat(np.eye(k) * far, each, axis=0)


# -- closed forms ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.001, 1.01, 2.0, 5.0])
@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_equal_clusters_have_log_k(k: int, alpha: float) -> None:
    e = entropy(clusters(k, 6), Protocol(alpha=alpha, bandwidth=1.0, ridge=0.0, pca=None))
    assert e.value == pytest.approx(math.log2(k), abs=1e-9)


def test_orthogonal_states_have_log_n_and_the_ceiling() -> None:
    e = entropy(np.eye(64) * 1e3, Protocol(bandwidth=1.0, ridge=0.0, pca=None))
    assert e.value == pytest.approx(6.0, abs=1e-9)
    assert e.ceiling == pytest.approx(6.0, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.01, 2.0, 3.5])
@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9, 0.999])
def test_equicorrelated_gram(alpha: float, rho: float) -> None:
    n = 12
    gram = np.full((n, n), rho) + (1 - rho) * np.eye(n)
    values = np.array([(1 + (n - 1) * rho) / n] + [(1 - rho) / n] * (n - 1))
    values = values[values > 0]
    expected = -(values * np.log2(values)).sum() if alpha == 1 else np.log2((values**alpha).sum()) / (1 - alpha)
    assert gram_entropy(gram, Protocol(alpha=alpha, ridge=0.0)).value == pytest.approx(expected, abs=1e-9)


def test_order_two_is_the_frobenius_norm_with_the_right_trace(rng: np.random.Generator) -> None:
    x = rng.normal(size=(20, 7)) * 3
    k = (x - x.mean(0)) @ (x - x.mean(0)).T
    expected = -np.log2((k**2).sum() / np.trace(k) ** 2)
    assert entropy(x, Protocol(alpha=2, kernel="linear", ridge=0, pca=None)).value == pytest.approx(expected, abs=1e-10)


def test_linear_covariance_by_hand() -> None:
    x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    expected = -(0.2 * math.log2(0.2) + 0.8 * math.log2(0.8))
    assert entropy(x, Protocol(alpha=1, kernel="linear", ridge=0, pca=None)).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [7, 8, 9])
def test_linear_is_the_same_by_gram_and_by_covariance(n: int, rng: np.random.Generator) -> None:
    x = rng.normal(size=(n, 8))
    z = x - x.mean(0)
    expected = plain.renyi(plain.density(z @ z.T, 1e-6), 1.01)
    assert entropy(x, Protocol(kernel="linear")).value == pytest.approx(expected, abs=1e-10)


def test_response_equal_to_prompt_adds_nothing(rng: np.random.Generator) -> None:
    x = rng.normal(size=(30, 5))
    assert conditional_entropy(x, x, EXACT).value == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("rule", ["trace", "weighted"])
def test_uncoupled_blocks(rule: str, rng: np.random.Generator) -> None:
    p, r = rng.normal(size=(10, 4)), rng.normal(size=(25, 4)) * 2 + 1e4
    protocol = Protocol(alpha=1, bandwidth=1.5, ridge=0, pca=None, length=rule)  # type: ignore[arg-type]
    expected = 1 + (entropy(r, protocol).value - entropy(p, protocol).value) / 2
    assert conditional_entropy(p, r, protocol).value == pytest.approx(expected, abs=1e-9)


def test_uncoupled_blocks_under_one_trace(rng: np.random.Generator) -> None:
    p, r = rng.normal(size=(10, 4)), rng.normal(size=(30, 4)) * 2 + 1e4
    protocol = Protocol(alpha=1, bandwidth=1.5, ridge=0, pca=None, length="none")
    hp, hr, w = entropy(p, protocol).value, entropy(r, protocol).value, 0.25
    expected = -(w * math.log2(w) + (1 - w) * math.log2(1 - w)) + (1 - w) * (hr - hp)
    assert conditional_entropy(p, r, protocol).value == pytest.approx(expected, abs=1e-9)


def test_saturated_blocks_count_tokens() -> None:
    x = np.eye(40) * 1e3
    e = conditional_entropy(x[:10], x[10:], Protocol(bandwidth=1.0, ridge=0, pca=None, length="none"))
    assert e.value == pytest.approx(2.0, abs=1e-9)
    assert e.ceiling == pytest.approx(2.0, abs=1e-9)


def test_block_diagonal_decomposition_with_unequal_spectra(rng: np.random.Generator) -> None:
    p, r = clusters(2, 3), rng.normal(size=(12, 2)) + 1e6
    protocol = Protocol(alpha=1, bandwidth=1.0, ridge=0, pca=None, units="nats")
    out = layer_estimates(p, r, protocol)
    assert out["prompt_term"].value == pytest.approx(math.log(2), abs=1e-9)
    assert out["joint_entropy"].value == pytest.approx(math.log(2) + (math.log(2) + entropy(r, protocol).value) / 2, abs=1e-9)


# -- a second opinion -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("shape", [(2, 3), (9, 40), (40, 9), (17, 16), (16, 17)])
def test_entropy_agrees_with_plain_numpy(shape: tuple[int, int], k: int | None, rng: np.random.Generator) -> None:
    x = rng.normal(size=shape) * np.arange(1, shape[1] + 1) ** -0.5 + 7
    assert entropy(x, Protocol(pca=k)).value == pytest.approx(plain.entropy(x, k=k), abs=1e-9)


@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("rule", ["trace", "weighted", "none"])
@pytest.mark.parametrize("sizes", [(6, 20), (20, 6), (13, 13), (1, 9)])
def test_conditional_agrees_with_plain_numpy(sizes: tuple[int, int], rule: str, k: int | None, rng: np.random.Generator) -> None:
    p, r = rng.normal(size=(sizes[0], 11)), rng.normal(size=(sizes[1], 11)) + 0.5
    joint, term = plain.conditional(p, r, rule, k=k)
    out = layer_estimates(p, r, Protocol(pca=k, length=rule))  # type: ignore[arg-type]
    assert out["joint_entropy"].value == pytest.approx(joint, abs=1e-9)
    assert out["prompt_term"].value == pytest.approx(term, abs=1e-9)
    assert out["conditional_entropy"].value == pytest.approx(joint - term, abs=1e-9)
    assert out["entropy"].value == pytest.approx(plain.entropy(p, k=k), abs=1e-9)


def test_own_bandwidth_repeats_every_step_on_the_prompt(rng: np.random.Generator) -> None:
    p, r = rng.normal(size=(12, 6)), rng.normal(size=(30, 6)) * 4
    out = layer_estimates(p, r, PROTOCOLS["supplement-algorithm-1"])
    assert out["prompt_term"] == out["entropy"]
    joint, _ = plain.conditional(p, r, "none", k=None)
    assert out["conditional_entropy"].value == pytest.approx(joint - plain.entropy(p, k=None), abs=1e-9)


def test_subsample_takes_equal_numbers_and_reports_its_spread(rng: np.random.Generator) -> None:
    p, r = rng.normal(size=(8, 5)), rng.normal(size=(40, 5))
    out = layer_estimates(p, r, Protocol(length="subsample", pca=3))
    assert out["joint_entropy"].n == 16
    assert out["conditional_entropy"].stderr > 0
    assert out == layer_estimates(p, r, Protocol(length="subsample", pca=3))
    assert out != layer_estimates(p, r, Protocol(length="subsample", pca=3, seed=1))


def test_one_draw_by_hand(rng: np.random.Generator) -> None:
    p, r = rng.normal(size=(8, 5)), rng.normal(size=(20, 5))
    generator = torch.Generator().manual_seed(3)
    torch.randperm(8, generator=generator)
    chosen = torch.randperm(20, generator=generator)[:8].sort().values
    for k in (None, 3):
        joint, term = plain.conditional(p, r[chosen], "none", k=k)
        e = conditional_entropy(p, r, Protocol(length="subsample", draws=1, seed=3, pca=k))
        assert e.value == pytest.approx(joint - term, abs=1e-9)
        assert math.isnan(e.stderr)


def test_subsample_of_equal_lengths_is_exact(rng: np.random.Generator) -> None:
    p, r = rng.normal(size=(9, 5)), rng.normal(size=(9, 5))
    e = conditional_entropy(p, r, Protocol(length="subsample"))
    assert e.stderr == 0.0
    assert e == conditional_entropy(p, r, Protocol(length="none"))


def test_a_sweep_is_the_same_as_separate_calls(rng: np.random.Generator) -> None:
    p, r = rng.normal(size=(12, 9)), rng.normal(size=(20, 9))
    protocols = [
        Protocol(alpha=a, bandwidth_scale=s, pca=k, length=rule)  # type: ignore[arg-type]
        for a in (1, 1.01, 2)
        for s in (0.5, 1)
        for k in (None, 5)
        for rule in ("trace", "none", "subsample")
    ]
    for protocol, shared in zip(protocols, sweep(p, r, protocols), strict=True):
        for name, estimate in layer_estimates(p, r, protocol).items():
            assert shared[name].value == pytest.approx(estimate.value, abs=1e-12)


# -- laws -----------------------------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 14), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31))
protocols_ = st.builds(
    Protocol,
    alpha=st.sampled_from([0.6, 1.0, 1.01, 1.5, 2.0, 4.0]),
    kernel=st.sampled_from(["gaussian", "linear"]),
    bandwidth=st.one_of(st.just("median"), st.floats(0.05, 20)),
    bandwidth_scale=st.sampled_from([0.1, 0.5, 1.0, 2.0]),
    bandwidth_from=st.sampled_from(["joint", "own"]),
    pca=st.sampled_from([None, 2, 64]),
    ridge=st.sampled_from([0.0, 1e-6, 0.1]),
    length=st.sampled_from(["trace", "none", "weighted", "subsample"]),
    draws=st.just(2),
)


def draw(shape: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    n_p, n_r, d, seed = shape
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-2, 2, size=d)
    p, r = rng.normal(size=(n_p, d)) * scale, rng.normal(size=(n_r, d)) * scale + rng.normal(size=d) * scale
    if seed % 3 == 0:
        p, r = np.round(p), np.round(r)
    return p, r


@settings(deadline=None, max_examples=300)
@given(shapes, protocols_)
def test_every_entropy_lies_between_zero_and_its_ceiling(shape: tuple[int, int, int, int], protocol: Protocol) -> None:
    p, r = draw(shape)
    for name, e in layer_estimates(p, r, protocol).items():
        assert math.isfinite(e.value)
        assert e.value <= e.ceiling + 1e-9, (name, e)
        if name != "conditional_entropy":
            assert e.value >= 0.0
            assert e.ceiling <= math.log2(e.n) + 1e-9


@settings(deadline=None, max_examples=60)
@given(shapes, protocols_)
def test_order_of_states_rotation_and_translation_change_nothing(shape: tuple[int, int, int, int], protocol: Protocol) -> None:
    p, r = draw(shape)
    rng = np.random.default_rng(shape[3] + 1)
    rotation, _ = np.linalg.qr(rng.normal(size=(p.shape[1], p.shape[1])))
    before = layer_estimates(p, r, protocol)
    if protocol.length == "subsample":  # the draws go by position
        after = layer_estimates(p @ rotation + 3.0, r @ rotation + 3.0, protocol)
    else:
        after = layer_estimates(rng.permutation(p) @ rotation + 3.0, rng.permutation(r) @ rotation + 3.0, protocol)
    for name in before:
        assert after[name].value == pytest.approx(before[name].value, abs=2e-6 if protocol.alpha < 1 else 1e-7), name


@settings(deadline=None, max_examples=60)
@given(shapes, st.floats(0.01, 100))
def test_scale(shape: tuple[int, int, int, int], factor: float) -> None:
    p, r = draw(shape)
    median = Protocol()
    assert conditional_entropy(p * factor, r * factor, median).value == pytest.approx(
        conditional_entropy(p, r, median).value, abs=1e-8
    )
    fixed, scaled = Protocol(bandwidth=1.7), Protocol(bandwidth=1.7 * factor)
    assert conditional_entropy(p * factor, r * factor, scaled).value == pytest.approx(
        conditional_entropy(p, r, fixed).value, abs=1e-8
    )


@settings(deadline=None, max_examples=60)
@given(shapes, st.sampled_from(["gaussian", "linear"]))
def test_entropy_falls_with_the_order(shape: tuple[int, int, int, int], kernel: str) -> None:
    p, _ = draw(shape)
    values = [entropy(p, Protocol(alpha=a, kernel=kernel)).value for a in (0.5, 0.99, 1.0, 1.01, 1.5, 2.0, 8.0)]  # type: ignore[arg-type]
    assert all(high >= low - 1e-9 for high, low in itertools.pairwise(values))


@settings(deadline=None, max_examples=60)
@given(shapes, st.sampled_from([None, 2]))
def test_weighted_is_trace_for_a_unit_diagonal(shape: tuple[int, int, int, int], pca: int | None) -> None:
    p, r = draw(shape)
    a, b = (conditional_entropy(p, r, Protocol(length=rule, pca=pca)).value for rule in ("trace", "weighted"))  # type: ignore[arg-type]
    assert a == pytest.approx(b, abs=1e-10)


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_none_is_trace_for_equal_lengths(shape: tuple[int, int, int, int]) -> None:
    n, _, d, seed = shape
    p, r = draw((n, n, d, seed))
    a, b = (conditional_entropy(p, r, Protocol(length=rule)).value for rule in ("trace", "none"))  # type: ignore[arg-type]
    assert a == b


def test_order_near_one_meets_the_limit(rng: np.random.Generator) -> None:
    values = torch.from_numpy(rng.dirichlet(np.ones(50)))
    limit = float(renyi(values, 1.0))
    for step in (1e-4, 1e-6, 1e-8, 1e-10):
        assert float(renyi(values, 1.0 + step)) == pytest.approx(limit, abs=3 * step)
        assert float(renyi(values, 1.0 - step)) == pytest.approx(limit, abs=3 * step)


# -- hard inputs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_one_state_has_no_entropy(kernel: str) -> None:
    e = entropy(np.ones((1, 4)), Protocol(kernel=kernel))  # type: ignore[arg-type]
    assert (e.value, e.ceiling, e.n) == (0.0, 0.0, 1)


def test_two_states_are_a_constant_under_the_median(rng: np.random.Generator) -> None:
    l0 = (1 + math.exp(-0.5)) / 2
    expected = -(l0 * math.log2(l0) + (1 - l0) * math.log2(1 - l0))
    for scale in (1e-3, 1.0, 1e3):
        e = entropy(rng.normal(size=(2, 5)) * scale, Protocol(alpha=1, ridge=0))
        assert e.value == pytest.approx(expected, abs=1e-9)
        assert e.ceiling == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
@pytest.mark.parametrize("offset", [0.0, 0.1, 3000.0])
def test_identical_states_have_no_entropy(kernel: str, offset: float) -> None:
    x = np.full((11, 6), 1 / 3) + offset
    assert entropy(x, Protocol(kernel=kernel, ridge=0)).value == pytest.approx(0.0, abs=1e-12)  # type: ignore[arg-type]
    assert entropy(x, Protocol(kernel=kernel)).value < 1e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("pca", [None, 2])
def test_zero_median_is_the_limit_of_small_bandwidths(pca: int | None, rng: np.random.Generator) -> None:
    x = np.concatenate([np.tile(rng.normal(size=5), (8, 1)), rng.normal(size=(2, 5))])
    e = entropy(x, Protocol(alpha=1, ridge=0, pca=pca))
    assert e.value == pytest.approx(-(0.8 * math.log2(0.8) + 0.2 * math.log2(0.1)), abs=1e-9)
    p, r = np.tile(rng.normal(size=5), (8, 1)), rng.normal(size=(2, 5))
    out = layer_estimates(p, r, Protocol(alpha=1, ridge=0, length="none", pca=pca))
    assert out["prompt_term"].value == 0.0
    assert out["joint_entropy"].value == pytest.approx(e.value, abs=1e-9)


def test_bandwidths_of_every_size(rng: np.random.Generator) -> None:
    x = np.concatenate([rng.normal(size=(6, 3)), np.ones((2, 3))])
    for sigma in (1e-300, 1e-160, 1e-120, 1e-9):
        e = entropy(x, Protocol(alpha=1, ridge=0, bandwidth=sigma, pca=None))
        assert e.value == pytest.approx(3 - 0.25, abs=1e-9)
    assert entropy(x, Protocol(alpha=1, ridge=0, bandwidth=1e300, pca=None)).value == pytest.approx(0.0, abs=1e-9)


def test_a_saturated_kernel_does_not_cost_every_difference(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rng.normal(size=(40, 30)) * 1e4
    x[3], x[7] = x[2], x[6] + 0.1
    expected = plain.renyi(plain.density(plain.gaussian(x, 1.0), 1e-6), 1.01)
    monkeypatch.setattr(torch, "cdist", lambda *args, **kwargs: pytest.fail("all pairs were taken one by one"))
    assert entropy(x, PROTOCOLS["fixed-bandwidth"]).value == pytest.approx(expected, abs=1e-9)


def test_the_prompts_own_digits_survive_a_union_that_needed_differences(rng: np.random.Generator) -> None:
    p, r = rng.normal(size=(12, 6)) * 1e-7, np.ones((5, 6))
    for k in (None, 3):
        protocols = [Protocol(bandwidth=1e-7, pca=k, length="none"), Protocol(pca=k)]
        assert sweep(p, r, protocols)[1]["entropy"].value == pytest.approx(plain.entropy(p, k=k), abs=1e-7)


def test_a_tiny_cluster_beside_an_outlier_keeps_its_digits(rng: np.random.Generator) -> None:
    x = rng.normal(size=(30, 4)) * 1e-7
    x[0] = 1.0
    assert entropy(x, Protocol(pca=None)).value == pytest.approx(plain.entropy(x, k=None), abs=1e-9)
    assert entropy(x, Protocol(pca=2)).value == pytest.approx(plain.entropy(x, k=2), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_is_taken_as_it_is(dtype: torch.dtype, rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.normal(size=(20, 8))).to(dtype)
    x[:, 3] = 3000.0
    expected = plain.entropy(x.double().numpy())
    assert entropy(x).value == pytest.approx(expected, abs=1e-9)
    assert entropy(x.requires_grad_()).value == pytest.approx(expected, abs=1e-9)


def test_arrays_of_every_layout(rng: np.random.Generator) -> None:
    x = rng.normal(size=(20, 8))
    expected = entropy(x).value
    frozen = x.copy()
    frozen.setflags(write=False)
    wide = torch.from_numpy(np.repeat(x, 2, axis=1))[:, ::2]
    for other in (x[::-1], np.asfortranarray(x), x.tolist(), frozen, torch.from_numpy(x.T.copy()).T, wide):
        assert entropy(other).value == pytest.approx(expected, abs=1e-12)
    assert (x == np.asarray(x)).all()


def test_inputs_are_left_alone(rng: np.random.Generator) -> None:
    p, r = torch.from_numpy(rng.normal(size=(9, 5))), torch.from_numpy(rng.normal(size=(7, 5)))
    p0, r0 = p.clone(), r.clone()
    layer_estimates(p, r, Protocol(pca=2))
    gram = torch.eye(4, dtype=torch.float64)
    gram_entropy(gram, Protocol())
    assert torch.equal(p, p0) and torch.equal(r, r0) and torch.equal(gram, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("states", "says"),
    [
        (np.zeros((0, 4)), r"\(0, 4\)"),
        (np.zeros((4, 0)), r"\(4, 0\)"),
        (np.zeros(4), r"\(4,\)"),
        (np.zeros((2, 3, 4)), r"\(2, 3, 4\)"),
        (np.array([[1.0, np.nan], [0.0, 1.0]]), "1 values that are not finite"),
        (np.array([[1.0, np.inf]]), "not finite"),
        (torch.zeros(3, 3, dtype=torch.complex64), "real"),
        ("abc", "array of real numbers"),
    ],
)
def test_bad_states_are_refused(states: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        entropy(states)


def test_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5\)"):
        conditional_entropy(np.zeros((3, 4)), np.zeros((3, 5)))


@pytest.mark.parametrize(
    ("gram", "says"),
    [
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "positive semi-definite"),
        (np.array([[1.0, 0.0], [1.0, 1.0]]), "symmetric"),
        (np.zeros((3, 3)), "trace"),
        (np.zeros((3, 2)), "square"),
    ],
)
def test_bad_grams_are_refused(gram: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        gram_entropy(gram)
