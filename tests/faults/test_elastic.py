"""The same rows in the same order for any number of processes and workers, from any step on, and at once at any row.

Ranks are played one after the other in this process, by the Trainer's own loop and loader: what tells a rank apart is
what accelerate believes. That real ranks read the same is seen in two real processes.
"""

import json
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from faults.comparison import RAMP
from torch.utils.data import Dataset
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from rorchat.model import build_model
from rorchat.training.arguments import parse
from rorchat.training.pretrain import PretrainArguments, PretrainTrainer, stores_of

STEPS, MICRO_BATCHES, BLOCK_SIZE = 1000, 12, 16
MIDDLE = 437
FAR = 10**9
FIRST_BATCH = 0.2  # seconds

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there are cores


class Reached(Exception):
    """The first micro-batch is there."""


class Told(Dataset):
    """The rows of a mixture by number: which of which source each is, or the row itself."""

    def __init__(self, mixture, whole: bool):
        self.mixture, self.whole, self.read = mixture, whole, []

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, row: int):
        self.read.append(row)
        return (row, self.mixture[row]) if self.whole else (row, *self.mixture.locate(row))


class Reader(PretrainTrainer):
    """A trainer whose steps do nothing but remember what they were given."""

    def begin(self, step: int, until: int) -> None:
        self.until, self.seen = until, []
        self.state, self.control = TrainerState(global_step=step, max_steps=self.args.max_steps), TrainerControl()
        self.callback_handler = CallbackHandler([DefaultFlowCallback()], self.model, None, None, None)
        self._tr_loss, self._globalstep_last_logged = torch.zeros(()), step
        self.optimizer = self.lr_scheduler = SimpleNamespace(step=lambda: None)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.until is None:
            raise Reached
        self.seen.append(inputs)
        return torch.zeros(())

    def _maybe_log_save_evaluate(self, *arguments, **options) -> None:
        self.control.should_training_stop = self.state.global_step == self.until

    def _clip_grad_norm(self, model) -> None:
        pass

    def _get_grad_norm(self, model, grad_norm=None) -> None:
        pass

    def _get_learning_rate(self) -> None:
        pass

    def _load_rng_state(self, checkpoint) -> None:
        pass

    def read(self, step: int, until: int | None) -> None:
        """Runs the Trainer's loop from a step on, as it would from a checkpoint."""
        self.begin(step, until)
        loader = self.get_train_dataloader()
        _, steps, *_, in_epoch, _ = self.set_initial_training_values(self.args, loader)
        self._run_epoch(
            model=torch.nn.Identity(), epoch=0, train_dataloader=loader, steps_in_epoch=in_epoch,
            num_update_steps_per_epoch=steps, trial=None, ignore_keys_for_eval=None, start_time=0.0,
            resume_from_checkpoint="a checkpoint" if step else None, epochs_trained=0,
            steps_trained_in_current_epoch=step * self.args.gradient_accumulation_steps,
        )  # fmt: skip


@pytest.fixture(scope="module")
def reader(tokenizer, saved, tmp_path_factory):
    """Makes trainers of one run, each as a rank of so many has it."""
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "ramp.yaml").write_text(RAMP)
    model = build_model("1x1x16", tokenizer, BLOCK_SIZE)

    def arguments_of(workers: int, steps: int) -> PretrainArguments:
        flags = {
            "mixture": folder / "ramp.yaml", "tokenizer": saved, "token_store": folder / "store",
            "validation_share": 0.2, "block_size": BLOCK_SIZE, "per_device_train_batch_size": 1, "bf16": False,
            "global_batch_tokens": MICRO_BATCHES * BLOCK_SIZE, "max_steps": steps, "dataloader_num_workers": workers,
            "output_dir": folder / "run",
        }  # fmt: skip
        return parse(PretrainArguments, [word for name in flags for word in (f"--{name}", str(flags[name]).lower())])

    stores = stores_of(arguments_of(0, STEPS), tokenizer)

    def make(patch, processes=1, rank=0, workers=0, steps=STEPS, whole=False) -> Reader:
        patch.setattr(TrainingArguments, "world_size", processes)
        patch.setattr(Accelerator, "num_processes", processes)
        patch.setattr(Accelerator, "process_index", rank)
        trainer = Reader(model, arguments_of(workers, steps), tokenizer, stores)
        trainer.train_dataset = Told(trainer.mixture, whole)
        trainer.data_collator = list
        return trainer

    return make


def read(reader, processes: int, workers: int, step: int = 0, until: int = STEPS) -> list:
    """(row, source, place) of all rows, by (step, micro-step, rank), with nothing sorted."""
    by_rank = []
    for rank in range(processes):
        with pytest.MonkeyPatch.context() as patch:
            trainer = reader(patch, processes, rank, workers)
            assert trainer.args.gradient_accumulation_steps * processes == MICRO_BATCHES
            trainer.read(step, until)
            by_rank.append(trainer.seen)
    return [row for micro_step in zip(*by_rank, strict=True) for batch in micro_step for row in batch]


@pytest.fixture(scope="module")
def order(reader) -> list:
    """The rows of a run by one process, from its mixture and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        mixture = reader(patch).mixture
    return [(row, *mixture.locate(row)) for row in range(STEPS * MICRO_BATCHES)]


def test_the_mixture_is_one_that_would_show_another_order(order):
    assert {source for _, source, _ in order} == {0, 1}
    assert len({(source, place) for _, source, place in order}) > 500


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6])
def test_a_thousand_steps_read_the_same_rows_in_the_same_order(reader, order, processes, workers):
    assert read(reader, processes, workers) == order


@pytest.mark.parametrize(("before", "after", "workers"), [(1, 6, 0), (6, 4, 0), (2, 3, 1)])
def test_resumed_by_another_number_of_processes_the_same_rows_follow(reader, order, before, after, workers):
    rows = read(reader, before, workers, until=MIDDLE)
    assert rows + read(reader, after, workers, step=MIDDLE) == order


@pytest.mark.parametrize("position", [0, FAR])
def test_the_first_batch_is_there_at_once_and_no_row_before_it_is_read(reader, position, monkeypatch):
    trainer = reader(monkeypatch, steps=2 * FAR // MICRO_BATCHES, whole=True)
    step, seconds = -(-position // MICRO_BATCHES), []
    for _ in range(3):
        trainer.train_dataset.read.clear()
        started = time.perf_counter()
        with pytest.raises(Reached):
            trainer.read(step, until=None)
        seconds.append(time.perf_counter() - started)
        first = step * MICRO_BATCHES
        assert trainer.train_dataset.read == list(range(first, first + MICRO_BATCHES + 1))  # and one ahead
    print(f"first batch at row {first:,} after {min(seconds):.4f} s")  # noqa: T201
    assert min(seconds) <= FIRST_BATCH


def trained_on(folder) -> list[list[int]]:
    """The rows of all processes by (step, micro-step, rank), as they were handed to the model."""
    found = [list(map(json.loads, path.read_text().splitlines())) for path in sorted(folder.glob("*.jsonl"))]
    return [row for micro_step in zip(*found, strict=True) for batch in micro_step for row in batch["ids"]]


def test_two_real_processes_and_one_after_them_train_on_the_rows_of_the_mixture(bench, tokenizer):
    (bench.folder / "ramp.yaml").write_text(RAMP)
    flags = {"sources": None, "mixture": str(bench.folder / "ramp.yaml"), "per_device_train_batch_size": 1}
    by_two, by_one = bench.folder / "by-two", bench.folder / "by-one"
    by_two.mkdir()
    by_one.mkdir()
    out = bench.fresh()
    stop = {"signal": int(signal.SIGTERM), "at": 2, "where": "forward", "rows": str(by_two)}
    done = bench.run(out, stop, processes=2, **flags)
    assert done.code == 75, done.said
    done = bench.run(out, {"rows": str(by_one)}, **flags)
    assert done.code == 0, done.said
    arguments = parse(PretrainArguments, bench.argv(out, **flags))
    trainer = Reader(build_model("1x1x16", tokenizer, 32), arguments, tokenizer, stores_of(arguments, tokenizer))
    rows = [trainer.mixture[row]["input_ids"].tolist() for row in range(len(trainer.mixture))]
    assert len(trained_on(by_two)) == 3 * 4 and trained_on(by_two) + trained_on(by_one) == rows
