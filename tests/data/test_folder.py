"""The user's own data: folders of files and JSONL."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unisonde.data import folder
from unisonde.data.item import Item


def put(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), "red").save(path)
    return path


def jsonl(path: Path, *entries: Any) -> Path:
    return put(path, "".join(json.dumps(entry) + "\n" for entry in entries))


# Folders


def test_folder(tmp_path: Path) -> None:
    cat, dog = picture(tmp_path / "animals" / "cat.png"), picture(tmp_path / "animals" / "dog.JPG")
    put(tmp_path / "animals" / "cat.txt", "What colour is it?\n")
    sun = picture(tmp_path / "sun.gif")
    put(tmp_path / "words" / "deep" / "one.txt", "A red square.\nOn a table.\n")
    assert folder.read(tmp_path) == [
        Item("animals/cat.png", "animals", "What colour is it?", cat),
        Item("animals/dog.JPG", "animals", folder.QUESTION, dog),
        Item("sun.gif", folder.CATEGORY, folder.QUESTION, sun),
        Item("words/deep/one.txt", "words/deep", "A red square.\nOn a table."),
    ]


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tiff"])
def test_formats_are_listed_and_read(tmp_path: Path, suffix: str) -> None:
    picture(tmp_path / f"a.{suffix}")
    (item,) = folder.read(tmp_path)
    read = item.picture()
    assert read is not None and read.size == (2, 2)


def test_recordings(tmp_path: Path) -> None:
    """As pictures: with a request of their own, with none, with the usual one; one of each kind may share it."""
    first, second = put(tmp_path / "a" / "one.wav", b""), put(tmp_path / "a" / "two.FLAC", b"broken")
    put(tmp_path / "a" / "one.txt", "Who speaks?\n")
    both, seen = put(tmp_path / "b.mp3", b""), picture(tmp_path / "b.png")
    put(tmp_path / "b.txt", "")
    assert folder.read(tmp_path) == [
        Item("a/one.wav", "a", "Who speaks?", audio=first),
        Item("a/two.FLAC", "a", folder.REQUEST, audio=second),
        Item("b.mp3", folder.CATEGORY, "", audio=both),
        Item("b.png", folder.CATEGORY, "", seen),
    ]
    assert [item.modality for item in folder.read(tmp_path)] == ["audio"] * 3 + ["image"]


def test_pictures_are_not_opened_when_listing(tmp_path: Path) -> None:
    """A broken picture fails as one item, when it is asked for; the others can still be read."""
    put(tmp_path / "a.png", b"")
    put(tmp_path / "b.png", b"no picture at all")
    picture(tmp_path / "c.png")
    broken, worse, fine = folder.read(tmp_path)
    assert isinstance(broken.image, Path) and broken.digest() != worse.digest()
    for item in (broken, worse):
        with pytest.raises(ValueError, match="cannot be read"):
            item.picture()
    assert fine.picture() is not None


def test_hidden_and_other_files_are_passed_over(tmp_path: Path) -> None:
    for name in (".DS_Store", ".hidden.txt", ".git/note.txt", "a/.cache/x.png", "notes.md", "table.csv"):
        put(tmp_path / name, "x")
    put(tmp_path / "a" / "b.txt", "prompt")
    assert [item.id for item in folder.read(tmp_path)] == ["a/b.txt"]


def test_a_hidden_parent_is_no_reason(tmp_path: Path) -> None:
    put(tmp_path / ".home" / "data" / "a.txt", "prompt")
    assert len(folder.read(tmp_path / ".home" / "data")) == 1


def test_sidecar_belongs_to_its_own_folder(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "x.png")
    put(tmp_path / "b" / "x.txt", "prompt")
    assert [(item.id, item.prompt) for item in folder.read(tmp_path)] == [("a/x.png", folder.QUESTION), ("b/x.txt", "prompt")]


def test_two_pictures_of_one_name_share_the_question(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    picture(tmp_path / "x.bmp")
    put(tmp_path / "x.txt", "Which?")
    assert [(item.id, item.prompt) for item in folder.read(tmp_path)] == [("x.bmp", "Which?"), ("x.png", "Which?")]


def test_empty_sidecar_is_no_question(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    put(tmp_path / "x.txt", "\n")
    (item,) = folder.read(tmp_path)
    assert item.prompt == "" and item.modality == "image"


def test_bom_and_unicode(tmp_path: Path) -> None:
    put(tmp_path / "ü 1.txt", "\ufeffein Käse 🧀\r\n")
    (item,) = folder.read(tmp_path)
    assert item.prompt == "ein Käse 🧀" and item.id == "ü 1.txt"


def test_empty_prompt_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", " \n")
    with pytest.raises(ValueError, match=r"a\.txt is empty; write a prompt"):
        folder.read(tmp_path)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "Käse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text .* at byte 1"):
        folder.read(tmp_path)


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    try:
        put(Path(os.fsdecode(os.fsencode(tmp_path) + b"/k\xe4se.txt")), "prompt")
    except OSError:
        pytest.skip("this file system keeps names in Unicode")
    with pytest.raises(ValueError, match="is not UTF-8; rename it"):
        folder.read(tmp_path)


def test_folder_with_nothing(tmp_path: Path) -> None:
    put(tmp_path / "notes.md", "x")
    with pytest.raises(ValueError, match="holds neither pictures nor recordings nor prompts; put pictures"):
        folder.read(tmp_path)
    put(tmp_path / "sub" / "mine.jsonl", "{}")
    with pytest.raises(ValueError, match=r"give .*sub/mine\.jsonl itself"):
        folder.read(tmp_path)


def test_no_such_path_and_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone does not exist"):
        folder.read(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"a\.csv is neither a folder nor a \.jsonl file"):
        folder.read(put(tmp_path / "a.csv", "x"))


# JSONL


def test_jsonl(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "mine.jsonl",
        {"prompt": " a red square "},
        {"id": "x", "category": "c", "prompt": "q", "image": "pictures/a.png", "answer": [1, 2], "labels": None},
        {"id": 7, "image": "/abs/b.png", "category": None},
        {"prompt": "", "image": "c.png"},
        {"audio": "sounds/a.wav", "speaker": "me"},
        {"audio": "/abs/b.flac", "prompt": ""},
    )
    assert folder.read(path) == [
        Item("000001", folder.CATEGORY, " a red square "),
        Item("x", "c", "q", tmp_path / "pictures" / "a.png", {"answer": [1, 2], "labels": None}),
        Item("7", folder.CATEGORY, folder.QUESTION, Path("/abs/b.png")),
        Item("000004", folder.CATEGORY, "", tmp_path / "c.png"),
        Item("000005", folder.CATEGORY, folder.REQUEST, labels={"speaker": "me"}, audio=tmp_path / "sounds" / "a.wav"),
        Item("000006", folder.CATEGORY, "", audio=Path("/abs/b.flac")),
    ]


def test_jsonl_is_read_as_written_by_others(tmp_path: Path) -> None:
    """A mark at the beginning, Windows line ends, blank lines, no end of line; U+2028 ends no line."""
    path = put(tmp_path / "a.JSONL", '\ufeff{"prompt": "one"}\r\n\r\n  \n{"prompt": "t\u2028wo"}')
    assert [(item.id, item.prompt) for item in folder.read(path)] == [("000001", "one"), ("000004", "t\u2028wo")]


def test_missing_or_broken_image_is_not_refused(tmp_path: Path) -> None:
    put(tmp_path / "empty.png")
    path = jsonl(tmp_path / "a.jsonl", {"image": "empty.png"}, {"image": "gone.png"})
    for item in folder.read(path):
        assert len(item.digest()) == 64
        with pytest.raises(ValueError, match=r"cannot be read|does not exist"):
            item.picture()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prompt: a red square", "not JSON .*write one object a line"),
        ('{"prompt": "a"', "not JSON"),
        ('{"prompt": "a"} {"prompt": "b"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["a"]', "not a JSON object"),
        ('"a"', "not a JSON object"),
        ("null", "not a JSON object"),
        ("{}", "no `prompt`, no `image` and no `audio`"),
        ('{"prompt": ""}', "no `prompt`, no `image` and no `audio`"),
        ('{"prompt": " \\t", "image": null}', "no `prompt`, no `image` and no `audio`"),
        ('{"prompt": "", "image": ""}', "no `prompt`, no `image` and no `audio`"),
        ('{"text": "a"}', "no `prompt`, no `image` and no `audio`"),
        ('{"prompt": "", "audio": ""}', "no `prompt`, no `image` and no `audio`"),
        ('{"image": "a.png", "audio": "a.wav"}', "both `image` and `audio`; give one of them"),
        ('{"prompt": 3}', "`prompt` must be text, got 3"),
        ('{"audio": 3}', "`audio` must be text, got 3"),
        ('{"image": ["a.png"]}', "`image` must be text"),
        ('{"prompt": "a", "category": 1}', "`category` must be text, got 1"),
        ('{"prompt": "a", "category": ""}', "`category` is empty"),
        ('{"prompt": "a", "id": ""}', "`id` must be text or a whole number"),
        ('{"prompt": "a", "id": true}', "`id` must be text or a whole number, got True"),
        ('{"prompt": "a", "id": 1.5}', "`id` must be text or a whole number, got 1.5"),
        ('{"prompt": "a\\ud800"}', "`prompt` holds half of a surrogate pair"),
    ],
)
def test_malformed_line(tmp_path: Path, line: str, message: str) -> None:
    path = put(tmp_path / "a.jsonl", f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3: {message}"):
        folder.read(path)


def test_line_that_is_not_utf8(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", b'{"prompt": "fine"}\n{"prompt": "K\xe4se"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON"):
        folder.read(path)


def test_id_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 3: the id 'x' is that of line 1 too"):
        folder.read(jsonl(tmp_path / "a.jsonl", {"id": "x", "prompt": "a"}, {"prompt": "b"}, {"id": "x", "prompt": "c"}))
    with pytest.raises(ValueError, match=r"line 2: the id '000002' is that of line 1 too"):
        folder.read(jsonl(tmp_path / "b.jsonl", {"id": "000002", "prompt": "a"}, {"prompt": "b"}))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_file_with_nothing(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match="holds no items; write one JSON object a line"):
        folder.read(put(tmp_path / "a.jsonl", content))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_any_prompt_survives(tmp_path_factory: pytest.TempPathFactory, prompts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    for ascii_only in (True, False):
        text = "\n".join(json.dumps({"prompt": prompt}, ensure_ascii=ascii_only) for prompt in prompts)
        path.write_text(text, encoding="utf-8", newline="\n")
        assert [item.prompt for item in folder.read(path)] == prompts
