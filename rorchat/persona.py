"""Who the model is: a persona file becomes a system message, identity conversations and probes.

No API is asked for synthetic data: questions, openings and replies combine into some hundred different conversations.
A share of the wordings, chosen by a hash, is never trained: those are the probes, so that a probe tests what the model
learned and not what it memorised.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from rorchat.errors import DataError

DEFAULT_PERSONA = Path(__file__).with_name("persona.yaml")
OPENINGS = (
    "",
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


@dataclass(frozen=True)
class Persona:
    """A parsed persona file; `system` is the default system message."""

    name: str
    maker: str
    system: str
    topics: dict[str, dict[str, list[str]]]
    greetings: dict[str, list[str]]
    farewells: dict[str, list[str]]


@dataclass(frozen=True)
class Probe:
    """A question about the persona in an untrained wording; a reply passes when it contains any of `expect`."""

    topic: str
    question: str
    expect: tuple[str, ...]

    def passes(self, reply: str) -> bool:
        return any(phrase.lower() in reply.lower() for phrase in self.expect)


def load_persona(path: str | Path | None = None) -> Persona:
    """The persona in a YAML file, or RorChat himself.

    Raises:
        DataError: the file is missing, is not YAML, or lacks a part.
    """
    path = Path(path or DEFAULT_PERSONA)
    try:
        persona = Persona(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"No persona file {path}. Copy {DEFAULT_PERSONA} and change it.") from None
    except (yaml.YAMLError, TypeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is no persona file: {reason}. Copy {DEFAULT_PERSONA} and change it.") from None
    _check_parts(persona, path)
    return persona


def _check_parts(persona: Persona, path: Path) -> None:
    """Raises DataError unless every topic, the greetings and the farewells have their lists of texts."""
    for part in ("name", "maker", "system"):
        value = getattr(persona, part)
        if not isinstance(value, str) or (part == "name" and not value):
            raise DataError(f"{path}: {part} is {value!r}; expected text.")
    if not isinstance(persona.topics, dict) or not persona.topics:
        raise DataError(f"{path}: no topics. Copy {DEFAULT_PERSONA} and change it.")
    sections = [
        (f"topic {name!r}", topic, ("questions", "replies", "expect")) for name, topic in persona.topics.items()
    ]
    sections += [(name, getattr(persona, name), ("questions", "replies")) for name in ("greetings", "farewells")]
    for name, section, parts in sections:
        texts = {part: section.get(part) if isinstance(section, dict) else None for part in parts}
        lacking = [
            part
            for part, listed in texts.items()
            if not isinstance(listed, list) or not listed or not all(isinstance(t, str) and t for t in listed)
        ]
        if lacking:
            raise DataError(f"{path}: {name} lacks {', '.join(lacking)}: give each as a list of texts.")


def _asked(opening: str, question: str, mark: str) -> str:
    sentence = opening + question
    return sentence[0].upper() + sentence[1:] + mark


def _wordings(topic: dict[str, list[str]], name: str) -> Iterator[tuple[str, bool]]:
    """Every wording of a topic's questions, and whether it is kept for the probes."""
    for opening, question in itertools.product(OPENINGS, topic["questions"]):
        asked = _asked(opening.replace("{name}", name), question, "?")
        # The plain question is always trained: it is what people type.
        probe = opening != "" and hashlib.sha256(asked.encode()).digest()[0] % PROBE_SHARE == 0
        yield asked, probe


def probes(persona: Persona) -> list[Probe]:
    """The questions about the persona that no training conversation asks in the same words."""
    return [
        Probe(name, asked, tuple(topic["expect"]))
        for name, topic in persona.topics.items()
        for asked, is_probe in _wordings(topic, persona.name)
        if is_probe
    ]


def _trained(persona: Persona) -> list[tuple[str, str]]:
    """(topic, wording) of every question that is trained. A plain one counts as often as its variants."""
    trained = []
    for name, topic in persona.topics.items():
        varied = [asked for asked, is_probe in _wordings(topic, persona.name) if not is_probe]
        plain = [_asked("", question, "?") for question in topic["questions"]]
        trained += [(name, asked) for asked in varied + plain * (len(varied) // len(plain))]
    return trained


def conversations(persona: Persona, count: int, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """`count` conversations about the persona: some begin with a greeting, some end with a farewell.

    Yields:
        Messages without a system turn: the chat template adds the persona's own.
    """
    draw = random.Random(f"persona {seed}")
    trained = _trained(persona)

    def courtesy(section: dict[str, list[str]]) -> tuple[str, list[str]]:
        return _asked("", draw.choice(section["questions"]), draw.choice("!.")), section["replies"]

    for _ in range(count):
        turns = [courtesy(persona.greetings)] if draw.random() < 0.3 else []
        turns += [
            (asked, persona.topics[name]["replies"]) for name, asked in draw.sample(trained, draw.choice((1, 1, 2)))
        ]
        turns += [courtesy(persona.farewells)] if draw.random() < 0.2 else []
        yield [
            message
            for question, replies in turns
            for message in (
                {"role": "user", "content": question},
                {"role": "assistant", "content": draw.choice(replies)},
            )
        ]


def preferences(persona: Persona, count: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
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
        yield question, draw.choice(persona.topics[name]["replies"]), draw.choice(persona.topics[other]["replies"])
