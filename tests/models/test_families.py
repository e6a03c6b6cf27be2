"""What holds for every unified family alike: another family's weights are refused, and loading never holds a second copy."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import unisonde
from unisonde.models.base import vocabulary

FAMILIES = {
    "janus_pro": "model.safetensors",
    "janusflow": "model.safetensors",
    "showo": "model.safetensors",
    "showo2": "model.safetensors",
    "harmon": "model.safetensors",
    "bagel": "ema.safetensors",
    "omnigen2": "mllm/model.safetensors",
    "emu3": "model.safetensors",
}
"""Module of a family -> the file of its largest network's weights, in the folder that its twin is written to."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of an untrained twin of every family."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        training = import_module(f"unisonde.train.{family}")
        training.export(training.new_twin(0), root / family, {})
    return {family: root / family for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_of_another_family_are_refused(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """One sentence that names keys or shapes, whichever family the weights are of."""
    import shutil

    other = list(FAMILIES)[(list(FAMILIES).index(family) + 1) % len(FAMILIES)]
    shutil.copytree(folders[family], tmp_path / "mixed")
    shutil.copy(folders[other] / FAMILIES[other], tmp_path / "mixed" / FAMILIES[family])
    with pytest.raises(ValueError, match=r"lack|hold|shape|no place") as refused:
        unisonde.load(tmp_path / "mixed")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_words_are_another_identity(family: str, folders: dict[str, Path]) -> None:
    model = unisonde.load(folders[family])
    known = model.identity()["tokenizer"]
    assert known == vocabulary(model.tokenizer)
    model.tokenizer.add_tokens(["zyzzyva"])
    assert model.identity()["tokenizer"] != known


MEASURED = """
import re, sys, threading, time
import torch
import unisonde
import unisonde.models.janus_pro, unisonde.models.showo
from transformers import JanusForConditionalGeneration

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, held())
        time.sleep(0.002)

before = held()
watcher = threading.Thread(target=watch)
watcher.start()
model = unisonde.load(sys.argv[1], dtype=torch.bfloat16)
done.set()
watcher.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize("family", ["janus_pro", "showo"])
def test_loading_takes_the_model_and_its_largest_tensor(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """A whole `unisonde.load` of half a gigabyte and more never holds a second copy. One family of each way to load."""
    import shutil

    shutil.copytree(folders[family], tmp_path / "wide")
    file = tmp_path / "wide" / "model.safetensors"
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    sizes = config["text_config"] if family == "janus_pro" else config["llm"]
    narrow, wide = sizes["intermediate_size"], 1 << 17
    sizes["intermediate_size"] = wide
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config))
    weights = {key: tensor.bfloat16() for key, tensor in load_file(file).items()}
    for key, tensor in weights.items():
        if ".mlp." in key and narrow in tensor.shape:
            weights[key] = torch.zeros([wide if n == narrow else n for n in tensor.shape], dtype=torch.bfloat16)
    save_file(weights, file, metadata={"format": "pt"})
    size, largest = sum(t.nbytes for t in weights.values()), max(t.nbytes for t in weights.values())
    assert size > 400e6
    ran = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path / "wide")], capture_output=True, text=True, check=True)
    # What is not weights (image tokenizer, words, Python's own) is a constant, far below a second copy.
    assert int(ran.stdout) < size + largest + 150e6, f"{int(ran.stdout) / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights"
