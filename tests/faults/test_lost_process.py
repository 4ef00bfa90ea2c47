"""One of two processes dies or hangs: the other ends within a bounded time with a clear message, resumably."""

import signal
import time

import pytest
from faults.harness import verified_steps, weights_sha256

FLAGS = {"max_steps": 12, "ddp_timeout": 4}


@pytest.fixture(scope="module")
def uninterrupted_by_two(sandbox):
    out = sandbox.new_folder()
    result = sandbox.run(out, processes=2, **FLAGS)
    assert result.code == 0, result.output
    return out


@pytest.mark.parametrize(
    ("how", "where", "at"),
    [
        (signal.SIGKILL, "forward", 6), (signal.SIGKILL, "save", 6), (signal.SIGKILL, "evaluate", 8),
        (signal.SIGSTOP, "forward", 6), (signal.SIGSTOP, "save", 6),
    ],
)  # fmt: skip
def test_the_surviving_process_ends_in_time_and_the_run_resumes(sandbox, uninterrupted_by_two, how, where, at):
    out = sandbox.new_folder()
    flags = FLAGS | ({"eval_strategy": "steps", "eval_steps": 4} if where == "evaluate" else {})
    started = time.monotonic()
    result = sandbox.run(out, {"signal": int(how), "at": at, "where": where, "rank": 1}, processes=2, **flags)
    assert time.monotonic() - started < FLAGS["ddp_timeout"] + 15
    assert result.code == (-9 if how == signal.SIGKILL else 75), result.output
    assert (
        "Another process of the run has died or does not respond" in result.output and "Traceback" not in result.output
    )
    assert max(verified_steps(out)) >= at - 2
    assert sandbox.run(out, processes=2, **flags).code == 0
    assert weights_sha256(out) == weights_sha256(uninterrupted_by_two)
