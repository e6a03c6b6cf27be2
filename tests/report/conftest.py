"""What the tests of the report share: `make`, and the module `synthetic` that it comes from, importable by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    """`make("name", ...)`: a run folder of that name, with the options of `synthetic.make_run`."""
    from synthetic import make_run

    return lambda name="first", **options: make_run(tmp_path / name, **options)
