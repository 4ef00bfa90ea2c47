"""The base class of the trainers of all stages: construction, loss, validation, optimizer, logs.

The training loop is that of Transformers' Trainer. `StageTrainer` is mixed into it and into TRL's trainers:

    PretrainTrainer(StageTrainer)                     over transformers.Trainer
    ChatSFTTrainer(ChatStageTrainer, SFTTrainer)         likewise for DPO and GRPO
    StageTrainer(OOMRecoveryMixin, CheckpointMixin)
"""

import functools
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rorchat.device import get_peak_flops, measure_flops
from rorchat.evaluation.loss import Loss, Rows, compute_dataset_loss
from rorchat.files import as_number
from rorchat.inference.engine import ChatModel, generate_replies
from rorchat.mixture.collators import collate_padded
from rorchat.model import Shape, flops_per_token
from rorchat.precision import choose_precision, measure_precisions
from rorchat.sources.base import RowStats
from rorchat.tokenizer import token_bytes
from rorchat.training.base_loss import create_base_loss_callback
from rorchat.training.callbacks.divergence import DivergenceCallback
from rorchat.training.callbacks.metrics import MetricsCallback, Utilization
from rorchat.training.callbacks.samples import SamplesCallback
from rorchat.training.checkpointing.trainer_mixin import CheckpointMixin
from rorchat.training.context import StageContext
from rorchat.training.distributed import gather_model
from rorchat.training.oom_recovery import OOMRecoveryMixin
from rorchat.training.optim import build_optimizer
from rorchat.training.option_checks import COOLDOWN_SCHEDULE, COSINE_SCHEDULE, check_length
from rorchat.training.run_notes import warn_about_kept_rows, warn_about_steps

COSINE_FLOOR = 0.1  # final share of the learning rate, as in GPT-3 and nanoGPT


class StageTrainer(OOMRecoveryMixin, CheckpointMixin):
    """A Trainer with rorchat's loss, validation, optimizer, checkpoints and logs.

    Args:
        context: the context of the run: resume plan, adapter, mirror and metadata.
        mixture_shares: takes two steps and returns the share of every source in the rows read between them; None
            without a mixture.
        row_tokens: tokens per row, if the vocabulary head is applied to all of them. If None, MFU is not reported.
    """

    stop_reason = ""  # why training stopped before the last step
    eval_dataset: Rows | dict[str, Rows]

    def __init__(
        self,
        *args,
        context: StageContext,
        mixture_shares: Callable[[int, int], dict[str, float]] | None = None,
        row_tokens: int | None = None,
        **kwargs,
    ):
        super().__init__(
            *args,
            resume=context.resume,
            run_metadata={**context.resume.metadata, **context.details},
            adapter=context.adapter,
            mirror=context.mirror,
            **kwargs,
        )
        self.context, folder = context, Path(self.args.output_dir)
        self._matrix_learning_rate: float | None = None
        self.chat = ChatModel(self.model, self.processing_class)
        self.token_bytes = torch.tensor(token_bytes(self.processing_class))
        # The loss shifts labels, so that position 0 is not a target. Transformers 5.23 counts it for GPT-2 and would
        # divide the loss of a row of T tokens by T instead of T - 1.
        self._loss_shifts_labels = True
        measure_utilization = None
        if row_tokens and self.args.device.type in ("cuda", "cpu"):  # not on Apple's GPUs, whose peak is unknown
            measure_utilization = functools.partial(self._measure_utilization, row_tokens)
        self.metrics = MetricsCallback(
            folder,
            self.tokens_after,
            mixture_shares,
            self.args.price_per_hour,
            measure_utilization,
            context.start_events(),
        )
        self.divergence = DivergenceCallback(self.metrics, self.handle_divergence)
        self.base_loss = create_base_loss_callback(self, self.args, self.chat.n_positions)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(self.divergence)  # before the metrics, so that a diverged step is not logged
        self.add_callback(self.metrics)
        if self.base_loss:
            self.add_callback(self.base_loss)
        for callback in self.checkpoint_callbacks():
            self.add_callback(callback)
        prompts = self._sample_prompts()
        self.add_callback(SamplesCallback(folder, prompts, self.generate_samples, self.metrics, self.signals))

    @abstractmethod
    def tokens_after(self, step: int) -> int:
        """The number of tokens read in the first `step` steps, summed over all processes."""

    def final_notes(self) -> list[str]:
        """What the user should know about the result after the last evaluation, one line each."""
        return []

    @abstractmethod
    def generate_samples(self, prompts: Sequence[str]) -> list[str]:
        """One text for each sample prompt."""

    def _measure_utilization(self, row_tokens: int, repeat: bool = False) -> Utilization:
        """The FLOPs of a token and the peak of the devices; `repeat` measures a peak that is not known once more."""
        device, on_gpu = self.args.device.type, self.args.device.type == "cuda"
        width = self.model.config.n_embd
        # a slower precision, if one was asked for, does not make the machine slower
        precisions = {self.args.precision, choose_precision(measure_precisions(device, width))}
        with torch.random.fork_rng([self.args.device] if on_gpu else []):  # the measurement uses random numbers
            peak, origin, precision = max((*get_peak_flops(name, on_gpu), name) for name in precisions)
            if repeat and origin == "measured":
                peak = max(peak, measure_flops(precision, device))
        if on_gpu and origin == "measured":
            torch.cuda.reset_peak_memory_stats()  # exclude the memory of the measurement
        config = self.model.config
        shape = Shape(config.n_layer, config.n_head, config.n_embd)
        flops = flops_per_token(shape, config.vocab_size, row_tokens)
        return Utilization(flops, peak * self.accelerator.num_processes, origin)

    def _sample_prompts(self) -> list[str]:
        """The sample prompts; empty if the parameters are sharded, because only the main process generates."""
        prompts = self.args.sample_prompts or []
        if prompts and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            if self.is_world_process_zero():
                print("no samples: the parameters are sharded over the processes", file=sys.stderr)  # noqa: T201
            return []
        return prompts

    # Optimizer and schedule

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
        # known only now if it follows from num_train_epochs
        check_length(num_training_steps, self.args.warmup_steps, self.args.lr_scheduler_kwargs)
        if self.args.lr_scheduler_type == COOLDOWN_SCHEDULE and not self.args.lr_scheduler_kwargs:
            # limited to the steps after the warm-up; otherwise `get_wsd_schedule` would jump at the end of the warm-up
            after_warmup = num_training_steps - self.args.get_warmup_steps(num_training_steps)
            cooldown = min(round(self.args.cooldown_share * num_training_steps), after_warmup)
            self.args.lr_scheduler_kwargs = {"num_decay_steps": cooldown, "decay_type": "linear", "min_lr_ratio": 0.0}
        elif self.args.lr_scheduler_type == COSINE_SCHEDULE and not self.args.lr_scheduler_kwargs:
            self.args.lr_scheduler_kwargs = {"min_lr_rate": COSINE_FLOOR}
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_learning_rate(self):
        # called before the scheduler advances, so the logged rates are those of this step
        groups = self.optimizer.param_groups
        self._matrix_learning_rate = next((group["lr"] for group in groups if group.get("use_muon")), None)
        return groups[-1]["lr"]  # AdamW's rate; the Trainer reads the first group, which may be Muon's

    # The training step

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.divergence.record_loss(self.state.global_step + 1, loss)
        return loss

    # The Trainer's versions of the following methods support every model and device: they traverse modules and
    # parameters, and look for installed packages. For a small model, this takes a noticeable part of a step
    # (scripts/bench, work "overhead").

    def forward_backward(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        if not self._is_plain or num_items_in_batch is None:
            return super().forward_backward(model, inputs, num_items_in_batch)
        if not model.training:
            model.train()
        with self.compute_loss_context_manager():
            prepared = self._prepare_inputs(inputs)
            # a pair only with `return_outputs`
            loss: torch.Tensor = self.compute_loss(  # type: ignore[assignment]
                model, prepared, num_items_in_batch=num_items_in_batch
            )
        loss.backward()
        return loss.detach()

    @functools.cached_property
    def _is_plain(self) -> bool:
        """Whether gradients are neither sharded nor scaled: one process or DistributedDataParallel, without fp16."""
        kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        return self.accelerator.distributed_type in kinds and self.accelerator.scaler is None

    @functools.cached_property
    def _trainable_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _clip_grad_norm(self, model):
        if not self._is_plain:
            return super()._clip_grad_norm(model)
        return torch.nn.utils.clip_grad_norm_(self._trainable_parameters, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.divergence.record_grad_norm(grad_norm)
        return grad_norm

    def floating_point_ops(self, inputs) -> int:
        return 0  # metrics.jsonl has tokens and MFU instead

    def halve_micro_batch(self) -> None:
        super().halve_micro_batch()
        self.discard_step_metrics()
        step, rows = self.state.global_step + 1, self.micro_batch_rows
        accumulation = self.args.gradient_accumulation_steps * -(-self.args.per_device_train_batch_size // rows)
        self.metrics.record_event(
            step,
            "out of memory",
            tokens=self.tokens_after(step - 1),  # this step is repeated
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
        )
        tqdm.write(
            f"Out of memory at step {step}. It is repeated, like all later steps, with {accumulation} micro-batches of "
            f"{rows} rows.",
            file=sys.stderr,
        )

    # Logs and files

    def log(self, logs, start_time=None):
        super().log(self.complete_logs(logs), start_time)

    def complete_logs(self, logs: dict[str, float]) -> dict[str, float]:
        """The Trainer's logs with rorchat's derived values, see docs/metrics.md."""
        return self.metrics.complete(logs, self.state.global_step, self._matrix_learning_rate)

    def _save(self, output_dir=None, state_dict=None):
        if self.adapter:
            self.adapter.save(output_dir, self.processing_class)
            return
        super()._save(output_dir, state_dict)
        # delete the pickled arguments, which contain the Hub token in clear text
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def create_model_card(self, *args, **kwargs) -> None:
        """Does nothing: TRL would write its card after every save. `rorchat push` writes the model card."""

    # Validation

    def loss_on(self, datasets: Mapping[str, Rows]) -> dict[str, Loss]:
        """The loss on each dataset. Every process computes it on its share of the rows, and the sums are gathered."""
        model = gather_model(self.accelerator.unwrap_model(self.model))
        was_training = model.training
        model.eval()
        losses = {}
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        collate = functools.partial(collate_padded, pad_id=self.processing_class.pad_token_id)
        for name, rows in datasets.items():
            # declared for a Dataset of torch, but any rows by number will do
            local: Subset[dict] = Subset(rows, range(rank, len(rows), world))  # type: ignore[arg-type]
            with self.accelerator.autocast():
                part = compute_dataset_loss(
                    model, local, collate, self.token_bytes, self.args.per_device_eval_batch_size
                )
            sums = torch.tensor([[part.nats, part.tokens, part.text_nats, part.utf8_bytes]], dtype=torch.float64)
            if world > 1:  # otherwise stay on the CPU, because Apple's GPUs have no float64
                sums = self.accelerator.gather(sums.to(self.args.device))
            nats, tokens, text_nats, utf8_bytes = sums.sum(0).tolist()
            losses[name] = Loss(nats, int(tokens), text_nats, int(utf8_bytes))
        model.train(was_training)
        return losses

    def final_metrics(self) -> dict[str, float]:
        """The validation metrics after the last step: those already logged for this step, or else a new evaluation."""
        for record in self.state.log_history[-2:]:
            if record["step"] == self.state.global_step and "eval_loss" in record:
                return {key: as_number(value) for key, value in record.items() if key.startswith("eval_")}
        return self.evaluate()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Computes the validation loss in nats per token and in bits per byte, in total and for each source.

        Raises:
            ValueError: a dataset or prefix was given. Use `rorchat.evaluation.loss.compute_dataset_loss` instead.
        """
        if eval_dataset is not None or metric_key_prefix != "eval":
            raise ValueError("This evaluates the validation split of the run; use compute_dataset_loss for other data.")
        started = time.monotonic()
        losses = self.loss_on(self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset})
        total = sum(losses.values(), Loss())
        self._validation = self.state.global_step, total.per_token
        metrics = {"eval_loss": total.per_token, "eval_bits_per_byte": total.bits_per_byte, "eval_tokens": total.tokens}
        if len(losses) > 1:
            for name, loss in losses.items():
                metrics |= {f"eval_{name}_loss": loss.per_token, f"eval_{name}_bits_per_byte": loss.bits_per_byte}
        metrics["eval_seconds"] = round(time.monotonic() - started, 2)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class ChatStageTrainer(StageTrainer):
    """The base class of the trainers of chat stages, mixed into TRL's trainers. Samples are replies to the prompts."""

    trl_state = ("_metrics", "_total_train_tokens")
    rows_per_epoch: int  # in the unit of `per_device_train_batch_size`
    batch_multiple = 1  # which `per_device_train_batch_size` must be a multiple of

    def startup_notes(self, row_stats: Sequence[RowStats]) -> list[str]:
        """What the user should know before the first step, one line each."""
        if self.args.smoke:  # too few rows and steps on purpose
            return []
        notes = (
            warn_about_kept_rows(row_stats),
            warn_about_steps(self.args, self.rows_per_epoch, self.batch_multiple),
        )
        return [note for note in notes if note]

    def generate_samples(self, prompts: Sequence[str]) -> list[str]:
        replies = generate_replies(self.chat, prompts, max_new_tokens=self.args.reply_tokens, temperature=0)
        return [reply.text for reply in replies]
