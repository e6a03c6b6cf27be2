"""An untrained twin, and data that it can be probed on in a moment."""

from __future__ import annotations

import pytest

from unisonde.data.item import Item
from unisonde.data.tabletop import question_item, text_item
from unisonde.models.janus_pro import JanusPro
from unisonde.train.janus_pro import new_twin

QUICK = {"tokens": 10, "guidance": 1.0}
"""Settings that make an untrained model quick."""


@pytest.fixture(scope="session")
def untrained() -> JanusPro:
    return new_twin(0)


@pytest.fixture
def items() -> list[Item]:
    texts = [text_item(category, "test", 1, k) for category in ("composition", "deductive") for k in range(3)]
    return texts + [question_item("attribute", "test", 1, k) for k in range(3)]
