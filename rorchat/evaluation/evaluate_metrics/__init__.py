"""Our measures as `evaluate.Metric` classes, which need no network.

One file per metric, so that `evaluate.load("rorchat/evaluation/evaluate_metrics/stop_rate.py")` works too. This package
imports `evaluate`, which takes seconds; no other module of rorchat does. The gate's measures are in
`rorchat.evaluation.behaviour`.
"""

from rorchat.evaluation.evaluate_metrics.bits_per_byte import BitsPerByte
from rorchat.evaluation.evaluate_metrics.exact_answer import ExactAnswer
from rorchat.evaluation.evaluate_metrics.repetition import Repetition
from rorchat.evaluation.evaluate_metrics.stop_rate import StopRate
from rorchat.evaluation.evaluate_metrics.template_leaks import TemplateLeaks

__all__ = ["BitsPerByte", "ExactAnswer", "Repetition", "StopRate", "TemplateLeaks"]
