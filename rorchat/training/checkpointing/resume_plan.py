"""Decides whether a run starts, resumes, appends a phase, or has already finished.

The functions are pure: they read no files and print nothing, so that every case can be tested.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rorchat.errors import MismatchError
from rorchat.mixture.history import history_entry, require_same_data, without_paths
from rorchat.training.checkpointing.checkpoint import Checkpoint
from rorchat.training.checkpointing.fingerprint import MIXTURE, ONLY_WEIGHTS, Difference, compare_metadata

OTHER_FOLDER = "Give a new --output_dir, or delete the folder."


@dataclass(frozen=True)
class ResumeRequest:
    """What the current command requests.

    Args:
        metadata: metadata of the current run, see `collect_run_metadata`.
        new_phase: whether to append the mixture of this command to the run, if it differs from the run's mixture.
        weights_only: whether to allow resuming without the optimizer state.
        rows_per_step: rows of the mixture in an optimizer step; 0 for stages without a mixture.
        max_steps: the last step of the run.
    """

    metadata: dict
    new_phase: bool = False
    weights_only: bool = False
    rows_per_step: int = 0
    max_steps: int = 0

    @property
    def is_elastic(self) -> bool:
        """Whether the number of processes may change between two starts."""
        return self.metadata["stage"] == "pretrain"


@dataclass(frozen=True)
class FolderState:
    """The contents of a run folder.

    Args:
        record: the contents of run.json; None if the folder contains no run.
        checkpoint: the newest valid checkpoint of an unfinished run.
        only_weights_are_valid: whether `checkpoint` is damaged except for its weights.
    """

    record: dict | None = None
    checkpoint: Checkpoint | None = None
    only_weights_are_valid: bool = False


@dataclass(frozen=True)
class ResumePlan:
    """The decision how to start or resume a run.

    Args:
        metadata: metadata of the current run. Inherited from the checkpoint are the earlier mixtures and the steps at
            which the run was resumed from weights only.
        checkpoint: the checkpoint to resume from; None to start from step 0.
        finished: the contents of run.json if the run has already finished.
        weights_only: whether only the weights of the checkpoint are loaded and the optimizer is reinitialized.
        appends_phase: whether a new mixture starts at the step of the checkpoint.
        differences: the differences between the checkpoint (or the finished run) and the current run. A fatal
            difference means that the folder contains a different run. The caller must then raise an error.
    """

    metadata: dict
    checkpoint: Checkpoint | None = None
    finished: dict | None = None
    weights_only: bool = False
    appends_phase: bool = False
    differences: list[Difference] = field(default_factory=list)

    @property
    def fatal(self) -> list[Difference]:
        """The differences that do not allow resuming."""
        return [difference for difference in self.differences if difference.is_fatal]


def plan_resume(folder: str, state: FolderState, request: ResumeRequest) -> ResumePlan:
    """Decides how to start or resume a run.

    Args:
        folder: the name of the run folder, for error messages.

    Raises:
        MismatchError: `new_phase` is set, but there is no checkpoint, no steps are left, or the data of a source of an
            earlier phase has changed.
    """
    finished = state.record if state.record and state.record.get("finished") else None
    checkpoint = state.checkpoint
    # Not run.json if there is a checkpoint: the last start may not have reached one
    before = checkpoint.metadata if checkpoint else finished
    if before is None:  # nothing, or a run that was stopped before its first checkpoint
        if request.new_phase:
            raise MismatchError(
                f"The output folder {folder} has no checkpoint to which a phase could be appended: omit new_phase."
            )
        return ResumePlan(request.metadata)
    history, appends_phase = _extend_history(before, checkpoint, request)
    inherited = {"past": history, "weights_only": before.get("weights_only", [])}
    metadata = request.metadata | {key: value for key, value in inherited.items() if value}
    differences = compare_metadata(
        {**before, **inherited},
        metadata,
        elastic=request.is_elastic,
        new_phase=appends_phase,
        weights_only=request.weights_only and checkpoint is not None,
    )
    weights_only = state.only_weights_are_valid or any(d.consequence == ONLY_WEIGHTS for d in differences)
    if weights_only and checkpoint:
        metadata["weights_only"] = [*inherited["weights_only"], checkpoint.step]
    return ResumePlan(metadata, checkpoint, finished, weights_only, appends_phase, differences)


def advise(folder: str, fatal: Sequence[Difference], *, has_checkpoint: bool) -> str:
    """What to do about a folder that contains a different run.

    Args:
        fatal: the differences that do not allow resuming.
        has_checkpoint: whether the run can be continued; False if it has finished.
    """
    if not any(difference.name.startswith(MIXTURE) for difference in fatal):
        return OTHER_FOLDER
    if not has_checkpoint:
        return (
            f"The run has finished: to train its model on the changed mixture, give --model {folder} and a new "
            "--output_dir."
        )
    others = [difference.name for difference in fatal if not difference.is_mixture]
    condition = f", with the earlier {' and '.join(others)}" if others else ""
    return (
        f"Give --new_phase to continue this run with the changed mixture{condition}, or a new --output_dir to start "
        "another run."
    )


def _extend_history(before: dict, checkpoint: Checkpoint | None, request: ResumeRequest) -> tuple[list[dict], bool]:
    """Returns the mixture history of the run, and whether the mixture of the checkpoint has been added to it."""
    history = before.get("past", [])
    if not (checkpoint and request.new_phase and "windows" in before):
        return history, False
    ended = history_entry(before, checkpoint.step * request.rows_per_step)
    require_same_data([*history, ended], request.metadata["inputs"])
    if without_paths(ended)["mixture"] == without_paths(request.metadata["inputs"])["mixture"]:
        return history, False
    if checkpoint.step >= request.max_steps:
        raise MismatchError(
            f"{checkpoint.folder} is the checkpoint of the last step: no tokens are left for a new phase. Omit "
            "new_phase and give the previous mixture."
        )
    return [*history, ended], True
