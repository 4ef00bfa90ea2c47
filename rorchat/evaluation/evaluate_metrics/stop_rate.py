"""The share of replies that end with the end-of-turn token."""

import evaluate
from datasets import Features, Sequence, Value

from rorchat.chatml import IM_END
from rorchat.evaluation.evaluate_metrics.base import CITATION, InMemoryMetric, mean
from rorchat.evaluation.text_measures import closes_turn

DESCRIPTION = """\
Share of replies that end with the end-of-turn token. A reply that was cut off at the token limit, or that ends with
<|endoftext|>, has not closed its turn."""

INPUTS = """
Args:
    predictions: replies decoded with skip_special_tokens=False, or replies as lists of token ids.
Constructor args:
    end_of_turn: the end-of-turn token, as text or as an id, as in the predictions. Defaults to "<|im_end|>".
Returns:
    stop_rate: 0 to 1, higher is better.
Examples:
    >>> from rorchat.evaluation.evaluate_metrics import StopRate
    >>> StopRate().compute(predictions=["I am fine.<|im_end|>", "I am fine and you are"])
    {'stop_rate': 0.5}
    >>> StopRate(end_of_turn=2).compute(predictions=[[71, 72, 2], [71, 72, 73]])
    {'stop_rate': 0.5}
"""


class StopRate(InMemoryMetric):
    def __init__(self, *args, end_of_turn: str | int = IM_END, **kwargs):
        super().__init__(*args, **kwargs)
        self.end_of_turn = end_of_turn

    def _info(self) -> evaluate.MetricInfo:
        features = [Features(predictions=Value("string")), Features(predictions=Sequence(Value("int64")))]
        return evaluate.MetricInfo(DESCRIPTION, CITATION, features, inputs_description=INPUTS)

    def _compute(self, predictions: list) -> dict[str, float]:
        return {"stop_rate": mean(closes_turn(reply, self.end_of_turn) for reply in predictions)}
