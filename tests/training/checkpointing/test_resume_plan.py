"""What a run does with the contents of its folder."""

import re
from pathlib import Path

import pytest

from rorchat.errors import MismatchError
from rorchat.training.checkpointing.checkpoint import Checkpoint
from rorchat.training.checkpointing.resume_plan import (
    OTHER_FOLDER,
    FolderState,
    ResumeRequest,
    advise,
    plan_resume,
)


def make_metadata(**settings: object) -> dict:
    mixture = {"sources": {"town": {"spec": "tinytown=10", "filters": {}}}, "against": [], "phases": []}
    return {
        "stage": "pretrain",
        "inputs": {"sources": {"tinytown=10": "digest"}, "mixture": mixture},
        "versions": {"torch": "2.13.0"},
        "settings": settings,
    }


def make_checkpoint(step: int, metadata: dict) -> Checkpoint:
    metadata = metadata | {"windows": {"town": 5}, "data": []}
    return Checkpoint(Path(f"run/checkpoint-{step}"), {"step": step, "identity": metadata}, {})


def with_other_mixture(metadata: dict) -> dict:
    mixture = metadata["inputs"]["mixture"] | {"phases": [{"weights": {"town": 2}}]}
    return metadata | {"inputs": metadata["inputs"] | {"mixture": mixture}}


def plan(state: FolderState, **request: object):
    request = {"metadata": make_metadata(), "rows_per_step": 4, "max_steps": 10} | request
    return plan_resume("run", state, ResumeRequest(**request))


def test_an_empty_folder_starts_at_step_0():
    made = plan(FolderState())
    assert (made.checkpoint, made.finished, made.differences) == (None, None, [])


def test_a_finished_run_with_equal_settings_has_nothing_to_do():
    record = make_metadata() | {"finished": True, "metrics": {"loss": 1.0}}
    made = plan(FolderState(record))
    assert made.finished == record and made.fatal == []


def test_a_checkpoint_is_resumed_and_its_history_inherited():
    earlier = [{"until": 4}]
    checkpoint = make_checkpoint(2, make_metadata() | {"past": earlier})
    made = plan(FolderState({}, checkpoint))
    assert made.checkpoint is checkpoint and not made.weights_only
    assert made.metadata["past"] == earlier


def test_other_settings_are_fatal_and_other_versions_are_not():
    checkpoint = make_checkpoint(2, make_metadata(learning_rate=1e-3))
    made = plan(FolderState({}, checkpoint), metadata=make_metadata(learning_rate=2e-3))
    assert [(difference.name, difference.before) for difference in made.fatal] == [("learning_rate", 1e-3)]
    newer = make_metadata() | {"versions": {"torch": "2.14.0"}}
    made = plan(FolderState({}, make_checkpoint(2, make_metadata())), metadata=newer)
    assert made.fatal == [] and len(made.differences) == 1


def test_weights_only_allows_another_optimizer_and_is_recorded():
    checkpoint = make_checkpoint(2, make_metadata(learning_rate=1e-3))
    made = plan(FolderState({}, checkpoint), metadata=make_metadata(learning_rate=2e-3), weights_only=True)
    assert made.weights_only and made.fatal == [] and made.metadata["weights_only"] == [2]


def test_damaged_optimizer_state_means_weights_only():
    made = plan(FolderState({}, make_checkpoint(2, make_metadata()), only_weights_are_valid=True), weights_only=True)
    assert made.weights_only and made.metadata["weights_only"] == [2]


def test_another_mixture_is_fatal_without_new_phase():
    made = plan(FolderState({}, make_checkpoint(2, make_metadata())), metadata=with_other_mixture(make_metadata()))
    assert made.fatal and all(difference.is_mixture for difference in made.fatal)


def test_refusal_names_new_phase_only_if_the_mixture_of_an_unfinished_run_changed():
    before, other = make_metadata(train_tokens=100), with_other_mixture(make_metadata(train_tokens=100))
    both = with_other_mixture(make_metadata(train_tokens=200))
    for state, now, expected in (
        (FolderState({}, make_checkpoint(2, before)), other, "Give --new_phase to continue this run with the changed"),
        (FolderState({}, make_checkpoint(2, before)), both, "changed mixture, with the earlier train_tokens, or a new"),
        (FolderState(before | {"finished": True}), other, "The run has finished: to train its model on the changed"),
        (FolderState({}, make_checkpoint(2, before)), make_metadata(train_tokens=200), OTHER_FOLDER),
    ):
        made = plan(state, metadata=now)
        advice = advise("run", made.fatal, has_checkpoint=state.checkpoint is not None)
        assert expected in advice and "--output_dir" in advice
        assert ("--new_phase" in advice) == ("new_phase" in expected or "earlier" in expected)


def test_new_phase_ends_the_mixture_at_the_row_of_the_checkpoint():
    checkpoint = make_checkpoint(2, make_metadata())
    made = plan(FolderState({}, checkpoint), metadata=with_other_mixture(make_metadata()), new_phase=True)
    assert made.appends_phase and made.fatal == []
    assert [entry["until"] for entry in made.metadata["past"]] == [2 * 4]


def test_new_phase_with_the_same_mixture_only_resumes():
    made = plan(FolderState({}, make_checkpoint(2, make_metadata())), new_phase=True)
    assert not made.appends_phase and "past" not in made.metadata


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (FolderState(), "The output folder run has no checkpoint to which a phase could be appended"),
        (FolderState({}, make_checkpoint(10, make_metadata())), "no tokens are left for a new phase"),
    ],
    ids=["no checkpoint", "last step"],
)
def test_a_phase_that_cannot_be_appended_is_refused(state, message):
    with pytest.raises(MismatchError, match=re.escape(message)):
        plan(state, metadata=with_other_mixture(make_metadata()), new_phase=True)
