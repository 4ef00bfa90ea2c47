"""What our trainers share over Transformers' own: arguments, loss, evaluation, optimizer, metrics.

The loop is the Trainer's. Ours are the fused head, an exact token-weighted validation loss (Transformers weighs rows),
the optimizer, and the folder.
"""

import functools
import importlib.util
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from accelerate.utils import DistributedType
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy

from rorchat.device import get_peak_flops
from rorchat.errors import UsageError, did_you_mean
from rorchat.evaluation.loss import Loss, compute_dataset_loss
from rorchat.inference.engine import ChatModel
from rorchat.jsonl import append_json_line
from rorchat.mixture.collators import collate_padded
from rorchat.model import flops_per_token
from rorchat.tokenizer import token_bytes
from rorchat.training.base_loss import forgetting_of
from rorchat.training.callbacks.divergence import DivergenceCallback
from rorchat.training.callbacks.metrics import MetricsCallback, Utilization
from rorchat.training.callbacks.samples import SamplesCallback
from rorchat.training.checkpointing.checkpoint import KEPT
from rorchat.training.checkpointing.trainer_mixin import CheckpointMixin
from rorchat.training.distributed import check_sharding, gather_model, use_gloo_on_cpu
from rorchat.training.oom_recovery import OOMRecoveryMixin
from rorchat.training.optim import ADAMW_BETAS, OPTIMIZERS, build_optimizer
from rorchat.training.runtime import best_precision, keep_freed_memory, use_all_cores

COOLDOWN_SCHEDULE, COSINE_SCHEDULE = "warmup_stable_decay", "cosine_with_min_lr"
COSINE_FLOOR = 0.1  # of the learning rate, as GPT-3 and nanoGPT have it
NOT_NEGATIVE = (
    "learning_rate", "matrix_learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "sample_steps",
    "price_per_hour", "save_steps", "eval_steps", "logging_steps",
)  # fmt: skip
#: The trackers that are tested, and the packages any of which serves one.
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}


def trackers(report_to: str | list[str] | None) -> list[str]:
    """The trackers that a run reports to, from one name, several with commas, or a list; "none" is none.

    Raises:
        UsageError: a tracker that Transformers does not know, or whose package is not installed.
    """
    names = report_to.split(",") if isinstance(report_to, str) else report_to or []
    names = [name.strip() for name in names if name.strip() != "none"]
    for name in names:
        if name not in (*INTEGRATION_TO_CALLBACK, "all"):
            known = (*TRACKERS, *(known for known in INTEGRATION_TO_CALLBACK if known not in TRACKERS))
            raise UsageError(f"report_to: no tracker {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
        packages = TRACKERS.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise UsageError(f"report_to {name} needs a package that is not installed: pip install {packages[0]}")
    return names


@dataclass
class OptimizationArguments:
    """How a stage steps; the rest is the Trainer's."""

    #: Settings of Transformers that would have no effect here, and why.
    UNSUPPORTED_ARGS: ClassVar[dict[str, str]] = {
        "optim": "the optimizer is chosen by `optimizer`: adamw, adamw_8bit or muon",
        "optim_args": "the optimizer is chosen by `optimizer`: adamw, adamw_8bit or muon",
        "adam_beta1": f"AdamW's betas are {ADAMW_BETAS}",
        "adam_beta2": f"AdamW's betas are {ADAMW_BETAS}",
        "adam_epsilon": "AdamW's epsilon is 1e-8",
        "train_sampling_strategy": "the order of rows is the data's own, see `data_seed`",
        "remove_unused_columns": "rows hold nothing but what the model reads",
        "logging_nan_inf_filter": "a NaN is logged as one",
        "ddp_find_unused_parameters": "every parameter is used",
        "accelerator_config": "batches come as the data has them, and are copied while the device computes",
        "average_tokens_across_devices": "every token counts the same, on whatever process",
        "auto_find_batch_size": "micro-batches are halved by themselves where memory runs out",
        "load_best_model_at_end": "the best stays as a checkpoint, `rorchat checkpoint list` and `export` have it",
        "metric_for_best_model": "the best checkpoint is that with the lowest validation loss",
        "save_only_model": "a checkpoint is to go on from; `rorchat checkpoint export` takes the model out",
        "restore_callback_states_from_checkpoint": "it would bring back that a run was to stop",
        "resume_from_checkpoint": "the same command goes on by itself",
        "enable_jit_checkpoint": "SIGTERM saves by itself, at the end of a step",
        "push_to_hub": "`rorchat push` verifies and pushes; `mirror` copies checkpoints",
        "ignore_data_skip": "a run goes on behind the rows that it has read",
        "activation_offloading": "`gradient_checkpointing` saves that memory",
        "torch_empty_cache_steps": "a step of ours leaves nothing that the next one does not need",
        "include_num_input_tokens_seen": "tokens are counted by the data, in metrics.jsonl",
    }

    optimizer: str = field(
        default="adamw", metadata={"help": "adamw, adamw_8bit, or muon on the matrices with adamw for all else."}
    )
    matrix_learning_rate: float = field(
        default=6e-3, metadata={"help": "Muon's; learning_rate is AdamW's, the embedding's ten times that."}
    )
    cooldown_share: float = field(
        default=0.7, metadata={"help": f"Share of the steps in which {COOLDOWN_SCHEDULE} falls to 0."}
    )
    sample_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Prompts whose answers go to samples.jsonl, before and after."}
    )
    sample_steps: int = field(default=0, metadata={"help": "Samples every so many steps as well; 0: before and after."})
    price_per_hour: float = field(
        default=0.0, metadata={"help": "Dollars an hour of the whole machine: shows and logs what the run has cost."}
    )
    base_text: str | None = field(
        default=None,
        metadata={
            "help": "Text on which forgetting is measured, before and after: a token store or a source; default: what "
            "the pretraining behind the model held out."
        },
    )

    weights_only: bool = field(
        default=False,
        metadata={"help": "Where nothing else is left, or the optimizer is to be another: go on from weights alone."},
    )
    mirror: str | None = field(
        default=None, metadata={"help": "A folder (Drive) or Hub id that gets every checkpoint, and to go on from."}
    )

    # fields of Transformers and TRL with other defaults: a stage's class names this one before theirs
    lr_scheduler_type: str = COOLDOWN_SCHEDULE
    gradient_checkpointing: bool = False
    bf16: bool | None = None
    save_total_limit: int = 2
    report_to: str = "none"
    disable_tqdm: bool = True

    @property
    def on_gpu(self) -> bool:
        """Whether training will be on a CUDA device; known before Transformers sets one up."""
        return torch.cuda.is_available() and not self.use_cpu

    def check_optimization(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(
                f"No optimizer {self.optimizer!r}.{did_you_mean(self.optimizer, OPTIMIZERS)} "
                f"Known: {', '.join(OPTIMIZERS)}."
            )
        if not 0 <= self.cooldown_share <= 1:
            raise UsageError(f"cooldown_share is {self.cooldown_share}: it must lie between 0 and 1.")
        for name in NOT_NEGATIVE:
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}: give 0 or a positive number.")
        for name in ("seed", "data_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**32:
                raise UsageError(f"{name} is {getattr(self, name)}: give a number from 0 to 2^32 - 1.")
        if self.save_total_limit is not None and self.save_total_limit < KEPT:
            raise UsageError(
                f"save_total_limit is {self.save_total_limit}: give {KEPT} or more, for the newest "
                "checkpoint may be the one that a disk damages."
            )
        if self.mirror and self.save_strategy == SaveStrategy.NO:
            raise UsageError("mirror copies checkpoints, and save_strategy is no: leave one of the two out.")
        if self.max_steps < -1 or self.max_steps == 0:
            raise UsageError(f"max_steps is {self.max_steps}: give a positive number, or leave it out.")

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
        self.report_to = trackers(self.report_to)
        if not self.output_dir:
            raise UsageError("No output folder: give --output_dir runs/my-run")
        if self.bf16 is None and not self.fp16:
            precision = best_precision(self.on_gpu)
            self.bf16, self.fp16 = precision["bf16"], precision["fp16"]
        if self.fp16 and not self.on_gpu:
            raise UsageError("fp16 needs a GPU: on a CPU leave the precision out, or give --bf16 true.")
        if self.bf16 and not self.on_gpu:
            self.use_cpu = True  # else transformers 5.23 asks for a GPU that computes bf16
        check_sharding(self)
        use_gloo_on_cpu()
        self.ddp_find_unused_parameters = False  # there are none; looking for them walks the graph in each step
        use_all_cores()
        keep_freed_memory()
        self.dataloader_pin_memory = self.on_gpu  # else torch warns at every start
        if self.on_gpu and self.accelerator_config is None:
            self.accelerator_config = {"non_blocking": True}  # a pinned batch is copied while the device computes
        self.train_sampling_strategy = "sequential"  # the order is the data's own
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False  # it would log NaN as 0
        self.include_num_input_tokens_seen = "no"  # ours are counted by the data


class StageTrainer(OOMRecoveryMixin, CheckpointMixin):
    """A Trainer with rorchat's loss, validation, optimizer and logs; mixed into TRL's trainers as well.

    `begin_stage` gives it what the constructors of Transformers and TRL have no place for.
    """

    stopped = ""  # why training ended before its last step, where it did so by itself

    def begin_stage(
        self,
        chat: ChatModel,
        folder: Path,
        tokens_after: Callable[[int], int],
        speak: Callable[[Sequence[str]], list[str]],
        mixture: Callable[[int, int], dict[str, float]] | None = None,
        row_tokens: int | None = None,
    ) -> None:
        """Attaches the logs and what evaluation needs.

        Args:
            tokens_after: tokens read after so many steps, over all processes.
            speak: the model's words for each sample prompt.
            mixture: the share of every source in the rows of the steps from one to another.
            row_tokens: tokens of every row, all of which go through the head; without it there is no MFU.
        """
        self.chat, self.tokens_after = chat, tokens_after
        # The loss shifts labels inside, so position 0 is no target; for GPT-2 transformers 5.23 counts it all the same,
        # and a row of T tokens would be divided by T instead of T - 1.
        self._loss_shifts_labels = True
        self.token_bytes = torch.tensor(token_bytes(chat.tokenizer))
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        known_device = self.args.device.type in ("cuda", "cpu")  # of Apple's GPUs neither table nor measure knows
        measure = functools.partial(self._utilization, row_tokens) if row_tokens and known_device else None
        self.meter = MetricsCallback(folder, tokens_after, mixture, self.args.price_per_hour, measure)
        self.watch = DivergenceCallback(self.meter, self.mend)
        self.add_callback(self.watch)  # first: a step that diverged is not logged as any other
        self.add_callback(self.meter)
        self.forgetting = forgetting_of(self, self.args, chat.n_positions)
        if self.forgetting:
            self.add_callback(self.forgetting)
        self.attend(folder)
        self.remember(folder)
        self.add_callback(SamplesCallback(folder, self._prompts(), speak, self.meter))
        for name in ("trainer", "trainer_utils"):  # what is compared there on resuming, `Run` compares better
            logging.getLogger(f"transformers.{name}").setLevel(logging.ERROR)

    def _utilization(self, row_tokens: int) -> Utilization:
        precision = "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32"
        on_gpu = self.args.device.type == "cuda"
        with torch.random.fork_rng([self.args.device] if on_gpu else []):  # a peak is measured on random numbers
            peak, how = get_peak_flops(precision, on_gpu)
        if on_gpu and how == "measured":
            torch.cuda.reset_peak_memory_stats()  # the memory that the measurement held is not the run's
        work = flops_per_token(self.model.config, self.model.config.vocab_size, row_tokens)
        return Utilization(work, peak * self.accelerator.num_processes, how)

    def _prompts(self) -> list[str]:
        """The sample prompts; none where one process has only a part of the parameters and cannot speak alone."""
        prompts = self.args.sample_prompts
        if prompts and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            if self.is_world_process_zero():
                print("no samples: the parameters are spread over the processes", file=sys.stderr)  # noqa: T201
            return []
        return prompts

    def log(self, logs, start_time=None):
        super().log(self.meter.completed(logs, self.state.global_step), start_time)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = build_optimizer(
                self.model,
                self.args.optimizer,
                learning_rate=self.args.learning_rate,
                matrix_learning_rate=self.args.matrix_learning_rate,
                weight_decay=self.args.weight_decay,
                scaled=self.args.fp16,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.args.lr_scheduler_type == COOLDOWN_SCHEDULE and not self.args.lr_scheduler_kwargs:
            # not before the warm-up has ended: `get_wsd_schedule` would jump down to where the cooldown should be
            after_warmup = num_training_steps - self.args.get_warmup_steps(num_training_steps)
            cooldown = min(round(self.args.cooldown_share * num_training_steps), after_warmup)
            self.args.lr_scheduler_kwargs = {"num_decay_steps": cooldown, "decay_type": "linear", "min_lr_ratio": 0.0}
        elif self.args.lr_scheduler_type == COSINE_SCHEDULE and not self.args.lr_scheduler_kwargs:
            self.args.lr_scheduler_kwargs = {"min_lr_rate": COSINE_FLOOR}
        return super().create_scheduler(num_training_steps, optimizer)

    # The Trainer's own versions of the next three serve every model and device, which a step of milliseconds feels
    # (scripts/bench, work "overhead"): modules are walked to set what is set, parameters to be found again, packages
    # looked for on the disk.

    def floating_point_ops(self, inputs) -> int:
        return 0  # tokens are what we count

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.see(self.state.global_step + 1, loss)
        return loss

    def micro_step(self, model, inputs, num_items_in_batch):
        if not self._plain or num_items_in_batch is None:
            return super().micro_step(model, inputs, num_items_in_batch)
        if not model.training:
            model.train()
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        loss.backward()
        return loss.detach()

    def ran_out(self, step: int, rows: int) -> None:
        accumulated = self.args.gradient_accumulation_steps * -(-self.args.per_device_train_batch_size // rows)
        found = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
        record = {"step": step, "event": "out of memory", "tokens": self.tokens_after(step - 1)} | found
        append_json_line(self.meter.path, record | self.meter.spent())
        said = (
            f"Out of memory at step {step}: it is done again, and all others, with {rows} rows at a time, {accumulated}"
        )
        tqdm.write(f"{said} times a step.", file=sys.stderr)

    def _clip_grad_norm(self, model):
        if not self._plain:
            return super()._clip_grad_norm(model)
        return torch.nn.utils.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.watch.see_norm(grad_norm)
        return grad_norm

    @functools.cached_property
    def _plain(self) -> bool:
        """Whether gradients are whole and unscaled: one process or DistributedDataParallel, and no fp16."""
        kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        return self.accelerator.distributed_type in kinds and self.accelerator.scaler is None

    @functools.cached_property
    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _get_learning_rate(self):
        # of AdamW's group, which is the last one: the first one's, which the Trainer takes, may be Muon's
        groups = self.optimizer.param_groups
        self.meter.matrix_learning_rate = next((group["lr"] for group in groups if group.get("use_muon")), None)
        return groups[-1]["lr"]

    def _save(self, output_dir=None, state_dict=None):
        if self.adapter:
            self.adapter.save(output_dir, self.processing_class)
            return
        super()._save(output_dir, state_dict)
        # a pickle that nobody reads, with the Hub token in clear
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: TRL's would lie in the run's folder after every save. The Hub's is `rorchat.hub`'s."""

    def validation_loss(self) -> dict[str, Loss]:
        """The loss over each validation set, every process measuring its part of the rows."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        return self.loss_over(sets)

    def loss_over(self, sets: dict[str, Dataset]) -> dict[str, Loss]:
        """The loss over each of several sets of rows, every process measuring its part of them."""
        model = gather_model(self.accelerator.unwrap_model(self.model))
        was_training = model.training
        model.eval()
        losses = {}
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        collate = functools.partial(collate_padded, pad_id=self.chat.tokenizer.pad_token_id)
        for name, rows in sets.items():
            own = Subset(rows, range(rank, len(rows), world))
            with self.accelerator.autocast():
                part = compute_dataset_loss(model, own, collate, self.token_bytes, self.args.per_device_eval_batch_size)
            sums = torch.tensor([[part.nats, part.tokens, part.text_nats, part.utf8_bytes]], dtype=torch.float64)
            if world > 1:  # alone it stays on the host: Apple's GPUs have no float64
                sums = self.accelerator.gather(sums.to(self.args.device))
            nats, tokens, text_nats, utf8_bytes = sums.sum(0).tolist()
            losses[name] = Loss(nats, int(tokens), text_nats, int(utf8_bytes))
        model.train(was_training)
        return losses

    def final_metrics(self) -> dict[str, float]:
        """The validation metrics after the last step: those just logged, or measured now."""
        for record in self.state.log_history[-2:]:
            if record["step"] == self.state.global_step and "eval_loss" in record:
                return {key: value for key, value in record.items() if key.startswith("eval_")}
        return self.evaluate()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Validation loss in nats per token, token-weighted, and bits per byte; per source where there are several.

        Raises:
            ValueError: another dataset or prefix was given: `rorchat.evaluation.loss.compute_dataset_loss` serves any.
        """
        if eval_dataset is not None or metric_key_prefix != "eval":
            raise ValueError("This measures the run's own validation set, as eval_...; no other was built in.")
        started = time.monotonic()
        losses = self.validation_loss()
        total = sum(losses.values(), Loss())
        self._validated = self.state.global_step, total.per_token
        metrics = {"eval_loss": total.per_token, "eval_bits_per_byte": total.bits_per_byte, "eval_tokens": total.tokens}
        if len(losses) > 1:
            for name, loss in losses.items():
                metrics |= {f"eval_{name}_loss": loss.per_token, f"eval_{name}_bits_per_byte": loss.bits_per_byte}
        metrics["eval_seconds"] = round(time.monotonic() - started, 2)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
