"""Supervised fine-tuning: conversations -> encoded rows -> a chat model, in TRL's SFTTrainer.

Conversations are encoded here and TRL's preparation is skipped: it never sanitises what users wrote, and names no row
in its errors. They are packed into rows of the window, and none sees another: TRL, without flash-attention, makes one
row of the batch and a mask of all its pairs. The loss is on the assistant's words and their closing `<|im_end|>` alone.
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from rorchat.chatml import encode_conversations
from rorchat.errors import DataError, UsageError
from rorchat.inference.engine import ChatModel, generate_replies
from rorchat.mixture.collators import collate_packed
from rorchat.mixture.packing import PackedRows, Sequences, pack
from rorchat.persona import load_persona
from rorchat.rows import RejectedRow
from rorchat.sources.base import is_validation_text
from rorchat.sources.registry import RowStats, load_rows
from rorchat.training.arguments import DataArguments
from rorchat.training.kernels.lm_head_loss import patch_gelu, patch_lm_head_loss
from rorchat.training.lora import LoraArguments
from rorchat.training.replay import replay_rows
from rorchat.training.sampler import steps_of
from rorchat.training.smoke_test import SmokeTestArguments, make_small
from rorchat.training.stage import OptimizationArguments, StageTrainer

ROWS_PER_CALL = 1000  # conversations a call of the tokenizer
OWN_ROWS = "rows are encoded and packed by rorchat: no conversation sees another, and the loss is on replies"
OWN_TOKENS = "the chat template and its control tokens are rorchat's: no text of a user becomes one of them"
TOKENS_AT_ONCE = 2048  # on a CPU, whose products are no faster for more: a larger micro-batch goes through in parts


@dataclass
class SFTArguments(DataArguments, SmokeTestArguments, LoraArguments, OptimizationArguments, SFTConfig):
    """Settings of `recipes/sft.py`."""

    UNSUPPORTED_ARGS: ClassVar[dict[str, str]] = OptimizationArguments.UNSUPPORTED_ARGS | {
        "packing": OWN_ROWS,
        "packing_strategy": OWN_ROWS,
        "eval_packing": OWN_ROWS,
        "padding_free": OWN_ROWS,
        "assistant_only_loss": OWN_ROWS,
        "completion_only_loss": OWN_ROWS,
        "dataset_text_field": OWN_ROWS,
        "dataset_kwargs": OWN_ROWS,
        "dataset_num_proc": OWN_ROWS,
        "pad_to_multiple_of": OWN_ROWS,
        "chat_template_path": OWN_TOKENS,
        "eos_token": OWN_TOKENS,
        "pad_token": OWN_TOKENS,
        "loss_type": "the loss is the negative log-likelihood of the replies",
        "label_smoothing_factor": "it needs the logits of a whole batch, which are never held",
        "truncation_mode": "what is longer than `max_length` is cut behind a turn",
        "shuffle_dataset": "the order of rows is the data's own, see `data_seed`",
        "model_init_kwargs": "models are loaded by rorchat, in float32",
    }

    model: str = field(default="gpt2", metadata={"help": "The model to teach: a run's folder, a folder or a Hub id."})
    replay: str | None = field(
        default=None,
        metadata={"help": "Documents of pretraining among the conversations: a token store's folder, or a source."},
    )
    replay_share: float = field(default=0.1, metadata={"help": "Their share of the tokens, from 0 to below 1."})
    # TRL's fields with other defaults
    max_length: int | None = field(default=None, metadata={"help": "Tokens a conversation; default: the positions."})
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or below 1 a share of them."})
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    logging_steps: float = 20
    eval_strategy: str = "steps"
    eval_steps: float = field(default=0.25, metadata={"help": "Steps, or below 1 a share of them."})

    def __post_init__(self):
        self.check_data()
        self.check_lora()
        self.settle()
        if self.max_length is not None and self.max_length < 1:
            raise UsageError(f"max_length is {self.max_length}: give a positive number, or nothing for the positions.")
        if not 0 <= self.replay_share < 1:
            raise UsageError(f"replay_share is {self.replay_share}: it must lie between 0 and 1.")
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()
        self.check_devices()
        if not self.replay_share:
            self.replay = None
        if self.smoke:
            make_small(self)


def read_encoded(arguments: SFTArguments, tokenizer, max_length: int) -> tuple[Sequences, Sequences, list[RowStats]]:
    """(training conversations, validation conversations, where the rows went); of the latter the shortest come first.

    A conversation goes to validation by a hash of its words. One whose first exchange does not fit into `max_length` is
    rejected as over-long; of longer ones the last turns are cut, and counted.

    Raises:
        DataError: nothing to train on, or nothing held out.
    """
    persona = load_persona(arguments.persona)
    kept: dict[bool, list[tuple]] = {True: [], False: []}
    tallies = []
    for spec in arguments.sources:
        rows = load_rows(spec, "conversation", seed=arguments.data_seed, persona=persona)
        conversations = [(rows.place, row["messages"]) for row in islice(rows, arguments.rows_per_source)]
        for start in range(0, len(conversations), ROWS_PER_CALL):
            part = conversations[start : start + ROWS_PER_CALL]
            encoded_part = encode_conversations(tokenizer, [messages for _, messages in part], max_length)
            for (place, messages), encoded in zip(part, encoded_part, strict=True):
                if encoded is None:
                    rows.stats.withdraw(place, RejectedRow("over-long", f"no exchange fits into {max_length} tokens"))
                    continue
                rows.stats.cut += encoded.dropped_turns > 0
                text = "\n".join(message["content"] for message in messages)
                held_out = is_validation_text(text, arguments.validation_share)
                kept[held_out].append((np.array(encoded.input_ids, np.int32), np.array(encoded.labels, np.int32)))
        tallies.append(rows.stats)
    if not kept[True] or not kept[False]:
        raise DataError(
            f"{len(kept[False])} conversations to train on and {len(kept[True])} held out for validation, at "
            f"validation_share {arguments.validation_share} of {', '.join(arguments.sources)}: both are needed. "
            "Give more data or another validation_share."
        )
    if arguments.replay:
        kept[False] += _replayed(arguments, tokenizer, sum(len(ids) for ids, _ in kept[False]), max_length)
    kept[True].sort(key=lambda encoded: len(encoded[0]))  # less padding
    return Sequences(kept[False]), Sequences(kept[True]), tallies


def _replayed(arguments: SFTArguments, tokenizer, tokens: int, max_length: int) -> list[tuple]:
    """Documents of pretraining beside so many tokens of conversations."""
    replayed = round(tokens * arguments.replay_share / (1 - arguments.replay_share))
    share, seed = arguments.validation_share, arguments.data_seed
    rows = replay_rows(arguments.replay, tokenizer, replayed, max_length, seed, share)
    return [tuple(np.array(row[name], np.int32) for name in ("input_ids", "labels")) for row in rows]


class ChatTrainer(StageTrainer, SFTTrainer):
    """SFTTrainer over packed conversations, with rorchat's fused head instead of TRL's."""

    def __init__(self, model, arguments: SFTArguments, tokenizer, train: Sequences, validation: Sequences):
        window = arguments.max_length or model.config.n_positions
        micro = arguments.per_device_train_batch_size
        arguments.max_steps = steps_of(arguments, len(pack(train.lengths, window)))
        rows = arguments.max_steps * micro * arguments.gradient_accumulation_steps * arguments.world_size
        packed_rows = PackedRows(train, window, rows, arguments.data_seed)
        read = np.cumsum([0, *packed_rows.tokens.reshape(arguments.max_steps, -1).sum(1)])
        looked_at = Dataset.from_list([{name: tensor.tolist() for name, tensor in train[0].items()}])
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=looked_at,  # TRL takes no other kind and looks at one row
            eval_dataset=looked_at,
            processing_class=tokenizer,
            data_collator=partial(collate_packed, pad_id=tokenizer.pad_token_id),
        )
        self.train_dataset, self.eval_dataset = packed_rows, validation
        del model.forward  # TRL's fused head, which scores masked positions too on a CPU
        patch_lm_head_loss(model)
        patch_gelu(model)
        chat = ChatModel(model, tokenizer)
        self.begin_stage(
            chat,
            Path(arguments.output_dir),
            tokens_after=lambda step: int(read[step]),
            speak=lambda prompts: [
                reply.text
                for reply in generate_replies(chat, prompts, max_new_tokens=arguments.reply_tokens, temperature=0)
            ],
        )
        if self.args.device.type == "cpu":
            self.micro_batch_rows = min(self.micro_batch_rows, max(1, TOKENS_AT_ONCE // window))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs, start_time=None):
        # without TRL's entropy and accuracy, which the fused head does not form
        Trainer.log(self, self.meter.completed(logs, self.state.global_step), start_time)
