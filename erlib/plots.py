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
    """Every trial of the exemplar search by stage and number of documents, and the best full score so far."""
    figure, (axis,) = _axes("What did the search for exemplars gain?")
    swap, full = history["stage"] == "swap search", history["documents"] == history["documents"].max()
    looks = {
        "successive halving, part of dev": (SKY, "o", ~full),
        "successive halving, all of dev": (BLUE, "s", full & ~swap),
        "swap search, all of dev": (ORANGE, "^", swap),
    }
    for label, (color, marker, rows) in looks.items():
        shown = history[rows]
        axis.scatter(shown.index, shown["score"], color=color, marker=marker, s=22, label=label)
    axis.step(history.index, history["best"], where="post", color=VERMILION, label="best on all of dev")
    axis.set_xlabel("trial")
    axis.set_ylabel("mean of entity and relationship F1")
    axis.legend(fontsize=8, frameon=False)
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
    sets = list(dict.fromkeys(column.removesuffix("_entity_f1").removesuffix("_relationship_f1") for column in measured))
    for column in measured:
        known, entities = log.dropna(subset=column), column.endswith("_entity_f1")
        name = column.removesuffix("_entity_f1").removesuffix("_relationship_f1")
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
