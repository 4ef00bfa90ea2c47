"""Supervised fine-tuning: conversations -> encoded rows -> a chat model, in TRL's SFTTrainer.

The rows are encoded here and TRL's preparation is skipped: it never sanitises what users wrote, and names no row in its
errors. The loss is on the assistant's words and their closing `<|im_end|>` alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from rorchat.chatml import encode_conversations
from rorchat.errors import DataError, UsageError
from rorchat.inference.engine import ChatModel, generate_replies
from rorchat.persona import load_persona
from rorchat.sources import Reject, Tally, in_validation, load
from rorchat.tokens.batch import padded
from rorchat.training.arguments import DataArguments
from rorchat.training.lora import LoraArguments
from rorchat.training.loss import fuse_gelu, fuse_head
from rorchat.training.trainer import OptimizationArguments, StageTrainer

ROWS_PER_CALL = 1000  # conversations a call of the tokenizer
BATCHES_PER_POOL = 50  # rows of similar length are looked for among so many batches


@dataclass
class SftArguments(DataArguments, LoraArguments, OptimizationArguments, SFTConfig):
    """Settings of `recipes/sft.py`."""

    model: str = field(default="gpt2", metadata={"help": "The model to teach: a run's folder, a folder or a Hub id."})
    # TRL's fields with other defaults
    max_length: int | None = field(default=None, metadata={"help": "Tokens a conversation; default: the positions."})
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or below 1 a share of them."})
    lr_scheduler_type: str = "warmup_stable_decay"
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_checkpointing: bool = False
    bf16: bool | None = None
    logging_steps: float = 20
    eval_strategy: str = "steps"
    eval_steps: float = field(default=0.25, metadata={"help": "Steps, or below 1 a share of them."})
    save_total_limit: int = 2
    report_to: str = "none"
    disable_tqdm: bool = True

    def __post_init__(self):
        self.check_data()
        self.check_lora()
        self.settle()
        if self.max_length is not None and self.max_length < 1:
            raise UsageError(f"max_length is {self.max_length}: give a positive number, or nothing for the positions.")
        if self.packing or self.padding_free or self.assistant_only_loss:
            raise UsageError(
                "packing, padding_free and assistant_only_loss belong to TRL's preparation, which is not used: rows "
                "come encoded, with the loss on replies."
            )
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()
        self.check_devices()


def read_encoded(arguments: SftArguments, tokenizer, max_length: int) -> tuple[Dataset, Dataset, list[Tally]]:
    """(training rows, validation rows, where the rows went): `input_ids` and `labels` of every conversation.

    A conversation goes to validation by a hash of its words. One whose first exchange does not fit into `max_length` is
    rejected as over-long; of longer ones the last turns are cut, and counted.

    Raises:
        DataError: nothing to train on, or nothing held out.
    """
    persona = load_persona(arguments.persona)
    kept: dict[bool, list[dict]] = {True: [], False: []}
    tallies = []
    for spec in arguments.sources:
        rows = load(spec, "conversation", seed=arguments.data_seed, persona=persona)
        conversations = [(rows.place, row["messages"]) for row in rows]
        for start in range(0, len(conversations), ROWS_PER_CALL):
            part = conversations[start : start + ROWS_PER_CALL]
            encoded_part = encode_conversations(tokenizer, [messages for _, messages in part], max_length)
            for (place, messages), encoded in zip(part, encoded_part, strict=True):
                if encoded is None:
                    rows.tally.withdraw(place, Reject("over-long", f"no exchange fits into {max_length} tokens"))
                    continue
                rows.tally.cut += encoded.dropped_turns > 0
                text = "\n".join(message["content"] for message in messages)
                held_out = in_validation(text, arguments.validation_share)
                kept[held_out].append({"input_ids": encoded.input_ids, "labels": encoded.labels})
        tallies.append(rows.tally)
    if not kept[True] or not kept[False]:
        raise DataError(
            f"{len(kept[False])} conversations to train on and {len(kept[True])} held out for validation, at "
            f"validation_share {arguments.validation_share} of {', '.join(arguments.sources)}: both are needed. "
            "Give more data or another validation_share."
        )
    return Dataset.from_list(kept[False]), Dataset.from_list(kept[True]), tallies


def training_order(lengths: Sequence[int], rows: int, batch_size: int, seed: int) -> np.ndarray:
    """Which row comes when: epoch after epoch in random order, rows of similar length in one batch.

    Args:
        lengths: tokens of each row.
        rows: how many to place; a multiple of `batch_size`.
        batch_size: rows of a micro-batch.
    """
    lengths = np.asarray(lengths)
    order: list[np.ndarray] = []
    epochs = -(-rows // len(lengths))
    for epoch in range(epochs):
        order.append(np.random.default_rng([seed, epoch]).permutation(len(lengths)))
    stream = np.concatenate(order)[:rows]
    pools = []
    draw = np.random.default_rng([seed, epochs, 1])
    for start in range(0, rows, batch_size * BATCHES_PER_POOL):
        pool = stream[start : start + batch_size * BATCHES_PER_POOL]
        pool = pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, batch_size)
        pools.append(draw.permutation(pool).reshape(-1))
    return np.concatenate(pools)


def steps_of(arguments, rows: int) -> int:
    """Optimizer steps of a fine-tuning run: `max_steps`, or what `num_train_epochs` over the rows come to."""
    rows_per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return (
        arguments.max_steps
        if arguments.max_steps > 0
        else max(1, round(rows * arguments.num_train_epochs / rows_per_step))
    )


class ChatTrainer(StageTrainer, SFTTrainer):
    """SFTTrainer over encoded rows, with rorchat's fused head instead of TRL's."""

    def __init__(self, model, arguments: SftArguments, tokenizer, train: Dataset, validation: Dataset):
        micro = arguments.per_device_train_batch_size
        arguments.max_steps = steps_of(arguments, len(train))
        rows = arguments.max_steps * micro * arguments.gradient_accumulation_steps * arguments.world_size
        lengths = np.array([len(ids) for ids in train["input_ids"]])
        order = training_order(lengths, rows, micro, arguments.data_seed)
        read = np.cumsum([0, *lengths[order].reshape(arguments.max_steps, -1).sum(1)])
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train.select(order),
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=partial(padded, pad_id=tokenizer.pad_token_id),
        )
        del model.forward  # TRL's fused head, which scores masked positions too on a CPU
        fuse_head(model)
        fuse_gelu(model)
        chat = ChatModel(model, tokenizer)
        self.begin_stage(
            chat,
            Path(arguments.output_dir),
            tokens_after=lambda step: int(read[step]),
            speak=lambda prompts: [reply.text for reply in generate_replies(chat, prompts, temperature=0)],
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs, start_time=None):
        # without TRL's entropy and accuracy, which the fused head does not form
        Trainer.log(self, self.meter.completed(logs, self.state.global_step), start_time)
