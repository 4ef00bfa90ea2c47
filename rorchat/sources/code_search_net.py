"""CodeSearchNet, its Python part: functions with their docstrings, from GitHub. Husain et al. 2019, arXiv:1909.09436.

Also reads CoSQA (functions with web queries, Huang et al. 2021, arXiv:2105.13239). Only the function is used, because a
query with label 0 does not describe it.
"""

from rorchat.rows import get_text

KIND = "document"
LICENCE = "that of each function's repository; CoSQA: C-UDA 1.0"
SIZE = "412,178 functions for training"
HUB = {
    "path": "code-search-net/code_search_net",
    "name": "python",
    "split": "train",
    "revision": "refs/convert/parquet",
}
FILES = (
    "python_train_*.jsonl",
    "python/final/jsonl/train/*.jsonl",
    "final/jsonl/train/*.jsonl",
    "python/train*.parquet",
    "train*.parquet",
    "cosqa*.json",
)
RAW = [
    {
        "repo": "someone/sums",
        "func_name": "add",
        "original_string": 'def add(a, b):\n    """The sum."""\n    return a + b',
        "code": 'def add(a, b):\n    """The sum."""\n    return a + b',
        "docstring": "The sum.",
    },
    {"repository_name": "someone/sums", "whole_func_string": "def one():\n    return 1", "language": "python"},
    {"idx": "cosqa-dev-0", "doc": "python one", "code": "def one():\n    return 1", "label": 0},
]

_COLUMNS = ("original_string", "whole_func_string", "code")  # in the release, on the Hub, in CoSQA


def convert(row: dict) -> dict:
    """A function in any of the three formats -> {"text"}."""
    column = next((name for name in _COLUMNS if isinstance(row, dict) and name in row), _COLUMNS[0])
    return {"text": get_text(row, column)}
