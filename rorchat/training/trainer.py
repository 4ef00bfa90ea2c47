"""What our three trainers share over Transformers' own: arguments, loss, evaluation, optimizer, metrics.

The loop is the Trainer's. Ours are the fused head, an exact token-weighted validation loss (Transformers weighs rows),
the optimizer, and the folder.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rorchat.errors import UsageError, did_you_mean
from rorchat.evaluation.loss import Loss, dataset_loss
from rorchat.inference.engine import ChatModel
from rorchat.tokenizer import token_bytes
from rorchat.training.callbacks import Metrics, Samples
from rorchat.training.optimizer import ADAMW_BETAS, OPTIMIZERS, build_optimizer

COOLDOWN_SCHEDULE = "warmup_stable_decay"


def best_precision() -> dict[str, bool]:
    """bf16 or fp16, whichever the device computes fast, or neither.

    bf16 from compute capability 8.0, fp16 with a loss scale below (a T4 only emulates bf16), and on a CPU bf16 where it
    has matrix units for it (AMX), else float32.
    """
    if torch.cuda.is_available():
        modern = torch.cuda.get_device_capability()[0] >= 8
        return {"bf16": modern, "fp16": not modern}
    return {"bf16": torch.cpu._is_amx_tile_supported(), "fp16": False}


def use_all_cores() -> None:
    """Takes back the single thread that `accelerate launch` gives a process on a CPU.

    It sets OMP_NUM_THREADS=1 unless told otherwise (accelerate 1.15, commands/launch.py), which halves the speed of two
    cores and says nothing. Any other number is taken as meant.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1" and not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@dataclass
class OptimizationArguments:
    """How a stage steps; the rest is the Trainer's."""

    #: Settings of Transformers that would have no effect here, and why.
    DECIDED: ClassVar[dict[str, str]] = {
        "optim": "the optimizer is chosen by `optimizer`: adamw or muon",
        "optim_args": "the optimizer is chosen by `optimizer`: adamw or muon",
        "adam_beta1": f"AdamW's betas are {ADAMW_BETAS}",
        "adam_beta2": f"AdamW's betas are {ADAMW_BETAS}",
        "adam_epsilon": "AdamW's epsilon is 1e-8",
        "train_sampling_strategy": "the order of rows is the data's own, see `data_seed`",
        "remove_unused_columns": "rows hold nothing but what the model reads",
        "logging_nan_inf_filter": "a NaN is logged as one",
        "include_num_input_tokens_seen": "tokens are counted by the data, in metrics.jsonl",
    }

    optimizer: str = field(
        default="adamw", metadata={"help": "adamw, or muon on the matrices with adamw for all else."}
    )
    matrix_learning_rate: float = field(default=5e-3, metadata={"help": "Muon's; learning_rate is AdamW's."})
    cooldown_share: float = field(
        default=0.7, metadata={"help": f"Share of the steps in which {COOLDOWN_SCHEDULE} falls to 0."}
    )
    sample_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Prompts whose answers go to samples.jsonl, before and after."}
    )

    def check_optimization(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(
                f"No optimizer {self.optimizer!r}.{did_you_mean(self.optimizer, OPTIMIZERS)} "
                f"Known: {', '.join(OPTIMIZERS)}."
            )
        if not 0 <= self.cooldown_share <= 1:
            raise UsageError(f"cooldown_share is {self.cooldown_share}: it must lie between 0 and 1.")

    def check_devices(self) -> None:
        """Raises UsageError where one process sees several GPUs: the Trainer would split its batches among them."""
        if self.n_gpu > 1:
            raise UsageError(
                f"One process sees {self.n_gpu} GPUs. Launch one process each, accelerate launch --num_processes "
                f"{self.n_gpu} ..., or show it one with CUDA_VISIBLE_DEVICES=0."
            )

    def settle(self) -> None:
        """What no stage leaves to Transformers' defaults; called before its own checks."""
        self.check_optimization()
        if not self.output_dir:
            raise UsageError("No output folder: give --output_dir runs/my-run")
        if self.bf16 is None and not self.fp16:
            precision = best_precision() if not self.use_cpu else {"bf16": False, "fp16": False}
            self.bf16, self.fp16 = precision["bf16"], precision["fp16"]
        use_all_cores()
        self.dataloader_pin_memory = torch.cuda.is_available()  # else torch warns at every start
        self.train_sampling_strategy = "sequential"  # the order is the data's own
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False  # it would log NaN as 0
        self.include_num_input_tokens_seen = "no"  # ours are counted by the data


class StageTrainer(Trainer):
    """A Trainer with rorchat's loss, validation, optimizer and logs; mixed into TRL's trainers as well.

    `begin_stage` gives it what the constructors of Transformers and TRL have no place for.
    """

    def begin_stage(
        self,
        chat: ChatModel,
        folder: Path,
        tokens_after: Callable[[int], int],
        speak: Callable[[Sequence[str]], list[str]],
    ) -> None:
        """Attaches the logs and what evaluation needs.

        Args:
            tokens_after: tokens read after so many steps, over all processes.
            speak: the model's words for each sample prompt.
        """
        self.chat, self.tokens_after = chat, tokens_after
        # The loss shifts labels inside, so position 0 is no target; for GPT-2 transformers 5.23 counts it all the same,
        # and a row of T tokens would be divided by T instead of T - 1.
        self._loss_shifts_labels = True
        self.token_bytes = torch.tensor(token_bytes(chat.tokenizer))
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(Metrics(folder, tokens_after))
        self.add_callback(Samples(folder, self.args.sample_prompts, speak))
        logging.getLogger("transformers.trainer").setLevel(logging.ERROR)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = build_optimizer(
                self.model,
                self.args.optimizer,
                learning_rate=self.args.learning_rate,
                matrix_learning_rate=self.args.matrix_learning_rate,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.args.lr_scheduler_type == COOLDOWN_SCHEDULE and not self.args.lr_scheduler_kwargs:
            cooldown = round(self.args.cooldown_share * num_training_steps)
            self.args.lr_scheduler_kwargs = {"num_decay_steps": cooldown, "decay_type": "linear", "min_lr_ratio": 0.0}
        return super().create_scheduler(num_training_steps, optimizer)

    def floating_point_ops(self, inputs) -> int:
        return 0  # the Trainer walks all modules for this each micro-step; tokens are what we count

    def _get_learning_rate(self):
        # of AdamW's group, which is the last one: the first one's, which the Trainer takes, may be Muon's
        return self.optimizer.param_groups[-1]["lr"]

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        # a pickle that nobody reads, with the Hub token in clear
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def validation_loss(self) -> dict[str, Loss]:
        """The loss over each validation set, every process measuring its part of the rows."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        losses = {}
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for name, rows in sets.items():
            own = [rows[index] for index in range(rank, len(rows), world)]
            with self.accelerator.autocast():
                part = dataset_loss(
                    model, own, self.data_collator, self.token_bytes, self.args.per_device_eval_batch_size
                )
            sums = torch.tensor([[part.nats, part.tokens, part.text_nats, part.utf8_bytes]], dtype=torch.float64)
            nats, tokens, text_nats, utf8_bytes = self.accelerator.gather(sums.to(self.args.device)).sum(0).tolist()
            losses[name] = Loss(nats, int(tokens), text_nats, int(utf8_bytes))
        model.train(was_training)
        return losses

    def final_metrics(self) -> dict[str, float]:
        """The validation metrics after the last step: those just logged, or measured now."""
        last = self.state.log_history[-2:]
        for record in last:
            if record["step"] == self.state.global_step and "eval_loss" in record:
                return {key: value for key, value in record.items() if key.startswith("eval_")}
        return self.evaluate()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Validation loss in nats per token, token-weighted, and bits per byte; per source where there are several."""
        started = time.monotonic()
        losses = self.validation_loss()
        total = sum(losses.values(), Loss())
        metrics = {"eval_loss": total.per_token, "eval_bits_per_byte": total.bits_per_byte, "eval_tokens": total.tokens}
        if len(losses) > 1:
            for name, loss in losses.items():
                metrics |= {f"eval_{name}_loss": loss.per_token, f"eval_{name}_bits_per_byte": loss.bits_per_byte}
        metrics["eval_seconds"] = round(time.monotonic() - started, 2)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
