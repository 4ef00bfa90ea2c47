"""MBPP: 974 short Python problems, each with a solution and three tests. Austin et al. 2021, arXiv:2108.07732.

Problems 11 to 510 are the test set and 1 to 10 its few-shot prompt: both are rejected. As in the published prompt, the
question contains the tests that the code should pass.
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
LAST_TEST_TASK = 510  # task_id


def convert(row: dict) -> dict:
    """{"text" or "prompt", "code", "task_id", "test_list"} -> the task with its tests, and the code in a code block."""
    task = get_text(row, "prompt" if isinstance(row, dict) and "prompt" in row else "text").strip()
    code = get_text(row, "code").replace("\r\n", "\n").rstrip()
    if type(row.get("task_id")) is not int:
        raise RejectedRow("missing field", "no number 'task_id', which identifies the test set")
    if row["task_id"] <= LAST_TEST_TASK:
        raise RejectedRow("evaluation split", f"task_id {row['task_id']}")
    lists = [row.get(name) or [] for name in ("test_imports", "test_list")]
    if not all(isinstance(part, list) for part in lists):
        raise RejectedRow("wrong type", "the tests are not lists")
    lines = [row.get("test_setup_code") or "", *lists[0], *lists[1]]
    if not all(isinstance(line, str) for line in lines):
        raise RejectedRow("wrong type", "a test is not text")
    if not task or not code.strip():
        raise RejectedRow("empty question" if not task else "empty reply")
    tests = "\n".join(line.replace("\r\n", "\n") for line in lines if line)
    question = f"{task}\n\nYour code should pass these tests:\n\n{tests}" if tests else task
    return exchange(question, f"```python\n{code}\n```")
