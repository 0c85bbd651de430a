"""What a report is worth to the client beside the wanted one, by aspect: its faults, as the brief weighs them."""

import math
import re

from erlib.task import metrics
from erlib.task.forms import parse_compact
from erlib.task.schema import Brief, Entity, Parsed, Report

# What a fault costs, in missed wanted items: the client wants reports comprehensive first, then free of noise. What is
# made up costs more than what stands in the post but does not belong; near misses cost less than a miss and an excess.
ENTITY_COSTS = {"missed": 1.0, "ungrounded": 1.5, "spurious": 1.0, "irrelevant": 0.8, "type": 0.7, "boundary": 0.5}
RELATIONSHIP_COSTS = {"missed": 1.0, "spurious": 1.0, "irrelevant": 0.8, "type": 0.9, "wrong_end": 0.9}
SUMMARY_COSTS = {"missed": 1.0, "made up": 1.0, "superfluous": 0.6}
BROKEN_COST = 1.0  # a line that cannot be read, in entities; it hides an item and looks bad
REPEATED_COST = 0.3  # an item said twice, or a relationship whose end is not reported
_CLAUSE = re.compile(r";|,\s")  # summaries are separated by "; "; a reader takes a comma for a separator too


# -- utility ------------------------------------------------------------------------------------------------------


def by_aspect(document: str, wanted: Report, text: str, *, brief: Brief) -> dict[str, float]:
    """What a compact report is worth beside the `wanted` one, by aspect: 0 without fault, else below; any text goes."""
    parsed = parse_compact(text, brief=brief, document=document)
    faults = metrics.taxonomy([document], [wanted], [parsed], brief)
    kinds = {item: list(faults.loc[faults["item"] == item, "kind"]) for item in ("entity", "relationship")}
    kept = {entity.name for entity in parsed.report.entities}
    entities = sum(ENTITY_COSTS[kind] for kind in kinds["entity"])
    relationships = sum(RELATIONSHIP_COSTS[kind] for kind in kinds["relationship"])
    for defect in parsed.defects:
        entities += BROKEN_COST * (defect.kind == "unparsable")
        entities += REPEATED_COST * (defect.kind == "duplicate" and defect.detail in kept)
        relationships += REPEATED_COST * (defect.kind == "duplicate" and defect.detail not in kept)
        relationships += REPEATED_COST * (defect.kind == "missing_entity")
    summaries, facts = _summary_cost(document, wanted, parsed)
    return {
        "entities": _weighed(entities, len(wanted.entities)),
        "relationships": _weighed(relationships, len(wanted.relationships)),
        "summaries": _weighed(summaries, facts),
    }


def _weighed(cost: float, items: int) -> float:
    """The same fault shows less among many items: costs count by the root of what there is to report."""
    return -cost / math.sqrt(max(1, items))


def _summary_cost(document: str, wanted: Report, parsed: Parsed) -> tuple[float, int]:
    """What the summaries lack and hold in excess, and the number of salient facts that there are to tell."""
    facts = {entity.name: [fact.casefold() for fact in entity.facts] for entity in wanted.entities}
    cost = SUMMARY_COSTS["missed"] * sum(map(len, facts.values()))
    for entity in parsed.report.entities:
        missing = facts.get(entity.name, [])
        for clause in _clauses(entity):
            told = [fact for fact in missing if re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", clause)]
            missing = [fact for fact in missing if fact not in told]
            cost -= SUMMARY_COSTS["missed"] * len(told)
            if not told:
                cost += SUMMARY_COSTS["superfluous" if clause in document.casefold() else "made up"]
    return cost, sum(map(len, facts.values()))


def _clauses(entity: Entity) -> list[str]:
    return [clause for part in _CLAUSE.split(entity.summary.casefold()) if (clause := part.strip())]
