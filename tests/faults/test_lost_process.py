"""Two processes of which one dies or hangs: the other ends within a bounded time, says so, and the run can go on."""

import signal
import time

import pytest
from faults.harness import verified_steps, weights

FLAGS = {"max_steps": 12, "ddp_timeout": 4}


@pytest.fixture(scope="module")
def whole_by_two(bench):
    out = bench.fresh()
    done = bench.run(out, processes=2, **FLAGS)
    assert done.code == 0, done.said
    return out


@pytest.mark.parametrize(
    ("how", "where", "at"),
    [
        (signal.SIGKILL, "forward", 6), (signal.SIGKILL, "save", 6), (signal.SIGKILL, "evaluate", 8),
        (signal.SIGSTOP, "forward", 6), (signal.SIGSTOP, "save", 6),
    ],
)  # fmt: skip
def test_the_other_ends_in_time_and_the_same_command_ends_the_same(bench, whole_by_two, how, where, at):
    out = bench.fresh()
    flags = FLAGS | ({"eval_strategy": "steps", "eval_steps": 4} if where == "evaluate" else {})
    began = time.monotonic()
    done = bench.run(out, {"signal": int(how), "at": at, "where": where, "rank": 1}, processes=2, **flags)
    assert time.monotonic() - began < FLAGS["ddp_timeout"] + 15
    assert done.code == (-9 if how == signal.SIGKILL else 75), done.said
    assert "Another process of the run is gone or does not answer" in done.said and "Traceback" not in done.said
    assert max(verified_steps(out)) >= at - 2
    assert bench.run(out, processes=2, **flags).code == 0
    assert weights(out) == weights(whole_by_two)
