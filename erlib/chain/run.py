"""A phase as its notebook sees it: `start`, outputs, figures, checks, `finish`.

A phase writes into a temporary folder beside its own. `start` removes the old manifest first; `Phase.finish` renames
the folder and writes `manifest.json` last. So a manifest means "complete", whatever was killed when. The same calls
serve a notebook that is run by hand, by plain papermill, or by `runner`.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from erlib.chain import memory, tables
from erlib.chain.manifest import (
    MANIFEST,
    ROOT,
    ROUND,
    RunError,
    checked,
    dependencies,
    folders,
    hash_folder,
    parameters,
    read_manifest,
    shown,
    write_manifest,
)
from erlib.chain.verdict import Check, check, failed, plain

if TYPE_CHECKING:
    import logging

    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Check", "Paused", "Phase", "RunError", "check", "commit", "environment", "read_manifest", "start"]

# A killed runner's kernel notices within a second or two and exits; whoever comes next waits for it.
ORPHAN_SECONDS = 20


class Paused(Exception):  # noqa: N818 - not an error: it ends the notebook where people have to go on
    """Stops a notebook that waits for people."""

    def _render_traceback_(self) -> list[str]:
        return [f"Paused: {self}"]


def environment(*, allow_download: bool = False) -> dict[str, str]:
    """Variables that keep a kernel offline and its libraries quiet."""
    return {
        "HF_HUB_OFFLINE": "0" if allow_download else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # without it `import litellm` opens a connection
        "TOKENIZERS_PARALLELISM": "false",
        # Nothing here is compiled, and bitsandbytes would load the compiler at import: a fifth of a kernel's start.
        "TORCHDYNAMO_DISABLE": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's python3 kernel, not the user's
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "TQDM_DISABLE": "1",  # a report keeps every state of a bar
        # glibc gives large tensors back to the system at once and clears their pages anew: 8 % of PPO.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    }


def _quieten() -> None:
    """Keep out of the reports what libraries say of themselves; what a phase has to say it prints."""
    import logging
    import warnings

    for message in ("IProgress not found", ".*gradient_checkpointing. is deprecated"):
        warnings.filterwarnings("ignore", message=message)
    for name in ("bitsandbytes.backends.cpu.ops", "dspy.clients.lm"):  # no fast kernel; cut-off answers, which we count
        logging.getLogger(name).setLevel(logging.ERROR)
    # Said of every checkpoint that TRL has written, whatever is done with it.
    logging.getLogger("transformers.modeling_utils").addFilter(_says_something_new)


def _says_something_new(record: "logging.LogRecord") -> bool:
    return "`loss_type=None` was set in the config" not in record.getMessage()


def _show_numbers_plainly() -> None:
    """Displayed frames show counts as whole numbers, and small numbers as they are instead of as 0.0000."""
    import pandas as pd

    pd.set_option("display.float_format", tables.cell)


def commit() -> str | None:
    """Name the git commit, with `+` when files differ from it; None outside a repository."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _device() -> str:
    torch = sys.modules.get("torch")  # a phase that never loaded torch ran on the CPU
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores"


@dataclass
class Phase:
    """One phase at work, from `start` to `finish` or `pause`."""

    name: str
    out: Path
    params: dict[str, Any]
    simulated: bool
    _known: dict[str, Any]
    _lock: FileLock
    _began: float

    @property
    def seed(self) -> int:
        """The parameters cell's `seed`."""
        return self.params["seed"]

    @property
    def _temporary(self) -> Path:
        return self.out.with_name(f".{self.name}.tmp")

    def path(self, name: str) -> Path:
        """Give the path of an output in the temporary folder, which becomes the phase's folder at the end."""
        path = self._temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def cache(self, name: str) -> Path:
        """Give a folder that outlives kills and reruns and is in no hash; who writes there keys by content."""
        path = self.out.parent / ".cache" / self.name / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def show(self, figure: "Figure", *, alt: str) -> None:
        """Show a figure as PNG with a text for those who cannot see it, and close it."""
        import io

        import matplotlib.pyplot as plt
        from IPython.display import Image, display

        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        plt.close(figure)
        display(Image(data=buffer.getvalue(), format="png", alt=alt))

    def seconds(self) -> float:
        """Seconds since `start`."""
        return time.monotonic() - self._began

    def finish(self, checks: Sequence[Check], *, metrics: Mapping[str, float], note: str = "") -> "pd.DataFrame":
        """Complete the phase: `failed_gate` if a gate was missed, else `done`; gives the verdict as a table."""
        wrong = [name for name, value in metrics.items() if not isinstance(plain(value), int | float | None)]
        if wrong:
            raise TypeError(f"metrics are numbers, these are not: {', '.join(wrong)}")
        status = "failed_gate" if failed(checks) else "done"
        self._complete(status, checks, metrics, note)
        return tables.verdict_table(checks)

    def pause(self, *, missing: int, command: str) -> None:
        """Keep what is there, say how many judgements are missing and how to give them, and stop the notebook."""
        note = f"{missing} judgements are missing: {command}"
        self._complete("paused", [], {"missing": missing}, note)
        raise Paused(note)

    def _complete(self, status: str, checks: Sequence[Check], metrics: Mapping[str, float], note: str) -> None:
        if not self._temporary.is_dir():
            raise RunError(f"{self.name} has ended already: run the cell with run.start again, and those after it")
        manifest = {
            "phase": self.name,
            "status": status,
            "simulated": self.simulated,
            "note": note,
            "verdict": [row._asdict() for row in checks],
            "metrics": {name: plain(value) for name, value in metrics.items()},
            "seconds": round(self.seconds(), 2),
            "peak_rss_mb": round(memory.whole_peak_bytes() / 2**20, 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "device": _device(),
            "seed": self.seed,
            "outputs": hash_folder(self._temporary),
            **self._known,
        }
        if self.out.exists():
            shutil.rmtree(self.out)
        self._temporary.replace(self.out)
        write_manifest(self.out, manifest)
        self._lock.release(force=True)  # `start` may have run twice in this kernel


def _find_notebook(name: str) -> Path:
    places = [Path.cwd(), ROOT / "notebooks"]
    for place in places:
        if (place / f"{name}.ipynb").is_file():
            return place / f"{name}.ipynb"
    raise RunError(f"no notebook {name}.ipynb in {places[0]} or {places[1]}")


def _values(name: str, notebook: Path, namespace: Mapping[str, Any]) -> dict[str, Any]:
    values = {}
    for key, default in parameters(notebook).items():
        if key not in namespace:
            raise RunError(f"{name}: `{key}` is not set: run the parameters cell first, then the one with run.start")
        try:
            values[key] = checked(namespace[key], default)
        except TypeError as error:
            raise RunError(f"{name}: `{key}`: {error}") from None
    if Path(values["out"]).name != name:
        raise RunError(f"{name}: `out` must end with /{name}, because the folder is replaced; it is {values['out']!r}")
    return values


def _refuse_incomplete(name: str, values: Mapping[str, Any]) -> None:
    for key, folder in folders(values):
        status = (read_manifest(folder) or {}).get("status", "not complete")
        if status not in ("done", "failed_gate"):
            phase = Path(folder).name
            raise RunError(
                f"{name}: `{key}` = {folder!r} is {status}. Run that phase first, or point `{key}` at a complete one, "
                f"such as runs/default/{'round-1/' if phase.startswith(ROUND) else ''}{phase}"
            )


def start(name: str, namespace: Mapping[str, Any], *, simulated: bool = False) -> Phase:
    """Open a phase; `namespace` (a notebook's `globals()`) gives the values of the parameters cell's names.

    Changes the working directory to the repository root, so that relative paths mean the same however the notebook is
    run. `simulated` puts a label on everything that the phase reports.
    """
    notebook = _find_notebook(name)
    values = _values(name, notebook, namespace)
    os.chdir(ROOT)
    os.environ.update(environment(allow_download=values.get("allow_download", False)))
    _quieten()
    _show_numbers_plainly()
    _refuse_incomplete(name, values)
    known = dependencies(notebook, values)
    out = ROOT / values["out"]
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{name}.lock"), timeout=ORPHAN_SECONDS, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"{shown(out)} is in use by another kernel: end it (or shut it down in JupyterLab)") from None
    phase = Phase(name, out, values, simulated, known, lock, time.monotonic())
    (out / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(phase._temporary, ignore_errors=True)
    phase._temporary.mkdir()
    if simulated:
        from IPython.display import Markdown, display

        display(Markdown("**Embedded world:** the frontier LM and the panel in this report are *simulated*."))
    return phase
