"""Reinforcement learning on questions with known answers, with TRL's GRPOTrainer.

Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300) samples a group of replies to each question. The
advantage of a reply is its reward minus the mean reward of its group. If all replies of a group have the same reward,
all advantages are 0 and the group has no gradient: see `rorchat.training.readiness`.
"""

import copy
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import add_fused_lm_head

from rorchat.chatml import encode_prompt
from rorchat.errors import MismatchError, UsageError, check_all
from rorchat.files import file_sha256
from rorchat.inference.engine import DEFAULT_REPLY_DIVISOR, Reply, generate_ids, generate_replies
from rorchat.jsonl import append_json_line
from rorchat.rows import RejectedRow, row_text
from rorchat.sources.base import RowStats
from rorchat.training.arguments import StageArguments
from rorchat.training.callbacks.divergence import DIVERGED_ROWS
from rorchat.training.context import StageContext
from rorchat.training.data import Split, load_split
from rorchat.training.distributed import sharding_strategy
from rorchat.training.kernels.attention import skip_padding_warning
from rorchat.training.kernels.lm_head_loss import patch_gelu
from rorchat.training.option_checks import (
    EVAL_EFFECTS,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_SHARE,
    SHARE,
    Effect,
    check_rules,
    one_of,
)
from rorchat.training.readiness import EQUAL_REWARDS, ReadinessCallback
from rorchat.training.rewards import WEIGHTS, Scorer, as_replies, find_reward, is_right
from rorchat.training.sampler import count_steps, training_order
from rorchat.training.sizes import check_batch, read_model_size, try_settings
from rorchat.training.smoke_test import shrink_grpo
from rorchat.training.stage import ChatStageTrainer
from rorchat.training.unsupported_options import GRPO

#: Metrics of TRL 1.16 to keep. The others are logged elsewhere, or are constant because every reply is used once.
LOGGED = ("reward", "reward_std", "frac_reward_zero_std", "entropy", "kl", "completions/mean_length", "stopped")
#: Ranges, and the names that TRL 1.16 accepts. It checks them only in the first step.
RULES = {
    "scale_rewards": one_of("none", "group", "batch"),
    "loss_type": one_of("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": one_of("token", "sequence"),
    "multi_objective_aggregation": one_of("sum_then_normalize", "normalize_then_sum"),
    "beta": NOT_NEGATIVE,
    "temperature": POSITIVE,
    "top_p": POSITIVE_SHARE,
    "top_k": NOT_NEGATIVE,
    "min_p": SHARE,
    "repetition_penalty": POSITIVE,
    "epsilon_high": POSITIVE,
    "top_entropy_quantile": POSITIVE_SHARE,
    "entropy_coef": NOT_NEGATIVE,
    "readiness_questions": NOT_NEGATIVE,
}


@dataclass
class GRPOArguments(StageArguments, GRPOConfig):
    """Settings of `recipes/grpo.py`."""

    UNSUPPORTED_ARGS: ClassVar[dict[str, str]] = GRPO
    EFFECTS: ClassVar[tuple[Effect, ...]] = (
        *StageArguments.EFFECTS,
        *EVAL_EFFECTS,
        Effect("scale_rewards", "multi_objective_aggregation", one_of("sum_then_normalize")),
        Effect("epsilon_high", "loss_type", one_of("cispo")),
        # only TRL's estimate of the KL divergence depends on the importance ratio, which is always 1
        Effect("importance_sampling_level", "beta", POSITIVE),
        Effect("use_bias_correction_kl", "beta", POSITIVE),
    )

    row_layout: ClassVar[str] = "padded"
    eval_columns: ClassVar[tuple[str, ...]] = ("prompt",)

    if TYPE_CHECKING:  # never None, unlike in TRL's settings
        num_generations: int = 8

    model: str = field(default="", metadata={"help": "The chat model to train: folder of a run or model, or Hub id."})
    rewards: list[str] = field(
        default_factory=lambda: ["answer", "stop", "length", "repetition"],
        metadata={"help": "answer, stop, length, repetition, format, or your own FILE.py:FUNCTION."},
    )
    readiness_questions: int = field(
        default=32, metadata={"help": "Questions sampled before the first step to check that rewards differ; 0: none."}
    )
    # TRL's fields with other defaults
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Maximum tokens of a reply; default: a quarter of the positions."}
    )
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Standard deviation that advantages are divided by: none, group, batch."},
    )
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or a share of them if below 1."})
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Replies per micro-batch; a step needs a multiple of num_generations."}
    )
    per_device_eval_batch_size: int = 64
    logging_steps: float = 10
    eval_strategy: str = "no"

    def __post_init__(self):
        check_all(
            self.check_data,
            self._check_model,
            self.check_stage,
            partial(check_batch, self, self.num_generations),
            self._check_reply_length,
            self._check_groups,
            self._check_rewards,
            partial(check_rules, self, RULES),
        )
        self.resolve_defaults()
        if sharding_strategy():
            raise UsageError(
                f"{sharding_strategy()}: sampling needs the whole model. Launch with --accelerate_config ddp."
            )
        self.num_generations_eval, self.shuffle_dataset = 1, False
        super().__post_init__()
        self.check_devices()
        if self.smoke:
            shrink_grpo(self)

    def _check_model(self) -> None:
        if not self.model:
            raise UsageError("No model: give the chat model to train, such as --model runs/gpt2-chat")

    def _check_reply_length(self) -> None:
        if self.max_completion_length is not None and self.max_completion_length < 2:
            raise UsageError(
                f"max_completion_length is {self.max_completion_length}: give 2 tokens or more, or omit it."
            )
        if positions := read_model_size(self.model, "n_positions"):
            reply_length(self, positions)

    def _check_groups(self) -> None:
        if self.num_generations < 2:
            raise UsageError(
                f"num_generations is {self.num_generations}: give 2 or more, because replies to the same "
                "question are compared."
            )
        world = int(os.environ.get("WORLD_SIZE", "1"))
        replies = self.per_device_train_batch_size * self.gradient_accumulation_steps * world
        if replies % self.num_generations:
            raise UsageError(
                f"A step has {replies} replies (per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} x {world} processes), not a "
                f"multiple of num_generations {self.num_generations}. "
                + try_settings({"per_device_train_batch_size": self.num_generations})
            )

    def _check_rewards(self) -> None:
        if not self.rewards or len(set(self.rewards)) < len(self.rewards):
            raise UsageError(f"rewards is {self.rewards}: give one or more different rewards.")
        for name in self.rewards:
            find_reward(name)
        self.reward_weights = self.reward_weights or [WEIGHTS.get(name, 1.0) for name in self.rewards]
        if len(self.reward_weights) != len(self.rewards):
            raise UsageError(
                f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rewards "
                f"({', '.join(self.rewards)}): give one for each reward."
            )
        if not all(map(math.isfinite, self.reward_weights)) or not any(self.reward_weights):
            raise UsageError(f"reward_weights is {self.reward_weights}: give numbers, not all of them 0.")

    def eval_reply_tokens(self, n_positions: int) -> int:
        return reply_length(self, n_positions)

    def reward_files(self) -> dict[str, str]:
        """Returns the sha256 of every file with a reward function. A run is not resumed if such a file has changed."""
        files = {name.rpartition(":")[0] for name in self.rewards if ":" in name}
        return {file: file_sha256(Path(file)) for file in sorted(files)}


def load_questions(arguments: GRPOArguments, tokenizer, n_positions: int) -> Split:
    """Loads the training and validation questions of all sources, with the columns `place` and `prompt` (token ids).

    A question is rejected as over-long if the question and a reply do not fit into the context window: the answer may
    depend on the part that would be truncated. See `load_split` for the errors.
    """
    reserve = reply_length(arguments, n_positions)

    def encode(rows: list[dict], _: RowStats) -> Iterator[dict | RejectedRow]:
        for row in rows:
            prompt = encode_prompt(tokenizer, row["messages"], n_positions=n_positions, max_new_tokens=reserve)
            if prompt.notice():
                yield RejectedRow(
                    "over-long", f"longer than {n_positions - reserve} tokens, which leaves no room for a reply"
                )
            else:
                yield {**row, "prompt": prompt.input_ids}

    return load_split(arguments, "question", encode)


def reply_length(arguments: GRPOArguments, n_positions: int) -> int:
    """Returns the maximum tokens of a reply: `max_completion_length`, or a quarter of the context window.

    Raises:
        MismatchError: no room is left for a question.
    """
    longest = arguments.max_completion_length or n_positions // DEFAULT_REPLY_DIVISOR
    if longest >= n_positions:
        raise MismatchError(
            f"max_completion_length is {longest}, but the model has only {n_positions} positions for question and "
            f"reply. {try_settings({'max_completion_length': n_positions // DEFAULT_REPLY_DIVISOR})}"
        )
    return longest


class ChatGRPOTrainer(ChatStageTrainer, GRPOTrainer):
    """TRL's GRPOTrainer for encoded questions, with rorchat's generation, metrics and checkpoints.

    Args:
        train: Questions from `load_questions`.
        validation: Questions from `load_questions`, answered greedily in `evaluate`.
        context: What the trainer needs from the run folder.
    """

    args: GRPOArguments
    eval_dataset: Dataset
    num_generations: int

    def __init__(
        self,
        model,
        arguments: GRPOArguments,
        tokenizer,
        train: Dataset,
        validation: Dataset,
        context: StageContext,
    ):
        replies = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        self.questions_per_step = replies // arguments.num_generations
        self.rows_per_epoch, self.batch_multiple = len(train) * arguments.num_generations, arguments.num_generations
        arguments.max_steps = count_steps(arguments, self.rows_per_epoch)
        # equal lengths, because questions grouped by length would be of one kind in each step
        questions = arguments.max_steps * self.questions_per_step
        order = training_order([1] * len(train), questions, self.questions_per_step, arguments.data_seed)
        stops, control = set(model.generation_config.eos_token_id), set(tokenizer.all_special_ids)
        self._tokens: dict[int, int] = {}  # step -> prompt and reply tokens up to this step
        patch_gelu(model)
        skip_padding_warning(model)
        reference, beta = copy.deepcopy(model) if arguments.beta else None, arguments.beta
        # TRL 1.16 would load the reference from the path in the config, which for a merged adapter is that of its base
        arguments.beta = 0.0
        arguments.max_completion_length = limit = reply_length(arguments, model.config.n_positions)
        self.scorers = [Scorer(name, limit, stops, control) for name in arguments.rewards]
        super().__init__(
            model=model,
            reward_funcs=[*self.scorers],
            args=arguments,
            train_dataset=train.select(order),
            eval_dataset=validation,
            processing_class=tokenizer,
            context=context,
        )
        if reference:
            self._set_reference(reference, beta)
        # shuffled, because the readiness check uses the first ones
        self.add_callback(ReadinessCallback(self, train.shuffle(seed=arguments.data_seed)))

    def tokens_after(self, step: int) -> int:
        """Returns the number of prompt and reply tokens up to a step."""
        return self._tokens.get(step, self.state.num_input_tokens_seen)

    # Overridden methods of TRL's trainer

    def _set_reference(self, reference, beta: float) -> None:
        self.args.beta = self.beta = beta
        add_fused_lm_head(reference, temperature=self.temperature)
        reference.eval().requires_grad_(False)
        self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _tokenize_prompts(self, prompts: list[list[int]]):
        """Replaces TRL's tokenization, because prompts are already encoded."""
        return prompts, None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_):
        """Replaces TRL's generation with rorchat's, which is also used for chatting."""
        was_training = self.model.training
        self.model.eval()  # in training mode gradient checkpointing disables the cache
        ids = generate_ids(self.chat, prompt_ids, self.generation_kwargs)
        self.model.train(was_training)
        return ids, None  # no log-probabilities: the training step computes them

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        """Passes position ids to the model, which TRL 1.16 does not.

        Without them, GPT-2 would count the padding on the left of a prompt as positions, and log-probabilities would be
        computed at different positions than in sampling.
        """

        def with_positions(attention_mask, **inputs):
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # (B, T)
            return model(attention_mask=attention_mask, position_ids=position_ids, **inputs)

        return super()._get_per_token_logps_and_entropies(with_positions, *args, **kwargs)

    def _generate(self, prompts):
        """Records the number of tokens before and after the step, for `tokens_after`."""
        if self.model.training:
            self._tokens.setdefault(self.state.global_step, self.state.num_input_tokens_seen)
        generated = super()._generate(prompts)
        if self.model.training:
            self._tokens[self.state.global_step + 1] = self.state.num_input_tokens_seen
        return generated

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Reduces TRL's metrics to those in `LOGGED` and the mean of each reward."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        metrics = self._metrics["train"]
        for name in [name for name in metrics if name not in LOGGED and not name.endswith("/mean")]:
            if name == "completions/clipped_ratio":
                metrics["stopped"] += [1 - share for share in metrics[name]]
            del metrics[name]
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(
            model, self._drop_replies_without_gradient(inputs), return_outputs, num_items_in_batch
        )

    def _drop_replies_without_gradient(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Removes replies whose advantage is 0, and padding that the remaining replies do not need.

        The gradient is unchanged. Nothing is removed if the loss has terms that do not depend on the advantage.

        Args:
            inputs: `prompt_ids` and `prompt_mask` (B, P), `completion_ids` and `completion_mask` (B, C), `advantages`
                (B,), and scalars.
        """
        # TRL gathers values of every reply, so all processes must have the same number of replies
        is_single = self.accelerator.num_processes == 1
        if not is_single or self.loss_type != "dapo" or self.beta or self.entropy_coef or self.top_entropy_quantile < 1:
            return inputs
        has_gradient = inputs["advantages"].abs() > EQUAL_REWARDS
        has_gradient[0] |= not has_gradient.any()  # (B,); at least one reply, because a batch cannot be empty
        kept = {name: tensor[has_gradient] if tensor.dim() else tensor for name, tensor in inputs.items()}
        start = kept["prompt_mask"].any(0).int().argmax()
        end = kept["completion_mask"].any(0).sum()
        columns = {"prompt_ids": slice(start, None), "prompt_mask": slice(start, None)}
        columns |= {"completion_ids": slice(end), "completion_mask": slice(end)}
        return kept | {name: kept[name][:, part] for name, part in columns.items()}

    def halve_micro_batch(self) -> None:
        raise UsageError(
            f"Out of memory at step {self.state.global_step + 1}: give a smaller per_device_train_batch_size and "
            "more gradient_accumulation_steps, or a smaller max_completion_length."
        )

    def write_diverged_rows(self, step: int) -> None:
        path = self.checkpoints.folder / DIVERGED_ROWS
        for number in range((step - 1) * self.questions_per_step, step * self.questions_per_step):
            append_json_line(path, {"step": step, "row": number, "text": row_text(self.train_dataset[number])})

    # Evaluation

    def score(self, rows: Sequence[dict], replies: Sequence[Reply]) -> torch.Tensor:
        """Returns the weighted sum of the rewards of each reply, (replies,)."""
        rewards = torch.tensor([scorer.score(rows, replies) for scorer in self.scorers])  # (rewards, replies)
        return self.reward_weights.to(rewards) @ rewards

    def sum_over_processes(self, *numbers: float) -> list[float]:
        """Sums each number over all processes."""
        tensor = torch.tensor([numbers], dtype=torch.float32, device=self.args.device)
        return self.accelerator.gather(tensor).sum(0).tolist()

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Generates a greedy reply to every validation question.

        Returns:
            The mean reward, the shares of right replies and of replies that ended before the token limit, and the
            number of questions and seconds.
        """
        started, was_training = time.monotonic(), self.model.training
        rows = list(self.eval_dataset.shard(self.accelerator.num_processes, self.accelerator.process_index))
        self.model.eval()  # TRL also selects its training or evaluation metrics by this
        prompts = [row["messages"] for row in rows]
        replies = generate_replies(
            self.chat,
            prompts,
            max_new_tokens=self.max_completion_length,
            temperature=0,
            batch_size=self.args.per_device_eval_batch_size,
        )
        rewards = self.score(rows, replies) if rows else torch.zeros(0)
        count, reward, right, stopped = self.sum_over_processes(
            len(rows),
            rewards.sum().item(),
            sum(is_right(reply.text, row) for row, reply in zip(rows, replies, strict=True)),
            sum(reply.stopped for reply in replies),
        )
        metrics = {"eval_reward": reward / count, "eval_right": right / count, "eval_stopped": stopped / count}
        metrics |= {"eval_questions": round(count), "eval_seconds": round(time.monotonic() - started, 2)}
        self.log(dict(metrics))
        self.model.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def sample(self, rows: Sequence[dict]) -> list[Reply]:
        """Samples `num_generations` replies to each question as in training, in the order of the questions."""
        questions_per_batch = max(1, self.args.per_device_train_batch_size // self.num_generations)
        replies = []
        for start in range(0, len(rows), questions_per_batch):
            batch = rows[start : start + questions_per_batch]
            ids, _ = self._generate_single_turn([row["prompt"] for row in batch for _ in range(self.num_generations)])
            texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
            replies += as_replies(texts, ids, set(self.eos_token_ids))
        return replies
