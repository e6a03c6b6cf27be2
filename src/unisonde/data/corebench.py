"""T2I-CoReBench: 1,080 text prompts in twelve dimensions, read from the files as published.

The benchmark (Li et al., arXiv 2509.03516) asks for pictures that need composition or reasoning. It comes as twelve JSON files
of 90 prompts, one a dimension; its files are not part of this package. A folder with some of the twelve is read as well.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from unisonde.data.item import Item

REPOSITORY = "KwaiVGI/T2I-CoReBench"
VARIABLE = "UNISONDE_COREBENCH"
"""Environment variable that names the folder with the twelve files."""
NEARBY = Path("../shared/data/t2i-corebench")
"""Where the files are looked for if nothing names their folder, relative to the current directory."""

DIMENSIONS: dict[str, str] = {
    "C-MI": "composition",
    "C-MA": "composition",
    "C-MR": "composition",
    "C-TR": "composition",
    "R-LR": "deductive",
    "R-BR": "deductive",
    "R-HR": "deductive",
    "R-PR": "deductive",
    "R-GR": "inductive",
    "R-AR": "inductive",
    "R-CR": "abductive",
    "R-RR": "abductive",
}
"""Category of each dimension, in the order in which the benchmark groups them. A file is named after its dimension."""


def read(folder: Path | str | None = None) -> list[Item]:
    """The prompts of the benchmark, by dimension in the published order, then in the order of the file.

    Labels of an item: `dimension` (`C-MI`, ...), `main_class`, `sub_class`, `checklist` (a tuple of questions about the picture,
    each with its `question` and `tags`) and `remark` (who drafted the prompt).

    Args:
        folder: where the files are; by default, see `find`.

    Raises:
        ValueError: the files are not found, or one is malformed.
    """
    items: dict[str, Item] = {}
    for path in find(folder):
        for item in _read_file(path):
            if item.id in items:
                first = items[item.id].labels["dimension"]
                raise ValueError(f"{path}: entry {item.id} is already in {first}.json; get the files anew from {REPOSITORY}")
            items[item.id] = item
    return list(items.values())


def find(folder: Path | str | None = None) -> list[Path]:
    """The benchmark's files in `folder`, else in the folder that `UNISONDE_COREBENCH` names, else in `NEARBY`; at least one.

    Raises:
        ValueError: there are none.
    """
    variable = os.environ.get(VARIABLE)
    place = Path(folder or variable or NEARBY).expanduser()
    paths = [path for name in DIMENSIONS if (path := place / f"{name}.json").is_file()]
    if paths:
        return paths
    if folder is None and not variable:
        raise ValueError(
            f"the files of T2I-CoReBench are not part of unisonde: get the public repository {REPOSITORY} and set the environment"
            f" variable {VARIABLE} to its folder data/, which holds C-MI.json to R-RR.json"
        )
    named = f" (named by {VARIABLE})" if folder is None else ""
    state = "holds none of" if place.is_dir() else "is not a folder with"
    raise ValueError(f"{place}{named} {state} the files C-MI.json to R-RR.json of T2I-CoReBench; get them from {REPOSITORY}")


def _read_file(path: Path) -> list[Item]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not a JSON file ({error}); get it anew from {REPOSITORY}") from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path} must hold a JSON object of entries, not {_kind(entries)}; get it anew from {REPOSITORY}")
    return [_read_entry(path, name, entry) for name, entry in entries.items()]


def _read_entry(path: Path, name: str, entry: Any) -> Item:
    def wrong(what: str) -> ValueError:
        return ValueError(f"{path}, entry {name}: {what}; get the file anew from {REPOSITORY}")

    def text(key: str) -> str:
        if not isinstance(value := entry.get(key), str):
            raise wrong(f"`{key}` must be text, not {_kind(value)}")
        return value

    if not isinstance(entry, dict):
        raise wrong(f"must be an object, not {_kind(entry)}")
    prompt = text("Prompt")
    if not prompt.strip():
        raise wrong("`Prompt` is empty")
    checklist = entry.get("Checklist")
    if not isinstance(checklist, list):
        raise wrong(f"`Checklist` must be a list, not {_kind(checklist)}")
    for number, check in enumerate(checklist, start=1):
        if not isinstance(check, dict) or not isinstance(check.get("question"), str) or not isinstance(check.get("tags"), list):
            raise wrong(f"number {number} of `Checklist` must be an object with a `question` and a list of `tags`")
    return Item(
        id=name,
        category=DIMENSIONS[path.stem],
        prompt=prompt,
        labels={
            "dimension": path.stem,
            "main_class": text("Main Class"),
            "sub_class": text("Sub Class"),
            "checklist": tuple(checklist),
            "remark": text("Remark"),
        },
    )


def _kind(value: Any) -> str:
    """What a JSON value is, in the words of JSON."""
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (dict, list)):
        kind = "object" if isinstance(value, dict) else "list"
        return f"an empty {kind}" if not value else f"a{'n' if kind == 'object' else ''} {kind}"
    return "text" if isinstance(value, str) else "a number"
