"""Preference training: pairs of replies -> a model that prefers the better one, in TRL's DPOTrainer.

Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) with an SFT term: without it the chosen replies
lose probability too, and a small model begins to babble. Pairs are encoded here, as everywhere; TRL's preparation is
skipped. The reference model's log-probabilities are computed once, so that no second model is held.
"""

import math
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from trl import DPOConfig, DPOTrainer

from rorchat.chatml import IGNORED, EncodedConversation, encode_conversations
from rorchat.errors import DataError, UsageError
from rorchat.inference.engine import ChatModel, generate_replies
from rorchat.persona import load_persona
from rorchat.sources import Reject, Tally, in_validation, load
from rorchat.training.arguments import DataArguments
from rorchat.training.callbacks import append_line
from rorchat.training.lora import LoraArguments
from rorchat.training.loss import fuse_gelu
from rorchat.training.order import steps_of, training_order
from rorchat.training.pairs import fuse_pairs
from rorchat.training.smoke import SmokeArguments, make_small
from rorchat.training.trainer import OptimizationArguments, StageTrainer

NOT_FORMED = ("entropy", "logits/chosen", "logits/rejected")  # rorchat/training/pairs.py leaves them out


@dataclass
class DpoArguments(DataArguments, SmokeArguments, LoraArguments, OptimizationArguments, DPOConfig):
    """Settings of `recipes/dpo.py`."""

    model: str = field(default="", metadata={"help": "The chat model to train: a run's folder, a folder or a Hub id."})
    # TRL's fields with other defaults
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of prompt and reply; default: the positions."}
    )
    beta: float = field(default=0.1, metadata={"help": "How strongly the model is held to the reference."})
    chosen_drop: float = field(
        default=0.5,
        metadata={"help": "Stop when chosen replies have lost so many nats a token against the reference; 0: never."},
    )
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid", "sft"])
    loss_weights: list[float] | None = field(default_factory=lambda: [1.0, 1.0])
    precompute_ref_log_probs: bool = True
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or below 1 a share of them."})
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    logging_steps: float = 10
    eval_strategy: str = "no"

    def __post_init__(self):
        self.check_data()
        if not self.model:
            raise UsageError("No model: give the chat model to train, as in --model runs/gpt2-chat")
        self.check_lora()
        self.settle()
        if self.max_length is not None and self.max_length < 1:
            raise UsageError(f"max_length is {self.max_length}: give a positive number, or nothing for the positions.")
        if not 0 <= self.chosen_drop < math.inf:
            raise UsageError(f"chosen_drop is {self.chosen_drop}: give nats a token, or 0 for never.")
        super().__post_init__()
        self.check_devices()
        if self.smoke:
            make_small(self)


def _split(encoded: EncodedConversation) -> tuple[list[int], list[int]]:
    """(prompt, reply) ids: the last supervised stretch is the reply, with the `<|im_end|>` that closes it."""
    end = max(at for at, label in enumerate(encoded.labels) if label != IGNORED) + 1
    start = end
    while encoded.labels[start - 1] != IGNORED:
        start -= 1
    return encoded.input_ids[:start], encoded.input_ids[start:end]


def read_pairs(arguments: DpoArguments, tokenizer, max_length: int) -> tuple[Dataset, Dataset, list[Tally]]:
    """(training pairs, validation pairs, where the rows went), each pair `prompt_ids`, `chosen_ids`, `rejected_ids`.

    A pair goes to validation by a hash of its prompt, so that no prompt is on both sides. A pair of which either side
    is longer than `max_length` is rejected.

    Raises:
        DataError: nothing to train on, or nothing held out.
    """
    persona = load_persona(arguments.persona)
    kept: dict[bool, list[dict]] = {True: [], False: []}
    tallies = []
    for spec in arguments.sources:
        rows = load(spec, "preference", seed=arguments.data_seed, persona=persona)
        pairs = [(rows.place, row) for row in islice(rows, arguments.rows_per_source)]
        chosen = encode_conversations(tokenizer, [[*row["prompt"], *row["chosen"]] for _, row in pairs])
        rejected = encode_conversations(tokenizer, [[*row["prompt"], *row["rejected"]] for _, row in pairs])
        for (place, row), better, worse in zip(pairs, chosen, rejected, strict=True):
            if max(len(better.input_ids), len(worse.input_ids)) > max_length:
                rows.tally.withdraw(place, Reject("over-long", f"a side is longer than {max_length} tokens"))
                continue
            prompt_ids, chosen_ids = _split(better)
            held_out = in_validation("\n".join(turn["content"] for turn in row["prompt"]), arguments.validation_share)
            sides = {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": _split(worse)[1]}
            # a list of Python's ints takes up to nine times as much
            kept[held_out].append({name: np.array(ids, np.int32) for name, ids in sides.items()})
        tallies.append(rows.tally)
    if not kept[True] or not kept[False]:
        raise DataError(
            f"{len(kept[False])} pairs to train on and {len(kept[True])} held out for validation, at validation_share "
            f"{arguments.validation_share} of {', '.join(arguments.sources)}: both are needed. Give more data "
            "or another validation_share."
        )
    return Dataset.from_list(kept[False]), Dataset.from_list(kept[True]), tallies


class PreferenceTrainer(StageTrainer, DPOTrainer):
    """DPOTrainer over encoded pairs."""

    def __init__(self, model, arguments: DpoArguments, tokenizer, train: Dataset, validation: Dataset):
        micro = arguments.per_device_train_batch_size
        arguments.max_steps = steps_of(arguments, len(train))
        rows = arguments.max_steps * micro * arguments.gradient_accumulation_steps * arguments.world_size
        lengths = np.array(
            [
                2 * len(p) + len(c) + len(r)
                for p, c, r in zip(train["prompt_ids"], train["chosen_ids"], train["rejected_ids"], strict=True)
            ]
        )
        order = training_order(lengths, rows, micro, arguments.data_seed)
        read = np.cumsum([0, *lengths[order].reshape(arguments.max_steps, -1).sum(1)])
        self._chosen_tokens = np.mean([len(ids) for ids in train["chosen_ids"]])
        fuse_gelu(model)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train.select(order),
            eval_dataset=validation,
            processing_class=tokenizer,
        )
        fuse_pairs(model)
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

    def _precompute_ref_logps(self, *args):
        fuse_pairs(self.model)  # the constructor has just put TRL's head there
        return super()._precompute_ref_logps(*args)

    def divided(self, inputs, rows):
        # all chosen sides come before all rejected ones; the reference's log-probabilities are one a pair
        pairs = len(inputs["input_ids"]) // 2
        found = []
        for start in range(0, pairs, rows):
            of = torch.arange(start, min(start + rows, pairs))
            sides = torch.cat([of, of + pairs])
            found.append({name: tensor[sides if len(tensor) > pairs else of] for name, tensor in inputs.items()})
        return found

    def _prepare_dataset(self, dataset, *args):
        return dataset  # rows come encoded

    def log(self, logs, start_time=None):
        for metrics in self._metrics.values():
            for name in NOT_FORMED:
                metrics.pop(name, None)
        rewards = self._metrics["train"].get("rewards/chosen")
        if rewards and "loss" in logs:
            logs["chosen_change"] = float(np.mean(rewards)) / self.args.beta / self._chosen_tokens
            self._stop_where_chosen_fall(logs["chosen_change"])
        super().log(logs, start_time)

    def _stop_where_chosen_fall(self, change: float) -> None:
        """Ends training when the model unlearns the replies that it should prefer: it would soon babble."""
        if not self.args.chosen_drop or change >= -self.args.chosen_drop:
            return
        self.control.should_training_stop = True
        step = self.state.global_step
        if self.is_world_process_zero():
            append_line(self.meter.path, {"step": step, "event": "chosen fell", "chosen_change": change})
            tqdm.write(
                f"Stopped at step {step}: the chosen replies have lost {-change:.2f} nats a token against the "
                f"reference, more than chosen_drop {self.args.chosen_drop:g}. Lower learning_rate, raise beta, or keep "
                "an sft term in loss_type.",
                file=sys.stderr,
            )

    def evaluate(self, *args, **kwargs):
        metrics = DPOTrainer.evaluate(self, *args, **kwargs)  # a pair's loss, accuracy and margin, not a token's
        self._validated = self.state.global_step, metrics["eval_loss"]
        return metrics
