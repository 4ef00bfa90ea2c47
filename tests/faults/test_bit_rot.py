"""Every file of the newest checkpoint and of a token store, damaged in 18 ways: always seen before it is used."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.comparison import flipped
from faults.harness import verified_steps, weights

from rorchat.errors import DataError
from rorchat.tokens.store import TokenStore
from rorchat.training.checkpointing.checkpoint import DAMAGED, Checkpoints


def cut(share: float):
    return lambda path: os.truncate(path, min(int(path.stat().st_size * share), path.stat().st_size - 1))


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


PLACES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)
DAMAGES = {
    "deleted": Path.unlink, "emptied": cut(0), "halved": cut(0.5), "shortened by a byte": cut(1), "zeroed": zeroed,
    **{f"a bit flipped at {place:g}": flipped(place) for place in PLACES},
}  # fmt: skip


@pytest.fixture(scope="module")
def at_four(bench):
    out = bench.fresh()
    assert bench.run(out, {"kill_at": 1, "during": 6}).code == -9
    assert verified_steps(out) == [4, 2]
    return out


def test_every_damage_to_the_newest_checkpoint_is_seen_and_the_one_before_is_taken(bench, at_four):
    missed, cases = [], 0
    for name in sorted(path.name for path in (at_four / "checkpoint-4").iterdir()):
        for damage, harm in DAMAGES.items():
            out = bench.fresh(at_four)
            harm(out / "checkpoint-4" / name)
            found = Checkpoints(out).recover()
            cases += 1
            aside = [path.name for path in out.glob(f"*{DAMAGED}*")]
            if found.step != 2 or aside != [f"checkpoint-4{DAMAGED}1"]:
                missed.append(f"{name} {damage}")
            shutil.rmtree(out)
    assert not missed
    assert cases >= 200


def test_every_damage_to_a_token_store_is_seen(bench, at_four, tmp_path):
    """Before a row of it is used, if training reads the file; by `verify` whatever the file is."""
    (store,) = (path for path in (bench.folder / "store").iterdir() if path.is_dir())
    names = sorted(path.name for path in store.iterdir())
    tables = [name for name in names if name.endswith(".docs.npy")]
    assert {"manifest.json", "blocks.npy", "train-00000.npy", "validation-00000.npy", *tables} == set(names)
    used, unseen = [], []
    for name in names:
        for damage, harm in DAMAGES.items():
            copy = tmp_path / "store"
            shutil.copytree(store, copy)
            harm(copy / name)
            if name not in tables and not is_seen(copy, read_all):
                used.append(f"{name} {damage}")
            if not is_seen(copy, TokenStore.verify):
                unseen.append(f"{name} {damage}")
            shutil.rmtree(copy)
    assert len(tables) == 2 and not used and not unseen


def test_every_bit_of_the_head_of_an_array_is_seen_or_changes_nothing(bench, at_four, tmp_path):
    (store,) = (path for path in (bench.folder / "store").iterdir() if path.is_dir())
    copy, wrong = tmp_path / "store", []
    shutil.copytree(store, copy)
    whole = (copy / "train-00000.npy").read_bytes()
    opened = TokenStore(copy, "tinytown")
    ids = opened.slice("train", 0, opened.tokens("train"))
    del opened  # which has the file mapped
    for bit in range(8 * whole.index(b"\n")):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (copy / "train-00000.npy").unlink()
        (copy / "train-00000.npy").write_bytes(damaged)
        try:
            opened = TokenStore(copy, "tinytown")
            if not (opened.slice("train", 0, len(ids)) == ids).all():
                wrong.append(bit)
        except DataError:
            continue
    assert not wrong


def read_all(store: TokenStore) -> None:
    for split in ("train", "validation"):
        store.slice(split, 0, store.tokens(split))


def is_seen(folder: Path, look: Callable[[TokenStore], list[str] | None]) -> bool:
    """Whether a store is refused, or has something wrong with it."""
    try:
        return bool(look(TokenStore(folder, "tinytown")))
    except DataError as error:
        return str(folder) in str(error) and "to prepare it again" in str(error)


def test_a_file_too_many_is_seen(bench, at_four):
    out = bench.fresh(at_four)
    (out / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"x")
    assert Checkpoints(out).recover().step == 2


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "MANIFEST.json"])
def test_the_same_command_falls_back_and_ends_with_the_same_weights(bench, at_four, whole, name):
    out = bench.fresh(at_four)
    flipped(0.5)(out / "checkpoint-4" / name)
    done = bench.run(out)
    assert done.code == 0, done.said
    assert f"Set aside as checkpoint-4{DAMAGED}1" in done.said and "Traceback" not in done.said
    assert weights(out) == weights(whole)
    assert (out / f"checkpoint-4{DAMAGED}1" / name).is_file()


def test_where_none_verifies_the_run_stops_and_does_not_start_afresh(bench, at_four):
    out = bench.fresh(at_four)
    for step in (2, 4):
        zeroed(out / f"checkpoint-{step}" / "model.safetensors")
    for _ in range(2):  # the second time there is nothing left but what was set aside
        done = bench.run(out)
        assert done.code == 65 and "No checkpoint in" in done.said and "Traceback" not in done.said
        assert not (out / "model").exists()
