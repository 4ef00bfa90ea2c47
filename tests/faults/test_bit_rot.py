"""Every file of the newest checkpoint and every token shard, damaged in 18 ways: always seen before it is used."""

import os
import shutil
from pathlib import Path

import pytest
from faults.harness import verified_steps, weights

from rorchat.errors import DataError
from rorchat.tokens.store import TokenStore
from rorchat.training.checkpoint import DAMAGED, Checkpoints


def flipped(place: float):
    def flip(path: Path) -> None:
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(at := min(int(size * place), size - 1))
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << at % 8]))

    return flip


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


def test_every_damage_to_a_token_shard_is_seen_before_a_row_of_it_is_used(bench, at_four, tmp_path):
    (store,) = (path for path in (bench.folder / "store").iterdir() if path.is_dir())
    missed, cases = [], 0
    for name in sorted(path.name for path in store.glob("*.npy") if ".docs" not in path.name):
        for damage, harm in DAMAGES.items():
            copy = tmp_path / f"{name}-{cases}"
            shutil.copytree(store, copy)
            if not (copy / name).stat().st_size:
                continue
            harm(copy / name)
            cases += 1
            try:
                opened = TokenStore(copy, "tinytown")
                for split in ("train", "validation"):
                    opened.slice(split, 0, opened.tokens(split))
                missed.append(f"{name} {damage}")
            except DataError:
                continue
    assert not missed
    assert cases >= 20


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
