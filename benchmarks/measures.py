"""Speed, memory and accuracy of the measures, by hand: `python benchmarks/measures.py [--quick] [--write docs/speed.md]`.

One thread. Times are medians of process CPU time, and each ratio is taken within one run, with the two sides alternating, so that
a busy machine disturbs both alike. Accuracy of the quadrature is taken on matrices that were made from a known spectrum.
"""

from __future__ import annotations

import argparse
import math
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unisonde.measure import Protocol, conditional_entropy, entropy, layer_estimates, sweep
from unisonde.measure.eigen import eigvalsh
from unisonde.measure.entropy import renyi
from unisonde.measure.lanczos import renyi_lanczos
from unisonde.measure.spectrum import gram

ALPHA, RIDGE = 1.01, 1e-6
FIRST_SEED = 20261122
"""Seeds of the accuracy study. They were set after the code, and the code was not changed in their light."""

Row = list[str]


def cpu(*sides: Callable[[], object], repeats: int) -> list[float]:
    """Median CPU seconds of each side, the sides taking turns."""
    taken: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, times in zip(sides, taken, strict=True):
            start = time.process_time()
            side()
            times.append(time.process_time() - start)
    return [statistics.median(times) for times in taken]


def states(n: int, d: int, seed: int) -> Tensor:
    """Power-law states as a model of layers: channel k has standard deviation 1 / sqrt(k), all share an offset."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.3 * torch.randn(d, generator=generator)) * scale


def plainly(prompt: Tensor, response: Tensor) -> float:
    """The plain way: a full product for each Gram matrix, all eigenvectors computed and thrown away. Trace rule, one median."""
    union = torch.cat([prompt, response])
    union = union - union.mean(0)
    n = len(prompt)
    kernels: list[Tensor] = []
    sigma = torch.tensor(0.0)
    for x in (union, union[:n]):
        products = x @ x.T
        norms = products.diagonal()
        squared = (norms[:, None] + norms - 2 * products).clamp_min(0)
        if x is union:
            above = squared[torch.triu_indices(len(x), len(x), 1).unbind()]
            sigma = torch.quantile(above[: 1 << 24].sqrt(), 0.5)
        kernels.append(torch.exp(-squared / (2 * sigma**2)) + RIDGE * torch.eye(len(x), dtype=torch.float64))
    joint, own = kernels
    lengths = torch.tensor([n] * n + [len(response)] * len(response), dtype=torch.float64)
    root = (0.5 / lengths).sqrt()
    values = []
    for matrix in (joint * root[:, None] * root, own):
        eigenvalues, _ = torch.linalg.eigh(matrix)
        eigenvalues = eigenvalues[eigenvalues > 0]
        eigenvalues = eigenvalues / eigenvalues.sum()
        values.append(torch.log2((eigenvalues**ALPHA).sum()) / (1 - ALPHA))
    return float(values[0] - values[1])


def one_layer(repeats: int) -> list[Row]:
    prompt, response = states(200, 2048, 0), states(576, 2048, 1)
    union = torch.cat([prompt, response])
    plain_protocol = Protocol(pca=None)
    kernel = torch.exp(-(torch.cdist(union, union) ** 2) / 10)

    def floor() -> None:
        gram(union)
        eigvalsh(kernel)
        eigvalsh(kernel[:200, :200])

    ours, plain, least, product = cpu(
        lambda: conditional_entropy(prompt, response, plain_protocol),
        lambda: plainly(prompt, response),
        floor,
        lambda: union @ union.T,
        repeats=repeats,
    )
    default, without = cpu(
        lambda: conditional_entropy(prompt, response),
        lambda: conditional_entropy(prompt, response, plain_protocol),
        repeats=repeats,
    )
    gap = abs(conditional_entropy(prompt, response, plain_protocol).value - plainly(prompt, response))
    # Half a matrix product is half of torch's own full one, which is a little less than what `gram` takes.
    ideal = least - cpu(lambda: gram(union), repeats=repeats)[0] + product / 2
    return [
        [
            "one layer, 200 + 576 states, d = 2048, no PCA",
            f"{ours * 1e3:.0f} ms",
            f"{plain * 1e3:.0f} ms",
            f"{plain / ours:.2f}x",
            "1.5x",
        ],
        ["difference to the plain way", f"{gap:.1e} bit", "", "", "1e-10"],
        ["floor: half a product plus `eigvalsh`", f"{ideal * 1e3:.0f} ms", "", f"{ideal / ours:.0%} reached", ""],
        [
            "the same by the default protocol (PCA to 64)",
            f"{default * 1e3:.0f} ms",
            f"{without * 1e3:.0f} ms without",
            f"PCA {(default - without) / without:.2f} of the rest",
            "1",
        ],
    ]


def stack(layers: int, repeats: int) -> list[Row]:
    pairs = [(states(200, 2048, 2 * k), states(576, 2048, 2 * k + 1)) for k in range(layers)]
    protocol = Protocol(pca=None)

    def ours(count: int = layers) -> None:
        for prompt, response in pairs[:count]:
            conditional_entropy(prompt, response, protocol)

    ours(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    fast, slow = cpu(ours, lambda: [plainly(p, r) for p, r in pairs], repeats=repeats)
    return [
        [f"a stack of {layers} layers", f"{fast:.2f} s", f"{slow:.2f} s", f"{slow / fast:.2f}x", "1.5x"],
        ["memory that the other layers add", f"{grown:.0f} MB", "", "", "0"],
    ]


def sweeps(repeats: int) -> list[Row]:
    x = states(576, 2048, 5)
    protocols = [Protocol(alpha=a, bandwidth_scale=s, pca=None) for s in (0.1, 0.5, 1.0, 2.0, 10.0) for a in (1.001, 1.01, 1.1)]
    together, apart = cpu(lambda: sweep(x, None, protocols), lambda: [entropy(x, p) for p in protocols], repeats=repeats)
    return [["5 bandwidths x 3 orders, n = 576, d = 2048", f"{together:.2f} s", f"{apart:.2f} s", f"{apart / together:.2f}x", "4x"]]


def spectrum(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "flat":
        values = 1 + rng.uniform(0, 0.5) * rng.random(n)
    elif kind == "power law":
        values = np.arange(1, n + 1) ** -rng.uniform(0.6, 2.2)
    elif kind == "clustered":
        values = np.full(n, RIDGE)
        k = int(rng.integers(3, 400))
        values[:k] = n * rng.dirichlet(np.ones(k))
    else:
        values = np.abs(1 + 0.02 * rng.normal(size=n))
        values[:20] += 5 * rng.random(20)
    return values / values.sum()


def hidden(values: np.ndarray, rng: np.random.Generator) -> Tensor:
    """A symmetric matrix of that spectrum in a random basis: reflections and a random cosine transform."""
    from scipy.fft import dct

    matrix = np.zeros((len(values),) * 2)
    np.fill_diagonal(matrix, rng.permutation(values))
    for _ in range(2):
        signs = rng.choice([-1.0, 1.0], size=len(values))
        matrix *= signs * signs[:, None]
        matrix = dct(dct(matrix, axis=0, norm="ortho", overwrite_x=True), axis=1, norm="ortho", overwrite_x=True)
    return torch.from_numpy((matrix + matrix.T) / 2)


def long_sequences(n: int, cases: int, target: str) -> list[Row]:
    errors: list[float] = []
    covered: list[bool] = []
    times: list[float] = []
    kinds = ("flat", "power law", "clustered", "near saturation")
    for case in range(cases):
        rng = np.random.default_rng(FIRST_SEED + case)
        values = spectrum(kinds[case % 4], n, rng)
        matrix = hidden(values, rng)
        exact = float(renyi(torch.from_numpy(values), ALPHA)) / math.log(2)
        start = time.process_time()
        estimate, stderr = (v / math.log(2) for v in renyi_lanczos(matrix, ALPHA, case))
        times.append(time.process_time() - start)
        errors.append(abs(estimate - exact))
        covered.append(errors[-1] <= 2 * stderr)
    start = time.process_time()
    torch.linalg.eigvalsh(matrix)
    full = time.process_time() - start
    mine = statistics.median(times)
    return [
        [f"n = {n}, matrix given, against `eigvalsh`", f"{mine:.2f} s", f"{full:.1f} s", f"{full / mine:.1f}x", target],
        [
            f"its error in {cases} cases: median, 95 %, largest",
            f"{np.median(errors):.5f}, {np.quantile(errors, 0.95):.5f}, {max(errors):.5f} bit",
            "",
            "",
            "0.02 in 95 %",
        ],
        ["within two standard errors", f"{np.mean(covered):.0%}", "", "", "90 %"],
    ]


def papers_table(repeats: int) -> list[Row]:
    printed = {100: (0.18, 0.14), 200: (0.65, 0.53), 300: (1.32, 1.13), 500: (2.15, 1.65)}
    rows: list[Row] = []
    for n, (prompt_time, conditional_time) in printed.items():
        prompt, response = states(n, 4096, n).float(), states(n, 4096, n + 1).float()
        alone, both = cpu(lambda x=prompt: entropy(x), lambda p=prompt, r=response: layer_estimates(p, r), repeats=repeats)  # type: ignore[misc]
        total = prompt_time + conditional_time
        rows.append(
            [
                f"n = {n}, d = 4096: prompt; prompt and conditional",
                f"{alone:.3f} s; {both:.3f} s",
                f"{prompt_time} s; {total:.2f} s",
                f"{total / both:.0f}x",
                "",
            ]
        )
    return rows


def table(rows: list[Row], other: str) -> str:
    head = f"| what | ours | {other} | ratio | at least |\n|---|---|---|---|---|\n"
    return head + "\n".join("| " + " | ".join(row) + " |" for row in rows)


TEXT = """# Speed

Made by `python benchmarks/measures.py --write docs/speed.md`. {machine}, torch {torch}, one thread. Times are medians of process
CPU time, and both sides of a ratio were taken in turns within one run. The machine was shared with other work, so the seconds are
rough; the ratios are less so, and errors and values are not affected.

## One layer, a stack, a sweep

The plain way builds each Gram matrix by a full product in float64 and takes all eigenvectors, as most public code does.

{layers}

Where the time goes: half a matrix product, because the Gram matrix is symmetric; eigenvalues without eigenvectors; and the prompt's
kernel is a block of the joint one. Eigenvalues come from scipy's LAPACK, which on this processor is faster than the one in torch
(`unisonde.measure.eigen`). PCA to 64 takes the 64 leading eigenvectors of the joint Gram matrix and no others.

## Long sequences

`method="auto"` takes all eigenvalues below 2048 states and estimates from there on, for orders of one and above (order 2 needs no
eigenvalues). The estimate deflates the leading eigenpairs, uses the traces of the remainder that are known exactly, and leaves only
the rest to random probes; `unisonde.measure.lanczos` says how. The estimate carries its standard error. Seeds were chosen after the
code was fixed; spectra are flat, power laws, clustered and near saturation in turn.

{long}

## Beside the paper's own table

"Pseudo-Unification", supplement, Table 7: seconds on an NVIDIA RTX 4090, against one CPU thread here. Prompt and response have the
same length.

{paper}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repeats and no n = 8192")
    parser.add_argument("--write", type=Path, help="write the tables to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 3 if options.quick else 9
    layers = one_layer(repeats) + stack(4 if options.quick else 28, 1 if options.quick else 3) + sweeps(repeats)
    long = long_sequences(4096, 8 if options.quick else 40, "3x")
    if not options.quick:
        long += long_sequences(8192, 40, "8x")
    text = TEXT.format(
        machine=platform.processor() or platform.machine(),
        torch=torch.__version__.split("+")[0],
        layers=table(layers, "the plain way"),
        long=table(long, "all eigenvalues"),
        paper=table(papers_table(repeats), "printed, on a GPU"),
    )
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
