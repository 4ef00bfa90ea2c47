"""Trains a stage to its end: resume, train, evaluate, and save a stock model. Every recipe ends with this function."""

import math
import sys
from collections.abc import Iterable

from rorchat.errors import DivergedError, Interrupted, StoppedBySignal, StorageError, UsageError
from rorchat.model import save_model
from rorchat.training.checkpointing.checkpoint import find_storage_failure
from rorchat.training.distributed import gather_model, is_lost_peer, run_on_main_process
from rorchat.training.oom_recovery import is_out_of_memory
from rorchat.training.run_folder import RunFolder
from rorchat.training.run_notes import describe_validation
from rorchat.training.stage import StageTrainer
from rorchat.validation_split import EVALUATED_SHARE

MAX_SKIPPED_AT_END = 1  # one row may be bad; if more of the last steps were skipped, the weights are the likely cause
_LOWER_RATE = "Lower learning_rate (and matrix_learning_rate with muon) in a new output_dir."


def train(run: RunFolder, trainer: StageTrainer, startup_messages: Iterable[object] = ()) -> dict[str, float]:
    """Trains from the newest checkpoint, if there is one, evaluates, and saves the stock model.

    Args:
        startup_messages: printed before the first step, after the folder has been created.

    Returns:
        The final metrics, which are also in run.json.

    Raises:
        Interrupted: a signal stopped the run, or another process of it is lost.
        DivergedError: the loss or the weights are not finite.
        StorageError: the model or too many checkpoints could not be written.
        UsageError: memory ran out, and smaller micro-batches cannot help.
    """
    with run.held:
        try:
            return _train(run, trainer, startup_messages)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            if is_lost_peer(error):
                raise Interrupted(
                    f"Another process of the run has died or does not respond ({reason}). Run the same command again "
                    "to resume from the last checkpoint."
                ) from None
            if not is_out_of_memory(error):
                raise
            raise UsageError(
                f"Out of memory outside of the forward and backward pass ({reason}): use a smaller model, another "
                "optimizer (adamw_8bit) or a smaller per_device_eval_batch_size."
            ) from None
        finally:
            trainer.metrics.close()  # in a notebook, the bar of a failed run would disturb that of the next one


def _train(run: RunFolder, trainer: StageTrainer, startup_messages: Iterable[object]) -> dict[str, float]:
    mixture_plan = trainer.context.details.get("plan")
    run_on_main_process(lambda: _begin(run, trainer, mixture_plan))
    _print_notes(trainer, startup_messages)
    share = trainer.context.details.get(EVALUATED_SHARE, 1)
    _print_notes(trainer, filter(None, [describe_validation(share, trainer.args.max_eval_tokens)]))
    trainer.train(resume_from_checkpoint=trainer.prepare_resume())
    _require_completed(trainer)
    seconds = round(trainer.metrics.elapsed()["seconds"], 1)  # of all starts
    metrics = trainer.final_metrics() | {"train_seconds": seconds, "steps": trainer.state.global_step}
    _require_finite_result(metrics)
    metrics["tokens"] = trainer.tokens_after(trainer.state.global_step)
    _print_notes(trainer, trainer.final_notes())
    details = dict(trainer.context.details)
    if trainer.base_loss:
        metrics |= trainer.base_loss.measure_after()
        details["base_text"] = trainer.base_loss.text.describe()
    _save(run, trainer, details, metrics)
    trainer.accelerator.wait_for_everyone()
    if run.mirror:
        run.mirror.finish()
    run.print_next_step()
    return metrics


def _print_notes(trainer: StageTrainer, notes: Iterable[object]) -> None:
    if trainer.is_world_process_zero():
        for note in notes:
            print(note, file=sys.stderr)  # noqa: T201


def _begin(run: RunFolder, trainer: StageTrainer, mixture_plan: object) -> None:
    run.begin(mixture_plan)
    trainer.require_disk_space()


def _require_completed(trainer: StageTrainer) -> None:
    step = trainer.state.global_step
    if trainer.signals.stopping:
        if any(checkpoint.step == step for checkpoint in trainer.checkpoints.committed()):
            raise StoppedBySignal(f"Stopped at step {step}, which is saved: run the same command again to resume.")
        raise Interrupted(f"Stopped at step {step}, which is not saved.")
    if not trainer.is_finite():
        raise DivergedError(
            "The weights after the last step contain NaN or infinite values. Run the same command again to resume from "
            "the last checkpoint, or lower learning_rate in a new output_dir."
        )
    skipped = trainer.skipped_in_a_row
    if skipped == step or skipped > MAX_SKIPPED_AT_END:
        raise DivergedError(
            f"The last {skipped} of {step} steps were skipped, because their loss or gradient is not finite. No model "
            f"is saved. {_LOWER_RATE}"
        )


def _require_finite_result(metrics: dict[str, float]) -> None:
    """Raises DivergedError if the validation loss (with GRPO, the reward) is not finite."""
    for name in ("eval_loss", "eval_reward"):
        if name in metrics and not math.isfinite(metrics[name]):
            raise DivergedError(f"{name} after the last step is {metrics[name]}, so no model is saved. {_LOWER_RATE}")


def _save(run: RunFolder, trainer: StageTrainer, details: dict, metrics: dict[str, float]) -> None:
    """Saves the stock model, and then records that the run has finished."""
    model = gather_model(trainer.accelerator.unwrap_model(trainer.model))  # on every process
    if not trainer.is_world_process_zero():
        return
    adapter, tokenizer, failure = trainer.context.adapter, trainer.processing_class, None
    if adapter:
        failure = find_storage_failure(lambda: adapter.save(run.folder / "adapter", tokenizer))
        model = adapter.merged()
    failure = failure or find_storage_failure(lambda: save_model(model, tokenizer, run.model_folder))
    if failure:
        raise StorageError(
            f"The model could not be written into {run.model_folder} ({' '.join(str(failure).split())}). Free some "
            "space, and run the same command again to resume from the last checkpoint."
        )
    results = {"device": str(model.device), "parameters": model.num_parameters(), "metrics": metrics}
    if trainer.stop_reason:
        results["stopped"] = trainer.stop_reason
    run.finish(details | results)
