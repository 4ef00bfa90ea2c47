"""GSM8K: 7,473 grade school problems with answers step by step. Cobbe et al. 2021, arXiv:2110.14168.

Calculator annotations (`<<48/2=24>>`) are removed, and the last line, `#### 24`, becomes `The answer is 24.` The test
file is an evaluation set and only read if the path names it.
"""

import re

from rorchat.rows import RejectedRow, exchange, get_text, message

KIND = "conversation"
LICENCE = "MIT"
SIZE = "7,473 training problems"
HUB = {"path": "openai/gsm8k", "name": "main", "split": "train"}
FILES = ("**/train.jsonl", "**/main/train-*.parquet", "**/train-*.parquet")
RAW = [
    {
        "question": "Ann has 3 boxes of 4 pens. How many pens has she?",
        "answer": "She has 3*4=<<3*4=12>>12 pens.\n#### 12",
    }
]


def convert(row: dict) -> dict:
    """{"question", "answer"} -> one question and answer."""
    answer = re.sub(r"<<[^<>]*>>", "", get_text(row, "answer"))
    return exchange(get_text(row, "question"), re.sub(r"\n#### (\S+)\s*$", r"\nThe answer is \1.", answer))


def to_question(row: dict) -> dict:
    """{"question", "answer"} -> a question whose answer is the number after `####`."""
    number = re.search(r"\n#### (\S+)\s*$", get_text(row, "answer"))
    if not number:
        raise RejectedRow("no answer", "no `#### NUMBER` at the end of 'answer'")
    messages = [message("user", get_text(row, "question"))]
    return {"messages": messages, "answer": number[1].replace(",", ""), "alternatives": [], "topic": "number"}
