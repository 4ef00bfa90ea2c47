"""Pretraining: documents -> rows -> a language model, in Transformers' Trainer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from torch.utils.data import Sampler
from transformers import TrainingArguments

from rorchat.errors import UsageError
from rorchat.inference.engine import ChatModel, continue_texts
from rorchat.mixture.collators import collate_padded
from rorchat.mixture.config import MixtureConfig, read_mixture
from rorchat.mixture.dataset import Mixture, ValidationRows
from rorchat.mixture.history import build_plan, data_summaries
from rorchat.mixture.plan import Plan
from rorchat.mixture.stores import count_rows_per_epoch, prepare_stores
from rorchat.persona import load_persona
from rorchat.tokens.store import TokenStore
from rorchat.training.arguments import DataArguments
from rorchat.training.kernels.lm_head_loss import patch_gelu, patch_lm_head_loss
from rorchat.training.run_folder import TOKENS
from rorchat.training.runtime import can_compile
from rorchat.training.smoke_test import SmokeTestArguments, make_small
from rorchat.training.stage import OptimizationArguments, StageTrainer

SAMPLE_TOKENS = 48


@dataclass
class PretrainArguments(DataArguments, SmokeTestArguments, OptimizationArguments, TrainingArguments):
    """Settings of `recipes/pretrain.py`."""

    UNSUPPORTED_ARGS: ClassVar[dict[str, str]] = OptimizationArguments.UNSUPPORTED_ARGS | {
        "gradient_accumulation_steps": "it follows from `global_batch_tokens`",
        "num_train_epochs": "the length of pretraining is `train_tokens` or `max_steps`",
        "torch_compile": "compiling is chosen by `compile`, which leaves out what it would only break",
        "torch_compile_backend": "compiling is chosen by `compile`",
        "torch_compile_mode": "compiling is chosen by `compile`",
    }

    tokenizer: str = field(default="gpt2", metadata={"help": "A folder or a Hub id."})
    size: str = field(default="124m", metadata={"help": "demo, 51m, 124m ... or layers x heads x width, as 6x5x160."})
    model: str | None = field(
        default=None, metadata={"help": "Go on from this model (a folder or a Hub id) instead of random weights."}
    )
    token_store: str | None = field(
        default=None, metadata={"help": "Where tokenized sources are kept; default: tokens/ in the output folder."}
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "Share of the tokens of each source, in any scale; default: by size."}
    )
    mixture: str | None = field(
        default=None, metadata={"help": "A mixture file: sources, and phases with weights and ramps; no sources then."}
    )
    new_phase: bool = field(
        default=False,
        metadata={
            "help": "Append a changed mixture to a run that has a checkpoint: it shares the tokens that are left."
        },
    )
    block_size: int = field(default=1024, metadata={"help": "Tokens a row; also the positions of a new model."})
    global_batch_tokens: int = field(
        default=524_288, metadata={"help": "Tokens an optimizer step reads, over all processes and micro-batches."}
    )
    train_tokens: int = field(default=0, metadata={"help": "Tokens to train on; max_steps, if given, decides instead."})

    compile: bool | None = field(
        default=None, metadata={"help": "Run the model through torch.compile; default: on a GPU that Triton serves."}
    )

    # Transformers' fields with other defaults
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_steps: float = field(default=0.02, metadata={"help": "Steps, or below 1 a share of them."})
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    dataloader_num_workers: int | None = field(default=None, metadata={"help": "Default: 2 on a GPU, else 0."})
    logging_steps: float = 20
    eval_strategy: str = "steps"
    eval_steps: float = field(default=0.25, metadata={"help": "Steps, or below 1 a share of them."})

    def specs(self) -> list[str]:
        return [source.spec for source in self.mixture_config.sources.values()]

    def _read_mixture(self) -> MixtureConfig:
        if not self.mixture:
            return MixtureConfig.from_specs(self.sources, self.weights)
        for name in ("sources", "weights"):
            if getattr(self, name):
                raise UsageError(f"Both mixture and {name}: give {name} in {self.mixture}, or leave the mixture out.")
        return read_mixture(self.mixture, is_continuation=True)  # whether there is a past, the run knows

    def __post_init__(self):
        self.mixture_config = self._read_mixture()
        self.check_data()
        self.settle()
        if self.block_size < 2:
            raise UsageError(f"block_size is {self.block_size}: a row needs at least 2 tokens.")
        for name in ("global_batch_tokens", "per_device_train_batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: give a positive number.")
        self._choose()
        super().__post_init__()
        self.check_devices()
        self._count_steps()
        if self.smoke:
            make_small(self)

    def _choose(self) -> None:
        """What was left open, by the device."""
        if self.compile is None:
            self.compile = can_compile(self.on_gpu)
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if self.on_gpu else 0

    def _count_steps(self) -> None:
        """Accumulation from the global batch, and steps from the tokens."""
        per_pass = self.block_size * self.per_device_train_batch_size * self.world_size
        if self.global_batch_tokens % per_pass:
            below = max(1, self.global_batch_tokens // per_pass) * per_pass
            raise UsageError(
                f"global_batch_tokens {self.global_batch_tokens:,} is no multiple of block_size {self.block_size} x "
                f"per_device_train_batch_size {self.per_device_train_batch_size} x {self.world_size} processes = "
                f"{per_pass:,}: the nearest that fit are {below:,} and {below + per_pass:,}."
            )
        self.gradient_accumulation_steps = self.global_batch_tokens // per_pass
        if self.max_steps <= 0:
            self.max_steps = self.train_tokens // self.global_batch_tokens
        if self.max_steps <= 0:
            raise UsageError(
                f"train_tokens is {self.train_tokens:,}, less than one step of {self.global_batch_tokens:,} tokens: "
                "give train_tokens or max_steps."
            )


def stores_of(arguments: PretrainArguments, tokenizer, past: Sequence[dict] = ()) -> list[TokenStore]:
    """The token store of every source, made by the first process and opened by the others; none of the past's."""
    if not past:
        arguments.mixture_config.require_standalone()
    return prepare_stores(
        arguments.mixture_config,
        tokenizer,
        Path(arguments.token_store or Path(arguments.output_dir) / TOKENS),
        arguments.block_size,
        validation_share=arguments.validation_share,
        seed=arguments.data_seed,
        persona=load_persona(arguments.persona),
        first=partial(arguments.main_process_first, local=False),
    )


def details_of(plan: Plan, stores: list[TokenStore], past: Sequence[dict]) -> dict[str, object]:
    """What run.json and every checkpoint remember: the whole plan, what was read for it, and the rows of an epoch."""
    return {
        "plan": plan.summary(),
        "data": data_summaries(past, stores),
        "windows": count_rows_per_epoch(stores, plan.block_size),
    }


def show_plan(plan: Plan, folder: Path) -> Iterator[str]:
    """Draws mixture.png into the run folder, which must be begun, and gives the plan in words."""
    plan.draw(folder / "mixture.png")
    yield plan.describe()


class RowsInOrder(Sampler):
    """The numbers of the rows from `start` to the last one, which costs the same wherever `start` is."""

    def __init__(self, rows: int):
        self.rows, self.start = rows, 0

    def __len__(self) -> int:
        return self.rows - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.rows))


class PretrainTrainer(StageTrainer):
    """Trains a stock GPT-2 on the rows of a mixture, with the head and the loss fused."""

    def __init__(
        self, model, arguments: PretrainArguments, tokenizer, stores: list[TokenStore], past: Sequence[dict] = ()
    ):
        rows = arguments.max_steps * arguments.global_batch_tokens // arguments.block_size
        windows = count_rows_per_epoch(stores, arguments.block_size)
        plan = build_plan(past, arguments.mixture_config, windows, rows, arguments.block_size)
        self.mixture = Mixture(stores, plan, arguments.data_seed)
        patch_lm_head_loss(model, compiled=arguments.compile, whole_rows=True)
        patch_gelu(model)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=self.mixture,
            eval_dataset={store.name: ValidationRows(store, arguments.block_size) for store in stores},
            processing_class=tokenizer,
            data_collator=partial(collate_padded, pad_id=tokenizer.pad_token_id),
        )
        chat = ChatModel(model, tokenizer)
        self.begin_stage(
            chat,
            Path(arguments.output_dir),
            tokens_after=lambda step: step * arguments.global_batch_tokens,
            speak=lambda prompts: continue_texts(chat, prompts, min(SAMPLE_TOKENS, chat.n_positions // 2)),
            mixture=self.shares,
            row_tokens=arguments.block_size,
        )

    def shares(self, first_step: int, last_step: int) -> dict[str, float]:
        """The share of every source in the rows that were read after one step and until another one's end."""
        plan, rows = self.mixture.plan, self._rows_a_step
        start, end = first_step * rows, last_step * rows
        counts = [plan.count(source, end) - plan.count(source, start) for source in range(len(plan.names))]
        return {name: count / (end - start) for name, count in zip(plan.names, counts, strict=True)}

    def _get_num_items_in_batch(self, batch_samples, device) -> int:
        """Targets of an optimizer step, over all processes: rows are whole, so there is nothing to count."""
        return self._rows_a_step * (self.args.block_size - 1)

    @property
    def _rows_a_step(self) -> int:
        return self.args.global_batch_tokens // self.args.block_size

    # A run that goes on begins at its row. `skip_first_batches`, to which the Trainer leaves that, counts through every
    # row before it: 3 s after 10^7 rows, 30 s after 10^8. The iterator that it makes is never started.

    def _get_train_sampler(self, train_dataset=None) -> RowsInOrder:
        self._order = RowsInOrder(len(self.train_dataset))
        return self._order

    def _run_epoch(self, *, train_dataloader, **rest) -> None:
        self._order.start = self.state.global_step * self._rows_a_step
        self._batches = iter(train_dataloader)
        super()._run_epoch(train_dataloader=train_dataloader, **rest)
        self._batches = None  # and with it its workers

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(self._batches, num_batches, device)
