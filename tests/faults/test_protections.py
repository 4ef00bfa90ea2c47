"""With one protection switched off, what the other tests ask for does not hold: so they can fail."""

import json
import shutil
import signal

import pytest
import torch
from faults.comparison import flipped, log_of
from faults.harness import verified_steps, weights

from rorchat.errors import DataError
from rorchat.files import folder_lock
from rorchat.tokens.store import TokenStore
from rorchat.training.checkpointing import mirror
from rorchat.training.checkpointing.checkpoint import Checkpoint, Checkpoints, Damaged, copy, seal


def test_without_verifying_a_flipped_bit_is_taken(bench, at_four, monkeypatch):
    out = bench.fresh(at_four)
    flipped(0.5)(out / "checkpoint-4" / "model.safetensors")
    monkeypatch.setattr(Checkpoint, "verify", Checkpoint.check_sizes)
    assert Checkpoints(out).recover().step == 4


def test_without_staging_a_kill_leaves_a_newest_checkpoint_that_does_not_verify(bench, at_four):
    out = bench.fresh(at_four)
    done = bench.run(out, {"kill_at": 20, "during": 6, "off": "staging"})
    assert done.code == -9 and (out / "checkpoint-6").is_dir() and verified_steps(out) == [4, 2]


def test_without_its_own_state_a_resumed_run_has_another_log(bench, whole):
    out = bench.fresh()
    assert bench.run(out, {"signal": int(signal.SIGTERM), "at": 3, "where": "forward"}).code == 75
    assert bench.run(out, {"off": "state"}).code == 0
    assert weights(out) == weights(whole) and log_of(out) != log_of(whole)


def test_without_judging_what_is_no_number_reaches_the_weights_and_nothing_but_the_last_look_stops_it(bench):
    out = bench.fresh()
    done = bench.run(out, {"poison": [4], "value": "nan", "in": "loss", "off": "watch"})
    assert done.code == 70 and "left weights that are no numbers" in done.said, done.said
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert not any(line.get("event") == "skipped" for line in lines)


def test_without_catching_what_a_full_disk_says_the_first_failure_ends_the_run(bench, at_four):
    out = bench.fresh(at_four)
    assert bench.run(out, {"fail_at": 10, "during": 6, "errno": 28, "off": "disk"}).code == 74
    assert bench.run(out, {"fail_at": 10, "during": 6, "errno": 28}).code == 0


def test_without_listening_a_signal_loses_the_step(bench):
    out = bench.fresh()
    done = bench.run(out, {"signal": int(signal.SIGTERM), "at": 3, "where": "forward", "off": "signals"})
    assert done.code == -signal.SIGTERM and verified_steps(out) == [2]


def test_without_dividing_no_memory_ends_the_run(bench):
    done = bench.run(bench.fresh(), {"fits": 1, "from": 3, "in": "forward", "off": "memory"})
    assert done.code == 2 and "Out of memory" in done.said and "it is done again" not in done.said


def test_without_knowing_it_a_lost_process_ends_the_other_with_a_traceback(bench):
    fault = {"signal": int(signal.SIGKILL), "at": 3, "where": "forward", "rank": 1, "off": "lost"}
    assert "Traceback" in bench.run(bench.fresh(), fault, processes=2).said


def test_without_verifying_what_arrived_a_mirror_takes_a_copy_that_is_none(bench, at_four, monkeypatch, tmp_path):
    def damaging(source, target):
        copy(source, target)
        flipped(0.5)(target / "model.safetensors")

    monkeypatch.setattr(mirror, "copy", damaging)
    place = mirror.FolderPlace(tmp_path / "copy", at_four)
    checkpoint = Checkpoint.read(at_four / "checkpoint-4")
    with pytest.raises(Damaged, match="sha256 differs"):
        place.put(checkpoint, at_four)
    assert place.found() == []
    monkeypatch.setattr(Checkpoint, "verify", Checkpoint.check_sizes)
    place.put(checkpoint, at_four)
    assert [each.step for each in place.found()] == [4]


def test_without_a_lock_two_runs_share_a_folder(bench):
    out = bench.fresh()
    with folder_lock(out):
        assert bench.run(out).code == 78
        assert bench.run(out, {"off": "lock"}).code == 0


def test_without_looking_what_is_no_number_is_saved(bench):
    fault = {"poison": [3], "value": "nan", "in": "moment"}
    out, other = bench.fresh(), bench.fresh()
    bench.run(out, fault, max_steps=4)
    bench.run(other, fault | {"off": "finite"}, max_steps=4)
    assert not has_nan(out) and has_nan(other)


def has_nan(run) -> bool:
    states = [
        torch.load(each.folder / "optimizer.pt", weights_only=True)["state"].values()
        for each in Checkpoints(run).committed()
    ]
    tensors = [value for state in states for values in state for value in values.values() if torch.is_tensor(value)]
    return not all(tensor.isfinite().all() for tensor in tensors)


def test_without_a_crc_a_flipped_bit_of_a_token_is_trained_on(bench, at_four, tmp_path, monkeypatch):
    (store,) = (path for path in (bench.folder / "store").iterdir() if path.is_dir())
    shutil.copytree(store, tmp_path / "tokens")
    flipped(0.5)(tmp_path / "tokens" / "train-00000.npy")
    opened = TokenStore(tmp_path / "tokens")
    with pytest.raises(DataError, match="damaged"):
        opened.slice("train", 0, opened.tokens("train"))
    monkeypatch.setattr(TokenStore, "_check", lambda *_: None)
    assert len(opened.slice("train", 0, opened.tokens("train"))) == opened.tokens("train")


def test_without_being_left_alone_a_checkpoint_that_is_copied_is_rotated_away(at_four, tmp_path):
    shutil.copytree(at_four, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    copied, other = tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-4"
    for step in (6, 8):
        seal(
            shutil.copytree(other, tmp_path / f"{step}", ignore=shutil.ignore_patterns("MANIFEST.json")), {"step": step}
        )
    checkpoints.in_use = {copied}
    for step in (6, 8):
        checkpoints.adopt(step, lambda target, step=step: copy(tmp_path / f"{step}", target))
    assert copied.is_dir() and not other.exists()
    checkpoints.in_use = set()
    checkpoints.rotate(tmp_path / "run" / "checkpoint-8")
    assert not copied.exists()


def test_without_comparing_identities_another_learning_rate_goes_on_in_silence(bench, at_four):
    out = bench.fresh(at_four)
    assert bench.run(out, learning_rate=1e-3).code == 78
    assert bench.run(out, {"off": "identity"}, learning_rate=1e-3).code == 0
