"""What all tests share: where ../shared is, and the rule that what is absent here is a failure in CI."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side, one a core: threads of each would get into the others' way.
    torch.set_num_threads(1)


def absent(what: str) -> None:
    """Skip because something optional is not on this machine; fail in CI, where it has to be."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and CI needs it")
    pytest.skip(what)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared beside the project's root."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        absent(f"{folder} is absent")
    return folder
