"""The command line: one thin command a verb. What a command does stands in the room that it calls."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="unisonde",
    help="Look inside unified multimodal models: how they encode text and images, how they answer in text and in images, layer by layer.",
    epilog="Start with `unisonde models` and `unisonde data`, then `unisonde probe twin/janus-pro --data tabletop --task text image "
    "--out runs/first --limit 50` and `unisonde report runs/first -o report.html`. Errors are one sentence; --debug, anywhere on the "
    "line, shows where they came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

out = Console()
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Models = Annotated[list[str], typer.Argument(help="Names of models; `unisonde models` lists them.", show_default=False)]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")]


@app.command()
def probe(
    models: Models,
    data: Annotated[str, typer.Option(help="A name (`unisonde data`), a folder, or a .jsonl file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The run folder.", show_default=False)],
    task: Annotated[list[str], typer.Option(help="text, image, or both: --task text image.")] = ["text"],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many items a task, evenly over categories.")] = None,
    protocol: Annotated[str, typer.Option(help="The numeric choices, by name.")] = "default",
    spans: Annotated[str, typer.Option(help="content, or all: count template positions in.")] = "content",
    step: Annotated[str, typer.Option(help="Of models that sample in many passes: final, clean or all.")] = "final",
    stack: Annotated[
        list[str] | None, typer.Option(help="Of models that have several, the stacks that are read; all if not given.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of a text response; as published if not given.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy; as published if not given.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Classifier-free guidance; as published if not given.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps of flow, diffusion and masked models.")] = None,
    seed: Seed = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Items that share a batch; 8 if not given.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut prompts that are too long, and flag them.")] = False,
    keep_states: Annotated[bool, typer.Option("--keep-states", help="Also store the hidden states (safetensors).")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Measure items that failed in an earlier session again.")] = False,
    engine: Annotated[str, typer.Option(help="Where the work is done: local.")] = "local",
) -> None:
    """The main job: let models respond to items, and measure prompt and response at every layer.

    Run again with the same --out, it goes on where it was: after Ctrl-C, a kill, or a full disk.
    """
    from unisonde.models.trace import Reading
    from unisonde.runs import probe as run_probe

    run = run_probe(
        models,
        data,
        task,  # type: ignore[arg-type]
        out,
        limit=limit,
        protocol=protocol,
        reading=Reading(spans, step, tuple(stack) if stack else None),  # type: ignore[arg-type]
        generation={"tokens": tokens, "temperature": temperature, "guidance": guidance, "steps": steps},
        seed=seed,
        batch_size=batch_size,
        truncate=truncate,
        keep_states=keep_states,
        retry=retry,
        engine=engine,  # type: ignore[arg-type]
    )
    items = run.items()
    failed = items.filter(items["error"].is_not_null())
    err.print(
        f"{len(items) - len(failed)} items measured into {out}; `unisonde report {out} -o report.html` shows them", highlight=False
    )
    if len(failed):
        first = failed.row(0, named=True)
        err.print(
            f"{len(failed)} items failed, the first: {first['error']}",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if len(failed) == len(items):
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, and folders of `unisonde decode`.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
    figures: Annotated[bool, typer.Option(help="Also write every figure as PDF and PNG, beside the report.")] = True,
) -> None:
    """The report of one or several runs: one HTML file that needs no network."""
    from unisonde.report import write_report

    err.print(f"wrote {write_report(runs, output, figures=figures)}", highlight=False, soft_wrap=True)


@app.command()
def models(as_json: AsJson = False) -> None:
    """The models that can be probed by name."""
    from unisonde.models.registry import GENERAL, MODELS

    rows = [
        {"name": m.name, "family": m.family, "tasks": list(m.tasks), "licence": m.licence, "summary": m.summary}
        for m in MODELS.values()
    ]
    show(rows, as_json, f"and {GENERAL}ORG/NAME or {GENERAL}FOLDER: any transformers causal language or image-text-to-text model")


@app.command()
def data(as_json: AsJson = False) -> None:
    """The data sets that models can be probed on."""
    from unisonde.data import DATA

    rows = [
        {"name": d.name, "tasks": list(d.tasks), "splits": list(d.splits), "licence": d.licence, "summary": d.summary}
        for d in DATA.values()
    ]
    show(rows, as_json, "and your own: a folder of prompts and pictures, or a .jsonl file with `prompt` and `image`")


@app.command()
def entropy(
    file: Annotated[Path, typer.Argument(help="States: .npy, .npz or .safetensors; arrays (n, d), or (layers, n, d).")],
    response: Annotated[Path | None, typer.Option(help="States of the response, for the conditional entropy.")] = None,
    protocol: Annotated[str, typer.Option(help="The numeric choices, by name.")] = "default",
    as_json: AsJson = False,
) -> None:
    """The numbers of saved states: entropy, and with --response the conditional entropy."""
    from unisonde.measure import layer_estimates, named
    from unisonde.study.saved import read_states, response_of

    chosen = named(protocol)
    prompts = read_states(file)
    responses = read_states(response) if response else {}
    rows = []
    for name, states in prompts.items():
        given = response_of(name, prompts, responses) if response else None
        for quantity, estimate in layer_estimates(states, given, chosen).items():
            figures = {"value": estimate.value, "ceiling": estimate.ceiling, "stderr": estimate.stderr, "units": estimate.units}
            rows.append({"states": name, "quantity": quantity, "n": estimate.n} | figures)
    show(rows, as_json, f"protocol {protocol}, {chosen.digest()}")


@app.command()
def calibrate(as_json: AsJson = False) -> None:
    """The instrument's self-test: every measure against closed forms. Exit code 1 if one of them fails."""
    from unisonde.measure.calibrate import checks

    lines = checks()
    rows = [
        {
            "check": line.name,
            "expected": line.expected,
            "measured": line.measured,
            "difference": line.difference,
            "tolerance": line.tolerance,
            "ok": line.ok,
            "source": line.source,
        }
        for line in lines
    ]
    failed = sum(not line.ok for line in lines)
    show(rows, as_json, f"{len(lines)} checks, {failed} failed")
    if failed:
        raise typer.Exit(1)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder of parity fixtures.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Our models against recorded outputs of the official code. Exit code 1 if a number differs, or is not compared."""
    from unisonde.study.parity import verify as check

    verdicts = check(folder)
    rows = [
        {
            "family": v.name,
            "arrays": v.arrays,
            "inputs": v.inputs,
            "compared": v.compared,
            "not compared": list(v.left),
            "wrong": [f"{d.name} ({d.largest:.2g})" for d in v.wrong],
            "largest difference": v.largest,
            "error": v.error,
            "ok": v.ok,
        }
        for v in verdicts
    ]
    show(rows, as_json, f"{sum(v.ok for v in verdicts)} of {len(verdicts)} families agree")
    if not all(v.ok for v in verdicts):
        raise typer.Exit(1)


@app.command()
def decode(
    experiment: Annotated[str, typer.Argument(help="probes, directions, ablate, gmi, bound or lora.", show_default=False)],
    model: Annotated[
        str, typer.Argument(help="A model of encoder, adapter and decoder, such as speech-smollm.", show_default=False)
    ],
    data: Annotated[
        str, typer.Option(help="Labelled items: a name (`unisonde data`), a folder, or a .jsonl file.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The folder of the experiments of this model and data.", show_default=False)],
    attribute: Annotated[list[str], typer.Option(help="Labels that are read: --attribute speaker digit.")] = [],  # noqa: B006
    group: Annotated[
        list[str], typer.Option(help="The label by which items are kept together, or one each: emotion=speaker speaker=sentence.")
    ] = [],  # noqa: B006
    response: Annotated[
        str | None, typer.Option(help="The label that holds what the model should say (ablate), or is the control (lora).")
    ] = None,
    texts: Annotated[str, typer.Option(help="Data whose prompts are the texts (directions, ablate).")] = "prompts",
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many items, evenly over categories.")] = None,
    folds: Annotated[int, typer.Option(min=2, help="Of the held-out splits.")] = 5,
    draws: Annotated[int, typer.Option(min=0, help="Random spans (ablate).")] = 10,
    retry: Annotated[bool, typer.Option(help="Take items that failed in an earlier call again.")] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Mismatched decoding: what the decoder of a model can use of what its encoder gives it.

    Run again with the same --out, it goes on where it was. The table is written to OUT/EXPERIMENT.parquet, the figure to
    OUT/EXPERIMENT.pdf and .png; `unisonde report OUT` shows all experiments of a folder.
    """
    from unisonde.data import Item, evenly, open_data
    from unisonde.models import load
    from unisonde.report.decoding import draw
    from unisonde.study.decoding.experiments import decode as run_experiment
    from unisonde.study.decoding.experiments import grouping

    source = open_data(data)
    items = evenly(source.items("text", seed=seed), limit)
    words = [Item(i.id, i.category, i.prompt) for i in open_data(texts).items("text", seed=seed) if i.modality == "text"]
    given: dict[str, Any] = {"attributes": tuple(attribute), "group": grouping(group, attribute), "response": response}
    given |= {"folds": folds, "draws": draws, "seed": seed, "retry": retry}
    found = run_experiment(experiment, load(model), {"items": items, "texts": words, "out": out, "name": source.title} | given)
    if failed := max((finding.used.get("failed", 0) for finding in found), default=0):
        note = f"{failed} of the {len(items)} items could not be taken and are left out; --retry takes them again"
        err.print(note, style="yellow", highlight=False, soft_wrap=True)
    try:
        figure = f", the figure {draw(out, experiment)[0]}"
    except ImportError as error:  # the table stands, and the figure can be had later
        figure = f"; for its figure, {error}"
    if as_json:
        print(json.dumps([finding.sentence for finding in found], indent=1, ensure_ascii=False))
    else:
        print(*(finding.sentence for finding in found), f"The table is {out / experiment}.parquet{figure}.", sep="\n")


@app.command()
def train(
    twin: Annotated[
        str,
        typer.Argument(
            help="What to make: janus-pro, speech-smollm, vision-smollm-aligned or vision-smollm-masked.", show_default=False
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The folder to write; twins/NAME if not given.")] = None,
    seed: Seed = 0,
    precision: Annotated[
        str, typer.Option(help="auto, bf16 or fp32; auto takes bf16 where the processor multiplies in it.")
    ] = "auto",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the last stage; the recipe's if not given.")] = None,
    code_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the first stage (image tokenizer, spelling, or encoder); the recipe's if not given."),
    ] = None,
) -> None:
    """Train a small model that ships with the package. Killed, it goes on where it was when it is called again."""
    from unisonde.train import train_twin

    folder = train_twin(twin, out, seed=seed, precision=precision, steps=steps, code_steps=code_steps)
    err.print(f"wrote {folder}; probe or score it by that name", highlight=False, soft_wrap=True)


@app.command()
def score(
    models: Models,
    split: Annotated[list[str], typer.Option(help="test, compositional or train.")] = ["test", "compositional"],  # noqa: B006
    items: Annotated[int, typer.Option(min=1, help="Items a row of the table.")] = 200,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Judge models on Tabletop, exactly: shares right with 95% intervals and chance levels."""
    from unisonde.data.tabletop.scene import SPLITS
    from unisonde.models import load
    from unisonde.study.score import scores

    wrong = [s for s in split if s not in SPLITS]
    if wrong:
        raise ValueError(f"Tabletop has no split {wrong[0]!r}; there are {', '.join(SPLITS)}")
    table = scores([load(name) for name in models], split, items, seed)  # type: ignore[arg-type]
    show(table.to_dicts(), as_json, "low, high: 95% Wilson interval; chance: a uniform guess")


def show(rows: list[dict[str, Any]], as_json: bool, note: str = "") -> None:
    """Rows as a table on the terminal, or as JSON."""
    if as_json:
        print(json.dumps(rows, indent=1, default=str))
        return
    table = Table(*(rows[0] if rows else ()), caption=note, caption_justify="left", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    # A pipe gets whole lines, whatever its width.
    (out if out.is_terminal else Console(width=240)).print(table, markup=False)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def main(arguments: list[str] | None = None) -> int:
    """The entry point: runs a command and turns what went wrong into one sentence and an exit code.

    0 done, 1 something asked for cannot be done, 2 the line cannot be understood, 130 stopped by hand.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or bool(os.environ.get("UNISONDE_DEBUG"))
    given = spread([a for a in given if a != "--debug"])
    if not debug:  # what transformers says of itself while it loads is of no use here
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(given, standalone_mode=False) or 0
        return _stopped() if code == STOPPED else code
    except (KeyboardInterrupt, typer.Abort):
        return _stopped()
    except Exception as error:
        if debug:
            raise
        if hasattr(error, "format_message"):  # the line itself was wrong; click knows what to say
            error.show()  # type: ignore[attr-defined]
            return 2
        if not isinstance(error, (ValueError, OSError, ImportError, ArithmeticError)):
            err.print(
                f"unexpected {type(error).__name__}: {error} (run with --debug to see where)",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            return 1
        err.print(f"error: {_sentence(error)}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1


def _sentence(error: Exception) -> str:
    """What went wrong, without the number that the system gives it."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error)


def _stopped() -> int:
    err.print("stopped; the same command goes on where it was", highlight=False, soft_wrap=True)
    return STOPPED


STOPPED = 130
LISTS = ("--task", "--split", "--stack", "--attribute", "--group")
"""Options that take several values after one name: `--task text image`."""


def spread(arguments: list[str]) -> list[str]:
    """`--task text image` as `--task text --task image`, which is what the parser understands."""
    result: list[str] = []
    option, values = "", 0
    for argument in arguments:
        if argument.startswith("-"):
            option, values = argument if argument in LISTS else "", 0
        elif option:
            if values:
                result.append(option)
            values += 1
        result.append(argument)
    return result


def entry() -> None:
    """What the installed command `unisonde` calls."""
    sys.exit(main())
