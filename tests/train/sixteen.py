"""The sixteen Tabletop items that every family's twin learns by heart."""

from __future__ import annotations

from unisonde.data.tabletop import grammar, text_item
from unisonde.train.tabletop_batches import Example

ITEMS = [text_item("composition", "train", 0, k, 1 + k % 3) for k in range(16)]
SCENES = [item.labels["scene"] for item in ITEMS]
REQUEST = grammar.CAPTION_REQUESTS[0]

DRAWINGS = [Example("draw", item.prompt, scene, None) for item, scene in zip(ITEMS, SCENES, strict=True)]
CAPTIONS = [Example("caption", REQUEST, scene, grammar.describe(scene)) for scene in SCENES]
