"""The command line: `python -m erlib run params/default.yml`."""

from pathlib import Path
from typing import Annotated

import typer

from erlib import runner
from erlib.manifest import ROOT, RunError

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


if __name__ == "__main__":
    app()
