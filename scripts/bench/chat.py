"""Runs one side of fine-tuning or preference training and writes its record to a JSON file.

    python scripts/bench/chat.py WORK_JSON SIDE MATERIAL RESULT [LEVER]

An epoch is one step, so that all sides do the same work however they pack, pad and order the rows. Rows are token ids:
tokenization is not measured. Time counts from the call of `train()` to the end of the step, in preference training from
before the trainer is built, because rorchat computes the log-probabilities of the reference there.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from chat_material import IGNORE_INDEX, IM_START, count_supervised, label, rows_sha256
from datasets import Dataset
from material import load_initial_model, make_tokenizer
from recorder import Recorder
from torch import Tensor
from training import device, get_precision, run_without, start_recording, with_recorder
from works import LEVERS, Work

NO_DATA = ("--sources", "persona=1", "--eval_strategy", "no", "--save_strategy", "no")  # rows are passed directly
LEAST_SETTINGS = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_first_step": True}


def read_rows(recorder: Recorder) -> list[dict[str, list[int]]]:
    return json.loads((recorder.folder / "rows.json").read_text(encoding="utf-8"))


def remove_padding(inputs: dict[str, Tensor], pad: int) -> Tensor:
    """Ids and labels (2, N) of a batch without padding."""
    ids = inputs["input_ids"]
    if "group_sizes" in inputs:  # pairs of rorchat: prompt, chosen and rejected reply in one row
        sides = []
        for row, sizes in zip(ids, inputs["group_sizes"].tolist(), strict=True):
            prompt, *replies, _ = row.split([*sizes, len(row) - sum(sizes)])
            unlabelled = torch.full_like(prompt, IGNORE_INDEX)
            sides += [torch.stack([torch.cat([prompt, reply]), torch.cat([unlabelled, reply])]) for reply in replies]
        return torch.cat(sides, dim=1)
    labels = inputs["labels"] if "labels" in inputs else ids.masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
    kept = ids != pad
    return torch.stack([ids[kept], labels[kept]])


def with_row_recorder(trainer_class: type, recorder: Recorder, tokenizer) -> type:
    recorder.digest = partial(rows_sha256, start=tokenizer.convert_tokens_to_ids(IM_START))
    return with_recorder(trainer_class, recorder, partial(remove_padding, pad=tokenizer.pad_token_id))


def read_first_log(trainer) -> dict[str, float]:
    """The first training log of the trainer."""
    return next(log for log in trainer.state.log_history if "grad_norm" in log)


@torch.no_grad()
def loss_without_dropout(trainer) -> float:
    """Nats per supervised token over the batches of the epoch, by the loss of the side itself."""
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]
    tokens = trainer._get_num_items_in_batch(batches, trainer.args.device)
    trainer.model.eval()
    with trainer.accelerator.autocast():
        losses = [trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens) for batch in batches]
    trainer.model.train()
    return sum(loss.item() for loss in losses)


def train_sft(recorder: Recorder, trainer, precision: str, dropout: float = 0.0) -> dict:
    """Train one epoch of fine-tuning and return the record."""
    plain = loss_without_dropout(trainer) if dropout else None
    start_recording(recorder, trainer.model, precision)
    trainer.train()
    return recorder.record(plain) | {"first_gradient_norm": None if dropout else read_first_log(trainer)["grad_norm"]}


def run_trl_sft(recorder: Recorder, dropout: float = 0.0, **settings) -> dict:
    """TRL's SFTTrainer with its defaults, without saving and progress bar."""
    from trl import SFTConfig, SFTTrainer, pack_dataset

    work, tokenizer, rows = recorder.work, make_tokenizer(recorder.work), read_rows(recorder)
    dataset = Dataset.from_list(rows)
    number = len(pack_dataset(dataset, work.block_size)) if settings.get("packing") else len(rows)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, max_steps=work.steps, max_length=work.block_size, use_cpu=device() == "cpu",
            per_device_train_batch_size=work.rows, gradient_accumulation_steps=-(-number // work.rows),
            **LEAST_SETTINGS, **settings,
        )  # fmt: skip
        trainer = with_row_recorder(SFTTrainer, recorder, tokenizer)(
            model=load_initial_model(work, recorder.folder, dropout),
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        return train_sft(recorder, trainer, get_precision(arguments), dropout)


def micro_batch(rows: int, at_most: int) -> int:
    """The largest divisor of `rows` up to `at_most`, so that the step ends with the epoch."""
    return max(number for number in range(1, at_most + 1) if rows % number == 0)


def run_rorchat_sft(recorder: Recorder, flags: tuple[str, ...] = ()) -> dict:
    """The trainer of recipes/sft.py."""
    from rorchat.training import sft  # a lever may replace its `pack`
    from rorchat.training.arguments import parse
    from rorchat.training.context import StageContext

    work, tokenizer, rows = recorder.work, make_tokenizer(recorder.work), read_rows(recorder)
    train, validation = Dataset.from_list(rows), Dataset.from_list(rows[:1])
    packed = len(sft.pack([len(row["input_ids"]) for row in rows], work.block_size))
    size = micro_batch(packed, work.rows)
    with tempfile.TemporaryDirectory() as folder:
        argv = [*NO_DATA, "--output_dir", folder, "--max_steps", str(work.steps), "--logging_first_step", "true"]
        argv += ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(packed // size)]
        arguments = parse(sft.SFTArguments, [*argv, *flags])
        model = load_initial_model(work, recorder.folder)
        trainer = with_row_recorder(sft.ChatSFTTrainer, recorder, tokenizer)(
            model, arguments, tokenizer, train, validation, StageContext()
        )
        return train_sft(recorder, trainer, get_precision(arguments))


def train_dpo(recorder: Recorder, trainer, comparable: bool = True) -> dict:
    """Train one epoch on preferences and return the record.

    Args:
        comparable: Whether the loss is TRL's default, so that the gradient norm must equal that of the proof.
    """
    trainer.train()
    log, sides = read_first_log(trainer), zip(*map(label, read_rows(recorder)), strict=True)
    chosen, rejected = (count_supervised(side) / len(side) for side in sides)  # tokens per reply
    return recorder.record() | {
        "first_chosen_loss": -log["logps/chosen"] / chosen,
        "first_rejected_loss": -log["logps/rejected"] / rejected,
        "first_reward": max(abs(log["rewards/chosen"]), abs(log["rewards/rejected"])),
        "first_gradient_norm": log["grad_norm"] if comparable else None,
    }


def run_trl_dpo(recorder: Recorder, **settings) -> dict:
    """TRL's DPOTrainer with its defaults and a second model as the reference, without saving and progress bar."""
    from trl import DPOConfig, DPOTrainer

    class Prepared(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # TRL cannot take rows of ids

    work, tokenizer, rows = recorder.work, make_tokenizer(recorder.work), read_rows(recorder)
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder, max_steps=work.steps, max_length=work.block_size, use_cpu=device() == "cpu",
            per_device_train_batch_size=work.rows, gradient_accumulation_steps=work.passes, **LEAST_SETTINGS,
            **settings,
        )  # fmt: skip
        model, reference = (load_initial_model(work, recorder.folder) for _ in range(2))
        start_recording(recorder, model, get_precision(arguments))
        trainer = with_row_recorder(Prepared, recorder, tokenizer)(
            model=model,
            ref_model=reference,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        return train_dpo(recorder, trainer)


def run_rorchat_dpo(recorder: Recorder, flags: tuple[str, ...] = (), sft_term: bool = False) -> dict:
    """The trainer of recipes/dpo.py."""
    from rorchat.training.arguments import parse
    from rorchat.training.context import StageContext
    from rorchat.training.dpo import ChatDPOTrainer, DPOArguments

    work, tokenizer, rows = recorder.work, make_tokenizer(recorder.work), read_rows(recorder)
    size = micro_batch(len(rows), work.rows)
    with tempfile.TemporaryDirectory() as folder:
        argv = [*NO_DATA, "--output_dir", folder, "--max_steps", str(work.steps), "--logging_first_step", "true"]
        argv += ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(len(rows) // size)]
        argv += ["--model", "given-as-an-object"]
        argv += [] if sft_term else ["--loss_type", "sigmoid", "--loss_weights", "1"]
        arguments = parse(DPOArguments, [*argv, *flags])
        model = load_initial_model(work, recorder.folder)
        start_recording(recorder, model, get_precision(arguments))
        train, validation = Dataset.from_list(rows), Dataset.from_list(rows[:1])
        trainer = with_row_recorder(ChatDPOTrainer, recorder, tokenizer)(
            model, arguments, tokenizer, train, validation, StageContext()
        )
        return train_dpo(recorder, trainer, comparable=not sft_term)


FP32 = {"bf16": False, "gradient_checkpointing": False}
SIDES = {
    "conversations": {
        "trl-default": partial(run_trl_sft, dropout=0.1),
        "trl-packing": partial(run_trl_sft, dropout=0.1, packing=True),
        "trl-fp32": partial(run_trl_sft, **FP32),
        "trl-packing-fp32": partial(run_trl_sft, packing=True, **FP32),
        "rorchat": run_rorchat_sft,
    },
    "pairs": {
        "trl-dpo-default": run_trl_dpo,
        "trl-dpo-fp32": partial(run_trl_dpo, **FP32),
        "rorchat-dpo": run_rorchat_dpo,
        "rorchat-dpo-default": partial(run_rorchat_dpo, sft_term=True),
    },
}


def main(argv: list[str]) -> None:
    description, side, folder, result, *levers = argv
    recorder = Recorder(Work.read(description), Path(folder))
    data = recorder.work.data
    run = SIDES[data][side]
    record = run_without(LEVERS[data][levers[0]], run, recorder) if levers else run(recorder)
    Path(result).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
