"""`luvc-fx eval`: accuracy against budget on a local model and local questions."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from luvc_fx.apps.evaluation.markdown import LEGEND, markdown, marks
from luvc_fx.apps.evaluation.methods import SEEDS
from luvc_fx.apps.evaluation.methods import methods as known_methods
from luvc_fx.apps.evaluation.options import BUDGETS, Options
from luvc_fx.apps.evaluation.plot import draw
from luvc_fx.apps.evaluation.questions import ALL_TASKS
from luvc_fx.apps.evaluation.result import CellResult, EvalResult
from luvc_fx.apps.evaluation.run import Watch, run
from luvc_fx.cli import most
from luvc_fx.cli.commands.demo import Inner
from luvc_fx.cli.output import make_console, make_table, note
from luvc_fx.methods.checks import shown
from luvc_fx.report.errors import InputError

NAMES = ", ".join(known_methods())
COLUMNS = ",".join(f"{budget:g}" for budget in BUDGETS)


def evaluate(
    model: Annotated[Path, typer.Option(metavar="DIR", help="A directory that from_pretrained can load.")],
    questions: Annotated[
        Path,
        typer.Option(metavar="FILE", help="JSONL: image or video, question, answer, task, scene, split."),
    ],
    methods: Annotated[
        str, typer.Option(metavar="A,B,..", help=f"Methods to compare, of {NAMES}. Default: all.")
    ] = "",
    budgets: Annotated[
        str,
        typer.Option(metavar="X,Y,..", help="Share of visual tokens entering a layer, averaged over layers."),
    ] = COLUMNS,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE[:SELECTOR]",
            help="Also ask under this preset or JSON file; a SELECTOR picks the tokens in its place.",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only questions of this split.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=most.ANY, help="At most this many questions.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=most.RUNS, help="Questions at once.")] = 25,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=most.TOKENS, help="Longest answer in tokens. Default: the generation config's."
        ),
    ] = None,
    inner: Annotated[Inner, typer.Option(help="What runs the rewritten graphs.")] = Inner.EAGER,
    wrong_image: Annotated[
        bool, typer.Option("--wrong-image", help="Also ask each question about another scene's image.")
    ] = False,
    time: Annotated[
        int,
        typer.Option(
            min=0, max=most.RUNS, metavar="N", help="Time N prefills of each row, compiled by Inductor."
        ),
    ] = 0,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=most.ANY,
            help=f"Seed of the bootstrap, and the first of {SEEDS} seeds of random selectors.",
        ),
    ] = 0,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for answers, results.json, RESULTS.md and pareto.png.")
    ] = Path("luvc-eval"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
) -> None:
    """Ask a model the same questions with fewer and fewer visual tokens, method by method.

    Answers are kept in --out: a run that was stopped continues there, and a changed one asks only what
    is new. An answer is right if it is the expected text, apart from case and outer spaces.
    """
    options = Options(
        model=model,
        questions=questions,
        out=out,
        methods=tuple(_parts("methods", methods)) if methods else (),
        budgets=_numbers(budgets),
        schedules=tuple(schedule or ()),
        split=split,
        limit=limit,
        batch=batch,
        new_tokens=max_new_tokens,
        inner=inner.value,
        wrong_image=wrong_image,
        rounds=time,
        seed=seed,
    )
    # Nothing but the result may reach stdout, whatever a library prints.
    with contextlib.redirect_stdout(sys.stderr), _progress() as watch:
        result = run(options, note, watch)
    _write(result, out)
    if as_json:
        print(result.to_json())
    else:
        show(result, make_console())
        note(f"results.json, RESULTS.md, pareto.png and answers.jsonl are in {out}")


def _parts(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InputError(f"--{option} is {text!r}; allowed: values with commas between them")
    return parts


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _parts("budgets", text))
    except InputError:
        raise
    except ValueError:
        raise InputError(
            f"--budgets is {shown(text)}; allowed: numbers in (0, 1] with commas between them"
        ) from None


@contextlib.contextmanager
def _progress() -> Iterator[Watch]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks = {}

        def watch(title: str, done: int, total: int) -> None:
            if title not in tasks:
                tasks[title] = bar.add_task(title, total=total)
                if bar.disable:
                    note(f"{title}: {total} questions")
            bar.update(tasks[title], completed=done)

        yield watch


def _write(result: EvalResult, out: Path) -> None:
    try:
        (out / "results.json").write_text(result.to_json() + "\n", encoding="utf-8")
        (out / "RESULTS.md").write_text(markdown(result), encoding="utf-8")
    except OSError as error:
        raise InputError(f"results cannot be written to '{out}': {error.strerror}") from None
    try:
        draw(result, out / "pareto.png")
    except InputError as error:  # the numbers are there
        note(str(error))


def show(result: EvalResult, console: Console) -> None:
    """Print a result as a table."""
    score = result.rows[0].scores[ALL_TASKS]
    console.print(
        f"unpruned: {score.accuracy:.1%} of {score.questions:,} questions about {score.scenes:,} scenes"
    )
    if result.wrong_image:
        wrong = result.wrong_image[ALL_TASKS]
        console.print(
            f"wrong images: {wrong.accuracy:.1%} of {wrong.questions:,} questions; right ones: "
            f"{wrong.right_image:.1%}"
        )
    table = make_table("method", "budget", "accuracy", "of unpruned", "95 %", "agree", right=True)
    for row in result.rows:
        table.add_row(*_cells(row))
    console.print(table)
    console.print(LEGEND)
    for row in result.rows:
        if row.cell.reason:
            console.print(f"no answers from {row.cell.name}: {row.cell.reason}")


def _cells(row: CellResult) -> list[str]:
    asked = row.cell.budget
    if not row.scores or row.measured is None:
        return [row.cell.method, "" if asked is None else f"{asked:.3f}", "n/a", "", "", ""]
    score = row.scores[ALL_TASKS]
    interval = score.retention_interval
    return [
        row.cell.method,
        f"{row.measured:.3f}",
        f"{score.accuracy:.1%}",
        "-" if score.retention is None else f"{score.retention:.1%}{marks(score)}",
        "-" if interval is None else f"{interval[0]:.1%} - {interval[1]:.1%}",
        f"{score.agreement:.1%}",
    ]
