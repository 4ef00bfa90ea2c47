"""Your own conversations, in the formats of most chat datasets and chat programs (docs/chats.md).

`{"messages": [{"role", "content"}]}` (SmolTalk, UltraChat, Tulu), a list of such messages, or ShareGPT's
`{"conversations": [{"from", "value"}]}`. Other shapes become one of these before (`columns.py`). Rows with the `label`
false (bad replies in KTO) are rejected.
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
            raise RejectedRow("missing field", f"no turns, question or answer among {', '.join(list(row)[:8])}")
        if row.get("label") is False:
            raise RejectedRow("marked as bad", "label is false, as for bad replies in KTO")
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
