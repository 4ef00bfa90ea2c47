"""Tinytown: a small world, generated from a seed, that a small model can learn within minutes.

It needs no download, and every answer is known, so the trained model can be scored. Tinytown has twenty people. Every
person has a job, a home, a pet, a favourite food and a favourite colour. Documents contain facts about the people,
short stories and sums; conversations ask about them; preferences contrast a good answer with a worse one.

A hash of each fact, sum and story decides whether it is held out, so held-out questions never occur in training. No
document, conversation, preference or question contains

- a question about a held-out fact, in any wording. (Documents do state the fact, or no model could know it.)
- a held-out sum, in any wording or order of its numbers.
- a story with a held-out combination of people, object and place.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rorchat.persona import Persona, contains_phrase
from rorchat.rows import alternate_turns, message

KIND = ("document", "conversation", "preference", "question")
LICENCE = "Apache-2.0"
SIZE = "any amount, generated"

WORLD_SEED = 2025  # fixed, so that scores are comparable
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

# Wordings of the facts. The first statement also serves as the answer to a question.
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


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _hash(*key: object) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, key)).encode()).digest()[:4])


def _build_world() -> dict[str, dict[str, str]]:
    rng = random.Random(WORLD_SEED)
    return {name: {attribute: rng.choice(values) for attribute, values in ATTRIBUTES.items()} for name in NAMES}


WORLD = _build_world()


def fact_is_held_out(name: str, attribute: str) -> bool:
    """Whether questions about this attribute of this person are excluded from training."""
    return _hash("fact", name, attribute) % 4 == 0


def sum_is_held_out(a: int, operation: str, b: int) -> bool:
    """Whether this sum is excluded from training, like b + a for a + b. Sums of one-digit numbers never are."""
    low, high = sorted((a, b)) if operation == "+" else (a, b)
    return high > 9 and _hash("sum", low, operation, high) % 8 == 0


def _find_numbers(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in text).split()


@dataclass(frozen=True)
class Question:
    """A question with a known answer. A reply is correct if it contains the answer and none of the alternatives."""

    kind: str
    text: str
    answer: str
    alternatives: tuple[str, ...] = ()

    def is_right(self, reply: str) -> bool:
        if self.kind == "sum":  # the reply may repeat numbers of the question; its last number must be the answer
            reply_numbers, question_numbers = _find_numbers(reply), _find_numbers(self.text)
            return reply_numbers[-1:] == [self.answer] and set(reply_numbers) <= {*question_numbers, self.answer}
        others = (other for other in self.alternatives if other != self.answer)
        return contains_phrase(reply, self.answer) and not any(contains_phrase(reply, other) for other in others)


@dataclass(frozen=True)
class Story:
    """Somebody finds an object in a place and gives it to somebody else, who takes it to another place."""

    finder: str
    colour: str
    thing: str
    place: str
    receiver: str
    goal: str

    @property
    def is_held_out(self) -> bool:
        return _hash("story", self.finder, self.thing, self.place, self.receiver) % 8 == 0

    def wordings(self) -> tuple[str, ...]:
        finder, colour, thing, place, receiver, goal = vars(self).values()
        a_thing = _with_article(f"{colour} {thing}")
        return (
            f"{finder} was in {place}. In {place} {finder} found {a_thing}. {finder} gave the {colour} "
            f"{thing} to {receiver}. {receiver} took the {thing} to {goal}. Now the {thing} is in {goal}.",
            f"One day {finder} went to {place}. {finder} found {a_thing} in {place}. Then {receiver} "
            f"came, and {finder} gave the {colour} {thing} to {receiver}. In the evening {receiver} took the {thing} "
            f"to {goal}. {receiver} stayed in {goal}.",
            f"There was {a_thing} in {place}. {finder} came to {place} and found the {thing}. {receiver} "
            f"was sad, so {finder} gave the {colour} {thing} to {receiver}. {receiver} took the {thing} to {goal}. "
            f"In {goal} {receiver} was happy.",
        )

    def questions(self) -> list[tuple[Question, str]]:
        """(question, answer as a full sentence) for everything that can be asked about the story."""
        finder, colour, thing, place, receiver, goal = vars(self).values()
        a_thing = _with_article(f"{colour} {thing}")

        def ask(text: str, answer: str, alternatives: list[str], sentence: str) -> tuple[Question, str]:
            return Question("story", text, answer, tuple(alternatives)), sentence

        other_things = [other for other in OBJECTS if other != thing]
        return [
            ask(
                f"What did {finder} find?",
                f"{colour} {thing}",
                other_things,
                f"{finder} found {a_thing}.",
            ),
            ask(f"Who found the {thing}?", finder, NAMES, f"{finder} found the {thing}."),
            ask(f"Where did {finder} find the {thing}?", place, PLACES, f"{finder} found the {thing} in {place}."),
            ask(f"Who got the {thing}?", receiver, NAMES, f"{receiver} got the {thing}."),
            ask(f"Where did {receiver} take the {thing}?", goal, PLACES, f"{receiver} took the {thing} to {goal}."),
            ask(f"What colour was the {thing}?", colour, ATTRIBUTES["colour"], f"The {thing} was {colour}."),
        ]


def _draw_story(rng: random.Random, held_out: bool) -> Story:
    while True:
        finder, receiver = rng.sample(NAMES, 2)
        place, goal = rng.sample(PLACES, 2)
        story = Story(finder, rng.choice(ATTRIBUTES["colour"]), rng.choice(OBJECTS), place, receiver, goal)
        if story.is_held_out == held_out:
            return story


def _all_sums() -> list[tuple[int, str, int]]:
    numbers = range(1, LARGEST_NUMBER)
    # Only sums with a one-digit number have carries: others take more training steps to learn than the demo has
    pairs = [
        (a, b) for a in numbers for b in numbers if a + b <= LARGEST_NUMBER and (a % 10 + b % 10 < 10 or max(a, b) < 10)
    ]
    return [(a, "+", b) for a, b in pairs] + [(a + b, "-", b) for a, b in pairs]


FACTS = [(name, attribute) for name in NAMES for attribute in ATTRIBUTES]
SUMS = _all_sums()
TRAINED_FACTS = [fact for fact in FACTS if not fact_is_held_out(*fact)]
TRAINED_SUMS = [item for item in SUMS if not sum_is_held_out(*item)]

QuestionAndAnswer = tuple[str, str]  # the answer is a full sentence


def _fill_wording(name: str, attribute: str, wording: str) -> str:
    return wording.format(name=name, value=WORLD[name][attribute])


def _state_fact(name: str, attribute: str) -> str:
    return _fill_wording(name, attribute, ANSWERS[attribute])


def _compute(a: int, operation: str, b: int) -> int:
    return a + b if operation == "+" else a - b


def _ask_sum(rng: random.Random, a: int, operation: str, b: int) -> QuestionAndAnswer:
    question = rng.choice(SUM_QUESTIONS[operation]).format(a=a, b=b)
    return question, SUM_ANSWERS[operation].format(a=a, b=b, result=_compute(a, operation, b))


def _fact_conversation(rng: random.Random) -> list[QuestionAndAnswer]:
    if rng.random() < 0.2:
        name = rng.choice(NAMES)
        answer = " ".join(_state_fact(name, attribute) for attribute in rng.sample(list(ATTRIBUTES), 5))
        return [(rng.choice(TELL_ME).format(name=name), answer)]
    name, attribute = rng.choice(TRAINED_FACTS)
    return [(rng.choice(QUESTIONS[attribute]).format(name=name), _state_fact(name, attribute))]


def _sum_conversation(rng: random.Random) -> list[QuestionAndAnswer]:
    return [_ask_sum(rng, *rng.choice(TRAINED_SUMS))]


def _story_conversation(rng: random.Random) -> list[QuestionAndAnswer]:
    story = _draw_story(rng, held_out=False)
    chosen = rng.sample(story.questions(), rng.choice((1, 2, 3)))
    (question, answer), *others = [(question.text, answer) for question, answer in chosen]
    return [(f"{rng.choice(story.wordings())} {question}", answer), *others]


def _fact_document(rng: random.Random) -> str:
    name, attributes = rng.choice(NAMES), rng.sample(list(ATTRIBUTES), 5)
    sentences = [_fill_wording(name, attribute, rng.choice(STATEMENTS[attribute])) for attribute in attributes]
    for attribute in rng.sample(attributes, 2):
        if not fact_is_held_out(name, attribute):
            question = _fill_wording(name, attribute, rng.choice(QUESTIONS[attribute]))
            sentences += [question, _state_fact(name, attribute)]
    return " ".join(sentences)


def _sum_document(rng: random.Random) -> str:
    sentences = []
    for a, operation, b in rng.choices(TRAINED_SUMS, k=6):
        if rng.random() < 0.5:
            sentences.append(f"{a} {operation} {b} = {_compute(a, operation, b)}.")
        else:
            sentences += _ask_sum(rng, a, operation, b)
    return " ".join(sentences)


def _story_document(rng: random.Random) -> str:
    story = _draw_story(rng, held_out=False)
    chosen = rng.sample(story.questions(), 3)
    return " ".join([rng.choice(story.wordings()), *(f"{question.text} {answer}" for question, answer in chosen)])


TOPIC_WEIGHTS = (2, 5, 4)  # of facts, sums and stories; facts are the easiest to learn
CONVERSATIONS = (_fact_conversation, _sum_conversation, _story_conversation)
DOCUMENTS = (_fact_document, _sum_document, _story_document)


def _generate_document(rng: random.Random) -> dict:
    return {"text": rng.choices(DOCUMENTS, TOPIC_WEIGHTS)[0](rng)}


def _generate_conversation(rng: random.Random) -> dict:
    pairs: list[QuestionAndAnswer] = []
    for _ in range(rng.choice((1, 2, 3, 4))):
        pairs += rng.choices(CONVERSATIONS, TOPIC_WEIGHTS)[0](rng)
    return {"messages": alternate_turns([text for pair in pairs for text in pair])}


def _generate_preference(rng: random.Random) -> dict:
    """The worse reply is the answer to another question, a refusal, or the answer three times."""
    conversation = rng.choices(CONVERSATIONS, TOPIC_WEIGHTS)[0]
    (question, answer), *_ = conversation(rng)
    while (other := conversation(rng)[0][1]) == answer:
        pass
    worse = rng.choice((other, "I do not know.", f"{answer} {answer} {answer}"))
    return {
        "prompt": [message("user", question)],
        "chosen": [message("assistant", answer)],
        "rejected": [message("assistant", worse)],
    }


def _fact_question(name: str, attribute: str, wording: str) -> Question:
    return Question("fact", wording.format(name=name), WORLD[name][attribute], tuple(ATTRIBUTES[attribute]))


def _sum_question(a: int, operation: str, b: int, wording: str) -> Question:
    return Question("sum", wording.format(a=a, b=b), str(_compute(a, operation, b)))


def _story_question(rng: random.Random, held_out: bool) -> Question:
    story = _draw_story(rng, held_out)
    question, _ = rng.choice(story.questions())
    return replace(question, text=f"{rng.choice(story.wordings())} {question.text}")


def _generate_question(rng: random.Random) -> dict:
    kind = rng.choices(("fact", "sum", "story"), TOPIC_WEIGHTS)[0]
    if kind == "fact":
        name, attribute = rng.choice(TRAINED_FACTS)
        question = _fact_question(name, attribute, rng.choice(QUESTIONS[attribute]))
    elif kind == "sum":
        a, operation, b = rng.choice(TRAINED_SUMS)
        question = _sum_question(a, operation, b, rng.choice(SUM_QUESTIONS[operation]))
    else:
        question = _story_question(rng, held_out=False)
    return {
        "messages": [message("user", question.text)],
        "answer": question.answer,
        "alternatives": list(question.alternatives),
        "topic": question.kind,
    }


_GENERATORS: dict[str, Callable[[random.Random], dict]] = {
    "document": _generate_document,
    "conversation": _generate_conversation,
    "preference": _generate_preference,
    "question": _generate_question,
}


def generate(kind: str, amount: int, seed: int, persona: Persona | None = None) -> Iterator[dict]:
    """Generates `amount` rows of a kind, which depend only on the seed. `persona` is ignored."""
    rng = random.Random(f"{kind} {seed}")
    for _ in range(amount):
        yield _GENERATORS[kind](rng)


def held_out_questions(count: int = 200, seed: int = 0) -> list[Question]:
    """Held-out questions with known answers: one third each about facts, sums and stories (quoted in the question)."""
    rng = random.Random(f"questions {seed}")
    facts = [
        _fact_question(name, attribute, wording)
        for name, attribute in FACTS
        if fact_is_held_out(name, attribute)
        for wording in QUESTIONS[attribute]
    ]
    sums = [
        _sum_question(a, operation, b, rng.choice(SUM_QUESTIONS[operation]))
        for a, operation, b in SUMS
        if sum_is_held_out(a, operation, b)
    ]
    count_per_kind = -(-count // 3)  # rounded up
    stories = [_story_question(rng, held_out=True) for _ in range(count_per_kind)]
    samples = [rng.sample(questions, min(len(questions), count_per_kind)) for questions in (facts, sums, stories)]
    return [question for group in zip(*samples, strict=False) for question in group][:count]
