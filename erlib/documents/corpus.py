"""Clean documents of what a reader does not see, drop repetitions, split by group."""

import html
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from erlib.task.schema import Document

# -- cleaning -----------------------------------------------------------------------------------------------------

_LINE_END = re.compile("\r\n?|[\v\f\x85\u2028\u2029]")
# Control, format (zero-width, bidi, invisible tag letters) and surrogate characters; joiners are the next line's.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\U000e0001-\U000e007f]"
)
# Joiners stay between letters of the scripts that need them and inside emoji.
_STRAY_JOINER = re.compile("[\u200c\u200d](?<![\u0600-\u1fff\u2600-\ufefe\U00010000-\U0010ffff].)")
# Only with a semicolon: "?a=1&copy=2" in a URL is no copyright sign.
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_HIDDEN = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
# Tags are those of HTML, with attributes that are written as attributes: "revenue <guidance, cost >plan" and
# "<b and c>" are comparisons, "<joel@example.org>" is an address.
_ELEMENTS = (
    "a abbr acronym address applet area article aside audio b base basefont bdi bdo big blink blockquote body br "
    "button canvas caption center cite code col colgroup data datalist dd del details dfn dialog dir div dl dt em "
    "embed fieldset figcaption figure font footer form frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr "
    "html i iframe img input ins kbd label legend li link main map mark marquee math menu meta meter nav nobr "
    "noframes noscript object ol optgroup option output p param path picture pre progress q rp rt ruby s samp "
    "script search section select slot small source span strike strong style sub summary sup svg table tbody td "
    "template textarea tfoot th thead time title tr track tt u ul var video wbr xmp o:p"
)
_FLAGS = (
    "allowfullscreen|async|autofocus|autoplay|checked|controls|default|defer|disabled|hidden|loop|multiple|muted|"
    "nowrap|open|readonly|required|selected"
)
_VALUE = r"""(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+)"""
_ATTRIBUTE = rf"\s+(?:[\w:@.-]+\s*=\s*{_VALUE}|(?:{_FLAGS})(?![\w-]))"
_BREAK = re.compile(rf"</?(?:br|p|div|li|ul|ol|tr|table|blockquote|h[1-6])(?:{_ATTRIBUTE})*\s*/?>", re.IGNORECASE)
_TAG = re.compile(
    rf"</?(?:{'|'.join(_ELEMENTS.split())})(?:{_ATTRIBUTE})*\s*/?>|<!doctype[^<>]*>|<\?xml[^<>]*>", re.IGNORECASE
)
# What tokenizers read as special tokens: </s>, <pad>, <|endoftext|>, [INST].
_SPECIAL = re.compile(
    r"</?(?:s|pad|unk|bos|eos|mask|cls|sep|(?:start|end)_of_(?:turn|text|image))>|<[|\uff5c][^<>]{1,60}[|\uff5c]>"
    r"|\[/?INST\]",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """Remove what a reader does not see, and leave wording, case, URLs and emoji as they are; idempotent.

    Removed: HTML entities, tags, scripts and special-token text; control, zero-width and bidi characters; lone
    surrogates. Every kind of line end becomes a newline, other runs of white space one space, blank lines go.
    """
    for _ in range(10):  # what one round removes may uncover more: "&amp;lt;b&amp;gt;", "<<b>b>"
        before, text = text, _clean_once(text)
        if text == before:
            return text
    return clean(re.sub(r"[<>&\[\]]", " ", text))  # nested deeper than anybody means: not worth a round for each level


def _clean_once(text: str) -> str:
    text = _INVISIBLE.sub("", _LINE_END.sub("\n", text))
    text = _ENTITY.sub(lambda match: html.unescape(match[0]), _STRAY_JOINER.sub("", text))
    text = _SPECIAL.sub("", _TAG.sub("", _BREAK.sub("\n", _HIDDEN.sub(" ", text))))
    return "\n".join(words for line in text.split("\n") if (words := " ".join(line.split())))


# -- duplicates ---------------------------------------------------------------------------------------------------

_SHINGLE = 5  # characters
_BANDS, _ROWS = 20, 4  # finds a pair of Jaccard similarity .8 with probability 1 - (1 - .8 ** 4) ** 20 = .99998


class Duplicate(NamedTuple):
    """A document left out, the earlier one that it repeats, and their similarity (1 when only the dress differs)."""

    id: str
    duplicate_of: str
    similarity: float


class Deduplicated(NamedTuple):
    """The documents kept, in their order, and those left out."""

    kept: list[Document]
    dropped: list[Duplicate]


def deduplicate(documents: Sequence[Document], *, threshold: float = 0.8, seed: int = 0) -> Deduplicated:
    """Keep the first of documents that say the same; time and memory grow linearly.

    Compared are 5-character shingles of the text without case, URLs, handles and punctuation, by Jaccard similarity
    above `threshold`; candidates come from MinHash with banding (Broder 1997; Leskovec et al., Mining of Massive
    Datasets, 3.4).
    """
    kept: list[int] = []
    dropped: list[Duplicate] = []
    bands: dict[tuple[int, bytes], int] = {}  # band and its hashes -> first kept document with them
    shingles: dict[int, np.ndarray] = {}
    for index, (hashes, signature) in enumerate(_signatures([document.text for document in documents], seed)):
        keys = [(band, row.tobytes()) for band, row in enumerate(signature.reshape(_BANDS, _ROWS))]
        candidates = sorted({bands[key] for key in keys if key in bands})
        similarities = [_jaccard(hashes, shingles[other]) for other in candidates]
        if similarities and max(similarities) >= threshold:
            original = candidates[int(np.argmax(similarities))]
            dropped.append(Duplicate(documents[index].id, documents[original].id, max(similarities)))
            continue
        kept.append(index)
        shingles[index] = hashes
        for key in keys:
            bands.setdefault(key, index)
    return Deduplicated([documents[index] for index in kept], dropped)


def refuse_too_few(kept: int, read: int, least: int) -> None:
    """Raise ValueError where too few documents are left after cleaning and deduplication to be divided and compared."""
    if kept < least:
        raise ValueError(
            f"{kept} of {read} documents are left ({read - kept} repeat an earlier one), and training, validation and "
            f"test need `least_documents` = {least}: give more documents, raise `duplicate_threshold`, or lower "
            "`least_documents` (section 02_corpus)"
        )


def _signatures(texts: Sequence[str], seed: int, block: int = 500) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each text its shingle hashes (sorted, unique) and its MinHash signature (bands * rows,), uint32 both."""
    rng = np.random.default_rng(seed)
    factors = rng.integers(1, 2**63, size=_BANDS * _ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    for start in range(0, len(texts), block):
        sets = [_shingle_hashes(text) for text in texts[start : start + block]]
        borders = np.cumsum([0, *(len(hashes) for hashes in sets[:-1])])
        flat = np.concatenate(sets).astype(np.uint64)
        # Multiply-shift hashing (Dietzfelbinger et al. 1997): the high half of an odd multiple.
        columns = [np.minimum.reduceat((flat * factor) >> np.uint64(32), borders) for factor in factors]
        yield from zip(sets, np.stack(columns, axis=1).astype(np.uint32), strict=True)


_DRESS = re.compile(r"https?://\S+|www\.\S+|@\w+|\brt\b")


def _shingle_hashes(text: str) -> np.ndarray:
    """Sorted unique uint32 hashes of the character shingles of a text without its dress; never empty."""
    plain = re.sub(r"[\W_]+", " ", _DRESS.sub(" ", text.casefold())).strip() or text
    codes = np.frombuffer(plain.ljust(_SHINGLE).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    hashes = np.zeros(len(codes) - _SHINGLE + 1, dtype=np.uint64)
    for offset in range(_SHINGLE):
        hashes = (hashes ^ codes[offset : offset + len(hashes)]) * np.uint64(0x9E3779B97F4A7C15)
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


# -- splits -------------------------------------------------------------------------------------------------------


def split_by_group(
    documents: Sequence[Document], fractions: Mapping[str, float], *, seed: int
) -> dict[str, list[Document]]:
    """Split documents so that no group is in two parts; a document without group is a group of its own.

    Groups, in random order but the large ones first, go to the part that is furthest from its fraction. The outcome
    does not depend on the order of the documents, which stays within each part. Raises `ValueError` when the fractions
    do not add up to 1 or a part would be empty.
    """
    if abs(sum(fractions.values()) - 1) > 1e-9 or min(fractions.values()) <= 0:
        raise ValueError(f"fractions must be positive and add up to 1, got {dict(fractions)}")
    sizes = Counter(_group(document) for document in documents)
    groups = sorted(sizes)
    shuffled = [groups[index] for index in np.random.default_rng(seed).permutation(len(groups))]
    room = {name: fraction * len(documents) for name, fraction in fractions.items()}
    part_of: dict[tuple[bool, str], str] = {}
    for group in sorted(shuffled, key=lambda g: -sizes[g]):
        part = max(room, key=lambda name: room[name] / fractions[name])
        part_of[group] = part
        room[part] -= sizes[group]
    if empty := set(fractions) - set(part_of.values()):
        raise ValueError(f"{len(documents)} documents in {len(groups)} groups leave {sorted(empty)} empty")
    parts: dict[str, list[Document]] = {name: [] for name in fractions}
    for document in documents:
        parts[part_of[_group(document)]].append(document)
    return parts


def in_components(documents: Sequence[Document]) -> list[Document]:
    """Make each document, the only one of its component, a group `component-NUMBER`, unless it came with a group."""
    return [
        document.model_copy(update={"group": document.group or f"component-{number:05d}"})
        for number, document in enumerate(documents)
    ]


def _group(document: Document) -> tuple[bool, str]:
    """The flag keeps the id of a document without group apart from a group of that name."""
    return (True, document.id) if document.group is None else (False, document.group)
