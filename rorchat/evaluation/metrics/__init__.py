"""Our measures as `evaluate.Metric` classes, which need no network.

One file per metric, so that `evaluate.load("rorchat/evaluation/metrics/stop_rate.py")` works too. This package imports
`evaluate`, which takes seconds; no other module of rorchat does.
"""

from rorchat.evaluation.metrics.bits_per_byte import BitsPerByte
from rorchat.evaluation.metrics.exact_answer import ExactAnswer
from rorchat.evaluation.metrics.repetition import Repetition
from rorchat.evaluation.metrics.stop_rate import StopRate
from rorchat.evaluation.metrics.template_leaks import TemplateLeaks

__all__ = ["BitsPerByte", "ExactAnswer", "Repetition", "StopRate", "TemplateLeaks"]
