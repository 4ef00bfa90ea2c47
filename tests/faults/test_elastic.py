"""Any number of processes and workers, from any step, reads the same rows in the same order, without a delay.

The ranks run one after another in this process, with the training loop and data loader of the Trainer; patching
Accelerate's rank is enough. The last test compares them with two real processes.
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
from training_support import build_pretrain_trainer
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from rorchat.model import build_model
from rorchat.training.arguments import parse
from rorchat.training.pretrain import PretrainArguments, PretrainTrainer, prepare_token_stores

STEPS, MICRO_BATCHES, BLOCK_SIZE = 150, 12, 16
MIDDLE = 71
FAR_ROW = 10**9
FIRST_BATCH_SECONDS = 0.2

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there are cores


class FirstBatchLoaded(Exception):
    pass


class RecordedRows(Dataset):
    """The rows of a mixture as (number, source, row of the source), or with `with_ids` as (number, row)."""

    def __init__(self, mixture, with_ids: bool):
        self.mixture, self.with_ids, self.read = mixture, with_ids, []

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, row: int):
        self.read.append(row)
        return (row, self.mixture[row]) if self.with_ids else (row, *self.mixture.locate(row))


class Reader(PretrainTrainer):
    """A trainer whose steps only record their inputs."""

    def begin(self, step: int, until: int) -> None:
        self.until, self.seen = until, []
        self.state, self.control = TrainerState(global_step=step, max_steps=self.args.max_steps), TrainerControl()
        self.callback_handler = CallbackHandler([DefaultFlowCallback()], self.model, None, None, None)
        self._tr_loss, self._globalstep_last_logged = torch.zeros(()), step
        self.optimizer = self.lr_scheduler = SimpleNamespace(step=lambda: None)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.until is None:
            raise FirstBatchLoaded
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
        """Run the training loop from a step, as it runs from a checkpoint."""
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
    """Makes the trainer of one rank of a run."""
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "ramp.yaml").write_text(RAMP)
    model = build_model("1x1x16", tokenizer, BLOCK_SIZE)

    def parse_arguments(workers: int, steps: int) -> PretrainArguments:
        flags = {
            "mixture": folder / "ramp.yaml", "tokenizer": saved, "token_store": folder / "store",
            "validation_share": 0.2, "block_size": BLOCK_SIZE, "per_device_train_batch_size": 1, "bf16": False,
            "global_batch_tokens": MICRO_BATCHES * BLOCK_SIZE, "max_steps": steps, "dataloader_num_workers": workers,
            "output_dir": folder / "run",
        }  # fmt: skip
        return parse(PretrainArguments, [word for name in flags for word in (f"--{name}", str(flags[name]).lower())])

    stores = prepare_token_stores(parse_arguments(0, STEPS), tokenizer)  # before the number of processes is changed

    def make(patch, processes=1, rank=0, workers=0, steps=STEPS, with_ids=False) -> Reader:
        patch.setattr(TrainingArguments, "world_size", processes)
        patch.setattr(Accelerator, "num_processes", processes)
        patch.setattr(Accelerator, "process_index", rank)
        arguments = parse_arguments(workers, steps)
        trainer = build_pretrain_trainer(model, arguments, tokenizer, Reader, stores=stores)
        trainer.train_dataset = RecordedRows(trainer.mixture, with_ids)
        trainer.data_collator = list
        return trainer

    return make


def read(reader, processes: int, workers: int, step: int = 0, until: int = STEPS) -> list:
    """(row, source, row of the source) of all rows, in the order (step, micro-step, rank)."""
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
    """The expected rows, from the mixture alone."""
    with pytest.MonkeyPatch.context() as patch:
        mixture = reader(patch).mixture
    return [(row, *mixture.locate(row)) for row in range(STEPS * MICRO_BATCHES)]


def test_the_mixture_has_enough_rows_to_show_another_order(order):
    assert {source for _, source, _ in order} == {0, 1}
    assert len({(source, place) for _, source, place in order}) > 500


FAST = [(1, 0), (3, 2)]
SLOW = [(2, 0), (3, 0), (4, 0), (6, 0), (1, 1), (1, 4), (2, 4), (4, 1), (6, 4)]


@pytest.mark.parametrize(
    ("processes", "workers"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_any_number_of_processes_and_workers_reads_the_same_rows(reader, order, processes, workers):
    assert read(reader, processes, workers) == order


@pytest.mark.parametrize(("before", "after", "workers"), [(1, 6, 0), (6, 4, 0), (2, 3, 1)])
def test_another_number_of_processes_resumes_on_the_same_rows(reader, order, before, after, workers):
    rows = read(reader, before, workers, until=MIDDLE)
    assert rows + read(reader, after, workers, step=MIDDLE) == order


@pytest.mark.parametrize("position", [0, FAR_ROW])
def test_resuming_at_a_far_row_reads_no_row_before_it(reader, position, monkeypatch):
    trainer = reader(monkeypatch, steps=2 * FAR_ROW // MICRO_BATCHES, with_ids=True)
    step, seconds = -(-position // MICRO_BATCHES), []
    for _ in range(3):
        trainer.train_dataset.read.clear()
        started = time.perf_counter()
        with pytest.raises(FirstBatchLoaded):
            trainer.read(step, until=None)
        seconds.append(time.perf_counter() - started)
        first = step * MICRO_BATCHES
        assert trainer.train_dataset.read == list(
            range(first, first + MICRO_BATCHES + 1)
        )  # the loader reads one row ahead
    print(f"first batch at row {first:,} after {min(seconds):.4f} s")  # noqa: T201
    assert min(seconds) <= FIRST_BATCH_SECONDS


def trained_rows(folder) -> list[list[int]]:
    """The rows that the model received, in the order (step, micro-step, rank)."""
    by_rank = [list(map(json.loads, path.read_text().splitlines())) for path in sorted(folder.glob("*.jsonl"))]
    return [row for micro_step in zip(*by_rank, strict=True) for batch in micro_step for row in batch["ids"]]


def test_two_real_processes_then_one_train_on_all_rows_of_the_mixture(sandbox, tokenizer):
    (sandbox.folder / "ramp.yaml").write_text(RAMP)
    flags = {"sources": None, "mixture": str(sandbox.folder / "ramp.yaml"), "per_device_train_batch_size": 1}
    by_two, by_one = sandbox.folder / "by-two", sandbox.folder / "by-one"
    by_two.mkdir()
    by_one.mkdir()
    out = sandbox.new_folder()
    stop = {"signal": int(signal.SIGTERM), "at": 2, "where": "forward", "rows": str(by_two)}
    result = sandbox.run(out, stop, processes=2, **flags)
    assert result.code == 75, result.output
    result = sandbox.run(out, {"rows": str(by_one)}, **flags)
    assert result.code == 0, result.output
    arguments = parse(PretrainArguments, sandbox.argv(out, **flags))
    trainer = build_pretrain_trainer(build_model("1x1x16", tokenizer, 32), arguments, tokenizer, Reader)
    rows = [trainer.mixture[row]["input_ids"].tolist() for row in range(len(trainer.mixture))]
    assert len(trained_rows(by_two)) == 3 * 4 and trained_rows(by_two) + trained_rows(by_one) == rows
