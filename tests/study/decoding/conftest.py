"""What these tests share: the tiny bridged models of the models' tests, and feature vectors with known answers, importable by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parents[2] / "models"), str(Path(__file__).parent)]
