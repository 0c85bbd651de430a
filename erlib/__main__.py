"""The command line: `python -m erlib run params/default.yml`, `report`, `results`, `extract`, `serve`."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from erlib.chain import runner
from erlib.chain.manifest import ROOT, RunError

if TYPE_CHECKING:
    from erlib.serving import bulk

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@app.callback()
def main() -> None:
    """From noisy documents to a small model that extracts what a client needs."""


@app.command()
def run(
    params: Annotated[Path, typer.Argument(help="params file; the run is named after it", dir_okay=False)],
    first: Annotated[
        str | None, typer.Option("--from", help="start at this phase (05, 05_annotation or round-2/05)")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="run this phase alone, in every round or in one (07, round-2/07)")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="say what would run, and why")] = False,
    force: Annotated[bool, typer.Option(help="run also what is complete")] = False,
    past_gates: Annotated[
        bool, typer.Option("--past-gates", help="go on after a failed gate; it stays failed")
    ] = False,
    notebooks: Annotated[Path, typer.Option(help="folder of the phase notebooks")] = ROOT / "notebooks",
    runs: Annotated[Path, typer.Option(help="folder that holds the run's folder")] = ROOT / "runs",
) -> None:
    """Run the notebooks in order; skip what is complete, go on after an interruption.

    Exit status: 0 all done, 1 a phase ended with an error, 2 a mistake in the params or options, 3 a gate failed,
    4 waiting for people, 130 interrupted.
    """
    try:
        status = runner.run(
            params,
            notebooks=notebooks,
            runs=runs,
            first=first,
            only=only,
            dry_run=dry_run,
            force=force,
            past_gates=past_gates,
        )
    except RunError as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(status)


Run = Annotated[Path, typer.Argument(help="a run's folder, such as runs/default", file_okay=False, exists=True)]


@app.command()
def report(
    folder: Run,
    notebooks: Annotated[Path, typer.Option(help="folder of the phase notebooks")] = ROOT / "notebooks",
) -> None:
    """Render a run's reports and index again, with the present templates and prose; runs no phase.

    Exit status: 0 all rendered, 1 a report could not be, 2 no phase there.
    """
    from erlib.chain import pages

    ended = list(pages.render_again(folder.resolve(), notebooks.resolve()))
    for phase, rendered in ended:
        if not rendered:
            typer.secho(f"{phase}: its executed notebook is lost or of another result; run the phase again", err=True)
    if not ended:
        typer.secho(f"{folder}: no phase with a manifest", fg="red", err=True)
        raise typer.Exit(2)
    typer.echo(folder / "index.html")
    raise typer.Exit(0 if all(rendered for _, rendered in ended) else 1)


@app.command()
def results(
    folders: Annotated[
        list[Path], typer.Argument(help="folders of runs, such as runs/default", file_okay=False, exists=True)
    ],
    out: Annotated[
        Path | None, typer.Option(help="Markdown file to write; default: the screen", dir_okay=False)
    ] = None,
) -> None:
    """Write a run's results as Markdown tables, from its manifests alone; of several runs, such as seeds, side by side.

    Exit status: 0 written, 2 no phase there.
    """
    from erlib.chain import results
    from erlib.chain.manifest import write_text

    try:
        found = [folder.resolve() for folder in folders]
        text = results.markdown(found[0]) if len(found) == 1 else results.comparison(found)
    except RunError as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(2) from None
    if out is None:
        typer.echo(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)


@app.command()
def extract(
    documents: Annotated[Path, typer.Argument(help="JSONL, CSV or Parquet with a text column", dir_okay=False)],
    reports: Annotated[Path, typer.Argument(help="JSONL to write or to go on with", dir_okay=False)],
    model: Annotated[Path, typer.Option(help="exported model, such as runs/default/model")],
    engine: Annotated[str, typer.Option(help="transformers, nf4, openvino, openvino-bf16, vllm, or the fastest")] = "",
    rejects: Annotated[Path | None, typer.Option(help="JSONL of bad rows; default: beside the reports")] = None,
    brief: Annotated[Path | None, typer.Option(help="brief.yml: lists types that it does not name as defects")] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes that share the cores; each opens the model")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="documents at once in each process")] = 32,
    block: Annotated[int, typer.Option(min=1, help="documents between two writes to the disk")] = 256,
    text_column: Annotated[str, typer.Option(help="column of the texts")] = "text",
    id_column: Annotated[str, typer.Option(help="column of the ids")] = "id",
    max_chars: Annotated[int, typer.Option(help="longer texts are rejected")] = 1_000_000,
) -> None:
    """Extract a report from every document, in input order; the same command goes on after a kill.

    Exit status: 0 all done, 2 a mistake in files or options, 130 interrupted.
    """
    from erlib.documents import files
    from erlib.serving import bulk

    try:
        if not engine:
            from erlib.serving import engines

            engine = engines.fastest(model)
        with _bar(bulk.count_rows(documents)) as progress:
            bulk.extract(
                documents,
                reports,
                model=model,
                work=bulk.Work(engine, workers, batch_size, block),
                rejects=rejects or reports.with_name(f"{reports.stem}.rejects.jsonl"),
                columns=bulk.Columns(text_column, id_column, max_chars),
                brief=files.read_brief(brief) if brief else None,
                progress=progress,
            )
    except (OSError, ValueError, ModuleNotFoundError, RuntimeError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.secho(f"stopped; what is done is in {reports}, and the same command goes on", fg="yellow", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _bar(total: int) -> "Iterator[Callable[[bulk.Done], None]]":
    """A live line with rows, documents an hour and the time left; a plain line at the end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    began, console = time.monotonic(), Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("rows", total=total, rate="opening the model")
        last: list[bulk.Done] = []

        interrupted: list[int] = []

        def interrupt(*_: object) -> None:
            interrupted.append(1)
            raise KeyboardInterrupt

        def show(done: "bulk.Done") -> None:
            if interrupted:  # Python drops the exception where it meets a destructor or a callback of a library
                raise KeyboardInterrupt
            rate = (done.reports + done.rejects) / (time.monotonic() - began) * 3600
            bar.update(task, completed=done.row, rate=f"{rate:,.0f} documents an hour")
            last[:] = [done]

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield show
        finally:
            signal.signal(signal.SIGINT, before)
    done = last[0] if last else None
    console.print(
        f"{done.reports:,} reports and {done.rejects:,} rejects in {time.monotonic() - began:,.0f} s, "
        f"{done.reports / (time.monotonic() - began) * 3600:,.0f} documents an hour"
        if done
        else "nothing was left to do"
    )


@app.command()
def serve(
    model: Annotated[Path, typer.Option(help="exported model, such as runs/default/model", file_okay=False)],
    port: Annotated[int, typer.Option(help="port on the loopback interface")] = 8000,
) -> None:
    """Offer an exported model as an OpenAI-compatible endpoint on loopback: POST /v1/completions, streaming too.

    The server is transformers' own. A request names the model's folder as `model` (GET /v1/models has it) and sends
    `prompt`, the document in the prompt of erlib.json, with `temperature` 0 and `max_tokens`.
    """
    from erlib.serving import export, server

    try:
        settings = export.read_settings(model)
        export.require_server()
        typer.secho(f"model {model}, prompt {settings.prompt!r}, max_tokens {settings.max_new_tokens}", err=True)
        server.serve(model, port)
    except (OSError, ModuleNotFoundError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
