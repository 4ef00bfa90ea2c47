"""Folders of other runs and other programs stay unchanged, and settings that would make a run unsafe are refused."""

import json
import shutil
import signal

import pytest
from faults.comparison import flip_bit
from faults.harness import verified_steps, weights_sha256

from rorchat.training.checkpointing.checkpoint import Checkpoint, seal
from rorchat.training.checkpointing.mirror import FolderStorage

SIGTERM = {"signal": int(signal.SIGTERM), "where": "forward"}


@pytest.fixture(scope="module")
def stopped_at_4(sandbox):
    """(run, mirror), both with checkpoints of steps 2 and 4."""
    out, mirror = sandbox.new_folder(), sandbox.new_folder()
    assert sandbox.run(out, {"kill_at": 1, "during": 6}).code == -9
    assert sandbox.run(sandbox.new_folder(), {"kill_at": 1, "mirroring": 6}, mirror=mirror).code == -9
    assert verified_steps(out) == verified_steps(mirror) == [4, 2]
    return out, mirror


def read_files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_mirror_does_not_write_into_the_folder_of_another_run(sandbox, stopped_at_4):
    other, mirror = sandbox.new_folder(), sandbox.new_folder(stopped_at_4[1])
    assert sandbox.run(other, SIGTERM | {"at": 0}, learning_rate=0.01).code == 75
    before = read_files(other)
    result = sandbox.run(other, mirror=mirror)
    assert result.code == 78 and "learning_rate" in result.output and "Traceback" not in result.output, result.output
    assert read_files(other) == before


@pytest.mark.parametrize("name", ["thesis.pdf", "run.json", "model/config.json"])
def test_a_folder_with_other_files_is_refused_as_a_mirror(sandbox, tmp_path, name):
    place = tmp_path / "drive"
    (place / name).parent.mkdir(parents=True)
    (place / name).write_text("mine")
    (place / "config.yaml").write_text("mine")
    result = sandbox.run(sandbox.new_folder(), mirror=place)
    assert result.code == 78, result.output
    assert read_files(place) == {name: b"mine", "config.yaml": b"mine"}


def test_damaged_copies_of_later_steps_do_not_displace_new_copies(sandbox, stopped_at_4, uninterrupted):
    out, mirror = (sandbox.new_folder(folder) for folder in stopped_at_4)
    for step in (98, 100):
        shutil.copytree(mirror / "checkpoint-4", copied := mirror / f"checkpoint-{step}")
        (copied / "MANIFEST.json").unlink()
        seal(copied, Checkpoint.read(mirror / "checkpoint-4").manifest | {"step": step})
        flip_bit(0.5)(copied / "model.safetensors")
    FolderStorage(mirror, out).upload(Checkpoint.read(out / "checkpoint-4"), out)
    assert verified_steps(mirror) == [4]
    result = sandbox.run(out, mirror=mirror)
    assert result.code == 0, result.output
    assert weights_sha256(out) == weights_sha256(uninterrupted)
    assert verified_steps(mirror)[0] == 8 and (mirror / "checkpoint-100.damaged-1").is_dir()


@pytest.mark.parametrize("damage", ["", "{}}", "[]", None])
def test_a_run_with_a_damaged_run_json_resumes(sandbox, stopped_at_4, uninterrupted, damage):
    out = sandbox.new_folder(stopped_at_4[0])
    (out / "run.json").unlink() if damage is None else (out / "run.json").write_text(damage)
    result = sandbox.run(out)
    assert result.code == 0 and "step 6/8" in result.output and "step 3/8" not in result.output, result.output
    assert weights_sha256(out) == weights_sha256(uninterrupted)


@pytest.mark.parametrize("damage", ["", '{"rows": 0}', '{"rows": "many"}', "[]"])
def test_a_damaged_micro_batch_json_is_ignored(sandbox, uninterrupted, damage):
    out = sandbox.new_folder()
    assert sandbox.run(out, SIGTERM | {"at": 3}).code == 75
    (out / "micro_batch.json").write_text(damage)
    assert sandbox.run(out).code == 0
    assert weights_sha256(out) == weights_sha256(uninterrupted)


def test_a_killed_run_with_workers_releases_its_lock(sandbox, uninterrupted):
    out = sandbox.new_folder()
    assert sandbox.run(out, {"kill_at": 1, "during": 6}, dataloader_num_workers=2).code == -9
    result = sandbox.run(out)
    assert result.code == 0, result.output
    assert weights_sha256(out) == weights_sha256(uninterrupted)


def test_all_processes_end_with_the_same_message_and_exit_code(sandbox, stopped_at_4):
    out = sandbox.new_folder(stopped_at_4[0])
    for step in (2, 4):
        flip_bit(0.5)(out / f"checkpoint-{step}" / "model.safetensors")
    result = sandbox.run(out, processes=2)
    assert result.code == 65 and "Traceback" not in result.output, result.output
    assert result.output.count("No checkpoint in") == 2
    result = sandbox.run(sandbox.new_folder(), mirror=sandbox.folder / "nowhere" / "copy", processes=2)
    assert result.code == 74 and "Traceback" not in result.output and result.output.count("Mount the drive") == 2, (
        result.output
    )


@pytest.mark.parametrize(
    "setting",
    [
        {"eval_strategy": "steps", "eval_steps": 3}, {"sample_prompts": ["Hello"]}, {"log_level": "error"},
        {"weight_decay": 0.1}, {"token_store": "elsewhere"}, {"logging_first_step": True},
    ],
)  # fmt: skip
def test_settings_without_effect_on_training_may_change(sandbox, stopped_at_4, uninterrupted, setting, tmp_path):
    out = sandbox.new_folder(stopped_at_4[0])
    if "token_store" in setting:
        setting = {"token_store": tmp_path / "tokens"}
    result = sandbox.run(out, **setting)
    assert result.code == 0, result.output
    assert weights_sha256(out) == weights_sha256(uninterrupted)


def test_sources_are_compared_by_content_and_not_by_path(sandbox, tmp_path):
    for name, word in (("here", "river"), ("there", "river"), ("other", "ocean")):
        (tmp_path / name).mkdir()
        lines = (json.dumps({"text": f"The {word} number {n} runs down to the sea."}) for n in range(200))
        (tmp_path / name / "a.jsonl").write_text("\n".join(lines))
    out, complete = sandbox.new_folder(), sandbox.new_folder()
    flags = {"token_store": None, "validation_share": 0.05}
    result = sandbox.run(complete, sources=[f"text={tmp_path / 'here'}"], **flags)
    assert result.code == 0, result.output
    assert sandbox.run(out, SIGTERM | {"at": 3}, sources=[f"text={tmp_path / 'here'}"], **flags).code == 75
    result = sandbox.run(out, sources=[f"text={tmp_path / 'other'}"], **flags)
    assert result.code == 78 and "inputs.sources" in result.output, result.output
    flags["token_store"] = tmp_path / "tokens"  # as on another machine: a store records the path of its source
    result = sandbox.run(out, sources=[f"text={tmp_path / 'there'}"], **flags)
    assert result.code == 0, result.output
    assert weights_sha256(out) == weights_sha256(complete)


def test_a_mirror_inside_the_run_folder_is_refused(sandbox, stopped_at_4):
    out = sandbox.new_folder(stopped_at_4[0])
    result = sandbox.run(out, mirror=out / "mirror")
    assert result.code == 2 and "mirror" in result.output, result.output


@pytest.mark.parametrize("name", ["save_only_model", "load_best_model_at_end", "push_to_hub"])
def test_settings_that_prevent_resuming_are_refused(sandbox, name):
    result = sandbox.run(sandbox.new_folder(), **{name: True})
    assert result.code == 2 and f"{name} cannot be set" in result.output, result.output


def test_a_rollback_after_weights_only_keeps_the_new_optimizer(sandbox, stopped_at_4):
    out = sandbox.new_folder(stopped_at_4[0])
    fault = {"poison": [5, 6, 7, 8], "value": "nan", "in": "loss"}
    result = sandbox.run(out, fault, max_steps=8, optimizer="adamw", weights_only=True, save_steps=20)
    assert result.code == 0 and "olled back to the weights of step 4" in result.output, result.output


def test_a_finished_run_completes_its_mirror(sandbox, uninterrupted):
    out, mirror = sandbox.new_folder(uninterrupted), sandbox.new_folder()
    result = sandbox.run(out, mirror=mirror)
    assert result.code == 0 and "already finished" in result.output, result.output
    assert verified_steps(mirror) == [8]
