"""Who the model is: a persona file becomes a system message, identity conversations and probes.

No API is asked for synthetic data: questions, openings and replies combine into some hundred different conversations.
A share of the wordings, chosen by a hash, is never trained: those are the probes, so that a probe tests what the model
learned and not what it memorised. Harder ones begin with an opening that training never has. A share of the
conversations has another system message than the persona's, so that the model is the same one whatever a server sends;
other such messages are kept for the probes.
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
PARTS = ("name", "maker", "manner", "system", "facts", "unknowns", "greetings", "farewells")
REQUIRED_TOPICS = ("name", "maker")  # topics that a file's own facts do not take away
HONEST = {  # what a topic of `unknowns` has where the file says no more
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
PROBE_SHARE = 8  # one wording in so many is a probe and never trained
NEW_OPENINGS = ("hello there, ", "good morning, ", "can you tell me, ", "one more question: ", "I want to know, ")
NEW_PROBES = 2  # of a topic, that begin with one of these
CARELESS_SHARE = 0.2  # of the questions has no mark, and as many are in lower case: that is how people type
CARELESS_PROBES = 4  # one probe in so many is both

SYSTEM_SHARE = 0.3  # of the conversations have one of these instead of the persona's own system message
SYSTEMS = (
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
OTHERS = ("Ada", "Bolt", "Echo", "Juno", "Max", "Milo", "Pixel", "Robo")  # names that are not the model's
PROBED_SYSTEMS = (
    "You are a careful assistant who answers questions.",
    "Be polite and honest.",
    "You are a friend of the user.",
    "From now on you are {other}.",
    "You are called {other}, and {other_maker} built you.",
    "This is {other}, a helpful chat model.",
)
PROBED_OTHERS = ("Nova", "Orion", "Zara")
_MARKS = " ?!.\uff1f\u3002"  # that end a question, full-width ones too
_ALLOWED = f"A persona has {', '.join(PARTS)}; name and maker are needed."
_EXAMPLES = {"name": "RorChat", "maker": "Rory", "manner": "small and friendly", "system": "You are kind."}
_PLACEHOLDER = re.compile(r"(\ba )?\{(\w+)\}", re.IGNORECASE)


@dataclass(frozen=True)
class Persona:
    """A parsed persona file; `system` is the default system message, `topics` are its facts and its unknowns."""

    name: str
    maker: str
    system: str
    topics: dict[str, dict[str, list[str]]]
    greetings: dict[str, list[str]]
    farewells: dict[str, list[str]]


@dataclass(frozen=True)
class Probe:
    """A question about the persona in an untrained wording; a reply passes when it says any of `expect`."""

    topic: str
    question: str
    expect: tuple[str, ...]

    def passes(self, reply: str) -> bool:
        return any(contains_phrase(reply, phrase) for phrase in self.expect)


def _spaced(text: str) -> str:
    """The words of a text in lower case, a blank on each side; each letter of a script that writes no capitals."""
    # Such scripts (Chinese, Japanese, Korean, Thai) mostly write no blank between a name and the words around it
    letters = (c if c.isdecimal() or c != c.upper() else f" {c} " if c.isalnum() else " " for c in text.lower())
    return f" {' '.join(''.join(letters).split())} "


def contains_phrase(reply: str, phrase: str) -> bool:
    """Whether a reply has these words, one after the other, whatever stands around them; symbols as they are."""
    words = _spaced(phrase)
    return words in _spaced(reply) if words.strip() else phrase.strip() in reply


def load_persona(path: str | Path | None = None) -> Persona:
    """The persona in a YAML file, or RorChat himself. `persona.yaml` says what a file may hold; name and maker it must.

    Raises:
        DataError: the file is missing, is not YAML, lacks its name or maker, or has a part that cannot be used.
    """
    path = Path(path or DEFAULT_PERSONA)
    default = read_yaml(DEFAULT_PERSONA, "persona file")
    parts = _parts(path, read_yaml(path, "persona file", like=DEFAULT_PERSONA), default)
    topics = {topic: default["facts"][topic] for topic in REQUIRED_TOPICS} | parts["facts"]
    topics |= {topic: {**HONEST, **section} for topic, section in parts["unknowns"].items()}
    values = {"topics": topics, **{part: parts[part] for part in ("system", "greetings", "farewells")}}
    words = {part: parts[part].strip() for part in ("name", "maker", "manner")}
    persona = Persona(words["name"], words["maker"], **_filled(values, words, path))
    _check_texts(persona, path)
    topics = {name: {**topic, "questions": _questions(topic, persona)} for name, topic in persona.topics.items()}
    persona = replace(persona, topics=topics)
    _check_questions(persona, path)
    return persona


def _parts(path: Path, given: dict, default: dict) -> dict:
    """What a file holds, checked, and the default's parts for what it leaves out."""
    for part in given:
        if part not in PARTS:
            raise DataError(f"{path}: no part is called {part!r}.{did_you_mean(str(part), PARTS)} {_ALLOWED}")
    parts = {**default, "name": None, "maker": None, **given}
    for part in ("name", "maker", "manner", "system"):
        _check_text(path, part, parts[part])
    for part in ("facts", "unknowns"):
        if not isinstance(parts[part], dict):
            raise DataError(f"{path}: {part!r} is {_short(parts[part])}: give topics with their questions.")
    for part, other in (("facts", "unknowns"), ("unknowns", "facts")):
        if part not in given:  # a topic of the file is not a default one of the other part as well
            parts[part] = {topic: section for topic, section in parts[part].items() if topic not in parts[other]}
    _check_sections(path, parts)
    return parts


def _short(value: object) -> str:
    said = repr(value)
    return said if len(said) <= 60 else said[:60] + "..."


def _check_text(path: Path, part: str, value: object) -> None:
    """Raises DataError unless a part is text; only the system message may be empty, for none."""
    if not isinstance(value, str) or (part != "system" and not value.strip()):
        given = "is missing" if value is None else f"is {_short(value)}"
        raise DataError(f"{path}: {part!r} {given}: give it as text, as in `{part}: {_EXAMPLES[part]}`.")


def _check_sections(path: Path, parts: dict) -> None:
    """Raises DataError unless facts and unknowns share no topic and every section is a mapping with known keys."""
    both = [topic for topic in parts["facts"] if topic in parts["unknowns"]]
    if both:
        raise DataError(f"{path}: the topic {both[0]!r} stands in facts and in unknowns: leave one out.")
    sections = {**parts["facts"], **parts["unknowns"]} | {part: parts[part] for part in ("greetings", "farewells")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise DataError(f"{path}: {name!r} is {_short(section)}: give its questions and its replies.")
        for key in section:
            if key not in ("questions", "replies", "expect"):
                hint = did_you_mean(str(key), ("questions", "replies", "expect"))
                raise DataError(f"{path}: {name!r} has {key!r}.{hint} Known are questions, replies, expect.")


def _filled(value: object, words: dict[str, str], path: Path):
    """A value of the file with the placeholders of all texts in it filled; "a {manner}" may become "an ..."."""

    def fill(match: re.Match) -> str:
        article, name = match.groups()
        if name not in words:
            known = ", ".join(f"{{{word}}}" for word in words)
            raise DataError(f"{path}: {match[0]!r} is no placeholder.{did_you_mean(name, words)} Known are {known}.")
        vowel = article and words[name][0].lower() in "aeiou"
        return (article.replace(" ", "n ") if vowel else article or "") + words[name]

    if isinstance(value, str):
        return _PLACEHOLDER.sub(fill, value)
    if isinstance(value, list):
        return [_filled(each, words, path) for each in value]
    if isinstance(value, dict):
        return {key: _filled(each, words, path) for key, each in value.items()}
    return value


def _check_texts(persona: Persona, path: Path) -> None:
    """Raises DataError unless every topic and courtesy has its lists of texts, and every reply passes its own probe."""
    sections = [
        (f"topic {name!r}", topic, ("questions", "replies", "expect")) for name, topic in persona.topics.items()
    ]
    sections += [(name, getattr(persona, name), ("questions", "replies")) for name in ("greetings", "farewells")]
    for name, section, parts in sections:
        texts = {part: section.get(part) for part in parts}
        lacking = [
            part
            for part, listed in texts.items()
            if not isinstance(listed, list) or not listed or not all(isinstance(t, str) and t.strip() for t in listed)
        ]
        if lacking:
            raise DataError(f"{path}: {name} lacks {', '.join(lacking)}: give each as a list of texts.")
    for name, topic in persona.topics.items():
        probe = Probe(name, "", tuple(topic["expect"]))
        failing = next((reply for reply in topic["replies"] if not probe.passes(reply)), None)
        if failing:
            raise DataError(
                f"{path}: topic {name!r} expects one of {', '.join(map(repr, topic['expect']))}, but its own reply "
                f"{_short(failing)} has none of them: a model that says it would fail."
            )


def _questions(topic: dict[str, list[str]], persona: Persona) -> list[str]:
    """A topic's questions as an opening can stand before them: without their mark, and small where that is right."""

    def plain(question: str) -> str:
        question = question.strip().rstrip(_MARKS)
        first = re.match(r"\w*", question)[0]
        name = first == "I" or any(contains_phrase(text, first) for text in (persona.name, persona.maker))
        return question if name or first[1:] != first[1:].lower() else question[:1].lower() + question[1:]

    return list(dict.fromkeys(map(plain, topic["questions"])))


def _check_questions(persona: Persona, path: Path) -> None:
    """Raises DataError where a question is empty, has two answers, or can only be asked with the answer in it."""
    courtesies = {part: getattr(persona, part) for part in ("greetings", "farewells")}
    homes: dict[str, str] = {}
    for name, section in (persona.topics | courtesies).items():
        for question in _questions(section, persona):
            home = homes.setdefault(question.lower(), name)
            if not question:
                raise DataError(f"{path}: {name!r} has a question without words: leave it out.")
            if home != name:
                raise DataError(
                    f"{path}: the question {_short(question)} stands in {home!r} and in {name!r}, whose replies would "
                    f"contradict each other: leave one out. What the file lacks is taken from {DEFAULT_PERSONA}."
                )
    for name, topic in persona.topics.items():
        if not _probed(OPENINGS, topic, persona.name):
            raise DataError(
                f"{path}: topic {name!r} expects one of {', '.join(map(repr, topic['expect']))}, which each of its "
                "questions says already: a model that repeats the question would pass. Ask, or expect, in other words."
            )


def _asked(opening: str, question: str, mark: str) -> str:
    sentence = opening + question
    return sentence[0].upper() + sentence[1:] + mark


def _wordings(openings: Sequence[str], topic: dict[str, list[str]], name: str) -> list[str]:
    """Every question of a topic with every opening, in the order of their hashes."""
    combined = itertools.product(openings, topic["questions"])
    asked = {_asked(opening.replace("{name}", name), question, "?") for opening, question in combined}
    return sorted(asked, key=lambda wording: hashlib.sha256(wording.encode()).digest())


def _probed(openings: Sequence[str], topic: dict[str, list[str]], name: str) -> list[str]:
    """The wordings of a topic that can be probes: they do not say what the reply is to say."""
    wordings = _wordings(openings, topic, name)
    return [wording for wording in wordings if not any(contains_phrase(wording, phrase) for phrase in topic["expect"])]


def _kept_for_probes(topic: dict[str, list[str]], name: str) -> list[str]:
    """The wordings of a topic that are probes and never trained: one in PROBE_SHARE, and one at least."""
    count = len(OPENINGS) * len(topic["questions"]) // PROBE_SHARE
    return _probed(OPENINGS, topic, name)[: max(1, count)]


def _probes(wordings: dict[str, list[str]], persona: Persona) -> list[Probe]:
    """Probes of the wordings of each topic, every fourth without its mark and in lower case."""
    asked = [(name, wording) for name, listed in wordings.items() for wording in listed]
    return [
        Probe(
            name,
            wording if number % CARELESS_PROBES else wording.rstrip("?").lower(),
            tuple(persona.topics[name]["expect"]),
        )
        for number, (name, wording) in enumerate(asked, 1)
    ]


def build_probes(persona: Persona) -> list[Probe]:
    """Questions about the persona that no training conversation asks in the same words; it has them in other pairs."""
    return _probes({name: _kept_for_probes(topic, persona.name) for name, topic in persona.topics.items()}, persona)


def build_new_wording_probes(persona: Persona) -> list[Probe]:
    """Questions about the persona with an opening that no training conversation has."""
    wordings = {name: _probed(NEW_OPENINGS, topic, persona.name) for name, topic in persona.topics.items()}
    return _probes({name: listed[:NEW_PROBES] for name, listed in wordings.items()}, persona)


def _others(names: Sequence[str], persona: Persona) -> list[str]:
    """The names that no word of the persona's own name or its maker's is; all where that leaves none."""
    return [name for name in names if not contains_phrase(f"{persona.name} {persona.maker}", name)] or list(names)


def probe_system_messages(persona: Persona) -> list[tuple[str, str]]:
    """(system message, the other name that it gives the model, or "") of every message that is kept for probes."""
    others = _others(PROBED_OTHERS, persona)
    return [
        (_system(text, persona, other), other if "{other}" in text else "")
        for text, other in zip(PROBED_SYSTEMS, itertools.cycle(others), strict=False)
    ]


def _system(template: str, persona: Persona, other: str) -> str:
    words = {"{name}": persona.name, "{maker}": persona.maker, "{other}": other, "{other_maker}": f"{other} Labs"}
    for placeholder, word in words.items():
        template = template.replace(placeholder, word)
    return template


def _trained(persona: Persona) -> list[tuple[str, str]]:
    """(topic, wording) of every question that is trained. A plain one counts as often as its variants."""
    trained = []
    for name, topic in persona.topics.items():
        kept = _kept_for_probes(topic, persona.name)
        varied = [asked for asked in _wordings(OPENINGS, topic, persona.name) if asked not in kept]
        plain = [_asked("", question, "?") for question in topic["questions"]]
        trained += [(name, asked) for asked in varied + plain * (len(varied) // len(plain))]
    return trained


def _typed(draw: random.Random, asked: str) -> str:
    """A question as people type it: now and then without its mark, now and then in lower case."""
    asked = asked.rstrip("?!.") if draw.random() < CARELESS_SHARE else asked
    return asked.lower() if draw.random() < CARELESS_SHARE else asked


def generate_conversations(persona: Persona, count: int, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """`count` conversations about the persona: some begin with a greeting, some end with a farewell.

    Yields:
        Messages without a system turn, to which the chat template adds the persona's own; three in ten with another.
    """
    draw = random.Random(f"persona {seed}")
    trained = _trained(persona)
    others = _others(OTHERS, persona)

    def courtesy(section: dict[str, list[str]]) -> tuple[str, list[str]]:
        return _asked("", draw.choice(section["questions"]), draw.choice("!.")), section["replies"]

    for _ in range(count):
        turns = [courtesy(persona.greetings)] if draw.random() < 0.3 else []
        turns += [
            (asked, persona.topics[name]["replies"]) for name, asked in draw.sample(trained, draw.choice((1, 1, 2)))
        ]
        turns += [courtesy(persona.farewells)] if draw.random() < 0.2 else []
        strange = draw.random() < SYSTEM_SHARE
        system = _system(draw.choice(SYSTEMS), persona, draw.choice(others))
        yield [{"role": "system", "content": system}] * strange + [
            message
            for question, replies in turns
            for message in (
                {"role": "user", "content": _typed(draw, question)},
                {"role": "assistant", "content": draw.choice(replies)},
            )
        ]


def generate_preferences(persona: Persona, count: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """`count` (question, reply, worse reply): the worse one answers another question about the persona.

    Raises:
        DataError: the persona has only one topic, so that no reply is worse.
    """
    if len(persona.topics) < 2:
        raise DataError("Preferences about a persona need at least two topics: the worse reply is another topic's.")
    draw = random.Random(f"persona preferences {seed}")
    trained = _trained(persona)
    for _ in range(count):
        name, question = draw.choice(trained)
        other = draw.choice([topic for topic in persona.topics if topic != name])
        yield (
            _typed(draw, question),
            draw.choice(persona.topics[name]["replies"]),
            draw.choice(persona.topics[other]["replies"]),
        )
