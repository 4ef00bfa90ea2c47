"""Compares tokenizers on texts from several domains: bytes per token, tokens per word, and unused tokens."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from rorchat.chatml import encode_text
from rorchat.errors import DataError, UsageError
from rorchat.tokenizer import token_bytes
from rorchat.tokenizer.training_text import BoundedText

DOMAINS = Path(__file__).parent.parent / "domains.yaml"
TOGETHER = "all together"
PIECES_PER_CALL = 16  # encodings include offsets: 16 pieces of 100,000 characters take about 200 MB
COLOURS = ("#4c6a92", "#e08e45", "#6a9a78", "#b5566b", "#8f7fb5", "#9a9a9a")
MIN_TOKENS_PER_VOCABULARY_ENTRY = 10  # with a shorter text, many tokens are unused by chance


@dataclass(frozen=True)
class Domain:
    """Texts from one domain and their size. `truncated` is true if the texts were longer than the limit."""

    name: str
    texts: Sequence[str]
    characters: int
    utf8_bytes: int
    words: int
    truncated: bool = False


@dataclass(frozen=True)
class Measure:
    """Statistics of a tokenizer on a domain, or on all domains together.

    Attributes:
        bytes_per_token: UTF-8 bytes of text per token; higher means shorter input. Comparable between vocabularies.
        tokens_per_word: tokens per whitespace-separated word, called fertility in Rust et al. 2021, arXiv:2012.15613.
            Not meaningful for text without spaces between words (Chinese, Japanese, Thai, code).
        unused_share: share of the ordinary tokens (neither control nor reserved tokens) that never occur.
        decoded_bytes: UTF-8 bytes of the decoded tokens; differs from the size of the text if the tokenizer is lossy.
    """

    tokens: int
    bytes_per_token: float
    tokens_per_word: float
    unused_share: float
    decoded_bytes: int


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_tokenizers`.

    Attributes:
        domains: the given domains and, if there are several, their total, which is named `TOGETHER` and has no `texts`.
        ordinary: tokenizer -> number of its tokens that are neither control nor reserved tokens.
        measures: domain -> tokenizer -> measure.
    """

    domains: Sequence[Domain]
    ordinary: dict[str, int]
    measures: dict[str, dict[str, Measure]]


def read_domain(name: str, texts: Iterable[str], max_characters: int) -> Domain:
    """Reads at most `max_characters` characters of a domain.

    Raises:
        UsageError: the name is reserved for the total over all domains.
        DataError: the texts contain no words.
    """
    if name == TOGETHER:
        raise UsageError(
            f"A domain cannot be named {name!r}: the name is reserved for the total. Choose a different label."
        )
    bounded = BoundedText(texts, max_characters)
    pieces = list(bounded)
    words = sum(len(piece.split()) for piece in pieces)
    if not words:
        raise DataError(f"The domain {name!r} has no text: pass a file that contains words as --data {name}=PATH.")
    return Domain(name, pieces, bounded.characters, bounded.utf8_bytes, words, bounded.stopped)


def builtin_domains(max_characters: int) -> list[Domain]:
    """Reads six short texts from the package (rorchat/domains.yaml), for a first comparison without any files."""
    texts = yaml.safe_load(DOMAINS.read_text(encoding="utf-8"))
    return [read_domain(name, [text], max_characters) for name, text in texts.items()]


def compare_tokenizers(tokenizers: Mapping[str, object], domains: Sequence[Domain]) -> Comparison:
    """Measures every tokenizer on every domain and on all domains together, in which longer domains weigh more.

    Args:
        tokenizers: name -> tokenizer from `rorchat.load_tokenizer`.
    """
    together = Domain(
        TOGETHER,
        (),
        sum(domain.characters for domain in domains),
        sum(domain.utf8_bytes for domain in domains),
        sum(domain.words for domain in domains),
        any(domain.truncated for domain in domains),
    )
    shown = [*domains, together] if len(domains) > 1 else list(domains)
    ordinary: dict[str, int] = {}
    measures: dict[str, dict[str, Measure]] = {domain.name: {} for domain in shown}
    for name, tokenizer in tokenizers.items():
        sizes = np.array(token_bytes(tokenizer))  # (V,): bytes of each token, 0 for control and reserved tokens
        ordinary[name] = int((sizes > 0).sum())
        counts = [_token_counts(tokenizer, domain.texts, len(sizes)) for domain in domains]
        for domain, count in zip(shown, [*counts, np.sum(counts, axis=0)], strict=False):
            measures[domain.name][name] = _measure(domain, count, sizes)
    return Comparison(shown, ordinary, measures)


def _token_counts(tokenizer, texts: Sequence[str], vocabulary: int) -> np.ndarray:
    """Counts the occurrences of each token in the texts, (V,)."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for start in range(0, len(texts), PIECES_PER_CALL):
        for ids in encode_text(tokenizer, list(texts[start : start + PIECES_PER_CALL])):
            counts += np.bincount(ids, minlength=vocabulary)
    return counts


def _measure(domain: Domain, counts: np.ndarray, sizes: np.ndarray) -> Measure:
    """Computes the statistics of a domain from the occurrences and the bytes of each token, both (V,)."""
    tokens = int(counts.sum())
    return Measure(
        tokens=tokens,
        bytes_per_token=domain.utf8_bytes / tokens,
        tokens_per_word=tokens / domain.words,
        unused_share=float((counts[sizes > 0] == 0).mean()),
        decoded_bytes=int(counts @ sizes),
    )


def comparison_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Returns (header, rows) of a table with one row per domain and three columns per tokenizer.

    The highest number of bytes per token in a row is in bold. Percentages are relative to the first tokenizer.
    """
    first, *_ = comparison.ordinary
    header = ["domain", "characters", "UTF-8 bytes"]
    for name in comparison.ordinary:
        header += [f"{name}: bytes/token", f"{name}: tokens/word", f"{name}: unused"]
    rows = []
    for domain in comparison.domains:
        measures = comparison.measures[domain.name]
        values = [measure.bytes_per_token for measure in measures.values()]
        row = [domain.name, f"{domain.characters:,}", f"{domain.utf8_bytes:,}"]
        for name, measure in measures.items():
            value = measure.bytes_per_token
            cell = f"**{value:.3f}**" if value == max(values) > min(values) else f"{value:.3f}"
            if name != first:
                cell += f" ({value / measures[first].bytes_per_token - 1:+.1%})"
            row += [cell, f"{measure.tokens_per_word:.3f}", f"{measure.unused_share:.1%}"]
        rows.append(row)
    return header, rows


def comparison_notes(comparison: Comparison) -> list[str]:
    """Returns notes for the table: vocabulary sizes, truncated domains, and tokenizers that change the text."""
    notes = ["ordinary tokens: " + ", ".join(f"{name} {count:,}" for name, count in comparison.ordinary.items())]
    parts = [domain for domain in comparison.domains if domain.texts]
    truncated = [domain.name for domain in parts if domain.truncated]
    notes.append(f"truncated to --max_characters: {', '.join(truncated)}" if truncated else "all of the text was read")
    token_counts = {name: measure.tokens for name, measure in comparison.measures[comparison.domains[-1].name].items()}
    if any(n < MIN_TOKENS_PER_VOCABULARY_ENTRY * comparison.ordinary[name] for name, n in token_counts.items()):
        counts = ", ".join(f"{name} {count:,}" for name, count in token_counts.items())
        notes.append(f"too few tokens to judge which are unused ({counts}): pass more text with --data LABEL=PATH")
    for domain in parts:
        for name, measure in comparison.measures[domain.name].items():
            if measure.decoded_bytes != domain.utf8_bytes:
                notes.append(
                    f"{name} changes the text of {domain.name}: its tokens decode to {measure.decoded_bytes:,} "
                    f"bytes, not {domain.utf8_bytes:,}"
                )
    return notes


def draw_comparison(comparison: Comparison, target: Path) -> None:
    """Plots bytes per token as grouped bars: a group for each domain, a bar for each tokenizer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    domains, names = comparison.domains, list(comparison.ordinary)
    middles = [group + (0.3 if domain.name == TOGETHER else 0.0) for group, domain in enumerate(domains)]
    width = 0.78 / len(names)
    figure, axis = pyplot.subplots(figsize=(max(6.0, 1.3 + len(domains) * (0.5 + 0.42 * len(names))), 4.6))
    for position, name in enumerate(names):
        values = [comparison.measures[domain.name][name].bytes_per_token for domain in domains]
        places = [middle + (position - (len(names) - 1) / 2) * width for middle in middles]
        bars = axis.bar(
            places,
            values,
            width * 0.92,
            color=COLOURS[position % len(COLOURS)],
            label=f"{name}  ({comparison.ordinary[name]:,} tokens)",
        )
        texts = axis.bar_label(bars, fmt="%.2f", fontsize=8.5, padding=2, color="#333333")
        for label, value, domain in zip(texts, values, domains, strict=True):
            others = [measure.bytes_per_token for measure in comparison.measures[domain.name].values()]
            label.set_fontweight("bold" if value == max(others) > min(others) else "normal")
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4})  # hides the grid line
    labels = [textwrap.fill(domain.name, 14) for domain in domains]
    axis.set_xticks(middles, labels, fontsize=10)
    axis.tick_params(length=0, colors="#333333")
    axis.set_axisbelow(True)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    for edge in ("top", "right", "left"):
        axis.spines[edge].set_visible(False)
    axis.spines["bottom"].set_color("#999999")
    axis.margins(y=0.08)
    side = max(0.6, (3 - len(domains)) / 2)  # keeps the bars of a single domain narrow
    axis.set_xlim(middles[0] - side, middles[-1] + side)
    axis.set_ylabel("UTF-8 bytes per token", color="#333333")
    axis.set_title("Bytes of text per token", loc="left", fontsize=13, pad=30, color="#222222")
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=len(names),
        frameon=False,
        borderaxespad=0.3,
        handlelength=1.0,
        handleheight=1.0,
        fontsize=9.5,
        labelcolor="#333333",
        borderpad=0,
    )
    figure.savefig(target, dpi=160, bbox_inches="tight", pad_inches=0.2)
    pyplot.close(figure)
