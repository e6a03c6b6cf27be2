"""Eigenvalues and leading eigenvectors of symmetric matrices: LAPACK through scipy on a CPU, torch on every other device.

torch brings its own LAPACK, which computes every eigenvector even where sixty-four are wanted, and on AMD processors took 1.4 to 1.8
times as long for the eigenvalues alone (n = 576 to 1500). scipy's threads are held to `torch.get_num_threads()`, so that one setting
governs both and many-core machines do not spin on small matrices. Several threads may call at once; the first one's setting holds
until the last is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

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
    with _threads():
        return torch.from_numpy(scipy.linalg.eigvalsh(matrix.numpy(), check_finite=False, driver="evd"))


def leading(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues `(k,)`, ascending, of a symmetric matrix `(n, n)`, and their eigenvectors `(n, k)`."""
    n = len(matrix)
    if not _on_cpu(matrix) or _FEW * k > n:
        values, vectors = torch.linalg.eigh(matrix)
        return values[-k:], vectors[:, -k:]
    with _threads():
        values, vectors = scipy.linalg.eigh(matrix.numpy(), subset_by_index=[n - k, n - 1], check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _on_cpu(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu"


_lock = Lock()
_callers = 0
_limit: Any = None


@contextmanager
def _threads() -> Iterator[None]:
    """The number of scipy's threads is one for the whole process, so it is put back by the last to leave."""
    global _callers, _limit
    with _lock:
        if _callers == 0:
            _limit = _libraries().limit(limits=torch.get_num_threads(), user_api="blas")
        _callers += 1
    try:
        yield
    finally:
        with _lock:
            _callers -= 1
            if _callers == 0:
                _limit.restore_original_limits()


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
