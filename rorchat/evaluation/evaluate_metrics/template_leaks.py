"""The share of replies that contain parts of a chat template."""

import evaluate
from datasets import Features, Value

from rorchat.evaluation.evaluate_metrics.base import CITATION, InMemoryMetric, mean
from rorchat.evaluation.text_measures import leaks_template, strip_end_token

DESCRIPTION = """\
Share of replies that contain parts of a chat template: a control token before the end of the reply, a control string
spelled with ordinary tokens, a role header on its own line, or markers such as [INST] and ### Response."""

INPUTS = """
Args:
    predictions: replies decoded with skip_special_tokens=False. The token that ends a reply is not a leak.
Returns:
    template_leaks: 0 to 1, lower is better.
Examples:
    >>> from rorchat.evaluation.evaluate_metrics import TemplateLeaks
    >>> TemplateLeaks().compute(predictions=["I am fine.<|im_end|>", "I am fine.<|im_end|> user"])
    {'template_leaks': 0.5}
"""


class TemplateLeaks(InMemoryMetric):
    def _info(self) -> evaluate.MetricInfo:
        features = Features(predictions=Value("string"))
        return evaluate.MetricInfo(DESCRIPTION, CITATION, features, inputs_description=INPUTS)

    def _compute(self, predictions: list[str]) -> dict[str, float]:
        return {"template_leaks": mean(leaks_template(strip_end_token(reply)) for reply in predictions)}
