"""Choose documents that are unlike each other: embeddings, similarity graph, cut-off sweep, one per component.

The steps, in the order in which notebook 02 takes them:

1. `embed`             texts → unit rows, with a sentence-transformers model or a static one fitted on the texts;
2. `neighbours`        rows → approximate nearest neighbours (Annoy), whose `recall` is measured against brute force;
3. `edges`, `sweep`    neighbours → edges; share of the giant component and of isolated nodes at every cut-off;
4. `choose_cutoff`     the lowest cut-off at which the giant component is gone, hence the fewest isolated nodes;
5. `graph`, `components`, `select`   networkx graph at that cut-off → components → one document of each;
6. `compare_with_random`, `gain`     is the choice more diverse than as many documents drawn at random?

A cut-off is a cosine similarity: edges at or above it join documents.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from erlib.task.metrics import Interval

if TYPE_CHECKING:
    import networkx
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

BLOCK = 1_000  # rows of a similarity matrix in memory at once: 1,000 x 100,000 float32 are 400 MB


# -- embeddings ---------------------------------------------------------------------------------------------------


def fit_static(texts: Sequence[str], *, dimensions: int, vocabulary: int = 30_000, seed: int) -> "SentenceTransformer":
    """Fit a static model on the texts: one vector per word, the mean over a text's words being its embedding.

    A word's vector is its row of the right singular vectors of the TF-IDF matrix (latent semantic analysis), at unit
    length so that rare words keep a direction of their own, times its inverse document frequency. Words met once join
    no two texts and get a zero vector; punctuation is left out. A small corpus gives fewer dimensions than asked for.
    Where half of the texts have not two words that others have, as emoji and scripts without blanks do, characters
    stand for words. Raises ValueError where even they are too few.
    """
    from scipy.sparse import csr_matrix
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.utils.extmath import randomized_svd

    tokenizer = _vocabulary(texts, vocabulary, characters=False)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    unknown = tokenizer.token_to_id("[UNK]")
    if np.median([sum(word != unknown for word in row) for row in ids]) < 2:
        tokenizer = _vocabulary(texts, vocabulary, characters=True)
        ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    words = tokenizer.get_vocab_size()
    dimensions = min(dimensions, words - 1, len(texts) - 1)
    if dimensions < 2:
        raise ValueError(f"{words - 1} words occur twice in {len(texts)} texts: too few to fit an embedding on")

    indptr = np.cumsum([0, *map(len, ids)])
    columns = np.fromiter((word for row in ids for word in row), dtype=np.int64, count=indptr[-1])
    known = (columns != unknown).astype(np.float32)
    counts = csr_matrix((known, columns, indptr), shape=(len(texts), words))  # (N, V), repeated columns add up
    counts.sum_duplicates()
    counts.eliminate_zeros()
    tfidf = TfidfTransformer()
    _, _, right = randomized_svd(tfidf.fit_transform(counts), dimensions, n_iter=4, random_state=seed)
    weights = (tfidf.idf_ / np.linalg.norm(right, axis=0).clip(min=1e-12))[:, None] * right.T  # (V, d)
    weights[unknown] = 0  # its row is rounding noise, which unit length would blow up
    static = StaticEmbedding(tokenizer, embedding_weights=weights.astype(np.float32))
    return SentenceTransformer(modules=[static, Normalize()], device="cpu")


def _vocabulary(texts: Sequence[str], size: int, *, characters: bool) -> "Tokenizer":
    """The words, or the characters, that occur twice."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # lower case, no accents, Chinese characters as words
    pieces = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("removed")]
    if characters:
        pieces.append(pre_tokenizers.Split(Regex("."), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    trainer = trainers.WordLevelTrainer(vocab_size=size, min_frequency=2, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def embed(
    texts: Sequence[str],
    *,
    model: str = "static",
    dimensions: int = 128,
    batch_size: int = 512,
    allow_download: bool = False,
    seed: int,
) -> np.ndarray:
    """Embed texts as unit rows (N, d) float32; `model`: "static" (fitted here) or a sentence-transformers name or path.

    A text without any known word has no direction: it gets a random one, so that it is near to nothing.
    """
    from sentence_transformers import SentenceTransformer

    if model == "static":
        encoder = fit_static(texts, dimensions=dimensions, seed=seed)
    else:
        encoder = SentenceTransformer(model, local_files_only=not allow_download)
    rows = encoder.encode(
        list(texts), batch_size=batch_size, convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
    ).astype(np.float32)
    lost = np.linalg.norm(rows, axis=1) < 0.5  # all others have length 1
    directions = np.random.default_rng(seed).normal(size=(int(lost.sum()), rows.shape[1]))
    rows[lost] = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return _unit_rows(rows)


def _unit_rows(embeddings: np.ndarray) -> np.ndarray:
    """Pass on an (N, d) matrix of finite unit rows, refuse any other: Annoy takes NaN and odd lengths in silence."""
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"embeddings must be a matrix of at least two rows, not of shape {embeddings.shape}")
    if not np.isfinite(embeddings).all():
        bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        raise ValueError(f"embeddings must be finite: {len(bad)} rows are not, the first is row {bad[0]}")
    lengths = np.linalg.norm(embeddings, axis=1)
    if np.abs(lengths - 1).max() > 1e-3:
        raise ValueError(f"embeddings must be unit rows: row {np.abs(lengths - 1).argmax()} is not")
    return embeddings


# -- neighbours ---------------------------------------------------------------------------------------------------


class Neighbours(NamedTuple):
    """The k nearest other rows of every row, nearest first; where the search found fewer: id -1, similarity -1."""

    ids: np.ndarray  # (N, k) int64
    similarities: np.ndarray  # (N, k) float32, cosine


def neighbours(embeddings: np.ndarray, *, k: int, n_trees: int, search_k: int, seed: int) -> Neighbours:
    """Find the k nearest other rows of every unit row with an Annoy index; the same seed gives the same bytes.

    `search_k` is the number of candidates looked at for one row: the lever between recall and time. Similarities are
    recomputed in float32, because Annoy is built with `-ffast-math` and works with distances.
    """
    from annoy import AnnoyIndex

    n, d = _unit_rows(embeddings).shape
    if not 1 <= k < n:
        raise ValueError(f"k must lie between 1 and {n - 1}, the number of other rows; got {k}")
    index = AnnoyIndex(d, "angular")
    index.set_seed(seed + 1)  # Annoy replaces seed 0 by a default of its own
    for row, vector in enumerate(embeddings):
        index.add_item(row, vector)
    index.build(n_trees, n_jobs=1)  # more jobs build other trees on every run

    ids = np.full((n, k), -1, dtype=np.int64)
    similarities = np.full((n, k), -1, dtype=np.float32)
    for row in range(n):
        found = np.array([i for i in index.get_nns_by_item(row, k + 1, search_k) if i != row][:k], dtype=np.int64)
        cosines = embeddings[found] @ embeddings[row]
        order = np.lexsort((found, -cosines))
        ids[row, : len(found)], similarities[row, : len(found)] = found[order], cosines[order]
    return Neighbours(ids, similarities)


def recall(embeddings: np.ndarray, found: Neighbours, *, queries: int, seed: int) -> np.ndarray:
    """Measure the share of the true k nearest that was found, for a random sample of rows: (queries,) float.

    Truth is brute force. A found row as near as the k-th true one counts, so equally near duplicates are no misses.
    """
    n, k = found.ids.shape
    rows = np.random.default_rng(seed).choice(n, size=min(queries, n), replace=False)
    shares = []
    for block in np.array_split(rows, -(-len(rows) // BLOCK)):
        cosines = embeddings[block] @ embeddings.T  # (B, N)
        cosines[np.arange(len(block)), block] = -2
        kth = np.partition(cosines, n - k, axis=1)[:, n - k]
        shares.append((found.similarities[block] >= kth[:, None] - 1e-6).mean(axis=1))
    return np.concatenate(shares)


# -- similarity graph ---------------------------------------------------------------------------------------------


def edges(found: Neighbours) -> pd.DataFrame:
    """List each pair of neighbours once: columns source < target (row numbers) and similarity, most similar first."""
    n, k = found.ids.shape
    rows, columns = np.repeat(np.arange(n), k), found.ids.ravel()
    pairs = pd.DataFrame(
        {
            "source": np.minimum(rows, columns),
            "target": np.maximum(rows, columns),
            "similarity": found.similarities.ravel(),
        }
    )
    pairs = pairs[pairs["source"] >= 0].sort_values(
        ["similarity", "source", "target"], ascending=[False, True, True], kind="stable"
    )
    return pairs.drop_duplicates(["source", "target"], ignore_index=True)


def sweep(pairs: pd.DataFrame, n: int, cutoffs: Sequence[float]) -> pd.DataFrame:
    """Describe the graph of n nodes at every cut-off: cutoff, giant_share, isolated_share, components.

    `giant_share` and `isolated_share` are the shares of nodes in the largest component and in components of one node.
    The maximum spanning forest has the whole graph's components at every cut-off, so only its edges are walked.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

    # 2 - cosine is positive and grows as similarity falls; scipy reads a weight of 0 as "no edge".
    weights = 2.0 - pairs["similarity"].to_numpy(dtype=np.float64)
    ends = (pairs["source"].to_numpy(), pairs["target"].to_numpy())
    forest = minimum_spanning_tree(csr_matrix((weights, ends), shape=(n, n))).tocoo()
    rows = []
    for cutoff in cutoffs:
        kept = 2.0 - forest.data >= cutoff
        adjacency = csr_matrix((forest.data[kept], (forest.row[kept], forest.col[kept])), shape=(n, n))
        count, labels = connected_components(adjacency, directed=False)
        sizes = np.bincount(labels)
        rows.append((float(cutoff), sizes.max() / n, (sizes == 1).sum() / n, count))
    return pd.DataFrame(rows, columns=["cutoff", "giant_share", "isolated_share", "components"])


def choose_cutoff(swept: pd.DataFrame, *, giant_limit: float = 0.01) -> float:
    """Choose the lowest cut-off whose giant component is below the limit: above it only isolated nodes are added.

    Where the sweep does not enclose that point its end decides: the lowest cut-off if no component was ever giant, the
    highest if one always is.
    """
    swept = swept.sort_values("cutoff")
    below = swept[swept["giant_share"] < giant_limit]
    return float(swept["cutoff"].iloc[-1] if below.empty else below["cutoff"].iloc[0])


def least_giant(giant_limit: float, n: int) -> float:
    """The share of n nodes from which a component counts as giant: `giant_limit`, and never fewer than five nodes."""
    return max(giant_limit, 5 / n)


def graph(pairs: pd.DataFrame, n: int, cutoff: float) -> "networkx.Graph":
    """Build the similarity graph of n nodes with the edges at or above the cut-off, weighted by similarity."""
    import networkx

    kept = pairs[pairs["similarity"].to_numpy(dtype=np.float64) >= cutoff]
    similarity_graph = networkx.Graph()
    similarity_graph.add_nodes_from(range(n))
    similarity_graph.add_weighted_edges_from(kept.itertuples(index=False, name=None), weight="similarity")
    return similarity_graph


def components(similarity_graph: "networkx.Graph") -> list[list[int]]:
    """List the connected components, each in ascending order, ordered by their first node."""
    import networkx

    return sorted(sorted(component) for component in networkx.connected_components(similarity_graph))


def select(groups: Sequence[Sequence[int]], embeddings: np.ndarray) -> np.ndarray:
    """Choose the medoid of each group, the row most similar on average to its group: (groups,) row numbers."""
    return np.array([group[int((embeddings[group] @ embeddings[group].sum(axis=0)).argmax())] for group in groups])


# -- diversity ----------------------------------------------------------------------------------------------------


def nearest_distance(embeddings: np.ndarray, *, queries: int, seed: int) -> float:
    """Mean cosine distance to the nearest other row, over `queries` rows drawn with replacement; 0: all have a copy."""
    _unit_rows(embeddings)
    rows = np.random.default_rng(seed).integers(len(embeddings), size=queries)
    nearest = []
    for block in np.array_split(rows, -(-queries // BLOCK)):
        cosines = embeddings[block] @ embeddings.T  # (B, N)
        cosines[np.arange(len(block)), block] = -2
        nearest.append(cosines.max(axis=1))
    return float(1 - np.concatenate(nearest).mean())


def vendi_score(embeddings: np.ndarray) -> float:
    """Effective number of directions among unit rows, 1 to d: exp of the entropy of the cosine kernel's eigenvalues.

    Friedman and Dieng, 2210.02410. The (N, N) kernel over N has the non-zero eigenvalues of the (d, d) second moments.
    """
    eigenvalues = np.linalg.eigvalsh(embeddings.T.astype(np.float64) @ embeddings / len(embeddings))
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))


def trigrams(texts: Sequence[str]) -> list[np.ndarray]:
    """Number the word trigrams of each text, case-folded: one int array per text, equal trigrams with equal numbers.

    A text of fewer than three words, as scripts without blanks have, gives trigrams of characters.
    """
    numbers: dict[tuple[str, str, str], int] = {}
    rows = []
    for text in texts:
        words = text.casefold().split()
        words = words if len(words) >= 3 else list(text.casefold())
        met = zip(words, words[1:], words[2:], strict=False)
        rows.append(np.array([numbers.setdefault(trigram, len(numbers)) for trigram in met], dtype=np.int64))
    return rows


def distinct_share(numbered: Sequence[np.ndarray]) -> float:
    """Share of different ones among all trigrams (distinct-3 of Li et al., 1510.03055); 0 where there is none."""
    joined = np.concatenate(numbered)
    return np.count_nonzero(np.bincount(joined)) / len(joined) if len(joined) else 0.0


def compare_with_random(
    embeddings: np.ndarray, texts: Sequence[str], selected: np.ndarray, *, draws: int, queries: int = 500, seed: int
) -> pd.DataFrame:
    """Measure the selected rows and as many random ones, `draws` times: draw, set, and one column per measure.

    Every draw takes a new random set and new query rows in both. `nearest_distance` and `vendi_score` see the
    embeddings that the selection was made with; `distinct_trigrams` sees the texts alone.
    """
    rng = np.random.default_rng(seed)
    numbered = trigrams(texts)
    rows = []
    for draw in range(draws):
        random = rng.choice(len(embeddings), size=len(selected), replace=False)
        for name, chosen in (("selected", selected), ("random", random)):
            subset = embeddings[chosen]
            measures = {
                "nearest_distance": nearest_distance(subset, queries=queries, seed=seed + draw),
                "vendi_score": vendi_score(subset),
                "distinct_trigrams": distinct_share([numbered[row] for row in chosen]),
            }
            rows.append({"draw": draw, "set": name, **measures})
    return pd.DataFrame(rows)


def gain(compared: pd.DataFrame, measure: str) -> Interval:
    """Selected minus random: mean over the draws of `compare_with_random`, with the range of 95 % of them."""
    by_set = compared.pivot(index="draw", columns="set", values=measure)
    differences = by_set["selected"] - by_set["random"]
    low, high = np.percentile(differences, [2.5, 97.5])
    return Interval(float(differences.mean()), float(low), float(high))


def leak_share(embeddings: np.ndarray, rows: Sequence[int], others: Sequence[int], *, cutoff: float) -> float:
    """Share of `rows` with a row among `others` at or above the cut-off, by brute force: what the index has missed."""
    leaks = 0
    for block in np.array_split(np.asarray(rows), -(-len(rows) // BLOCK)):
        leaks += int(((embeddings[block] @ embeddings[others].T).max(axis=1) >= cutoff).sum())
    return leaks / len(rows)
