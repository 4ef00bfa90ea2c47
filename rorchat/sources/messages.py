"""Your own conversations, in the formats of most chat datasets and chat programs (docs/chats.md).

`{"messages": [{"role", "content"}]}` (SmolTalk, UltraChat, Tulu), a list of such messages, or ShareGPT's
`{"conversations": [{"from", "value"}]}`. Other shapes become one of these before (`columns.py`).
"""

from rorchat.reading.chats import read_chats
from rorchat.rows import RejectedRow, normalize_messages
from rorchat.sources.base import OWN_FILES

KIND = "conversation"
LICENCE = OWN_FILES
SIZE = "your files"
HUB = None
FILES = ("**/*",)
READ_SLICE = read_chats
RAW = [
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]},
    [{"content": "Hello", "role": "user"}, {"content": "Hi!", "role": "assistant"}],
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}], "label": True},
]


def convert(row: dict | list) -> dict:
    """Any of the formats -> messages, without an empty system message and without unanswered turns at the end."""
    if isinstance(row, dict):
        if "messages" not in row and "conversations" not in row:
            keys = ", ".join(map(str, list(row)[:8]))
            detail = f"no list of turns, and no question with an answer, among the keys {keys}"
            raise RejectedRow("missing field", detail)
        turns = row["messages"] if "messages" in row else row["conversations"]
    else:
        turns = row
    messages = normalize_messages(turns)
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise RejectedRow("no assistant turn")
    return {"messages": messages}
