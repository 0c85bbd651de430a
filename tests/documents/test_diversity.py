"""Diversity: against brute force, networkx and closed forms."""

import itertools

import networkx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erlib.documents import diversity

STORIES = (
    "the battery maker {} opens a plant in the harbour town {}",
    "chief executive {} leaves the rail operator {} after a decade",
    "a review of the headphones {} bought at the fair {}",
    "the bakery chain {} sues its flour supplier {} over late deliveries",
)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def clusters() -> np.ndarray:
    """600 unit rows (600, 16): 120 tight clusters of 5, the rows of cluster c at 5c to 5c + 4."""
    rng = np.random.default_rng(0)
    return unit(np.repeat(rng.normal(size=(120, 16)), 5, axis=0) + 0.15 * rng.normal(size=(600, 16)))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """200 texts: each story is told with 50 pairs of names, every name in two texts."""
    return [story.format(f"Name{n // 2}", f"Other{n // 2}") for story in STORIES for n in range(50)]


def brute_force(rows: np.ndarray, k: int) -> diversity.Neighbours:
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -2)
    ids = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return diversity.Neighbours(ids, np.take_along_axis(cosines, ids, axis=1))


class NaiveUnionFind:
    """The oracle of the sweep: no ranks, no path compression, all edges at every cut-off."""

    def __init__(self, n: int):
        self.parent = list(range(n))

    def find(self, node: int) -> int:
        while self.parent[node] != node:
            node = self.parent[node]
        return node

    def join(self, a: int, b: int) -> None:
        self.parent[self.find(a)] = self.find(b)

    def sizes(self) -> list[int]:
        roots = [self.find(node) for node in range(len(self.parent))]
        return [roots.count(root) for root in set(roots)]


# -- embeddings ---------------------------------------------------------------------------------------------------


def test_embeddings_are_unit_rows_and_repeat_exactly(texts):
    first, second = (diversity.embed(texts, dimensions=32, seed=3) for _ in range(2))
    assert first.shape == (200, 32) and first.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    assert first.tobytes() == second.tobytes()


def test_texts_about_the_same_names_are_nearest_to_each_other(texts):
    rows = diversity.embed(texts, dimensions=64, seed=0)
    nearest = brute_force(rows, 1).ids[:, 0]
    assert (nearest == np.arange(200) ^ 1).mean() > 0.95  # texts 2n and 2n + 1 share their names
    same, other = rows[0] @ rows[2], rows[0] @ rows[60]  # one story with other names, another story
    assert same > other + 0.2


def test_word_vectors_are_idf_long_and_point_along_right_singular_vectors(texts):
    module = diversity.fit_static(texts, dimensions=16, seed=0)[0]
    words = [word for word, _ in sorted(module.tokenizer.get_vocab().items(), key=lambda item: item[1])]
    counts = np.array([[text.lower().split().count(word) for word in words] for text in texts], dtype=float)
    idf = np.log((1 + 200) / (1 + (counts > 0).sum(axis=0))) + 1
    tfidf = counts * idf
    tfidf /= np.linalg.norm(tfidf, axis=1, keepdims=True)
    right = np.linalg.svd(tfidf, full_matrices=False)[2][:16]  # (16, V)
    expected = idf * right / np.maximum(np.linalg.norm(right, axis=0), 1e-12)
    fitted = module.embedding.weight.detach().numpy()
    known = np.array([word != "[UNK]" for word in words])
    # The singular vectors are unique up to rotation within equal singular values: compare what does not depend on it.
    frequent = known & (counts.sum(axis=0) >= 50)
    np.testing.assert_allclose(np.linalg.norm(fitted[known], axis=1), idf[known], rtol=1e-4)
    np.testing.assert_allclose(
        fitted[frequent] @ fitted[frequent].T, (expected.T @ expected)[np.ix_(frequent, frequent)], atol=0.15
    )
    assert not fitted[~known].any()


def test_case_accents_and_punctuation_do_not_change_an_embedding(texts):
    encoder = diversity.fit_static(texts, dimensions=16, seed=0)
    plain, dressed = encoder.encode(["the rail operator name3", "The rail, OPERATOR: Námë3!"])
    np.testing.assert_allclose(plain, dressed, atol=1e-6)


def test_a_text_without_known_words_is_near_to_nothing(texts):
    rows = diversity.embed([*texts, "zyx wvu", "!!!"], dimensions=64, seed=0)
    cosines = np.abs(rows[200:] @ rows.T)
    cosines[[0, 1], [200, 201]] = 0
    assert cosines.max() < 0.6


def test_few_short_texts_give_fewer_dimensions_and_too_few_are_refused():
    assert diversity.embed(["a b c d", "a b c e", "a d e f", "f b"], dimensions=128, seed=0).shape == (4, 3)
    with pytest.raises(ValueError, match="too few to fit"):
        diversity.embed(["ab", "cd", "ef"], seed=0)


@pytest.mark.parametrize("alphabet", ["😀🎉🚀🔥💧🌍", "สวัสดีครับผมชื่อ"])
def test_where_words_are_no_help_characters_tell_texts_apart(alphabet):
    rng = np.random.default_rng(0)
    halves = [list(alphabet)[: len(alphabet) // 2], list(alphabet)[len(alphabet) // 2 :]]
    texts = ["".join(rng.choice(half, size=9)) for half in halves for _ in range(20)]
    rows = diversity.embed(texts, seed=0)
    cosines = rows @ rows.T
    assert cosines[:20, :20].mean() > cosines[:20, 20:].mean() + 0.3


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (np.ones((3, 4), dtype=np.float32), "unit rows"),
        (np.eye(3, dtype=np.float32)[0], "matrix"),
        (np.where(np.eye(3) > 0, np.nan, 0).astype(np.float32), "finite: 3 rows"),
    ],
)
def test_embeddings_that_annoy_would_take_in_silence_are_refused(rows, reason):
    with pytest.raises(ValueError, match=reason):
        diversity.neighbours(rows, k=1, n_trees=2, search_k=10, seed=0)


# -- neighbours ---------------------------------------------------------------------------------------------------


def test_a_search_through_all_rows_finds_what_brute_force_finds(clusters):
    found = diversity.neighbours(clusters, k=7, n_trees=20, search_k=100_000, seed=0)
    exact = brute_force(clusters, 7)
    np.testing.assert_array_equal(found.ids, exact.ids)
    np.testing.assert_allclose(found.similarities, exact.similarities, atol=1e-6)
    np.testing.assert_array_equal(diversity.recall(clusters, found, queries=600, seed=0), 1)


def test_the_same_seed_finds_the_same_bytes_and_another_seed_other_trees(clusters):
    settings_ = {"k": 5, "n_trees": 1, "search_k": 20}
    first, again, other = (diversity.neighbours(clusters, seed=seed, **settings_) for seed in (4, 4, 5))
    assert first.ids.tobytes() == again.ids.tobytes()
    assert first.similarities.tobytes() == again.similarities.tobytes()
    assert first.ids.tobytes() != other.ids.tobytes()


def test_no_row_is_its_own_neighbour_even_among_copies():
    copies = unit(np.repeat(np.random.default_rng(1).normal(size=(10, 8)), 6, axis=0))
    found = diversity.neighbours(copies, k=4, n_trees=5, search_k=10_000, seed=0)
    assert not (found.ids == np.arange(60)[:, None]).any()
    assert (found.ids // 6 == np.arange(60)[:, None] // 6).all()
    # Any of the equally near copies counts as found.
    np.testing.assert_array_equal(diversity.recall(copies, found, queries=60, seed=0), 1)


def test_recall_is_the_share_of_the_true_neighbours(clusters):
    exact = brute_force(clusters, 4)
    ids, similarities = exact.ids.copy(), exact.similarities.copy()
    ids[:, 3], similarities[:, 3] = -1, -1  # lose one of four
    lossy = diversity.Neighbours(ids, similarities)
    np.testing.assert_array_equal(diversity.recall(clusters, lossy, queries=100, seed=0), 0.75)


@pytest.mark.parametrize("k", [0, 600])
def test_k_must_leave_room_for_other_rows(clusters, k):
    with pytest.raises(ValueError, match="between 1 and 599"):
        diversity.neighbours(clusters, k=k, n_trees=2, search_k=10, seed=0)


# -- similarity graph ---------------------------------------------------------------------------------------------


def test_edges_list_each_pair_once_and_leave_out_missing_neighbours():
    found = diversity.Neighbours(np.array([[1, 2], [0, -1], [0, 1]]), np.array([[0.9, 0.4], [0.9, -1], [0.4, 0.2]]))
    assert diversity.edges(found).to_numpy().tolist() == [[0, 1, 0.9], [0, 2, 0.4], [1, 2, 0.2]]


@st.composite
def weighted_graphs(draw) -> tuple[pd.DataFrame, int]:
    n = draw(st.integers(2, 12))
    pairs = draw(st.lists(st.sampled_from(list(itertools.combinations(range(n), 2))), unique=True, max_size=30))
    # Few distinct similarities, so that ties and values equal to a cut-off are common; 1 is a copy, -1 the opposite.
    values = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0])
    rows = [(a, b, draw(values)) for a, b in pairs]
    return pd.DataFrame(rows, columns=["source", "target", "similarity"]).astype({"source": int, "target": int}), n


@settings(max_examples=150, deadline=None)
@given(weighted_graphs())
def test_the_sweep_agrees_with_a_naive_union_find_and_with_networkx(drawn):
    pairs, n = drawn
    cutoffs = [-1.0, 0.1, 0.25, 0.5, 0.6, 1.0]
    swept = diversity.sweep(pairs, n, cutoffs)
    for cutoff, row in zip(cutoffs, swept.itertuples(), strict=True):
        forest = NaiveUnionFind(n)
        for a, b, similarity in pairs.itertuples(index=False):
            if similarity >= cutoff:
                forest.join(a, b)
        sizes = forest.sizes()
        assert (row.cutoff, row.components) == (cutoff, len(sizes))
        assert row.giant_share == max(sizes) / n
        assert row.isolated_share == sizes.count(1) / n
        parts = diversity.components(diversity.graph(pairs, n, cutoff))
        assert sorted(map(len, parts)) == sorted(sizes)
        assert sorted(itertools.chain(*parts)) == list(range(n))
    assert swept["giant_share"].is_monotonic_decreasing
    assert swept["isolated_share"].is_monotonic_increasing


def test_the_graph_keeps_isolated_nodes_and_similarities(clusters):
    pairs = diversity.edges(brute_force(clusters, 4))
    built = diversity.graph(pairs, 600, 0.7)
    assert isinstance(built, networkx.Graph) and built.number_of_nodes() == 600
    assert min(weight for _, _, weight in built.edges(data="similarity")) >= 0.7
    assert diversity.components(built) == [list(range(5 * c, 5 * c + 5)) for c in range(120)]


def swept_table(giant: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"cutoff": [0.5, 0.6, 0.7, 0.8][: len(giant)], "giant_share": giant})


def test_the_lowest_cutoff_without_a_giant_component_is_chosen():
    assert diversity.choose_cutoff(swept_table([0.9, 0.01, 0.009, 0.001])) == 0.7
    assert diversity.choose_cutoff(swept_table([0.9, 0.01, 0.009, 0.001])[::-1], giant_limit=0.02) == 0.6


def test_where_a_sweep_does_not_enclose_the_point_its_end_decides():
    assert diversity.choose_cutoff(swept_table([0.9, 0.8, 0.7, 0.6])) == 0.8
    assert diversity.choose_cutoff(swept_table([0.009, 0.008, 0.007, 0.006])) == 0.5


def test_a_component_of_a_few_documents_is_not_giant_however_small_the_corpus():
    assert diversity.least_giant(0.01, 10_000) == 0.01
    assert diversity.least_giant(0.01, 40) == 0.125  # up to four of them


def test_selection_takes_the_medoid_of_each_component(clusters):
    groups = [list(range(5 * c, 5 * c + 5)) for c in range(120)]
    for group, row in zip(groups, diversity.select(groups, clusters), strict=True):
        means = [np.mean([clusters[i] @ clusters[j] for j in group]) for i in group]
        assert row == group[int(np.argmax(means))]


# -- diversity ----------------------------------------------------------------------------------------------------


def test_nearest_distance_is_the_mean_over_rows(clusters):
    exact = 1 - brute_force(clusters, 1).similarities[:, 0]
    measured = diversity.nearest_distance(clusters, queries=20_000, seed=0)
    assert abs(measured - exact.mean()) < 4 * exact.std() / np.sqrt(20_000)
    copied = np.repeat(clusters[:50], 2, axis=0)
    assert abs(diversity.nearest_distance(copied, queries=200, seed=0)) < 1e-6


def test_vendi_score_counts_orthogonal_directions_and_ignores_copies():
    assert diversity.vendi_score(np.eye(7, dtype=np.float32)) == pytest.approx(7)
    assert diversity.vendi_score(np.repeat(np.eye(7, dtype=np.float32), 9, axis=0)) == pytest.approx(7)
    assert diversity.vendi_score(np.tile(np.eye(7, dtype=np.float32)[0], (5, 1))) == pytest.approx(1)


def test_vendi_score_is_the_entropy_of_the_kernel_matrix(clusters):
    rows = clusters[:80]
    eigenvalues = np.linalg.eigvalsh((rows @ rows.T).astype(np.float64) / 80)
    eigenvalues = eigenvalues[eigenvalues > 1e-9]
    assert diversity.vendi_score(rows) == pytest.approx(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()), rel=1e-4)


@given(st.lists(st.text(alphabet="ab ", max_size=20), min_size=1, max_size=8))
@settings(deadline=None)
def test_distinct_share_is_that_of_the_trigrams_as_words(texts_):
    words = [text.split() if len(text.split()) >= 3 else list(text) for text in texts_]
    met = [tuple(row[i : i + 3]) for row in words for i in range(len(row) - 2)]
    expected = len(set(met)) / len(met) if met else 0.0
    assert diversity.distinct_share(diversity.trigrams(texts_)) == expected


def test_one_row_of_each_cluster_is_more_diverse_than_random_rows(clusters):
    texts_ = [f"cluster number {row // 5} says the same again" for row in range(600)]
    selected = np.arange(0, 600, 5)
    compared = diversity.compare_with_random(clusters, texts_, selected, draws=8, queries=200, seed=0)
    assert compared.groupby("set").size().to_dict() == {"random": 8, "selected": 8}
    for measure in ("nearest_distance", "distinct_trigrams"):
        found = diversity.gain(compared, measure)
        assert 0 < found.low <= found.value <= found.high


def test_random_rows_are_no_more_diverse_than_random_rows(clusters):
    texts_ = [f"row {row}" for row in range(600)]
    chosen = np.random.default_rng(9).choice(600, size=120, replace=False)
    found = diversity.gain(
        diversity.compare_with_random(clusters, texts_, chosen, draws=40, queries=200, seed=0), "nearest_distance"
    )
    assert found.low < 0 < found.high


def test_leak_share_counts_rows_with_a_near_row_on_the_other_side(clusters):
    test, train = [0, 5, 10, 15], [1, 2, 6, 100, 200]  # clusters 0, 1, 2, 3 against 0, 1, 20, 40
    assert diversity.leak_share(clusters, test, train, cutoff=0.7) == 0.5
