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
    losses.set(xlabel="tokens read (millions)", ylabel="loss (nats per token)", ylim=(0, None))
    known = log.dropna(subset="entity_f1") if "entity_f1" in log else log[:0].assign(entity_f1=[], relationship_f1=[])
    for column, colour, label in (("entity_f1", BLUE, "entities"), ("relationship_f1", VERMILION, "relationships")):
        scores.plot(known["tokens"] / 1e6, known[column], color=colour, marker=".", label=label)
    scores.set(xlabel="tokens read (millions)", ylabel="exact-match F1, unseen names", ylim=(0, 1.02))
    scores.legend(fontsize=8, frameon=False)
    return figure


# -- 01 prompts ---------------------------------------------------------------------------------------------------


def intervals(frame: "pd.DataFrame", *, title: str, highlight: str | None = None) -> "Figure":
    """One panel per measure: each name's value with its 95 % interval; columns name, measure, value, low, high.

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
    """Draw faults per document: one row per kind of fault, one column per system."""
    figure, (axis,) = _axes("Which faults does each system make?", height=1.4 + 0.4 * len(counts))
    height = 0.8 / len(counts.columns)
    for place, (name, colour) in enumerate(zip(counts, (GREY, SKY, BLUE, VERMILION), strict=False)):
        axis.barh([row + place * height for row in range(len(counts))], counts[name], height, color=colour, label=name)
    axis.set_yticks([row + 0.4 - height / 2 for row in range(len(counts))], counts.index)
    axis.set_xlabel("faults per document")
    axis.invert_yaxis()
    axis.legend(fontsize=8, frameon=False)
    return figure


# -- 04 sampling --------------------------------------------------------------------------------------------------


def temperature_sweep(table: "pd.DataFrame", *, temperature: float, limit: float, judges: str) -> "Figure":
    """Draw by temperature how often the greedy completion was preferred, and every outcome: `by_temperature`'s table.

    `judges` says who judged; `temperature` is the one chosen, `limit` the share above which it is too hot.
    """
    figure, (shares, outcomes) = _axes(f"How hot before greedy is preferred? ({judges})", width=9.0, columns=2)
    spread = [(table["share"] - table["low"]).clip(0), (table["high"] - table["share"]).clip(0)]  # rounding at 0 and 1
    shares.errorbar(table.index, table["share"], spread, color=BLUE, marker="o", capsize=3, label="all comparisons")
    shares.plot(table.index, table["decided_share"], color=GREY, linestyle=":", marker=".", label="ties left out")
    shares.axhline(limit, color=VERMILION, linewidth=1, linestyle="--", label="limit")
    shares.axvline(temperature, color="black", linewidth=1)
    shares.annotate(f" T = {temperature:g}", (temperature, 0.03), xycoords=("data", "axes fraction"))
    shares.set(xlabel="temperature", ylabel="greedy preferred, 95 % interval", ylim=(-0.02, 1.02))
    bottom = table["n"] * 0.0
    for outcome, colour in (("sample", GREEN), ("tie", YELLOW), ("identical", GREY), ("greedy", BLUE)):
        part = table[outcome] / table["n"]
        outcomes.bar([f"{t:g}" for t in table.index], part, bottom=bottom, color=colour, label=outcome)
        bottom = bottom + part
    outcomes.set(xlabel="temperature", ylabel="share of comparisons", ylim=(0, 1))
    shares.legend(fontsize=8, frameon=False)
    outcomes.legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def logprob_preference(binned: "pd.DataFrame", *, judges: str) -> "Figure":
    """Draw the share that preferred each completion by log-probability difference: `by_logprob`'s table."""
    figure, (axis,) = _axes(f"Is what the model finds likelier also preferred? ({judges})")
    for preferred, colour, label in (("greedy", BLUE, "greedy preferred"), ("sample", GREEN, "sample preferred")):
        rows = binned[binned["preferred"] == preferred]
        spread = [(rows["value"] - rows["low"]).clip(0), (rows["high"] - rows["value"]).clip(0)]  # rounding at 0 and 1
        axis.errorbar(rows["difference"], rows["value"], spread, color=colour, marker="o", capsize=3, label=label)
    axis.axvline(0, color=GREY, linewidth=1)
    axis.set(xlabel="log-probability, greedy minus sample (nats)", ylabel="share, 95 % interval", ylim=(-0.02, 1.02))
    axis.legend(fontsize=8, frameon=False)
    return figure


# -- 05 annotation ------------------------------------------------------------------------------------------------


def agreement_by_batch(windows: "pd.DataFrame", *, judges: str) -> "Figure":
    """Draw raw agreement and alpha with intervals by batch: `agreement.by_window`; the first batch is the level.

    `judges` says whose judgements they are, such as `simulated panel`.
    """
    figure, axes = _axes(f"Do annotators still agree as they did after training? ({judges})", width=9.0, columns=2)
    for axis, (measure, rows) in zip(axes, windows.groupby("measure", sort=False), strict=True):
        spread = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
        axis.errorbar(rows["batch"], rows["value"], yerr=spread, color=BLUE, marker="o", capsize=3, linestyle="none")
        first = rows.iloc[0]
        axis.axhline(first["value"], color=GREY, linewidth=1, label="level after training")
        axis.axhspan(first["low"], first["high"], color=GREY, alpha=0.15, linewidth=0)
        axis.set(xlabel="batch", ylabel=f"{measure}, 95 % interval", ylim=(min(0, rows["low"].min()), 1.02))
        axis.set_xticks(rows["batch"])
        axis.legend(fontsize=8, frameon=False)
    return figure


def annotators(table: "pd.DataFrame", *, judges: str) -> "Figure":
    """Draw each annotator's share of report A among decided pairs, and its share of ties: `annotation.annotators`."""
    title = f"Does the place of a report sway anybody, and who calls ties? ({judges})"
    figure, (first, ties) = _axes(title, width=9.0, height=1.4 + 0.35 * len(table), columns=2)
    spread = [table["first"] - table["low"], table["high"] - table["first"]]
    first.errorbar(table["first"], range(len(table)), xerr=spread, color=BLUE, marker="o", capsize=3, linestyle="none")
    first.axvline(0.5, color=GREY, linewidth=1)
    first.set(xlabel="share of report A among decided pairs, 95 % interval", xlim=(0.3, 0.7))
    ties.barh(range(len(table)), table["tie rate"], color=ORANGE, height=0.6)
    ties.set(xlabel="share of ties", xlim=(0, None))
    first.set_yticks(range(len(table)), table["annotator"])
    ties.set_yticks(range(len(table)), [""] * len(table))
    for axis in (first, ties):
        axis.set_ylim(len(table) - 0.5, -0.5)
    return figure


def scores(frame: "pd.DataFrame", *, judges: str) -> "Figure":
    """Draw how often each score was given, by aspect and for their sum: one row per judgement, one column per score."""
    figure, axes = _axes(f"Which scores do annotators give? ({judges})", width=10.0, columns=len(frame.columns))
    for axis, column in zip(axes, frame, strict=True):
        shares = frame[column].value_counts(normalize=True).sort_index()
        axis.bar(shares.index, shares, color=[GREY if value == 0 else BLUE for value in shares.index])
        axis.set(xlabel=f"{column}: B better … A better")
    axes[0].set_ylabel("share of judgements")
    return figure


# -- 06 reward model ----------------------------------------------------------------------------------------------


def reward_training(log: "pd.DataFrame") -> "Figure":
    """Draw the log of `reward_model.train` by step: loss and accuracy on training and on validation pairs."""
    figure, axes = _axes("Does it learn an order that holds on other documents?", width=9.0, columns=2)
    chance = {"loss": 1.386, "accuracy": 0.5}  # ln 2 for the sum, and ln 2 for the aspects beside it
    labels = {"loss": "loss per pair, sum and aspects (nats)", "accuracy": "accuracy"}
    for axis, (measure, level) in zip(axes, chance.items(), strict=True):
        for column, colour, label in ((measure, SKY, "training"), (f"eval_{measure}", VERMILION, "validation")):
            if column in log:
                known = log.dropna(subset=column)
                axis.plot(known["step"], known[column], color=colour, marker=".", label=label)
        axis.axhline(level, color=GREY, linestyle="--", linewidth=1, label="chance")
        axis.set(xlabel="step", ylabel=labels[measure])
        axis.legend(fontsize=8, frameon=False)
    return figure


def reliability(binned: "pd.DataFrame", *, judges: str) -> "Figure":
    """Draw share right against confidence: rows of `fidelity.reliability`, one line for each `name`."""
    figure, (axis,) = _axes(f"Is it as often right as it says? ({judges})", width=5.0, height=4.2)
    axis.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", linewidth=1, label="perfect")
    for (name, rows), colour in zip(binned.groupby("name", sort=False), (BLUE, ORANGE), strict=False):
        bars = [rows["right"] - rows["low"], rows["high"] - rows["right"]]
        axis.errorbar(rows["confidence"], rows["right"], yerr=bars, color=colour, marker="o", label=name)
    axis.set(xlabel="confidence, sigmoid of the margin", ylabel="share right, 95 % interval", xlim=(0.48, 1.02))
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def accuracy_groups(grouped: "pd.DataFrame", *, band: tuple[float, float], judges: str) -> "Figure":
    """Draw accuracy in groups of pairs, rows of `fidelity.accuracy_by`, a panel per `by`; `band` is the ceiling."""
    panels = list(dict.fromkeys(grouped["by"]))
    title = f"Where is it right? ({judges}; grey: what agreement allows)"
    figure, axes = _axes(title, width=3.3 * len(panels), height=3.2, columns=len(panels))
    for axis, by in zip(axes, panels, strict=True):
        rows = grouped[grouped["by"] == by]
        bars = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
        axis.axhspan(*band, color=GREY, alpha=0.2)
        axis.errorbar(range(len(rows)), rows["value"], yerr=bars, color=BLUE, marker="o", linestyle="")
        labels = [f"{name.replace(' quarter', '')}\n{pairs}" for name, pairs in rows[["group", "pairs"]].to_numpy()]
        axis.set_xticks(range(len(rows)), labels, fontsize=8)
        axis.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
        axis.set(xlabel=by, ylim=(0, 1.02), xlim=(-0.5, len(rows) - 0.5))
        axis.set_ylabel("accuracy, 95 % interval" if axis is axes[0] else "")
    return figure


def reward_distribution(rewards: "pd.DataFrame") -> "Figure":
    """Draw the scores of samples in columns `split` and `reward`, with the 1st and 99th percentile the guard uses."""
    figure, (axis,) = _axes("Where do rewards lie before any training?")
    for (split, rows), colour in zip(rewards.groupby("split", sort=False), (SKY, ORANGE, BLUE), strict=False):
        axis.hist(rows["reward"], bins=40, density=True, histtype="step", color=colour, label=split)
    for edge in rewards.loc[rewards["split"] != "train", "reward"].quantile([0.01, 0.99]):
        axis.axvline(edge, color="black", linewidth=1, linestyle=":")
    axis.set(xlabel="score (dotted: 1st and 99th percentile of held-out documents)", ylabel="density")
    axis.legend(fontsize=8, frameon=False)
    return figure


def length_bias(table: "pd.DataFrame", *, judges: str) -> "Figure":
    """Draw, by difference in length, the model's margin and whom annotators prefer: rows of `fidelity.pair_table`."""
    figure, (axis,) = _axes(f"Is a longer report a better one? ({judges})", width=6.0)
    for label, colour, name in ((1, BLUE, "A preferred"), (-1, VERMILION, "B preferred"), (0, GREY, "tie")):
        rows = table[table["label"] == label]
        axis.scatter(rows["longer"], rows["margin"], color=colour, s=12, alpha=0.6, label=name)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="characters by which A is longer", ylabel="margin: score of A minus score of B")
    axis.legend(fontsize=8, frameon=False)
    return figure


# -- 07 ppo -------------------------------------------------------------------------------------------------------


def rewards_by_step(log: "pd.DataFrame", reference: "dict[str, float]") -> "Figure":
    """Draw the quantiles of the rewards of each step of `ppo.train`, over those of the reference (5 %, 50 %, 95 %)."""
    figure, (axis,) = _axes("Do the rewards rise inside the range in which the reward model was evaluated?", width=8.0)
    axis.axhspan(reference["q05"], reference["q95"], color=GREY, alpha=0.15, label="evaluation, 5 to 95 %")
    axis.axhline(reference["q50"], color=GREY, linestyle="--", label="evaluation, median")
    steps = range(len(log))  # a step that was repeated after an alarm stands twice
    axis.fill_between(steps, log["reward_q05"], log["reward_q95"], color=BLUE, alpha=0.2, label="policy, 5 to 95 %")
    axis.plot(steps, log["reward_q50"], color=BLUE, marker=".", label="policy, median")
    axis.set(xlabel="step", ylabel="raw reward of a completion")
    axis.legend(fontsize=8, frameon=False)
    return figure


def kl_by_step(log: "pd.DataFrame", *, target: float) -> "Figure":
    """Draw KL from the reference (k1 and k3), and the coefficient that is to hold it, by step of `ppo.train`."""
    figure, (distance, coefficient) = _axes("How far from its start does the policy go?", width=9.0, columns=2)
    for column, colour, label in (("kl", BLUE, "k1, in the reward"), ("kl_k3", SKY, "k3")):
        distance.plot(log["step"], log[column], color=colour, marker=".", label=label)
    distance.axhline(target, color=VERMILION, linestyle="--", label="target")
    distance.set(xlabel="step", ylabel="KL of a completion (nats)", ylim=(min(0, log["kl"].min()), None))
    distance.legend(fontsize=8, frameon=False)
    coefficient.plot(log["step"], log["kl_coef"], color=PURPLE, marker=".")
    coefficient.set(xlabel="step", ylabel="KL coefficient", ylim=(0, None))
    return figure


def policy_by_step(log: "pd.DataFrame", *, gold: str) -> "Figure":
    """Draw what the reward does not see, by step: F1 of the gold set of that name, parse and end rate, and length."""
    figure, (scores, shares, lengths) = _axes("Does the policy itself get better?", width=11.0, columns=3)
    for item, colour, label in (("entity", BLUE, "entities"), ("relationship", VERMILION, "relationships")):
        known = log.dropna(subset=f"{gold}_{item}_f1")
        scores.plot(known["step"], known[f"{gold}_{item}_f1"], color=colour, marker=".", label=label)
    scores.set(xlabel="step", ylabel=f"exact-match F1, {gold}")
    for column, colour, label in (("parse_rate", GREEN, "parse"), ("eos_rate", ORANGE, "end by themselves")):
        shares.plot(log["step"], log[column], color=colour, marker=".", label=label)
    shares.set(xlabel="step", ylabel="share of sampled reports", ylim=(None, 1.005))
    lengths.plot(log["step"], log["length"], color=PURPLE, marker=".")
    lengths.set(xlabel="step", ylabel="tokens of a sampled report", ylim=(0, None))
    for axis in (scores, shares):
        axis.legend(fontsize=8, frameon=False)
    return figure


def updates_by_step(log: "pd.DataFrame") -> "Figure":
    """Draw the health of the updates of `ppo.train`: explained variance, clip fraction, entropy."""
    figure, axes = _axes("Are the updates sound?", width=11.0, columns=3)
    drawn = (
        ("explained_variance", BLUE, "variance of returns explained"),
        ("clip_fraction", VERMILION, "share of tokens clipped"),
        ("entropy", GREEN, "entropy of a token (nats)"),
    )
    for axis, (column, colour, label) in zip(axes, drawn, strict=True):
        known = log.dropna(subset=column)
        axis.plot(known["step"], known[column], color=colour, marker=".")
        axis.set(xlabel="step", ylabel=label)
    axes[0].axhline(0, color="black", linewidth=0.8)
    axes[1].set_ylim(0, None)
    axes[2].set_ylim(0, None)
    return figure


def seconds_by_step(log: "pd.DataFrame") -> "Figure":
    """Draw the seconds of generation, scoring and update, stacked, by step of `ppo.train`."""
    figure, (axis,) = _axes("Where does the time go?")
    steps, bottom = range(len(log)), log["step"] * 0.0
    for part, colour in (("generation", SKY), ("scoring", ORANGE), ("update", BLUE)):
        seconds = log[f"seconds_{part}"].fillna(0)
        axis.bar(steps, seconds, bottom=bottom, color=colour, label=part)
        bottom = bottom + seconds
    axis.set(xlabel="step", ylabel="seconds")
    axis.legend(fontsize=8, frameon=False)
    return figure


# -- 08 alternatives ----------------------------------------------------------------------------------------------


def alternatives(dpo: "pd.DataFrame", rloo: "pd.DataFrame") -> "Figure":
    """Draw the logs of `alternatives.dpo` (reward margin, accuracy) and `alternatives.rloo` (reward, KL) by step."""
    figure, axes = _axes("Do DPO and RLOO learn?", width=12.0, columns=4)
    panels = [
        (dpo, "rewards/margins", "DPO: margin of chosen over rejected", BLUE),
        (dpo, "rewards/accuracies", "DPO: share of pairs with a margin above 0", BLUE),
        (rloo, "reward", "RLOO: reward of the samples", VERMILION),
        (rloo, "kl", "RLOO: KL from the start, nats per token", VERMILION),
    ]
    for axis, (log, column, label, colour) in zip(axes, panels, strict=True):
        axis.plot(log["step"], log[column], color=colour, alpha=0.35)
        axis.plot(log["step"], log[column].rolling(5, min_periods=1).mean(), color=colour)  # single steps are noisy
        axis.set(xlabel="step, line: mean of 5")
        axis.set_title(label, fontsize=9, loc="left")
    return figure


def frontier(points: "pd.DataFrame") -> "Figure":
    """One panel per measure, against the root of the KL: columns method, kl (nats), measure, value, low, high.

    The points of a method are joined in order; the root makes the start of each curve a straight line (2210.10760).
    """
    measures = list(dict.fromkeys(points["measure"]))
    figure, axes = _axes("What does each nat of KL buy?", width=1.0 + 4.6 * len(measures), columns=len(measures))
    for axis, measure in zip(axes, measures, strict=True):
        rows = points[points["measure"] == measure]
        for place, (name, line) in enumerate(rows.groupby("method", sort=False)):
            colour, marker = (GREY, BLUE, VERMILION, GREEN)[place % 4], "Dos^"[place % 4]
            spread = [line["value"] - line["low"], line["high"] - line["value"]]
            root = line["kl"].clip(lower=0) ** 0.5  # an estimate of nearly no KL can fall below 0
            axis.errorbar(root, line["value"], spread, color=colour, marker=marker, capsize=3, label=name)
        axis.set(xlabel="root of the KL from the start (nats per report)", ylabel=f"{measure}, 95 % interval")
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def costs(table: "pd.DataFrame") -> "Figure":
    """One panel per column, one bar per row, each bar with its value."""
    figure, axes = _axes(
        "What does each method cost?", width=11.0, height=1.4 + 0.4 * len(table), columns=table.shape[1]
    )
    for axis, column in zip(axes, table, strict=True):
        bars = axis.barh(range(len(table)), table[column], 0.6, color=BLUE)
        axis.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2)
        axis.set_yticks(range(len(table)), table.index if axis is axes[0] else [""] * len(table))
        axis.set(xlabel=column)
        axis.margins(x=0.2)
        axis.invert_yaxis()
    return figure


# -- 09 rounds ----------------------------------------------------------------------------------------------------


def by_round(frame: "pd.DataFrame", *, title: str) -> "Figure":
    """One panel per measure, one line per series, by round: columns round, measure, series, value, low, high."""
    measures = list(dict.fromkeys(frame["measure"]))
    figure, axes = _axes(title, width=0.6 + 3.6 * len(measures), columns=len(measures))
    for axis, measure in zip(axes, measures, strict=True):
        rows = frame[frame["measure"] == measure]
        for place, (name, line) in enumerate(rows.groupby("series", sort=False)):
            colour, marker = (BLUE, VERMILION, GREEN, PURPLE)[place % 4], "os^D"[place % 4]
            spread = [line["value"] - line["low"], line["high"] - line["value"]]
            at = line["round"] + 0.06 * place  # side by side, so that no interval hides another
            axis.errorbar(at, line["value"], spread, color=colour, marker=marker, capsize=3, label=name)
        axis.set(xlabel="round", ylabel="95 % interval", xticks=sorted(set(rows["round"])))
        axis.set_title(measure, fontsize=9)
        if "share" in measure:
            axis.set_ylim(-0.02, 1.02)
        axis.legend(fontsize=8, frameon=False)
    return figure


# -- 10 blind test ------------------------------------------------------------------------------------------------


def power(planned: "pd.DataFrame", *, n: int, target: float) -> "Figure":
    """Draw power by number of documents, one line per column (a significance level); `n` is the number taken."""
    figure, (axis,) = _axes("How many documents does the question need?")
    for column, colour, line in zip(planned, (BLUE, VERMILION, GREEN), ("-", "--", ":"), strict=False):
        axis.plot(planned.index, planned[column], color=colour, linestyle=line, label=column)
    axis.axhline(target, color=GREY, linewidth=1, linestyle=":")
    axis.axvline(n, color="black", linewidth=1)
    axis.annotate(f" taken: {n}", (n, 0.03), xycoords=("data", "axes fraction"))
    axis.set(xlabel="documents", ylabel="power of the sign test", ylim=(-0.02, 1.02))
    axis.legend(fontsize=8, frameon=False)
    return figure


def outcomes(table: "pd.DataFrame", *, title: str) -> "Figure":
    """One bar per row: shares won, tied and lost (`win`, `tie`, `loss`), with the intervals of first and last."""
    figure, (axis,) = _axes(title, width=8.0, height=1.5 + 0.45 * len(table))
    for height, (_, row) in enumerate(table.iterrows()):
        left = 0.0
        for share, colour in (("win", BLUE), ("tie", YELLOW), ("loss", VERMILION)):
            axis.barh(height, row[share], 0.6, left=left, color=colour, label=share if height == 0 else None)
            axis.text(left + row[share] / 2, height, f"{row[share]:.0%}", ha="center", va="center", fontsize=8)
            left += row[share]
        axis.plot([row["win_low"], row["win_high"]], [height - 0.2] * 2, color="black", linewidth=1.5)
        axis.plot([1 - row["loss_high"], 1 - row["loss_low"]], [height + 0.2] * 2, color="black", linewidth=1.5)
    axis.set_yticks(range(len(table)), table.index)
    axis.set(xlabel="share of documents; black: 95 % interval of each border", xlim=(0, 1))
    axis.set_ylim(len(table) - 0.5, -0.5)
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def fault_rates(frame: "pd.DataFrame") -> "Figure":
    """One group of points per fault, one point per system: columns name, measure, value, low, high."""
    names, measures = list(dict.fromkeys(frame["name"])), list(dict.fromkeys(frame["measure"]))
    figure, (axis,) = _axes("Which faults went away?", width=8.0, height=1.4 + 0.5 * len(measures))
    for place, (name, colour, marker) in enumerate(zip(names, (GREY, SKY, BLUE, VERMILION), "Dso^", strict=False)):
        rows = frame[frame["name"] == name].set_index("measure").loc[measures]
        spread = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
        height = [row + 0.2 * (place - (len(names) - 1) / 2) for row in range(len(measures))]
        axis.errorbar(rows["value"], height, xerr=spread, color=colour, marker=marker, linestyle="", label=name)
    axis.set_yticks(range(len(measures)), measures)
    axis.set(xlabel="faults per document, 95 % interval", xlim=(0, None))
    axis.invert_yaxis()
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


# -- 11 inference -------------------------------------------------------------------------------------------------


def waterfall(steps: "pd.DataFrame", *, floor: float) -> "Figure":
    """One bar a step with its factor over the step `against`: name, against, documents_per_hour, factor, low, high.

    `floor` is what the machine could do at most, in documents an hour.
    """
    figure, (axis,) = _axes("Which step makes it fast?", width=9.0, height=1.4 + 0.42 * len(steps))
    rates = dict(zip(steps["name"], steps["documents_per_hour"], strict=True))
    for height, row in enumerate(steps.itertuples()):
        start = rates.get(row.against, row.documents_per_hour)
        left, right = sorted((start, row.documents_per_hour))
        colour = GREY if row.against not in rates else BLUE if row.documents_per_hour >= start else VERMILION
        if row.against in rates:
            axis.barh(height, right - left, 0.6, left=left, color=colour)
        axis.plot(row.documents_per_hour, height, marker="D", color="black", markersize=4)
        spread = "" if row.low != row.low else f" ({row.low:.2g} to {row.high:.2g})"
        factor = "" if row.against not in rates else f"  × {row.factor:.2g}{spread}"
        axis.text(right, height, f"  {row.documents_per_hour:,.0f}{factor}", va="center", fontsize=8)
    axis.axvline(floor, color=GREEN, linestyle="--", label=f"physical floor: {floor:,.0f} documents an hour")
    axis.set_yticks(range(len(steps)), steps["name"])
    axis.set_ylim(len(steps) - 0.5, -0.5)
    smallest = min(rates.values())
    axis.set(xscale="log", xlabel="documents an hour (log scale); factor over its comparison, lowest to highest turn")
    axis.set_xlim(smallest / 2, 30 * max(floor, *rates.values()))
    axis.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def batch_sweep(swept: "pd.DataFrame", *, knee: int) -> "Figure":
    """Draw throughput and the time of a token by batch size: rows of `speed.sweep`; `knee` is marked."""
    figure, axes = _axes("How many documents at once?", width=9.0, columns=2)
    labels = {"documents_per_hour": "documents an hour", "token_ms_p95": "time of a token, 95th percentile (ms)"}
    for axis, (column, label), colour in zip(axes, labels.items(), (BLUE, VERMILION), strict=True):
        axis.plot(swept["batch_size"], swept[column], color=colour, marker="o")
        axis.axvline(knee, color="black", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(swept["batch_size"], [str(size) for size in swept["batch_size"]])
        axis.set(xlabel="documents in a batch", ylabel=label, ylim=(0, None))
    axes[0].annotate(f" knee: {knee}", (knee, 0.05), xycoords=("data", "axes fraction"))
    return figure


# -- 12 drift -----------------------------------------------------------------------------------------------------

_LINES = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (SKY, "P"), (GREY, "X"))


def watched(frame: "pd.DataFrame", *, title: str, change: float | None = None, x: str = "end") -> "Figure":
    """One panel a `watch`: each detector's statistic over its threshold, by the column `x`; rows of `drift.watch`.

    `change` marks where a drift was planted.
    """
    panels = list(dict.fromkeys(frame["watch"]))
    figure, axes = _axes(title, width=1.0 + 4.6 * len(panels), height=3.9, columns=len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        groups = frame[frame["watch"] == panel].groupby("detector", sort=False)
        for (name, rows), (colour, marker) in zip(groups, _LINES, strict=False):
            ratio = rows["statistic"] / rows["threshold"]
            axis.plot(rows[x], ratio, color=colour, marker=marker, markersize=4, linewidth=1, label=name)
        axis.axhline(1, color="black", linewidth=1)
        if change is not None:
            axis.axvline(change, color=GREY, linewidth=1.5, linestyle="--", label="planted change")
        axis.set(xlabel="documents" if x == "end" else x, ylabel=f"statistic / threshold, {panel}")
        axis.legend(fontsize=7, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        axis.tick_params(axis="x", labelrotation=0 if x == "end" else 30)
    return figure


def detection_delays(table: "pd.DataFrame", *, limit: float) -> "Figure":
    """One panel a planted drift: median delay of each detector with its interval, and the share that it missed.

    Rows of `drift.summary`; `limit` is the largest number of documents that a detector was watched for.
    """
    kinds, names = list(dict.fromkeys(table["drift"])), list(dict.fromkeys(table["detector"]))
    title = "How many documents until an alarm? (share of misses at the right)"
    figure, axes = _axes(title, width=2.4 + 2.7 * len(kinds), height=1.2 + 0.3 * len(names), columns=len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        rows = table[table["drift"] == kind].set_index("detector").loc[names]
        for height, (name, row) in enumerate(rows.iterrows()):
            colour = VERMILION if name.startswith("any") else BLUE
            low, high = min(row["low"], limit), min(row["high"], limit)
            axis.plot([low, high], [height, height], color=colour, linewidth=1.5)
            if row["median"] <= limit:
                axis.plot(row["median"], height, marker="o", color=colour)
            axis.text(
                1.02, height, f"{row['missed']:.0%}", transform=axis.get_yaxis_transform(), va="center", fontsize=7
            )
        axis.set_title(kind, fontsize=9, loc="left")
        axis.set(xscale="log", xlabel="documents, 95 % interval", xlim=(10, limit * 1.1), ylim=(len(names) - 0.5, -0.5))
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names))
    return figure


# -- 13 benchmarks ------------------------------------------------------------------------------------------------


def stacked(frame: "pd.DataFrame", *, parts: "list[str]", unit: str, title: str) -> "Figure":
    """One panel a `size`, one bar a `side`, stacked from the columns `parts`, which are in `unit`."""
    sizes, sides = list(dict.fromkeys(frame["size"])), list(dict.fromkeys(frame["side"]))
    figure, axes = _axes(title, width=2.0 + 3.6 * len(sizes), height=1.8 + 0.4 * len(sides), columns=len(sizes))
    for axis, size in zip(axes, sizes, strict=True):
        rows = frame[frame["size"] == size].set_index("side").loc[sides]
        left = rows[parts[0]] * 0
        for part, colour in zip(parts, (SKY, YELLOW, BLUE, GREY), strict=False):
            axis.barh(range(len(sides)), rows[part], 0.6, left=left, color=colour, label=part)
            left = left + rows[part]
        axis.set_yticks(range(len(sides)), sides if axis is axes[0] else [""] * len(sides))
        axis.invert_yaxis()
        axis.set_axisbelow(True)
        axis.set(xlabel=f"{unit}, model of {size} parameters", xlim=(0, None))
    axes[0].legend(fontsize=8, frameon=False, ncols=len(parts), loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return figure
