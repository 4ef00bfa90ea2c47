"""Your own conversations, in the formats of most chat datasets and chat programs (docs/chats.md).

`{"messages": [{"role", "content"}]}` (SmolTalk, UltraChat, Tulu), a list of such messages, or ShareGPT's
`{"conversations": [{"from", "value"}]}`. Other shapes become one of these before (`columns.py`). Marks on a turn say
whether it is learned (`rorchat/reading/messages.py`).
"""

from rorchat.reading.chats import read_chats
from rorchat.reading.message_tables import is_tree_message
from rorchat.reading.messages import normalize_messages
from rorchat.rows import ConvertedRow, RejectedRow
from rorchat.sources.base import OWN_FILES

KIND = "conversation"
LICENCE = OWN_FILES
SIZE = "your files"
HUB = None
FILES = ("**/*",)
READ_SLICE = read_chats
UNANSWERED = "a last turn of the user, without a reply, left out"
RAW = [
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]},
    [{"content": "Hello", "role": "user"}, {"content": "Hi!", "role": "assistant"}],
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}], "label": True},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "assistant", "content": "No.", "weight": 0},
            {"role": "user", "content": [{"type": "text", "text": "Hello?"}]},
            {"role": "assistant", "content": "Hi!", "weight": 1},
        ]
    },
]


def convert(row: dict | list) -> dict | ConvertedRow:
    """Any of the formats -> messages, without an empty system message and without unanswered turns at the end."""
    return trim(normalize_messages(_find_turns(row) if isinstance(row, dict) else row))


def _find_turns(row: dict) -> object:
    for key in ("messages", "conversations"):
        if key in row:
            return row[key]
    if is_tree_message(row):
        raise RejectedRow("missing field", "the row is one message of a tree: read it with the source 'oasst'")
    keys = ", ".join(map(str, list(row)[:8]))
    raise RejectedRow("missing field", f"no list of turns, and no question with an answer, among the keys {keys}")


def trim(messages: list[dict]) -> dict | ConvertedRow:
    """A conversation without an empty system message and without unanswered turns at the end, which are counted."""
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    end = next((end for end in range(len(messages), 0, -1) if messages[end - 1]["role"] == "assistant"), 0)
    if not end:
        raise RejectedRow("no assistant turn")
    conversation = {"messages": messages[:end]}
    return conversation if end == len(messages) else ConvertedRow(conversation, repairs=(UNANSWERED,))
