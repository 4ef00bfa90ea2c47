"""Pure functions that measure one reply, used by the gate, `rorchat evaluate` and the `evaluate` metrics."""

import math
import re
import unicodedata
from collections.abc import Collection, Sequence

from rorchat.chatml import END_OF_TEXT, IM_END

REPETITION_LIMIT = 0.3  # share of repeated 4-grams above which a reply counts as repetitive; prose stays far below

_TEMPLATE_PARTS = re.compile(
    r"<\|(?:im_|endof|pad|reserved)|im_start|im_end|endoftext"  # control tokens of ChatML, whole or in part
    r"|\[/?INST\]|<</?SYS>>|### (?:Instruction|Response)"  # other templates, which training data may contain
    r"|(?:^|\n)[ \t]*(?:system|assistant|user)[ \t]*\n"  # the header of a turn
)
_USER_TURN = re.compile(
    r"<\|im_start\|>\s*user|(?i:(?:^|\n)[ \t]*(?:user|human)[ \t]*[:\n])|\b(?:User|Human):|\n(?:user|human)\s*$"
)

# Frequent words of each language. A word may occur in several lists and then counts for each of these languages. The
# lists other than English contain no word that is common in short English replies ("No.", "They die.", "Come here!").
STOP_WORDS = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the a an and is are of to in it you that was for with not have this what i my do can am be at on its he "
        "she",
        "de": "der das und ist nicht ich ein eine zu mit auf wie du sie es im mir habe von wir er sind dem",
        "fr": "le la les de et est une un des je ne pas que dans vous ce en du il suis tu mon avec sont au",
        "es": "el la los las de y es una un que en por para se lo del yo mi soy muy como su al tu más",
        "it": "il la lo e è un una che di non sono gli le del mi io si della nel molto",
    }.items()
}
MIN_STOP_WORDS = 2  # distinct stop words needed to name a language: a single one may be a name or a foreign word
SCRIPTS = {"ru": "CYRILLIC", "zh": "CJK"}  # languages recognized by their script; all others use the Latin script
LANGUAGES = (*STOP_WORDS, *SCRIPTS)


def bits_per_byte(nats: float, utf8_bytes: int) -> float:
    """Converts the total negative log-likelihood of a text, in nats, to bits per UTF-8 byte. NaN for an empty text."""
    return nats / math.log(2) / utf8_bytes if utf8_bytes else math.nan


def closes_turn(reply: str | Sequence[int], end_of_turn: str | int = IM_END) -> bool:
    """Whether a reply ends with the end-of-turn token. Both arguments are text, or both are token ids.

    A reply that ends with `<|endoftext|>` or at the token limit does not close its turn.
    """
    if isinstance(reply, str):
        return reply.endswith(str(end_of_turn))
    return len(reply) > 0 and reply[-1] == end_of_turn


def strip_end_token(text: str) -> str:
    """Removes the final `<|im_end|>` or `<|endoftext|>` from a reply that was decoded with its special tokens."""
    return text.removesuffix(IM_END) if text.endswith(IM_END) else text.removesuffix(END_OF_TEXT)


def leaks_template(text: str, ids: Sequence[int] = (), control_ids: Collection[int] = ()) -> bool:
    """Whether a reply contains parts of a chat template.

    Args:
        text: the reply, decoded with its special tokens but without the token that ended it. Control strings that
            consist of ordinary tokens and headers of turns also count as leaks.
        ids: the same reply as token ids. Any of `control_ids` among them is a leak.
    """
    return any(token in control_ids for token in ids) or _TEMPLATE_PARTS.search(text) is not None


def speaks_for_user(text: str) -> bool:
    """Whether a reply starts the user's next turn, as a ChatML header or as a line such as `User:` or `Human:`."""
    return _USER_TURN.search(text) is not None


def _repeated_share(items: Sequence) -> float | None:
    """Returns the share of 4-grams that occur earlier; None for fewer than four items."""
    grams = list(zip(*(items[start:] for start in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else None


def repetition_rate(text: str, ids: Sequence = ()) -> float | None:
    """Returns the share of repeated 4-grams: seq-rep-4 of Welleck et al. 2019 (arXiv:1908.04319).

    The result is the maximum over words and token ids, because a repeated phrase may contain no spaces ("Yes!!!!!!") or
    consist of many tokens. It is None if there are fewer than four words and fewer than four ids.
    """
    shares = [share for share in (_repeated_share(text.split()), _repeated_share(ids)) if share is not None]
    return max(shares, default=None)


def is_repetitive(text: str, ids: Sequence = ()) -> bool | None:
    """Whether the repetition rate exceeds REPETITION_LIMIT; None if the reply is too short to tell."""
    rate = repetition_rate(text, ids)
    return None if rate is None else rate > REPETITION_LIMIT


def _main_script(text: str) -> str | None:
    """Returns the most frequent script of the letters, or None without letters. Chinese and Japanese count as one."""
    names = [unicodedata.name(character, "").split() for character in text if character.isalpha()]
    scripts = [name[0] if name[0] not in ("HIRAGANA", "KATAKANA") else "CJK" for name in names if name]
    return max(set(scripts), key=scripts.count) if scripts else None


def is_in_language(text: str, language: str) -> bool | None:
    """Whether a text appears to be in a language, judged by its script and, for Latin script, by its stop words.

    This is a heuristic that distinguishes the five languages of `STOP_WORDS`.

    Returns:
        None if the language cannot be determined, for example if no language has MIN_STOP_WORDS stop words in the text.
    """
    script = _main_script(text)
    if script is None:
        return None
    if language in SCRIPTS or script != "LATIN":
        return script == SCRIPTS.get(language, "LATIN")
    words = set(re.findall(r"[^\W\d_]+", text.lower()))
    hits = {name: len(words & stop_words) for name, stop_words in STOP_WORDS.items()}
    most = max(hits.values())
    return hits[language] == most if most >= MIN_STOP_WORDS else None
