"""What the tests of the models share: `tiny`, small random networks in the hub's layout, importable by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# No test may look for a model on the hub: without a network it would wait, with one it would depend on it.
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
