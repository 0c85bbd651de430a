"""The results of a run as Markdown, or of several runs, from manifests alone: no figure is copied by hand."""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erlib.chain import pages, tables
from erlib.chain.manifest import COMPUTING, ROUND, RunError, read_manifest

# The eight rows that say whether the recipe worked, as (phase, check by regular expression); of rounds the last.
HEADLINES = [
    ("02", r"diversity gain: distance to nearest"),
    ("03", r"share of the entity gap closed"),
    ("06", r"held-out accuracy"),
    ("07", r"prefers the policy to its start"),
    ("07", r"gold F1, policy minus start"),
    ("10", r"documents won to lost"),
    ("11", r"times faster than batched generate"),
    ("12", r"false-alarm rate$"),
]

# What a release is judged by, in runs that were confirmed: on documents that no other phase reads.
CONFIRMED = [
    ("14", r"documents won to lost against the frontier"),
    ("14", r"documents won to lost against SFT"),
    ("14", r"entity F1, policy minus frontier"),
]

Manifest = Mapping[str, Any]
MARK = {outcome: mark[:1] for outcome, mark in tables.MARKS.items()}


def markdown(folder: Path) -> str:
    """Write the results of the run in `folder`: headline, one table per phase, seconds and memory, versions.

    Raises RunError where no phase has a manifest.
    """
    found = _read(folder)
    manifests = list(found.values())
    parts = [
        f"# Results of the run `{folder.name}`",
        f"Written by `python -m erlib results runs/{folder.name}` from the manifests of its phases.",
        _simulated(manifests),
        _reading(manifests),
        "## Headline",
        _headline(found),
        *(part for name in dict.fromkeys(each["phase"] for each in manifests) for part in _phase(name, found)),
        "## Time and memory",
        _costs(found),
        "## Where it was measured",
        _provenance(manifests),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _read(folder: Path) -> dict[str, Manifest]:
    found = {path.relative_to(folder).as_posix(): read_manifest(path) or {} for path in pages.phases(folder)}
    if not found:
        raise RunError(
            f"{folder}: no phase with a manifest; run it first: python -m erlib run params/{folder.name}.yml"
        )
    return found


def headlines(found: Mapping[str, Manifest]) -> list[tuple[str, dict[str, Any] | None]]:
    """Find the headlines in manifests by label: (label, check), the check None where the run does not have it."""
    rows: list[tuple[str, dict[str, Any] | None]] = []
    for number, pattern in _wanted(found):
        labels = [label for label, each in found.items() if each["phase"].startswith(number)]
        last = labels[-1] if labels else number
        verdict = found[last]["verdict"] if labels else []
        rows.append((last, next((row for row in verdict if re.search(pattern, row["check"])), None)))
    return rows


def _wanted(found: Mapping[str, Manifest]) -> list[tuple[str, str]]:
    """`HEADLINES`, and `CONFIRMED` where the run has phase 14."""
    confirmed = any(each["phase"].startswith("14") for each in found.values())
    return HEADLINES + (CONFIRMED if confirmed else [])


def _simulated(manifests: Sequence[Manifest]) -> str:
    phases = pages.numbers(each["phase"] for each in manifests if each["simulated"])
    return (
        f"**Simulated:** the frontier LM and the panel of phases {phases} are the embedded world's." if phases else ""
    )


def _reading(manifests: Sequence[Manifest]) -> str:
    every = [row for each in manifests for row in each["verdict"]]
    return (
        f"Checks with a target: {tables.tally(every)}. A check is *met* where its whole 95 % interval lies on the "
        "right side of the target, *missed* where all of it lies on the wrong side, *undecided* between. Only a missed "
        "gate stops a run."
    )


def _headline(found: Mapping[str, Manifest]) -> str:
    lines = [("phase", "check", "value", "95 % interval", "target", "outcome")]
    for (label, row), (_, pattern) in zip(headlines(found), _wanted(found), strict=True):
        lines.append(
            (label, pattern.rstrip("$"), "not in this run", "", "", "") if row is None else (label, *_cells(row))
        )
    return _table(lines)


def _phase(name: str, found: Mapping[str, Manifest]) -> list[str]:
    """The heading and table of one phase; of a phase of the rounds, the rounds side by side."""
    manifests = {label: each for label, each in found.items() if each["phase"] == name}
    simulated = " (simulated)" if any(each["simulated"] for each in manifests.values()) else ""
    statuses = ", ".join(dict.fromkeys(each["status"].replace("_", " ") for each in manifests.values()))
    notes = [f"{_round(label)}{each['note']}" for label, each in manifests.items() if each["note"]]
    table = _rounds(manifests) if name.startswith(ROUND) else _checks(next(iter(manifests.values())))
    return [f"## {name}{simulated}: {statuses}", table, "; ".join(notes)]


def _checks(manifest: Manifest) -> str:
    lines = [("check", "value", "95 % interval", "target", "outcome", "gate")]
    return _table([*lines, *((*_cells(row), "gate" if row["gate"] else "") for row in manifest["verdict"])])


def _rounds(manifests: Mapping[str, Manifest]) -> str:
    rows = {label: {row["check"]: row for row in each["verdict"]} for label, each in manifests.items()}
    lines = [("check", "gate", *(label.partition("/")[0].replace("-", " ") for label in manifests))]
    for name in dict.fromkeys(name for checks in rows.values() for name in checks):
        gate = any(checks[name]["gate"] for checks in rows.values() if name in checks)
        cells = (_in_a_round(checks[name]) if name in checks else "" for checks in rows.values())
        lines.append((name, "gate" if gate else "", *cells))
    return _table(lines)


def _in_a_round(row: Mapping[str, Any]) -> str:
    within = f" ({tables.interval(row)})" if tables.interval(row) else ""
    judged = f", target {row['target']}: {tables.MARKS[row['outcome']]}" if row["target"] else ""
    return f"{tables.number(row['value'], row['check'])}{within}{judged}"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = tables.number(row["value"], row["check"])
    return row["check"], value, tables.interval(row), row["target"] or "", tables.MARKS[row["outcome"]]


def _costs(found: Mapping[str, Manifest]) -> str:
    lines = [("phase", "seconds", "peak memory (MB)")]
    for label, each in found.items():
        lines.append((label, f"{each['seconds']:,.0f}", f"{each['peak_rss_mb']:,.0f}" if each["peak_rss_mb"] else ""))
    return _table([*lines, ("all", f"{sum(each['seconds'] for each in found.values()):,.0f}", "")])


def _provenance(manifests: Sequence[Manifest]) -> str:
    lines = [("what", "value")]
    for word, key in (("device", "device"), ("commit (+: with changes)", "commit"), ("seed", "seed")):
        lines.append((word, ", ".join(dict.fromkeys(str(each[key]) for each in manifests))))
    lines.append(("finished", f"{manifests[0]['finished']} to {max(each['finished'] for each in manifests)}"))
    for name in sorted(COMPUTING, key=str.lower):
        installed = dict.fromkeys(each["versions"][name] for each in manifests if name in each["versions"])
        if installed:
            lines.append((name, ", ".join(installed)))
    return _table(lines)


# -- several runs, such as those of several seeds ------------------------------------------------------------------


def comparison(folders: Sequence[Path]) -> str:
    """Write the results of several runs side by side: headlines with mean, median and range, every gate, seconds.

    Raises RunError where a run has no phase with a manifest.
    """
    runs = {folder.name: _read(folder) for folder in folders}
    every = [each for found in runs.values() for each in found.values()]
    commands = " ".join(f"runs/{name}" for name in runs)
    parts = [
        f"# Results of {len(runs)} runs",
        f"Written by `python -m erlib results {commands}` from the manifests of their phases.",
        _simulated(every),
        "A check is ✓ met where its whole 95 % interval lies on the right side of the target, ✗ missed where all of it "
        "lies on the wrong side, ○ undecided between. Only a missed gate stops a run.",
        "## Headline",
        _beside(runs, _headline_checks(runs)),
        "## Gates",
        _beside(runs, _gates(runs)),
        "## Seconds",
        _seconds(runs),
        "## Where it was measured",
        _table([("run", "seed", "device", "commit (+: with changes)"), *(_origin(*run) for run in runs.items())]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline_checks(runs: Mapping[str, Mapping[str, Manifest]]) -> list[tuple[str, str]]:
    """The headlines that any run has, by label and check."""
    found = [(label, row["check"]) for each in runs.values() for label, row in headlines(each) if row]
    return list(dict.fromkeys(found))


def _gates(runs: Mapping[str, Mapping[str, Manifest]]) -> list[tuple[str, str]]:
    """Every gate of any run, by label and check, in the order of the phases."""
    found = [
        (label, row["check"])
        for each in runs.values()
        for label, manifest in each.items()
        for row in manifest["verdict"]
        if row["gate"]
    ]
    order = {label: place for place, label in enumerate(_labels(runs))}
    return sorted(dict.fromkeys(found), key=lambda item: order[item[0]])


def _labels(runs: Mapping[str, Mapping[str, Manifest]]) -> list[str]:
    """The phases of all runs, in the order of the run that has most."""
    longest = max(runs.values(), key=len)
    return list(dict.fromkeys([*longest, *(label for each in runs.values() for label in each)]))


def _beside(runs: Mapping[str, Mapping[str, Manifest]], wanted: Sequence[tuple[str, str]]) -> str:
    lines = [("phase", "check", "target", *runs, "mean", "median", "lowest to highest")]
    for label, check in wanted:
        rows = [
            next((row for row in each[label]["verdict"] if row["check"] == check), None) if label in each else None
            for each in runs.values()
        ]
        values = [row["value"] for row in rows if row and isinstance(row["value"], int | float)]
        target = next(row["target"] for row in rows if row) or ""
        cells = (f"{MARK[row['outcome']]} {tables.number(row['value'], check)}".strip() if row else "" for row in rows)
        lines.append((label, check, target, *cells, *_summary(values, check)))
    return _table(lines)


def _summary(values: Sequence[float], check: str) -> tuple[str, str, str]:
    if len(values) < 2:
        return "", "", ""
    mean, median = (tables.number(measure(values), check) for measure in (statistics.mean, statistics.median))
    return mean, median, f"{tables.number(min(values), check)} to {tables.number(max(values), check)}"


def _seconds(runs: Mapping[str, Mapping[str, Manifest]]) -> str:
    lines = [("phase", *runs)]
    for label in _labels(runs):
        lines.append((label, *(f"{each[label]['seconds']:,.0f}" if label in each else "" for each in runs.values())))
    totals = (f"{sum(manifest['seconds'] for manifest in each.values()):,.0f}" for each in runs.values())
    return _table([*lines, ("all", *totals)])


def _origin(name: str, found: Mapping[str, Manifest]) -> tuple[str, ...]:
    distinct = {key: dict.fromkeys(str(each[key]) for each in found.values()) for key in ("seed", "device", "commit")}
    return name, *map(", ".join, distinct.values())


# -- pieces of tables ----------------------------------------------------------------------------------------------


def _round(label: str) -> str:
    return f"{label.partition('/')[0].replace('-', ' ')}: " if "/" in label else ""


def _table(lines: Sequence[Sequence[str]]) -> str:
    ruler = ["---"] * len(lines[0])
    return "\n".join(map(tables.markdown_row, [lines[0], ruler, *lines[1:]]))
