"""Supervised fine-tuning of a chat model on packed conversations, with TRL's SFTTrainer.

rorchat encodes the conversations, because TRL lets user text become control tokens and its errors do not name the row.
Conversations are packed into rows of the context window and do not attend to each other. The loss covers the
assistant's replies and the `<|im_end|>` after them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from rorchat.chatml import encode_conversations
from rorchat.errors import UsageError, check_all
from rorchat.mixture.collators import collate_packed
from rorchat.mixture.packing import PackedRows, Sequences, pack
from rorchat.rows import RejectedRow
from rorchat.sources.base import RowStats
from rorchat.training.arguments import StageArguments
from rorchat.training.context import StageContext
from rorchat.training.data import ROWS_PER_CALL, Split, divide_by_source, load_split, row_lengths
from rorchat.training.kernels.lm_head_loss import patch_gelu, patch_lm_head_loss
from rorchat.training.lora import LoraArguments
from rorchat.training.option_checks import Effect, is_given
from rorchat.training.replay import replay_rows
from rorchat.training.sampler import count_steps
from rorchat.training.sizes import check_batch, check_row_length
from rorchat.training.smoke_test import shrink_chat_stage
from rorchat.training.stage import ChatStageTrainer
from rorchat.training.unsupported_options import SFT

MAX_TOKENS_ON_CPU = 2048  # per micro-batch; larger ones are split: larger matrix products are not faster on a CPU


@dataclass
class SFTArguments(LoraArguments, StageArguments, SFTConfig):
    """Settings of `recipes/sft.py`."""

    UNSUPPORTED_ARGS: ClassVar[dict[str, str]] = SFT
    EFFECTS: ClassVar[tuple[Effect, ...]] = (
        *StageArguments.EFFECTS,
        Effect("replay_share", "replay", is_given("a token store or a source of documents")),
    )

    model: str = field(
        default="gpt2", metadata={"help": "The model to fine-tune: folder of a run or model, or Hub id."}
    )
    replay: str | None = field(
        default=None,
        metadata={"help": "Pretraining documents to mix in: folder of a token store, or a source."},
    )
    replay_share: float = field(default=0.1, metadata={"help": "Share of the replayed tokens, from 0 to below 1."})
    # TRL's fields with other defaults
    max_length: int | None = field(
        default=None, metadata={"help": "Maximum tokens of a conversation; default: the model's positions."}
    )
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or a share of them if below 1."})
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    logging_steps: float = 20
    eval_strategy: str = "steps"
    eval_steps: float = field(default=0.25, metadata={"help": "Steps, or a share of them if below 1."})

    eval_columns: ClassVar[tuple[str, ...]] = ("input_ids",)

    def max_row_length(self) -> int | None:
        return self.max_length

    def __post_init__(self):
        check_all(
            self.check_data,
            self.check_lora,
            self.check_stage,
            partial(check_batch, self),
            partial(check_row_length, "max_length", self.max_length, self.model),
            self._check_replay,
        )
        self.resolve_defaults()
        super().__post_init__()
        self.check_devices()
        if self.smoke:
            shrink_chat_stage(self)

    def _check_replay(self) -> None:
        if not 0 <= self.replay_share < 1:
            raise UsageError(f"replay_share is {self.replay_share}: it must lie between 0 and 1.")

    def replay_source(self) -> str | None:
        return self.replay if self.replay_share else None

    def pin_sources(self, pins: Mapping[str, str]) -> None:
        super().pin_sources(pins)
        self.replay = pins.get(self.replay, self.replay) if self.replay else None


def load_conversations(arguments: SFTArguments, tokenizer, max_length: int) -> Split:
    """Loads and encodes conversations, with columns `input_ids` and `labels`. Appends replayed documents to `train`.

    With several sources, `validation` is divided by source, so that each has a validation loss of its own.
    Turns beyond `max_length` are removed. A conversation is rejected as over-long if its first exchange does not fit.
    See `load_split` for the errors.
    """

    def encode(rows: list[dict], row_stats: RowStats) -> Iterator[dict | RejectedRow]:
        for encoded in encode_conversations(tokenizer, [row["messages"] for row in rows], max_length):
            if encoded is None:
                yield RejectedRow("over-long", f"no exchange fits into {max_length} tokens")
                continue
            row_stats.count_cut(*encoded.cuts())
            yield _as_columns(encoded.input_ids, encoded.labels)

    split = load_split(arguments, "conversation", encode)
    if len(arguments.sources) > 1:
        by_source = divide_by_source(split.validation, arguments.sources, split.validation_rows)
        split = split._replace(validation=by_source)
    replay = arguments.replay_source()
    if not replay:
        return split
    share = arguments.replay_share
    tokens = round(int(row_lengths(split.train, "input_ids").sum()) * share / (1 - share))
    rows = replay_rows(replay, tokenizer, tokens, max_length, arguments.data_seed, arguments.validation_share)
    replayed = Dataset.from_list([_as_columns(**row) for row in rows])
    return split._replace(train=concatenate_datasets([split.train, replayed]))


def _as_columns(input_ids: list[int], labels: list[int]) -> dict[str, np.ndarray]:
    # lists of Python integers need up to nine times the memory
    return {"input_ids": np.array(input_ids, np.int32), "labels": np.array(labels, np.int32)}


class ChatSFTTrainer(ChatStageTrainer, SFTTrainer):
    """SFTTrainer for packed conversations, with rorchat's fused loss instead of TRL's."""

    train_dataset: PackedRows

    def __init__(
        self,
        model,
        arguments: SFTArguments,
        tokenizer,
        train: Dataset,
        validation: Dataset | dict[str, Dataset],
        context: StageContext,
    ):
        self.window = arguments.max_length or model.config.n_positions
        patch_lm_head_loss(model)
        patch_gelu(model)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=partial(collate_packed, pad_id=tokenizer.pad_token_id),
            context=context,
        )
        self._tokens_read = np.cumsum([0, *self.train_dataset.tokens.reshape(arguments.max_steps, -1).sum(1)])
        if self.args.device.type == "cpu":
            self.micro_batch_rows = min(self.micro_batch_rows, max(1, MAX_TOKENS_ON_CPU // self.window))

    def tokens_after(self, step: int) -> int:
        return int(self._tokens_read[step])

    def decode_row(self, row: list[dict]) -> Iterator[str]:
        yield from self.processing_class.batch_decode([sequence["input_ids"] for sequence in row])

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Replaces TRL's tokenization and packing: the rows are already encoded.

        Without FlashAttention, TRL flattens a packed batch into one row and builds a dense mask over all of its tokens.
        """
        columns = ((batch["input_ids"], batch["labels"]) for batch in dataset.with_format("numpy").iter(ROWS_PER_CALL))
        rows = [row for ids, labels in columns for row in zip(ids, labels, strict=True)]
        if dataset_name != "train":
            return Sequences(sorted(rows, key=lambda row: len(row[0])))  # sorted by length to reduce padding
        sequences = Sequences(rows)
        self.rows_per_epoch = len(pack(sequences.lengths, self.window))
        args.max_steps = count_steps(args, self.rows_per_epoch)
        rows_in_run = (
            args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        return PackedRows(sequences, self.window, rows_in_run, args.data_seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Trainer's method uses the loss of `patch_lm_head_loss`; SFTTrainer's (TRL 1.16) would call its own fused head
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs, start_time=None):
        # skips TRL's entropy and accuracy, which `patch_lm_head_loss` does not compute
        Trainer.log(self, self.complete_logs(logs), start_time)
