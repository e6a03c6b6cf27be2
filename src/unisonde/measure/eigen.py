"""Eigenvalues and leading eigenvectors of symmetric matrices: LAPACK through scipy on a CPU, torch on every other device.

torch brings its own LAPACK, which computes every eigenvector even where sixty-four are wanted, and on AMD processors took 1.4 to 1.8
times as long for the eigenvalues alone (n = 576 to 1500). scipy's threads are held to `torch.get_num_threads()`, so that one setting
governs both and many-core machines do not spin on small matrices.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

_FEW = 4
"""Some eigenvectors are cheaper than all where no more than one in this many is wanted."""


def eigvalsh(matrix: Tensor) -> Tensor:
    """The eigenvalues `(n,)`, ascending, of a symmetric matrix `(n, n)`."""
    if not _on_cpu(matrix):
        return torch.linalg.eigvalsh(matrix)
    with held(torch.get_num_threads()):
        return torch.from_numpy(scipy.linalg.eigvalsh(matrix.numpy(), check_finite=False, driver="evd"))


def leading(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues `(k,)`, ascending, of a symmetric matrix `(n, n)`, and their eigenvectors `(n, k)`."""
    n = len(matrix)
    if not _on_cpu(matrix) or _FEW * k > n:
        values, vectors = torch.linalg.eigh(matrix)
        return values[-k:], vectors[:, -k:]
    with held(torch.get_num_threads()):
        values, vectors = scipy.linalg.eigh(matrix.numpy(), subset_by_index=[n - k, n - 1], check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _on_cpu(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu"


def held(threads: int) -> AbstractContextManager[object]:
    """While inside, scipy uses this many threads. Who measures on several threads of their own says so around them all: the number is one
    for the whole process, and belongs to the thread that sets it."""
    return _libraries().limit(limits=threads, user_api="blas")


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
