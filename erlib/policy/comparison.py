"""Policies side by side: reward against distance from the start, what each costs, and how far a round has moved.

A policy's samples are rows of `alternatives.draw`. Those of several policies come as a mapping from (method, step) to
such a frame; ("start", 0) is the checkpoint that all of them started from, step 0 of every curve.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from erlib.lm import models
from erlib.lm.packing import AT_ONCE, Packed, Rollout, causal_lm, last_states, next_logits, pack_for, take
from erlib.policy import alternatives
from erlib.task import metrics

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from erlib.policy.alternatives import Trained

START = ("start", 0)
# What a compact report of a document is truly worth, by aspect, such as `panel.Panel.utility`: (document, report).
Utility = Callable[[str, str], Mapping[str, float]]


def valued(drawn: "pd.DataFrame", texts: Mapping[str, str], utility: Utility | None) -> "pd.DataFrame":
    """The same rows with the column `utility`, summed over the aspects; nan throughout where nobody knows it.

    `texts` are the documents' by id.
    """
    if utility is None:
        return drawn.assign(utility=np.nan)
    rows = zip(drawn["document"], drawn["text"], strict=True)
    return drawn.assign(utility=[sum(utility(texts[document], report).values()) for document, report in rows])


def curves(
    drawn: "Mapping[tuple[str, int], pd.DataFrame]",
    *,
    kl: Mapping[tuple[str, int], metrics.Interval],
    measures: Mapping[str, str],
    best_of: Sequence[int],
    seed: int,
) -> "pd.DataFrame":
    """What each method gains for its distance: columns method, step, kl (nats), measure, value, low, high.

    `kl` holds the distance of every method and step from the start (`sampled_kl`), whose own is 0. One row per method,
    step and measure, with 95 % intervals over documents; `measures` gives columns their titles. Best-of-n is of the
    start's samples, n its step, the upper bound of its KL its place.
    """
    import pandas as pd

    rows = []

    def add(method: str, step: int, frame: "pd.DataFrame", *, nats: float, n: int) -> None:
        for column, title in measures.items():
            values = alternatives.expected_best(frame, column, n=n)
            rows.append((method, step, nats, title, *metrics.bootstrap_mean(values, seed=seed)))

    start = drawn[START]
    for method in ("best of n", *dict.fromkeys(method for method, _ in drawn if method != START[0])):
        add(method, START[1], start, nats=0.0, n=1)
    for n in best_of:
        add("best of n", n, start, nats=alternatives.best_of_n_kl(n), n=n)
    for (method, step), frame in drawn.items():
        if method != START[0]:
            add(method, step, frame, nats=kl[method, step].value, n=1)
    table = pd.DataFrame(rows, columns=["method", "step", "kl", "measure", "value", "low", "high"])
    return table.sort_values(["method", "measure", "step"], kind="stable", ignore_index=True)


def per_document(ended: "Mapping[str, pd.DataFrame]", start_greedy: "pd.DataFrame", *, best_of: int) -> "pd.DataFrame":
    """What `alternatives.diagnose` asks for, one row per document: mean reward and utility of each method's samples.

    `ended` holds the samples of "start" and of every method at the end of its training, with `utility` (`valued`).
    """
    import pandas as pd

    columns = {}
    for name, frame in ended.items():
        for column in ("reward", "utility"):
            columns[f"{name}, {column}"] = alternatives.expected_best(frame, column, n=1)
    columns["start greedy, utility"] = start_greedy["utility"].to_numpy()
    start = ended["start"]
    for by, name in (("reward", "reward"), ("utility", "truth")):
        known = start["utility"].notna().all()
        found = alternatives.expected_best(start, "utility", n=best_of, by=by) if known else np.nan
        columns[f"best-of-n by {name}, utility"] = found
    return pd.DataFrame(columns)


# -- what it costs ------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Seconds of training, tokens of the completions that were learnt from, and peak memory in MiB."""

    seconds: float
    tokens: float
    peak_mb: float


def cost(trained: "Trained") -> Cost:
    """What a training of DPO or RLOO took."""
    return Cost(trained.seconds, trained.tokens, trained.peak_mb)


def cost_of_ppo(log: "pd.DataFrame", *, completions: int) -> Cost:
    """What phase 07 took, from its log of `completions` per step: the sum of all `seconds_` columns, and mean lengths.

    A last row that only measures, without an update, is left out.
    """
    steps = log[log["seconds_update"].notna()]
    seconds = steps.filter(like="seconds_").sum().sum()
    return Cost(float(seconds), float(steps["length"].sum() * completions), float(steps["peak_memory_mb"].max()))


def costs(by_method: Mapping[str, Cost]) -> "pd.DataFrame":
    """Lay costs out for reading, one row per method."""
    import pandas as pd

    columns = ["seconds", "completion tokens", "peak memory (MiB)"]
    return pd.DataFrame.from_dict(by_method, orient="index", columns=columns)


# -- how far it has moved -----------------------------------------------------------------------------------------


def sampled_kl(
    policy: "PreTrainedModel",
    reference: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[models.Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> np.ndarray:
    """KL of a policy from a reference in nats per report, (N,), at temperature 1: of one sample for each of N prompts.

    At each token of the sample the KL of the two whole distributions, summed over its tokens: without bias, never
    negative, and of far less variance than what is taken from the sampled tokens alone (2504.10637). The policy may be
    a `PeftModel` with an adapter switched on.
    """
    sampled = models.generate(
        policy,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=1.0,
        seed=seed,
    )
    rows = [
        Rollout(tuple(models.encode_prompt(tokenizer, prompt)), completion.ids)
        for prompt, completion in zip(prompts, sampled, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt) + len(rows[index].ids))
    found = np.empty(len(rows))
    with models.evaluating(policy), models.evaluating(reference):
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            packed = pack_for(policy, [rows[index] for index in some], pad=tokenizer.pad_token_id)
            nats = _nats(policy, reference, packed)
            by_token = torch.zeros_like(packed.mask, dtype=nats.dtype).masked_scatter(packed.mask.bool(), nats)
            found[some] = by_token.sum(dim=1).cpu().numpy()
    return found


def _nats(policy: "PreTrainedModel", reference: "PreTrainedModel", packed: Packed) -> torch.Tensor:
    """KL of the two whole distributions at each completion token (tokens,), float64, some tokens at a time."""
    two = [causal_lm(model) for model in (policy, reference)]
    places = packed.before[packed.mask.bool()]
    states = [take(last_states(inner, packed), places) for inner in two]
    size = max(1, AT_ONCE // (4 * two[0].config.get_text_config().vocab_size))  # numbers of twice the size, twice
    found = []
    for part in zip(*(each.split(size) for each in states), strict=True):
        own, other = (
            torch.log_softmax(next_logits(inner, some).double(), dim=-1) for inner, some in zip(two, part, strict=True)
        )
        found.append((own.exp() * (own - other)).sum(dim=-1))
    return torch.cat(found)
