"""OpenAssistant (OASST1): 10k conversation trees by volunteers in 35 languages. Köpf et al. 2023, arXiv:2304.07327.

A conversation is the path of best-ranked replies that begins with the prompt of a tree. Messages that were deleted,
rejected by reviewers or mostly labelled as spam are skipped together with their replies. Reads the release (one tree
per line), tables of messages such as the Hub's, in any order, and Tulu's conversations. OASST2 has the same columns.
"""

from rorchat.reading.message_tables import gather_trees, read_tree
from rorchat.rows import ConvertedRow, RejectedRow
from rorchat.sources import messages

KIND = "conversation"
LICENCE = "Apache-2.0"
SIZE = "88,838 messages (84,437 of them for training) in 10,364 trees"
HUB = {"path": "OpenAssistant/oasst1", "split": "train"}
FILES = ("*ready.trees.jsonl", "*.trees.jsonl", "*ready.messages.jsonl", "**/train-*.parquet", "*.jsonl", "*.csv")
RAW = [
    {
        "message_tree_id": "a",
        "tree_state": "ready_for_export",
        "prompt": {
            "message_id": "a",
            "text": "What is red?",
            "role": "prompter",
            "replies": [
                {"message_id": "b", "text": "No.", "role": "assistant", "rank": 1, "replies": []},
                {"message_id": "c", "text": "A colour.", "role": "assistant", "rank": 0, "replies": []},
            ],
        },
    },
    [
        {"message_id": "a", "message_tree_id": "a", "parent_id": None, "text": "What is red?", "role": "prompter"},
        {"message_id": "b", "message_tree_id": "a", "parent_id": "a", "text": "A colour.", "role": "assistant"},
    ],
    {"messages": [{"content": "What is red?", "role": "user"}, {"content": "A colour.", "role": "assistant"}]},
]


def convert(row: dict | list) -> dict | ConvertedRow:
    """A tree, the messages of a tree, or a conversation -> messages, without an unanswered question at the end."""
    if isinstance(row, dict) and "messages" in row:
        return messages.convert(row)
    if not isinstance(row, dict | list):
        raise RejectedRow("wrong type", f"a row is a {type(row).__name__}, expected a tree")
    return messages.convert(read_tree(row))


gather = gather_trees
