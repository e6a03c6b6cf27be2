"""The models of mismatched decoding that ship trained parts: their records, what they write, and bad recordings from end to end."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from scipy.stats import binomtest, fisher_exact

import unisonde
from unisonde.cli import main
from unisonde.data import speech, spoken
from unisonde.models.registry import packaged
from unisonde.train import speech_smollm, vision_smollm
from unisonde.train.speech_smollm import Recipe, scores

from ..conftest import absent

DIGITS_RIGHT, WORD_ERRORS, VOCABULARY = 0.97, 0.25, 200
"""Of held-out takes of digits, the least share right; of held-out sentences over so many words, the most errors a word."""
COUNTS_RIGHT, NAMED = 0.65, 0.75
"""Of held-out pictures, the least share of captions that count right; of their things, the least share that something is said of."""


def read(name: str, file: str) -> dict[str, Any]:
    return json.loads((packaged(f"twins/{name}") / f"{file}.json").read_text())


@pytest.fixture(scope="module")
def speaker() -> Any:
    return unisonde.load("speech-smollm")


def test_the_record_of_speech_smollm() -> None:
    assert read("speech-smollm", "training")["recipe"] == json.loads(json.dumps(asdict(Recipe())))
    assert (packaged("twins/speech-smollm") / "model.safetensors").stat().st_size < 8e6
    held = read("speech-smollm", "scores")
    assert held["digits"]["n"] == 300 and held["digits"]["right"] / held["digits"]["n"] >= DIGITS_RIGHT
    assert held["sentences"]["n"] >= 200 and held["sentences"]["errors"] / held["sentences"]["words"] < WORD_ERRORS
    assert len(spoken.WORDS) >= VOCABULARY


@pytest.mark.slow
def test_speech_smollm_writes_what_is_said(speaker: Any, shared: Path) -> None:
    """On some of the held-out digits, and on sentences that neither its training nor its record has seen."""
    if shutil.which(spoken.PROGRAM) is None:
        absent("espeak-ng is not installed")
    held = {"digits": speech.fsdd(shared / "data/fsdd", "test")[::3], "sentences": spoken.items("text", "test", 20, 6)}
    seen = {one.labels["sentence"] for one in spoken.items("text", "train", Recipe().seed, 5)}
    assert not seen & {one.labels["sentence"] for one in held["sentences"]}
    found = scores(speaker, held)
    # So few digits may fall short of the floor by chance, not by more.
    assert binomtest(found["digits"]["right"], found["digits"]["n"], DIGITS_RIGHT, alternative="less").pvalue > 0.001
    assert found["sentences"]["word_error_rate"] < WORD_ERRORS, found["sentences"]["wrong"]


@pytest.mark.parametrize("name", vision_smollm.NAMES)
def test_the_record_of_the_pair(name: str) -> None:
    assert read(name, "training")["recipe"] == json.loads(json.dumps(asdict(vision_smollm.recipe_of(name))))
    assert (packaged(f"twins/{name}") / "model.safetensors").stat().st_size < 8e6
    encoder, captions = read(name, "scores")["encoder"], read(name, "scores")["captions"]
    if name.endswith("aligned"):
        assert encoder["accuracy"] > 0.95
    else:
        assert encoder["error"] < 0.25 * encoder["constant"]
    assert captions["pictures"] == 100 and captions["counts"] >= COUNTS_RIGHT and captions["named"] >= NAMED


def test_the_pair_differs_in_its_objective_alone() -> None:
    one, other = (read(name, "training")["recipe"] for name in vision_smollm.NAMES)
    objectives = {recipe["model"].pop("objective") for recipe in (one, other)}
    assert one == other and objectives == {"aligned", "masked"}


@pytest.mark.slow
@pytest.mark.parametrize("name", vision_smollm.NAMES)
def test_the_pair_captions_pictures_that_it_has_not_seen(name: str) -> None:
    found = vision_smollm.scores(unisonde.load(name), replace(vision_smollm.recipe_of(name), seed=77, held_out=24))
    recorded = read(name, "scores")["captions"]
    for what, n in (("counts", found["pictures"]), ("named", found["things"]), ("colours", found["things"])):
        n_recorded = recorded["pictures" if what == "counts" else "things"]
        right, right_recorded = round(found[what] * n), round(recorded[what] * n_recorded)
        table = [[right, n - right], [right_recorded, n_recorded - right_recorded]]
        assert fisher_exact(table).pvalue > 0.001, (what, found[what], recorded[what])
        assert right > n / 3


# ------------------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def word(shared: Path) -> tuple[np.ndarray, int]:
    return soundfile.read(shared / "data/fsdd/7_theo_0.flac", dtype="float32")


def folder_of(tmp_path: Path, samples: np.ndarray, rate: int) -> Path:
    """Data of one file and a good one beside it."""
    tmp_path.mkdir(exist_ok=True)
    soundfile.write(tmp_path / "it.wav", samples, rate)
    (tmp_path / "them.jsonl").write_text(json.dumps({"id": "it", "prompt": "Transcribe the speech.", "audio": "it.wav"}) + "\n")
    return tmp_path / "them.jsonl"


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    from scipy.signal import resample_poly

    return resample_poly(samples, wanted, rate)


@pytest.mark.parametrize("kind", ["8 kHz", "48 kHz", "stereo", "clipped"])
def test_recordings_of_other_kinds_are_heard(speaker: Any, tmp_path: Path, word: tuple[np.ndarray, int], kind: str) -> None:
    samples, rate = word
    if kind == "48 kHz":
        samples, rate = resampled(samples, rate, 48_000), 48_000
    elif kind == "stereo":
        samples = np.stack([samples, samples], 1)
    elif kind == "clipped":
        samples = np.clip(samples / np.abs(samples).max() * 1.5, -1, 1 - 2**-15)
    [item] = unisonde.data.open_data(folder_of(tmp_path, samples, rate)).items("text")
    [response] = speaker.respond([item], "text", speaker.defaults("text"))
    assert speech_smollm.plain(response.text) == "seven"
    assert ("clipped" in response.flags) == (kind == "clipped")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("silence", "is silent"),
        ("0.05 s", "is 0.050 s long; speech takes 0.1 s at least"),
        ("ten minutes", "30"),
    ],
)
def test_recordings_that_cannot_be_heard_are_one_sentence(
    speaker: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, said: str
) -> None:
    rate = 16_000
    seconds = {"silence": 1.0, "0.05 s": 0.05, "ten minutes": 600.0}[kind]
    samples = np.zeros(int(seconds * rate), np.float32)
    if kind != "silence":
        samples = 0.1 * np.random.default_rng(0).normal(size=len(samples)).clip(-3, 3).astype(np.float32)
    data = folder_of(tmp_path / "data", samples, rate)
    [item] = unisonde.data.open_data(data).items("text")
    with pytest.raises(ValueError, match=said) as raised:
        speaker.respond([item], "text", speaker.defaults("text"))
    assert "\n" not in str(raised.value) and ("it.wav" in str(raised.value) or "'it'" in str(raised.value))
    if kind == "silence":  # and on the command line, where it is all the data there is
        out = tmp_path / "out"
        assert main(["decode", "directions", "speech-smollm", "--data", str(data), "--out", str(out)]) == 1
        assert "is silent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "more", "said"),
    [
        (["a", "a", "a", "a", "a", "b"], [], "the label 'b' has one example"),
        (
            ["a", "a", "a", "a", "b", "b", "b"],
            ["--folds", "2", "--group", "who"],
            "the label 'a' is in 1 group, fewer than the 2 folds",
        ),
        (["yes", "yes", "yes. no", "yes. no"], ["--folds", "2"], "the answer 'yes. no.' begins with the answer 'yes.'"),
    ],
)
def test_labels_that_cannot_be_measured_are_one_sentence(
    tmp_path: Path, word: tuple[np.ndarray, int], capsys: pytest.CaptureFixture[str], labels: list[str], more: list[str], said: str
) -> None:
    """One example, a split that would leave a label out, an answer that begins with another."""
    soundfile.write(tmp_path / "it.wav", *word)
    rows = [{"id": f"r{k}", "audio": "it.wav", "what": what, "who": "ab"[what != "a"]} for k, what in enumerate(labels)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [
        "decode",
        "gmi",
        "speech-smollm",
        "--data",
        str(tmp_path / "d.jsonl"),
        "--attribute",
        "what",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*given, *more]) == 1
    assert capsys.readouterr().err.startswith(f"error: {said}") and not (tmp_path / "o").exists()
