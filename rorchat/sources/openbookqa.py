"""OpenBookQA: 4,957 questions of elementary science with four choices. Mihaylov et al. 2018, arXiv:1809.02789.

The question lists the choices by letter; the answer is the letter and the text of a choice. The development and test
files are evaluation sets and only read if the path names them.
"""

import re

from rorchat.rows import RejectedRow, exchange, get_text

KIND = "conversation"
LICENCE = "Apache-2.0"
SIZE = "4,957 training questions"
HUB = {"path": "allenai/openbookqa", "name": "main", "split": "train"}
FILES = ("**/train.jsonl", "**/train_complete.jsonl", "**/train.tsv", "**/main/train-*.parquet", "**/train-*.parquet")
RAW = [
    {
        "id": "7-980",
        "question": {"stem": "The sky is", "choices": [{"text": "blue", "label": "A"}, {"text": "sour", "label": "B"}]},
        "answerKey": "A",
    },
    {"question_stem": "The sky is", "choices": {"text": ["blue", "sour"], "label": ["A", "B"]}, "answerKey": "A"},
    {"ID": "7-980", "Question Stem": "The sky is", "Choices": "(A) blue (B) sour", "Answer Key": "A"},
]


def convert(row: dict) -> dict:
    """Any of the three formats (JSON Lines, Hub, TSV) -> one question and answer."""
    if isinstance(row, dict) and "Question Stem" in row:
        stem, key = get_text(row, "Question Stem"), get_text(row, "Answer Key")
        choices = re.findall(r"\(([A-Z])\) (.*?)(?= \([A-Z]\) |$)", get_text(row, "Choices"))
    elif isinstance(row, dict) and "question_stem" in row:
        stem, key, columns = get_text(row, "question_stem"), get_text(row, "answerKey"), row.get("choices")
        if not isinstance(columns, dict) or not all(isinstance(columns.get(name), list) for name in ("label", "text")):
            raise RejectedRow("missing field", "no lists 'label' and 'text' in 'choices'")
        choices = list(zip(columns["label"], columns["text"], strict=False))
    else:
        key = get_text(row, "answerKey")
        stem, choices = get_text(row.get("question"), "stem"), row["question"].get("choices")
        if not isinstance(choices, list):
            raise RejectedRow("missing field", "no list 'choices' in 'question'")
        choices = [(get_text(choice, "label"), get_text(choice, "text")) for choice in choices]
    lines = [f"{label}. {get_text({'choice': text}, 'choice').strip()}" for label, text in choices]
    right = [line for line in lines if line.startswith(f"{key}. ")]
    if len(right) != 1:
        raise RejectedRow("missing field", f"no choice {key!r}")
    return exchange("\n".join([f"{stem.strip()}\n", *lines]) if stem.strip() else "", right[0])
