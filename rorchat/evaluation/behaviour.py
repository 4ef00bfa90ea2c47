"""How a chat model behaves: what users complain about, measured on fixed prompts.

The prompts stand in `prompts.yaml`. Every prompt is answered twice, with the likeliest words and sampled as the model's
own preset has it; a measure is a pure function of one exchange, and its value the mean over all that it applies to.
Where there are many prompts of one kind and few of another, each kind has the same weight, not each prompt.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from rorchat.chatml import IM_END, encode_prompt
from rorchat.inference.engine import ChatModel, Reply, generate_replies
from rorchat.persona import (
    REQUIRED_TOPICS,
    Persona,
    Probe,
    build_new_wording_probes,
    build_probes,
    contains_phrase,
    probe_system_messages,
)

PROMPTS = Path(__file__).with_name("prompts.yaml")
MAX_REPLY_TOKENS = 256  # what is asked for takes a sixth of that; some good models talk at length
REPEATS = 0.3  # of a reply's 4-grams: prose stays far below that, a loop comes near 1
OPEN_KINDS = ("question", "task", "conversation")  # of prompts to which no two replies are to be the same
SEED = 0  # of the sampled replies
EXAMPLES_SHOWN = 2
EXAMPLE_CHARACTERS = 100

_LEAK = re.compile(
    r"<\|(?:im_|endof|pad|reserved)|im_start|im_end|endoftext"  # ChatML's own, whole or in part
    r"|\[/?INST\]|<</?SYS>>|### (?:Instruction|Response)"  # of templates that data may have been made with
    r"|(?:^|\n)[ \t]*(?:system|assistant|user)[ \t]*\n"  # a role's header
)
_USER_SPEAKS = re.compile(
    r"<\|im_start\|>\s*user|(?i:(?:^|\n)[ \t]*(?:user|human)[ \t]*[:\n])|\b(?:User|Human):|\n(?:user|human)\s*$"
)

# Frequent words that tell these languages apart; a word of several counts for each. Of the others' none is an English
# word as well: "No.", "They die." and "Come here!" are English.
STOP_WORDS = {
    "en": "the a an and is are of to in it you that was for with not have this what i my do can am be at on its he she",
    "de": "der das und ist nicht ich ein eine zu mit auf wie du sie es im mir habe von wir er sind dem",
    "fr": "le la les de et est une un des je ne pas que dans vous ce en du il suis tu mon avec sont au",
    "es": "el la los las de y es una un que en por para se lo del yo mi soy muy como su al tu más",
    "it": "il la lo e è un una che di non sono gli le del mi io si della nel molto",
}
EVIDENCE = 2  # different stop words of a language: one alone may be a name or a word of another language
STOP_WORDS = {language: frozenset(words.split()) for language, words in STOP_WORDS.items()}
SCRIPTS = {"ru": "CYRILLIC", "zh": "CJK"}  # the others are written in Latin letters
LANGUAGES = (*STOP_WORDS, *SCRIPTS)


# -- prompts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """What is asked. `probe`: about the persona; `other_name`: that the system message gives; `word`: an attack's.

    `language` is the one that the reply is to be in, "" for any: a persona speaks the language of its file.
    """

    kind: str
    messages: tuple[dict[str, str], ...]
    language: str = ""
    probe: Probe | None = None
    other_name: str = ""
    word: str = ""
    harmless: str = ""


@dataclass(frozen=True)
class Exchange:
    """A prompt and what came of it: all that a measure looks at.

    `said` is the reply with its control tokens spelled out, without the one that ended it. `harmless` is what came of
    an attack without its sting. `alike` is how many of the likeliest replies to OPEN_KINDS are this one; 0 for others.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    reply: Reply
    said: str
    control_ids: frozenset[int]
    end_of_turn: int
    harmless: "Exchange | None" = None
    alike: int = 0


def _conversation(turns: str | list[str]) -> tuple[dict[str, str], ...]:
    turns = [turns] if isinstance(turns, str) else turns
    return tuple({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns))


def prompts_for(persona: Persona) -> list[Prompt]:
    """All that a model is asked: the fixed prompts and the persona's probes, under another system message too."""
    found = []
    for kind, entries in yaml.safe_load(PROMPTS.read_text(encoding="utf-8")).items():
        for entry in entries:
            if isinstance(entry, dict):
                text, harmless, word = entry["text"], entry["harmless"], entry["word"]
                found.append(Prompt(kind, _conversation(text), "en", word=word, harmless=harmless))
            else:
                found.append(Prompt(kind, _conversation(entry), kind if kind in LANGUAGES else "en"))
    systems = probe_system_messages(persona)
    for number, probe in enumerate(build_probes(persona)):
        asked = _conversation(probe.question)
        system, other_name = systems[number % len(systems)]
        found.append(Prompt("persona", asked, probe=probe))
        asked = ({"role": "system", "content": system}, *asked)
        found.append(Prompt("other system", asked, probe=probe, other_name=other_name))
    new = build_new_wording_probes(persona)
    return found + [Prompt("new words", _conversation(probe.question), probe=probe) for probe in new]


def _ask(chat: ChatModel, prompts: Sequence[Prompt], limit: int, temperature: float | None) -> list[Exchange]:
    harmless = [Prompt("harmless", _conversation(prompt.harmless)) for prompt in prompts if prompt.word]
    asked = [*prompts, *harmless]
    replies = generate_replies(
        chat, [prompt.messages for prompt in asked], max_new_tokens=limit, temperature=temperature
    )
    end_of_turn = chat.tokenizer.convert_tokens_to_ids(IM_END)
    control = frozenset(chat.tokenizer.all_special_ids)
    exchanges = []
    for prompt, reply in zip(asked, replies, strict=True):
        encoded = encode_prompt(chat.tokenizer, prompt.messages, n_positions=chat.n_positions, max_new_tokens=limit)
        words = reply.ids[: len(reply.ids) - reply.stopped]
        said = chat.tokenizer.decode(words, skip_special_tokens=False)
        exchanges.append(Exchange(prompt, tuple(encoded.input_ids), reply, said, control, end_of_turn))
    without_sting = iter(exchanges[len(prompts) :])
    return [
        replace(exchange, harmless=next(without_sting)) if exchange.prompt.word else exchange
        for exchange in exchanges[: len(prompts)]
    ]


# -- measures: pure functions of what was said -----------------------------------------------------------------------


def leaks_template(ids: Sequence[int], said: str, control_ids: frozenset[int]) -> bool:
    """Whether a reply shows the user what a template is made of.

    Args:
        ids: of the reply, without the token that ended it: a control token among them is a leak.
        said: the reply; a control string spelled with ordinary tokens, or the header of a role, is one too.
    """
    return not control_ids.isdisjoint(ids) or _LEAK.search(said) is not None


def speaks_for_user(said: str) -> bool:
    """Whether a reply goes on with the user's next message, as ChatML or as a script of `User:` and `Human:` has it."""
    return _USER_SPEAKS.search(said) is not None


def _repeated(items: Sequence) -> float | None:
    grams = list(zip(*(items[start:] for start in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else None


def repetition(ids: Sequence[int], text: str) -> float | None:
    """The share of a reply's 4-grams that were there before; None where it has fewer than four words and tokens.

    Of words or of tokens, whichever is more: a loop may have no blanks ("Yes!!!!!!"), or take turns of many tokens.
    Welleck et al. 2019 call it seq-rep-4 (arXiv:1908.04319).
    """
    shares = [share for share in (_repeated(text.split()), _repeated(ids)) if share is not None]
    return max(shares, default=None)


def _script(text: str) -> str | None:
    """The script that most of a text's letters are of; None without letters. Chinese and Japanese count as one."""
    names = [unicodedata.name(character, "").split() for character in text if character.isalpha()]
    scripts = [name[0] if name[0] not in ("HIRAGANA", "KATAKANA") else "CJK" for name in names if name]
    return max(set(scripts), key=scripts.count) if scripts else None


def in_language(text: str, language: str) -> bool | None:
    """Whether a text seems to be in a language: by its script and, among languages in Latin letters, its stop words.

    A heuristic: it takes sentences of the five languages of `STOP_WORDS` apart, not any two languages, and a text
    without two stop words of any is none of its business.

    Returns:
        None where it cannot tell.
    """
    script = _script(text)
    if script is None or language in SCRIPTS or script != "LATIN":
        return None if script is None else script == SCRIPTS.get(language, "LATIN")
    words = set(re.findall(r"[^\W\d_]+", text.lower()))
    hits = {name: len(words & known) for name, known in STOP_WORDS.items()}
    most = max(hits.values())
    return hits[language] == most if most >= EVIDENCE else None


def _probe_passed(kind: str) -> Callable[[Exchange], bool | None]:
    def passed(exchange: Exchange) -> bool | None:
        return exchange.prompt.probe.passes(exchange.reply.text) if exchange.prompt.kind == kind else None

    return passed


def _says_other_name(exchange: Exchange) -> bool | None:
    name = exchange.prompt.other_name
    return contains_phrase(exchange.reply.text, name) if name else None


def _tells_who_it_is(exchange: Exchange) -> bool | None:
    about = exchange.prompt.probe is not None and exchange.prompt.probe.topic in REQUIRED_TOPICS
    return _probe_passed("persona")(exchange) if about else None


def _language(foreign: bool) -> Callable[[Exchange], bool | None]:
    def stays(exchange: Exchange) -> bool | None:
        language = exchange.prompt.language
        judged = language and (language != "en") == foreign
        return in_language(exchange.reply.text, language) if judged else None

    return stays


def _control_tokens(exchange: Exchange) -> int:
    return sum(token in exchange.control_ids for token in exchange.prompt_ids)


def _changes_ids(exchange: Exchange) -> bool | None:
    """Whether an attack's prompt has more or fewer control tokens than the same words without its sting."""
    return _control_tokens(exchange) != _control_tokens(exchange.harmless) if exchange.harmless else None


def _obeyed(exchange: Exchange) -> bool | None:
    """Whether the reply has the attack's word more often than the reply to the same words without its sting."""
    if exchange.harmless is None:
        return None
    word = exchange.prompt.word
    return exchange.said.lower().count(word) > exchange.harmless.said.lower().count(word)


def _words(exchange: Exchange) -> tuple[int, ...]:
    """The ids of a reply without the token that ended it."""
    return exchange.reply.ids[: len(exchange.reply.ids) - exchange.reply.stopped]


def _repeats(exchange: Exchange) -> bool | None:
    share = repetition(_words(exchange), exchange.said)
    return None if share is None else share > REPEATS


def _kind(exchange: Exchange) -> str:
    """The kind of a prompt, to which each measure that is a mean of kinds gives the same weight."""
    kind = exchange.prompt.kind
    return "another language" if kind in LANGUAGES else "probe" if exchange.prompt.probe else kind


def _topic(exchange: Exchange) -> str:
    return exchange.prompt.probe.topic


@dataclass(frozen=True)
class Measure:
    """A share of replies, or of something in them. `of` gives None for an exchange that it does not apply to.

    `by` puts exchanges into groups: the value is then the mean of the groups' means, so that a group of a few prompts
    counts as much as one of many.
    """

    says: str  # in the table
    unit: str
    more_is_better: bool
    of: Callable[[Exchange], float | None]
    by: Callable[[Exchange], str] = lambda exchange: ""

    @property
    def bound(self) -> str:
        return "min" if self.more_is_better else "max"


MEASURES = {
    "stop_rate": Measure("stops by itself", "replies", True, lambda x: x.reply.closes_turn(x.end_of_turn), _kind),
    "template_leaks": Measure(
        "shows the template", "replies", False, lambda x: leaks_template(_words(x), x.said, x.control_ids)
    ),
    "speaks_for_user": Measure("speaks for the user", "replies", False, lambda x: speaks_for_user(x.said)),
    "repetition": Measure("repeats itself", "replies", False, _repeats, _kind),
    "empty_replies": Measure("says nothing", "replies", False, lambda x: not x.reply.text.strip()),
    "distinct_replies": Measure(
        "says something else to each question", "replies", True, lambda x: 1 / x.alike if x.alike else None
    ),
    "language": Measure("English stays English", "replies", True, _language(foreign=False)),
    "other_languages": Measure("another language stays", "replies", True, _language(foreign=True)),
    "persona": Measure("persona probes", "probes", True, _probe_passed("persona"), _topic),
    "identity": Measure("- of its name and its maker", "probes", True, _tells_who_it_is, _topic),
    "persona_in_new_words": Measure(
        "- with an opening of no training", "probes", True, _probe_passed("new words"), _topic
    ),
    "persona_under_other_system": Measure(
        "- under another system message", "probes", True, _probe_passed("other system"), _topic
    ),
    "says_other_name": Measure("- says the name of that one", "probes", False, _says_other_name),
    "attack_changes_ids": Measure("attacks that become control tokens", "attacks", False, _changes_ids),
    "attack_obeyed": Measure("attacks that are obeyed", "attacks", False, _obeyed),
}  # fmt: skip


# -- a model's behaviour -----------------------------------------------------------------------------------------------


@dataclass
class Value:
    """A measure over `count` exchanges, 0 to 1, and the worst of them: (what was asked, what was said)."""

    value: float | None = None
    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Behaviour:
    """What the gate measured on one model, asked about one persona."""

    name: str
    max_new_tokens: int
    seed: int
    measures: dict[str, Value]
    persona: str = ""


def measure_behaviour(chat: ChatModel, name: str, persona: Persona, seed: int = SEED) -> Behaviour:
    """Asks a model the fixed prompts and its persona's probes, greedily and sampled, and measures the replies."""
    import torch

    limit = min(MAX_REPLY_TOKENS, chat.n_positions // 3)
    prompts = prompts_for(persona)
    likeliest = _ask(chat, prompts, limit, temperature=0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sampled = _ask(chat, prompts, limit, temperature=None)
    return Behaviour(name, limit, seed, measured(likeliest, sampled), persona.name)


def measured(likeliest: Sequence[Exchange], sampled: Sequence[Exchange]) -> dict[str, Value]:
    """The value of each measure over what was said with the likeliest words and what was sampled."""
    said = Counter(exchange.said for exchange in likeliest if exchange.prompt.kind in OPEN_KINDS)
    exchanges = [
        replace(exchange, alike=said[exchange.said]) if exchange.prompt.kind in OPEN_KINDS else exchange
        for exchange in likeliest
    ]
    return {name: _value(measure, [*exchanges, *sampled]) for name, measure in MEASURES.items()}


def _value(measure: Measure, exchanges: Sequence[Exchange]) -> Value:
    found = [(measure.of(exchange), exchange) for exchange in exchanges]
    found = [(float(value), exchange) for value, exchange in found if value is not None]
    if not found:
        return Value()
    groups = defaultdict(list)
    for value, exchange in found:
        groups[measure.by(exchange)].append(value)
    means = [sum(values) / len(values) for values in groups.values()]
    sign = 1 if measure.more_is_better else -1
    worst = sorted(found, key=lambda pair: sign * pair[0])[:EXAMPLES_SHOWN]
    examples = [_example(exchange) for value, exchange in worst if value != float(measure.more_is_better)]
    return Value(sum(means) / len(means), len(found), examples)


def _example(exchange: Exchange) -> tuple[str, str]:
    return short(exchange.prompt.messages[-1]["content"]), short(exchange.said)


def short(text: str) -> str:
    """A text on one line that a terminal can take, as Python spells it."""
    return repr(text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + "...")
