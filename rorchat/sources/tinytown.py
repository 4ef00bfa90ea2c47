"""Tinytown: a small world, generated from a seed, that a small model can come to know well within minutes.

The embedded default: no network, no licence to mind, and because its truth is known, its result can be scored. Twenty
people live in Tinytown; each has a job, a home, a pet, a favourite food and a favourite colour. Documents tell of them,
of small events, and of sums; conversations ask for the same things; preferences oppose a good answer to a worse one.

Held-out questions are disjoint from training by construction: whether an instance is held out is a hash of the instance
itself, asked wherever one is generated. No document, conversation, preference or question of training contains

- a question for a held-out fact, in any wording (that the fact is so is stated: a model could not know it otherwise);
- a held-out sum, in any wording or order of its numbers;
- a story made of the held-out choice of people, thing and place.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rorchat.persona import Persona, contains_phrase

KIND = ("document", "conversation", "preference", "question")
LICENCE = "Apache-2.0"
SIZE = "any amount, generated"

WORLD_SEED = 2025  # who lives where: the same for everyone, so that scores can be compared
LARGEST_NUMBER = 99

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Uma".split()
ATTRIBUTES = {
    "job": "baker teacher doctor farmer painter sailor gardener driver singer writer".split(),
    "home": [
        "by the river", "near the mill", "on the hill", "behind the school",
        "next to the park", "at the lake", "in the forest", "over the bakery",
    ],
    "pet": "cat dog rabbit parrot goat turtle pony mouse".split(),
    "food": "soup bread cheese apples cake rice fish honey".split(),
    "colour": "red blue green yellow purple orange white black".split(),
}  # fmt: skip
OBJECTS = "kite ball hat drum boat lamp key book bag cup coin shell".split()
PLACES = "Eastgate Westfield Northbridge Southport Hillside Lakeview Oldtown Newmarket".split()

# How the town speaks of a fact: statements, questions, and the answer in a full sentence.
STATEMENTS = {
    "job": ("{name} is a {value}.", "{name} works as a {value}.", "The job of {name} is {value}."),
    "home": ("{name} lives {value}.", "The house of {name} is {value}.", "{name} has a home {value}."),
    "pet": ("{name} has a {value}.", "The pet of {name} is a {value}.", "{name} keeps a {value} as a pet."),
    "food": ("{name} likes to eat {value}.", "{name} loves {value}.", "The favourite food of {name} is {value}."),
    "colour": (
        "{name} likes the colour {value}.",
        "The favourite colour of {name} is {value}.",
        "{name} wears {value} every day.",
    ),
}
QUESTIONS = {
    "job": ("What is the job of {name}?", "What does {name} work as?", "Which job does {name} have?"),
    "home": ("Where does {name} live?", "Where is the house of {name}?", "Where is the home of {name}?"),
    "pet": ("Which pet does {name} have?", "What is the pet of {name}?", "What animal does {name} keep?"),
    "food": ("What does {name} like to eat?", "What is the favourite food of {name}?", "Which food does {name} love?"),
    "colour": (
        "What is the favourite colour of {name}?",
        "Which colour does {name} like?",
        "What colour does {name} wear?",
    ),
}
ANSWERS = {attribute: statements[0] for attribute, statements in STATEMENTS.items()}
SUM_QUESTIONS = {
    "+": ("What is {a} plus {b}?", "How much is {a} plus {b}?", "Can you add {a} and {b}?"),
    "-": ("What is {a} minus {b}?", "How much is {a} minus {b}?", "Can you take {b} from {a}?"),
}
SUM_ANSWERS = {"+": "{a} plus {b} is {result}.", "-": "{a} minus {b} is {result}."}
TELL_ME = ("Tell me about {name}.", "What do you know about {name}?", "Who is {name}?")


def _a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _hashed(*key: object) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, key)).encode()).digest()[:4])


def _build_world() -> dict[str, dict[str, str]]:
    draw = random.Random(WORLD_SEED)
    return {name: {attribute: draw.choice(values) for attribute, values in ATTRIBUTES.items()} for name in NAMES}


WORLD = _build_world()


def fact_is_held_out(name: str, attribute: str) -> bool:
    """Whether nobody in training ever asks this of this person."""
    return _hashed("fact", name, attribute) % 4 == 0


def sum_is_held_out(a: int, operation: str, b: int) -> bool:
    """Whether this sum never occurs in training, nor b + a with a + b. The sums of small numbers are all taught."""
    low, high = sorted((a, b)) if operation == "+" else (a, b)
    return high > 9 and _hashed("sum", low, operation, high) % 8 == 0


def _numbers(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in text).split()


@dataclass(frozen=True)
class Question:
    """A question with a known answer: a reply is right if it has the answer and none of the alternatives to it."""

    kind: str
    text: str
    answer: str
    alternatives: tuple[str, ...] = ()

    def is_right(self, reply: str) -> bool:
        if self.kind == "sum":  # the question's own numbers may be said again, before the answer and no other number
            said, asked = _numbers(reply), _numbers(self.text)
            return said[-1:] == [self.answer] and set(said) <= {*asked, self.answer}
        others = (other for other in self.alternatives if other != self.answer)
        return contains_phrase(reply, self.answer) and not any(contains_phrase(reply, other) for other in others)


@dataclass(frozen=True)
class Story:
    """A small event: somebody finds a thing somewhere and gives it to somebody, who takes it elsewhere."""

    finder: str
    colour: str
    thing: str
    place: str
    receiver: str
    goal: str

    @property
    def held_out(self) -> bool:
        return _hashed("story", self.finder, self.thing, self.place, self.receiver) % 8 == 0

    def tellings(self) -> tuple[str, ...]:
        finder, colour, thing, place, receiver, goal = vars(self).values()
        return (
            f"{finder} was in {place}. In {place} {finder} found {_a(colour)} {thing}. {finder} gave the {colour} "
            f"{thing} to {receiver}. {receiver} took the {thing} to {goal}. Now the {thing} is in {goal}.",
            f"One day {finder} went to {place}. {finder} found {_a(colour)} {thing} in {place}. Then {receiver} "
            f"came, and {finder} gave the {colour} {thing} to {receiver}. In the evening {receiver} took the {thing} "
            f"to {goal}. {receiver} stayed in {goal}.",
            f"There was {_a(colour)} {thing} in {place}. {finder} came to {place} and found the {thing}. {receiver} "
            f"was sad, so {finder} gave the {colour} {thing} to {receiver}. {receiver} took the {thing} to {goal}. "
            f"In {goal} {receiver} was happy.",
        )

    def questions(self) -> list[tuple[Question, str]]:
        """Each question with its answer in a full sentence."""
        finder, colour, thing, place, receiver, goal = vars(self).values()

        def ask(text: str, answer: str, alternatives: list[str], sentence: str) -> tuple[Question, str]:
            return Question("story", text, answer, tuple(alternatives)), sentence

        found = [other for other in OBJECTS if other != thing]
        return [
            ask(f"What did {finder} find?", f"{colour} {thing}", found, f"{finder} found {_a(colour)} {thing}."),
            ask(f"Who found the {thing}?", finder, NAMES, f"{finder} found the {thing}."),
            ask(f"Where did {finder} find the {thing}?", place, PLACES, f"{finder} found the {thing} in {place}."),
            ask(f"Who got the {thing}?", receiver, NAMES, f"{receiver} got the {thing}."),
            ask(f"Where did {receiver} take the {thing}?", goal, PLACES, f"{receiver} took the {thing} to {goal}."),
            ask(f"What colour was the {thing}?", colour, ATTRIBUTES["colour"], f"The {thing} was {colour}."),
        ]


def _draw_story(draw: random.Random, held_out: bool) -> Story:
    while True:
        finder, receiver = draw.sample(NAMES, 2)
        place, goal = draw.sample(PLACES, 2)
        story = Story(finder, draw.choice(ATTRIBUTES["colour"]), draw.choice(OBJECTS), place, receiver, goal)
        if story.held_out == held_out:
            return story


def _all_sums() -> list[tuple[int, str, int]]:
    numbers = range(1, LARGEST_NUMBER)
    # Nothing is carried, but for the sums of two digits: a carry takes more steps to learn than the demo has.
    pairs = [
        (a, b) for a in numbers for b in numbers if a + b <= LARGEST_NUMBER and (a % 10 + b % 10 < 10 or max(a, b) < 10)
    ]
    return [(a, "+", b) for a, b in pairs] + [(a + b, "-", b) for a, b in pairs]


FACTS = [(name, attribute) for name in NAMES for attribute in ATTRIBUTES]
SUMS = _all_sums()
TRAINED_FACTS = [fact for fact in FACTS if not fact_is_held_out(*fact)]
TRAINED_SUMS = [item for item in SUMS if not sum_is_held_out(*item)]

Exchange = tuple[str, str]  # what is asked, and the answer in a full sentence


def _fact(name: str, attribute: str, wording: str) -> str:
    return wording.format(name=name, value=WORLD[name][attribute])


def _fact_exchange(draw: random.Random) -> list[Exchange]:
    if draw.random() < 0.2:
        name = draw.choice(NAMES)
        told = " ".join(_fact(name, attribute, ANSWERS[attribute]) for attribute in draw.sample(list(ATTRIBUTES), 5))
        return [(draw.choice(TELL_ME).format(name=name), told)]
    name, attribute = draw.choice(TRAINED_FACTS)
    return [(draw.choice(QUESTIONS[attribute]).format(name=name), _fact(name, attribute, ANSWERS[attribute]))]


def _result(a: int, operation: str, b: int) -> int:
    return a + b if operation == "+" else a - b


def _sum_exchange(draw: random.Random) -> list[Exchange]:
    a, operation, b = draw.choice(TRAINED_SUMS)
    answer = SUM_ANSWERS[operation].format(a=a, b=b, result=_result(a, operation, b))
    return [(draw.choice(SUM_QUESTIONS[operation]).format(a=a, b=b), answer)]


def _story_exchange(draw: random.Random) -> list[Exchange]:
    story = _draw_story(draw, held_out=False)
    asked = draw.sample(story.questions(), draw.choice((1, 2, 3)))
    first, *more = [(question.text, sentence) for question, sentence in asked]
    return [(f"{draw.choice(story.tellings())} {first[0]}", first[1]), *more]


def _fact_document(draw: random.Random) -> str:
    name, attributes = draw.choice(NAMES), draw.sample(list(ATTRIBUTES), 5)
    lines = [_fact(name, attribute, draw.choice(STATEMENTS[attribute])) for attribute in attributes]
    for attribute in draw.sample(attributes, 2):
        if not fact_is_held_out(name, attribute):
            lines += [
                _fact(name, attribute, draw.choice(QUESTIONS[attribute])),
                _fact(name, attribute, ANSWERS[attribute]),
            ]
    return " ".join(lines)


def _sum_document(draw: random.Random) -> str:
    lines = []
    for a, operation, b in draw.choices(TRAINED_SUMS, k=6):
        if draw.random() < 0.5:
            lines.append(f"{a} {operation} {b} = {_result(a, operation, b)}.")
        else:
            lines += _sum_lines(draw, a, operation, b)
    return " ".join(lines)


def _sum_lines(draw: random.Random, a: int, operation: str, b: int) -> list[str]:
    question = draw.choice(SUM_QUESTIONS[operation]).format(a=a, b=b)
    return [question, SUM_ANSWERS[operation].format(a=a, b=b, result=_result(a, operation, b))]


def _story_document(draw: random.Random) -> str:
    story = _draw_story(draw, held_out=False)
    asked = draw.sample(story.questions(), 3)
    return " ".join([draw.choice(story.tellings()), *(f"{question.text} {sentence}" for question, sentence in asked)])


EXCHANGES = (_fact_exchange, _sum_exchange, _story_exchange)
DOCUMENTS = (_fact_document, _sum_document, _story_document)
SHARES = (2, 5, 4)  # of facts, sums and stories; facts are the easiest to learn


def _document(draw: random.Random) -> dict:
    return {"text": draw.choices(DOCUMENTS, SHARES)[0](draw)}


def _messages(exchanges: list[Exchange]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": content}
        for exchange in exchanges
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]


def _conversation(draw: random.Random) -> dict:
    exchanges = []
    for _ in range(draw.choice((1, 2, 3, 4))):
        exchanges += draw.choices(EXCHANGES, SHARES)[0](draw)
    return {"messages": _messages(exchanges)}


def _worse(draw: random.Random, answer: str, other: str) -> str:
    """A reply that is worse than `answer`: another question's answer, silence, or the answer said again and again."""
    return draw.choice((other, "I do not know.", f"{answer} {answer} {answer}"))


def _preference(draw: random.Random) -> dict:
    kind = draw.choices(EXCHANGES, SHARES)[0]
    (question, answer), *_ = kind(draw)
    while (other := kind(draw)[0][1]) == answer:
        pass
    prompt, reply = _messages([(question, answer)])
    return {"prompt": [prompt], "chosen": [reply], "rejected": [{**reply, "content": _worse(draw, answer, other)}]}


def _fact_question(name: str, attribute: str, wording: str) -> Question:
    return Question("fact", wording.format(name=name), WORLD[name][attribute], tuple(ATTRIBUTES[attribute]))


def _sum_question(a: int, operation: str, b: int, wording: str) -> Question:
    return Question("sum", wording.format(a=a, b=b), str(_result(a, operation, b)))


def _question(draw: random.Random) -> dict:
    """One of the questions that training may ask, with its answer."""
    kind = draw.choices(("fact", "sum", "story"), SHARES)[0]
    if kind == "fact":
        name, attribute = draw.choice(TRAINED_FACTS)
        asked = _fact_question(name, attribute, draw.choice(QUESTIONS[attribute]))
    elif kind == "sum":
        a, operation, b = draw.choice(TRAINED_SUMS)
        asked = _sum_question(a, operation, b, draw.choice(SUM_QUESTIONS[operation]))
    else:
        story = _draw_story(draw, held_out=False)
        question, _ = draw.choice(story.questions())
        asked = replace(question, text=f"{draw.choice(story.tellings())} {question.text}")
    return {
        "messages": [{"role": "user", "content": asked.text}],
        "answer": asked.answer,
        "alternatives": list(asked.alternatives),
        "topic": asked.kind,
    }


_GENERATORS: dict[str, Callable[[random.Random], dict]] = {
    "document": _document,
    "conversation": _conversation,
    "preference": _preference,
    "question": _question,
}


def generate(kind: str, amount: int, seed: int, persona: Persona | None = None) -> Iterator[dict]:
    """`amount` rows of a kind; the same ones for the same seed. `persona` plays no part."""
    draw = random.Random(f"{kind} {seed}")
    for _ in range(amount):
        yield _GENERATORS[kind](draw)


def held_out_questions(count: int = 200, seed: int = 0) -> list[Question]:
    """Held-out questions with known answers, a third of each kind: facts, sums, and stories just told."""
    draw = random.Random(f"questions {seed}")
    facts = [
        _fact_question(name, attribute, wording)
        for name, attribute in FACTS
        if fact_is_held_out(name, attribute)
        for wording in QUESTIONS[attribute]
    ]
    sums = [
        _sum_question(a, operation, b, draw.choice(SUM_QUESTIONS[operation]))
        for a, operation, b in SUMS
        if sum_is_held_out(a, operation, b)
    ]
    stories = []
    while len(stories) < -(-count // 3):
        story = _draw_story(draw, held_out=True)
        question, _ = draw.choice(story.questions())
        told = f"{draw.choice(story.tellings())} {question.text}"
        stories.append(replace(question, text=told))
    each = [draw.sample(kind, min(len(kind), -(-count // 3))) for kind in (facts, sums, stories)]
    return [question for group in zip(*each, strict=False) for question in group][:count]
