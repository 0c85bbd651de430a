"""Decision plots: each function takes a DataFrame and returns a Figure whose title is the question it answers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler

# Okabe and Ito's palette: told apart by people with any common form of colour blindness.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#7F7F7F",
)


def _axes(title: str, *, width: float = 7.0, height: float = 3.6, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """Make a figure with `columns` plain axes, its title on the left."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, list(axes[0])


# -- 00 base model ------------------------------------------------------------------------------------------------


def pretraining(log: "pd.DataFrame") -> "Figure":
    """Draw the log of `pretrain.train` by millions of tokens: loss, and F1 where it was measured."""
    figure, (losses, scores) = _axes("When does it learn to copy names?", width=9.0, columns=2)
    losses.plot(log["tokens"] / 1e6, log["loss"], color=BLUE)
    losses.set(xlabel="tokens read (millions)", ylabel="loss (nats a token)", ylim=(0, None))
    known = log.dropna(subset="entity_f1") if "entity_f1" in log else log[:0].assign(entity_f1=[], relationship_f1=[])
    for column, colour, label in (("entity_f1", BLUE, "entities"), ("relationship_f1", VERMILION, "relationships")):
        scores.plot(known["tokens"] / 1e6, known[column], color=colour, marker=".", label=label)
    scores.set(xlabel="tokens read (millions)", ylabel="exact-match F1, unseen names", ylim=(0, 1.02))
    scores.legend(fontsize=8, frameon=False)
    return figure


# -- 01 prompts ---------------------------------------------------------------------------------------------------


def intervals(frame: "pd.DataFrame", *, title: str, highlight: str | None = None) -> "Figure":
    """One panel a measure: each name's value with its 95 % interval; columns name, measure, value, low, high.

    The row named `highlight` is drawn in another colour.
    """
    names = list(dict.fromkeys(frame["name"]))
    measures = list(dict.fromkeys(frame["measure"]))
    figure, axes = _axes(title, width=2.2 + 3.2 * len(measures), height=1.2 + 0.3 * len(names), columns=len(measures))
    for axis, measure in zip(axes, measures, strict=True):
        rows = frame[frame["measure"] == measure].set_index("name").loc[names]
        for height, (name, row) in enumerate(rows.iterrows()):
            color = VERMILION if name == highlight else BLUE
            axis.plot([row["low"], row["high"]], [height, height], color=color, linewidth=1.5)
            axis.plot(row["value"], height, marker="o", color=color)
        axis.set_xlabel(f"{measure}, 95 % interval")
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names))
        axis.set_ylim(len(names) - 0.5, -0.5)
    return figure


def selection(history: "pd.DataFrame") -> "Figure":
    """The search for exemplars: scores of the sets in each round of halving, and the gain of each exchange."""
    figure, (halving, swaps) = _axes("What did the search for exemplars gain?", width=9.0, columns=2)
    rounds = history[history["stage"] == "successive halving"].groupby("documents", sort=False)["score"]
    for place, (_, scores) in enumerate(rounds):
        halving.scatter([place] * len(scores), scores, color=BLUE, s=22, alpha=0.6)
    labels = [f"{len(scores)} sets,\n{documents} documents" for documents, scores in rounds]
    halving.set_xticks(range(len(labels)), labels)
    halving.margins(0.2)
    halving.set_xlabel("round of successive halving")
    halving.set_ylabel("mean of entity and relationship F1")
    trials = history[history["stage"] == "swap search"].iloc[1::2].reset_index(drop=True)  # rows: best so far, trial
    for kept, color, marker in ((False, GREY, "o"), (True, VERMILION, "^")):
        shown, label = trials[(trials["margin"] > 0) == kept], "kept" if kept else "undone"
        swaps.scatter(shown.index + 1, shown["margin"], color=color, marker=marker, s=22, label=label)
    swaps.axhline(0, color="black", linewidth=0.8)
    swaps.set_xlabel("exchange of one exemplar")
    swaps.set_ylabel("gain over the best set so far")
    swaps.legend(fontsize=8, frameon=False)
    return figure


def texts(frame: "pd.DataFrame") -> "Styler":
    """Lay a table of texts out for reading: escaped, line breaks kept, aligned to the top left."""
    look = {"white-space": "pre-wrap", "text-align": "left", "vertical-align": "top"}
    return frame.style.format(escape="html", precision=3).set_properties(**look)


# -- 02 corpus ----------------------------------------------------------------------------------------------------


def cutoff_sweep(swept: "pd.DataFrame", *, cutoff: float, giant_limit: float) -> "Figure":
    """Draw giant and isolated share, and components, against the cut-off: rows of `diversity.sweep`."""
    figure, (shares, counts) = _axes("At which similarity does the giant component fall apart?", width=9.0, columns=2)
    shares.plot(swept["cutoff"], swept["giant_share"], color=VERMILION, label="giant component")
    shares.plot(swept["cutoff"], swept["isolated_share"], color=BLUE, linestyle="--", label="isolated nodes")
    shares.axhline(giant_limit, color=GREY, linewidth=1, linestyle=":", label=f"limit {giant_limit:.0%}")
    shares.set(xlabel="cut-off (cosine similarity)", ylabel="share of documents", ylim=(-0.02, 1.02))
    counts.plot(swept["cutoff"], swept["components"], color=GREEN)
    counts.set(xlabel="cut-off (cosine similarity)", ylabel="components (documents to choose)", ylim=(0, None))
    for axis in (shares, counts):
        axis.axvline(cutoff, color="black", linewidth=1)
    counts.annotate(f" chosen: {cutoff:.2f}", (cutoff, 0.03), xycoords=("data", "axes fraction"))
    shares.legend(frameon=False)
    return figure


def component_sizes(sizes: "pd.Series") -> "Figure":
    """Draw how many components have each size; `sizes` holds the number of documents of every component."""
    counted = sizes.value_counts().sort_index()
    figure, (axis,) = _axes("How many documents tell the same thing?")
    axis.scatter(counted.index, counted.to_numpy(), color=BLUE, s=22)
    axis.set(xscale="log", yscale="log", xlabel="documents in the component", ylabel="components of that size")
    return figure


def against_random(compared: "pd.DataFrame") -> "Figure":
    """Draw each measure of `diversity.compare_with_random`: every draw, and the mean of each set."""
    measures = {
        "nearest_distance": "cosine distance to nearest",
        "distinct_trigrams": "share of distinct trigrams",
        "vendi_score": "Vendi score (directions)",
    }
    figure, axes = _axes("Are the selected documents more diverse than random ones?", width=10.0, columns=len(measures))
    for axis, (measure, label) in zip(axes, measures.items(), strict=True):
        for place, (name, colour) in enumerate((("random", GREY), ("selected", BLUE))):
            values = compared.loc[compared["set"] == name, measure]
            spread = (values.reset_index(drop=True).index / len(values) - 0.5) * 0.4  # side by side, not on top
            axis.scatter(place + spread, values, color=colour, s=10, alpha=0.6)
            axis.hlines(values.mean(), place - 0.3, place + 0.3, color="black", linewidth=2)
        axis.set(ylabel=label, xticks=[0, 1], xticklabels=["random", "selected"], xlim=(-0.6, 1.6))
    return figure


# -- 03 sft -------------------------------------------------------------------------------------------------------


def training_curves(log: "pd.DataFrame") -> "Figure":
    """Draw the log of `sft.train` by step: losses, and entity F1 of every set that the harness scored."""
    figure, (losses, scores) = _axes("Does it learn, and does it learn the right thing?", width=9.0, columns=2)
    for column, colour, label in (("loss", BLUE, "training"), ("eval_loss", VERMILION, "validation")):
        if column in log:
            known = log.dropna(subset=column)
            losses.plot(known["step"], known[column], color=colour, marker=".", label=label)
    losses.set(xlabel="step", ylabel="loss per completion token (nats)", ylim=(0, None))
    measured = [column for column in log if column.endswith(("_entity_f1", "_relationship_f1"))]
    names = {c: c.removesuffix("_entity_f1").removesuffix("_relationship_f1") for c in measured}
    sets = list(dict.fromkeys(names.values()))
    for column, name in names.items():
        known, entities = log.dropna(subset=column), column.endswith("_entity_f1")
        colour, line = (BLUE, ORANGE, GREEN, PURPLE)[sets.index(name) % 4], "-" if entities else ":"
        label = f"{name.replace('_', ' ')}, {'entities' if entities else 'relationships'}"
        scores.plot(known["step"], known[column], color=colour, linestyle=line, marker=".", label=label)
    scores.set(xlabel="step", ylabel="exact-match F1", ylim=(0, 1.02))
    for axis in (losses, scores):
        axis.legend(fontsize=8, frameon=False)
    return figure


def faults(counts: "pd.DataFrame") -> "Figure":
    """Draw faults a document: one row a kind of fault, one column a system."""
    figure, (axis,) = _axes("Which faults does each system make?", height=1.4 + 0.4 * len(counts))
    height = 0.8 / len(counts.columns)
    for place, (name, colour) in enumerate(zip(counts, (GREY, SKY, BLUE, VERMILION), strict=False)):
        axis.barh([row + place * height for row in range(len(counts))], counts[name], height, color=colour, label=name)
    axis.set_yticks([row + 0.4 - height / 2 for row in range(len(counts))], counts.index)
    axis.set_xlabel("faults a document")
    axis.invert_yaxis()
    axis.legend(fontsize=8, frameon=False)
    return figure
