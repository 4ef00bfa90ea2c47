"""The share of replies that contain the known answer and no alternative to it."""

import evaluate
from datasets import Features, Sequence, Value

from rorchat.evaluation.evaluate_metrics.base import CITATION, InMemoryMetric, mean
from rorchat.evaluation.text_measures import strip_end_token
from rorchat.sources.tinytown import Question

DESCRIPTION = """\
Share of replies that contain the known answer as whole words, and none of its alternatives. To a question of the kind
"sum" the last number of the reply must be the answer, and other numbers must stand in the question."""

INPUTS = """
Args:
    predictions: replies, with or without the token that ended them.
    references: answers; or questions as {"kind": ..., "text": ..., "answer": ..., "alternatives": [...]}.
Returns:
    exact_answer: 0 to 1, higher is better.
Examples:
    >>> from rorchat.evaluation.evaluate_metrics import ExactAnswer
    >>> ExactAnswer().compute(predictions=["In the mill.<|im_end|>", "In the harbour."], references=["mill", "lake"])
    {'exact_answer': 0.5}
    >>> question = {"kind": "place", "text": "Where is it?", "answer": "mill", "alternatives": ["mill", "lake"]}
    >>> ExactAnswer().compute(predictions=["In the mill or the lake."], references=[question])
    {'exact_answer': 0.0}
"""


class ExactAnswer(InMemoryMetric):
    def _info(self) -> evaluate.MetricInfo:
        text = Value("string")
        question = {"kind": text, "text": text, "answer": text, "alternatives": Sequence(text)}
        features = [Features(predictions=text, references=text), Features(predictions=text, references=question)]
        return evaluate.MetricInfo(DESCRIPTION, CITATION, features, inputs_description=INPUTS)

    def _compute(self, predictions: list[str], references: list) -> dict[str, float]:
        questions = [
            Question("", "", answer=reference)
            if isinstance(reference, str)
            else Question(**{**reference, "alternatives": tuple(reference["alternatives"])})
            for reference in references
        ]
        pairs = zip(questions, predictions, strict=True)
        return {"exact_answer": mean(question.is_right(strip_end_token(reply)) for question, reply in pairs)}
