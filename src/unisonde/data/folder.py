"""The user's own prompts, pictures and recordings: a folder of files, or one JSONL file.

A folder gives an item for each picture or recording and for each text file that belongs to none. A JSONL file gives an item a line
and can say more: ids, categories, labels. Pictures and recordings are not opened here, so that a broken one costs one item and not
the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from unisonde.data.item import Item
from unisonde.data.sound import RECORDINGS, REQUEST

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
QUESTION = "Describe this image."
"""What is asked about a picture that comes without a question."""
CATEGORY = "all"
"""The category of items that name none."""


def read(path: Path | str) -> list[Item]:
    """The items of a `.jsonl` file (`read_jsonl`) or of a folder (`read_folder`).

    Raises:
        ValueError: there is no such file or folder, it holds no items, or something in it is malformed.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return read_folder(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a folder or a .jsonl file")
    if path.suffix.lower() != ".jsonl":
        raise ValueError(
            f"{path} is neither a folder nor a .jsonl file; put the prompts, one JSON object a line, into a .jsonl file"
        )
    return read_jsonl(path)


def read_folder(folder: Path) -> list[Item]:
    """The pictures, recordings and prompts of a folder and its subfolders, sorted by their path in the folder, which is their id.

    A picture NAME.png is asked the question in NAME.txt, or `QUESTION`; a recording NAME.wav likewise, or `REQUEST`; an empty NAME.txt
    means no question. A text file without either is one prompt. The category is the subfolder's path. Hidden files and folders, and
    other files, are passed over.

    Raises:
        ValueError: a prompt is empty or not UTF-8, or the folder holds no items.
    """
    found = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    files = sorted((path for path in found if not any(part.startswith(".") for part in path.parts)), key=PurePosixPath)
    for path in files:
        if not _encodable(str(path)):
            raise ValueError(f"the name of the file {str(path)!r} in {folder} is not UTF-8; rename it")
    texts = {path.with_suffix(""): folder / path for path in files if path.suffix.lower() == ".txt"}
    asked = {path.with_suffix("") for path in files if path.suffix.lower() in (*PICTURES, *RECORDINGS)}
    items = []
    for path in files:
        stem, suffix = path.with_suffix(""), path.suffix.lower()
        category = CATEGORY if len(path.parts) == 1 else path.parent.as_posix()
        if suffix in PICTURES:
            question = _read_text(texts[stem]) if stem in texts else QUESTION
            items.append(Item(path.as_posix(), category, question, folder / path))
        elif suffix in RECORDINGS:
            request = _read_text(texts[stem]) if stem in texts else REQUEST
            items.append(Item(path.as_posix(), category, request, audio=folder / path))
        elif suffix == ".txt" and stem not in asked:
            prompt = _read_text(folder / path)
            if not prompt:
                raise ValueError(f"{folder / path} is empty; write a prompt into it, or remove it")
            items.append(Item(path.as_posix(), category, prompt))
    if not items:
        listed = next((path for path in files if path.suffix.lower() == ".jsonl"), None)
        kinds = f"pictures ({' '.join(PICTURES)}), recordings ({' '.join(RECORDINGS)}) or prompts (.txt)"
        advice = f"give {folder / listed} itself" if listed else f"put {kinds} into it"
        raise ValueError(f"the folder {folder} holds neither pictures nor recordings nor prompts; {advice}")
    return items


def read_jsonl(path: Path) -> list[Item]:
    """The items of a JSONL file, in its order: one object a line, blank lines passed over.

    Keys: `prompt` (text), `image` or `audio` (a path, relative to the file), at least one of them and not both of the last; `id` (text
    or a whole number; by default the number of the line, as six digits); `category` (text). Any other key is a label. An image
    without a `prompt` is asked `QUESTION`, a recording `REQUEST`; with an empty one, nothing.

    Raises:
        ValueError: a line is malformed, an id occurs twice, or there are no items; with the number of the line.
    """
    items: list[Item] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        item = _read_line(path, number, line)
        if item.id in lines:
            raise ValueError(f"{path}, line {number}: the id {item.id!r} is that of line {lines[item.id]} too; give each its own")
        lines[item.id] = number
        items.append(item)
    if not items:
        raise ValueError(f'{path} holds no items; write one JSON object a line, such as {{"prompt": "a red square"}}')
    return items


def _read_line(path: Path, number: int, line: bytes) -> Item:
    def wrong(what: str) -> ValueError:
        return ValueError(f"{path}, line {number}: {what}")

    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise wrong(f'not JSON ({error}); write one object a line, such as {{"prompt": "a red square"}}') from error
    if not isinstance(entry, dict):
        raise wrong('not a JSON object; write one object a line, such as {"prompt": "a red square"}')
    prompt, image, audio = (_text(entry, key, wrong) for key in ("prompt", "image", "audio"))
    category = _text(entry, "category", wrong)
    id = entry.pop("id", None)
    if isinstance(id, int) and not isinstance(id, bool):
        id = str(id)
    if not image and not audio and not (prompt and prompt.strip()):
        raise wrong("no `prompt`, no `image` and no `audio`; give at least one of them")
    if image and audio:
        raise wrong("both `image` and `audio`; give one of them, and the other in a line of its own")
    if id is not None and (not isinstance(id, str) or not id.strip()):
        raise wrong(f"`id` must be text or a whole number, got {id!r}; leave it out to use the number of the line")
    if category is not None and not category.strip():
        raise wrong("`category` is empty; leave it out if there is none")
    for key, text in {"prompt": prompt, "image": image, "audio": audio, "category": category, "id": id}.items():
        if text and not _encodable(text):
            raise wrong(f"`{key}` holds half of a surrogate pair, which is no character; write the character itself")
    return Item(
        id=id or f"{number:06d}",
        category=category or CATEGORY,
        prompt=(REQUEST if audio else QUESTION) if prompt is None else prompt,
        image=path.parent / image if image else None,
        labels=entry,
        audio=path.parent / audio if audio else None,
    )


def _text(entry: dict[str, Any], key: str, wrong: Callable[[str], ValueError]) -> str | None:
    """Takes a value of text out of an entry; None if it is absent or null."""
    value = entry.pop(key, None)
    if value is not None and not isinstance(value, str):
        raise wrong(f"`{key}` must be text, got {value!r}")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
