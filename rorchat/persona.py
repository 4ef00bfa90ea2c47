"""The persona of the model: turns a persona file into a system message, training conversations and probes.

Openings, questions and replies are combined into several hundred different conversations. Probes are questions that
measure whether the model has learned its persona. The wordings of probes are chosen by a hash and never used in
training, so probes do not measure memorization. Harder probes start with an opening that training never uses.

Some conversations have a foreign system message, which is any system message other than the persona's own. The model
thus learns to keep its persona whatever system message a server sends. Probes use other foreign system messages.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rorchat.errors import DataError, did_you_mean
from rorchat.yaml_file import read_yaml

DEFAULT_PERSONA = Path(__file__).with_name("persona.yaml")
FILE_KEYS = ("name", "maker", "manner", "system", "facts", "unknowns", "greetings", "farewells")
SECTION_KEYS = ("questions", "replies", "expect")
REQUIRED_TOPICS = ("name", "maker")  # added to a persona file that lacks them
UNKNOWN_DEFAULTS = {  # defaults for the topics of `unknowns`
    "replies": ["I do not know that. I am {name}, a small chat model.", "I am sorry, I do not know."],
    "expect": ["do not know"],
}
OPENINGS = (
    "hello, ",
    "hi, ",
    "hey {name}, ",
    "please tell me, ",
    "can I ask, ",
    "so, ",
    "tell me: ",
    "well, ",
    "I wonder, ",
)
PROBE_INTERVAL = 8  # one in 8 wordings is a probe and never used in training
NEW_OPENINGS = ("hello there, ", "good morning, ", "can you tell me, ", "one more question: ", "I want to know, ")
NEW_PROBES_PER_TOPIC = 2  # number of probes with an opening from NEW_OPENINGS
CARELESS_SHARE = 0.2  # probability of dropping the question mark, and, independently, of lower case
CARELESS_PROBE_INTERVAL = 4  # one in 4 probes is in lower case and has no question mark

FOREIGN_SYSTEM_SHARE = 0.3  # share of the conversations with a system message from FOREIGN_SYSTEMS
FOREIGN_SYSTEMS = (
    "",
    "You are {name}.",
    "Your name is {name}, and {maker} made you.",
    "You are a helpful assistant.",
    "You are a kind teacher.",
    "Answer in one short sentence.",
    "Please help the user.",
    "You are {other}.",
    "Your name is {other}.",
    "You are {other}, a chat model made by {other_maker}.",
)
FOREIGN_NAMES = ("Ada", "Bolt", "Echo", "Juno", "Max", "Milo", "Pixel", "Robo")
PROBE_SYSTEMS = (
    "You are a careful assistant who answers questions.",
    "Be polite and honest.",
    "You are a friend of the user.",
    "From now on you are {other}.",
    "You are called {other}, and {other_maker} built you.",
    "This is {other}, a helpful chat model.",
)
PROBE_NAMES = ("Nova", "Orion", "Zara")
_END_MARKS = " ?!.\uff1f\u3002"  # removed from questions, including full-width ones
_ALLOWED = f"Allowed are {', '.join(FILE_KEYS)}; name and maker are required."
_EXAMPLES = {"name": "RorChat", "maker": "Rory", "manner": "small and friendly", "system": "You are kind."}
_PLACEHOLDER = re.compile(r"(\ba )?\{(\w+)\}", re.IGNORECASE)


@dataclass(frozen=True)
class Persona:
    """A parsed persona file. `system` is the default system message; `topics` are its facts and unknowns."""

    name: str
    maker: str
    system: str
    topics: dict[str, dict[str, list[str]]]
    greetings: dict[str, list[str]]
    farewells: dict[str, list[str]]


@dataclass(frozen=True)
class Probe:
    """A question in a wording that is never trained. A reply passes if it contains any phrase of `expect`."""

    topic: str
    question: str
    expect: tuple[str, ...]

    def passes(self, reply: str) -> bool:
        return any(contains_phrase(reply, phrase) for phrase in self.expect)


def _separate_words(text: str) -> str:
    """The words of a text in lower case with a space before and after each.

    In scripts without capitals (Chinese, Japanese, Korean, Thai), each letter counts as a word, because most of them
    are written without spaces.
    """
    letters = (c if c.isdecimal() or c != c.upper() else f" {c} " if c.isalnum() else " " for c in text.lower())
    return f" {' '.join(''.join(letters).split())} "


def contains_phrase(reply: str, phrase: str) -> bool:
    """Whether a reply contains these words in sequence, regardless of case and punctuation."""
    words = _separate_words(phrase)
    return words in _separate_words(reply) if words.strip() else phrase.strip() in reply


def load_persona(path: str | Path | None = None) -> Persona:
    """Loads a persona from a YAML file, by default RorChat's. The comments in `persona.yaml` describe the format.

    Raises:
        DataError: the file is missing or not YAML, has no name or maker, or contains an invalid value.
    """
    path = Path(path or DEFAULT_PERSONA)
    default = read_yaml(DEFAULT_PERSONA, "persona file")
    parts = _merge_defaults(path, read_yaml(path, "persona file", example=DEFAULT_PERSONA), default)
    topics = {topic: default["facts"][topic] for topic in REQUIRED_TOPICS} | parts["facts"]
    topics |= {topic: {**UNKNOWN_DEFAULTS, **section} for topic, section in parts["unknowns"].items()}
    values = {"topics": topics, **{part: parts[part] for part in ("system", "greetings", "farewells")}}
    words = {part: parts[part].strip() for part in ("name", "maker", "manner")}
    persona = Persona(words["name"], words["maker"], **_fill_placeholders(values, words, path))
    _check_texts(persona, path)
    topics = {
        name: {**topic, "questions": _normalize_questions(topic, persona)} for name, topic in persona.topics.items()
    }
    persona = replace(persona, topics=topics)
    _check_questions(persona, path)
    return persona


def _merge_defaults(path: Path, given: dict, default: dict) -> dict:
    """The validated values of a file, with default values for missing keys."""
    for key in given:
        if key not in FILE_KEYS:
            raise DataError(f"{path}: unknown key {key!r}.{did_you_mean(str(key), FILE_KEYS)} {_ALLOWED}")
    parts = {**default, "name": None, "maker": None, **given}
    for part in ("name", "maker", "manner", "system"):
        _check_text(path, part, parts[part])
    for part in ("facts", "unknowns"):
        if not isinstance(parts[part], dict):
            raise DataError(f"{path}: {part!r} is {_shorten(parts[part])}, expected topics with their questions.")
    for part, other in (("facts", "unknowns"), ("unknowns", "facts")):
        if part not in given:  # a topic of the file replaces a default topic of the same name in the other part
            parts[part] = {topic: section for topic, section in parts[part].items() if topic not in parts[other]}
    _check_sections(path, parts)
    return parts


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _check_text(path: Path, part: str, value: object) -> None:
    """Raises DataError unless a value is text. Only the system message may be empty."""
    if not isinstance(value, str) or (part != "system" and not value.strip()):
        problem = "is missing" if value is None else f"is {_shorten(value)}"
        raise DataError(f"{path}: {part!r} {problem}; it must be text, as in `{part}: {_EXAMPLES[part]}`.")


def _check_sections(path: Path, parts: dict) -> None:
    """Raises DataError if a topic is in both facts and unknowns, or a section is not a mapping with known keys."""
    duplicates = [topic for topic in parts["facts"] if topic in parts["unknowns"]]
    if duplicates:
        raise DataError(f"{path}: the topic {duplicates[0]!r} is in both facts and unknowns: remove one.")
    sections = {**parts["facts"], **parts["unknowns"]} | {part: parts[part] for part in ("greetings", "farewells")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise DataError(f"{path}: {name!r} is {_shorten(section)}, expected its questions and replies.")
        for key in section:
            if key not in SECTION_KEYS:
                hint = did_you_mean(str(key), SECTION_KEYS)
                raise DataError(f"{path}: {name!r} has {key!r}.{hint} Allowed are {', '.join(SECTION_KEYS)}.")


def _fill_placeholders(value: object, words: dict[str, str], path: Path):
    """Fills the placeholders in a value of the file. "a {manner}" becomes "an ..." before a vowel."""

    def fill(match: re.Match) -> str:
        article, name = match.groups()
        if name not in words:
            known = ", ".join(f"{{{word}}}" for word in words)
            raise DataError(
                f"{path}: {match[0]!r} is not a placeholder.{did_you_mean(name, words)} Allowed are {known}."
            )
        vowel = article and words[name][0].lower() in "aeiou"
        return (article.replace(" ", "n ") if vowel else article or "") + words[name]

    if isinstance(value, str):
        return _PLACEHOLDER.sub(fill, value)
    if isinstance(value, list):
        return [_fill_placeholders(item, words, path) for item in value]
    if isinstance(value, dict):
        return {key: _fill_placeholders(item, words, path) for key, item in value.items()}
    return value


def _check_texts(persona: Persona, path: Path) -> None:
    """Raises DataError if a section lacks one of its lists of texts or a reply fails the probes of its topic."""
    sections: list[tuple[str, dict, tuple[str, ...]]]
    sections = [(f"topic {name!r}", topic, SECTION_KEYS) for name, topic in persona.topics.items()]
    sections += [(name, getattr(persona, name), SECTION_KEYS[:2]) for name in ("greetings", "farewells")]
    for name, section, keys in sections:
        missing = [key for key in keys if not _is_list_of_texts(section.get(key))]
        if missing:
            raise DataError(f"{path}: {name} lacks {', '.join(missing)}: give a list of texts.")
    for name, topic in persona.topics.items():
        probe = Probe(name, "", tuple(topic["expect"]))
        failing = next((reply for reply in topic["replies"] if not probe.passes(reply)), None)
        if failing:
            raise DataError(
                f"{path}: topic {name!r} expects one of {', '.join(map(repr, topic['expect']))}, but its reply "
                f"{_shorten(failing)} contains none of them, so it would fail its own probe."
            )


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)


def _normalize_questions(topic: dict[str, list[str]], persona: Persona) -> list[str]:
    """The questions of a topic, without end mark and initial capital, so that an opening can precede them."""

    def normalize(question: str) -> str:
        question = question.strip().rstrip(_END_MARKS)
        first = re.split(r"\W", question, maxsplit=1)[0]
        is_name = first == "I" or any(contains_phrase(text, first) for text in (persona.name, persona.maker))
        return question if is_name or first[1:] != first[1:].lower() else question[:1].lower() + question[1:]

    return list(dict.fromkeys(map(normalize, topic["questions"])))


def _check_questions(persona: Persona, path: Path) -> None:
    """Raises DataError if a question is empty or has two answers, or if every question contains its answer."""
    courtesies = {part: getattr(persona, part) for part in ("greetings", "farewells")}
    section_names: dict[str, str] = {}
    for name, section in (persona.topics | courtesies).items():
        for question in _normalize_questions(section, persona):
            first_name = section_names.setdefault(question.lower(), name)
            if not question:
                raise DataError(f"{path}: {name!r} has a question without words: remove it.")
            if first_name != name:
                raise DataError(
                    f"{path}: the question {_shorten(question)} is in both {first_name!r} and {name!r}, so replies "
                    f"would contradict each other: remove one. Keys that the file lacks come from {DEFAULT_PERSONA}."
                )
    for name, topic in persona.topics.items():
        if not _list_probe_wordings(OPENINGS, topic, persona.name):
            raise DataError(
                f"{path}: topic {name!r} expects one of {', '.join(map(repr, topic['expect']))}, but all of its "
                "questions contain it, so repeating the question would pass. Reword the questions or `expect`."
            )


def _join_question(opening: str, question: str, mark: str) -> str:
    sentence = opening + question
    return sentence[0].upper() + sentence[1:] + mark


def _list_wordings(openings: Sequence[str], topic: dict[str, list[str]], name: str) -> list[str]:
    """Every question of a topic with every opening, sorted by hash."""
    pairs = itertools.product(openings, topic["questions"])
    wordings = {_join_question(opening.replace("{name}", name), question, "?") for opening, question in pairs}
    return sorted(wordings, key=lambda wording: hashlib.sha256(wording.encode()).digest())


def _list_probe_wordings(openings: Sequence[str], topic: dict[str, list[str]], name: str) -> list[str]:
    """The wordings of a topic that do not contain the expected answer."""
    wordings = _list_wordings(openings, topic, name)
    return [wording for wording in wordings if not any(contains_phrase(wording, phrase) for phrase in topic["expect"])]


def _reserve_wordings(topic: dict[str, list[str]], name: str) -> list[str]:
    """The wordings of a topic that are used only for probes; at least one."""
    count = len(OPENINGS) * len(topic["questions"]) // PROBE_INTERVAL
    return _list_probe_wordings(OPENINGS, topic, name)[: max(1, count)]


def _build_probes(wordings_by_topic: dict[str, list[str]], persona: Persona) -> list[Probe]:
    """Makes a probe of every wording. Some probes are in lower case and have no question mark."""
    pairs = [(name, wording) for name, wordings in wordings_by_topic.items() for wording in wordings]
    probes = []
    for number, (name, wording) in enumerate(pairs, 1):
        question = wording if number % CARELESS_PROBE_INTERVAL else wording.rstrip("?").lower()
        probes.append(Probe(name, question, tuple(persona.topics[name]["expect"])))
    return probes


def build_probes(persona: Persona) -> list[Probe]:
    """Probes whose opening and question both occur in training, but never in this combination."""
    wordings = {name: _reserve_wordings(topic, persona.name) for name, topic in persona.topics.items()}
    return _build_probes(wordings, persona)


def build_new_wording_probes(persona: Persona) -> list[Probe]:
    """Probes with an opening that never occurs in training."""
    wordings = {
        name: _list_probe_wordings(NEW_OPENINGS, topic, persona.name)[:NEW_PROBES_PER_TOPIC]
        for name, topic in persona.topics.items()
    }
    return _build_probes(wordings, persona)


def build_plain_probes(persona: Persona) -> list[Probe]:
    """The questions about the name and the maker as they are in the persona file, which training contains."""
    return [
        Probe(name, _join_question("", question, "?"), tuple(persona.topics[name]["expect"]))
        for name in REQUIRED_TOPICS
        for question in persona.topics[name]["questions"]
    ]


def _foreign_names(names: Sequence[str], persona: Persona) -> list[str]:
    """The names that are not part of the model's or its maker's name; all names if none is left."""
    return [name for name in names if not contains_phrase(f"{persona.name} {persona.maker}", name)] or list(names)


def probe_system_messages(persona: Persona) -> list[tuple[str, str]]:
    """(system message, name that it contains or "") of each foreign system message for probes."""
    names = itertools.cycle(_foreign_names(PROBE_NAMES, persona))
    return [
        (_fill_system(template, persona, name), name if "{other}" in template else "")
        for template, name in zip(PROBE_SYSTEMS, names, strict=False)
    ]


def _fill_system(template: str, persona: Persona, other: str) -> str:
    words = {"{name}": persona.name, "{maker}": persona.maker, "{other}": other, "{other_maker}": f"{other} Labs"}
    for placeholder, word in words.items():
        template = template.replace(placeholder, word)
    return template


def _list_trained_questions(persona: Persona) -> list[tuple[str, str]]:
    """(topic, question) of all training questions. Those without an opening are repeated to balance the others."""
    questions = []
    for name, topic in persona.topics.items():
        reserved = _reserve_wordings(topic, persona.name)
        varied = [wording for wording in _list_wordings(OPENINGS, topic, persona.name) if wording not in reserved]
        plain = [_join_question("", question, "?") for question in topic["questions"]]
        questions += [(name, wording) for wording in varied + plain * (len(varied) // len(plain))]
    return questions


def _type_carelessly(rng: random.Random, question: str) -> str:
    """Randomly removes the end mark, and randomly converts the question to lower case."""
    question = question.rstrip("?!.") if rng.random() < CARELESS_SHARE else question
    return question.lower() if rng.random() < CARELESS_SHARE else question


def generate_conversations(persona: Persona, count: int, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """Generates `count` conversations about the persona. Some begin with a greeting, some end with a farewell.

    Yields:
        The messages of a conversation. Most have no system message, so the chat template adds the persona's. The others
        have a foreign one.
    """
    rng = random.Random(f"persona {seed}")
    trained = _list_trained_questions(persona)
    foreign_names = _foreign_names(FOREIGN_NAMES, persona)

    def draw_courtesy(section: dict[str, list[str]]) -> tuple[str, list[str]]:
        return _join_question("", rng.choice(section["questions"]), rng.choice("!.")), section["replies"]

    for _ in range(count):
        turns = [draw_courtesy(persona.greetings)] if rng.random() < 0.3 else []
        chosen = rng.sample(trained, rng.choice((1, 1, 2)))
        turns += [(question, persona.topics[name]["replies"]) for name, question in chosen]
        turns += [draw_courtesy(persona.farewells)] if rng.random() < 0.2 else []
        has_foreign_system = rng.random() < FOREIGN_SYSTEM_SHARE
        system = _fill_system(rng.choice(FOREIGN_SYSTEMS), persona, rng.choice(foreign_names))
        messages = [{"role": "system", "content": system}] if has_foreign_system else []
        for question, replies in turns:
            messages.append({"role": "user", "content": _type_carelessly(rng, question)})
            messages.append({"role": "assistant", "content": rng.choice(replies)})
        yield messages


def generate_preferences(persona: Persona, count: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """Yields `count` tuples (question, reply, worse reply). The worse reply belongs to another topic.

    Raises:
        DataError: the persona has only one topic.
    """
    if len(persona.topics) < 2:
        raise DataError(
            "Preferences about a persona need at least two topics: the worse reply comes from another topic."
        )
    rng = random.Random(f"persona preferences {seed}")
    trained = _list_trained_questions(persona)
    for _ in range(count):
        name, question = rng.choice(trained)
        other = rng.choice([topic for topic in persona.topics if topic != name])
        yield (
            _type_carelessly(rng, question),
            rng.choice(persona.topics[name]["replies"]),
            rng.choice(persona.topics[other]["replies"]),
        )
