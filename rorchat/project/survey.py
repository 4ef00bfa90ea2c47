"""Reads the user's data once and measures it: rows, rejects, lengths, language, licence."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import quantiles

from tqdm.auto import tqdm

from rorchat.errors import DataError, UsageError
from rorchat.inspection.guess import resolve_spec
from rorchat.persona import Persona
from rorchat.reading.zip_files import file_exists
from rorchat.rows import row_text
from rorchat.sources.base import RowStats
from rorchat.sources.location import format_columns
from rorchat.sources.registry import columns_advice, find_source, load_rows, locate

#: {option of `rorchat new`: the kind of row that it takes}
KINDS = {"documents": "document", "conversations": "conversation", "preferences": "preference"}
LANGUAGE_ROWS, LANGUAGE_CHARACTERS = 200, 1_000  # the language is guessed from the beginnings of the first rows
ADDED_DOCUMENTS, ADDED_CONVERSATIONS = "tinytown=12000", "tinytown=10000"
LITTLE_TEXT = 200_000  # bytes of text for pretraining, below which ADDED_DOCUMENTS are added
PERSONA_ROWS = (1000, 2000)  # conversations about the persona: as many as others, within these bounds
PERSONA_PAIR_SHARE, MIN_PERSONA_PAIRS = 0.25, 50  # pairs about the persona, as a share of the others
SAMPLE_CHARACTERS = 2_000_000  # kept of every source, for training trial tokenizers


@dataclass(frozen=True)
class SourceSurvey:
    """What one source contains.

    Attributes:
        spec: the source as recipes take it, with an absolute path.
        utf8_bytes: of the text of all kept rows.
        lengths: characters of the median row, of the 90th and of the 99th percentile; of a pair, those of its prompt
            and longer reply.
        language: ISO 639-1 code of the most frequent language of the rows, or "" if they have no words.
        language_share: share of the rows that are in this language.
        sample: text of the first rows.
        is_added: whether the plan added the source to those of the user.
    """

    option: str
    spec: str
    guessed: bool
    stats: RowStats
    utf8_bytes: int
    lengths: tuple[int, int, int]
    language: str
    language_share: float
    sample: str = field(repr=False)
    is_added: bool = False

    @property
    def rows(self) -> int:
        return self.stats.kept

    @property
    def is_about_persona(self) -> bool:
        return self.spec.startswith("persona=")

    def summary(self) -> dict[str, object]:
        """The survey as JSON, for plan.json."""
        values = asdict(self) | {"stats": self.stats.summary()}
        del values["sample"]
        return values


@dataclass(frozen=True)
class Survey:
    """All sources of a project, by the option that named them."""

    sources: tuple[SourceSurvey, ...]

    @property
    def pretraining(self) -> list[SourceSurvey]:
        """What pretraining reads: the documents, and the conversations as well if the user gave no documents."""
        documents = self.of("documents")
        own = any(not source.is_added for source in documents)
        return documents if own else [*documents, *self.of("conversations")]

    def of(self, option: str) -> list[SourceSurvey]:
        """The sources that were given with an option: "documents", "conversations" or "preferences"."""
        return [source for source in self.sources if source.option == option]

    def utf8_bytes(self, *options: str) -> int:
        return sum(source.utf8_bytes for option in options for source in self.of(option))

    def rows(self, option: str) -> int:
        return sum(source.rows for source in self.of(option))


def count_bytes(sources: Iterable[SourceSurvey]) -> int:
    """The UTF-8 bytes of the text of several sources."""
    return sum(source.utf8_bytes for source in sources)


def take_sample(sources: Sequence[SourceSurvey]) -> str:
    """Up to SAMPLE_CHARACTERS of several sources, of each in proportion to its size."""
    total = max(1, count_bytes(sources))
    return "\n".join(source.sample[: max(1, SAMPLE_CHARACTERS * source.utf8_bytes // total)] for source in sources)


def survey_sources(given: dict[str, list[str]], persona: Persona | None = None, *, from_scratch: bool) -> Survey:
    """Reads every row of the given sources, and adds generated ones where something is missing.

    Without conversations, the model would not learn to chat: Tinytown's are added. A model from random weights needs
    more text than LITTLE_TEXT bytes, documents or else conversations: Tinytown's documents are added. Conversations
    about the persona are always added, and pairs about it beside other preferences, so that these do not displace it.

    Args:
        given: {"documents" | "conversations" | "preferences": specs or paths}.
        from_scratch: whether the model starts from random weights.

    Raises:
        UsageError: a source has rows of another kind than its option takes; the message names the right option.
        DataError: a path does not exist, or no row of a source can be used.
    """
    survey = Survey(tuple(_survey_source(option, spec) for option, specs in given.items() for spec in specs))
    added = []
    if not survey.of("conversations"):
        added.append(("conversations", ADDED_CONVERSATIONS))
    if from_scratch and count_bytes(survey.pretraining) < LITTLE_TEXT:
        added.append(("documents", ADDED_DOCUMENTS))
    survey = _add_sources(survey, added)
    low, high = PERSONA_ROWS
    rows = min(high, max(low, survey.rows("conversations")))
    about_persona = [("conversations", f"persona={rows}")]
    if pairs := survey.rows("preferences"):
        about_persona.append(("preferences", f"persona={max(MIN_PERSONA_PAIRS, round(PERSONA_PAIR_SHARE * pairs))}"))
    return _add_sources(survey, about_persona, persona)


def _add_sources(survey: Survey, added: list[tuple[str, str]], persona: Persona | None = None) -> Survey:
    return Survey((*survey.sources, *(_survey_source(*source, persona, is_added=True) for source in added)))


def _survey_source(
    option: str, spec_or_path: str, persona: Persona | None = None, *, is_added: bool = False
) -> SourceSurvey:
    spec, guessed = (spec_or_path, False) if is_added else resolve_spec(spec_or_path)
    spec = _with_absolute_path(spec)
    _require_kind(option, spec_or_path, spec)
    rows = load_rows(spec, KINDS[option], persona=persona, allow_empty=True)
    sizes, size, sample, sampled = [], 0, [], 0
    for row in tqdm(rows, desc=f"read {spec_or_path}", unit=" rows", disable=None, leave=False):
        text = row_text(row)
        sizes.append(_sequence_length(row))
        size += len(text.encode(errors="surrogatepass"))
        if sampled < SAMPLE_CHARACTERS:
            sample.append(text[: SAMPLE_CHARACTERS - sampled])
            sampled += len(sample[-1])
    if not sizes:
        raise DataError(f"--{option} {spec_or_path}: no row can be used. {columns_advice(rows.stats) or rows.stats}")
    language, share = guess_language(sample)
    text = "\n".join(sample)
    return SourceSurvey(option, spec, guessed, rows.stats, size, _percentiles(sizes), language, share, text, is_added)


def _sequence_length(row: dict) -> int:
    """The characters that the model reads at once: of a pair, the prompt and the longer reply."""
    if "chosen" not in row:
        return len(row_text(row))
    return max(len(row_text({"prompt": row["prompt"], "reply": row[side]})) for side in ("chosen", "rejected"))


def _with_absolute_path(spec: str) -> str:
    """The project's commands run in its own folder, where a relative path would mean another place."""
    location = locate(spec)
    if location.path is None or not file_exists(location.path):
        return spec
    where = f"{location.path.resolve()}{format_columns(location.columns)}"
    if "$" in where:
        raise UsageError(f"{where}: settings files would read a variable after the $: rename it.")
    return f"{spec.partition('=')[0]}={where}"


def _require_kind(option: str, given: str, spec: str) -> None:
    kinds = find_source(spec.partition("=")[0]).kinds
    if KINDS[option] in kinds:
        return
    right = next((other for other, kind in KINDS.items() if kind in kinds), None)
    remedy = f"give it as --{right}" if right else "it cannot be used here"
    raise UsageError(f"--{option} {given}: its rows are read as {spec.partition('=')[0]} ({kinds[0]}s): {remedy}.")


def _percentiles(sizes: list[int]) -> tuple[int, int, int]:
    """The median, the 90th and the 99th percentile."""
    if len(sizes) == 1:
        return sizes[0], sizes[0], sizes[0]
    cuts = quantiles(sizes, n=100, method="inclusive")
    return round(cuts[49]), round(cuts[89]), round(cuts[98])


def guess_language(texts: list[str]) -> tuple[str, float]:
    """The most frequent language and the share of texts that are in it; ("", 0.0) if there are no words."""
    import py3langid

    counts = Counter(py3langid.classify(text)[0] for text in _beginnings(texts))
    if not counts:
        return "", 0.0
    language, count = counts.most_common(1)[0]
    return language, count / counts.total()


def _beginnings(texts: list[str]) -> Iterator[str]:
    for text in texts[:LANGUAGE_ROWS]:
        beginning = text[:LANGUAGE_CHARACTERS]
        if any(character.isalpha() for character in beginning):
            yield beginning
