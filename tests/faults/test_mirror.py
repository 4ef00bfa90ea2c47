"""A mirror: each checkpoint is copied and verified, no failure there stops a run, and a run goes on from it."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
from fake_hub import TOKEN, FakeHub
from faults.comparison import flipped
from faults.harness import ENVIRONMENT, ROOT, verified_steps, weights

from rorchat.training.checkpointing.checkpoint import Checkpoints

DURING = 6


@pytest.fixture(scope="module")
def at_four(bench):
    """A run with a mirror that was killed when both had two checkpoints: (the run's folder, the mirror)."""
    out, mirror = bench.fresh(), bench.fresh()
    done = bench.run(out, {"kill_at": 1, "mirroring": DURING}, mirror=mirror)
    assert done.code == -9, done.said
    assert verified_steps(mirror) == [4, 2]
    return out, mirror


def copies(bench, at_four):
    return bench.fresh(at_four[0]), bench.fresh(at_four[1])


@pytest.fixture(scope="module")
def operations(bench, at_four) -> list[str]:
    (out, mirror), found = copies(bench, at_four), bench.folder / "operations.json"
    done = bench.run(out, {"count": str(found), "mirroring": DURING}, mirror=mirror)
    assert done.code == 0, done.said
    return json.loads(found.read_text())


def test_the_mirror_is_a_run_folder_with_the_newest_checkpoints(bench, whole):
    out, mirror = bench.fresh(), bench.fresh()
    done = bench.run(out, mirror=mirror)
    assert done.code == 0 and "mirror" not in done.said, done.said
    assert weights(out) == weights(whole)
    assert verified_steps(mirror) == verified_steps(out) == [8, 6]
    for name in ("config.yaml", "metrics.jsonl"):
        assert (mirror / name).is_file()


def test_a_run_whose_folder_is_gone_goes_on_from_the_mirror_with_its_log(bench, at_four, whole):
    out, mirror = copies(bench, at_four)
    shutil.rmtree(out)
    done = bench.run(out, mirror=mirror)
    assert done.code == 0 and "checkpoint-4 was brought from there" in done.said, done.said
    assert weights(out) == weights(whole)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6] and {"resumed"} == {
        line["event"] for line in lines if "event" in line
    }


def test_what_does_not_verify_here_comes_from_there(bench, at_four, whole):
    out, mirror = copies(bench, at_four)
    for checkpoint in Checkpoints(out).committed():
        flipped(0.5)(checkpoint.folder / "optimizer.pt")
    done = bench.run(out, mirror=mirror)
    assert done.code == 0 and "checkpoint-4 was brought from there" in done.said, done.said
    assert weights(out) == weights(whole)


def test_what_does_not_verify_there_is_told_and_the_one_before_it_is_taken(bench, at_four, whole):
    out, mirror = copies(bench, at_four)
    shutil.rmtree(out)
    flipped(0.5)(mirror / "checkpoint-4" / "model.safetensors")
    done = bench.run(out, mirror=mirror)
    assert done.code == 0, done.said
    assert "sha256 differs" in done.said and "checkpoint-2 was brought from there" in done.said
    assert weights(out) == weights(whole)


@pytest.mark.parametrize("torn", [False, True])
def test_a_kill_at_every_operation_of_a_copy_leaves_a_mirror_to_go_on_from(bench, at_four, operations, whole, torn):
    print(f"{len(operations)} operations", *operations, sep="\n")  # noqa: T201
    assert len(operations) > 30
    wrong = {}
    for number, operation in [*enumerate(operations, 1)][:: 4 if torn else 1]:
        if torn and operation.split()[0] != "open":
            continue
        out, mirror = copies(bench, at_four)
        done = bench.run(out, {"kill_at": number, "mirroring": DURING, "torn": torn}, mirror=mirror)
        newest = max(verified_steps(mirror), default=0)
        shutil.rmtree(out)  # nothing but the mirror is left
        again = bench.run(out, mirror=mirror)
        if done.code != -9 or newest not in (4, 6) or again.code or weights(out) != weights(whole):
            wrong[f"{number} {operation}"] = (done.code, newest, again.code, again.said)
        shutil.rmtree(out)
        shutil.rmtree(mirror)
    assert not wrong


def test_a_mirror_that_fails_at_an_operation_neither_stops_nor_changes_the_run(bench, at_four, operations, whole):
    wrong = {}
    for number, operation in [*enumerate(operations, 1)][::3]:
        out, mirror = copies(bench, at_four)
        done = bench.run(out, {"fail_at": number, "mirroring": DURING, "errno": errno.ENOSPC}, mirror=mirror)
        if done.code or weights(out) != weights(whole) or max(verified_steps(mirror)) != 8:
            wrong[f"{number} {operation}"] = (done.code, verified_steps(mirror), done.said)
        shutil.rmtree(out)
        shutil.rmtree(mirror)
    assert not wrong


def test_a_mirror_that_goes_away_is_told_and_not_made_anew(bench, at_four, whole):
    out, mirror = copies(bench, at_four)
    done = bench.run(out, {"vanish": DURING}, mirror=mirror)
    assert done.code == 0, done.said
    assert "is not there any more" in done.said and "checkpoint-8 the newest here" in done.said
    assert weights(out) == weights(whole) and not mirror.exists()


def test_a_mirror_without_a_parent_is_refused(bench):
    done = bench.run(bench.fresh(), mirror=bench.folder / "not-mounted" / "copy")
    assert done.code == 74 and "Mount the drive" in done.said and "Traceback" not in done.said


def test_the_mirror_of_another_run_is_refused_and_left_alone(bench, at_four):
    _, mirror = copies(bench, at_four)
    done = bench.run(bench.fresh(), mirror=mirror, learning_rate=0.5)
    assert done.code == 78 and "holds another run: learning_rate" in done.said, done.said
    assert verified_steps(mirror) == [4, 2]


@pytest.fixture
def on_hub(bench, tmp_path):
    """The recipe in a process of its own, whose Hub is on loopback; one thread, as everywhere here."""

    def run(hub: FakeHub, out, **options):
        environment = hub.environment(tmp_path / "home", options.pop("token", TOKEN))
        environment |= {key: ENVIRONMENT[key] for key in ("OMP_NUM_THREADS", "PYTHONPATH")}
        argv = bench.argv(out, mirror="owner/a-run", **options)
        return subprocess.run(
            [sys.executable, "recipes/pretrain.py", *argv], cwd=ROOT, env=environment, capture_output=True, text=True,
            timeout=120, preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
        )  # fmt: skip

    return run


def copied(there: dict[str, bytes]) -> set[int]:
    return {int(path.split("/")[0][11:]) for path in there if path.startswith("checkpoint-")}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process is put on one core")
def test_a_repository_of_the_hub_is_a_mirror_too(bench, whole, on_hub):
    out = bench.fresh()
    with FakeHub() as hub:
        done = on_hub(hub, out)
        assert done.returncode == 0 and "mirror" not in done.stderr, done.stderr
        there = hub.files["owner/a-run"]
        assert hub.private == {"owner/a-run"}
        newest = {path.name: path.read_bytes() for path in (out / "checkpoint-8").iterdir()}
        assert newest == {path[13:]: content for path, content in there.items() if path.startswith("checkpoint-8/")}
        assert "metrics.jsonl" in there and len(copied(there)) <= 2

        shutil.rmtree(out)
        older = copied(there) - {8}  # which ones were copied is a matter of speed
        broken = bytearray(there["checkpoint-8/optimizer.pt"])
        broken[100] ^= 1
        there["checkpoint-8/optimizer.pt"] = bytes(broken)
        done = on_hub(hub, out)
        assert done.returncode == 0, done.stderr
        assert "sha256 differs" in done.stderr
        if older:
            assert f"checkpoint-{max(older)} was brought" in done.stderr
        assert weights(out) == weights(whole)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process is put on one core")
def test_a_hub_that_fails_is_told_and_one_that_refuses_is_refused_before_the_first_step(bench, whole, on_hub):
    out = bench.fresh()
    with FakeHub() as hub:
        hub.failing = {"POST .*/commit/": 400}
        done = on_hub(hub, out)
        assert done.returncode == 0, done.stderr
        assert "could not be copied (" in done.stderr and "nothing is the newest there" in done.stderr
        assert "Traceback" not in done.stderr and weights(out) == weights(whole)
        done = on_hub(hub, bench.fresh(), token="hf_another")
        assert done.returncode == 77 and "hf auth login" in done.stderr and "Traceback" not in done.stderr
