"""Plans a run: params file and notebooks → the phases with all their parameters, and why each would have to run."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from erlib.chain import pages
from erlib.chain.manifest import (
    COMPUTING,
    ROOT,
    ROUND,
    RunError,
    checked,
    closest,
    damaged,
    dependencies,
    folders,
    parameters,
    read_manifest,
    shown,
)

# The product of 00, the embedded base model, ships with the package, and training it again takes far longer than all
# the rest; 13 compares with a trainer that lives in an environment of its own; 14 is for releases: what is looked at
# often confirms nothing.
SKIPPED = ["00_base_model", "13_benchmarks", "14_confirmation"]


class Job(NamedTuple):
    """One phase of a run: its notebook, all its parameter values, and those that differ from the notebook's.

    `label` is its folder within the run's, `02_corpus` or `round-2/05_annotation`; `upstream` holds labels.
    """

    label: str
    notebook: Path
    out: Path
    values: dict[str, Any]
    given: dict[str, Any]
    upstream: list[str]

    @property
    def name(self) -> str:
        """The notebook's name, the same in each round."""
        return self.out.name

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
    """Refuses what YAML 1.1 reads otherwise than it was meant: a key twice, 12:30 and 017 as numbers, .nan and .inf."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise RunError(f"line {key_node.start_mark.line + 1}: a key is a word, not a list or a mapping")
            key = self.construct_object(key_node)
            if key in seen:
                raise RunError(f"line {key_node.start_mark.line + 1}: `{key}` is written twice")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return self._as_written(node, super().construct_yaml_int(node))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return self._as_written(node, super().construct_yaml_float(node))

    def _as_written(self, node: yaml.ScalarNode, read: Any) -> Any:
        text, where = node.value, f"line {node.start_mark.line + 1}"
        if not math.isfinite(read):
            raise RunError(f"{where}: {text} is no number that a parameter can have")
        if ":" in text or re.fullmatch(r"[-+]?0[0-9_]+", text):
            raise RunError(
                f'{where}: YAML reads {text} as the number {read}: write "{text}" if it is text, else {read}'
            )
        return read


for _tag in ("int", "float"):  # SafeLoader's table holds its own methods, not their names
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", getattr(_Loader, f"construct_yaml_{_tag}"))


def read_params(path: Path) -> dict[str, Any]:
    """Read a params file: `rounds`, `skip`, `all` and one section per notebook, or per notebook of a round."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (OSError, ValueError, yaml.YAMLError, RunError) as error:  # ValueError: not UTF-8, a date in month 13
        raise RunError(f"{path}: {error}") from None
    except RecursionError:
        raise RunError(f"{path}: nested too deeply to be a params file") from None
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

    A section `round-2/05_annotation` sets a phase for that round alone, and goes before the phase's own. Raises
    RunError naming file, section and key for an unknown section or key and for a value of the wrong type.
    """
    sections = read_params(path)
    inside = [name for name in phases if name.startswith(ROUND)]
    of_rounds = {f"round-{n}/{name}": name for n in range(1, rounds(path) + 1) for name in inside}
    sections = {key: content for key, content in sections.items() if key not in ("rounds", "skip")}
    given: dict[str, dict[str, Any]] = {name: {} for name in phases}
    for section, content in sorted(sections.items(), key=lambda item: item[0] != "all"):  # `all` first, then overridden
        if section != "all" and section not in phases and section not in of_rounds:
            known = ["all", "rounds", "skip", *phases, *of_rounds]
            raise RunError(f"{path}: unknown section `{section}`; {closest(str(section), known)}")
        if not isinstance(content, dict):
            raise RunError(f"{path}: section `{section}`: expected `name: value` lines, got {content!r}")
        phase = of_rounds.get(section, section)
        targets = list(phases) if section == "all" else [phase]
        for key, value in content.items():
            if key == "out" or (key in ("previous_dir", "round_number") and phase.startswith(("all", *ROUND))):
                raise RunError(f"{path}: section `{section}`: `{key}` is set by the runner; remove it")
            known = sorted({name for target in targets for name in phases[target]})
            if key not in known:
                raise RunError(f"{path}: section `{section}`: unknown key `{key}`; {closest(str(key), known)}")
            for target in targets:
                if key in phases[target]:
                    typed = _typed(path, section, key, value, phases[target][key])
                    given.setdefault(section if section in of_rounds else target, {})[key] = typed
    return given


def _typed(path: Path, section: str, key: str, value: Any, default: Any) -> Any:
    try:
        return checked(value, default)
    except TypeError as error:
        raise RunError(f"{path}{_line(path, section, key)}: section `{section}`: key `{key}`: {error}") from None


def _line(path: Path, section: str, key: str) -> str:
    """Where a key of a section stands, as `:7`; empty where an anchor brought it."""
    node: yaml.Node | None = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    line = ""
    for name in (section, key):
        found = [pair for pair in node.value if pair[0].value == name] if isinstance(node, yaml.MappingNode) else []
        line = f":{found[0][0].start_mark.line + 1}" if found else ""
        node = found[0][1] if found else None
    return line


def skipped(path: Path, phases: Sequence[str]) -> list[str]:
    """Read the phases that a params file holds back (`skip`)."""
    skip = read_params(path).get("skip", [name for name in SKIPPED if name in phases])
    for name in skip if isinstance(skip, list) else [skip]:
        if name not in phases:
            raise RunError(f"{path}: `skip`: no notebook `{name}`; {closest(str(name), phases)}")
    return skip


def rounds(path: Path) -> int:
    """Read how many RLHF rounds a params file asks for (`rounds`, 1 if absent)."""
    number = read_params(path).get("rounds", 1)
    if type(number) is not int or number < 1:
        raise RunError(f"{path}: `rounds`: expected a whole number from 1 on, got {number!r}")
    return number


def plan(params: Path, notebooks: Path, folder: Path) -> list[Job]:
    """Lay out every phase of a run in `folder`, in the order in which they run, with all their parameters.

    The phases of a round (`ROUND`) come once a round. See `check_params` and `rounds` for what is refused.
    """
    phases = discover(notebooks)
    sections, last = check_params(params, phases), rounds(params)
    inside = [name for name in phases if name.startswith(ROUND)]
    order = [(0, name) for name in phases if name[:2] < ROUND[0]]
    order += [(number, name) for number in range(1, last + 1) for name in inside]
    order += [(0, name) for name in phases if name[:2] > ROUND[-1]]
    jobs: list[Job] = []
    for number, name in order:
        label = f"round-{number}/{name}" if number else name
        given = {**sections[name], **sections.get(label, {}), "out": shown(folder / label)}
        if number and "round_number" in phases[name]:
            given["round_number"] = number
        reads = _reads(name, number, phases[name], given, jobs)
        for key, earlier in reads.items():
            paths = [shown(job.out) for job in earlier]
            given[key] = paths if key.endswith("_dirs") else "".join(paths)
        upstream = sorted({job.label for earlier in reads.values() for job in earlier})
        jobs.append(Job(label, notebooks / f"{name}.ipynb", folder / label, phases[name] | given, given, upstream))
    return jobs


def _reads(
    name: str, number: int, defaults: Mapping[str, Any], given: Mapping[str, Any], jobs: Sequence[Job]
) -> dict[str, list[Job]]:
    """Find the jobs whose folders fill a phase's parameters; `<x>_dir` and `previous_dir` get one or none.

    `<x>_dir`: the latest of an earlier phase; `<x>_dirs`: it in every round; `previous_dir`: what ended the last round.
    """
    reads = {}
    for key, default in defaults.items():
        match = re.fullmatch(r"(\w+)_dir(s?)", key)
        if key == "previous_dir" and number:
            reads[key] = [job for job in jobs if job.label.startswith(f"round-{number - 1}/")][-1:]
        elif match and default and key not in given:
            found = [job for job in jobs if job.name[3:] == match[1] and job.name < name]
            if found:
                reads[key] = found if match[2] else found[-1:]
    return reads


def select(jobs: list[Job], *, skip: list[str], first: str | None, only: str | None) -> list[Job]:
    """Choose phases: from `first` on, or `only` one, which `skip` does not hold back.

    Either is `5`, `05` or `05_annotation` (of the first round, or with `only` of every round) or `round-2/05`.
    """
    if only:
        return _find(jobs, only)
    start = jobs.index(_find(jobs, first)[0]) if first else 0
    return [job for job in jobs[start:] if job.name not in skip]


def _find(jobs: list[Job], wanted: str) -> list[Job]:
    place, _, phase = wanted.rpartition("/")
    number = f"{int(phase):02}" if phase.isdigit() else None
    named = [job for job in jobs if job.name == phase or job.name[:2] == number]
    found = [job for job in named if place in ("", job.label.rpartition("/")[0])]
    if not found:
        known = dict.fromkeys(name for job in jobs for name in (job.name, job.label))
        raise RunError(f"no phase `{wanted}`; {closest(wanted, list(known))}")
    return found


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
    return None if pages.can_render(job.executed, job.out, job.html) else "its report is lost"


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name the first dependency that differs."""
    for part in ("params", "inputs", "source", "versions"):
        names = old[part].keys() | new[part].keys()
        for name in sorted(names & COMPUTING if part == "versions" else names):
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
        for key, folder in folders(job.values):
            if ROOT / folder in made:
                continue
            manifest = read_manifest(folder)
            if manifest is None or manifest["status"] not in ("done", "failed_gate"):
                raise RunError(f"{job.label} reads `{key}` = {folder}, which is not complete: run that phase first")
            if trouble := damaged(ROOT / folder, manifest):
                raise RunError(f"{job.label} reads `{key}` = {folder}: {trouble}: run that phase again")
        made.add(job.out)
