"""A run that stops goes on as if it had not: saving, loading, signals and divergence inside Transformers' loop.

The Trainer of transformers 5.23 resumes exactly in good weather. What is added: a checkpoint is committed whole or not
at all (`rorchat.training.checkpointing.checkpoint`), loaded strictly, and holds what the Trainer forgets: the open
window of the log.
"""

import dataclasses
import json
import math
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from rorchat.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rorchat.errors import DataError, DivergedError, MismatchError, StorageError
from rorchat.jsonl import append_json_line
from rorchat.model import WEIGHTS
from rorchat.training.callbacks.divergence import DIVERGED_ROWS
from rorchat.training.callbacks.signals import SignalCallback
from rorchat.training.checkpointing.checkpoint import KEPT, MANIFEST, STAGING, Checkpoint, Checkpoints
from rorchat.training.checkpointing.mirror import Mirror
from rorchat.training.distributed import any_rank, set_collective_timeout
from rorchat.training.lora import Adapter

STATE = "run_state_{}.json"  # what the Trainer forgets, by process
KEPT_BY_TRL = ("_metrics", "_total_train_tokens")  # of its trainers (1.16): what is averaged into the next log line
MOST_FAILED_SAVES = 3  # in a row
MOST_SKIPPED = 3  # steps in a row, before the run goes back to a checkpoint
#: How PyTorch's writer, which is no Python, says that the disk is full (torch 2.13, inline_container.cc).
_WRITER_FAILED = ("unexpected pos", "PytorchStreamWriter failed", "inline_container")


class CheckpointMixin(Trainer):
    """A Trainer whose checkpoints are committed and verified; `attend` must be called before it trains."""

    adapter: Adapter | None = None  # what is trained, where the model itself is frozen

    def attend(self, folder: Path) -> None:
        """Keeps the checkpoints of this run in a folder, listens to signals, and waits for no process for ever."""
        set_collective_timeout(self.args.ddp_timeout)
        self.checkpoints = Checkpoints(folder, self.args.save_total_limit or KEPT)
        self.interruptions = SignalCallback(folder)
        self.identity: dict = {}  # told by the run, as is the mirror
        self.mirror: Mirror | None = None
        self.failed_saves = self.skipped_in_a_row = 0
        self._began_with_weights = False  # and has saved nothing of its own since
        self.rolled_back = self._mended = False
        self._staging: Path | None = None
        self._validated: tuple[int, float] | None = None
        self._resumed_from: Path | None = None
        self.add_callback(self.interruptions)
        self.add_callback(_State(self))

    # Saving

    def _get_output_dir(self, trial) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        step, main = self.state.global_step, self.is_world_process_zero()
        if not self.is_finite():
            self._refuse_to_save(step)
            return
        staging = self.checkpoints.folder / STAGING / f"checkpoint-{step}"
        with self.meter.pause():
            stages = [
                (main, lambda: self.checkpoints.begin(step)),
                (True, lambda: self._write(staging, model, trial)),
                (main, lambda: self._commit(staging)),
            ]
            for mine, stage in stages:
                failure = storage_failure(stage) if mine else None
                if any_rank(failure is not None)[0]:
                    self._failed_to_save(step, failure)
                    return
        self.failed_saves = 0

    def _write(self, staging: Path, model, trial) -> None:
        self._staging = staging.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        state = {
            "summed_loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "last_mixture": self.meter.last_mixture,
            "skipped_in_a_row": self.skipped_in_a_row,
            "rolled_back": self.rolled_back,
            "trl": {name: getattr(self, name) for name in KEPT_BY_TRL if hasattr(self, name)},
        }
        (staging / STATE.format(self.args.process_index)).write_text(json.dumps(state))

    def _commit(self, staging: Path) -> None:
        committed = self.checkpoints.commit(staging, self._about(staging))
        self._began_with_weights = False
        if self.mirror:
            self.mirror.offer(committed, self.checkpoints.in_use)

    def _about(self, staging: Path) -> dict:
        missing = sorted(self._required() - {path.name for path in staging.iterdir()})
        if missing:
            raise RuntimeError(f"The Trainer did not write {', '.join(missing)}: of this nothing could go on.")
        step = self.state.global_step
        loss = self._validated[1] if self._validated and self._validated[0] == step else None
        return {
            "step": step,
            "validation_loss": loss if loss is not None and math.isfinite(loss) else None,
            "world_size": self.args.world_size,
            "identity": self.identity,
        }

    def _required(self) -> set[str]:
        world = self.args.world_size
        random_states = ["rng_state.pth"] if world == 1 else [f"rng_state_{rank}.pth" for rank in range(world)]
        weights = {ADAPTER_WEIGHTS, ADAPTER_CONFIG} if self.adapter else {WEIGHTS, "config.json"}
        names = {*weights, "optimizer.pt", "scheduler.pt", "trainer_state.json"}
        names |= {*random_states, *(STATE.format(rank) for rank in range(world))}
        return names | ({"scaler.pt"} if self.accelerator.scaler is not None else set())

    def _failed_to_save(self, step: int, failure: Exception | None) -> None:
        self.failed_saves += 1
        if self.is_world_process_zero():
            self.checkpoints.give_up()
        safe = self.checkpoints.committed()
        left = f"{safe[0].folder.name} is the newest" if safe else "there is none yet"
        why = f" ({' '.join(str(failure).split())})" if failure else ""
        said = f"The checkpoint of step {step} could not be written{why}; {left}."
        if self.failed_saves == MOST_FAILED_SAVES or self.interruptions.stopping:
            goes_on = "goes on from there" if safe else "begins anew"
            raise StorageError(f"{said} Free some space; the same command {goes_on}.")
        if self.is_world_process_zero():
            print(f"{said} Training goes on, and tries again at the next save.", file=sys.stderr)  # noqa: T201

    def is_finite(self) -> bool:
        """Whether every weight and every number of the optimizer's state is one, on every process."""
        tensors = [*self.model.parameters()]
        if not self.is_deepspeed_enabled:
            tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        tensors = [tensor for tensor in tensors if torch.is_tensor(tensor) and tensor.is_floating_point()]
        return not any_rank(not all(bool(tensor.isfinite().all()) for tensor in tensors))[0]

    def require_room(self) -> None:
        """Raises StorageError where the disk has no room for the checkpoints that there will be at once."""
        if self.args.save_strategy == SaveStrategy.NO:
            return
        there = self.checkpoints.committed()
        # weights and, at most, two numbers of the optimizer for each
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        each = there[0].bytes if there else 12 * trained
        # the oldest goes when the new one is there; and one may be the best
        most = self.checkpoints.kept + 1 + (self.args.eval_strategy != IntervalStrategy.NO)
        needed = each * max(0, min(most - len(there), self._saves_to_come(there[0].step if there else 0)))
        free = shutil.disk_usage(self.checkpoints.folder).free
        if free < needed:
            raise StorageError(
                f"{self.checkpoints.folder} has {free:,} bytes free, and checkpoints need {needed:,} more. Free some "
                "space, choose another output_dir, or give --save_strategy no."
            )

    def _saves_to_come(self, step: int) -> int:
        every, steps = self.args.save_steps, self.args.max_steps
        if self.args.save_strategy != SaveStrategy.STEPS or steps <= 0:
            return self.checkpoints.kept + 2
        return math.ceil((steps - step) / (every if every >= 1 else math.ceil(every * steps)))

    def _refuse_to_save(self, step: int) -> None:
        said = f"The weights or the optimizer's state of step {step} hold what is no number: they are not saved."
        if self.interruptions.stopping:
            raise DivergedError(f"{said} The same command goes on from the last checkpoint, if there is one.")
        if self.is_world_process_zero():
            print(said, file=sys.stderr)  # noqa: T201

    # Divergence

    def mend(self, step: int) -> str:
        """Makes good a step whose loss or gradient is no number, and says how; "" where nothing is left to try.

        Its rows are written out and nothing steps on its gradients. When that has happened MOST_SKIPPED times in a
        row, the weights are to blame: they and the optimizer's state go back to the last checkpoint, once in a run,
        while the rows and the learning rate go on from here.
        """
        if self.is_world_process_zero():
            self._write_rows(step)
        self._tr_loss.copy_(self._summed_before)  # else a window of the log would be no number either
        self._globalstep_last_logged += 1
        self.forget_step()
        self._mended = True
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row <= MOST_SKIPPED:
            done = "skipped"
        elif not self.rolled_back and (checkpoint := self._roll_back()):
            self.rolled_back, self.skipped_in_a_row = True, 0
            done = f"rolled back to the weights of step {checkpoint.step}"
        else:
            return ""
        if not self.args.fp16:  # there the scaler leaves the step out, and wants to see why
            self.model.zero_grad()
        return done

    def forget_step(self) -> None:
        """Takes back what TRL has noted since the step began, for the next line of the log."""
        metrics = getattr(self, "_metrics", {}).get("train", {})
        for name in [*metrics]:
            del metrics[name][self._noted_before.get(name, 0) :]
            if not metrics[name]:  # of which TRL would take the mean
                del metrics[name]

    def _roll_back(self) -> Checkpoint | None:
        try:
            checkpoint = self.checkpoints.newest()
        except DataError:  # none verifies
            return None
        if checkpoint:
            self._load_from_checkpoint(str(checkpoint.folder))
            if self._began_with_weights:  # its optimizer is what was left behind
                self.optimizer.state.clear()
                return checkpoint
            state = torch.load(checkpoint.folder / "optimizer.pt", map_location=self.args.device, weights_only=True)
            self.optimizer.load_state_dict(state)
        return checkpoint

    def _write_rows(self, step: int) -> None:
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        for number in range((step - 1) * rows, min(step * rows, len(self.train_dataset))):
            row = self.train_dataset[number]
            for part in row if isinstance(row, list) else [row]:  # a packed row has several
                ids = part["input_ids"] if "input_ids" in part else [*part["prompt_ids"], *part["chosen_ids"]]
                text = self.processing_class.decode(ids)
                append_json_line(self.checkpoints.folder / DIVERGED_ROWS, {"step": step, "row": number, "text": text})

    # Loading

    def begin_at(self, checkpoint: Checkpoint) -> str:
        """A folder to go on from at a checkpoint's step with its weights alone; all processes must call this."""
        self._began_with_weights = True
        if self.is_world_process_zero():
            self.checkpoints.lay_out_weights(checkpoint)
            at = {"global_step": checkpoint.step, "train_batch_size": self.args.train_batch_size}
            dataclasses.replace(self.state, **at).save_to_json(str(self.checkpoints.weights / TRAINER_STATE_NAME))
            said = f"The weights of step {checkpoint.step} go on alone: optimizer and random state begin anew."
            print(said, file=sys.stderr)  # noqa: T201
        self.accelerator.wait_for_everyone()
        return str(self.checkpoints.weights)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.adapter:
            self.adapter.load(resume_from_checkpoint)
            return
        model = self.model if model is None else model
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        own = model.state_dict()
        loaded = {own[name].data_ptr() for name in weights if name in own}
        missing = sorted(name for name, value in own.items() if name not in weights and value.data_ptr() not in loaded)
        unexpected = sorted(weights.keys() - own.keys())
        shapes = sorted(name for name in weights.keys() & own.keys() if weights[name].shape != own[name].shape)
        for what, names in (("lacks", missing), ("has besides", unexpected), ("has in another shape", shapes)):
            if names:
                raise MismatchError(f"{resume_from_checkpoint} {what} {', '.join(names[:3])}: it is of another model.")
        model.load_state_dict(weights, strict=False)  # what is tied is there under one name

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._resumed_from = Path(checkpoint) if checkpoint else None
        if checkpoint and not _is_whole(checkpoint):
            with warnings.catch_warnings():  # that no optimizer stepped yet
                warnings.simplefilter("ignore")
                for _ in range(self.state.global_step):
                    self.lr_scheduler.step()
            return
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None:  # another device may compute in another precision
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if _is_whole(checkpoint) and Checkpoint.read(checkpoint).about["world_size"] == self.args.world_size:
            super()._load_rng_state(checkpoint)
            return
        # with weights alone, or other processes, there is no state to go on with, but one that nobody else has
        step = self.state.global_step
        drawn = numpy.random.SeedSequence([self.args.seed, step, self.args.process_index]).generate_state(3)
        random.seed(int(drawn[0]))
        numpy.random.seed(drawn[1])
        torch.manual_seed(int(drawn[2]))


class _State(TrainerCallback):
    """Goes on with what the Trainer forgets: the losses that were summed and not yet logged, what was tried."""

    def __init__(self, trainer: CheckpointMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # transformers 5.23 goes on with those of the checkpoint
        trainer, folder = self.trainer, self.trainer._resumed_from
        path = folder / STATE.format(args.process_index) if folder else None
        if path is None or not path.is_file():  # of another number of processes
            return
        found = json.loads(path.read_text())
        trainer._tr_loss.fill_(found["summed_loss"])
        trainer._globalstep_last_logged = found["last_logged"]
        trainer.meter.last_mixture = found["last_mixture"]
        trainer.skipped_in_a_row, trainer.rolled_back = found["skipped_in_a_row"], found["rolled_back"]
        for mode, metrics in found["trl"].pop("_metrics", {}).items():
            trainer._metrics[mode].update(metrics)
        vars(trainer).update(found["trl"])

    def on_save(self, args, state, control, **kwargs):
        self.trainer.meter.interrupted = self.trainer.interruptions.stopping

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._summed_before = self.trainer._tr_loss.clone()
        noted = getattr(self.trainer, "_metrics", {}).get("train", {})
        self.trainer._noted_before = {name: len(values) for name, values in noted.items()}
        self.trainer._mended = False

    def on_step_end(self, args, state, control, **kwargs):
        if not self.trainer._mended:
            self.trainer.skipped_in_a_row = 0


def _is_whole(folder: str) -> bool:
    """Whether what a run goes on from is a checkpoint, and not the weights of one."""
    return (Path(folder) / MANIFEST).is_file()


def storage_failure(stage: Callable[[], object]) -> Exception | None:
    """What kept a stage of saving from the disk; anything else is raised."""
    try:
        stage()
    except (OSError, SafetensorError) as failure:
        return failure
    except RuntimeError as failure:
        if any(words in str(failure) for words in _WRITER_FAILED):
            return failure
        raise
    return None
