"""Runs the notebooks in order: executes each with papermill, renders its report, stops at a gate, a pause or an error.

Whatever is killed when, the next run goes on: a phase without a manifest for its present key, or with a changed output,
runs again, and nothing else does. `plan` decides what runs, `run` is the notebook's side.
"""

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.live import Live
from rich.text import Text

from erlib.chain import pages, tables
from erlib.chain.manifest import ROOT, RunError, dependencies, read_manifest, shown, write_manifest
from erlib.chain.plan import Job, plan, reason, refuse_missing, select, skipped
from erlib.chain.run import commit, environment

EXIT = {"done": 0, "error": 1, "failed_gate": 3, "paused": 4}
STYLES = {"done": "green", "skipped": "dim", "failed_gate": "bold red", "error": "bold red", "paused": "yellow"}


# -- executing ----------------------------------------------------------------------------------------------------


def command(job: Job) -> str:
    """Write the plain papermill command that does the same as the runner, to be called in the repository root."""
    values = yaml.safe_dump(job.given, default_flow_style=True, width=10**6, allow_unicode=True).strip()
    program = Path(sys.executable).with_name("papermill")
    paths = [_literal(shown(job.notebook)), _literal(shown(job.executed))]
    words = [shown(program), *paths, "--cwd", shown(job.notebook.parent)]
    return f"mkdir -p {shlex.quote(shown(job.out.parent))} && {shlex.join([*words, '-k', 'python3', '-y', values])}"


def _literal(path: str) -> str:
    """A path as papermill takes it, which fills parameters into its braces."""
    return path.replace("{", "{{").replace("}", "}}")


_LONGEST_SOCKET = 107  # bytes of a Unix socket's path
_SOCKET_NAME = "/tmpxxxxxxxx/kernel-12345"  # what stands below the folder for temporary files, at its longest


def _folder_for_sockets() -> str:
    """Where the kernel's sockets lie: the folder for temporary files, unless its path is too long for a socket's."""
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):  # noqa: S108 - a new folder is made in it
        if len(os.fsencode(folder + _SOCKET_NAME)) <= _LONGEST_SOCKET and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise RunError(f"TMPDIR = {tempfile.gettempdir()} is too long for the kernel's sockets: set it to a shorter path")


def execute(job: Job) -> dict[str, Any]:
    """Run one phase's notebook in a fresh kernel, render its report, and give its manifest, also of an error."""
    import papermill
    from traitlets.config import Config

    began, problem = time.monotonic(), "the notebook ended without phase.finish"
    job.out.parent.mkdir(parents=True, exist_ok=True)
    for earlier in (job.html, job.executed):
        earlier.unlink(missing_ok=True)
    os.environ.update(environment(allow_download=job.values.get("allow_download", False)))
    try:
        with tempfile.TemporaryDirectory(
            dir=_folder_for_sockets()
        ) as sockets:  # a killed kernel would leave them beside the notebooks
            papermill.execute_notebook(
                _literal(str(job.notebook.resolve())),
                _literal(str(job.executed.resolve())),
                parameters=job.given,
                kernel_name="python3",
                cwd=job.notebook.parent.resolve(),
                progress_bar=False,
                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
            )
        failed = False
    except Exception as error:  # whatever a notebook or its kernel does, the run ends with a manifest and a report
        failed = True
        name, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
        problem = f"{name}: {text.strip()}"
    manifest = read_manifest(job.out)
    if manifest is None or (failed and manifest["status"] != "paused"):
        manifest = _write_error(job, problem, time.monotonic() - began)
    if not job.executed.is_file():  # nothing came so far as to be written: the report has the error above the source
        shutil.copyfile(job.notebook, job.executed)
    pages.render(job.executed, job.out, job.html, source=job.notebook)
    return manifest


def _write_error(job: Job, problem: str, seconds: float) -> dict[str, Any]:
    manifest = {
        "phase": job.name,
        "status": "error",
        "simulated": False,
        "note": problem,
        "verdict": [],
        "metrics": {},
        "seconds": round(seconds, 2),
        "peak_rss_mb": None,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": "unknown",
        "seed": job.values["seed"],
        "outputs": {},
        **dependencies(job.notebook, job.values),
    }
    if job.out.exists():
        shutil.rmtree(job.out)  # outputs of an earlier result, which this error has replaced
    job.out.mkdir(parents=True)
    write_manifest(job.out, manifest)
    return manifest


# -- showing ------------------------------------------------------------------------------------------------------


def _line(label: str, status: str, detail: str) -> Text:
    text = Text(f"{label:<25}")
    return text.append(f"{status.replace('_', ' '):<12}", style=STYLES.get(status, "bold")).append(detail)


@contextmanager
def _progress(console: Console, job: Job, expected: float | None) -> Iterator[None]:
    """Keep one live line with seconds and, when the last run's time is known, what is left of it."""
    began = time.monotonic()

    def line() -> Text:
        seconds = time.monotonic() - began
        left = f", about {expected - seconds:.0f} s left" if expected and expected > seconds else ""
        return _line(job.label, "running", f"{seconds:7.0f} s{left}")

    with Live(get_renderable=line, console=console, refresh_per_second=2, transient=True):
        yield


def _verdict(manifest: Mapping[str, Any]) -> str:
    rows = manifest["verdict"]
    named = [_worded(row) for outcome in ("missed", "undecided") for row in rows if row["outcome"] == outcome]
    return "; ".join(
        [f"{manifest['seconds']:7.1f} s   {tables.tally(rows)}", *named, *filter(None, [manifest["note"]])]
    )


def _worded(row: Mapping[str, Any]) -> str:
    within = f", {tables.interval(row)}" if tables.interval(row) else ""
    value = tables.number(row["value"], row["check"])
    return f"{tables.outcome(row)}: {row['check']} = {value}{within} (target {row['target']})"


def _closing(jobs: Sequence[Job]) -> str:
    """Count the outcomes of all phases, and name the undecided ones: they stop no run, and nobody should miss them."""
    found = [(job, row) for job in jobs for row in (read_manifest(job.out) or {}).get("verdict", [])]
    undecided = [f"{job.label}: {row['check']}" for job, row in found if row["outcome"] == "undecided"]
    return "; ".join([f"targets: {tables.tally([row for _, row in found])}", *undecided])


# -- the run ------------------------------------------------------------------------------------------------------


def run(
    params: Path,
    *,
    notebooks: Path = ROOT / "notebooks",
    runs: Path = ROOT / "runs",
    first: str | None = None,
    only: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    past_gates: bool = False,
    console: Console | None = None,
) -> int:
    """Execute the phases of `params` into `runs/<its name>`; gives an exit status (`EXIT`).

    Raises RunError, before anything runs, for a params file that does not fit the notebooks or for missing inputs.
    """
    console = console or Console(highlight=False)
    folder = runs.resolve() / params.stem
    jobs = plan(params, notebooks.resolve(), folder)
    chosen = select(jobs, skip=skipped(params, [job.name for job in jobs]), first=first, only=only)
    refuse_missing(chosen)
    for job in _read_as_they_are(jobs, chosen):
        console.print(
            f"{job.label} is read as it is, and would run again: {reason(job, past_gates=True)}", style="yellow"
        )
    if dry_run:
        _dry_run(chosen, force, past_gates, console)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            status = _run_all(chosen, folder, force, past_gates, console)
            index = pages.write_index(folder)
    except Timeout:
        raise RunError(f"another run is at work in {shown(folder)}: wait for it or stop it") from None
    console.print(Text(_closing(chosen)), Text(shown(index)), sep="\n", soft_wrap=True)
    return EXIT[status]


def _read_as_they_are(jobs: Sequence[Job], chosen: Sequence[Job]) -> list[Job]:
    """The phases that the chosen ones read, that do not run now, and that are no longer up to date."""
    running = {job.label for job in chosen}
    read = {label for job in chosen for label in job.upstream} - running
    return [job for job in jobs if job.label in read and reason(job, past_gates=True)]


def _dry_run(jobs: list[Job], force: bool, past_gates: bool, console: Console) -> None:
    running: set[str] = set()
    for job in jobs:
        before = next((label for label in job.upstream if label in running), None)
        why = "forced" if force else reason(job, past_gates=past_gates)
        why = why or (f"{before} runs before it" if before else None)
        if why:
            running.add(job.label)
        console.print(_line(job.label, "would run" if why else "skipped", why or "same key, outputs intact"))
        if why:
            console.print(Text(command(job), style="dim"), soft_wrap=True)


def _run_all(jobs: list[Job], folder: Path, force: bool, past_gates: bool, console: Console) -> str:
    """Run the phases in order until one does not end `done`; gives the status that the run ends with.

    With `past_gates`, failed gates do not stop the run; they stay failed, and so does the run.
    """
    ends_with = "done"
    for job in jobs:
        why = "forced" if force else reason(job, past_gates=past_gates)
        if why is None:
            if (read_manifest(job.out) or {}).get("status") == "failed_gate":
                ends_with = "failed_gate"
            if not pages.is_current(job.html, job.out, job.notebook):
                pages.render(job.executed, job.out, job.html, source=job.notebook)
            console.print(_line(job.label, "skipped", "same key, outputs intact"))
            continue
        console.print(_line(job.label, "starts", why), Text(command(job), style="dim"), sep="\n", soft_wrap=True)
        with _progress(console, job, (read_manifest(job.out) or {}).get("seconds")):
            manifest = execute(job)
        pages.write_index(folder)
        console.print(_line(job.label, manifest["status"], _verdict(manifest)))
        if past_gates and manifest["status"] == "failed_gate":
            ends_with = "failed_gate"
        elif manifest["status"] != "done":
            console.print(f"stopped; report: {shown(job.html)}")
            return manifest["status"]
    return ends_with
