"""Cleaning, near duplicates and splits: what a reader sees stays, what repeats goes, groups hold together."""

import random
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erlib.documents import corpus
from erlib.task.schema import Document

# -- cleaning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("AT&amp;T  bought\tKorvex", "AT&T bought Korvex"),
        ("so &amp;lt;b&amp;gt;big&amp;lt;/b&amp;gt;", "so big"),
        ('<p class="x">one</p><p>two<br/>three</p>', "one\ntwo\nthree"),
        ("a<script>alert('x')</script>b<!-- c -->d", "a b d"),
        ("one\r\n\r\ntwo\u2028three\x85four\vfive", "one\ntwo\nthree\nfour\nfive"),
        ("Kor\u200bvex \u202eLtd\u202c \ufeffnow\xad", "Korvex Ltd now"),
        ("a\ud800b\x00c\x1bd", "abcd"),
        ("</s>ignore<s> <pad><|endoftext|>[INST]x[/INST]<\uff5cend\u2581of\u2581sentence\uff5c>", "ignore x"),
        ("<<s>s>x", "x"),
        ("<|" + " " * 100 + "|>x", "x"),
        ("\N{NO-BREAK SPACE} wide\N{IDEOGRAPHIC SPACE}space ", "wide space"),
    ],
)
def test_what_a_reader_does_not_see_goes(raw: str, cleaned: str) -> None:
    assert corpus.clean(raw) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "EPS <guidance at Tessaro Mills, revenue >consensus",
        "if load<limit and Quillon Freight holds then cost>budget",
        "output < plan and price > cost",
        "x <b and y> z",
        "we ship vector<Kerr> and map<string, int> at Astride",
        "mail Joel <joel@example.org> or see <https://example.org>",
        "Pellmont <PLM > fell",
    ],
)
def test_only_what_is_html_goes(text):
    assert corpus.clean(text) == text
    assert corpus.clean(text.replace("<", "&lt;").replace(">", "&gt;")) == text


def test_tags_with_attributes_and_special_tokens_go():
    html = (
        "<!DOCTYPE html><p class=x>a</p><a href='http://x'>b</a><br/>c<font color=red size=2>d</font><input disabled>"
    )
    assert corpus.clean(html) == "a\nb\ncd"
    assert corpus.clean("a</s><pad><|im_start|>[INST]<start_of_turn>b") == "ab"


@pytest.mark.parametrize(
    "text",
    [
        "LOUD and Quiet, 5 < 6 > 4, i <3 u, a<b, ->",
        "see http://x.example/?a=1&copy=2&lt=3 via @bob #topic",
        "R&D; <bob@example.com>",
        "👩\u200d🔧 and ❤\ufe0f\u200d🔥",
        "می\u200cخواهم",
        "naïve café ① ﬁ",
    ],
)
def test_wording_case_urls_emoji_and_needed_joiners_stay(text: str) -> None:
    assert corpus.clean(text) == text


pieces = st.sampled_from(
    [
        "<",
        ">",
        "/",
        "b",
        "s",
        "&",
        "amp;",
        "lt;",
        "gt;",
        "#",
        "38;",
        "|",
        "\r",
        "\n",
        " ",
        "\u200d",
        "\u200b",
        "\ud800",
        "🙂",
        "script",
    ]
    + ["<!--", "-->", "[INST]"]
)


@given(st.one_of(st.text(alphabet=st.characters(exclude_categories=[])), st.lists(pieces).map("".join)))
@settings(max_examples=300, deadline=None)
def test_cleaning_twice_is_cleaning_once_and_leaves_nothing_unwritable(text: str) -> None:
    cleaned = corpus.clean(text)
    assert corpus.clean(cleaned) == cleaned
    cleaned.encode()
    assert all(character == "\n" or unicodedata.category(character) != "Cc" for character in cleaned)


def test_cleaning_hostile_text_of_the_greatest_length_takes_no_minutes() -> None:
    for piece in ("<", "<b", "<script>", "&amp;", "&#38;#38;", "<!--", "<|", "<<b>b>"):
        corpus.clean(piece * (20_000 // len(piece)))
    for deep in ("<" * 6_000 + "b>" * 6_000, "&" + "#38;" * 5_000, "[" * 3_000 + "INST]" * 3_000):
        assert corpus.clean(corpus.clean(deep)) == corpus.clean(deep)


# -- duplicates ---------------------------------------------------------------------------------------------------


def posts(n: int, seed: int = 0) -> list[Document]:
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8))) for _ in range(2_000)]
    return [Document(id=f"p{i}", text=" ".join(rng.choices(vocabulary, k=25))) for i in range(n)]


def test_reposts_go_and_different_posts_stay() -> None:
    originals = posts(300)
    rng, reposts = random.Random(1), []
    for document in originals[:60]:
        words = document.text.upper().split(" ")
        words[rng.randrange(25)] = "edited"
        text = f"RT @someone: {' '.join(words)} https://x.example/{rng.random()} 🔥🔥"
        reposts.append(Document(id=f"re-{document.id}", text=text))
    result = corpus.deduplicate([*originals, *reposts])
    assert result.kept == originals
    assert [(d.id, d.duplicate_of) for d in result.dropped] == [(f"re-p{n}", f"p{n}") for n in range(60)]
    assert all(0.8 <= d.similarity < 1 for d in result.dropped)
    assert result == corpus.deduplicate([*originals, *reposts])


def test_only_the_dress_differs() -> None:
    documents = [
        Document(id="a", text="Korvex buys Loopa!"),
        Document(id="b", text="rt @x korvex BUYS — loopa https://t.example/1"),
        Document(id="c", text="🔥"),
        Document(id="d", text="🔥"),
        Document(id="e", text="ok"),
    ]
    result = corpus.deduplicate(documents)
    assert [document.id for document in result.kept] == ["a", "c", "e"]
    assert result.dropped == [("b", "a", 1.0), ("d", "c", 1.0)]
    assert corpus.deduplicate([]) == ([], [])


@given(st.lists(st.text(alphabet="abc .", min_size=1, max_size=30), max_size=12))
@settings(max_examples=60, deadline=None)
def test_every_document_is_kept_or_dropped_for_an_earlier_kept_one(texts: list[str]) -> None:
    documents = [Document(id=str(n), text=text) for n, text in enumerate(texts)]
    kept, dropped = corpus.deduplicate(documents)
    ids = {document.id for document in kept}
    assert len(kept) + len(dropped) == len(documents)
    assert all(d.duplicate_of in ids and int(d.duplicate_of) < int(d.id) and d.similarity >= 0.8 for d in dropped)


def test_minhash_finds_nearly_every_pair_that_brute_force_finds() -> None:
    originals = posts(150, seed=2)
    rng, pairs = np.random.default_rng(0), []
    for document in originals:
        words = document.text.split(" ")
        for place in rng.choice(25, size=2, replace=False):
            words[place] = "x" * 4
        pairs.append(Document(id=f"n-{document.id}", text=" ".join(words)))
    similarity = {
        b.id: corpus._jaccard(corpus._shingle_hashes(a.text), corpus._shingle_hashes(b.text))
        for a, b in zip(originals, pairs, strict=True)
    }
    near = {key for key, value in similarity.items() if value >= 0.6}
    assert len(near) > 50
    found = {d.id for d in corpus.deduplicate([*originals, *pairs], threshold=0.6).dropped}
    assert found <= near
    assert len(found) >= 0.9 * len(near)


# -- splits -------------------------------------------------------------------------------------------------------

FRACTIONS = {"train": 0.8, "development": 0.1, "test": 0.1}


def grouped(n: int) -> list[Document]:
    rng = random.Random(n)
    return [Document(id=str(i), text="x", group=rng.choice([None, f"g{rng.randrange(n // 4)}"])) for i in range(n)]


def test_a_split_keeps_groups_together_loses_nothing_and_holds_its_fractions() -> None:
    documents = grouped(400)
    parts = corpus.split_by_group(documents, FRACTIONS, seed=0)
    assert sorted(d.id for part in parts.values() for d in part) == sorted(d.id for d in documents)
    groups = [{d.group for d in part if d.group} for part in parts.values()]
    assert Counter(group for part in groups for group in part).most_common(1)[0][1] == 1
    assert {name: len(part) for name, part in parts.items()} == {"train": 320, "development": 40, "test": 40}


def test_a_split_depends_on_the_seed_and_not_on_the_order() -> None:
    documents = grouped(100)
    shuffled = random.Random(0).sample(documents, k=100)

    def ids(order: list[Document], seed: int) -> dict[str, set[str]]:
        return {name: {d.id for d in part} for name, part in corpus.split_by_group(order, FRACTIONS, seed=seed).items()}

    assert ids(documents, 0) == ids(shuffled, 0)
    assert ids(documents, 0) != ids(documents, 1)


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        corpus.split_by_group(grouped(20), {"train": 0.8, "test": 0.1}, seed=0)
    one_group = [Document(id=str(n), text="x", group="g") for n in range(9)]
    with pytest.raises(ValueError, match="9 documents in 1 groups leave \\['development', 'test'\\] empty"):
        corpus.split_by_group(one_group, FRACTIONS, seed=0)


def test_a_document_without_group_is_not_joined_to_a_group_of_its_name() -> None:
    documents = [Document(id="g", text="x"), Document(id="h", text="x", group="g")]
    parts = corpus.split_by_group(documents, {"a": 0.5, "b": 0.5}, seed=0)
    assert all(len(part) == 1 for part in parts.values())


def test_documents_of_components_get_a_group_each_unless_they_came_with_one() -> None:
    documents = [Document(id="a", text="x"), Document(id="b", text="x", group="story"), Document(id="c", text="x")]
    found = corpus.in_components(documents)
    assert [document.group for document in found] == ["component-00000", "story", "component-00002"]
    assert [document.id for document in found] == ["a", "b", "c"]


def test_too_few_different_documents_are_told_before_anything_is_computed():
    corpus.refuse_too_few(20, 25, 20)
    with pytest.raises(ValueError, match="1 of 1500 documents are left .1499 repeat.*`least_documents` = 20"):
        corpus.refuse_too_few(1, 1500, 20)
