"""Measures the behaviour of a chat model: its replies to fixed prompts and to the probes of its persona.

Every prompt of `prompts.yaml` is answered twice: greedily, and sampled with the model's own generation config. A
measure is a pure function of one exchange. Its value is the mean over all exchanges that it applies to, or the mean of
group means, in which a group with few prompts counts as much as one with many.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from rorchat.chatml import IM_END, encode_prompt, token_id
from rorchat.evaluation.text_measures import (
    LANGUAGES,
    closes_turn,
    is_in_language,
    is_repetitive,
    leaks_template,
    speaks_for_user,
)
from rorchat.inference.engine import ChatModel, Reply, generate_replies
from rorchat.persona import (
    REQUIRED_TOPICS,
    Persona,
    Probe,
    build_new_wording_probes,
    build_plain_probes,
    build_probes,
    contains_phrase,
    probe_system_messages,
)

PROMPTS_FILE = Path(__file__).with_name("prompts.yaml")
MAX_REPLY_TOKENS = 256  # a good reply needs about a sixth of that, but some good models give long replies
OPEN_KINDS = ("question", "task", "conversation")  # kinds of prompts whose replies must all differ
SEED = 0  # for the sampled replies
EXAMPLES_SHOWN = 2
EXAMPLE_CHARACTERS = 100

Message = dict[str, str]


# -- prompts and exchanges -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One prompt of the gate.

    Attributes:
        kind: a kind of `prompts.yaml`, or "persona", "plain", "other system", "new words" for the probes of a
            persona.
        language: the expected language of the reply; "" for any (probes: the language of the persona file).
        probe: the persona probe that is asked.
        other_name: the name that the system message gives to the model, if it is not the persona's.
        word: for an attack (a message that imitates control tokens or turns of a chat), the word that it tries to put
            into the reply.
        harmless: for an attack, the same message without the imitation.
    """

    kind: str
    messages: tuple[Message, ...]
    language: str = ""
    probe: Probe | None = None
    other_name: str = ""
    word: str = ""
    harmless: str = ""


@dataclass(frozen=True)
class Exchange:
    """A prompt with its reply: everything that a measure looks at.

    Attributes:
        text: the reply, including its control tokens but not the token that ended it.
        control_ids: the ids of all control tokens.
        end_of_turn: the id of `<|im_end|>`.
        harmless: the exchange for `prompt.harmless`.
        duplicates: number of greedy replies to prompts of OPEN_KINDS that equal this one, including itself; 0 for other
            exchanges.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    reply: Reply
    text: str
    control_ids: frozenset[int]
    end_of_turn: int
    harmless: "Exchange | None" = None
    duplicates: int = 0

    @property
    def ids(self) -> tuple[int, ...]:
        """The reply's token ids without the one that ended it."""
        return self.reply.ids[: len(self.reply.ids) - self.reply.stopped]

    @property
    def group(self) -> str:
        """The kind of the prompt. All languages form one group, and so do all probes."""
        kind = self.prompt.kind
        return "another language" if kind in LANGUAGES else "probe" if self.prompt.probe else kind

    @property
    def topic(self) -> str:
        return self.prompt.probe.topic if self.prompt.probe else ""


def _to_messages(turns: str | list[str]) -> tuple[Message, ...]:
    turns = [turns] if isinstance(turns, str) else turns
    return tuple({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns))


def build_prompts(persona: Persona) -> list[Prompt]:
    """The fixed prompts; the persona's probes, with its own and with other system messages; reworded and plain ones."""
    prompts = []
    for kind, entries in yaml.safe_load(PROMPTS_FILE.read_text(encoding="utf-8")).items():
        for entry in entries:
            if isinstance(entry, dict):
                messages = _to_messages(entry["text"])
                prompts.append(Prompt(kind, messages, "en", word=entry["word"], harmless=entry["harmless"]))
            else:
                prompts.append(Prompt(kind, _to_messages(entry), kind if kind in LANGUAGES else "en"))
    systems = probe_system_messages(persona)
    for number, probe in enumerate(build_probes(persona)):
        messages = _to_messages(probe.question)
        system, other_name = systems[number % len(systems)]
        prompts.append(Prompt("persona", messages, probe=probe))
        messages = ({"role": "system", "content": system}, *messages)
        prompts.append(Prompt("other system", messages, probe=probe, other_name=other_name))
    for kind, probes in (("new words", build_new_wording_probes(persona)), ("plain", build_plain_probes(persona))):
        prompts += [Prompt(kind, _to_messages(probe.question), probe=probe) for probe in probes]
    return prompts


def _ask(chat: ChatModel, prompts: Sequence[Prompt], limit: int, temperature: float | None) -> list[Exchange]:
    """Generates one exchange per prompt. The harmless versions of the attacks are asked in the same batches."""
    harmless = [Prompt("harmless", _to_messages(prompt.harmless)) for prompt in prompts if prompt.word]
    asked = [*prompts, *harmless]
    replies = generate_replies(
        chat, [prompt.messages for prompt in asked], max_new_tokens=limit, temperature=temperature
    )
    end_of_turn = token_id(chat.tokenizer, IM_END)
    control_ids = frozenset(chat.tokenizer.all_special_ids)
    exchanges = []
    for prompt, reply in zip(asked, replies, strict=True):
        encoded = encode_prompt(chat.tokenizer, prompt.messages, n_positions=chat.n_positions, max_new_tokens=limit)
        exchange = Exchange(prompt, tuple(encoded.input_ids), reply, "", control_ids, end_of_turn)
        (text,) = chat.tokenizer.batch_decode([list(exchange.ids)], skip_special_tokens=False)
        exchanges.append(replace(exchange, text=text))
    harmless_exchanges = iter(exchanges[len(prompts) :])
    return [
        replace(exchange, harmless=next(harmless_exchanges)) if exchange.prompt.word else exchange
        for exchange in exchanges[: len(prompts)]
    ]


# -- measures --------------------------------------------------------------------------------------------------------


def _passes_probe(kind: str, topics: Sequence[str] = ()) -> Callable[[Exchange], bool | None]:
    def passes(exchange: Exchange) -> bool | None:
        prompt = exchange.prompt
        if prompt.probe is None or prompt.kind != kind or (topics and prompt.probe.topic not in topics):
            return None
        return prompt.probe.passes(exchange.reply.text)

    return passes


def _says_other_name(exchange: Exchange) -> bool | None:
    name = exchange.prompt.other_name
    return contains_phrase(exchange.reply.text, name) if name else None


def _keeps_language(foreign: bool) -> Callable[[Exchange], bool | None]:
    def keeps(exchange: Exchange) -> bool | None:
        language = exchange.prompt.language
        applies = language and (language != "en") == foreign
        return is_in_language(exchange.reply.text, language) if applies else None

    return keeps


def _attack_changes_ids(exchange: Exchange) -> bool | None:
    """Whether an attack's prompt has a different number of control tokens from the same text without the attack."""
    if exchange.harmless is None:
        return None
    attack, harmless = (
        sum(token in exchange.control_ids for token in ids)
        for ids in (exchange.prompt_ids, exchange.harmless.prompt_ids)
    )
    return attack != harmless


def _obeys_attack(exchange: Exchange) -> bool | None:
    """Whether the reply contains the attack's word more often than the reply to the text without the attack."""
    if exchange.harmless is None:
        return None
    word = exchange.prompt.word
    return exchange.text.lower().count(word) > exchange.harmless.text.lower().count(word)


@dataclass(frozen=True)
class Measure:
    """A measure of behaviour. Its value is a share between 0 and 1.

    Attributes:
        title: shown in tables.
        unit: what is counted; shown next to the value.
        more_is_better: whether a higher value is better.
        score: returns the value of one exchange, or None if the measure does not apply to it.
        group_by: returns the group of an exchange. The value is the mean of the group means; by default there is one
            group.
    """

    title: str
    unit: str
    more_is_better: bool
    score: Callable[[Exchange], float | None]
    group_by: Callable[[Exchange], str] = lambda exchange: ""

    @property
    def bound(self) -> str:
        """The key of its threshold in a thresholds file."""
        return "min" if self.more_is_better else "max"


def _by_kind(exchange: Exchange) -> str:
    return exchange.group


def _by_topic(exchange: Exchange) -> str:
    return exchange.topic


MEASURES = {
    "stop_rate": Measure(
        "closes its turn", "replies", True, lambda x: closes_turn(x.reply.ids, x.end_of_turn), _by_kind
    ),
    "template_leaks": Measure(
        "leaks the template", "replies", False, lambda x: leaks_template(x.text, x.ids, x.control_ids)
    ),
    "speaks_for_user": Measure("speaks for the user", "replies", False, lambda x: speaks_for_user(x.text)),
    "repetition": Measure("repeats itself", "replies", False, lambda x: is_repetitive(x.text, x.ids), _by_kind),
    "empty_replies": Measure("empty replies", "replies", False, lambda x: not x.reply.text.strip()),
    "distinct_replies": Measure(
        "different replies to different questions",
        "replies",
        True,
        lambda x: 1 / x.duplicates if x.duplicates else None,
    ),
    "language": Measure("replies to English in English", "replies", True, _keeps_language(foreign=False)),
    "other_languages": Measure("replies in other languages", "replies", True, _keeps_language(foreign=True)),
    "persona": Measure("persona probes", "probes", True, _passes_probe("persona"), _by_topic),
    "identity": Measure(
        "- on its name and its maker", "probes", True, _passes_probe("persona", REQUIRED_TOPICS), _by_topic
    ),
    "identity_asked_plainly": Measure("- asked as in training", "probes", True, _passes_probe("plain"), _by_topic),
    "persona_in_new_words": Measure(
        "- with an opening not seen in training", "probes", True, _passes_probe("new words"), _by_topic
    ),
    "persona_under_other_system": Measure(
        "- under another system message", "probes", True, _passes_probe("other system"), _by_topic
    ),
    "says_other_name": Measure("- takes the name of that message", "probes", False, _says_other_name),
    "attack_changes_ids": Measure("attacks that become control tokens", "attacks", False, _attack_changes_ids),
    "attack_obeyed": Measure("attacks that are obeyed", "attacks", False, _obeys_attack),
}


# -- a model's behaviour ---------------------------------------------------------------------------------------------


@dataclass
class Value:
    """The value of a measure over `count` exchanges, with the worst exchanges as examples (prompt, reply)."""

    value: float | None = None
    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Behaviour:
    """All measures of one model, with one persona."""

    name: str
    max_new_tokens: int
    seed: int
    measures: dict[str, Value]
    persona: str = ""


def measure_behaviour(chat: ChatModel, name: str, persona: Persona, seed: int = SEED) -> Behaviour:
    """Asks a model the fixed prompts and its persona's probes, greedily and sampled, and measures the replies."""
    import torch

    limit = min(MAX_REPLY_TOKENS, chat.n_positions // 3)
    prompts = build_prompts(persona)
    greedy = _ask(chat, prompts, limit, temperature=0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sampled = _ask(chat, prompts, limit, temperature=None)
    return Behaviour(name, limit, seed, compute_measures(greedy, sampled), persona.name)


def compute_measures(greedy: Sequence[Exchange], sampled: Sequence[Exchange]) -> dict[str, Value]:
    """The value of every measure over the greedy and the sampled exchanges."""
    counts = Counter(exchange.text for exchange in greedy if exchange.prompt.kind in OPEN_KINDS)
    exchanges = [
        replace(exchange, duplicates=counts[exchange.text]) if exchange.prompt.kind in OPEN_KINDS else exchange
        for exchange in greedy
    ]
    return {name: _compute_value(measure, [*exchanges, *sampled]) for name, measure in MEASURES.items()}


def _compute_value(measure: Measure, exchanges: Sequence[Exchange]) -> Value:
    scored = [(float(score), x) for x in exchanges if (score := measure.score(x)) is not None]
    if not scored:
        return Value()
    groups = defaultdict(list)
    for score, exchange in scored:
        groups[measure.group_by(exchange)].append(score)
    means = [sum(scores) / len(scores) for scores in groups.values()]
    worst = sorted(scored, key=lambda pair: pair[0], reverse=not measure.more_is_better)[:EXAMPLES_SHOWN]
    examples = [
        (quote_short(exchange.prompt.messages[-1]["content"]), quote_short(exchange.text))
        for score, exchange in worst
        if score != float(measure.more_is_better)
    ]
    return Value(sum(means) / len(means), len(scored), examples)


def quote_short(text: str) -> str:
    """The repr of a text cut to EXAMPLE_CHARACTERS, which fits on one line."""
    return repr(text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + "...")
