"""How much replies repeat themselves."""

from collections.abc import Callable, Sequence

import evaluate
from datasets import Features, Value

from rorchat.evaluation.evaluate_metrics.base import InMemoryMetric, mean
from rorchat.evaluation.text_measures import is_repetitive, repetition_rate, strip_end_token

DESCRIPTION = """\
How much replies repeat themselves: the share of repetitive replies, of whose 4-grams more than 30 % occur earlier in
the reply, and the mean share of such 4-grams (seq-rep-4). Replies of fewer than four words and tokens are skipped."""

CITATION = """\
@article{welleck2019neural,
  title = {Neural Text Generation with Unlikelihood Training},
  author = {Welleck, Sean and Kulikov, Ilia and Roller, Stephen and Dinan, Emily and Cho, Kyunghyun and Weston, Jason},
  journal = {arXiv:1908.04319},
  year = {2019},
}"""

INPUTS = """
Args:
    predictions: replies, with or without the token that ended them.
Constructor args:
    tokenize: splits a reply into tokens, e.g. `tokenizer.tokenize`. The larger share of words and of tokens is then
        taken, because a loop without spaces is a single word. Defaults to words only.
Returns:
    repetition: share of repetitive replies, 0 to 1, lower is better; NaN if every reply is too short.
    seq_rep_4: mean share of repeated 4-grams, 0 to 1, lower is better; NaN if every reply is too short.
Examples:
    >>> from rorchat.evaluation.evaluate_metrics import Repetition
    >>> Repetition().compute(predictions=["the mill the mill the mill the mill", "one two three four", "Hi"])
    {'repetition': 0.5, 'seq_rep_4': 0.3}
"""


class Repetition(InMemoryMetric):
    def __init__(self, *args, tokenize: Callable[[str], Sequence] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokenize = tokenize

    def _info(self) -> evaluate.MetricInfo:
        features = Features(predictions=Value("string"))
        return evaluate.MetricInfo(DESCRIPTION, CITATION, features, inputs_description=INPUTS)

    def _compute(self, predictions: list[str]) -> dict[str, float]:
        texts = [strip_end_token(reply) for reply in predictions]
        replies = [(text, self.tokenize(text) if self.tokenize else ()) for text in texts]
        return {
            "repetition": mean(is_repetitive(*reply) for reply in replies),
            "seq_rep_4": mean(repetition_rate(*reply) for reply in replies),
        }
