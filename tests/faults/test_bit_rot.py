"""Every file of the newest checkpoint and of a token store, damaged in 18 ways: detected before use."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.comparison import flip_bit
from faults.harness import weights_sha256

from rorchat.errors import DataError
from rorchat.tokens.store import TokenStore
from rorchat.training.checkpointing.checkpoint import DAMAGED
from rorchat.training.checkpointing.recovery import Checkpoints


def truncate(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, min(int(path.stat().st_size * share), path.stat().st_size - 1))


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


POSITIONS = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)
DAMAGES = {
    "deleted": Path.unlink, "emptied": truncate(0), "halved": truncate(0.5), "shortened by a byte": truncate(1),
    "zeroed": zero, **{f"a bit flipped at {position:g}": flip_bit(position) for position in POSITIONS},
}  # fmt: skip


@pytest.fixture(scope="module")
def store(sandbox, stopped_at_4) -> Path:
    return sandbox.store / "tinytown"


def test_recovery_skips_a_checkpoint_with_any_damage(sandbox, stopped_at_4):
    missed, cases = [], 0
    for name in sorted(path.name for path in (stopped_at_4 / "checkpoint-4").iterdir()):
        for description, damage in DAMAGES.items():
            out = sandbox.new_folder(stopped_at_4)
            damage(out / "checkpoint-4" / name)
            recovered = Checkpoints(out).recover()
            cases += 1
            set_aside = [path.name for path in out.glob(f"*{DAMAGED}*")]
            if recovered.step != 2 or set_aside != [f"checkpoint-4{DAMAGED}1"]:
                missed.append(f"{name} {description}")
            shutil.rmtree(out)
    assert not missed
    assert cases >= 200


def test_any_damage_to_a_token_store_is_detected(store, tmp_path):
    """Files that training reads are checked before a row is used; `verify` checks all files."""
    names = sorted(path.name for path in store.iterdir())
    document_starts = [name for name in names if name.endswith(".docs.npy")]
    assert len(document_starts) == 2
    assert {"manifest.json", "blocks.npy", "train-00000.npy", "validation-00000.npy", *document_starts} == set(names)
    missed = []
    for name in names:
        for description, damage in DAMAGES.items():
            copy = tmp_path / "store"
            shutil.copytree(store, copy)
            damage(copy / name)
            if name not in document_starts and not is_rejected(copy, read_all):
                missed.append(f"reading {name} {description}")
            if not is_rejected(copy, TokenStore.verify):
                missed.append(f"verifying {name} {description}")
            shutil.rmtree(copy)
    assert not missed


def test_any_bit_flip_in_an_array_header_is_detected_or_harmless(store, tmp_path):
    copy, wrong = tmp_path / "store", []
    shutil.copytree(store, copy)
    original = (copy / "train-00000.npy").read_bytes()
    opened = TokenStore(copy, "tinytown")
    ids = opened.slice("train", 0, opened.tokens("train"))
    del opened  # closes the memory map
    for bit in range(8 * original.index(b"\n")):
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << bit % 8
        (copy / "train-00000.npy").unlink()
        (copy / "train-00000.npy").write_bytes(damaged)
        try:
            if not (TokenStore(copy, "tinytown").slice("train", 0, len(ids)) == ids).all():
                wrong.append(bit)
        except DataError:
            continue
    assert not wrong


def read_all(store: TokenStore) -> None:
    for split in ("train", "validation"):
        store.slice(split, 0, store.tokens(split))


def is_rejected(folder: Path, check: Callable[[TokenStore], list[str] | None]) -> bool:
    """Whether a store raises DataError, or `check` lists problems."""
    try:
        return bool(check(TokenStore(folder, "tinytown")))
    except DataError as error:
        return str(folder) in str(error)


def test_recovery_skips_a_checkpoint_with_an_extra_file(sandbox, stopped_at_4):
    out = sandbox.new_folder(stopped_at_4)
    (out / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"x")
    assert Checkpoints(out).recover().step == 2


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "MANIFEST.json"])
def test_a_run_resumed_from_the_older_checkpoint_ends_identically(sandbox, stopped_at_4, uninterrupted, name):
    out = sandbox.new_folder(stopped_at_4)
    flip_bit(0.5)(out / "checkpoint-4" / name)
    result = sandbox.run(out)
    assert result.code == 0, result.output
    assert f"checkpoint-4{DAMAGED}1" in result.output and "Traceback" not in result.output
    assert weights_sha256(out) == weights_sha256(uninterrupted)
    assert (out / f"checkpoint-4{DAMAGED}1" / name).is_file()


def test_a_run_without_an_intact_checkpoint_does_not_start_over(sandbox, stopped_at_4):
    out = sandbox.new_folder(stopped_at_4)
    for step in (2, 4):
        zero(out / f"checkpoint-{step}" / "model.safetensors")
    for _ in range(2):  # the second time, both checkpoints are already set aside
        result = sandbox.run(out)
        assert result.code == 65 and "No checkpoint in" in result.output and "Traceback" not in result.output
        assert not (out / "model").exists()
