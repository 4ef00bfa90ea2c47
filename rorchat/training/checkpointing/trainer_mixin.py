"""Saving, loading, signals and recovery from divergence inside the training loop of Transformers.

The Trainer of transformers 5.23 resumes exactly if nothing goes wrong. `CheckpointMixin` adds atomic checkpoints
(`rorchat.training.checkpointing.checkpoint`), strict loading, and the state that the Trainer does not save: the loss
accumulated since the last log line. NaN or infinite values are never applied or saved.
"""

import dataclasses
import json
import math
import random
import shutil
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from rorchat.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rorchat.errors import DataError, DivergedError, MismatchError, StorageError
from rorchat.evaluation.loss import Rows
from rorchat.files import as_number, to_json
from rorchat.jsonl import append_json_line
from rorchat.model import WEIGHTS
from rorchat.training.arguments import StageArguments
from rorchat.training.callbacks.divergence import DIVERGED_ROWS
from rorchat.training.callbacks.metrics import MetricsCallback
from rorchat.training.callbacks.signals import SignalCallback
from rorchat.training.checkpointing.checkpoint import KEPT, MANIFEST, STAGING, Checkpoint, find_storage_failure
from rorchat.training.checkpointing.mirror import Mirror
from rorchat.training.checkpointing.recovery import Checkpoints
from rorchat.training.checkpointing.resume_plan import ResumePlan
from rorchat.training.distributed import any_rank, set_collective_timeout
from rorchat.training.launcher import warn_about_save_time
from rorchat.training.lora import Adapter

STATE_FILE = "run_state_{}.json"  # state that the Trainer does not save; one file per process
MAX_FAILED_SAVES = 3  # consecutive
MAX_SKIPPED_STEPS = 3  # consecutive; after that, the run rolls back to a checkpoint


class CheckpointMixin(Trainer):
    """A Trainer with atomic, verified checkpoints that resumes exactly.

    Args:
        resume: the checkpoint to resume from, if any.
        run_metadata: metadata recorded in every checkpoint, see `rorchat.training.checkpointing.fingerprint`.
        adapter: the adapter that is trained; None if the model itself is trained.
        mirror: receives a copy of every checkpoint. Used on the main process only.
    """

    #: Attributes of TRL's trainers (1.16) that accumulate values for the next log line.
    trl_state: tuple[str, ...] = ()
    metrics: MetricsCallback  # set by the subclass, which knows the tokens of a step

    # what the stages give to the Trainer, or what it has from the first step on
    args: StageArguments
    model: GPT2LMHeadModel
    processing_class: PreTrainedTokenizerBase
    train_dataset: Rows
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR

    # values that are summed for the next log line: at the start of the step, and TRL's
    _loss_before_step: torch.Tensor
    _metric_counts: dict[str, int]
    _metrics: dict[str, defaultdict[str, list]]

    def __init__(
        self,
        *args,
        resume: ResumePlan,
        run_metadata: dict,
        adapter: Adapter | None = None,
        mirror: Mirror | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.resume, self.run_metadata, self.adapter, self.mirror = resume, run_metadata, adapter, mirror
        folder = Path(self.args.output_dir)
        self.checkpoints = Checkpoints(folder, self.args.save_total_limit or KEPT)
        self.signals = SignalCallback(folder)
        self.failed_saves = self.skipped_in_a_row = 0
        self.rolled_back = self._step_was_skipped = self._told_save_time = False
        self._resumed_from: Path | None = None
        self._optimizer_is_new = resume.weights_only  # until the first checkpoint after this start
        self._staging: Path | None = None
        self._validation: tuple[int, float] | None = None  # (step, loss) of the last evaluation
        set_collective_timeout(self.args.ddp_timeout)

    def checkpoint_callbacks(self) -> Iterator[TrainerCallback]:
        """The callbacks of this mixin, in order; the subclass adds them among its own."""
        yield self.signals
        yield _RestoreCallback(self)

    # Saving

    def _get_output_dir(self, trial) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        step, is_main = self.state.global_step, self.is_world_process_zero()
        if not self.is_finite():
            self._refuse_to_save(step)
            return
        staging, started = self.checkpoints.folder / STAGING / f"checkpoint-{step}", time.monotonic()
        with self.metrics.pause():
            phases = [
                (is_main, lambda: self.checkpoints.begin(step)),
                (True, lambda: self._write_checkpoint(staging, model, trial)),
                (is_main, lambda: self._commit(staging)),
            ]
            for takes_part, phase in phases:
                failure = find_storage_failure(phase) if takes_part else None
                if any_rank(failure is not None)[0]:
                    self._handle_failed_save(step, failure)
                    return
        self.failed_saves = 0
        self._compare_with_grace(time.monotonic() - started)

    def _compare_with_grace(self, save_seconds: float) -> None:
        """Says once if a signal would not leave enough time to save a checkpoint."""
        step_seconds = statistics.median(self.metrics.seconds_per_step or [0.0])
        warning = "" if self._told_save_time else warn_about_save_time(save_seconds, step_seconds)
        if warning and self.is_world_process_zero():
            tqdm.write(warning, file=sys.stderr)
        self._told_save_time = self._told_save_time or bool(warning)

    def _write_checkpoint(self, staging: Path, model, trial) -> None:
        self._staging = staging.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if self.is_world_process_zero():
            _make_strict(staging / TRAINER_STATE_NAME)
        state = {
            "summed_loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "last_mixture": self.metrics.last_mixture,
            "skipped_in_a_row": self.skipped_in_a_row,
            "rolled_back": self.rolled_back,
            "trl": {name: vars(self)[name] for name in self.trl_state},
        }
        (staging / STATE_FILE.format(self.args.process_index)).write_text(to_json(state), encoding="utf-8")

    def _commit(self, staging: Path) -> None:
        checkpoint = self.checkpoints.commit(staging, self._manifest(staging))
        self._optimizer_is_new = False
        if self.mirror:
            self.mirror.offer(checkpoint, self.checkpoints.in_use)

    def _manifest(self, staging: Path) -> dict:
        missing = sorted(self._required_files() - {path.name for path in staging.iterdir()})
        if missing:
            raise RuntimeError(f"The Trainer did not write {', '.join(missing)}: the checkpoint could not be resumed.")
        step = self.state.global_step
        loss = self._validation[1] if self._validation and self._validation[0] == step else None
        return {
            "step": step,
            "validation_loss": loss if loss is not None and math.isfinite(loss) else None,
            "world_size": self.args.world_size,
            "identity": self.run_metadata,
        }

    def _required_files(self) -> set[str]:
        world = self.args.world_size
        random_states = ["rng_state.pth"] if world == 1 else [f"rng_state_{rank}.pth" for rank in range(world)]
        weights = {ADAPTER_WEIGHTS, ADAPTER_CONFIG} if self.adapter else {WEIGHTS, "config.json"}
        names = {*weights, "optimizer.pt", "scheduler.pt", "trainer_state.json"}
        names |= {*random_states, *(STATE_FILE.format(rank) for rank in range(world))}
        return names | ({"scaler.pt"} if self.accelerator.scaler is not None else set())

    def _handle_failed_save(self, step: int, failure: Exception | None) -> None:
        """Continues training after a failed save.

        Raises:
            StorageError: several saves in a row have failed, or the run is about to stop.
        """
        self.failed_saves += 1
        if self.is_world_process_zero():
            self.checkpoints.discard_staging()
        committed = self.checkpoints.committed()
        newest = f"the newest checkpoint is {committed[0].folder.name}" if committed else "there is no checkpoint yet"
        reason = f" ({' '.join(str(failure).split())})" if failure else ""
        message = f"The checkpoint of step {step} could not be written{reason}; {newest}."
        if self.failed_saves == MAX_FAILED_SAVES or self.signals.stopping:
            effect = "resume from it" if committed else "start again"
            raise StorageError(f"{message} Free some space, and run the same command again to {effect}.")
        if self.is_world_process_zero():
            print(f"{message} Training continues, and the next save will be tried.", file=sys.stderr)  # noqa: T201

    def is_finite(self) -> bool:
        """Whether all weights and the state of the optimizer are finite, on every process."""
        tensors: list[torch.Tensor] = [*self.model.parameters()]
        if not self.is_deepspeed_enabled:
            tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        tensors = [tensor for tensor in tensors if torch.is_tensor(tensor) and tensor.is_floating_point()]
        return not any_rank(not all(bool(tensor.isfinite().all()) for tensor in tensors))[0]

    def _refuse_to_save(self, step: int) -> None:
        message = f"The weights or the optimizer state of step {step} contain NaN or infinite values: not saved."
        if self.signals.stopping:
            raise DivergedError(f"{message} Run the same command again to resume from the last checkpoint.")
        if self.is_world_process_zero():
            print(message, file=sys.stderr)  # noqa: T201

    def require_disk_space(self) -> None:
        """Raises StorageError if the disk has no room for the checkpoints that will exist at the same time."""
        if self.args.save_strategy == SaveStrategy.NO:
            return
        committed = self.checkpoints.committed()
        # weights, and at most two numbers of optimizer state per weight, 4 bytes each
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        checkpoint_bytes = committed[0].bytes if committed else 12 * trained
        # the oldest is deleted after the new one is complete, and one more may be kept as the best
        most = self.checkpoints.kept + 1 + (self.args.eval_strategy != IntervalStrategy.NO)
        upcoming = self._count_upcoming_saves(committed[0].step if committed else 0)
        needed = checkpoint_bytes * max(0, min(most - len(committed), upcoming))
        free = shutil.disk_usage(self.checkpoints.folder).free
        if free < needed:
            raise StorageError(
                f"{self.checkpoints.folder} has {free:,} bytes free, and checkpoints need {needed:,} more. Free some "
                "space, choose another output_dir, or give --save_strategy no."
            )

    def _count_upcoming_saves(self, step: int) -> int:
        every, steps = self.args.save_steps, self.args.max_steps
        if self.args.save_strategy != SaveStrategy.STEPS or steps <= 0:
            return self.checkpoints.kept + 2
        return math.ceil((steps - step) / (every if every >= 1 else math.ceil(every * steps)))

    # Divergence

    def handle_divergence(self, step: int) -> str:
        """Recovers from a step with a loss or gradient that is not finite.

        The rows of the step are written to a file, and its gradients are discarded. After MAX_SKIPPED_STEPS consecutive
        steps of this kind, the weights are the likely cause. They and the optimizer state are restored from the last
        checkpoint, once per run. The position in the data and in the learning rate schedule does not change.

        Returns:
            The action taken, in words; "" if there is no way to recover.
        """
        if self.is_world_process_zero():
            self.write_diverged_rows(step)
        self._tr_loss.copy_(self._loss_before_step)  # otherwise the next logged loss would be NaN
        self._globalstep_last_logged += 1
        self.discard_step_metrics()
        self._step_was_skipped = True
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row <= MAX_SKIPPED_STEPS:
            action = "skipped"
        elif not self.rolled_back and (checkpoint := self._roll_back()):
            self.rolled_back, self.skipped_in_a_row = True, 0
            action = f"rolled back to the weights of step {checkpoint.step}"
        else:
            return ""
        if not self.args.fp16:  # under fp16, the gradient scaler skips the step and needs the gradients
            self.model.zero_grad()
        return action

    def discard_step_metrics(self) -> None:
        """Removes the metrics that TRL has recorded in this step, so that the next log line does not average them."""
        if "_metrics" not in self.trl_state:
            return
        metrics = self._metrics["train"]
        for name in [*metrics]:
            del metrics[name][self._metric_counts.get(name, 0) :]
            if not metrics[name]:  # TRL would average an empty list
                del metrics[name]

    def _roll_back(self) -> Checkpoint | None:
        try:
            checkpoint = self.checkpoints.newest()
        except DataError:  # none is valid
            return None
        if checkpoint:
            self._load_from_checkpoint(str(checkpoint.folder))
            if self._optimizer_is_new:  # the checkpoint has the state of the previous optimizer
                self.optimizer.state.clear()
                return checkpoint
            state = torch.load(checkpoint.folder / "optimizer.pt", map_location=self.args.device, weights_only=True)
            self.optimizer.load_state_dict(state)
        return checkpoint

    def write_diverged_rows(self, step: int) -> None:
        """Appends the decoded rows of a step to DIVERGED_ROWS in the run folder."""
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        for number in range((step - 1) * rows, min(step * rows, len(self.train_dataset))):
            for text in self.decode_row(self.train_dataset[number]):
                append_json_line(self.checkpoints.folder / DIVERGED_ROWS, {"step": step, "row": number, "text": text})

    def decode_row(self, row: Any) -> Iterator[str]:
        """The texts of a row of the training dataset."""
        yield from self.processing_class.batch_decode([row["input_ids"]])

    # Loading

    def prepare_resume(self) -> str | None:
        """Returns the folder to pass to `train(resume_from_checkpoint=...)`. Must be called on every process."""
        checkpoint = self.resume.checkpoint
        if checkpoint is None:
            return None
        if not self.resume.weights_only:
            if self.mirror:
                self.mirror.offer(checkpoint, self.checkpoints.in_use)
            return str(checkpoint.folder)
        if self.is_world_process_zero():
            self.checkpoints.copy_weights(checkpoint)
            state = dataclasses.replace(
                self.state, global_step=checkpoint.step, train_batch_size=self.args.train_batch_size
            )
            state.save_to_json(str(self.checkpoints.weights_folder / TRAINER_STATE_NAME))
            print(  # noqa: T201
                f"Resuming from the weights of step {checkpoint.step} only: optimizer and random state are reset.",
                file=sys.stderr,
            )
        self.accelerator.wait_for_everyone()
        return str(self.checkpoints.weights_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.adapter:
            self.adapter.load(resume_from_checkpoint)
            return
        model = self.model if model is None else model
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        expected = model.state_dict()
        # a tied weight is saved under one of its names
        loaded = {expected[name].data_ptr() for name in weights if name in expected}
        missing = sorted(n for n, value in expected.items() if n not in weights and value.data_ptr() not in loaded)
        unexpected = sorted(weights.keys() - expected.keys())
        shapes = sorted(n for n in weights.keys() & expected.keys() if weights[n].shape != expected[n].shape)
        for problem, names in (("lacks", missing), ("has unexpected", unexpected), ("has other shapes of", shapes)):
            if names:
                raise MismatchError(
                    f"{resume_from_checkpoint} {problem} {', '.join(names[:3])}: it belongs to another model."
                )
        model.load_state_dict(weights, strict=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._resumed_from = Path(checkpoint) if checkpoint else None
        if checkpoint and not _is_complete(checkpoint):
            with warnings.catch_warnings():  # "lr_scheduler.step() before optimizer.step()"
                warnings.simplefilter("ignore")
                for _ in range(self.state.global_step):
                    self.lr_scheduler.step()
            return
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None:  # the checkpoint may come from a device with another precision
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if _is_complete(checkpoint) and Checkpoint.read(checkpoint).manifest["world_size"] == self.args.world_size:
            super()._load_rng_state(checkpoint)
            return
        # only weights, or another number of processes: there is no state to restore, so seed each process differently
        step = self.state.global_step
        seeds = numpy.random.SeedSequence([self.args.seed, step, self.args.process_index]).generate_state(3)
        random.seed(int(seeds[0]))
        numpy.random.seed(seeds[1])
        torch.manual_seed(int(seeds[2]))

    def restore_state(self) -> None:
        """Restores the state that the Trainer does not save, from the checkpoint that was loaded."""
        path = self._resumed_from / STATE_FILE.format(self.args.process_index) if self._resumed_from else None
        if path is None or not path.is_file():  # only weights, or another number of processes
            return
        saved = json.loads(path.read_text(encoding="utf-8"))
        self._tr_loss.fill_(as_number(saved["summed_loss"]))
        self._globalstep_last_logged = saved["last_logged"]
        self.metrics.last_mixture = saved["last_mixture"]
        self.skipped_in_a_row, self.rolled_back = saved["skipped_in_a_row"], saved["rolled_back"]
        for mode, metrics in saved["trl"].pop("_metrics", {}).items():
            for name, values in metrics.items():
                self._metrics[mode][name] = [as_number(value) for value in values]
        vars(self).update(saved["trl"])

    # Steps

    def begin_step(self) -> None:
        """Records what `handle_divergence` restores if the step is not finite."""
        self._loss_before_step = self._tr_loss.clone()
        if "_metrics" in self.trl_state:
            self._metric_counts = {name: len(values) for name, values in self._metrics["train"].items()}
        self._step_was_skipped = False

    def end_step(self) -> None:
        if not self._step_was_skipped:
            self.skipped_in_a_row = 0


class _RestoreCallback(TrainerCallback):
    """Tells the trainer when it resumes, and when a step begins and ends."""

    def __init__(self, trainer: CheckpointMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # transformers 5.23 keeps the intervals of the checkpoint
        self.trainer.restore_state()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.begin_step()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_step()


def _make_strict(path: Path) -> None:
    """Rewrites a JSON file of Transformers, which contains bare NaN if a logged value is not finite."""
    text = path.read_text(encoding="utf-8")
    if "NaN" in text or "Infinity" in text:
        path.write_text(to_json(json.loads(text), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_complete(folder: str) -> bool:
    """Whether a folder to resume from is a complete checkpoint, not only weights."""
    return (Path(folder) / MANIFEST).is_file()
