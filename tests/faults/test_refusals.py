"""What must not be touched is not: the folders of other runs, of other people, and what a machine cannot know."""

import json
import shutil
import signal

import pytest
from faults.comparison import flipped
from faults.harness import verified_steps, weights

from rorchat.training.checkpointing.checkpoint import Checkpoint, seal
from rorchat.training.checkpointing.mirror import FolderPlace

SIGTERM = {"signal": int(signal.SIGTERM), "where": "forward"}


@pytest.fixture(scope="module")
def at_four(bench):
    """(a run's folder, a mirror of it), both with the checkpoints of steps 2 and 4."""
    out, mirror = bench.fresh(), bench.fresh()
    assert bench.run(out, {"kill_at": 1, "during": 6}).code == -9
    assert bench.run(bench.fresh(), {"kill_at": 1, "mirroring": 6}, mirror=mirror).code == -9
    assert verified_steps(out) == verified_steps(mirror) == [4, 2]
    return out, mirror


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_mirror_brings_nothing_into_the_folder_of_another_run(bench, at_four):
    other, mirror = bench.fresh(), bench.fresh(at_four[1])
    assert bench.run(other, SIGTERM | {"at": 0}, learning_rate=0.01).code == 75
    before = files_of(other)
    done = bench.run(other, mirror=mirror)
    assert done.code == 78 and "learning_rate" in done.said and "Traceback" not in done.said, done.said
    assert files_of(other) == before


@pytest.mark.parametrize("name", ["thesis.pdf", "run.json", "model/config.json"])
def test_a_folder_of_something_else_is_no_mirror(bench, tmp_path, name):
    place = tmp_path / "drive"
    (place / name).parent.mkdir(parents=True)
    (place / name).write_text("mine")
    (place / "config.yaml").write_text("mine")
    done = bench.run(bench.fresh(), mirror=place)
    assert done.code == 78 and "give a folder of its own" in done.said, done.said
    assert files_of(place) == {name: b"mine", "config.yaml": b"mine"}


def test_damaged_copies_of_later_steps_do_not_make_a_mirror_lose_the_new_ones(bench, at_four, whole):
    out, mirror = (bench.fresh(folder) for folder in at_four)
    for step in (98, 100):
        shutil.copytree(mirror / "checkpoint-4", copied := mirror / f"checkpoint-{step}")
        (copied / "MANIFEST.json").unlink()
        seal(copied, Checkpoint.read(mirror / "checkpoint-4").about | {"step": step})
        flipped(0.5)(copied / "model.safetensors")
    FolderPlace(mirror, out).put(Checkpoint.read(out / "checkpoint-4"), out)
    assert verified_steps(mirror) == [4]
    done = bench.run(out, mirror=mirror)
    assert done.code == 0, done.said
    assert weights(out) == weights(whole)
    assert verified_steps(mirror)[0] == 8 and (mirror / "checkpoint-100.damaged-1").is_dir()


@pytest.mark.parametrize("damage", ["", "{}}", "[]", None])
def test_a_damaged_run_json_keeps_nobody_from_its_checkpoints(bench, at_four, whole, damage):
    out = bench.fresh(at_four[0])
    (out / "run.json").unlink() if damage is None else (out / "run.json").write_text(damage)
    done = bench.run(out)
    assert done.code == 0 and "step 6/8" in done.said and "step 3/8" not in done.said, done.said
    assert weights(out) == weights(whole)


@pytest.mark.parametrize("damage", ["", '{"rows": 0}', '{"rows": "many"}', "[]"])
def test_a_damaged_micro_batch_json_is_found_out_again(bench, whole, damage):
    out = bench.fresh()
    assert bench.run(out, SIGTERM | {"at": 3}).code == 75
    (out / "micro_batch.json").write_text(damage)
    assert bench.run(out).code == 0
    assert weights(out) == weights(whole)


def test_a_kill_with_workers_lets_go_of_the_lock_at_once(bench, whole):
    out = bench.fresh()
    assert bench.run(out, {"kill_at": 1, "during": 6}, dataloader_num_workers=2).code == -9
    done = bench.run(out)
    assert done.code == 0, done.said
    assert weights(out) == weights(whole)


def test_what_one_process_is_refused_all_are_with_the_same_line_and_code(bench, at_four):
    out = bench.fresh(at_four[0])
    for step in (2, 4):
        flipped(0.5)(out / f"checkpoint-{step}" / "model.safetensors")
    done = bench.run(out, processes=2)
    assert done.code == 65 and "Traceback" not in done.said, done.said
    assert done.said.count("No checkpoint in") == 2
    done = bench.run(bench.fresh(), mirror=bench.folder / "nowhere" / "copy", processes=2)
    assert done.code == 74 and "Traceback" not in done.said and done.said.count("Mount the drive") == 2, done.said


@pytest.mark.parametrize(
    "setting",
    [
        {"eval_strategy": "steps", "eval_steps": 3}, {"sample_prompts": ["Hello"]}, {"disable_tqdm": False},
        {"weight_decay": 0.1}, {"token_store": "elsewhere"}, {"logging_first_step": True},
    ],
)  # fmt: skip
def test_what_changes_nothing_may_change(bench, at_four, whole, setting, tmp_path):
    out = bench.fresh(at_four[0])
    if "token_store" in setting:
        setting = {"token_store": tmp_path / "tokens"}
    done = bench.run(out, **setting)
    assert done.code == 0, done.said
    assert weights(out) == weights(whole)


def test_texts_that_lie_elsewhere_are_the_same_texts_and_others_are_others(bench, tmp_path):
    for name, word in (("here", "river"), ("there", "river"), ("other", "ocean")):
        (tmp_path / name).mkdir()
        lines = (json.dumps({"text": f"The {word} number {n} runs down to the sea."}) for n in range(200))
        (tmp_path / name / "a.jsonl").write_text("\n".join(lines))
    out, whole = bench.fresh(), bench.fresh()
    flags = {"token_store": None, "validation_share": 0.05}
    done = bench.run(whole, sources=[f"text={tmp_path / 'here'}"], **flags)
    assert done.code == 0, done.said
    assert bench.run(out, SIGTERM | {"at": 3}, sources=[f"text={tmp_path / 'here'}"], **flags).code == 75
    done = bench.run(out, sources=[f"text={tmp_path / 'other'}"], **flags)
    assert done.code == 78 and "inputs.sources" in done.said, done.said
    flags["token_store"] = tmp_path / "tokens"  # as on another machine: a store knows the place that it was made from
    done = bench.run(out, sources=[f"text={tmp_path / 'there'}"], **flags)
    assert done.code == 0, done.said
    assert weights(out) == weights(whole)


def test_a_mirror_inside_of_the_run_is_refused(bench, at_four):
    out = bench.fresh(at_four[0])
    done = bench.run(out, mirror=out / "mirror")
    assert done.code == 2 and "lies in the run's own folder" in done.said, done.said


@pytest.mark.parametrize("name", ["save_only_model", "load_best_model_at_end", "push_to_hub"])
def test_settings_that_would_leave_nothing_to_go_on_from_are_refused(bench, name):
    done = bench.run(bench.fresh(), **{name: True})
    assert done.code == 2 and f"{name} cannot be set" in done.said, done.said


def test_a_rollback_after_weights_alone_does_not_bring_the_old_optimizer_back(bench, at_four):
    out = bench.fresh(at_four[0])
    fault = {"poison": [5, 6, 7, 8], "value": "nan", "in": "loss"}
    done = bench.run(out, fault, max_steps=8, optimizer="adamw", weights_only=True, save_steps=20)
    assert done.code == 0 and "olled back to the weights of step 4" in done.said, done.said


def test_a_finished_run_copies_what_a_signal_kept_from_its_mirror(bench, whole):
    out, mirror = bench.fresh(whole), bench.fresh()
    done = bench.run(out, mirror=mirror)
    assert done.code == 0 and "finished before" in done.said, done.said
    assert verified_steps(mirror) == [8]
