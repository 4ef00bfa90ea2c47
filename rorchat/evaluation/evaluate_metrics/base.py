"""What the metrics share: they keep their inputs in memory and write no files."""

import abc
import math
from collections.abc import Iterable

import evaluate

CITATION = """\
@misc{rorchat,
  title = {rorchat: from raw text to your own chat model},
  year = {2026},
}"""


class InMemoryMetric(evaluate.Metric, abc.ABC):
    """A metric that keeps its inputs in memory, not in evaluate's cache folder, unless several processes share it."""

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = False, num_process: int = 1, **kwargs):
        super().__init__(
            config_name, keep_in_memory=keep_in_memory or num_process == 1, num_process=num_process, **kwargs
        )

    def _build_data_dir(self) -> str:
        # evaluate 0.4.6 creates its cache folder even if the metric stores nothing in it
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()

    @abc.abstractmethod  # abstract, because evaluate.load() takes the first class of a file that is not
    def _info(self) -> evaluate.MetricInfo: ...


def mean(values: Iterable[float | None]) -> float:
    """The mean of all values but None; NaN if there are none."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
