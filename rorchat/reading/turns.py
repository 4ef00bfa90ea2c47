"""Finds the turns of a conversation in a raw row, and which of its speakers is the user.

docs/chats.md lists the shapes that are read.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorchat.rows import ROLE_NAMES, RejectedRow, alternate_turns, message

#: Names of the column of turns, the usual ones first. They are compared in lower case.
TURN_COLUMNS = (
    "messages", "conversations", "conversation", "turns", "dialog", "dialogue", "dialogs", "dialogues", "chat",
    "chats", "utterances", "exchanges", "thread", "transcript", "log", "history", "chat_history",
)  # fmt: skip
#: Keys of the speaker and of the text of a turn, the usual ones first.
SPEAKER_KEYS = (
    "role", "from", "speaker", "author", "sender", "participant", "agent", "user", "name", "username", "user_name",
    "speaker_id", "user_id", "sender_name", "who",
)  # fmt: skip
TEXT_KEYS = ("content", "value", "text", "utterance", "message", "body", "msg")
USUAL_KEYS = (("role", "content"), ("from", "value"))
#: Names of the columns of a question and its answer, in the order in which they are looked for, in lower case.
PAIR_COLUMNS = (
    ("question", "answer"), ("user", "assistant"), ("query", "response"), ("input", "output"),
    ("instruction", "response"), ("instruction", "output"), ("instruction", "answer"), ("prompt", "completion"),
    ("prompt", "response"), ("prompt", "output"), ("prompt", "answer"), ("prompt", "reply"), ("question", "response"),
    ("question", "reply"), ("query", "reply"), ("query", "answer"), ("input", "response"), ("input", "reply"),
    ("message", "reply"), ("message", "response"), ("context", "response"), ("human", "assistant"), ("human", "ai"),
    ("human", "bot"), ("human", "gpt"), ("user", "bot"), ("user", "ai"), ("user", "model"), ("q", "a"),
    ("questions", "answers"), ("frage", "antwort"), ("pregunta", "respuesta"), ("question", "réponse"),
    ("question", "reponse"), ("domanda", "risposta"), ("pergunta", "resposta"), ("vraag", "antwoord"),
    ("fråga", "svar"), ("spørgsmål", "svar"), ("spørsmål", "svar"), ("kysymys", "vastaus"), ("pytanie", "odpowiedź"),
    ("otázka", "odpověď"), ("kérdés", "válasz"), ("soru", "cevap"), ("вопрос", "ответ"), ("питання", "відповідь"),
    ("سؤال", "جواب"), ("प्रश्न", "उत्तर"), ("问题", "回答"), ("问题", "答案"), ("質問", "回答"), ("질문", "답변"),
)  # fmt: skip
#: Roles of turns that no person speaks: a conversation with them is not one of two speakers.
NOT_SPEAKERS = ("tool", "tools", "function", "function_call", "function_response", "observation", "environment")
ASSISTANT_WORDS = {name for name, role in ROLE_NAMES.items() if role == "assistant"} | {"ai", "agent", "chatbot"}
USER_WORDS = {name for name, role in ROLE_NAMES.items() if role == "user"} | {"customer", "client"}
JOINED, LEFT_OUT = "turns of one speaker joined", "a first turn of the assistant left out"

Turn = tuple[str, str]  # (speaker, text)


@dataclass(frozen=True)
class Chat:
    """A conversation with roles.

    Attributes:
        rule: where its turns are and who is the user; empty for messages in the usual format.
        repairs: what was changed.
    """

    messages: list[dict[str, str]]
    rule: str = ""
    repairs: tuple[str, ...] = field(default=())


def find_pair(row: Mapping) -> tuple[str, str] | None:
    """The columns of a question and its answer, by their names."""
    columns = _by_lower_name(row)
    names = next((pair for pair in PAIR_COLUMNS if pair[0] in columns and pair[1] in columns), None)
    return (columns[names[0]], columns[names[1]]) if names else None


def find_turn_column(row: Mapping) -> str | None:
    """The column whose value is a list of turns: one with a usual name, or else the only one."""
    columns = _by_lower_name(row)
    for name in TURN_COLUMNS:
        if name in columns and (name in TURN_COLUMNS[:2] or _has_turns(name, row[columns[name]])):
            return columns[name]
    others = [column for column, value in row.items() if _has_turn_objects(value)]
    return others[0] if len(others) == 1 else None


def is_chat(value: object) -> bool:
    """Whether a value is a conversation: a list of turns, a row with such a list, or a question with an answer."""
    if isinstance(value, dict):
        return find_turn_column(value) is not None or find_pair(value) is not None
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


def read_turns(value: object, column: str = "", assistant_name: str = "") -> Chat | None:
    """The conversation that a list of turns is; None for messages in the usual format, which need no conversion.

    Args:
        value: the list, or its JSON text.
        column: where it was found; empty if the row is the list.
        assistant_name: the speaker who is the assistant; empty to decide by the names.

    Raises:
        RejectedRow: its roles cannot be known.
    """
    turns = _parse(value)
    where = f"turns from {column!r}" if column else "turns from lists"
    if not isinstance(turns, list) or not turns:
        return None
    if strings := _strings(turns):
        return Chat(alternate_turns(strings), f"{where}: texts in turn, the first is from the user")
    if not all(isinstance(turn, dict) for turn in turns):
        return None
    if pairs := _pairs(turns):
        question, answer = pairs[0]
        texts = [turn[key] for turn, keys in zip(turns, pairs, strict=True) for key in keys]
        return Chat(alternate_turns(texts), f"{where}: {question!r} is the user, {answer!r} the assistant")
    keys = _turn_keys(turns)
    if keys is None:
        return None
    has_roles = not assistant_name and all(_role(turn[keys[0]]) for turn in turns)
    is_usual = keys in USUAL_KEYS and not any(isinstance(turn[keys[1]], list) for turn in turns)
    if is_usual and column.lower() in ("", *TURN_COLUMNS[:2]) and (has_roles or keys[0] == "role"):
        return None
    spoken = [(_speaker(turn, keys[0], number), _text(turn, keys[1], number)) for number, turn in enumerate(turns)]
    where += f" ({keys[0]!r} and {keys[1]!r})"
    if has_roles:
        messages = [message(_role(speaker), text) for speaker, text in spoken]
        return Chat(messages, f"{where}: the roles are those of the turns")
    return assign_roles(spoken, where, assistant_name=assistant_name)


def assign_roles(turns: Sequence[Turn], where: str, *, speakers: Sequence[str] = (), assistant_name: str = "") -> Chat:
    """The conversation of two speakers. The first is the user, unless the name of one says otherwise.

    Args:
        where: the start of the rule.
        speakers: those of the whole log, in the order in which they begin; empty for those of these turns.
        assistant_name: the speaker who is the assistant; empty to decide by the names.

    Raises:
        RejectedRow: there are not two speakers.
    """
    names = list(dict.fromkeys(speakers or [speaker for speaker, _ in turns if speaker.lower() != "system"]))
    roles, reason = _decide_roles(names, assistant_name)
    if speakers:  # of a whole log; in a dataset, every row may have other names
        user, assistant = sorted(names, key=lambda name: roles[name] == "assistant")
        reason += f" ({user!r} is the user, {assistant!r} the assistant; `:assistant_name={user}` swaps them)"
    joined: list[Turn] = []
    for speaker, text in turns:
        if joined and joined[-1][0] == speaker:
            joined[-1] = (speaker, f"{joined[-1][1]}\n{text}")
        else:
            joined.append((speaker, text))
    repairs = [JOINED] if len(joined) < len(turns) else []
    messages = [message(roles.get(speaker, "system"), text) for speaker, text in joined]
    first = next((number for number, turn in enumerate(messages) if turn["role"] != "system"), 0)
    if messages[first]["role"] == "assistant":
        del messages[first]
        repairs.append(LEFT_OUT)
    if not any(turn["role"] == "assistant" for turn in messages):
        raise RejectedRow("no assistant turn", f"speakers: {', '.join(dict.fromkeys(name for name, _ in turns))}")
    return Chat(messages, f"{where}: of two speakers, {reason}", tuple(repairs))


def _decide_roles(names: list[str], assistant_name: str) -> tuple[dict[str, str], str]:
    """({speaker: role}, the reason)."""
    listed = ", ".join(names)
    if any(name.lower() in NOT_SPEAKERS for name in names):
        unknown = next(name for name in names if name.lower() in NOT_SPEAKERS)
        raise RejectedRow("unknown role", f"a turn has the role {unknown!r}; allowed are {', '.join(ROLE_NAMES)}")
    if len(names) > 2:
        raise RejectedRow("more than two speakers", listed)
    if len(names) < 2:
        raise RejectedRow("one speaker", listed)
    if assistant_name:
        if assistant_name not in names:
            raise RejectedRow("no assistant turn", f"no speaker {assistant_name!r}, only {listed}")
        user = next(name for name in names if name != assistant_name)
        return {user: "user", assistant_name: "assistant"}, "the one that you did not name is the user"
    guesses = [_role_of_name(name) for name in names]
    if "assistant" in guesses and guesses.count("assistant") == 1:
        user = names[1 - guesses.index("assistant")]
    elif guesses.count("user") == 1:
        user = names[guesses.index("user")]
    else:
        return dict(zip(names, ("user", "assistant"), strict=True)), "the first is the user"
    other = next(name for name in names if name != user)
    return {user: "user", other: "assistant"}, "their names say who is the user"


def _role_of_name(name: str) -> str:
    words = set(re.findall(r"[^\W\d_]+", name.lower()))
    return "assistant" if words & ASSISTANT_WORDS else "user" if words & USER_WORDS else ""


def _by_lower_name(row: Mapping) -> dict[str, str]:
    columns: dict[str, str] = {}
    for column in row:
        if isinstance(column, str):
            columns.setdefault(column.strip().lower(), column)
    return columns


def _parse(value: object) -> object:
    """A list from its JSON text, as tables hold it; other values unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _has_turns(name: str, value: object) -> bool:
    turns = _parse(value)
    if not isinstance(turns, list) or not turns:
        return False
    if _strings(turns):
        return name != "turns"  # in MT-Bench, `turns` are two questions of the user
    return _has_turn_objects(turns) or bool(_pairs(turns))


def _has_turn_objects(value: object) -> bool:
    turns = _parse(value)
    return isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns) and _turn_keys(turns) is not None


def _turn_keys(turns: Sequence[Any]) -> tuple[str, str] | None:
    """The keys of the speaker and of the text that all turns have.

    Beside a speaker, the only other key with texts is the text, but not in what may be a list of people.
    """
    if not turns:
        return None
    common = set(turns[0]).intersection(*turns[1:])
    text = next((key for key in TEXT_KEYS if key in common), None)
    speaker = next((key for key in SPEAKER_KEYS if key in common and key != text), None)
    if speaker and not text and not speaker.startswith(("name", "user")):
        others = [key for key in common - {speaker} if all(isinstance(turn[key], str) for turn in turns)]
        text = others[0] if len(others) == 1 else None
    return (speaker, text) if speaker and text else None


def _role(speaker: object) -> str:
    return ROLE_NAMES.get(speaker.strip().lower(), "") if isinstance(speaker, str) else ""


def _strings(turns: Sequence[object]) -> list[str]:
    """The texts of a list of texts, or of a list of [question, answer]; empty for other lists."""
    if all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        turns = [text for turn in turns if isinstance(turn, list) for text in turn]
    texts = [turn for turn in turns if isinstance(turn, str)]
    return texts if len(texts) == len(turns) else []


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


def _text(turn: dict, key: str, number: int) -> str:
    text = join_text(turn[key])
    if text is None:
        what = "null" if turn[key] is None else f"of type {type(turn[key]).__name__}, expected a string"
        reason = "empty text" if turn[key] is None else "wrong type"
        raise RejectedRow(reason, f"message {number}: {key!r} is {what}")
    return text


def join_text(value: object) -> str | None:
    """A text, or the texts of a list of parts such as {"type": "text", "text": ...}; None for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        return None
    parts = [part.get("text") if isinstance(part, dict) else part for part in value]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else None
