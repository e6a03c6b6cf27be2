"""Readers of recorded speech: on the real recordings where they are present, and on empty files of the same names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from unisonde.data import open_data, speech
from unisonde.data.item import evenly

from ..conftest import absent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a variable nor the folder nearby is set, unless a test does so."""
    for variable in speech.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def put(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


# The real recordings


def test_digits_of_six_speakers(shared: Path) -> None:
    items = speech.fsdd(shared / "data" / "fsdd")
    assert len(items) == len({item.id for item in items}) == 1500
    assert set(Counter((item.labels["digit"], item.labels["speaker"]) for item in items).values()) == {25}
    assert {item.category for item in items} == set(speech.DIGITS) == {item.labels["digit"] for item in items}
    assert all(set(item.labels) == {"digit", "speaker", "take"} and item.modality == "audio" for item in items)


def test_published_split_of_digits(shared: Path) -> None:
    test, train = (open_data(f"fsdd:{shared / 'data' / 'fsdd'}").items("text", split=split) for split in ("test", "train"))
    assert (len(test), len(train)) == (300, 1200)
    assert {item.labels["take"] for item in test} == {0, 1, 2, 3, 4}
    assert not {item.id for item in test} & {item.id for item in train}


def test_a_title_has_no_folder_in_it(tmp_path: Path) -> None:
    """Recordings that were moved are the same data."""
    titles = {name: open_data(name).title for name in (f"fsdd:{tmp_path}", "fsdd", "fsdd:test", "textured:train", str(tmp_path))}
    assert list(titles.values()) == ["fsdd", "fsdd", "fsdd:test", "textured:train", str(tmp_path)]


def test_a_limit_takes_every_digit_and_speaker(shared: Path) -> None:
    some = evenly(speech.fsdd(shared / "data" / "fsdd"), 60)
    assert set(Counter((item.labels["digit"], item.labels["speaker"]) for item in some).values()) == {1}
    some = evenly(speech.emodb(shared / "data" / "emodb"), 80)
    assert set(Counter(item.category for item in some).values()) == {20}
    assert len({item.labels["speaker"] for item in some}) == len({item.labels["sentence"] for item in some}) == 10


def test_acted_emotions(shared: Path) -> None:
    items = speech.emodb(shared / "data" / "emodb")
    assert len(items) == len({item.id for item in items}) == 339
    assert Counter(item.labels["emotion"] for item in items) == {"anger": 127, "neutral": 79, "happiness": 71, "sadness": 62}
    assert {item.labels["speaker"] for item in items} == {"03", *(f"{k:02d}" for k in range(8, 17))}
    assert len({item.labels["sentence"] for item in items}) == 10
    assert all(item.category == item.labels["emotion"] for item in items)


@pytest.mark.slow
def test_every_recording_is_sound(shared: Path) -> None:
    try:
        import soundfile  # noqa: F401
    except ImportError:
        absent("soundfile is not installed")
    seconds, flags = [], Counter()
    for item in [*speech.fsdd(shared / "data" / "fsdd"), *speech.emodb(shared / "data" / "emodb")]:
        sound = item.sound()
        assert sound is not None and sound.rate == 16_000
        seconds.append(sound.seconds)
        flags.update(sound.flags)
    assert min(seconds) > 0.1 and max(seconds) < 30
    # Half of Emo-DB is normalised to full scale, and touches it; that is no clipping.
    assert flags["clipped"] < 20


# Names


def test_a_name_says_it_all(tmp_path: Path) -> None:
    folder = put(tmp_path, "7_theo_12.wav", "0_al_4.WAV", "readme.txt", ".hidden.wav")
    zero, seven = speech.fsdd(folder)
    assert zero.labels == {"digit": "zero", "speaker": "al", "take": 4} and zero.audio == folder / "0_al_4.WAV"
    assert (
        seven.labels == {"digit": "seven", "speaker": "theo", "take": 12} and seven.id == "7_theo_12" and seven.category == "seven"
    )
    assert [item.id for item in speech.fsdd(folder, "test")] == ["0_al_4"]
    assert [item.id for item in speech.fsdd(folder, "train")] == ["7_theo_12"]
    [item] = speech.emodb(put(tmp_path / "e", "16b10Tb.flac"))
    assert item.labels == {"speaker": "16", "sentence": "b10", "emotion": "sadness", "take": "b"} and item.category == "sadness"


def test_folders_as_published(tmp_path: Path) -> None:
    put(tmp_path / "recordings", "7_theo_12.wav")
    put(tmp_path / "wav", "16b10Tb.wav")
    assert len(speech.fsdd(tmp_path)) == len(speech.emodb(tmp_path)) == 1


@pytest.mark.parametrize("name", ["seven_theo_1.wav", "7_theo.wav", "7_theo_x.wav", "17_theo_1.wav"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is not named as in fsdd \(such as 7_theo_12\.wav\)"):
        speech.fsdd(put(tmp_path, "7_theo_12.wav", name))


def test_other_emotions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"16b10Tb_1\.wav is not named as in emodb"):
        speech.emodb(put(tmp_path / "a", "16b10Tb_1.wav"))
    with pytest.raises(ValueError, match=r"X is no emotion of Emo-DB \(W, L, E, A, F, N, T\)"):
        speech.emodb(put(tmp_path / "b", "16b10Xb.wav"))


def test_one_recording_in_two_formats_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 7_theo_12 in two formats"):
        speech.fsdd(put(tmp_path, "7_theo_12.wav", "7_theo_12.flac"))


def test_a_split_without_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no take of the split 'test'; takes 0 to 4 are test"):
        speech.fsdd(put(tmp_path, "7_theo_12.wav"), "test")


# Where they are


@pytest.mark.parametrize("name", ["fsdd", "emodb"])
def test_by_folder_by_variable_and_nearby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    file = {"fsdd": "7_theo_12.wav", "emodb": "16b10Tb.wav"}[name]
    here, named, near = put(tmp_path / "here", file), put(tmp_path / "named", file), put(tmp_path / "shared" / "data" / name, file)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert open_data(name).items("text")[0].audio == Path("../shared/data") / name / file and near.is_dir()
    monkeypatch.setenv(speech.VARIABLES[name], str(named))
    assert open_data(name).items("text")[0].audio == named / file
    data = open_data(f"{name}:{here}")
    assert data.items("text")[0].audio == here / file
    assert data.name == f"{name}:{here}" and open_data(data.name) == data


def test_absent_recordings_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"not part of unisonde: write fsdd:FOLDER, or set the environment variable UNISONDE_FSDD"):
        speech.fsdd()
    with pytest.raises(ValueError, match="holds no recordings; give the folder with the recordings of emodb"):
        speech.emodb(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        speech.emodb(tmp_path / "gone")
    monkeypatch.setenv("UNISONDE_EMODB", str(tmp_path))
    with pytest.raises(ValueError, match=r"\(named by UNISONDE_EMODB\) holds no recordings"):
        speech.emodb()
    with pytest.raises(ValueError, match=r"'dev' is neither a split of fsdd \(all, test, train\) nor a folder; give fsdd:FOLDER"):
        open_data("fsdd:dev")
    with pytest.raises(ValueError, match=r"'dev' is not a folder; give emodb:FOLDER"):
        open_data("emodb:dev")


def test_recordings_are_not_drawn_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no items for task 'image'"):
        open_data(f"fsdd:{put(tmp_path, '7_theo_12.wav')}").items("image")
