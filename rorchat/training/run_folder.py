"""The run folder: locks it, reads and writes run.json, and decides whether the run starts, resumes or has finished.

config.yaml     the settings; can be passed as --config
run.json        versions, device, inputs with their sha256, and results. `finished` is true after the model was saved;
                `stopped` is the reason if training ended before the last step
metrics.jsonl   one line per logging step, see docs/metrics.md; append-only
mixture.png     the share of every source in the course of the run (pretraining)
micro_batch.json  the micro-batch size that fits, if a step ran out of memory; kept for later starts
.reference_*.json  log-probabilities of the reference model, see rorchat/training/reference_logps.py
samples.jsonl   samples generated from fixed prompts before, during and after training
checkpoint-N/   see rorchat/training/checkpointing/checkpoint.py; damaged ones are renamed
adapter/        the LoRA adapter, if one was trained
model/          the result: a plain Transformers folder
"""

import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import yaml
from accelerate import PartialState

from rorchat.errors import DataError, MismatchError
from rorchat.files import folder_lock, to_json, write_atomically
from rorchat.tokens.store import TOKENS_FOLDER
from rorchat.training.arguments import StageArguments
from rorchat.training.callbacks.divergence import DIVERGED_ROWS
from rorchat.training.callbacks.signals import handle_signals
from rorchat.training.checkpointing.checkpoint import KEPT, Checkpoint
from rorchat.training.checkpointing.fingerprint import (
    Difference,
    collect_run_metadata,
    compare_metadata,
    format_differences,
)
from rorchat.training.checkpointing.mirror import GRACE_SECONDS, Mirror, open_mirror
from rorchat.training.checkpointing.recovery import Checkpoints
from rorchat.training.checkpointing.resume_plan import (
    OTHER_FOLDER,
    FolderState,
    ResumePlan,
    ResumeRequest,
    advise,
    plan_resume,
)
from rorchat.training.context import StageContext
from rorchat.training.distributed import run_on_main_process
from rorchat.training.lora import Adapter
from rorchat.training.next_step import describe_stage
from rorchat.training.oom_recovery import MICRO_BATCH_FILE
from rorchat.training.pinning import PINS, find_pins
from rorchat.training.runtime import describe_runtime


class RunFolder:
    """The folder of a run. It is locked against other processes until the run ends, or until the `with` block ends.

    Args:
        arguments: the arguments of a stage; `output_dir` is the folder.
        stage: "pretrain", "sft", "dpo" or "grpo".
        inputs: the folders or Hub ids of the tokenizer and of the initial model, by role.

    Raises:
        MismatchError: the folder contains a different run, or files that do not belong to a run.
        DataError: the folder contains checkpoints, and none of them is valid.
    """

    def __init__(self, arguments: StageArguments, stage: str, inputs: dict[str, str]):
        self.folder, self.arguments = Path(arguments.output_dir), arguments
        self.mirror: Mirror | None = None  # on the main process
        self.held = ExitStack()  # the lock, the signal handlers and the mirror, until the run ends
        with self.held:  # released if a check fails
            self.held.enter_context(handle_signals())
            pins = run_on_main_process(self._lock_and_pin)
            arguments.pin_sources(pins)
            self.request = ResumeRequest(
                collect_run_metadata(arguments, stage, inputs) | ({PINS: pins} if pins else {}),
                new_phase=arguments.appends_phase(),
                weights_only=arguments.weights_only,
                rows_per_step=arguments.rows_per_step(),
                max_steps=arguments.max_steps,
            )
            run_on_main_process(self._restore)
            self.plan = self._make_plan()
            run_on_main_process(self._drop_other_micro_batch)
            if not self.is_finished and PartialState().is_main_process:
                print(describe_runtime(arguments), file=sys.stderr)  # noqa: T201
            PartialState().wait_for_everyone()  # other processes may still be reading the folder
            self.held = self.held.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.held.close()

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    @property
    def is_finished(self) -> bool:
        return self.plan.finished is not None

    @property
    def mixture_history(self) -> list[dict]:
        """The mixtures before the current one, see `rorchat.mixture.history`. Empty if it never changed."""
        return self.plan.metadata.get("past", [])

    def _lock_and_pin(self) -> dict[str, str]:
        """Locks the folder, and finds the commits of datasets on the Hub: those that the run has read, if any."""
        self.held.enter_context(folder_lock(self.folder))
        self.mirror = open_mirror(self.arguments.mirror, self.folder)
        if self.mirror:
            self.held.callback(self.mirror.finish, GRACE_SECONDS)
        replay = self.arguments.replay_source()
        specs = [*self.arguments.source_specs(), *([replay] if replay else [])]
        return find_pins(specs, self._earlier_record(), self.arguments.optional_specs())

    def _earlier_record(self) -> dict:
        """run.json, or else the metadata of the mirror's newest copy; {} for a new run."""
        if record := self._read_record():
            return record
        copies = self.mirror.list_copies() if self.mirror else []
        return copies[0].metadata if copies else {}

    def _restore(self) -> None:
        """If the mirror has a newer checkpoint, as on a new machine, copies it into the folder."""
        if self.arguments.smoke:
            self._remove_other_smoke_test()
        if self.mirror is None:
            return
        checkpoints = Checkpoints(self.folder, self.arguments.save_total_limit or KEPT)
        copies = self.mirror.list_copies()
        if (self._read_record() or {}).get("finished"):
            return
        for place, committed in ((self.folder, checkpoints.committed()), (self.mirror.name, copies)):
            if committed:
                differences = self._compare(
                    committed[0].metadata, self.request.metadata, self.request.new_phase, self.request.weights_only
                )
                self._refuse_fatal(differences, place, committed[0])
        try:
            restored = self.mirror.restore_newest(checkpoints)
        except DataError:
            if not self.request.weights_only:
                raise
            return
        if restored:
            self._write_record(restored.metadata)

    def _remove_other_smoke_test(self) -> None:
        """Empties the folder if it contains a smoke test with other settings or data, and nothing else."""
        record = self._read_record()
        if not record or not (record.get("settings") or {}).get("smoke"):
            return
        fatal = [d.name for d in self._compare(record, self.request.metadata) if d.is_fatal]
        if not fatal:
            return
        print(f"{self.folder}: replacing an earlier smoke test ({', '.join(fatal)} differ)", file=sys.stderr)  # noqa: T201
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _make_plan(self) -> ResumePlan:
        """Compares the folder with the current command, prints the differences, and refuses fatal ones."""
        state = FolderState(self._read_record())
        if state.record is not None and not state.record.get("finished"):
            checkpoint, only_weights_are_valid = self._newest_checkpoint()
            state = FolderState(state.record if checkpoint else None, checkpoint, only_weights_are_valid)
        plan = plan_resume(str(self.folder), state, self.request)
        self._print_differences(plan.differences)
        self._refuse_fatal(plan.differences, self.folder, plan.checkpoint, printed=True)
        return plan

    def _drop_other_micro_batch(self) -> None:
        """Deletes the micro-batch size that an earlier start with other settings has left, without a checkpoint.

        That of the same run is kept: it would run out of memory again.
        """
        record = self._read_record()
        if record is None or self.is_finished or self.plan.checkpoint is not None:
            return
        if any(difference.is_fatal for difference in self._compare(record, self.plan.metadata)):
            (self.folder / MICRO_BATCH_FILE).unlink(missing_ok=True)

    def _newest_checkpoint(self) -> tuple[Checkpoint | None, bool]:
        """Finds the newest valid checkpoint. With `weights_only`, only its weights need to be valid.

        Returns:
            The checkpoint, and whether only its weights are valid.
        """
        checkpoints, newest = Checkpoints(self.folder), None
        try:
            newest = checkpoints.newest()
        except DataError:
            if not self.request.weights_only:
                raise
        if newest is None and self.request.weights_only and checkpoints.damaged():
            return checkpoints.newest_weights(), True
        return newest, False

    def context(self, details: dict, adapter: Adapter | None = None) -> StageContext:
        """Returns what the trainer needs from the run.

        Args:
            details: the data and the plan of a mixture, which are stored in run.json and in every checkpoint.

        Raises:
            MismatchError: the checkpoint was trained with a different plan or other rows, because the data changed.
        """
        details = json.loads(to_json(details))
        if self.plan.checkpoint and not self.plan.appends_phase:
            before, now = (_comparable_details(data) for data in (self.plan.checkpoint.metadata, details))
            differences = self._compare(before, now)
            self._print_differences(differences)
            self._refuse_fatal(differences, self.folder, self.plan.checkpoint, printed=True)
        return StageContext(self.plan, details, self.mirror, adapter)

    # Comparison

    def _compare(self, before: dict, now: dict, new_phase: bool = False, weights_only: bool = False):
        elastic = self.request.is_elastic
        return compare_metadata(before, now, elastic=elastic, new_phase=new_phase, weights_only=weights_only)

    def _print_differences(self, differences: list[Difference]) -> None:
        if differences and PartialState().is_main_process:
            print(*format_differences(differences), sep="\n", file=sys.stderr)  # noqa: T201

    def _refuse_fatal(
        self,
        differences: list[Difference],
        place: object,
        checkpoint: Checkpoint | None = None,
        printed: bool = False,
    ) -> None:
        fatal = [difference for difference in differences if difference.is_fatal]
        if not fatal:
            return
        if not printed:
            self._print_differences(differences)
        listed = "; ".join(f"{d.name} {_shorten(d.before)}, now {_shorten(d.now)}" for d in fatal)
        advice = advise(str(self.folder), fatal, has_checkpoint=checkpoint is not None)
        raise MismatchError(f"{place} contains another run: {listed}. {advice}")

    # The record

    def _read_record(self) -> dict | None:
        """Returns the contents of run.json, or None if the folder is empty or does not exist.

        Raises:
            MismatchError: the folder contains files that do not belong to a run.
        """
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if not {name for name in names if name != TOKENS_FOLDER and not name.startswith(".")}:
            return None
        try:
            record = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            record = None
        if isinstance(record, dict):
            return record
        if committed := Checkpoints(self.folder).committed():  # their manifests contain the same metadata
            return committed[0].metadata
        raise MismatchError(
            f"The output folder {self.folder} is not empty and does not contain a run of rorchat. {OTHER_FOLDER}"
        )

    def _write_record(self, record: dict) -> None:
        """Replaces run.json atomically: without this file, the folder would not be recognized as a run folder."""
        write_atomically(self.folder / "run.json", to_json(record, indent=2) + "\n")

    def begin(self, mixture_plan: object = None) -> None:
        """Writes config.yaml and run.json. Deletes the logs of an earlier start if it saved no checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.plan.checkpoint is None:
            for name in ("metrics.jsonl", "samples.jsonl", DIVERGED_ROWS):
                (self.folder / name).unlink(missing_ok=True)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.arguments.given, sort_keys=True), encoding="utf-8")
        self._write_record(self.plan.metadata | ({"plan": mixture_plan} if mixture_plan else {}))

    def finish(self, results: dict) -> None:
        """Writes the results to run.json and marks the run as finished."""
        self._write_record({**self.plan.metadata, **results, "finished": True})

    def print_next_step(self) -> None:
        """Prints where the model is, and what to do with it."""
        if PartialState().is_main_process:
            metadata = self.request.metadata
            print(  # noqa: T201
                describe_stage(metadata["stage"], self.folder, metadata["settings"].get("model")), flush=True
            )

    def finished_metrics(self) -> dict[str, float]:
        """Returns the metrics of a finished run. Prints that the run is finished, and completes the mirror."""
        checkpoints = Checkpoints(self.folder)
        if self.mirror and (committed := checkpoints.committed()):  # a signal may have interrupted the last copy
            self.mirror.offer(committed[0], checkpoints.in_use)
            self.mirror.finish()
        self.held.close()
        assert self.plan.finished is not None, "only of a finished run"
        if PartialState().is_main_process:
            message = f"{self.folder}: already finished with these settings; delete the folder to run it again"
            print(message, file=sys.stderr)  # noqa: T201
        self.print_next_step()
        return self.plan.finished["metrics"]


def _comparable_details(details: dict) -> dict:
    """The plan of a mixture, or the rows that a chat stage kept: an earlier version may have kept fewer of them."""
    plan = details.get("plan")
    return {"plan": plan, "kept_rows": None if plan else [source["kept"] for source in details.get("data", [])]}


def _shorten(value: object) -> str:
    """Shortens a value for an error message. The table of differences shows it in full."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
