"""Finds the turns of a conversation in a raw row, and which of its speakers is the user.

docs/chats.md lists the shapes that are read.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from rorchat.reading.messages import is_learned, is_tool, read_content
from rorchat.rows import ROLE_NAMES, ConvertedRow, RejectedRow, alternate_turns, message

#: Names of the column of turns, the usual ones first. They are compared in lower case.
TURN_COLUMNS = (
    "messages", "conversations", "conversation", "turns", "dialog", "dialogue", "dialogs", "dialogues", "chat",
    "chats", "utterances", "exchanges", "thread", "transcript", "log", "history", "chat_history",
)  # fmt: skip
#: Columns in which a list of texts is a conversation, and those in which a list of [question, answer] is one, too.
TEXTS_COLUMNS = (
    "conversation", "conversations", "dialog", "dialogue", "dialogs", "dialogues", "utterances", "chat",
)  # fmt: skip
HISTORY_COLUMNS = ("history", "chat_history")
#: Keys of the speaker and of the text of a turn, the usual ones first.
SPEAKER_KEYS = (
    "role", "from", "speaker", "author", "sender", "participant", "agent", "user", "name", "username", "user_name",
    "speaker_id", "user_id", "sender_name", "who",
)  # fmt: skip
TEXT_KEYS = ("content", "value", "text", "utterance", "message", "body", "msg", "parts")
#: Speakers beside which a key with any other name holds the text, if it is the only one with texts.
ONLY_SPEAKER_KEYS = ("speaker", "who", "role", "author", "sender")
NO_TEXT_KEY = re.compile(r"id|.*_id|type|.*time.*|date|created.*|title|to|subject|url|lang.*|model", re.IGNORECASE)
USUAL_KEYS = (("role", "content"), ("from", "value"))
#: Names of the columns of a question and its answer, in the order in which they are looked for, in lower case.
PAIR_COLUMNS = (
    ("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"),
    ("user", "assistant"), ("query", "response"), ("instruction", "response"), ("instruction", "answer"),
    ("input", "output"), ("prompt", "output"), ("prompt", "answer"), ("prompt", "reply"), ("question", "response"),
    ("question", "reply"), ("query", "reply"), ("query", "answer"), ("input", "response"), ("input", "reply"),
    ("message", "reply"), ("message", "response"), ("context", "response"), ("human", "assistant"), ("human", "ai"),
    ("human", "bot"), ("human", "gpt"), ("user", "bot"), ("user", "ai"), ("q", "a"),
    ("questions", "answers"), ("frage", "antwort"), ("pregunta", "respuesta"), ("question", "réponse"),
    ("question", "reponse"), ("domanda", "risposta"), ("pergunta", "resposta"), ("vraag", "antwoord"),
    ("fråga", "svar"), ("spørgsmål", "svar"), ("spørsmål", "svar"), ("kysymys", "vastaus"), ("pytanie", "odpowiedź"),
    ("otázka", "odpověď"), ("kérdés", "válasz"), ("soru", "cevap"), ("вопрос", "ответ"), ("питання", "відповідь"),
    ("سؤال", "جواب"), ("प्रश्न", "उत्तर"), ("问题", "回答"), ("问题", "答案"), ("質問", "回答"), ("질문", "답변"),
)  # fmt: skip
#: Names of assistants that are also other words or names: only if they are the whole name of a speaker.
ASSISTANT_NAMES = {"ai", "bing", "bard", "model"}
ASSISTANT_WORDS = {name for name, role in ROLE_NAMES.items() if role == "assistant"} - ASSISTANT_NAMES
ASSISTANT_WORDS |= {"agent", "chatbot"}
USER_WORDS = {name for name, role in ROLE_NAMES.items() if role == "user"} | {"customer", "client"}
JOINED, LEFT_OUT = "turns of one speaker joined", "a first turn of the assistant left out"

_LITERAL = re.compile(r"\[\s*[\[({]?\s*['\"]")  # the start of a list of texts, lists or objects in Python


class Turn(NamedTuple):
    """What a speaker says, and whether it is learned if the speaker is the assistant."""

    speaker: str
    text: str
    train: bool = True


def find_pair(row: Mapping) -> tuple[str, str] | None:
    """The columns of a question and its answer, by their names."""
    columns = by_lower_name(row)
    names = next((pair for pair in PAIR_COLUMNS if pair[0] in columns and pair[1] in columns), None)
    return (columns[names[0]], columns[names[1]]) if names else None


def find_turn_column(row: Mapping) -> str | None:
    """The column whose value is a list of turns: one with a usual name, or else the only one."""
    columns = by_lower_name(row)
    for name in TURN_COLUMNS:
        if name in columns and (name in TURN_COLUMNS[:2] or _has_turns(name, row[columns[name]])):
            return columns[name]
    others = [column for column, value in row.items() if _has_turn_objects(value)]
    return others[0] if len(others) == 1 else None


def is_chat(value: object) -> bool:
    """Whether a value is a conversation: a list of turns, a row with such a list, or a question with an answer."""
    if isinstance(value, dict):
        is_seed_task = {"instruction", "instances"} <= by_lower_name(value).keys()
        return is_seed_task or find_turn_column(value) is not None or find_pair(value) is not None
    return _has_turn_objects(value)


def are_usual(turns: object) -> bool:
    """Whether turns are messages with roles in the usual formats, which most rows of large datasets are."""
    if not isinstance(turns, list):
        return False
    for turn in turns:
        if not isinstance(turn, dict):
            return False
        role, text = (turn["role"], turn.get("content")) if "role" in turn else (turn.get("from"), turn.get("value"))
        if not isinstance(role, str) or not isinstance(text, str) or role not in ROLE_NAMES:
            return False
    return True


def read_turns(
    turns: object, column: str = "", assistant_name: str = "", *, is_named: bool = False
) -> ConvertedRow | None:
    """The conversation that a list of turns is; None for messages in the usual format, which need no conversion.

    Args:
        column: where it was found; empty if the row is the list.
        assistant_name: the speaker who is the assistant; empty to decide by the names.
        is_named: whether the user named the column, which may then be a list of texts.

    Raises:
        RejectedRow: its roles cannot be known.
    """
    where = f"turns from {column!r}" if column else "turns from lists"
    if not isinstance(turns, list) or not turns:
        return None
    if _are_pairs_of_texts(turns) and _begin_with_speakers(turns, assistant_name):
        spoken = [Turn(speaker.strip(), text) for speaker, text in turns]
        return _convert_spoken(spoken, f"{where} (speaker and text)", assistant_name)
    if texts := _texts_in_turn(turns, TEXTS_COLUMNS[0] if is_named else column):
        refuse_name(assistant_name, where)
        rule = f"{where}: texts in turn, the first is from the user"
        return ConvertedRow({"messages": alternate_turns(texts)}, rule, is_by_order=True)
    if not all(isinstance(turn, dict) for turn in turns):
        return None
    if pairs := _pairs(turns):
        refuse_name(assistant_name, where)
        question, answer = pairs[0]
        messages: list[dict] = []
        for number, (turn, keys) in enumerate(zip(turns, pairs, strict=True)):
            reply = message("assistant", turn[keys[1]], train=is_learned(turn, number))
            messages += [message("user", turn[keys[0]]), reply]
        return ConvertedRow({"messages": messages}, f"{where}: {question!r} is the user, {answer!r} the assistant")
    return _read_objects(turns, column, where, assistant_name)


def _read_objects(turns: list[dict], column: str, where: str, assistant_name: str) -> ConvertedRow | None:
    """The conversation of objects with a speaker and a text."""
    keys = _turn_keys(turns)
    if keys is None:
        return None
    has_roles = all(_role(turn[keys[0]]) for turn in turns)
    is_usual = keys in USUAL_KEYS and column.lower() in ("", *TURN_COLUMNS[:2]) and (has_roles or keys[0] == "role")
    if is_usual and not assistant_name:
        return None
    named = (key for key in SPEAKER_KEYS if any(turn.get(key) == assistant_name for turn in turns))
    key = next(named, keys[0]) if assistant_name else keys[0]
    spoken = []
    for number, turn in enumerate(turns):
        speaker = _speaker(turn, key if turn.get(key) is not None else keys[0], number)
        learned = is_learned(turn, number)  # before the text, which is often null beside the call of a tool
        spoken.append(Turn(speaker, read_content(turn, keys[1], number), learned))
    return _convert_spoken(spoken, f"{where} ({key!r} and {keys[1]!r})", assistant_name)


def _convert_spoken(turns: Sequence[Turn], where: str, assistant_name: str) -> ConvertedRow:
    """The conversation of turns whose speakers are roles, or two people."""
    if assistant_name or not all(_role(turn.speaker) for turn in turns):
        return assign_roles(turns, where, assistant_name=assistant_name)
    messages = [message(_role(turn.speaker), turn.text, train=turn.train) for turn in turns]
    return ConvertedRow({"messages": messages}, f"{where}: the roles are those of the turns")


def refuse_name(assistant_name: str, where: str) -> None:
    """Raises RejectedRow if the user named the assistant, but the texts of a row have no speakers."""
    if assistant_name:
        raise RejectedRow("no speakers", f"{where} have no names, so {assistant_name!r} cannot be the assistant")


def assign_roles(
    turns: Sequence[Turn], where: str, *, speakers: Sequence[str] = (), assistant_name: str = ""
) -> ConvertedRow:
    """The conversation of two speakers. The first is the user, unless the name of one says otherwise.

    Args:
        where: the start of the rule.
        speakers: those of the whole log, in the order in which they begin; empty for those of these turns.
        assistant_name: the speaker who is the assistant; empty to decide by the names.

    Raises:
        RejectedRow: there are not two speakers, or no texts.
    """
    if not turns:
        raise RejectedRow("no text", "all messages are without text")
    names = list(dict.fromkeys(speakers or [turn.speaker for turn in turns if turn.speaker.lower() != "system"]))
    roles, reason = decide_roles(names, assistant_name)
    joined = _join_turns(turns)
    repairs = [JOINED] if len(joined) < len(turns) else []
    messages = [message(roles.get(turn.speaker, "system"), turn.text, train=turn.train) for turn in joined]
    first = next((number for number, turn in enumerate(messages) if turn["role"] != "system"), 0)
    if messages[first]["role"] == "assistant":
        del messages[first]
        repairs.append(LEFT_OUT)
    if not any(turn["role"] == "assistant" for turn in messages):
        raise RejectedRow("no assistant turn", f"speakers: {', '.join(dict.fromkeys(turn.speaker for turn in turns))}")
    return ConvertedRow({"messages": messages}, f"{where}; two speakers: {reason}", tuple(repairs))


def _join_turns(turns: Sequence[Turn]) -> list[Turn]:
    """The turns, with consecutive ones of a speaker as one."""
    joined: list[Turn] = []
    for turn in turns:
        before = joined[-1] if joined else None
        if before is None or before.speaker != turn.speaker:
            joined.append(turn)
            continue
        if before.train != turn.train:
            raise RejectedRow("marked in part", f"of the turns in succession of {turn.speaker}, some are not learned")
        joined[-1] = turn._replace(text=f"{before.text}\n{turn.text}")
    return joined


def decide_roles(names: Sequence[str], assistant_name: str = "") -> tuple[dict[str, str], str]:
    """({speaker: role}, the reason) of two speakers.

    Raises:
        RejectedRow: there are not two, or none has the name of the assistant.
    """
    listed = ", ".join(names)
    if tool := next(filter(is_tool, names), None):
        raise RejectedRow("tool call", f"a turn has the role {tool!r}")
    if len(names) > 2:
        raise RejectedRow("more than two speakers", listed)
    if len(names) < 2:
        raise RejectedRow("one speaker", listed)
    if assistant_name:
        if assistant_name not in names:
            raise RejectedRow("no assistant turn", f"no speaker {assistant_name!r}, only {listed}")
        user = next(name for name in names if name != assistant_name)
        return {user: "user", assistant_name: "assistant"}, f"{assistant_name!r} is the assistant, as given"
    guesses = [_role_of_name(name) for name in names]
    if "assistant" in guesses and guesses.count("assistant") == 1:
        user = names[1 - guesses.index("assistant")]
    elif guesses.count("user") == 1:
        user = names[guesses.index("user")]
    else:
        return dict(zip(names, ("user", "assistant"), strict=True)), "the first is the user"
    other = next(name for name in names if name != user)
    return {user: "user", other: "assistant"}, "the roles follow from their names"


def _role_of_name(name: str) -> str:
    if name.strip().lower() in ASSISTANT_NAMES:
        return "assistant"
    words = set(re.findall(r"[^\W\d_]+", name.lower()))
    return "assistant" if words & ASSISTANT_WORDS else "user" if words & USER_WORDS else ""


def by_lower_name(row: Mapping) -> Mapping[str, str]:
    """The columns of a row by their names in lower case. Of equal names, the first counts."""
    return _by_lower_name(tuple(row))


@lru_cache(maxsize=256)  # most rows of a source have the same columns
def _by_lower_name(names: tuple[object, ...]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for column in names:
        if isinstance(column, str):
            columns.setdefault(column.strip().lower(), column)
    return columns


def parse_list(value: object) -> object:
    """A list from its text in JSON or Python, as tables hold it; other values unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return _parse_literal(value.strip())


def _parse_literal(text: str) -> object:
    """The list that pandas has written into a table, as Python writes it; any other text unchanged."""
    if not _LITERAL.match(text):
        return text
    try:
        with warnings.catch_warnings():  # of a backslash in a text that is not a literal
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, list) else text


def _has_turns(name: str, value: object) -> bool:
    turns = parse_list(value)
    if not isinstance(turns, list) or not turns:
        return False
    if _are_pairs_of_texts(turns) and _speakers_begin(turns):
        return True
    return bool(_texts_in_turn(turns, name) or _has_turn_objects(turns) or _pairs(turns))


def _has_turn_objects(value: object) -> bool:
    turns = parse_list(value)
    return isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns) and _turn_keys(turns) is not None


def _turn_keys(turns: Sequence[Any]) -> tuple[str, str] | None:
    """The keys of the speaker and of the text that all turns have.

    Beside a speaker, the only other key with texts is the text, unless its name says that it is something else.
    """
    if not turns:
        return None
    common = set(turns[0]).intersection(*turns[1:])
    text = next((key for key in TEXT_KEYS if key in common), None)
    speaker = next((key for key in SPEAKER_KEYS if key in common and key != text), None)
    if speaker in ONLY_SPEAKER_KEYS and not text:
        others = [key for key in common - {speaker} if all(isinstance(turn[key], str) for turn in turns)]
        text = others[0] if len(others) == 1 and not NO_TEXT_KEY.fullmatch(str(others[0])) else None
    return (speaker, text) if speaker and text else None


def _role(speaker: object) -> str:
    return ROLE_NAMES.get(speaker.strip().lower(), "") if isinstance(speaker, str) else ""


def pair_texts(turns: Sequence[object]) -> list[str] | None:
    """The texts of a list of [question, answer] in order; None for other lists and for [speaker, text]."""
    if not _are_pairs_of_texts(turns) or _speakers_begin(turns):
        return None
    return [text for pair in turns if isinstance(pair, list | tuple) for text in pair]


def _are_pairs_of_texts(turns: Sequence[object]) -> bool:
    return all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in turns
    )


def _speakers_begin(turns: Sequence[Any]) -> bool:
    """Whether pairs of texts are [speaker, text]: they begin with roles, or with one of at most two texts."""
    first = {speaker.strip().lower() for speaker, _ in turns}
    are_roles = all(speaker in ROLE_NAMES or is_tool(speaker) for speaker in first)
    return are_roles or (len(turns) > 2 and len(first) <= 2)


def _begin_with_speakers(turns: Sequence[Any], assistant_name: str) -> bool:
    """As `_speakers_begin`, but one may be the assistant's name.

    Raises:
        RejectedRow: the pairs may be [speaker, text] or [question, answer].
    """
    first = [speaker.strip() for speaker, _ in turns]
    if _speakers_begin(turns) or (assistant_name and assistant_name in first):
        return True
    if len(turns) > 1 and all(re.fullmatch(r"[\w-]+", text) for text in first):
        listed = ", ".join(dict.fromkeys(first))
        raise RejectedRow("ambiguous pairs", f"[speaker, text] or [question, answer]? They begin with {listed}")
    return False


def _texts_in_turn(turns: Sequence[object], column: str) -> list[str]:
    """The texts of a list of texts, or of a list of [question, answer], if the column may hold them; or none."""
    name = column.strip().lower()
    pairs = pair_texts(turns) if name in (*TEXTS_COLUMNS, *HISTORY_COLUMNS) else None
    texts = [turn for turn in turns if isinstance(turn, str)] if name in TEXTS_COLUMNS else []
    return pairs or (texts if len(texts) == len(turns) else [])


def _pairs(turns: Sequence[Any]) -> list[tuple[str, str]]:
    """The keys of question and answer of each turn, if every turn has both; otherwise empty."""
    if not all(isinstance(turn, dict) for turn in turns) or _turn_keys(turns):
        return []
    pairs = [find_pair(turn) for turn in turns]
    whole = [pair for turn, pair in zip(turns, pairs, strict=True) if pair and all(type(turn[k]) is str for k in pair)]
    return whole if len(whole) == len(turns) else []


def _speaker(turn: dict, key: str, number: int) -> str:
    value = turn[key]
    if isinstance(value, dict):
        value = next((value[name] for name in ("role", "name", "username", "id") if value.get(name)), None)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise RejectedRow("wrong type", f"message {number}: {key!r} is {turn[key]!r}, expected a name")
    return str(value).strip()
