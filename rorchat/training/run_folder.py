"""A run and its folder: begin, resume or find finished; train; save a stock model. The tail that every stage shares.

config.yaml     what was set; itself a valid --config
run.json        versions, device, what went in (with sha256), results; `finished` once the model is saved, and why it
                `stopped` where that was before the last step
metrics.jsonl   one line a log step, see docs/metrics.md; it only grows
mixture.png     the share of every source from the first token to the last (pretraining)
micro_batch.json  how many rows fit, where memory ran out once
.reference_*.json  what the reference gives to every pair, see rorchat/training/reference_logps.py
samples.jsonl   what the model says to fixed prompts, before, in between and after
checkpoint-N/   what a run goes on from, see rorchat/training/checkpointing/checkpoint.py; those that did not verify have
                another name
adapter/        what was trained, where that is an adapter (LoRA)
model/          the result: a plain Transformers folder
"""

import json
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import yaml
from accelerate import PartialState

from rorchat.errors import DataError, DivergedError, Interrupted, MismatchError, StorageError, UsageError
from rorchat.files import folder_lock, write_atomically
from rorchat.mixture.history import history_entry, require_same_data, without_paths
from rorchat.model import save_model
from rorchat.training.callbacks.divergence import DIVERGED_ROWS
from rorchat.training.callbacks.signals import handle_signals
from rorchat.training.checkpointing.checkpoint import KEPT, Checkpoint, Checkpoints
from rorchat.training.checkpointing.fingerprint import WEIGHTS_ALONE, Difference, differences, identity_of, table
from rorchat.training.checkpointing.mirror import GRACE, mirror_of
from rorchat.training.checkpointing.trainer_mixin import storage_failure
from rorchat.training.distributed import gather_model, is_lost_peer, run_on_main_process
from rorchat.training.oom_recovery import MICRO_BATCH, is_out_of_memory

TOKENS = "tokens"  # the folder of token stores in a run that names no other
REMEDY = "Choose another place, or delete the folder."


def _brief(value: object) -> str:
    """A value of an identity as an error can name it: the table above has it whole."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


class Run:
    """The folder of one run of one stage.

    Args:
        arguments: a stage's, as `parse` gives them; `output_dir` is the folder.
        stage: "pretrain", "sft", "dpo" ...
        inputs: folders (or Hub ids) of tokenizer and model that go in, by role.

    Raises:
        MismatchError: the folder holds another run, or files that are no run's.
    """

    def __init__(self, arguments, stage: str, inputs: dict[str, str]):
        self.folder, self.arguments = Path(arguments.output_dir), arguments
        self.record = identity_of(arguments, stage, inputs)
        self.mirror = self.checkpoint = None
        self.appends = False  # whether another mixture goes on from the checkpoint
        self.weights_alone = False  # whether nothing else of the checkpoint goes on
        self._held = ExitStack()  # until the run ends, or the process
        self._held.enter_context(handle_signals())
        run_on_main_process(self._take)
        self._look()
        if getattr(arguments, "new_phase", False) and self._found is None:
            raise MismatchError(
                f"The output folder {self.folder} has no checkpoint, so that there is nothing to go on with: leave "
                "new_phase out."
            )
        PartialState().wait_for_everyone()  # before any process writes into the folder that another one is reading
        self.finished = bool(self._found and self._found.get("finished"))

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    @property
    def past(self) -> list[dict]:
        """What was mixed before, as `rorchat.mixture.history` keeps it; empty while the first mixture goes on."""
        return self.record.get("past", [])

    def _take(self) -> None:
        """Locks the folder, and brings what is newer in the mirror, from another machine or before a reset."""
        self._held.enter_context(folder_lock(self.folder))
        self.mirror = mirror_of(self.arguments.mirror, self.folder)
        if self.mirror is None:
            return
        self._held.callback(self.mirror.finish, GRACE)
        checkpoints = Checkpoints(self.folder, self.arguments.save_total_limit or KEPT)
        copied = self.mirror.look()
        if (self._read() or {}).get("finished"):
            return
        for where, there in ((self.folder, checkpoints.committed()), (self.mirror.told, copied)):
            if there:
                new_phase = getattr(self.arguments, "new_phase", False)
                identity = there[0].about["identity"]
                self._require_same(identity, self.record, where, new_phase, self.arguments.weights_only, tell=False)
        try:
            brought = self.mirror.bring(checkpoints)
        except DataError:
            if not self.arguments.weights_only:
                raise
            return
        if brought:
            self._replace_record(brought.about["identity"])

    def _read(self) -> dict | None:
        """What run.json says, None where the folder holds nothing.

        Raises:
            MismatchError: it holds something else.
        """
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if not {name for name in there if name != TOKENS and not name.startswith(".")}:
            return None
        try:
            found = json.loads((self.folder / "run.json").read_text())
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            if committed := Checkpoints(self.folder).committed():  # whose manifests say it too, under seal
                return committed[0].about["identity"]
            raise MismatchError(f"The output folder {self.folder} is not empty and holds no run of rorchat. {REMEDY}")
        return found

    def _look(self) -> None:
        """Refuses to touch what another run achieved; what achieved nothing is taken over."""
        self._found, self.checkpoint = self._read(), None
        if self._found is None:
            return
        if not self._found.get("finished"):
            self.checkpoint = self._newest()
            if self.checkpoint is None:
                self._found = None  # it broke off before it had anything to lose
                return
        # run.json is of the last start, which may not have come as far as a checkpoint
        before = self.checkpoint.about["identity"] if self.checkpoint else self._found
        carried = {"past": self._past_behind(before), "weights_only": before.get("weights_only", [])}
        self.record |= {key: value for key, value in carried.items() if value}
        may_lose = self.arguments.weights_only and self.checkpoint is not None
        found = self._require_same({**before, **carried}, self.record, self.folder, self.appends, may_lose)
        self.weights_alone |= any(each.follows == WEIGHTS_ALONE for each in found)
        if self.weights_alone:
            self.record["weights_only"] = [*carried["weights_only"], self.checkpoint.step]

    def _newest(self) -> Checkpoint | None:
        """The checkpoint to go on from; one of which the weights alone verify, where that was asked for."""
        checkpoints, newest = Checkpoints(self.folder), None
        try:
            newest = checkpoints.newest()
        except DataError:
            if not self.arguments.weights_only:
                raise
        if newest is None and self.arguments.weights_only and checkpoints.damaged():
            newest, self.weights_alone = checkpoints.newest_weights(), True
        return newest

    def _past_behind(self, before: dict) -> list[dict]:
        """The past of what goes on; with `new_phase`, where another mixture was asked for, that of before is closed."""
        past, arguments = before.get("past", []), self.arguments
        if not (self.checkpoint and getattr(arguments, "new_phase", False) and "windows" in before):
            return past
        step = self.checkpoint.step
        own = history_entry(before, step * (arguments.global_batch_tokens // arguments.block_size))
        require_same_data([*past, own], self.record["inputs"])
        if without_paths(own)["mixture"] == without_paths(self.record["inputs"])["mixture"]:
            return past
        if step >= arguments.max_steps:
            raise MismatchError(
                f"{self.checkpoint.folder} is of the last step: there are no tokens left for a new phase. Leave "
                "new_phase out, and give the mixture of before."
            )
        self.appends = True
        return [*past, own]

    def _require_same(
        self,
        before: dict,
        now: dict,
        where: object,
        new_phase: bool = False,
        weights_only: bool = False,
        tell: bool = True,
    ) -> list[Difference]:
        """Raises MismatchError where two identities differ in what decides; tells, and gives, where they differ."""
        found = differences(before, now, self.record["stage"] == "pretrain", new_phase, weights_only)
        fatal = [each for each in found if each.is_fatal]
        if (fatal or (found and tell)) and PartialState().is_main_process:
            print(*table(found), sep="\n", file=sys.stderr)  # noqa: T201
        if fatal:
            said = "; ".join(f"{each.name} {_brief(each.before)}, now {_brief(each.now)}" for each in fatal)
            raise MismatchError(f"{where} holds another run: {said}. {self._way_out(fatal)}{REMEDY}")
        return found

    def _way_out(self, fatal: list[Difference]) -> str:
        """What goes on all the same, where something does; data alone may not change."""
        if self.checkpoint and all(each.is_mixture for each in fatal):
            if any(each.name.startswith("inputs.mixture") for each in fatal):
                return "Give --new_phase to go on with another mixture. "
        return ""

    def already_finished(self) -> dict[str, float]:
        """Says so, and gives the metrics that the run ended with."""
        checkpoints = Checkpoints(self.folder)
        if self.mirror and (here := checkpoints.committed()):  # what a signal kept from being copied
            self.mirror.offer(here[0], checkpoints.in_use)
            self.mirror.finish()
        self._held.close()
        print(f"{self.folder}: finished before with these settings; delete the folder to run it again", file=sys.stderr)  # noqa: T201
        return self._found["metrics"]

    def begin(self, plan: object = None) -> None:
        """Writes config.yaml and run.json; clears what an unfinished run without a checkpoint left behind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint is None:
            for name in ("metrics.jsonl", "samples.jsonl", DIVERGED_ROWS, MICRO_BATCH):
                (self.folder / name).unlink(missing_ok=True)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.arguments.given, sort_keys=True))
        self._write({"plan": plan} if plan else {})

    def _write(self, more: dict) -> None:
        self._replace_record({**self.record, **more})

    def _replace_record(self, record: dict) -> None:
        """Replaces run.json at once: without it the folder would be no run's."""
        write_atomically(self.folder / "run.json", json.dumps(record, indent=2) + "\n")

    def train(self, trainer, details: dict, told: Iterable[object] = ()) -> dict[str, float]:
        """As `_train`; then other processes may have the folder."""
        with self._held:
            try:
                return self._train(trainer, details, told)
            except RuntimeError as error:
                said = " ".join(str(error).split())[:160]
                if is_lost_peer(error):
                    raise Interrupted(
                        f"Another process of the run is gone or does not answer ({said}). The same command goes on "
                        "from the last checkpoint, if there is one."
                    ) from None
                if not is_out_of_memory(error):
                    raise
                raise UsageError(
                    f"Out of memory, and not in a forward or backward pass ({said}): give a smaller model, another "
                    "optimizer (adamw_8bit) or a smaller per_device_eval_batch_size."
                ) from None

    def _train(self, trainer, details: dict, told: Iterable[object]) -> dict[str, float]:
        """Trains, going on from the newest checkpoint if there is one, measures, and saves the stock model.

        Args:
            details: what run.json should remember: data and plan.
            told: lines that are printed before the first step: where the rows went, what is mixed.

        Returns:
            The final metrics, which are also in run.json.
        """
        plan = json.loads(json.dumps(details.get("plan")))
        trainer.identity = {**self.record, **json.loads(json.dumps(details))}
        trainer.mirror = self.mirror
        if self.appends:
            trainer.meter.new_phase = {"sources": [*self.record["inputs"]["mixture"]["sources"]]}
        elif self.checkpoint:
            self._require_same(self.checkpoint.about["identity"], {"plan": plan}, self.folder)
        run_on_main_process(lambda: self.begin(plan) or trainer.require_room())
        if trainer.is_world_process_zero():
            for line in told:
                print(line, file=sys.stderr)  # noqa: T201
        trainer.train(resume_from_checkpoint=self._start(trainer))
        if trainer.interruptions.stopping:
            step = trainer.state.global_step
            saved = any(each.step == step for each in trainer.checkpoints.committed())
            raise Interrupted(
                f"Stopped at step {step}, which is {'saved: the same command goes on' if saved else 'not saved'}."
            )
        seconds = round(trainer.meter.spent()["seconds"], 1)  # of all starts
        if not trainer.is_finite():
            raise DivergedError(
                "The last step left weights that are no numbers. The same command goes on from the last checkpoint, if "
                "there is one; lower learning_rate in a new output_dir."
            )
        metrics = trainer.final_metrics() | {"train_seconds": seconds, "steps": trainer.state.global_step}
        metrics["tokens"] = trainer.tokens_after(trainer.state.global_step)
        if trainer.forgetting:
            metrics |= trainer.forgetting.after()
            details = details | {"base_text": trainer.forgetting.text.told()}
        self._save(trainer, details, metrics)
        trainer.accelerator.wait_for_everyone()
        if self.mirror:  # for which nobody else waits
            self.mirror.finish()
        return metrics

    def _save(self, trainer, details: dict, metrics: dict[str, float]) -> None:
        """Saves the stock model, and then says that the run has finished."""
        model = gather_model(trainer.accelerator.unwrap_model(trainer.model))  # on every process: shards are gathered
        if not trainer.is_world_process_zero():
            return
        failure = None
        if trainer.adapter:
            failure = storage_failure(lambda: trainer.adapter.save(self.folder / "adapter", trainer.processing_class))
            model = trainer.adapter.merged()
        failure = failure or storage_failure(lambda: save_model(model, trainer.processing_class, self.model_folder))
        if failure:
            raise StorageError(
                f"The model could not be written into {self.model_folder} ({' '.join(str(failure).split())}). Free "
                "some space; the same command goes on from the last checkpoint, if there is one."
            )
        found = {"device": str(model.device), "parameters": model.num_parameters(), "metrics": metrics}
        if trainer.stopped:
            found["stopped"] = trainer.stopped
        self._write({**details, **found, "finished": True})

    def _start(self, trainer) -> str | None:
        """The folder that the Trainer goes on from, on every process."""
        if self.checkpoint is None:
            return None
        if not self.weights_alone:
            if self.mirror:
                self.mirror.offer(self.checkpoint, trainer.checkpoints.in_use)
            return str(self.checkpoint.folder)
        trainer.meter.from_weights = True
        return trainer.begin_at(self.checkpoint)
