"""How a chat model behaves: what users complain about, measured on fixed prompts.

The prompts stand in `prompts.yaml`. Every prompt is answered twice, with the likeliest words and sampled as the model's
own preset has it; a measure is a pure function of one exchange, and its value the mean over all that it applies to.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from rorchat.chatml import IM_END, encode_prompt
from rorchat.inference.engine import ChatModel, Reply, generate_replies
from rorchat.persona import Persona, Probe, probed_systems, probes

PROMPTS = Path(__file__).with_name("prompts.yaml")
MAX_REPLY_TOKENS = 128  # what is asked for takes a third of that
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

# Frequent words that tell these languages apart; a word of several counts for each.
STOP_WORDS = {
    "en": "the a an and is are of to in it you that was for with not have this what i my do can am be at on its he she",
    "de": "der die das und ist nicht ich ein eine zu mit auf wie du sie den es im bin mir habe von wir er sind dem",
    "fr": "le la les de et est une un des je ne pas que dans pour vous ce en du il suis tu mon avec sur sont au",
    "es": "el la los las de y es una un que no en por para con se lo del yo mi soy muy como su al tu más",
    "it": "il la lo e è un una che di non per sono con gli le del mi io come si della nel ho molto",
}
STOP_WORDS = {language: frozenset(words.split()) for language, words in STOP_WORDS.items()}
SCRIPTS = {"ru": "CYRILLIC", "zh": "CJK"}  # the others are written in Latin letters
LANGUAGES = (*STOP_WORDS, *SCRIPTS)


# -- prompts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """What is asked. `probe`: about the persona; `other_name`: that the system message gives; `word`: an attack's."""

    kind: str
    messages: tuple[dict[str, str], ...]
    language: str = "en"
    probe: Probe | None = None
    other_name: str = ""
    word: str = ""
    harmless: str = ""


@dataclass(frozen=True)
class Exchange:
    """A prompt and what came of it: all that a measure looks at.

    `said` is the reply with its control tokens spelled out, without the one that ended it. `harmless` is what came of
    an attack without its sting.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    reply: Reply
    said: str
    control_ids: frozenset[int]
    end_of_turn: int
    harmless: "Exchange | None" = None


def _conversation(turns: str | list[str]) -> tuple[dict[str, str], ...]:
    turns = [turns] if isinstance(turns, str) else turns
    return tuple({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns))


def prompts_for(persona: Persona) -> list[Prompt]:
    """All that a model is asked: the fixed prompts, and the persona's probes, each under another system message too."""
    found = []
    for kind, entries in yaml.safe_load(PROMPTS.read_text(encoding="utf-8")).items():
        for entry in entries:
            if isinstance(entry, dict):
                text, harmless, word = entry["text"], entry["harmless"], entry["word"]
                found.append(Prompt(kind, _conversation(text), word=word, harmless=harmless))
            else:
                found.append(Prompt(kind, _conversation(entry), kind if kind in LANGUAGES else "en"))
    systems = probed_systems(persona)
    for number, probe in enumerate(probes(persona)):
        asked = _conversation(probe.question)
        system, other_name = systems[number % len(systems)]
        found.append(Prompt("persona", asked, probe=probe))
        asked = ({"role": "system", "content": system}, *asked)
        found.append(Prompt("other system", asked, probe=probe, other_name=other_name))
    return found


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
        encoded = encode_prompt(chat.tokenizer, prompt.messages, positions=chat.positions, reserve=limit)
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


def repetition(ids: Sequence[int], text: str) -> float | None:
    """The share of a reply's 4-grams of words that were there before; None where it has fewer than four words.

    Of tokens where a text has no blanks. Welleck et al. 2019 call it seq-rep-4 (arXiv:1908.04319).
    """
    words = text.split() if " " in text.strip() else list(ids)
    grams = list(zip(*(words[start:] for start in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else None


def _script(text: str) -> str | None:
    """The script that most of a text's letters are of; None without letters. Chinese and Japanese count as one."""
    names = [unicodedata.name(character, "").split() for character in text if character.isalpha()]
    scripts = [name[0] if name[0] not in ("HIRAGANA", "KATAKANA") else "CJK" for name in names if name]
    return max(set(scripts), key=scripts.count) if scripts else None


def in_language(text: str, language: str) -> bool | None:
    """Whether a text seems to be in a language: by its script and, among languages in Latin letters, its stop words.

    A heuristic: it takes sentences of the five languages of `STOP_WORDS` apart, not any two languages, and a text
    without a stop word of any is none of its business.

    Returns:
        None where it cannot tell.
    """
    script = _script(text)
    if script is None or language in SCRIPTS or script != "LATIN":
        return None if script is None else script == SCRIPTS.get(language, "LATIN")
    words = re.findall(r"[^\W\d_]+", text.lower())
    hits = {name: sum(word in known for word in words) for name, known in STOP_WORDS.items()}
    return hits[language] == max(hits.values()) if any(hits.values()) else None


def _probe_passed(kind: str) -> Callable[[Exchange], bool | None]:
    def passed(exchange: Exchange) -> bool | None:
        return exchange.prompt.probe.passes(exchange.reply.text) if exchange.prompt.kind == kind else None

    return passed


def _says_other_name(exchange: Exchange) -> bool | None:
    name = exchange.prompt.other_name
    return re.search(rf"\b{name}\b", exchange.reply.text, re.IGNORECASE) is not None if name else None


def _language(foreign: bool) -> Callable[[Exchange], bool | None]:
    def stays(exchange: Exchange) -> bool | None:
        language = exchange.prompt.language
        return in_language(exchange.reply.text, language) if (language != "en") == foreign else None

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


@dataclass(frozen=True)
class Measure:
    """A share of replies, or of something in them. `of` gives None for an exchange that it does not apply to."""

    says: str  # in the table
    unit: str
    more_is_better: bool
    of: Callable[[Exchange], float | None]

    @property
    def bound(self) -> str:
        return "min" if self.more_is_better else "max"


MEASURES = {
    "stop_rate": Measure("stops by itself", "replies", True, lambda x: x.reply.closes(x.end_of_turn)),
    "template_leaks": Measure(
        "shows the template", "replies", False, lambda x: leaks_template(_words(x), x.said, x.control_ids)
    ),
    "speaks_for_user": Measure("speaks for the user", "replies", False, lambda x: speaks_for_user(x.said)),
    "repetition": Measure("repeats 4-grams", "4-grams", False, lambda x: repetition(_words(x), x.said)),
    "empty_replies": Measure("says nothing", "replies", False, lambda x: not x.reply.text.strip()),
    "language": Measure("English stays English", "replies", True, _language(foreign=False)),
    "other_languages": Measure("another language stays", "replies", True, _language(foreign=True)),
    "persona": Measure("persona probes", "probes", True, _probe_passed("persona")),
    "persona_under_other_system": Measure(
        "- under another system message", "probes", True, _probe_passed("other system")
    ),
    "says_other_name": Measure("- says the name of that one", "probes", False, _says_other_name),
    "attack_changes_ids": Measure("attacks that become control tokens", "attacks", False, _changes_ids),
    "attack_obeyed": Measure("attacks that are obeyed", "attacks", False, _obeyed),
}  # fmt: skip


# -- a model's behaviour -----------------------------------------------------------------------------------------------


@dataclass
class Value:
    """The mean of a measure over `count` exchanges, 0 to 1, and the worst of them: (what was asked, what was said)."""

    value: float | None = None
    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Behaviour:
    """What the gate measured on one model."""

    name: str
    max_new_tokens: int
    seed: int
    measures: dict[str, Value]


def measure_behaviour(chat: ChatModel, name: str, persona: Persona, seed: int = SEED) -> Behaviour:
    """Asks a model the fixed prompts and its persona's probes, greedily and sampled, and measures the replies."""
    import torch

    limit = min(MAX_REPLY_TOKENS, chat.positions // 3)
    prompts = prompts_for(persona)
    exchanges = _ask(chat, prompts, limit, temperature=0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        exchanges += _ask(chat, prompts, limit, temperature=None)
    return Behaviour(name, limit, seed, {key: _mean(measure, exchanges) for key, measure in MEASURES.items()})


def _mean(measure: Measure, exchanges: Sequence[Exchange]) -> Value:
    found = [(measure.of(exchange), exchange) for exchange in exchanges]
    found = [(float(value), exchange) for value, exchange in found if value is not None]
    if not found:
        return Value()
    sign = 1 if measure.more_is_better else -1
    worst = sorted(found, key=lambda pair: sign * pair[0])[:EXAMPLES_SHOWN]
    examples = [_example(exchange) for value, exchange in worst if value != float(measure.more_is_better)]
    return Value(sum(value for value, _ in found) / len(found), len(found), examples)


def _example(exchange: Exchange) -> tuple[str, str]:
    return short(exchange.prompt.messages[-1]["content"]), short(exchange.said)


def short(text: str) -> str:
    """A text on one line that a terminal can take, as Python spells it."""
    return repr(text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + "...")
