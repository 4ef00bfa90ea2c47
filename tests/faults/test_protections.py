"""With one protection switched off, what the other fault tests assert does not hold, so those tests can fail."""

import json
import shutil
import signal
import zlib
from unittest.mock import ANY

import pytest
import torch
from faults.comparison import flip_bit, read_log
from faults.harness import verified_steps, weights_sha256

from rorchat.errors import DataError
from rorchat.files import folder_lock
from rorchat.tokens.store import TokenStore
from rorchat.training.checkpointing import mirror
from rorchat.training.checkpointing.checkpoint import Checkpoint, DamagedCheckpoint, copy, seal
from rorchat.training.checkpointing.recovery import Checkpoints


def test_without_verification_a_flipped_bit_is_accepted(sandbox, stopped_at_4, monkeypatch):
    out = sandbox.new_folder(stopped_at_4)
    flip_bit(0.5)(out / "checkpoint-4" / "model.safetensors")
    monkeypatch.setattr(Checkpoint, "verify", Checkpoint.verify_sizes)
    assert Checkpoints(out).recover().step == 4


def test_without_staging_a_kill_leaves_an_incomplete_checkpoint(sandbox, stopped_at_4):
    out = sandbox.new_folder(stopped_at_4)
    result = sandbox.run(out, {"kill_at": 20, "during": 6, "off": "staging"})
    assert result.code == -9 and (out / "checkpoint-6").is_dir() and verified_steps(out) == [4, 2]


def test_without_the_trainer_state_a_resumed_log_differs(sandbox, uninterrupted):
    out = sandbox.new_folder()
    assert sandbox.run(out, {"signal": int(signal.SIGTERM), "at": 3, "where": "forward"}).code == 75
    assert sandbox.run(out, {"off": "trainer state"}).code == 0
    assert weights_sha256(out) == weights_sha256(uninterrupted) and read_log(out) != read_log(uninterrupted)


def test_without_the_divergence_callback_nan_reaches_the_weights(sandbox):
    out = sandbox.new_folder()
    result = sandbox.run(out, {"poison": [4], "value": "nan", "in": "loss", "off": "divergence"})
    assert result.code == 70, result.output  # from the check of the final weights
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert not any(line.get("event") == "skipped" for line in lines)


def test_without_storage_failures_the_first_full_disk_ends_the_run(sandbox, stopped_at_4):
    out = sandbox.new_folder(stopped_at_4)
    assert sandbox.run(out, {"fail_at": 10, "during": 6, "errno": 28, "off": "storage failure"}).code == 74
    assert sandbox.run(out, {"fail_at": 10, "during": 6, "errno": 28}).code == 0


def test_without_signal_handling_the_step_is_lost(sandbox):
    out = sandbox.new_folder()
    result = sandbox.run(out, {"signal": int(signal.SIGTERM), "at": 3, "where": "forward", "off": "signals"})
    assert result.code == -signal.SIGTERM and verified_steps(out) == [2]


def test_without_recovery_out_of_memory_ends_the_run(sandbox):
    result = sandbox.run(sandbox.new_folder(), {"fits": 1, "from": 3, "in": "forward", "off": "oom recovery"})
    assert result.code == 2 and "Out of memory" in result.output and "It is repeated" not in result.output


def test_without_the_lost_peer_check_the_other_ends_with_a_traceback(sandbox):
    fault = {"signal": int(signal.SIGKILL), "at": 3, "where": "forward", "rank": 1, "off": "lost peer"}
    assert "Traceback" in sandbox.run(sandbox.new_folder(), fault, processes=2).output


def test_without_verification_a_mirror_keeps_a_damaged_copy(sandbox, stopped_at_4, monkeypatch, tmp_path):
    def damaging(source, target):
        copy(source, target)
        flip_bit(0.5)(target / "model.safetensors")

    monkeypatch.setattr(mirror, "copy", damaging)
    storage = mirror.FolderStorage(tmp_path / "copy", stopped_at_4)
    checkpoint = Checkpoint.read(stopped_at_4 / "checkpoint-4")
    with pytest.raises(DamagedCheckpoint, match="sha256 differs"):
        storage.upload(checkpoint, stopped_at_4)
    assert storage.list_checkpoints() == []
    monkeypatch.setattr(Checkpoint, "verify", Checkpoint.verify_sizes)
    storage.upload(checkpoint, stopped_at_4)
    assert [checkpoint.step for checkpoint in storage.list_checkpoints()] == [4]


def test_without_the_lock_two_runs_share_a_folder(sandbox):
    out = sandbox.new_folder()
    with folder_lock(out):
        assert sandbox.run(out).code == 78
        assert sandbox.run(out, {"off": "folder lock"}).code == 0


def test_without_the_finite_check_nan_is_saved(sandbox):
    fault = {"poison": [3], "value": "nan", "in": "moment"}
    out, other = sandbox.new_folder(), sandbox.new_folder()
    sandbox.run(out, fault, max_steps=4)
    sandbox.run(other, fault | {"off": "finite check"}, max_steps=4)
    assert not has_nan(out) and has_nan(other)


def has_nan(run) -> bool:
    states = [
        torch.load(checkpoint.folder / "optimizer.pt", weights_only=True)["state"].values()
        for checkpoint in Checkpoints(run).committed()
    ]
    tensors = [value for state in states for values in state for value in values.values() if torch.is_tensor(value)]
    return not all(tensor.isfinite().all() for tensor in tensors)


def test_without_the_crc_a_flipped_bit_reaches_training(sandbox, stopped_at_4, tmp_path, monkeypatch):
    shutil.copytree(sandbox.store / "tinytown", tmp_path / "tokens")
    flip_bit(0.5)(tmp_path / "tokens" / "train-00000.npy")
    opened = TokenStore(tmp_path / "tokens")
    with pytest.raises(DataError, match="damaged"):
        opened.slice("train", 0, opened.tokens("train"))
    monkeypatch.setattr(zlib, "crc32", lambda data: ANY)
    assert len(opened.slice("train", 0, opened.tokens("train"))) == opened.tokens("train")


def test_a_checkpoint_not_marked_as_in_use_is_rotated(stopped_at_4, tmp_path):
    shutil.copytree(stopped_at_4, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    copied, other = tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-4"
    for step in (6, 8):
        seal(
            shutil.copytree(other, tmp_path / f"{step}", ignore=shutil.ignore_patterns("MANIFEST.json")), {"step": step}
        )
    checkpoints.in_use = {copied}
    for step in (6, 8):
        checkpoints.import_copy(step, lambda target, step=step: copy(tmp_path / f"{step}", target))
    assert copied.is_dir() and not other.exists()
    checkpoints.in_use = set()
    checkpoints.rotate(tmp_path / "run" / "checkpoint-8")
    assert not copied.exists()


def test_without_the_fingerprint_another_learning_rate_resumes_silently(sandbox, stopped_at_4):
    out = sandbox.new_folder(stopped_at_4)
    assert sandbox.run(out, learning_rate=1e-3).code == 78
    assert sandbox.run(out, {"off": "fingerprint"}, learning_rate=1e-3).code == 0
