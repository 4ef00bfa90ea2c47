"""Decides what a run does with the contents of its folder: start, resume, append a phase, or report that it is done.

This module is pure: it reads no file and prints nothing, so that every case can be tested.
"""

from dataclasses import dataclass, field

from rorchat.errors import MismatchError
from rorchat.mixture.history import history_entry, require_same_data, without_paths
from rorchat.training.checkpointing.checkpoint import Checkpoint
from rorchat.training.checkpointing.fingerprint import ONLY_WEIGHTS, Difference, compare_metadata


@dataclass(frozen=True)
class ResumeRequest:
    """What the current command asks for.

    Args:
        metadata: the metadata of the current run, see `collect_run_metadata`.
        new_phase: append the mixture of this command to the run, if it differs from the mixture of the run.
        weights_only: allow resuming without the optimizer state.
        rows_per_step: rows of the mixture that an optimizer step reads; 0 for stages without a mixture.
        max_steps: the last step of the run.
    """

    metadata: dict
    new_phase: bool = False
    weights_only: bool = False
    rows_per_step: int = 0
    max_steps: int = 0

    @property
    def is_elastic(self) -> bool:
        return self.metadata["stage"] == "pretrain"


@dataclass(frozen=True)
class FolderState:
    """What the folder of a run contains.

    Args:
        record: run.json; None if the folder contains no run.
        checkpoint: the newest valid checkpoint of an unfinished run.
        only_weights_are_valid: True if the optimizer state of `checkpoint` is damaged.
    """

    record: dict | None = None
    checkpoint: Checkpoint | None = None
    only_weights_are_valid: bool = False


@dataclass(frozen=True)
class ResumePlan:
    """How the run starts.

    Args:
        metadata: the metadata of the current run, with the entries that it inherits from the checkpoint: earlier
            mixtures, and the steps at which it was resumed from weights only.
        checkpoint: the checkpoint to resume from; None to start from step 0.
        finished: run.json of the finished run, if there is nothing left to do.
        weights_only: only the weights of the checkpoint are loaded, and the optimizer is reset.
        appends_phase: a new mixture begins at the step of the checkpoint.
        differences: the differences between the checkpoint (or the finished run) and the current run. A fatal one means
            that the folder belongs to another run, and the caller must refuse to start.
    """

    metadata: dict
    checkpoint: Checkpoint | None = None
    finished: dict | None = None
    weights_only: bool = False
    appends_phase: bool = False
    differences: list[Difference] = field(default_factory=list)

    @property
    def fatal(self) -> list[Difference]:
        return [difference for difference in self.differences if difference.is_fatal]


def plan_resume(folder: str, state: FolderState, request: ResumeRequest) -> ResumePlan:
    """Decides what the run does.

    Args:
        folder: the name of the run's folder, for messages.

    Raises:
        MismatchError: `new_phase` is set and there is no checkpoint to append to, or no step left, or a source of an
            earlier phase has changed under its name.
    """
    finished = state.record if state.record and state.record.get("finished") else None
    checkpoint = state.checkpoint
    if finished is None and checkpoint is None:  # nothing, or a run that was stopped before its first checkpoint
        if request.new_phase:
            raise MismatchError(
                f"The output folder {folder} has no checkpoint that a phase could be appended to: leave new_phase out."
            )
        return ResumePlan(request.metadata)
    # run.json describes the newest start, which may not have reached a checkpoint: the checkpoint's own metadata counts
    before = checkpoint.metadata if checkpoint else finished
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


def _extend_history(before: dict, checkpoint: Checkpoint | None, request: ResumeRequest) -> tuple[list[dict], bool]:
    """The earlier mixtures of the run, and whether the checkpoint's mixture is one of them from now on."""
    history = before.get("past", [])
    if not (checkpoint and request.new_phase and "windows" in before):
        return history, False
    ended = history_entry(before, checkpoint.step * request.rows_per_step)
    require_same_data([*history, ended], request.metadata["inputs"])
    if without_paths(ended)["mixture"] == without_paths(request.metadata["inputs"])["mixture"]:
        return history, False
    if checkpoint.step >= request.max_steps:
        raise MismatchError(
            f"{checkpoint.folder} is of the last step, so that no tokens are left for a new phase. Leave new_phase "
            "out and give the previous mixture."
        )
    return [*history, ended], True
