"""One side of fine-tuning or preference training, in this process; its record goes to a JSON file.

    python scripts/bench/chat.py WORK_JSON SIDE MATERIAL RESULT [LEVER]

An epoch is one step, so that a side may pack, pad and order the rows as it likes and has still done the same work. The
rows come as token ids: no side turns text into them. Time counts from the call that trains to the end of the step; in
preference training from before the trainer is made, since rorchat's is made with the reference's log-probabilities.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from chat_material import IGNORE_INDEX, IM_START, labelled, rows_sha256, supervised
from datasets import Dataset
from material import loaded_model, tokenizer_of
from torch import Tensor
from training import begin, device, precision_of, watched, without
from watch import Watch
from works import LEVERS, Work

NO_DATA = ("--sources", "persona=1", "--eval_strategy", "no", "--save_strategy", "no")  # rows are given, and not read
LEAST_SETTINGS = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_first_step": True}


def read_rows(watch: Watch) -> list[dict[str, list[int]]]:
    return json.loads((watch.folder / "rows.json").read_text())


def without_padding(inputs: dict[str, Tensor], pad: int) -> Tensor:
    """Ids and labels (2, N) of a batch, however it is made up: neither has a row a token of padding in it."""
    ids = inputs["input_ids"]
    labels = inputs["labels"] if "labels" in inputs else ids.masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
    kept = ids != pad
    return torch.stack([ids[kept], labels[kept]])


def watched_rows(trainer_class: type, watch: Watch, tokenizer) -> type:
    watch.digest = partial(rows_sha256, start=tokenizer.convert_tokens_to_ids(IM_START))
    return watched(trainer_class, watch, partial(without_padding, pad=tokenizer.pad_token_id))


def first_log(trainer) -> dict[str, float]:
    """What the trainer itself says of its first step."""
    return next(log for log in trainer.state.log_history if "grad_norm" in log)


@torch.no_grad()
def loss_without_dropout(trainer) -> float:
    """Nats per supervised token over the epoch's batches, by the side's own way to compute them."""
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]
    tokens = trainer._get_num_items_in_batch(batches, trainer.args.device)
    trainer.model.eval()
    with trainer.accelerator.autocast():
        losses = [trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens) for batch in batches]
    trainer.model.train()
    return sum(loss.item() for loss in losses)


def tuned(watch: Watch, trainer, precision: str, dropout: float = 0.0) -> dict:
    """The record of one epoch of fine-tuning."""
    plain = loss_without_dropout(trainer) if dropout else None
    begin(watch, trainer.model, precision)
    trainer.train()
    return watch.record(plain) | {"first_gradient_norm": None if dropout else first_log(trainer)["grad_norm"]}


def trl(watch: Watch, dropout: float = 0.0, **settings) -> dict:
    """TRL's SFTTrainer with its defaults, but that it saves nothing and draws no bar."""
    from trl import SFTConfig, SFTTrainer, pack_dataset

    work, tokenizer, rows = watch.work, tokenizer_of(watch.work), read_rows(watch)
    dataset = Dataset.from_list(rows)
    number = len(pack_dataset(dataset, work.block_size)) if settings.get("packing") else len(rows)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, max_steps=work.steps, max_length=work.block_size, use_cpu=device() == "cpu",
            per_device_train_batch_size=work.rows, gradient_accumulation_steps=-(-number // work.rows),
            **LEAST_SETTINGS, **settings,
        )  # fmt: skip
        made = watched_rows(SFTTrainer, watch, tokenizer)(
            model=loaded_model(work, watch.folder, dropout),
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        return tuned(watch, made, precision_of(arguments), dropout)


def micro_batch(rows: int, at_most: int) -> int:
    """The largest number of rows that divides them, so that the step ends with the epoch."""
    return max(number for number in range(1, at_most + 1) if rows % number == 0)


def rorchat(watch: Watch, flags: tuple[str, ...] = ()) -> dict:
    """The ChatTrainer that recipes/sft.py makes."""
    from rorchat.mixture.packing import Sequences
    from rorchat.training import sft  # where a lever may have put another `pack`
    from rorchat.training.arguments import parse

    work, tokenizer, rows = watch.work, tokenizer_of(watch.work), read_rows(watch)
    train, validation = (Sequences((row["input_ids"], row["labels"]) for row in part) for part in (rows, rows[:1]))
    packed = len(sft.pack(train.lengths, work.block_size))
    size = micro_batch(packed, work.rows)
    with tempfile.TemporaryDirectory() as folder:
        argv = [*NO_DATA, "--output_dir", folder, "--max_steps", str(work.steps), "--logging_first_step", "true"]
        argv += ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(packed // size)]
        arguments = parse(sft.SFTArguments, [*argv, *flags])
        model = loaded_model(work, watch.folder)
        made = watched_rows(sft.ChatTrainer, watch, tokenizer)(model, arguments, tokenizer, train, validation)
        return tuned(watch, made, precision_of(arguments))


def preferred(watch: Watch, trainer, comparable: bool = True) -> dict:
    """The record of one epoch of preference training.

    Args:
        comparable: the loss is TRL's default one, so that the gradient is that of the others.
    """
    trainer.train()
    log, sides = first_log(trainer), zip(*map(labelled, read_rows(watch)), strict=True)
    chosen, rejected = (supervised(side) / len(side) for side in sides)  # tokens of a reply
    return watch.record() | {
        "first_chosen_loss": -log["logps/chosen"] / chosen,
        "first_rejected_loss": -log["logps/rejected"] / rejected,
        "first_reward": max(abs(log["rewards/chosen"]), abs(log["rewards/rejected"])),
        "first_gradient_norm": log["grad_norm"] if comparable else None,
    }


def trl_dpo(watch: Watch, **settings) -> dict:
    """TRL's DPOTrainer with its defaults, as above; it has the initial weights twice."""
    from trl import DPOConfig, DPOTrainer

    class Prepared(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # TRL knows no rows that come as ids

    work, tokenizer, rows = watch.work, tokenizer_of(watch.work), read_rows(watch)
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder, max_steps=work.steps, max_length=work.block_size, use_cpu=device() == "cpu",
            per_device_train_batch_size=work.rows, gradient_accumulation_steps=work.passes, **LEAST_SETTINGS,
            **settings,
        )  # fmt: skip
        model, reference = (loaded_model(work, watch.folder) for _ in range(2))
        begin(watch, model, precision_of(arguments))
        made = watched_rows(Prepared, watch, tokenizer)(
            model=model,
            ref_model=reference,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        return preferred(watch, made)


def rorchat_dpo(watch: Watch, flags: tuple[str, ...] = (), sft_term: bool = False) -> dict:
    """The PreferenceTrainer that recipes/dpo.py makes."""
    from rorchat.training.arguments import parse
    from rorchat.training.dpo import DPOArguments, PreferenceTrainer

    work, tokenizer, rows = watch.work, tokenizer_of(watch.work), read_rows(watch)
    size = micro_batch(len(rows), work.rows)
    with tempfile.TemporaryDirectory() as folder:
        argv = [*NO_DATA, "--output_dir", folder, "--max_steps", str(work.steps), "--logging_first_step", "true"]
        argv += ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(len(rows) // size)]
        argv += ["--model", "given-as-an-object"]
        argv += [] if sft_term else ["--loss_type", "sigmoid", "--loss_weights", "1"]
        arguments = parse(DPOArguments, [*argv, *flags])
        model = loaded_model(work, watch.folder)
        begin(watch, model, precision_of(arguments))
        train, validation = Dataset.from_list(rows), Dataset.from_list(rows[:1])
        made = watched_rows(PreferenceTrainer, watch, tokenizer)(model, arguments, tokenizer, train, validation)
        return preferred(watch, made, comparable=not sft_term)


FP32 = {"bf16": False, "gradient_checkpointing": False}
SIDES = {
    "conversations": {
        "trl-default": partial(trl, dropout=0.1),
        "trl-packing": partial(trl, dropout=0.1, packing=True),
        "trl-fp32": partial(trl, **FP32),
        "trl-packing-fp32": partial(trl, packing=True, **FP32),
        "rorchat": rorchat,
    },
    "pairs": {
        "trl-dpo-default": trl_dpo,
        "trl-dpo-fp32": partial(trl_dpo, **FP32),
        "rorchat-dpo": rorchat_dpo,
        "rorchat-dpo-default": partial(rorchat_dpo, sft_term=True),
    },
}


def main(argv: list[str]) -> None:
    description, side, folder, result, *levers = argv
    watch = Watch(Work.read(description), Path(folder))
    data = watch.work.data
    run = SIDES[data][side]
    record = without(LEVERS[data][levers[0]], run, watch) if levers else run(watch)
    Path(result).write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])
