"""Pretraining: rows of a token mixture -> a language model, in Transformers' Trainer."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from torch.utils.data import Sampler
from transformers import TrainingArguments

from rorchat.errors import UsageError, check_all
from rorchat.inference.engine import continue_texts
from rorchat.mixture.collators import collate_padded
from rorchat.mixture.dataset import Mixture, ValidationRows, limit_share, limit_validation
from rorchat.mixture.history import build_plan, data_summaries
from rorchat.mixture.mixture_file import MixtureConfig, read_mixture
from rorchat.mixture.plan import Plan
from rorchat.mixture.stores import count_rows_per_epoch, prepare_stores
from rorchat.model import parse_shape
from rorchat.persona import load_persona
from rorchat.tokens.store import TOKENS_FOLDER, TokenStore
from rorchat.training.arguments import StageArguments
from rorchat.training.context import StageContext
from rorchat.training.kernels.lm_head_loss import patch_gelu, patch_lm_head_loss
from rorchat.training.option_checks import NOT_NEGATIVE, POSITIVE, Effect, check_length, check_rules, left_out
from rorchat.training.runtime import can_compile, works_compiled
from rorchat.training.sizes import PretrainingSizes, read_model_size
from rorchat.training.smoke_test import shrink_pretraining
from rorchat.training.stage import StageTrainer
from rorchat.training.unsupported_options import PRETRAIN
from rorchat.validation_split import EVALUATED_SHARE

SAMPLE_TOKENS = 48
RULES = {"per_device_eval_batch_size": POSITIVE, "train_tokens": NOT_NEGATIVE}


@dataclass
class PretrainArguments(StageArguments, TrainingArguments):
    """Settings of `recipes/pretrain.py`."""

    UNSUPPORTED_ARGS: ClassVar[dict[str, str]] = PRETRAIN
    EFFECTS: ClassVar[tuple[Effect, ...]] = (
        *StageArguments.EFFECTS,
        Effect("tokenizer", "model", left_out("model")),  # which has its own
        Effect("size", "model", left_out("model")),
    )

    row_layout: ClassVar[str] = "full"
    tokenizer: str = field(default="gpt2", metadata={"help": "A folder or a Hub id."})
    size: str = field(default="124m", metadata={"help": "demo, 51m, 124m ... or LAYERSxHEADSxWIDTH, as 6x5x160."})
    model: str | None = field(
        default=None, metadata={"help": "Start from this model (a folder or a Hub id) instead of random weights."}
    )
    token_store: str | None = field(
        default=None, metadata={"help": "Folder of the tokenized sources; default: tokens/ in the output folder."}
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "Relative share of the tokens of each source; default: by size."}
    )
    mixture: str | None = field(
        default=None, metadata={"help": "A mixture file (sources, phases, weights, ramps), instead of sources."}
    )
    new_phase: bool = field(
        default=False,
        metadata={"help": "Append a changed mixture to a run that has a checkpoint, for the tokens that are left."},
    )
    block_size: int = field(default=1024, metadata={"help": "Tokens per row; also the positions of a new model."})
    global_batch_tokens: int = field(
        default=524_288, metadata={"help": "Tokens per optimizer step, over all processes and micro-batches."}
    )
    train_tokens: int = field(default=0, metadata={"help": "Tokens to train on; max_steps takes precedence."})
    compile: bool | None = field(
        default=None, metadata={"help": "Use torch.compile; default: on a GPU that Triton supports."}
    )

    # settings of Transformers with other defaults
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_steps: float = field(default=0.02, metadata={"help": "Steps, or a share of them if below 1."})
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    dataloader_num_workers: int | None = field(  # type: ignore[assignment]  # None until the checks choose a number
        default=None, metadata={"help": "Default: 2 on a GPU, otherwise 0."}
    )
    logging_steps: float = 20
    eval_strategy: str = "steps"
    eval_steps: float = field(default=0.25, metadata={"help": "Steps, or a share of them if below 1."})

    def __post_init__(self):
        self.mixture_config = self._read_mixture()
        check_all(self.check_data, self.check_stage, partial(check_rules, self, RULES), self._check_sizes)
        self.resolve_defaults()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if self.on_gpu else 0
        super().__post_init__()
        self.check_devices()
        if self.compile is None:
            self.compile = can_compile(self.on_gpu)
        self.compile = self.compile and works_compiled(self.on_gpu)
        self._derive_steps()
        check_length(self.max_steps, self.warmup_steps, self.lr_scheduler_kwargs)
        if self.smoke:
            shrink_pretraining(self)

    def _read_mixture(self) -> MixtureConfig:
        if not self.mixture:
            self.name_columns()
            return MixtureConfig.from_specs(self.sources, self.weights)
        for name in ("sources", "weights", "columns"):
            if getattr(self, name):
                raise UsageError(f"Both mixture and {name}: give {name} in {self.mixture}, or leave the mixture out.")
        return read_mixture(self.mixture, is_continuation=True)  # only the run knows if there is an earlier one

    def _check_sizes(self) -> None:
        PretrainingSizes(
            self.block_size,
            self.per_device_train_batch_size,
            self.global_batch_tokens,
            self.train_tokens,
            self.max_steps,
            processes=int(os.environ.get("WORLD_SIZE", "1")),
            size=None if self.model else self.size,
            n_positions=read_model_size(self.model, "n_positions") if self.model else None,
        ).check()

    def _derive_steps(self) -> None:
        """Derives accumulation from the global batch, and steps from the tokens."""
        tokens_per_pass = self.block_size * self.per_device_train_batch_size * self.world_size
        self.gradient_accumulation_steps = self.global_batch_tokens // tokens_per_pass
        if self.max_steps <= 0:
            self.max_steps = self.train_tokens // self.global_batch_tokens

    def model_width(self) -> int | None:
        return super().model_width() if self.model else parse_shape(self.size).n_embd

    @property
    def is_compiled(self) -> bool:
        return bool(self.compile)

    def source_specs(self) -> list[str]:
        return [source.spec for source in self.mixture_config.sources.values()]

    def optional_specs(self) -> set[str]:
        return {source.spec for source in self.mixture_config.sources.values() if source.optional}

    def pin_sources(self, pins: Mapping[str, str]) -> None:
        super().pin_sources(pins)
        self.mixture_config = self.mixture_config.with_specs(pins)

    def appends_phase(self) -> bool:
        return self.new_phase

    def rows_per_step(self) -> int:
        return self.global_batch_tokens // self.block_size

    def resolved_mixture(self) -> dict:
        return self.mixture_config.to_dict()


def prepare_token_stores(arguments: PretrainArguments, tokenizer, history: Sequence[dict] = ()) -> list[TokenStore]:
    """The token store of every source. The main process tokenizes; the others open the result.

    Args:
        history: the earlier mixtures of a resumed run. Without them, the first phase must not refer to an earlier one.
    """
    if not history:
        arguments.mixture_config.require_standalone()
    return prepare_stores(
        arguments.mixture_config,
        tokenizer,
        Path(arguments.token_store or Path(arguments.output_dir) / TOKENS_FOLDER),
        arguments.block_size,
        validation_share=arguments.validation_share,
        seed=arguments.data_seed,
        persona=load_persona(arguments.persona),
        first=partial(arguments.main_process_first, local=False),
    )


def build_mixture(arguments: PretrainArguments, stores: list[TokenStore], history: Sequence[dict] = ()) -> Mixture:
    """The training rows of the whole run: those of earlier mixtures, followed by those of the present one."""
    rows = arguments.max_steps * arguments.rows_per_step()
    epochs = count_rows_per_epoch(stores, arguments.block_size)
    plan = build_plan(history, arguments.mixture_config, epochs, rows, arguments.block_size)
    return Mixture(stores, plan, arguments.data_seed)


def describe_mixture(
    plan: Plan, stores: list[TokenStore], history: Sequence[dict], max_eval_tokens: int
) -> dict[str, object]:
    """What run.json and every checkpoint record: the whole plan, the data of its stores, and the rows of an epoch."""
    return {
        "plan": plan.summary(),
        "data": data_summaries(history, stores),
        "windows": count_rows_per_epoch(stores, plan.block_size),
        EVALUATED_SHARE: limit_share(sum(store.tokens("validation") for store in stores), max_eval_tokens),
    }


def show_plan(plan: Plan, folder: Path) -> Iterator[str]:
    """Draws mixture.png into the run folder, and yields the plan as text."""
    plan.draw(folder / "mixture.png")
    yield plan.describe()


class SequentialSampler(Sampler):
    """The rows from `start` on, in order. Unlike `skip_first_batches`, a late start takes no time."""

    def __init__(self, rows: int):
        self.rows, self.start = rows, 0

    def __len__(self) -> int:
        return self.rows - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.rows))


class PretrainTrainer(StageTrainer):
    """Trains a stock GPT-2 on the rows of a mixture, with a fused vocabulary head and loss."""

    args: PretrainArguments

    def __init__(
        self,
        model,
        arguments: PretrainArguments,
        tokenizer,
        mixture: Mixture,
        stores: list[TokenStore],
        context: StageContext,
    ):
        self.mixture = mixture
        self._rows_per_step = arguments.rows_per_step()
        self._whole_rows = not mixture.has_untrained()
        patch_lm_head_loss(model, compiled=bool(arguments.compile), whole_rows=self._whole_rows)
        patch_gelu(model)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=mixture,
            eval_dataset=limit_validation(
                {store.name: ValidationRows(store, arguments.block_size) for store in stores}, arguments.max_eval_tokens
            ),
            processing_class=tokenizer,
            data_collator=partial(collate_padded, pad_id=tokenizer.pad_token_id),
            context=context,
            mixture_shares=self.mixture_shares,
            row_tokens=arguments.block_size,
        )

    def tokens_after(self, step: int) -> int:
        return step * self.args.global_batch_tokens

    def generate_samples(self, prompts: Sequence[str]) -> list[str]:
        return continue_texts(self.chat, prompts, min(SAMPLE_TOKENS, self.chat.n_positions // 2))

    def mixture_shares(self, first_step: int, last_step: int) -> dict[str, float]:
        """The share of every source in the rows after one step and up to another."""
        plan, start, end = self.mixture.plan, first_step * self._rows_per_step, last_step * self._rows_per_step
        counts = [plan.count(source, end) - plan.count(source, start) for source in range(len(plan.names))]
        return {name: count / (end - start) for name, count in zip(plan.names, counts, strict=True)}

    def _get_num_items_in_batch(self, batch_samples, device) -> int:
        """Targets of an optimizer step, over all processes. If every token is learned, there is nothing to count."""
        if self._whole_rows:
            return self._rows_per_step * (self.args.block_size - 1)
        items = super()._get_num_items_in_batch(batch_samples, device)
        assert items is not None, "the patched model takes the number of targets"
        return max(1, int(items))

    # A resumed run starts at its row. The Trainer leaves this to `skip_first_batches`, which iterates over all earlier
    # rows: 3 s after 10^7 rows, 30 s after 10^8. The Trainer's own iterator is never started.

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        self._sampler = SequentialSampler(len(self.train_dataset))
        return self._sampler

    def _run_epoch(self, *args, **kwargs) -> None:
        self._sampler.start = self.state.global_step * self._rows_per_step
        self._batch_iterator = iter(kwargs["train_dataloader"])
        super()._run_epoch(*args, **kwargs)
        self._batch_iterator = None  # ends its workers

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(self._batch_iterator, num_batches, device)
