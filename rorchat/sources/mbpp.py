"""MBPP: 974 short Python problems with a solution and three tests each. Austin et al. 2021, arXiv:2108.07732.

Problems 11 to 510 are the test set and 1 to 10 stand in its prompt: both are refused. The question is the published
prompt's: the task, then the tests that the code should pass.
"""

from rorchat.rows import RejectedRow, exchange, get_text

KIND = "conversation"
LICENCE = "CC BY 4.0"
SIZE = "974 problems, of which 374 train and 90 validate"
HUB = {"path": "google-research-datasets/mbpp", "name": "full", "split": "train"}
FILES = ("mbpp.jsonl", "sanitized-mbpp.json", "**/full/train-*.parquet", "**/train-*.parquet")
RAW = [
    {
        "text": "Write a function to add two numbers.",
        "code": "def add(a, b):\r\n\treturn a + b ",
        "task_id": 601,
        "test_setup_code": "",
        "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
        "challenge_test_list": [],
    },
    {
        "source_file": "charlessutton@: Benchmark Questions Verification V2.ipynb",
        "task_id": 602,
        "prompt": "Write a function to take the square root.",
        "code": "import math\ndef root(x):\n  return math.sqrt(x)",
        "test_imports": ["import math"],
        "test_list": ["assert math.isclose(root(4), 2)"],
    },
]
LAST_OF_TEST = 510  # task_id


def convert(row: dict) -> dict:
    """{"text" or "prompt", "code", "task_id", "test_list"} -> the task with its tests, and the code in a fence."""
    task = get_text(row, "prompt" if isinstance(row, dict) and "prompt" in row else "text").strip()
    code = get_text(row, "code").replace("\r\n", "\n").rstrip()
    if type(row.get("task_id")) is not int:
        raise RejectedRow("missing field", "no number 'task_id', by which the test set is known")
    if row["task_id"] <= LAST_OF_TEST:
        raise RejectedRow("evaluation split", f"task_id {row['task_id']}")
    listed = [row.get(name) or [] for name in ("test_imports", "test_list")]
    if not all(isinstance(part, list) for part in listed):
        raise RejectedRow("wrong type", "the tests are not lists")
    tests = [row.get("test_setup_code") or "", *listed[0], *listed[1]]
    if not all(isinstance(test, str) for test in tests):
        raise RejectedRow("wrong type", "a test is not text")
    if not task or not code.strip():
        raise RejectedRow("empty question" if not task else "empty reply")
    tests = "\n".join(test.replace("\r\n", "\n") for test in tests if test)
    asked = f"{task}\n\nYour code should pass these tests:\n\n{tests}" if tests else task
    return exchange(asked, f"```python\n{code}\n```")
