"""Plans a run: params file and notebooks → the phases with all their parameters, and why each would have to run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from erlib import report
from erlib.manifest import (
    MANIFEST,
    ROOT,
    RunError,
    checked,
    closest,
    damaged,
    dependencies,
    parameters,
    read_manifest,
    shown,
)

# Its product, the embedded base model, ships with the package; training it again takes far longer than all the rest.
SKIPPED = ["00_base_model"]


class Job(NamedTuple):
    """One phase of a run: its notebook, all its parameter values, and those that differ from the notebook's."""

    name: str
    notebook: Path
    out: Path
    values: dict[str, Any]
    given: dict[str, Any]
    upstream: list[str]

    @property
    def executed(self) -> Path:
        """Where papermill writes the executed notebook."""
        return self.out.with_name(f"{self.name}.ipynb")

    @property
    def html(self) -> Path:
        """Where the report lies."""
        return self.out.with_name(f"{self.name}.html")


# -- params files -------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise RunError(f"line {key_node.start_mark.line + 1}: `{key}` is written twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_params(path: Path) -> dict[str, Any]:
    """Read a params file: `skip`, `all` and one section per notebook."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RunError) as error:
        raise RunError(f"{path}: {error}") from None
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise RunError(f"{path}: expected sections (`all:`, `01_prompts:`, ...), got {type(found).__name__}")
    return {section: {} if content is None else content for section, content in found.items()}


def discover(notebooks: Path) -> dict[str, dict[str, Any]]:
    """Find the phases `NN_name.ipynb` of a folder, by number: name → the parameters' defaults."""
    names = sorted(path.stem for path in notebooks.glob("*.ipynb") if re.match(r"\d\d_", path.stem))
    if not names:
        raise RunError(f"{notebooks}: no notebook named like 01_prompts.ipynb")
    return {name: parameters(notebooks / f"{name}.ipynb") for name in names}


def check_params(path: Path, phases: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Check a params file against the notebooks' parameters cells; give what it sets for each phase, typed.

    Raises RunError naming file, section and key for an unknown section or key and for a value of the wrong type.
    """
    sections = read_params(path)
    sections.pop("skip", None)
    given: dict[str, dict[str, Any]] = {name: {} for name in phases}
    for section, content in sorted(sections.items(), key=lambda item: item[0] != "all"):  # `all` first, then overridden
        if section != "all" and section not in phases:
            raise RunError(f"{path}: unknown section `{section}`; {closest(str(section), ['all', 'skip', *phases])}")
        if not isinstance(content, dict):
            raise RunError(f"{path}: section `{section}`: expected `name: value` lines, got {content!r}")
        targets = list(phases) if section == "all" else [section]
        for key, value in content.items():
            _refuse_key(f"{path}: section `{section}`", key, {name for target in targets for name in phases[target]})
            for target in targets:
                if key in phases[target]:
                    given[target][key] = _typed(f"{path}: section `{section}`", key, value, phases[target][key])
    return given


def _refuse_key(where: str, key: Any, known: set[str]) -> None:
    if key == "out":
        raise RunError(f"{where}: `out` is set by the runner; remove it")
    if key not in known:
        raise RunError(f"{where}: unknown key `{key}`; {closest(str(key), sorted(known))}")


def _typed(where: str, key: str, value: Any, default: Any) -> Any:
    try:
        return checked(value, default)
    except TypeError as error:
        raise RunError(f"{where}: key `{key}`: {error}") from None


def skipped(path: Path, phases: Sequence[str]) -> list[str]:
    """Read the phases that a params file holds back (`skip`)."""
    skip = read_params(path).get("skip", [name for name in SKIPPED if name in phases])
    for name in skip if isinstance(skip, list) else [skip]:
        if name not in phases:
            raise RunError(f"{path}: `skip`: no notebook `{name}`; {closest(str(name), phases)}")
    return skip


def plan(params: Path, notebooks: Path, folder: Path) -> list[Job]:
    """Lay out every phase of a run in `folder`, with all its parameters; see `check_params` for what is refused."""
    phases = discover(notebooks)
    jobs = []
    for name, given in check_params(params, phases).items():
        folders = {key: other for key in phases[name] for other in phases if key == f"{other[3:]}_dir" and other < name}
        filled = {key: other for key, other in folders.items() if phases[name][key] and key not in given}
        given = given | {key: shown(folder / other) for key, other in filled.items()} | {"out": shown(folder / name)}
        upstream = sorted(filled.values())
        jobs.append(Job(name, notebooks / f"{name}.ipynb", folder / name, phases[name] | given, given, upstream))
    return jobs


def select(jobs: list[Job], *, skip: list[str], first: str | None, only: str | None) -> list[Job]:
    """Choose phases by number or name: from `first` on, or `only` one, which `skip` does not hold back."""
    if only:
        return [_find(jobs, only)]
    start = jobs.index(_find(jobs, first)) if first else 0
    return [job for job in jobs[start:] if job.name not in skip]


def _find(jobs: list[Job], wanted: str) -> Job:
    for job in jobs:
        if wanted == job.name or (wanted.isdigit() and int(wanted) == int(job.name[:2])):
            return job
    raise RunError(f"no phase `{wanted}`; {closest(wanted, [job.name for job in jobs])}")


# -- what has to run ----------------------------------------------------------------------------------------------


def reason(job: Job, *, past_gates: bool = False) -> str | None:
    """Say why a phase has to run; None when its result has its present key, intact outputs and a report.

    A result whose gate failed runs again, unless the run goes `past_gates`.
    """
    manifest = read_manifest(job.out)
    if manifest is None:
        return "not run yet" if not job.out.exists() else "was interrupted"
    if manifest["status"] != "done" and not (past_gates and manifest["status"] == "failed_gate"):
        return f"ended with {manifest['status'].replace('_', ' ')} last time"
    present = dependencies(job.notebook, job.values)
    if present["key"] != manifest["key"]:
        return _difference(manifest, present)
    if trouble := damaged(job.out, manifest):
        return trouble
    return None if report.is_current(job.html, job.out) or _is_whole(job) else "its report is lost"


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name the first dependency that differs."""
    for part in ("params", "inputs", "source", "versions"):
        for name in sorted(old[part].keys() | new[part].keys()):
            before, after = old[part].get(name), new[part].get(name)
            if before != after:
                change = f": {before!r} → {after!r}" if part in ("params", "versions") else ""
                word = {"params": "parameter", "inputs": "input", "source": "erlib source", "versions": "version"}[part]
                return f"{word} {name} changed{change}"
    return "the notebook changed"


def refuse_missing(jobs: list[Job]) -> None:
    """Raise RunError where a phase reads a folder that is not complete and intact, and no phase before it makes it."""
    made: set[Path] = set()
    for job in jobs:
        for key, value in job.values.items():
            if not key.endswith("_dir") or not value or ROOT / value in made:
                continue
            manifest = read_manifest(value)
            if manifest is None or manifest["status"] not in ("done", "failed_gate"):
                raise RunError(f"{job.name} reads `{key}` = {value}, which is not complete: run that phase first")
            if trouble := damaged(ROOT / value, manifest):
                raise RunError(f"{job.name} reads `{key}` = {value}: {trouble}: run that phase again")
        made.add(job.out)


def _is_whole(job: Job) -> bool:
    """Tell whether the executed notebook is of the present manifest, and not cut off by a kill while it was written."""
    import nbformat

    try:
        newer = job.executed.stat().st_mtime >= (job.out / MANIFEST).stat().st_mtime
        cells = nbformat.read(job.executed, as_version=4).cells
    except (OSError, ValueError, AttributeError):
        return False
    status = {cell.metadata.get("papermill", {}).get("status") for cell in cells if cell.cell_type == "code"}
    return newer and status == {"completed"}
