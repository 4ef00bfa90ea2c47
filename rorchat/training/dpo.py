"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) on pairs of replies, with TRL's DPOTrainer.

The default loss has an SFT term. Without it, the chosen replies lose probability as well, and a small model soon
degenerates. The log-probabilities of the reference are computed once and cached, so no second model is in memory.
rorchat encodes, batches and scores the pairs; TRL computes the losses.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import GPT2Config
from transformers.trainer_utils import IntervalStrategy
from trl import DPOConfig, DPOTrainer
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import FusedCausalLMOutput

from rorchat.adapter import is_adapter
from rorchat.chatml import encode_preferences
from rorchat.console import shows_bars
from rorchat.errors import UsageError, check_all
from rorchat.files import as_number
from rorchat.jsonl import append_json_line
from rorchat.model import Shape, count_parameters
from rorchat.rows import RejectedRow
from rorchat.sources.base import RowStats
from rorchat.training import reference_logps
from rorchat.training.arguments import StageArguments
from rorchat.training.checkpointing.checkpoint import find_storage_failure
from rorchat.training.context import StageContext
from rorchat.training.data import Split, load_split, row_lengths
from rorchat.training.distributed import any_rank, sharding_strategy
from rorchat.training.dpo_losses import LOSS_EFFECTS, RULES, check_losses
from rorchat.training.kernels.dpo_logps import patch_dpo_logps, reply_masks
from rorchat.training.kernels.lm_head_loss import patch_gelu
from rorchat.training.lora import LoraArguments
from rorchat.training.option_checks import EVAL_EFFECTS, Effect, check_rules
from rorchat.training.run_notes import warn_about_margin
from rorchat.training.sampler import count_steps, training_order
from rorchat.training.sizes import check_batch, check_row_length
from rorchat.training.smoke_test import shrink_chat_stage
from rorchat.training.stage import ChatStageTrainer
from rorchat.training.unsupported_options import DPO

NOT_COMPUTED = ("entropy", "logits/chosen", "logits/rejected")  # metrics that `score_replies` leaves at 0
PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
CHOSEN_FELL = "chosen fell"  # event in metrics.jsonl and stop reason in run.json
PAIRS, TOKENS = "pairs", "chosen_tokens"  # weights for averaging the metrics that TRL records per micro-batch
#: The default learning rate is LEARNING_RATE_AT_1M * (millions of parameters) ** -LEARNING_RATE_EXPONENT.
LEARNING_RATE_AT_1M, LEARNING_RATE_EXPONENT = 1e-4, 0.5
MIN_MARGIN_PAIRS = 50  # of a validation split whose mean margin says something


@dataclass
class DPOArguments(LoraArguments, StageArguments, DPOConfig):
    """Settings of `recipes/dpo.py`."""

    UNSUPPORTED_ARGS: ClassVar[dict[str, str]] = DPO
    EFFECTS: ClassVar[tuple[Effect, ...]] = (*StageArguments.EFFECTS, *EVAL_EFFECTS, *LOSS_EFFECTS)

    if TYPE_CHECKING:  # never None after the checks, unlike in TRL's settings
        loss_weights: list[float] = field(default_factory=list)

    model: str = field(default="", metadata={"help": "The chat model to train: folder of a run or model, or Hub id."})
    # TRL's fields with other defaults
    max_length: int | None = field(
        default=None, metadata={"help": "Maximum tokens of prompt and reply; default: the model's positions."}
    )
    beta: float = field(default=0.1, metadata={"help": "How strongly the model is kept close to the reference."})
    chosen_drop: float = field(
        default=0.5,
        metadata={"help": "Stop if chosen replies lose this many nats per token against the reference; 0: never."},
    )
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid", "sft"])
    precompute_ref_log_probs: bool = True
    learning_rate: float | None = field(  # type: ignore[assignment]  # None until the trainer chooses it
        default=None, metadata={"help": "Default: by the size of the model, 1e-4 for a million parameters."}
    )
    weight_decay: float = 0.0
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or a share of them if below 1."})
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    logging_steps: float = 10
    eval_strategy: str = "no"

    eval_columns: ClassVar[tuple[str, ...]] = PAIR_COLUMNS

    def max_row_length(self) -> int | None:
        return self.max_length

    def __post_init__(self):
        check_all(
            self.check_data,
            self._check_model,
            self.check_lora,
            self.check_stage,
            partial(check_batch, self),
            partial(check_row_length, "max_length", self.max_length, self.model),
            self._check_limits,
            partial(check_losses, self),
        )
        self.resolve_defaults()
        if sharding_strategy() == "FSDP" and is_adapter(self.model):
            raise UsageError(
                f"{self.model} is an adapter, but under FSDP TRL would load the reference without it. Give the merged "
                "model, or launch with --accelerate_config ddp."
            )
        super().__post_init__()
        self.check_devices()
        if self.smoke:
            shrink_chat_stage(self)

    def _check_model(self) -> None:
        if not self.model:
            raise UsageError("No model: give the chat model to train, as in --model runs/gpt2-chat")

    def _check_limits(self) -> None:
        check_rules(self, RULES)
        if self.chosen_drop and self.logging_strategy == IntervalStrategy.NO:
            raise UsageError(
                "chosen_drop is checked at every log line, but logging_strategy is no: use logging_strategy "
                "steps, or give --chosen_drop 0."
            )


def default_learning_rate(config: GPT2Config) -> float:
    """The default learning rate of a model of this size, rounded to two digits; see docs/training.md."""
    shape = Shape(config.n_layer, config.n_head, config.n_embd)
    parameters = count_parameters(shape, config.vocab_size, config.n_positions)
    return float(f"{LEARNING_RATE_AT_1M * (parameters / 1e6) ** -LEARNING_RATE_EXPONENT:.1e}")


def load_preferences(arguments: DPOArguments, tokenizer, max_length: int) -> Split:
    """Loads and encodes pairs, with columns `prompt_ids`, `chosen_ids` and `rejected_ids`.

    A side of a pair is the prompt with one of the replies. If it is longer than `max_length`, early messages of the
    prompt are dropped and replies are cut; see `encode_preferences`. See `load_split` for the errors.
    """

    def encode(rows: list[dict], row_stats: RowStats) -> Iterator[dict | RejectedRow]:
        for encoded in encode_preferences(tokenizer, rows, max_length):
            if isinstance(encoded, RejectedRow):
                yield encoded
                continue
            row_stats.count_cut(*encoded.cuts())
            # lists of Python integers need up to nine times the memory
            yield {name: np.array(getattr(encoded, name), np.int32) for name in PAIR_COLUMNS}

    return load_split(arguments, "preference", encode)


def collate_pairs(rows: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """Collates pairs into a batch for `score_replies`, with the reference's log-probabilities if the rows have them.

    Returns:
        `input_ids` (B, W): prompt, chosen reply and rejected reply of each pair, concatenated and right-padded.
        `group_sizes` (B, 3): the number of tokens in each of the three parts.
        `ref_chosen_logps` and `ref_rejected_logps` (B,).
    """
    parts = [[row[name] for name in PAIR_COLUMNS] for row in rows]
    pairs = [torch.tensor([token for part in pair for token in part]) for pair in parts]
    batch = {
        "input_ids": pad_sequence(pairs, batch_first=True, padding_value=pad_id),
        "group_sizes": torch.tensor([[len(part) for part in pair] for pair in parts]),
    }
    reference = {name: torch.tensor([row[name] for row in rows]) for name in REFERENCE_COLUMNS if name in rows[0]}
    return batch | reference


class ChatDPOTrainer(ChatStageTrainer, DPOTrainer):
    """DPOTrainer for encoded pairs, with one forward pass for a prompt and both replies."""

    args: DPOArguments
    train_dataset: Dataset
    _precompute_engine: Any  # DeepSpeed's, once it is needed

    def __init__(
        self,
        model,
        arguments: DPOArguments,
        tokenizer,
        train: Dataset,
        validation: Dataset,
        context: StageContext,
    ):
        if arguments.learning_rate is None:
            arguments.learning_rate = default_learning_rate(model.config)
        micro = arguments.per_device_train_batch_size
        self.rows_per_epoch = len(train)
        arguments.max_steps = count_steps(arguments, len(train))
        rows = arguments.max_steps * micro * arguments.gradient_accumulation_steps * arguments.world_size
        prompts, chosen, rejected = (row_lengths(train, name) for name in PAIR_COLUMNS)
        lengths = 2 * prompts + chosen + rejected
        order = training_order(lengths, rows, micro, arguments.data_seed)
        self._tokens_read = np.cumsum([0, *lengths[order].reshape(arguments.max_steps, -1).sum(1)])
        needed, order = np.unique(order, return_inverse=True)
        train = train.select(needed)  # each pair once, because super().__init__ scores all of them with the reference
        # mean number of tokens in a chosen reply: of the current step ("train") and of the validation split ("eval")
        self._chosen_length = {"eval": row_lengths(validation, "chosen_ids").mean()}
        patch_gelu(model)
        patch_dpo_logps(model)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            context=context,
            data_collator=partial(collate_pairs, pad_id=tokenizer.pad_token_id),
        )
        self.train_dataset = self.train_dataset.select(order)

    def startup_notes(self, row_stats: Sequence[RowStats]) -> list[str]:
        notes = super().startup_notes(row_stats)
        if "learning_rate" not in self.args.given:
            notes.append(f"learning rate {self.args.learning_rate:g}, the default for a model of this size")
        return notes

    def final_notes(self) -> list[str]:
        """A warning about the margin on the validation split, or of the last log step if that has few pairs."""
        if self.args.smoke or self.stop_reason:
            return []
        margins = {
            name: as_number(line[name])
            for line in self.state.log_history
            for name in ("rewards/margins", "eval_rewards/margins")
            if name in line
        }
        names = ["eval_rewards/margins", "rewards/margins"]
        if len(self.eval_dataset) < MIN_MARGIN_PAIRS:
            names.reverse()
        margin = next((margins[name] for name in names if name in margins), math.inf)
        assert self.args.learning_rate is not None  # the constructor has chosen it
        note = warn_about_margin(margin, self.args.learning_rate)
        return [note] if note else []

    def tokens_after(self, step: int) -> int:
        return int(self._tokens_read[step])

    def decode_row(self, row: dict) -> Iterator[str]:
        yield from self.processing_class.batch_decode([[*row["prompt_ids"], *row["chosen_ids"]]])

    # The reference

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Replaces TRL's cache (1.16): its file name is random, so resumed runs and other processes cannot find it."""
        if self.ref_model is not None:  # under FSDP
            patch_dpo_logps(self.accelerator.unwrap_model(self.ref_model))
        arguments, path = self.args, Path(self.args.output_dir) / reference_logps.FILE_NAME.format(name)
        settings = {
            "weights": self._precompute_model_hash, "ld_alpha": self.ld_alpha, "rows": batch_size,
            "processes": arguments.world_size, "device": arguments.device.type, "bf16": arguments.bf16,
            "fp16": arguments.fp16,
        }  # fmt: skip
        fingerprint = reference_logps.build_fingerprint(dataset, **settings)
        saved = reference_logps.read(path, fingerprint)
        is_missing = any_rank(saved is None)[0]
        log_probs = self._compute_reference(dataset, name, batch_size) if saved is None or is_missing else saved
        if self.is_world_process_zero():
            origin, failure = f"read from {path}", None
            if is_missing:
                origin = "computed"
                failure = find_storage_failure(lambda: reference_logps.write(path, fingerprint, log_probs))
            if failure:
                origin += f", but they could not be saved ({' '.join(str(failure).split())})"
            split = "training" if name == "train" else "validation"
            text = f"reference model: log-probabilities of {len(dataset):,} {split} pairs {origin}"
            print(text, file=sys.stderr)  # noqa: T201
        for column, values in zip(REFERENCE_COLUMNS, log_probs, strict=True):
            dataset = dataset.add_column(column, values.numpy())
        return dataset

    def _compute_reference(self, dataset: Dataset, name: str, batch_size: int) -> torch.Tensor:
        """The reference's log-probabilities (2, pairs) of chosen and rejected replies, gathered on every process."""
        model = self.ref_model or self.model  # TRL makes a `ref_model` under FSDP, where `model` is not sharded yet
        if self.ref_model is None and self.is_deepspeed_enabled:
            self._precompute_engine = self._precompute_engine or prepare_deepspeed(self.model, self.accelerator)
            model = self._precompute_engine
        workers = self.args.dataloader_num_workers
        loader = self.accelerator.prepare(
            DataLoader(dataset, batch_size, collate_fn=self.data_collator, num_workers=workers)
        )
        log_probs = []
        for batch in tqdm(loader, desc=f"reference, {name}", disable=not shows_bars()):
            sides = self.accelerator.gather_for_metrics(self.compute_ref_log_probs(model, batch))
            log_probs.append(torch.stack(sides).float().cpu())
        return torch.cat(log_probs, dim=1)

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(*_as_trl_batch(model, inputs))

    # Steps

    def _prepare_dataset(self, dataset, *_):
        """Skips TRL's tokenization: the pairs are already encoded, see `load_preferences`."""
        return dataset

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        if batches:
            counts = [_count_chosen(batch) for batch in batches]
            pairs, tokens = self._sum_over_processes(*(sum(column) for column in zip(*counts, strict=True)))
            self._chosen_length["train"] = tokens / pairs
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's losses, with an SFT term that weights all chosen tokens of a step equally.

        TRL averages the SFT term over the tokens of each micro-batch, and Trainer averages these means without weights.
        """
        mode = "train" if self.model.training else "eval"
        pairs, tokens = _count_chosen(inputs)
        share = tokens / pairs / self._chosen_length[mode]
        weights = zip(self.loss_types, self.args.loss_weights, strict=True)
        self.loss_weights = [weight * share if kind == "sft" else weight for kind, weight in weights]
        loss = super().compute_loss(*_as_trl_batch(model, inputs), return_outputs, num_items_in_batch)
        for name, count in zip((PAIRS, TOKENS), self._sum_over_processes(pairs, tokens), strict=True):
            self._metrics[mode][name].append(count)
        return loss

    def _sum_over_processes(self, *counts: int) -> list[int]:
        return self.accelerator.gather(torch.tensor([counts], device=self.args.device)).sum(0).tolist()

    # Logs

    def log(self, logs, start_time=None):
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in NOT_COMPUTED:
            metrics.pop(name, None)
        pairs, tokens = metrics.pop(PAIRS, []), metrics.pop(TOKENS, [])
        for name, values in metrics.items():
            if len(values) == len(pairs):  # one value per micro-batch; TRL would take the unweighted mean
                weights = tokens if name == "mean_token_accuracy" else pairs
                metrics[name] = [float(np.average(values, weights=weights))]
        if "loss" in logs and pairs:
            logs["chosen_change"] = metrics["rewards/chosen"][0] / self.args.beta * sum(pairs) / sum(tokens)
            self._stop_if_chosen_fell(logs["chosen_change"])
        super().log(logs, start_time)

    def _stop_if_chosen_fell(self, change: float) -> None:
        """Stops training if the chosen replies have become too unlikely: the model would soon degenerate."""
        if not self.args.chosen_drop or not change < -self.args.chosen_drop:
            return
        self.control.should_training_stop = True
        self.stop_reason, step = CHOSEN_FELL, self.state.global_step
        if self.is_world_process_zero():
            append_json_line(self.metrics.path, {"step": step, "event": CHOSEN_FELL, "chosen_change": change})
            tqdm.write(
                f"Stopped at step {step}: the chosen replies have lost {-change:.2f} nats per token compared with the "
                f"reference, more than chosen_drop {self.args.chosen_drop:g}. Lower learning_rate, raise beta, or keep "
                "an sft term in loss_type.",
                file=sys.stderr,
            )

    def evaluate(self, *args, **kwargs):
        metrics = DPOTrainer.evaluate(self, *args, **kwargs)  # metrics per pair, not per token as in the other stages
        self._validation = self.state.global_step, metrics["eval_loss"]
        return metrics


def _count_chosen(batch: dict[str, torch.Tensor]) -> tuple[int, int]:
    """The number of pairs in a batch, and of tokens in their chosen replies."""
    sizes = batch["group_sizes"]
    return len(sizes), int(sizes[:, 1].sum())


def _as_trl_batch(model, inputs: dict[str, torch.Tensor]) -> tuple[Callable, dict[str, torch.Tensor]]:
    """Wraps the model and the batch for TRL's losses (1.16), which expect all chosen sides before all rejected sides.

    The returned model ignores its arguments and scores `inputs`, in which prompts are not repeated. TRL uses only the
    masks of the returned batch.
    """
    attention_mask, completion_mask = (mask.long() for mask in reply_masks(inputs["group_sizes"]))  # (2 B, T)

    def score(**_) -> FusedCausalLMOutput:
        return model(input_ids=inputs["input_ids"], group_sizes=inputs["group_sizes"])

    batch = {"attention_mask": attention_mask, "completion_mask": completion_mask}
    batch["input_ids"] = attention_mask  # a placeholder: TRL makes labels of it, which `score` ignores
    return score, batch | {name: inputs[name] for name in REFERENCE_COLUMNS if name in inputs}
