"""Natural Questions: 307k Google queries with answers from Wikipedia. Kwiatkowski et al. 2019.

Reads the release (document_tokens), its simplified format (document_text), the Parquet files of the Hub, llm-foundry's
passages with a question, and NQ-open: 88k questions with short answers. `HUB` is NQ-open, because the whole dataset has
tens of gigabytes. The answer is the first short answer of the annotators, or Yes or No; a question with only a long
answer is rejected. The development and efficientqa files are evaluation sets and only read if the path names them.
"""

import re

from rorchat.rows import RejectedRow, exchange, get_text

KIND = "conversation"
LICENCE = "CC BY-SA 3.0"
SIZE = "307,373 training questions; 87,925 with a short answer (NQ-open)"
HUB = {"path": "google-research-datasets/nq_open", "split": "train"}
FILES = ("**/nq-train-*.jsonl", "**/*simplified-nq-train*.jsonl", "**/NQ-open.train*.jsonl", "**/train-*.parquet")
_SPAN = {"long_answer": {"start_token": 0, "end_token": 9}, "short_answers": [{"start_token": 4, "end_token": 8}]}
RAW = [
    {"question": "when was the last time anyone was on the moon", "answer": ["14 December 1972 UTC", "December 1972"]},
    {
        "question_text": "when did they land",
        "document_text": "<P> They landed on <B> July 20 </B> . </P>",
        "annotations": [{**_SPAN, "yes_no_answer": "NONE"}],
    },
    {
        "question_text": "when did they land",
        "document_tokens": [
            {"token": token, "html_token": token.startswith("<")}
            for token in "<P> They landed on <B> July 20 </B> . </P>".split()
        ],
        "annotations": [{**_SPAN, "yes_no_answer": "NONE"}],
    },
    {
        "question": {"text": "did they land"},
        "annotations": {"short_answers": [{"start_token": [], "end_token": [], "text": []}], "yes_no_answer": [1]},
    },
    {"context": "Context: They landed on July 20.\n\nQuestion: when did they land\nAnswer: ", "answer": "July 20"},
]


def convert(row: dict) -> dict:
    """Any of the formats -> one question and answer."""
    if not isinstance(row, dict):
        raise RejectedRow("wrong type", f"a row is a {type(row).__name__}, expected an object")
    if "context" in row:
        passage, _, question = get_text(row, "context").removeprefix("Context: ").rpartition("Question: ")
        question = question.strip().removesuffix("Answer:").strip()
        return exchange(f"{passage.strip()}\n\n{question}" if question else "", get_text(row, "answer"))
    if "answer" in row:
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        if not answers:
            raise RejectedRow("no short answer")
        return exchange(get_text(row, "question"), get_text({"answer": answers[0]}, "answer"))
    hub_question = row["question"] if isinstance(row.get("question"), dict) else None
    question = get_text(hub_question, "text") if hub_question else get_text(row, "question_text")
    answers = [answer for annotation in _get_annotations(row) if (answer := _short_answer(annotation, row))]
    if not answers:
        raise RejectedRow("no short answer")
    return exchange(question, answers[0])


def _get_annotations(row: dict) -> list[dict]:
    annotations = row.get("annotations")
    if isinstance(annotations, dict):  # Parquet on the Hub: lists of values instead of a list of objects
        names = ("short_answers", "yes_no_answer")
        columns = [annotations.get(name) for name in names]
        if all(isinstance(column, list) for column in columns):
            annotations = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=False)]
    if not isinstance(annotations, list) or not all(isinstance(annotation, dict) for annotation in annotations):
        raise RejectedRow("missing field", "no list of 'annotations'")
    return annotations


def _short_answer(annotation: dict, row: dict) -> str:
    spans = annotation.get("short_answers")
    if isinstance(spans, dict):
        texts = spans.get("text")
        answers = texts if isinstance(texts, list) else []
    else:
        answers = [_get_span_text(span, row) for span in spans] if isinstance(spans, list) else []
    answer = ", ".join(_join_punctuation(text) for text in answers if isinstance(text, str) and text.strip())
    yes_no = annotation.get("yes_no_answer")  # on the Hub: 1, 0 and -1
    return answer or ("Yes" if yes_no in ("YES", 1) else "No" if yes_no in ("NO", 0) else "")


def _get_span_text(span: object, row: dict) -> str:
    """The text between two token numbers, without HTML tags, which are tokens too."""
    bounds = [span.get("start_token"), span.get("end_token")] if isinstance(span, dict) else []
    if not bounds or not all(type(bound) is int and bound >= 0 for bound in bounds):
        raise RejectedRow("wrong type", "a short answer without two token numbers")
    tokens = row.get("document_tokens")
    if isinstance(tokens, list):
        span_tokens = [(get_text(token, "token"), token.get("html_token")) for token in tokens[slice(*bounds)]]
        words = [token for token, is_tag in span_tokens if not is_tag]
    else:
        span_texts = get_text(row, "document_text").split(" ")[slice(*bounds)]
        words = [token for token in span_texts if not (token.startswith("<") and token.endswith(">"))]
    return " ".join(words)


def _join_punctuation(text: str) -> str:
    """Removes the spaces around punctuation: `March 18 , 2018` -> `March 18, 2018`."""
    text = text.replace("`` ", '"').replace(" ''", '"')
    return re.sub(r" (?=[,.;:!?%)\]]|'s\b|n't\b)|(?<=[(\[]) ", "", text).strip()
