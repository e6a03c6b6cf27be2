"""What can be probed: the data sets by name, and the user's own by path.

One table, `DATA`, is the source of every name. A reader is imported when its items are asked for, so that listing costs nothing.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from unisonde.data.item import TASKS, Item, Task


@dataclass(frozen=True)
class DataSet:
    """A data set, not yet read.

    Attributes:
        name: what `open_data` takes; measurements carry it.
        summary: what it holds, in a line.
        tasks: what its items can ask of a model.
        licence: whose it is and on what terms, in a line.
        loader: `module:function`, called with what applies: `task` and `seed` if the data set is drawn, `split` if it has splits, before
            them the path if it has one.
        splits: the names of its parts, the default one first; empty if it has none.
        split: the part that the name asked for (`tabletop:compositional`), if it did.
        path: where the user's own data is, or the files of a data set that is not part of the package.
        drawn: whether its items are drawn, task by task and from a seed, and not read.
        placed: whether the folder of its files may stand in the name (`fsdd:recordings/fsdd`).
    """

    name: str
    summary: str
    tasks: tuple[Task, ...]
    licence: str
    loader: str
    splits: tuple[str, ...] = ()
    split: str | None = None
    path: Path | None = None
    drawn: bool = False
    placed: bool = False

    @property
    def title(self) -> str:
        """The name, without the folder of files that are not part of the package: `fsdd` of `fsdd:recordings/fsdd`."""
        return self.name.partition(":")[0] if self.placed and self.path is not None else self.name

    def items(self, task: Task, split: str | None = None, seed: int = 0) -> list[Item]:
        """The items that suit a task: all for `text`; for `image`, those whose prompt is text alone.

        Args:
            split: one of `splits`; by default the one in the name, else the first.
            seed: of data sets that are drawn; it does nothing to those that are read.

        Raises:
            ValueError: an unknown task or split, no suitable item, or whatever the reader finds wrong.
        """
        if task not in TASKS:
            raise ValueError(f"the task must be one of {', '.join(TASKS)}, got {task!r}")
        if task not in self.tasks:
            raise ValueError(f"{self.name} has no items for task {task!r}, only for {', '.join(self.tasks)}")
        if split is not None:
            _check_split(self, split)
        options: dict[str, Any] = {"task": task, "seed": seed} if self.drawn else {}
        if self.splits:
            options["split"] = split or self.split or self.splits[0]
        found = self._load()(*([] if self.path is None else [self.path]), **options)
        suitable = [item for item in found if task == "text" or item.modality == "text"]
        if not suitable:
            kinds = " or ".join(sorted({f"an {item.modality} prompt" for item in found}, reverse=True))
            raise ValueError(f"all {len(found)} items of {self.name} have {kinds}; task 'image' needs text prompts")
        return suitable

    def _load(self) -> Callable[..., list[Item]]:
        module, _, function = self.loader.partition(":")
        return getattr(import_module(module), function)


DATA: dict[str, DataSet] = {
    data.name: data
    for data in (
        DataSet(
            name="tabletop",
            summary="rendered scenes of coloured shapes, described, asked about and judged exactly",
            tasks=("text", "image"),
            licence="drawn by unisonde, under its licence",
            loader="unisonde.data.tabletop:items",
            splits=("test", "train", "compositional"),
            drawn=True,
        ),
        DataSet(
            name="textured",
            summary="pictures of shapes that are alike, plain, striped, dotted or checked, with every attribute as a label",
            tasks=("text",),
            licence="drawn by unisonde, under its licence",
            loader="unisonde.data.tabletop.textured:items",
            splits=("test", "train"),
            drawn=True,
        ),
        DataSet(
            name="t2i-corebench",
            summary="1,080 prompts that ask for composition and reasoning, in twelve dimensions",
            tasks=("text", "image"),
            licence="Apache-2.0, KwaiVGI/T2I-CoReBench (arXiv 2509.03516); not part of the package",
            loader="unisonde.data.corebench:read",
            placed=True,
        ),
        DataSet(
            name="prompts",
            summary="64 everyday prompts: composition, deductive, inductive and abductive",
            tasks=("text", "image"),
            licence="written for unisonde, under its licence",
            loader="unisonde.data.prompts:read",
        ),
        DataSet(
            name="fsdd",
            summary="spoken English digits of six speakers",
            tasks=("text",),
            licence="CC BY-SA 4.0, Free Spoken Digit Dataset; not part of the package",
            loader="unisonde.data.speech:fsdd",
            splits=("all", "test", "train"),
            placed=True,
        ),
        DataSet(
            name="emodb",
            summary="ten German sentences, acted by ten speakers in several emotions",
            tasks=("text",),
            licence="free for research, Emo-DB (Burkhardt et al., Interspeech 2005); not part of the package",
            loader="unisonde.data.speech:emodb",
            placed=True,
        ),
        DataSet(
            name="spoken",
            summary="short English sentences spoken by espeak-ng in many voices",
            tasks=("text",),
            licence="written for unisonde and synthesised by espeak-ng, under its licence",
            loader="unisonde.data.spoken:items",
            splits=("test", "train"),
            drawn=True,
        ),
    )
}
"""Every data set that has a name."""


def open_data(name_or_path: str | Path) -> DataSet:
    """The data set of a name in `DATA`, or of a path.

    Behind a colon the name may say a split (`tabletop:compositional`) or, if the data set is read from files that are not part of the
    package, their folder (`fsdd:recordings/fsdd`; a split goes before a folder of that name). A path is a `.jsonl` file or a folder
    (`unisonde.data.folder`), or a folder with the files of T2I-CoReBench. A name goes before a path: write `./prompts` for a folder
    called `prompts`. `open_data(data.name)` opens the same data again.

    Raises:
        ValueError: neither a name nor a path, or a split that the data set has not got.
    """
    if isinstance(name_or_path, str):
        name, colon, which = name_or_path.partition(":")
        if name in DATA:
            data = DATA[name]
            if not colon:
                return data
            if data.placed and which not in data.splits:
                return replace(data, name=name_or_path, path=_folder(data, which))
            _check_split(data, which)
            return replace(data, name=name_or_path, split=which)
    path = Path(name_or_path).expanduser()
    if not str(name_or_path).strip() or not path.exists():
        raise ValueError(_unknown(str(name_or_path)))
    return _open_path(path, str(name_or_path))


def _open_path(path: Path, given: str) -> DataSet:
    from unisonde.data.corebench import DIMENSIONS

    if path.is_file() and path.suffix.lower() != ".jsonl":
        raise ValueError(
            f"{path} is neither a folder nor a .jsonl file; put the prompts, one JSON object a line, into a .jsonl file"
        )
    name = f"./{given}" if given.partition(":")[0] in DATA else given
    if any((path / f"{dimension}.json").is_file() for dimension in DIMENSIONS):
        return replace(DATA["t2i-corebench"], name=name, path=path)
    return DataSet(
        name=name,
        summary="your own prompts, pictures and recordings",
        tasks=TASKS,
        licence="your own",
        loader="unisonde.data.folder:read",
        path=path,
    )


def _folder(data: DataSet, given: str) -> Path:
    folder = Path(given).expanduser()
    if not given.strip() or not folder.is_dir():
        splits = f" a split of {data.name} ({', '.join(data.splits)}) nor" if data.splits else ""
        raise ValueError(f"{given!r} is {'neither' if splits else 'not'}{splits} a folder; give {data.name}:FOLDER with its files")
    return folder


def _check_split(data: DataSet, split: str) -> None:
    if not data.splits:
        raise ValueError(f"{data.name} has no splits, got {split!r}; leave it out")
    if split not in data.splits:
        raise ValueError(f"{data.name} has no split {split!r}; it has {', '.join(data.splits)}")


def _unknown(given: str) -> str:
    near = difflib.get_close_matches(given.partition(":")[0].lower(), DATA, n=2, cutoff=0.5)
    known = f"the nearest name is {' or '.join(near)}" if near else f"the names are {', '.join(DATA)}"
    return f"no data set and no path is called {given!r}: {known}; for your own data give the path of a folder or a .jsonl file"


def data_digest(items: Iterable[Item]) -> str:
    """sha256 over the items' digests in their order: equal for two runs that show a model the same input."""
    digests = hashlib.sha256()
    for item in items:
        digests.update(item.digest().encode())
    return digests.hexdigest()
