"""`unisonde.probe`: the main job, from names to a run folder."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from unisonde.data import DataSet, Item, Task, data_digest, evenly, open_data
from unisonde.measure import Protocol, named
from unisonde.models.base import Generation, Model
from unisonde.models.registry import load
from unisonde.models.trace import Reading
from unisonde.runs.local import measure_locally
from unisonde.runs.run import Run
from unisonde.runs.work import Chunk, Settings, chunks_of

BATCH_SIZE = 8
"""Items that share a batch. Rows depend on it by rounding only; it is recorded."""

ENGINES = ("local",)


def probe(
    models: Model | str | Sequence[Model | str],
    data: DataSet | str | Path | Sequence[Item],
    task: Task | Sequence[Task] = ("text",),
    out: Path | str = "runs/probe",
    *,
    limit: int | None = None,
    protocol: Protocol | str = "default",
    reading: Reading | None = None,
    generation: dict[str, Any] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    truncate: bool = False,
    keep_states: bool = False,
    retry: bool = False,
    engine: Literal["local"] = "local",
    progress: bool = True,
) -> Run:
    """Ask models for responses to items and measure prompt and response at every layer; go on where an earlier call stopped.

    Args:
        models: loaded models or names (`unisonde models` lists them), one or several. A model takes part in the tasks that it can do.
        data: a name (`unisonde data`), a folder or .jsonl file, a `DataSet`, or items.
        task: `text`, `image` or both.
        out: the run folder. A run that is there and asked for the same is gone on with; any other is refused.
        limit: at most this many items a task, evenly over categories.
        protocol: the numeric choices, or the name of some.
        generation: sampling settings in place of the published ones: tokens, temperature, guidance, steps. A setting applies to the
            tasks that have it.
        batch_size: items that share a batch; 8 if None.
        truncate: cut prompts that are longer than a model's text window, and flag them; otherwise they fail.
        keep_states: also store the states themselves (safetensors).
        retry: measure the items that failed in an earlier session again.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: something asked for does not exist or does not fit; one sentence.
        OSError: the folder cannot be written.
        KeyboardInterrupt: stopped by hand; the run can be gone on with.
    """
    wanted = [models] if isinstance(models, (Model, str)) else list(models)
    tasks = tuple(dict.fromkeys([task] if isinstance(task, str) else task))
    if not wanted or not tasks:
        raise ValueError("name at least one model and one task")
    if engine not in ENGINES:
        raise ValueError(f"the engine is one of {', '.join(ENGINES)}; got {engine!r}")
    batch_size = BATCH_SIZE if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    protocol_name = protocol if isinstance(protocol, str) else "custom"
    protocol = named(protocol) if isinstance(protocol, str) else protocol
    reading = reading or Reading()
    source, items = _items(data, tasks, limit, seed)

    loaded: dict[int, Model] = {}

    def model_of(number: int) -> Model:
        if number not in loaded:
            loaded.clear()
            given = wanted[number]
            loaded[number] = given if isinstance(given, Model) else load(given)
        return loaded[number]

    # Every model is opened once to know what it is before anything is measured; the first stays loaded for its chunks.
    identities: list[dict[str, Any]] = []
    settings_of: dict[str, Any] = {}
    names_of: dict[str, set[str]] = {}
    chunks: list[Chunk] = []
    for number in reversed(range(len(wanted))):
        model = model_of(number)
        identities.insert(0, model.identity())
        reading.check(model.name, model.stacks)
        own = [t for t in tasks if t in model.tasks]
        if not own:
            model.check_task(tasks[0])
        generations = {t: _settings(model, t, generation or {}) for t in own}
        names_of[model.name] = {name for t in model.tasks for name, v in model.defaults(t).to_dict().items() if v is not None}
        settings_of[model.name] = {t: g.to_dict() | {"digest": g.digest()} for t, g in generations.items()}
        chunks = [c for t in own for c in chunks_of(number, t, items[t], generations[t], batch_size)] + chunks
    _check_used(generation or {}, names_of)
    names = [identity["name"] for identity in identities]
    if len(set(names)) != len(names):
        raise ValueError(f"a model is named twice: {', '.join(names)}")

    identity = {
        "models": identities,
        "data": source | {"items": {t: len(items[t]) for t in tasks}, "digest": {t: data_digest(items[t]) for t in tasks}},
        "tasks": list(tasks),
        "limit": limit,
        "protocol": {"name": protocol_name, "digest": protocol.digest()} | protocol.to_dict(),
        "reading": reading.to_dict() | {"digest": reading.digest()},
        "generation": dict(reversed(settings_of.items())),
        "seed": seed,
        "batch_size": batch_size,
        "truncate": truncate,
        "keep_states": keep_states,
    }
    run = Run.begin(out, identity, session(loaded[0].device))
    with run.lock():
        if retry:
            run.drop_failures()
        settings = Settings(run.id, source["name"], protocol, reading, seed, truncate, keep_states)
        _measure(run, chunks, model_of, settings, progress)
    return run


def _measure(run: Run, chunks: list[Chunk], model_of: Any, settings: Settings, progress: bool) -> None:
    left = [chunk for chunk in chunks if not run.has(chunk.name)]
    total = sum(len(chunk.items) for chunk in chunks)
    done = total - sum(len(chunk.items) for chunk in left)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} items/s"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    began, fresh, failed = time.monotonic(), 0, 0
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bars:
        bar = bars.add_task("probing", total=total, completed=done, rate="-", note="")
        for chunk, part in measure_locally(left, model_of, settings):
            run.add(chunk.name, part)
            fresh += len(chunk.items)
            failed += part.failed
            rate = f"{fresh / (time.monotonic() - began):.2g}"
            bars.update(bar, advance=len(chunk.items), rate=rate, note=f"{failed} failed" if failed else "")


def _items(
    data: DataSet | str | Path | Sequence[Item], tasks: Sequence[Task], limit: int | None, seed: int
) -> tuple[dict[str, Any], dict[Task, list[Item]]]:
    """What the data set says of itself, and its items a task."""
    if isinstance(data, (str, Path)):
        data = open_data(data)
    if isinstance(data, DataSet):
        source = {"name": data.name, "summary": data.summary, "licence": data.licence}
        items = {task: evenly(data.items(task, seed=seed), limit) for task in tasks}
    else:
        source = {"name": "items", "summary": "items given in Python", "licence": ""}
        items = {t: evenly([i for i in data if t == "text" or i.modality == "text"], limit) for t in tasks}
    for task, found in items.items():
        if not found:
            raise ValueError(f"{source['name']} has no items for the task {task!r}")
        ids = [item.id for item in found]
        if len(set(ids)) != len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(f"two items of {source['name']} have the id {twice!r}; give each its own")
    return source, items


def _settings(model: Model, task: Task, overrides: dict[str, Any]) -> Generation:
    """The published settings with those overrides that this task has."""
    published = model.settings(task)
    unknown = set(overrides) - set(published.to_dict())
    if unknown:
        raise ValueError(f"no sampling setting is called {', '.join(sorted(unknown))}; there are {', '.join(published.to_dict())}")
    fitting = {name: value for name, value in overrides.items() if value is not None and getattr(published, name) is not None}
    return replace(published, **fitting)


def _check_used(overrides: dict[str, Any], names_of: dict[str, set[str]]) -> None:
    """Refuse a sampling setting that no model of this run has for any task: it would be ignored without a word."""
    for name, value in overrides.items():
        if value is not None and not any(name in names for names in names_of.values()):
            raise ValueError(f"none of {', '.join(names_of)} has the sampling setting {name}; leave it out")


def session(device: torch.device) -> dict[str, Any]:
    """Who asks, when, with what: nothing here decides whether two runs are the same."""
    versions = {"python": platform.python_version()}
    for package in ("unisonde", "torch", "transformers", "numpy", "polars"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
