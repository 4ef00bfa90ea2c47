"""Learning from rewards: questions with known answers -> sampled replies -> a model that answers better, in TRL's
GRPOTrainer.

Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300): several replies to each question are sampled,
and each is made likelier by as much as its reward is above the group's mean. Where all replies of a group are worth the
same there is nothing to learn, which is looked at before the first step. Prompts are encoded here, as everywhere.
"""

import copy
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import add_fused_lm_head

from rorchat.chatml import encode_prompt
from rorchat.errors import MismatchError, UsageError
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
from rorchat.training.rewards import WEIGHTS, Scorer, as_replies, find_reward, is_right
from rorchat.training.sampler import training_order
from rorchat.training.smoke_test import shrink_grpo
from rorchat.training.stage import ChatStageTrainer

LEAST_SPREAD = 0.1  # share of groups in which replies must differ in reward, and in being right
SAME = 1e-6  # rewards that differ by less are the same
KNOWN = 0.9  # share of right answers from which on questions are too easy rather than too hard
#: Of what TRL 1.16 measures; the rest says nothing where every reply is learned from once, or is said elsewhere.
LOGGED = ("reward", "reward_std", "frac_reward_zero_std", "entropy", "kl", "completions/mean_length", "stopped")
#: What TRL 1.16 would refuse in the first step, with a traceback.
KNOWN_VALUES = {
    "scale_rewards": ("none", "group", "batch"),
    "loss_type": ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
ONCE = "replies are sampled for each step anew and learned from once, so that a run goes on exactly from any step"
OWN_SAMPLING = "replies are sampled by Transformers' generate, from the model that learns"
NO_TABLES = "rewards are in metrics.jsonl, replies to `sample_prompts` in samples.jsonl"


@dataclass
class GRPOArguments(StageArguments, GRPOConfig):
    """Settings of `recipes/grpo.py`."""

    UNSUPPORTED_ARGS: ClassVar[dict[str, str]] = StageArguments.UNSUPPORTED_ARGS | {
        "num_iterations": ONCE,
        "steps_per_generation": ONCE,
        "generation_batch_size": ONCE,
        "num_generations_eval": "validation takes the likeliest reply",
        "shuffle_dataset": "the order of questions is the data's own, see `data_seed`",
        "use_vllm": OWN_SAMPLING,
        "use_transformers_continuous_batching": OWN_SAMPLING,
        "use_transformers_paged": OWN_SAMPLING,
        "chat_template_kwargs": "prompts are encoded by rorchat, as everywhere",
        "pad_to_multiple_of": "a batch is as long as its longest row",
        "log_completions": NO_TABLES,
        "log_completions_hub_repo": NO_TABLES,
        "sync_ref_model": "the reference is the model that the run began with",
        "model_init_kwargs": "models are loaded by rorchat, in float32",
        "use_adaptive_entropy": "its state is no part of a checkpoint; give `entropy_coef`",
        "cast_lm_head_to_fp32": "the head is tied to the embedding",
    }

    model: str = field(default="", metadata={"help": "The chat model to train: a run's folder, a folder or a Hub id."})
    rewards: list[str] = field(
        default_factory=lambda: ["answer", "stop", "length", "repetition"],
        metadata={"help": "answer, stop, length, repetition, format, or FILE.py:FUNCTION of yours."},
    )
    readiness_questions: int = field(
        default=32, metadata={"help": "Questions asked first, to see whether there is anything to learn; 0: none."}
    )
    # TRL's fields with other defaults
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Tokens a reply; default: a quarter of the positions."}
    )
    scale_rewards: str = field(
        default="none",
        metadata={"help": "By which std rewards are divided, less their group's mean: none, group, batch."},
    )
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or below 1 a share of them."})
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Replies at a time; a step's must be a multiple of num_generations."}
    )
    per_device_eval_batch_size: int = 64
    logging_steps: float = 10
    eval_strategy: str = "no"

    def __post_init__(self):
        self.check_data()
        if not self.model:
            raise UsageError("No model: give the chat model to train, as in --model runs/gpt2-chat")
        self.resolve_defaults()
        self._check_groups()
        self._check_rewards()
        if sharding_strategy(self):
            raise UsageError(
                f"{sharding_strategy(self)}: sampling needs the whole model. Take with recipes/accelerate/ddp.yaml."
            )
        for name, known in KNOWN_VALUES.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name} is {getattr(self, name)!r}: give one of {', '.join(known)}.")
        if self.max_completion_length is not None and self.max_completion_length < 2:
            raise UsageError(f"max_completion_length is {self.max_completion_length}: give 2 tokens or more.")
        if not 0 <= self.beta < math.inf:
            raise UsageError(f"beta is {self.beta}: give a positive number, or 0 to compare with no reference.")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"temperature is {self.temperature}: give a positive number, so that replies differ.")
        if self.readiness_questions < 0:
            raise UsageError(f"readiness_questions is {self.readiness_questions}: give 0 or a positive number.")
        self.num_generations_eval, self.shuffle_dataset = 1, False
        super().__post_init__()
        self.check_devices()
        if self.smoke:
            shrink_grpo(self)

    def _check_groups(self) -> None:
        if self.num_generations < 2:
            raise UsageError(
                f"num_generations is {self.num_generations}: a reply is compared with others to the same question, "
                "give 2 or more."
            )
        world = int(os.environ.get("WORLD_SIZE", "1"))
        replies = self.per_device_train_batch_size * self.gradient_accumulation_steps * world
        if replies % self.num_generations:
            raise UsageError(
                f"A step has {replies} replies (per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} x {world} processes), which "
                f"num_generations {self.num_generations} does not divide: give a multiple of it."
            )

    def _check_rewards(self) -> None:
        if not self.rewards or len(set(self.rewards)) < len(self.rewards):
            raise UsageError(f"rewards is {self.rewards}: name at least one, and none twice.")
        for name in self.rewards:
            find_reward(name)
        self.reward_weights = self.reward_weights or [WEIGHTS.get(name, 1.0) for name in self.rewards]
        if len(self.reward_weights) != len(self.rewards):
            raise UsageError(
                f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rewards "
                f"({', '.join(self.rewards)}): give one each."
            )

    def reward_files(self) -> dict[str, str]:
        """The sha256 of every file that has a reward of the user's: with another one it would be another run."""
        files = {name.rpartition(":")[0] for name in self.rewards if ":" in name}
        return {file: file_sha256(Path(file)) for file in sorted(files)}


def load_questions(arguments: GRPOArguments, tokenizer, n_positions: int) -> Split:
    """Questions as their source gives them, with their `place` in it and the encoded `prompt`.

    A question is rejected as over-long if it does not fit into the positions together with a reply: the answer may
    depend on the part that would be cut. See `load_split` for the errors.
    """
    reserve = arguments.max_completion_length = reply_length(arguments, n_positions)

    def encode(rows: list[dict], _: RowStats) -> Iterator[dict | RejectedRow]:
        for row in rows:
            prompt = encode_prompt(tokenizer, row["messages"], n_positions=n_positions, max_new_tokens=reserve)
            if prompt.notice():
                yield RejectedRow("over-long", f"longer than the {n_positions - reserve} tokens beside a reply")
            else:
                yield {**row, "prompt": prompt.input_ids}

    return load_split(arguments, "question", encode)


def reply_length(arguments: GRPOArguments, positions: int) -> int:
    """Tokens of the longest reply: what was asked for, or a quarter of the positions.

    Raises:
        MismatchError: the positions leave no room for a question.
    """
    longest = arguments.max_completion_length or positions // DEFAULT_REPLY_DIVISOR
    if longest >= positions:
        raise MismatchError(
            f"max_completion_length is {longest} but the model has only {positions} positions for question and reply: "
            "give less."
        )
    return longest


class ChatGRPOTrainer(ChatStageTrainer, GRPOTrainer):
    """GRPOTrainer over encoded questions."""

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
        if arguments.max_steps <= 0:
            arguments.max_steps = max(1, math.ceil(len(train) * arguments.num_train_epochs / self.questions_per_step))
        # as if all were of one length: a step of questions of one kind would pull one way
        questions = arguments.max_steps * self.questions_per_step
        order = training_order([1] * len(train), questions, self.questions_per_step, arguments.data_seed)
        stops, control = set(model.generation_config.eos_token_id), set(tokenizer.all_special_ids)
        self._tokens: dict[int, int] = {}  # read and generated after so many steps
        patch_gelu(model)
        skip_padding_warning(model)
        reference, beta = copy.deepcopy(model) if arguments.beta else None, arguments.beta
        # TRL 1.16 would load the reference from where the policy's config says that it lies: of an adapter, its base
        arguments.beta = 0.0
        super().__init__(
            model=model,
            reward_funcs=[Scorer(name, arguments.max_completion_length, stops, control) for name in arguments.rewards],
            args=arguments,
            train_dataset=train.select(order),
            eval_dataset=validation,
            processing_class=tokenizer,
            context=context,
        )
        if reference:
            self._hold_to(reference, beta)
        self.questions = train.shuffle(seed=arguments.data_seed)  # of every source some, where few are asked
        self.add_callback(_Readiness(self))

    def tokens_after(self, step: int) -> int:
        return self._tokens.get(step, self.state.num_input_tokens_seen)

    # What TRL would do otherwise

    def _hold_to(self, reference, beta: float) -> None:
        """The policy may not go far from a model that it is compared with, which learns nothing."""
        self.args.beta = self.beta = beta
        add_fused_lm_head(reference, temperature=self.temperature)
        reference.eval().requires_grad_(False)
        self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _tokenize_prompts(self, prompts: list[list[int]]):
        return prompts, None, {}  # they come encoded

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_):
        was_training = self.model.training
        self.model.eval()  # else gradient checkpointing keeps no cache
        ids = generate_ids(self.chat, prompt_ids, self.generation_kwargs)
        self.model.train(was_training)
        return ids, None  # no log-probabilities: they are computed in the step

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        def placed(attention_mask, **inputs):
            # TRL 1.16 gives no positions, and GPT-2 counts its own from the padding on: every prompt that is padded
            # would be learned from at other positions than it was answered at.
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            return model(attention_mask=attention_mask, position_ids=position_ids, **inputs)

        return super()._get_per_token_logps_and_entropies(placed, *args, **kwargs)

    def _generate(self, prompts):
        if self.model.training:
            self._tokens.setdefault(self.state.global_step, self.state.num_input_tokens_seen)
        made = super()._generate(prompts)
        if self.model.training:
            self._tokens[self.state.global_step + 1] = self.state.num_input_tokens_seen
        return made

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        metrics = self._metrics["train"]
        for name in [name for name in metrics if name not in LOGGED and not name.endswith("/mean")]:
            if name == "completions/clipped_ratio":
                metrics["stopped"] += [1 - share for share in metrics[name]]
            del metrics[name]
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, self._teaching(inputs), return_outputs, num_items_in_batch)

    def _teaching(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The replies that differ in reward from their group, as short as they are: the others have no gradient."""
        alone = self.accelerator.num_processes == 1  # others would wait for logs of as many replies
        if not alone or self.loss_type != "dapo" or self.beta or self.entropy_coef or self.top_entropy_quantile < 1:
            return inputs
        teaching = inputs["advantages"].abs() > SAME
        teaching[0] |= not teaching.any()
        kept = {name: tensor[teaching] if tensor.dim() else tensor for name, tensor in inputs.items()}
        start = kept["prompt_mask"].any(0).int().argmax()
        end = kept["completion_mask"].any(0).sum()
        columns = {"prompt_ids": slice(start, None), "prompt_mask": slice(start, None)}
        columns |= {"completion_ids": slice(end), "completion_mask": slice(end)}
        return kept | {name: kept[name][:, part] for name, part in columns.items()}

    def halve_micro_batch(self) -> None:
        raise UsageError(
            f"Out of memory at step {self.state.global_step + 1}: give a smaller per_device_train_batch_size with as "
            "many more gradient_accumulation_steps, or a smaller max_completion_length."
        )

    def write_diverged_rows(self, step: int) -> None:
        path = self.checkpoints.folder / DIVERGED_ROWS
        for number in range((step - 1) * self.questions_per_step, step * self.questions_per_step):
            append_json_line(path, {"step": step, "row": number, "text": row_text(self.train_dataset[number])})

    # Measuring

    def _worth(self, rows: Sequence[dict], replies: Sequence[Reply]) -> torch.Tensor:
        """(replies,) weighted sum of the rewards."""
        each = torch.tensor([scorer.score(rows, replies) for scorer in self.reward_funcs])  # (rewards, replies)
        return self.reward_weights.to(each) @ each

    def _sums(self, *numbers: float) -> list[float]:
        """Sums over all processes."""
        own = torch.tensor([numbers], dtype=torch.float32, device=self.args.device)
        return self.accelerator.gather(own).sum(0).tolist()

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """The likeliest reply to every validation question: its reward, whether it is right, whether it ends."""
        started, was_training = time.monotonic(), self.model.training
        rows = list(self.eval_dataset.shard(self.accelerator.num_processes, self.accelerator.process_index))
        self.model.eval()  # it also tells TRL where to log
        asked = [row["messages"] for row in rows]
        replies = generate_replies(self.chat, asked, max_new_tokens=self.max_completion_length, temperature=0)
        right = [is_right(reply.text, row) for row, reply in zip(rows, replies, strict=True)]
        stopped = [reply.stopped for reply in replies]
        worth = self._worth(rows, replies) if rows else torch.zeros(0)
        count, worth, right, stopped = self._sums(len(rows), worth.sum().item(), sum(right), sum(stopped))
        metrics = {"eval_reward": worth / count, "eval_right": right / count, "eval_stopped": stopped / count}
        metrics |= {"eval_questions": round(count), "eval_seconds": round(time.monotonic() - started, 2)}
        self.log(dict(metrics))
        self.model.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def sample(self, rows: Sequence[dict]) -> list[Reply]:
        """`num_generations` replies to each question, as training samples them, one question after the other."""
        each, replies = max(1, self.args.per_device_train_batch_size // self.num_generations), []
        for start in range(0, len(rows), each):
            prompts = [row["prompt"] for row in rows[start : start + each] for _ in range(self.num_generations)]
            ids, _ = self._generate_single_turn(prompts)
            texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
            replies += as_replies(texts, ids, set(self.eos_token_ids))
        return replies

    def check_readiness(self) -> None:
        """Samples replies to some of the questions, and logs in how many groups they differ in reward and in being
        right.

        It draws from a random state of its own, so that training is the same with and without it.

        Raises:
            UsageError: they differ in too few of them, so that there would be nothing to learn from; or with the reward
                `answer` they differ, but in too few groups is one right and another wrong: what is learned would be
                what a wrong answer is worth.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        rows = list(self.questions.take(min(self.args.readiness_questions, len(self.questions))))
        rows = rows[rank::world] or rows[:1]
        with self.metrics.pause(), torch.random.fork_rng([self.args.device] if self.args.on_gpu else []):
            torch.manual_seed(self.args.seed + rank)
            replies = self.sample(rows)
        rows = [row for row in rows for _ in range(self.num_generations)]
        right = torch.tensor([is_right(reply.text, row) for row, reply in zip(rows, replies, strict=True)])
        right = right.view(-1, self.num_generations)
        mixed = (right.any(1) & ~right.all(1)).sum().item()
        groups = self._worth(rows, replies).view(-1, self.num_generations)  # (questions, generations)
        spread = (groups.amax(1) - groups.amin(1) > SAME).sum().item()
        sums = (len(groups), spread, mixed, groups.mean(1).sum().item(), right.float().mean(1).sum().item())
        questions, *sums = self._sums(*sums)
        found = {"questions": round(questions)}
        found |= dict(zip(("spread", "mixed", "reward", "right"), (each / questions for each in sums), strict=True))
        if self.is_world_process_zero():
            record = {"step": 0, "event": "readiness", "tokens": 0} | found
            append_json_line(self.metrics.path, record | self.metrics.elapsed())
            print(_told(found, self.num_generations), file=sys.stderr)  # noqa: T201
        if found["spread"] < LEAST_SPREAD or ("answer" in self.args.rewards and found["mixed"] < LEAST_SPREAD):
            raise UsageError(_refusal(found))


class _Readiness(TrainerCallback):
    """Looks before the first step whether there is anything to learn; a run that goes on has looked before."""

    def __init__(self, trainer: ChatGRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 and args.readiness_questions:
            self.trainer.check_readiness()


def _told(found: dict[str, float], generations: int) -> str:
    return (
        f"readiness: {found['questions']} questions, {generations} replies each: {found['right']:.1%} right, mean "
        f"reward {found['reward']:.2f}; in {found['spread']:.0%} of the groups replies differ in reward, in "
        f"{found['mixed']:.0%} some are right and others not"
    )


def _refusal(found: dict[str, float]) -> str:
    advice = "easier questions, more num_generations, a higher temperature, or more fine-tuning (recipes/sft.py) first"
    if found["right"] >= KNOWN:
        advice = "harder questions, for it knows these, or a higher temperature"
    few = f"{LEAST_SPREAD:.0%} are wanted; {found['right']:.1%} of the replies are right"
    if found["spread"] < LEAST_SPREAD:
        said = f"Replies differ in reward in {found['spread']:.0%} of {found['questions']} groups, and the model would "
        said += f"learn from those alone ({few})."
    else:
        said = f"In {found['mixed']:.0%} of {found['questions']} groups are some replies right and others not ({few}): "
        said += (
            "the model would learn what else is rewarded, such as a wrong answer of the right kind, and not the answer."
        )
    return f"{said} Give {advice}; or --readiness_questions 0 to train all the same."
