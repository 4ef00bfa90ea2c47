"""The readiness check of GRPO: whether the rewards of replies, sampled before the first step, differ enough.

The replies to one question are a group. A group whose replies all have the same reward has no gradient.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from datasets import Dataset
from transformers import TrainerCallback

from rorchat.errors import UsageError
from rorchat.inference.engine import Reply
from rorchat.jsonl import append_json_line
from rorchat.training.rewards import is_right

MIN_SPREAD = 0.1  # minimum share of groups whose replies differ in reward, and of groups with right and wrong replies
EQUAL_REWARDS = 1e-6  # rewards that differ by less count as equal
TOO_EASY = 0.9  # share of right answers above which questions count as too easy rather than too hard


@dataclass(frozen=True)
class Readiness:
    """Statistics of replies sampled before training."""

    questions: int
    spread: float  # share of groups whose replies differ in reward
    mixed: float  # share of groups with right and wrong replies
    reward: float
    right: float

    def describe(self, generations: int) -> str:
        return (
            f"readiness: {self.questions} questions, {generations} replies each: {self.right:.1%} right, mean reward "
            f"{self.reward:.2f}; replies differ in reward in {self.spread:.0%} of the groups, {self.mixed:.0%} have "
            "both right and wrong replies"
        )

    def check(self, needs_right_answers: bool) -> None:
        """Raises UsageError if too few groups would have a useful gradient."""
        if self.spread >= MIN_SPREAD and (self.mixed >= MIN_SPREAD or not needs_right_answers):
            return
        minimum = f"minimum {MIN_SPREAD:.0%}; {self.right:.1%} of the replies are right"
        if self.spread < MIN_SPREAD:
            problem = (
                f"Replies differ in reward in only {self.spread:.0%} of {self.questions} groups ({minimum}): the model "
                "would learn from those groups alone."
            )
        else:
            problem = (
                f"Only {self.mixed:.0%} of {self.questions} groups have both right and wrong replies ({minimum}): the "
                "model would optimize the other rewards, such as the part earned by a wrong answer of the right kind."
            )
        advice = "easier questions, more num_generations, a higher temperature, or more fine-tuning (recipes/sft.py)"
        if self.right >= TOO_EASY:
            advice = "harder questions, because the model knows these, or a higher temperature"
        raise UsageError(f"{problem} Give {advice}; or --readiness_questions 0 to train without this check.")


class ReadinessCallback(TrainerCallback):
    """Checks the readiness before the first step. A resumed run does not repeat the check.

    Args:
        trainer: a `ChatGRPOTrainer`.
        questions: the training questions in random order, of which the first are sampled.
    """

    def __init__(self, trainer, questions: Dataset):
        self.trainer, self.questions = trainer, questions

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 and args.readiness_questions:
            self.check()

    def check(self) -> None:
        """Samples replies to some questions, and logs the share of groups whose replies differ in reward.

        Training is not affected: the random state is restored.

        Raises:
            UsageError: Rewards differ in too few groups, so most groups would have no gradient. Or, with the reward
                `answer`, too few groups have both right and wrong answers, so the model would optimize the other
                rewards instead of the answer.
        """
        trainer, args = self.trainer, self.trainer.args
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        rows = list(self.questions.take(min(args.readiness_questions, len(self.questions))))
        rows = rows[rank::world] or rows[:1]
        with trainer.metrics.pause(), torch.random.fork_rng([args.device] if args.on_gpu else []):
            torch.manual_seed(args.seed + rank)
            replies = trainer.sample(rows)
        readiness = self._measure([row for row in rows for _ in range(trainer.num_generations)], replies)
        if trainer.is_world_process_zero():
            record = {"step": 0, "event": "readiness", "tokens": 0} | asdict(readiness)
            append_json_line(trainer.metrics.path, record | trainer.metrics.elapsed())
            print(readiness.describe(trainer.num_generations), file=sys.stderr)  # noqa: T201
        readiness.check(needs_right_answers="answer" in args.rewards)

    def _measure(self, rows: Sequence[dict], replies: Sequence[Reply]) -> Readiness:
        """Computes the readiness from samples.

        Args:
            rows: The question of each reply; the replies to one question are adjacent.
            replies: As many replies.
        """
        generations = self.trainer.num_generations
        is_right_reply = [is_right(reply.text, row) for row, reply in zip(rows, replies, strict=True)]
        right = torch.tensor(is_right_reply).view(-1, generations)  # (questions, generations)
        rewards = self.trainer.score(rows, replies).view(-1, generations)  # (questions, generations)
        has_spread = rewards.amax(1) - rewards.amin(1) > EQUAL_REWARDS
        is_mixed = right.any(1) & ~right.all(1)
        columns = (has_spread, is_mixed, rewards.mean(1), right.float().mean(1))
        questions, *sums = self.trainer.sum_over_processes(len(rewards), *(column.sum().item() for column in columns))
        return Readiness(round(questions), *(total / questions for total in sums))
