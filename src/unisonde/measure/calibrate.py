"""The instrument's self-test: closed forms, what they say, and what `measure` says.

Every expected value is a literal or a formula in plain arithmetic. None comes from `measure`, so an estimator that goes wrong
differs from its line. `checks()` is what `unisonde calibrate` prints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import SupportsFloat

import numpy as np
import torch

from . import alignment, bounds, dependence, lanczos, rank, resample
from .ceilings import joint_ceiling, median_floor
from .entropy import conditional_entropy, entropy, gram_entropy, layer_estimates, sweep
from .gmi import best_tilt, calibration_loss, equation_3_as_printed, gmi, information, information_at_one, v_information
from .protocol import Protocol

EXACT = 1e-9


@dataclass(frozen=True)
class Line:
    """One check: what was measured, what a closed form says, and how far they may lie apart."""

    name: str
    expected: float
    measured: float
    tolerance: float
    source: str

    @property
    def difference(self) -> float:
        """measured - expected."""
        return self.measured - self.expected

    @property
    def ok(self) -> bool:
        """Whether they agree; a number that is none never does."""
        return abs(self.difference) <= self.tolerance


def checks() -> list[Line]:
    """Every check, in a fixed order; takes a few seconds on a CPU.

    A check that raises an error counts as measured NaN, so that one broken estimator does not hide the others.
    """
    lines: list[Line] = []
    for group in (
        _entropies,
        _conditionals,
        _ceilings,
        _long,
        _paired,
        _alignments,
        _ranks,
        _bounds,
        _information,
        _gaussian,
        _items,
    ):
        for name, expected, measure, tolerance, source in group():
            try:
                measured = float(measure())
            except Exception:  # a broken estimator is a finding of this very test
                measured = math.nan
            lines.append(Line(name, expected, measured, tolerance, source))
    return lines


def calibrate() -> list[Line]:
    """`checks`, under the name of its command."""
    return checks()


Case = tuple[str, float, Callable[[], SupportsFloat], float, str]


def _h2(p: float) -> float:
    """Binary entropy in bits."""
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def _clusters(*sizes: int) -> np.ndarray:
    return np.repeat(np.eye(len(sizes)) * 1e3, sizes, axis=0)


def _apart(alpha: float = 1.0, **more: object) -> Protocol:
    """Bandwidth 1 on states 1000 apart: the kernel is one within a cluster and zero between."""
    return Protocol(alpha=alpha, bandwidth=1.0, ridge=0.0, pca=None, **more)  # type: ignore[arg-type]


def _equicorrelated(n: int, rho: float) -> np.ndarray:
    return np.full((n, n), rho) + (1 - rho) * np.eye(n)


def _noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _entropies() -> Iterator[Case]:
    spectral = "Sanchez Giraldo et al. 2015, eq. 8"
    one = Protocol(alpha=1.0, ridge=0.0)
    yield "identical states", 0.0, lambda: entropy(np.ones((9, 4)), one), EXACT, spectral
    yield "one state", 0.0, lambda: entropy(np.ones((1, 4))), EXACT, spectral
    for alpha in (0.5, 1.0, 1.01, 2.0, 7.0):
        yield f"8 equal clusters, order {alpha:g}", 3.0, partial(entropy, _clusters(*[5] * 8), _apart(alpha)), EXACT, spectral
    yield "clusters of 1, 3, 4, order 1", 1.4056390622295662, lambda: entropy(_clusters(1, 3, 4), _apart()), EXACT, "-sum p log2 p"
    expected = -math.log2(26 / 64)
    yield "clusters of 1, 3, 4, order 2", expected, lambda: entropy(_clusters(1, 3, 4), _apart(2.0)), EXACT, "-log2 sum p^2"
    yield "64 states far apart", 6.0, lambda: entropy(np.eye(64) * 1e3, _apart(1.01)), EXACT, "K = I"
    nats = _apart(1.01, units="nats")
    yield "the same in nats", math.log(64), lambda: entropy(np.eye(64) * 1e3, nats), EXACT, "K = I"
    l0 = (1 + math.exp(-0.5)) / 2
    yield "two states, median rule", _h2(l0), lambda: entropy([[0.0], [3.0]], one), EXACT, "eigenvalues (1 ± e^-1/2) / 2"
    doubled = Protocol(alpha=1.0, ridge=0.0, bandwidth_scale=2.0)
    expected = _h2((1 + math.exp(-1 / 8)) / 2)
    yield "two states, two medians", expected, lambda: entropy([[0.0], [3.0]], doubled), EXACT, "eigenvalues (1 ± e^-1/8) / 2"
    ridge = Protocol(alpha=1.0, ridge=0.5)
    yield "two states, ridge 0.5", _h2((1.5 + math.exp(-0.5)) / 3), lambda: entropy([[0.0], [3.0]], ridge), EXACT, "(K + r I) / tr"
    expected = -(0.8 * math.log2(0.8) + 0.2 * math.log2(0.1))
    states = np.concatenate([np.zeros((8, 3)), np.eye(3)[:2]])
    yield "8 of 10 states equal: zero median", expected, lambda: entropy(states, one), EXACT, "limit of small bandwidths"
    for alpha, rho in ((1.0, 0.3), (1.01, 0.9), (3.0, 0.5)):
        lam = [(1 + 11 * rho) / 12] + [(1 - rho) / 12] * 11
        expected = -sum(v * math.log2(v) for v in lam) if alpha == 1 else math.log2(sum(v**alpha for v in lam)) / (1 - alpha)
        p = Protocol(alpha=alpha, ridge=0.0)
        gram = _equicorrelated(12, rho)
        yield (
            f"equicorrelated Gram, rho {rho:g}, order {alpha:g}",
            expected,
            partial(gram_entropy, gram, p),
            EXACT,
            "spectrum",
        )
    cross = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0], [0, -2, 0]])
    linear = Protocol(alpha=1.0, kernel="linear", ridge=0.0)
    yield "linear kernel, variances 1 to 4", _h2(0.2), lambda: entropy(cross + 5, linear), EXACT, "eigenvalues 0.2, 0.8"
    far = np.concatenate([cross, 1e-3 * np.eye(3)[[2, 2]] * [[1], [-1]]])
    first = Protocol(alpha=1.0, kernel="linear", ridge=0.0, pca=1)
    yield "linear kernel, one component", 0.0, lambda: entropy(far, first), EXACT, "rank one"
    tall = np.array([[1.0, 0], [0, 0], [0, 0], [-1, 0]])
    yield (
        "trace with ridge, rank one",
        _h2(0.25),
        lambda: entropy(tall[[0, 3]], Protocol(alpha=1.0, kernel="linear", ridge=1.0)),
        EXACT,
        "eigenvalues 2 + 1, 0 + 1",
    )


def _conditionals() -> Iterator[Case]:
    p, r = _clusters(1, 3, 4), _clusters(2, 2, 0) + 1e5
    h_p, h_r = 1.4056390622295662, 1.0
    proxy = "supplement, eq. 6"
    yield "response equal to prompt", 0.0, lambda: conditional_entropy(p, p, _apart()), EXACT, proxy
    for rule in ("trace", "weighted"):
        q = _apart(length=rule)
        yield f"uncoupled, {rule}", 1 + (h_r - h_p) / 2, partial(conditional_entropy, p, r, q), EXACT, "1 + (H_r - H_p) / 2"
    expected = _h2(2 / 3) + (h_r - h_p) / 3
    yield (
        "uncoupled, one trace",
        expected,
        lambda: conditional_entropy(p, r, _apart(length="none")),
        EXACT,
        "h2(w) + (1 - w)(H_r - H_p)",
    )
    saturated = np.eye(40) * 1e3
    none = _apart(1.01, length="none")
    yield (
        "saturated, one trace",
        2.0,
        lambda: conditional_entropy(saturated[:10], saturated[10:], none),
        EXACT,
        "log2(1 + n_r / n_p)",
    )
    drawn = _apart(1.01, length="subsample", draws=3)
    yield "saturated, subsampled", 1.0, lambda: conditional_entropy(saturated[:10], saturated[10:], drawn), EXACT, "log2 2"
    own = Protocol(alpha=1.0, ridge=0.0, bandwidth_from="own")
    term = _h2((1 + math.exp(-0.5)) / 2)
    two, many = [[0.0], [1.0]], [[float(v)] for v in range(50, 80)]
    yield "prompt term, own median", term, lambda: layer_estimates(two, many, own)["prompt_term"], EXACT, "two states"
    fixed = Protocol(alpha=1.0, ridge=0.0, bandwidth=2.0)
    term = _h2((1 + math.exp(-1 / 8)) / 2)
    yield "prompt term, joint bandwidth", term, lambda: layer_estimates(two, many, fixed)["prompt_term"], EXACT, "two states"
    joint = 1 + (h_p + h_r) / 2
    yield (
        "joint entropy of a sweep",
        joint,
        lambda: sweep(p, r, [_apart(2.0), _apart()])[1]["joint_entropy"],
        EXACT,
        "block-diagonal",
    )


def _ceilings() -> Iterator[Case]:
    n = 576
    floor = 1 / n + math.exp(-0.5) * (n * (n - 1) // 2) / n**2
    yield "floor of the largest eigenvalue", floor, lambda: median_floor(n), EXACT, "1/n + e^-1/2 (n - 1) / 2n"
    states = _noise(n, 3)
    median = Protocol(alpha=1.0, ridge=0.0, pca=None)
    yield "ceiling of the median rule", 7.26, lambda: entropy(states, median).ceiling, 5e-3, "h2(l0) + (1 - l0) log2(n - 1)"
    yield "ceiling of a fixed bandwidth", math.log2(n), lambda: entropy(states, _apart(1.0)).ceiling, EXACT, "log2 n"
    expected = 0.5 * math.log2(2 * 10) + 0.5 * math.log2(2 * 30)
    yield "joint ceiling, trace rule", expected, lambda: joint_ceiling(10, 30, _apart()), EXACT, "entropy of the diagonal"


def _long() -> Iterator[Case]:
    n = 600
    values = np.arange(1, n + 1) ** -1.2
    values /= values.sum()
    signs = np.sign(_noise(n))
    # A reflection keeps the spectrum and hides it.
    normal = _noise(n, seed=1)
    normal /= np.linalg.norm(normal)
    turned = np.diag(values) - 2 * np.outer(normal, normal * values)
    turned = (turned - 2 * np.outer(turned @ normal, normal)) * signs * signs[:, None]
    density = torch.from_numpy((turned + turned.T) / 2)

    def quadrature(alpha: float) -> float:
        return lanczos.renyi_lanczos(density, alpha)[0]

    for alpha in (1.0, 1.01):
        expected = -(values * np.log(values)).sum() if alpha == 1 else math.log((values**alpha).sum()) / (1 - alpha)
        source = "the spectrum it was made of"
        yield (
            f"quadrature, power law, order {alpha:g}",
            expected,
            partial(quadrature, alpha),
            0.01,
            source,
        )


def _paired() -> Iterator[Case]:
    x = _clusters(4, 4)
    y = np.tile(_clusters(1, 1), (4, 1))
    q = _apart()
    hadamard = "Sanchez Giraldo et al. 2015, sec. 3"
    yield "joint entropy, crossed halves", 2.0, lambda: dependence.paired_joint_entropy(x, y, q), EXACT, hadamard
    yield "information, crossed halves", 0.0, lambda: dependence.mutual_information(x, y, q), EXACT, hadamard
    yield "information of a copy", 1.0, lambda: dependence.mutual_information(x, x, q), EXACT, hadamard
    yield "conditional entropy of a copy", 0.0, lambda: dependence.paired_conditional_entropy(x, x, q), EXACT, hadamard
    fine = _clusters(2, 2, 2, 2)
    yield "fine given coarse", 1.0, lambda: dependence.paired_conditional_entropy(fine, x, q), EXACT, "log2 4 - log2 2"
    yield "DiME with a constant", 0.0, lambda: dependence.dime(x, np.ones((8, 2)), q, 5), EXACT, "nothing to permute"
    yield (
        "DiME of saturated kernels",
        0.0,
        lambda: dependence.dime(np.eye(6) * 1e3, np.eye(6) * 1e3, q, 5),
        EXACT,
        "I o P I P^T = I",
    )
    pairs = _clusters(1, 1)
    halves = _clusters(40, 40)
    yield (
        "DiME of two halves, 80 samples",
        1.0,
        lambda: dependence.dime(halves, halves, q, 40),
        0.05,
        "log2 4 - log2 2, in the limit",
    )
    yield "DiME of two samples", 0.0, lambda: dependence.dime(pairs, pairs, q, 5), EXACT, "both orders pair alike"


def _alignments() -> Iterator[Case]:
    x = _noise(30, 6)
    turn = np.linalg.qr(_noise(6, 6, seed=1))[0]
    yield "CKA under rotation and scale", 1.0, lambda: alignment.cka(x, 3 * x @ turn + 2), EXACT, "Kornblith et al. 2019"
    four = np.array([[1.0], [1], [-1], [-1]])
    other = np.array([[1.0], [-1], [1], [-1]])
    yield "biased CKA, orthogonal", 0.0, lambda: alignment.cka(four, other, debiased=False), EXACT, "<x, y> = 0"
    # n = 4 with equal and crossed halves, by hand: U-centred entries are 2/3, -1/3 and -1/3; the two share no large entry.
    yield "debiased CKA, crossed halves", -0.5, lambda: alignment.cka(four, other), EXACT, "U-statistic by hand"
    yield "mutual neighbours of a copy", 1.0, lambda: alignment.mutual_knn(x, x, 5, 0), EXACT, "Huh et al. 2024"
    ring = np.array([[math.cos(t), math.sin(t)] for t in (0.0, 0.2, 2.0, 2.2, 4.0, 4.2)])
    yield (
        "mutual neighbours, shifted by one",
        0.0,
        lambda: alignment.mutual_knn(ring, np.roll(ring, 1, axis=0), 1, 0),
        EXACT,
        "by hand",
    )
    expected = 1.0 + 1.0 - 2 * math.exp(-0.5 * 9)
    two = np.zeros((3, 1))
    yield "MMD of two points", expected, lambda: alignment.mmd(two, two + 3, _apart(), 0), EXACT, "k(x,x) + k(y,y) - 2 k(x,y)"
    yield (
        "modality gap of orthogonal sets",
        math.sqrt(2),
        lambda: alignment.modality_gap([[2.0, 0]], [[0, 5.0]]),
        EXACT,
        "Liang et al. 2022",
    )


def _ranks() -> Iterator[Case]:
    diagonal = np.diag([3.0, 1.0])
    e = math.exp(_h2(0.25) * math.log(2))
    yield "effective rank, sigma 3 and 1", e, lambda: rank.effective_rank(diagonal), EXACT, "Roy and Vetterli 2007"
    eps = 1e-7
    expected = math.exp(-(0.75 + eps) * math.log(0.75 + eps) - (0.25 + eps) * math.log(0.25 + eps))
    yield "RankMe, sigma 3 and 1", expected, lambda: rank.rankme(diagonal), EXACT, "Garrido et al. 2023, eq. 1"
    yield "Vendi of three kinds", 3.0, lambda: rank.vendi(_clusters(4, 4, 4)), EXACT, "Friedman and Dieng 2023"
    yield "Vendi of kinds 1, 3, 4, order 2", 64 / 26, lambda: rank.vendi(_clusters(1, 3, 4), 2.0), EXACT, "1 / sum p^2"
    expected = math.exp(-0.7 * math.log(0.7) - 0.3 * math.log(0.3))
    yield "Vendi of a Gram, rho 0.4", expected, lambda: rank.vendi_of_gram([[1, 0.4], [0.4, 1]]), EXACT, "eigenvalues 0.7, 0.3"
    cross = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0], [0, -2, 0]])
    yield "eRank of a cross", 2.0, lambda: rank.erank(cross), EXACT, "two directions of weight 1/2"
    line = np.array([[1.0, 0, 0], [-1, 0, 0]])
    yield "Diff-eRank, line after cross", 1.0, lambda: rank.diff_erank(line, cross), EXACT, "2 - 1"
    yield "Layer-by-layer entropy of a cross", math.log(2), lambda: rank.layer_by_layer_entropy(cross), EXACT, "log 2"
    yield (
        "data-set entropy of a cross",
        math.log(2) * _h2(0.2),
        lambda: rank.dataset_entropy([[c, c] for c in cross]),
        EXACT,
        "means",
    )
    square = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    yield "curvature of a square", math.pi / 2, lambda: rank.curvature(square), EXACT, "right angles"
    quarter = [[1.0, 0], [1, 1], [0, 1]]
    yield "angle of states, eighth turns", math.pi / 4, lambda: rank.curvature(quarter, of="states"), EXACT, "by hand"
    views = np.array([[[1.0, 0.5], [1, -0.5]], [[-1, 0.5], [-1, -0.5]], [[0, 2.5], [0, 1.5]], [[0, -1.5], [0, -2.5]]])
    # S_b = diag(0.5, 2), S_w = diag(0, 0.25) + 0.75 I: the ratio of variances is 2/3 to 2.
    expected = math.exp(_h2(0.25) * math.log(2))
    yield "LiDAR, variance ratios 1 to 3", expected, lambda: rank.lidar(views, 0.75), EXACT, "Thilak et al. 2024"
    expected = math.log(math.exp(1) + 2) - 1
    yield (
        "InfoNCE of two orthogonal pairs",
        expected,
        lambda: rank.infonce(np.eye(2), np.eye(2), 1.0),
        EXACT,
        "Chen et al. 2020, eq. 1",
    )
    expected = math.log(2) - math.log(1 + math.exp(-1))
    yield (
        "InfoNCE bound of the same",
        expected,
        lambda: rank.infonce_bound(np.eye(2), np.eye(2), 1.0),
        EXACT,
        "van den Oord et al. 2018",
    )


def _bounds() -> Iterator[Case]:
    joint, n_prompt = bounds.counter_example(4, 12)
    printed = "supplement, eq. 13"
    yield "Theorem 1 as printed, left", math.log(4), lambda: bounds.theorem_1_as_printed(joint, n_prompt).left, EXACT, printed
    yield "Theorem 1 as printed, right", 0.0, lambda: bounds.theorem_1_as_printed(joint, n_prompt).right, EXACT, printed
    pair = np.array([[1.0, 0.5], [0.5, 1.0]])
    a = 1.5
    power, even = 0.75**a + 0.25**a, 2 * 0.5**a
    yield "Lemma 1, left", power - even, lambda: bounds.lemma_1(pair, np.eye(2), a).left, EXACT, "supplement, eq. 8"
    yield "Lemma 1, right", a * 0.5, lambda: bounds.lemma_1(pair, np.eye(2), a).right, EXACT, "supplement, eq. 8"
    yield (
        "Corollary 1, left",
        math.log(power / even) / (a - 1),
        lambda: bounds.corollary_1(pair, np.eye(2), a).left,
        EXACT,
        "eq. 11",
    )
    yield "Corollary 1, right", 3 * 0.5 / even, lambda: bounds.corollary_1(pair, np.eye(2), a).right, EXACT, "supplement, eq. 11"
    yield "Lemma 2, both sides", 0.0, lambda: bounds.lemma_2(pair, 1).slack, EXACT, "supplement, eq. 12"
    yield "Lemma 2, right", 0.5, lambda: bounds.lemma_2(pair, 1).right, EXACT, "supplement, eq. 12"
    yield "valid part, right", 3 * 0.5 / even, lambda: bounds.theorem_1_valid_part(pair, 1, a).right, EXACT, "Corollary 1, Lemma 2"
    yield "pinching, left", -2 * math.log(power), lambda: bounds.pinching(pair, 1, a).left, EXACT, "spectrum 0.75, 0.25"


def _channel(w: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """(labels, observations) in exact proportions of a channel W(z | a) with equally likely labels: 1000 samples a label."""
    labels, seen = [], []
    for label, row in enumerate(w):
        for observation, probability in enumerate(row):
            count = round(1000 * probability)
            labels += [label] * count
            seen += [observation] * count
    return np.array(labels), np.array(seen)


def _information() -> Iterator[Case]:
    labels, seen = _channel([[0.89, 0.11], [0.11, 0.89]])
    right = 1 - _h2(0.11)

    def scores(p: float) -> np.ndarray:
        return np.log(np.array([[1 - p, p], [p, 1 - p]]))[seen]

    def best_s(p: float) -> float:
        return gmi(scores(p), labels, folds=1).s

    binary = "binary symmetric channel"
    for p in (0.3, 0.02):
        cost = -(0.89 * math.log2(1 - p) + 0.11 * math.log2(p))
        tilt = math.log(0.89 / 0.11) / math.log((1 - p) / p)
        yield f"GMI, metric {p:g}", right, partial(gmi, scores(p), labels, folds=1), EXACT, binary
        yield f"best tilt, metric {p:g}", tilt, partial(best_s, p), EXACT, binary
        yield f"information at s = 1, metric {p:g}", 1 - cost, partial(information_at_one, scores(p), labels), EXACT, binary
        loss = right - (1 - cost)
        yield f"calibration loss, metric {p:g}", loss, partial(calibration_loss, scores(p), labels, folds=1), EXACT, binary
        yield f"V-information, metric {p:g}", 1 - cost, partial(v_information, scores(p), labels), EXACT, binary
    yield "GMI, inverted metric", 0.0, lambda: gmi(scores(0.7), labels, folds=1), EXACT, binary
    yield "information at s = 1, inverted", -0.602502, lambda: information_at_one(scores(0.7), labels), 5e-7, binary
    three = [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.05, 0.25, 0.7]]
    marks, shown = _channel(three)
    table = np.log(np.full((3, 3), 0.1) + 0.7 * np.eye(3))
    yield "GMI, 3 x 3", 0.481655, lambda: gmi(table[shown], marks, folds=1), 5e-7, "literal"
    yield "best tilt, 3 x 3", 0.8198, lambda: gmi(table[shown], marks, folds=1).s, 5e-5, "literal"
    yield "information at s = 1, 3 x 3", 0.463034, lambda: information_at_one(table[shown], marks), 5e-7, "literal"
    matched = np.log(np.array(three)).T
    yield "matched GMI is I(A; Z), 3 x 3", 0.529622, lambda: gmi(matched[shown], marks, folds=1), 5e-7, "literal"
    groups = np.array([0, 0, 1, 1])
    log_scores = np.log([0.9, 0.9, 0.9, 0.9])
    yield "eq. 3 as printed, noiseless", 0.0, lambda: equation_3_as_printed(log_scores, groups), EXACT, "nats; never positive"
    spread = 0.5 * math.log(0.9 * 0.1) - math.log(0.5)
    yield "eq. 3 as printed, spread", spread, lambda: equation_3_as_printed(np.log([0.9, 0.1]), [0, 0]), EXACT, "Jensen's gap"
    noiseless = np.log([[0.9, 0.1], [0.1, 0.9]])
    corrected = 0.58779 / math.log(2)
    yield "eq. 3 corrected, s = 1", corrected, lambda: information_at_one(noiseless, [0, 1], "uniform"), 1e-5, "literal"
    yield "eq. 3 corrected, best s", 1.0, lambda: gmi(noiseless, [0, 1], "uniform", folds=1), 1e-8, "log2 2"


def _gaussian() -> Iterator[Case]:
    """The channel y = x + noise with a Gaussian codebook, P = 4, N = 1, by the trapezoidal rule, in nats."""
    power = 4.0
    x = np.linspace(-15, 15, 61)
    noise = np.linspace(-7, 7, 29)
    codeword, error = (a.ravel() for a in np.meshgrid(np.arange(61), noise, indexing="ij"))
    codeword = codeword.astype(int)
    received = x[codeword] + error
    weights = torch.from_numpy(np.exp(-(x[codeword] ** 2) / (2 * power) - error**2 / 2))
    weights /= weights.sum()
    log_prior = torch.log_softmax(torch.from_numpy(-(x**2) / (2 * power)), dim=0)
    labels = torch.from_numpy(codeword)

    def taken(gain: float, variance: float, tilt: float | None = None) -> float:
        scores = torch.from_numpy(-((received[:, None] - gain * x[None, :]) ** 2) / (2 * variance))
        s = best_tilt(scores, labels, log_prior, weights) if tilt is None else tilt
        return float(weights @ information(s, scores, labels, log_prior))

    def at_one(v: float) -> float:
        return -1 / (2 * v) + 0.5 * math.log(1 + power / v) + (power + 1) / (2 * (power + v))

    nearest = "nearest neighbour, Gaussian codebook"
    yield "AWGN, assumed variance 4", 0.5 * math.log(5), lambda: taken(1.0, 4.0), 1e-7, nearest
    yield "AWGN, s = 1, assumed variance 1", at_one(1.0), lambda: taken(1.0, 1.0, 1.0), 1e-7, nearest
    yield "AWGN, s = 1, assumed variance 4", at_one(4.0), lambda: taken(1.0, 4.0, 1.0), 1e-7, nearest
    yield "AWGN, wrong gain 0.5", 0.60624, lambda: taken(0.5, 1.0), 5e-6, "literal"
    yield "AWGN, inverted gain", 0.0, lambda: taken(-1.0, 1.0), EXACT, "s = 0"


def _items() -> Iterator[Case]:
    gains, none = [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]
    yield "sign flips of four gains", 2 / 16, lambda: resample.paired_permutation(gains, none).p, EXACT, "2 of 16 flips"
    yield "mean gain", 2.5, lambda: resample.paired_permutation(gains, none), EXACT, "mean difference"
    values = _noise(400)
    width = 2 * 1.959964 * values.std() / math.sqrt(len(values))

    def measured() -> float:
        interval = resample.bootstrap(values, draws=999)
        return interval.high - interval.low

    yield "bootstrap interval of a mean", width, measured, 0.1 * width, "normal limit"
