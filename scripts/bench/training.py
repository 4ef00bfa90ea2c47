"""Runs one side of a pretraining work and writes its record to a JSON file.

python scripts/bench/training.py WORK_JSON SIDE MATERIAL RESULT [LEVER]
"""

import importlib
import importlib.util
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from material import STORE, Rows, first_loss, load_initial_model, make_tokenizer, weights_sha256
from recorder import Recorder
from works import LEVERS, NANOGPT, Lever, Work

from rorchat.chatml import IGNORE_INDEX

LEARNING_RATE = 6e-4
MAX_GRAD_NORM = 1.0


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def start_recording(recorder: Recorder, model, precision: str) -> None:
    recorder.start(precision, weights_sha256(model.state_dict()), model.num_parameters())


def get_input_ids(inputs: dict) -> torch.Tensor:
    return inputs["input_ids"]


def with_recorder(
    trainer_class: type, recorder: Recorder, extract: Callable[[dict], torch.Tensor] = get_input_ids
) -> type:
    """A subclass of a Trainer that records batches, losses and steps.

    Args:
        extract: Returns the part of a batch to record.
    """

    class RecordedTrainer(trainer_class):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            recorder.attach(self.optimizer)
            return optimizer

        def training_step(self, model, inputs, *args, **kwargs):
            recorder.add_batch(extract(inputs))
            loss = super().training_step(model, inputs, *args, **kwargs)
            recorder.add_loss(loss)
            return loss

    return RecordedTrainer


def run_trainer(recorder: Recorder, dropout: float = 0.0, **settings) -> dict:
    """Transformers' Trainer with its defaults, but sequential rows and no saving or progress bar."""
    from transformers import Trainer, TrainingArguments

    work = recorder.work
    model = load_initial_model(work, recorder.folder, dropout)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=work.steps + work.discarded, per_device_train_batch_size=work.rows,
            gradient_accumulation_steps=work.passes, use_cpu=device() == "cpu", train_sampling_strategy="sequential",
            save_strategy="no", report_to="none", disable_tqdm=True, **settings,
        )  # fmt: skip
        trainer = with_recorder(Trainer, recorder)(model=model, args=arguments, train_dataset=Rows(recorder.folder))
        plain = first_loss(work, recorder.folder, model) if dropout else None
        start_recording(recorder, model, "bf16" if arguments.bf16 else "fp32")
        trainer.train()
    record = recorder.record(plain)
    if plain is None:
        # transformers 5.23 divides the loss of GPT-2 by all T positions of a row, but the first one is no target
        record["first_loss"] *= work.block_size / (work.block_size - 1)
    return record


def make_rorchat_trainer(recorder: Recorder, output: str, flags: tuple[str, ...] = ()):
    """The trainer of recipes/pretrain.py for the settings of the work, with the initial weights."""
    from rorchat.tokens.store import TokenStore
    from rorchat.training.arguments import parse
    from rorchat.training.context import StageContext
    from rorchat.training.pretrain import PretrainArguments, PretrainTrainer, build_mixture

    work = recorder.work
    argv = ["--sources", f"{STORE}={recorder.folder / STORE}", "--output_dir", output, "--eval_strategy", "no"]
    argv += ["--save_strategy", "no"]
    argv += ["--block_size", str(work.block_size), "--per_device_train_batch_size", str(work.rows)]
    argv += ["--global_batch_tokens", str(work.tokens_per_step), "--max_steps", str(work.steps + work.discarded)]
    if "--bf16" in flags and device() == "cpu":
        argv += ["--use_cpu", "true"]  # transformers 5.23 requires it for bf16 on a CPU
    arguments = parse(PretrainArguments, [*argv, "--optimizer", "adamw", *flags])
    model = load_initial_model(work, recorder.folder)
    stores = [TokenStore(recorder.folder / STORE, STORE)]
    mixture, trainer_class = build_mixture(arguments, stores), with_recorder(PretrainTrainer, recorder)
    return trainer_class(model, arguments, make_tokenizer(work), mixture, stores, StageContext())


def get_precision(arguments) -> str:
    return "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"


def run_rorchat(recorder: Recorder, flags: tuple[str, ...] = ()) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_rorchat_trainer(recorder, folder, flags)
        start_recording(recorder, trainer.model, get_precision(trainer.args))
        trainer.train()
        return recorder.record()


def train_loop(recorder: Recorder, model, optimizer, compute_loss, autocast, pinned: bool = False) -> None:
    """A plain training loop: forward, backward, clip, step.

    Args:
        pinned: Copy batches to the GPU from pinned memory, asynchronously.
    """
    work, rows = recorder.work, Rows(recorder.folder)
    for number in range(work.steps + work.discarded):
        for part in range(work.passes):
            ids = rows.batch((number * work.passes + part) * work.rows, work.rows)
            ids = (ids.pin_memory() if pinned else ids).to(device(), non_blocking=pinned)
            recorder.add_batch(ids)
            with autocast():
                loss = compute_loss(ids) / work.passes
            recorder.add_loss(loss)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run_raw(recorder: Recorder) -> dict:
    model = load_initial_model(recorder.work, recorder.folder).to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    recorder.attach(optimizer)
    start_recording(recorder, model, "fp32")
    train_loop(recorder, model, optimizer, lambda ids: model(input_ids=ids, labels=ids).loss, nullcontext)
    return recorder.record()


def run_raw_fused(recorder: Recorder) -> dict:
    """The plain loop with the model, optimizer and precision of rorchat."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_rorchat_trainer(recorder, folder)
    model, optimizer, precision = trainer.model, trainer.create_optimizer(), get_precision(trainer.args)
    if precision == "fp16":
        raise RuntimeError("rorchat trains in fp16 on this device, but the plain loop has no loss scaling.")
    autocast = partial(torch.autocast, device(), torch.bfloat16) if precision == "bf16" else nullcontext
    start_recording(recorder, model, precision)
    train_loop(recorder, model, optimizer, lambda ids: model(input_ids=ids, labels=ids).loss, autocast)
    return recorder.record()


def run_accelerate(recorder: Recorder) -> dict:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    work = recorder.work
    model = load_initial_model(work, recorder.folder)
    accelerator = Accelerator(cpu=device() == "cpu", gradient_accumulation_steps=work.passes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    recorder.attach(optimizer)
    start_recording(recorder, model, "fp32")
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Rows(recorder.folder), work.rows))
    for batch in loader:
        with accelerator.accumulate(model):
            recorder.add_batch(batch["input_ids"])
            loss = model(**batch).loss
            recorder.add_loss(loss / work.passes)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
    return recorder.record()


#: Conv1D of GPT-2 has weights (in, out), Linear of nanoGPT (out, in); the names are equal.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def transpose_linear_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert weights of GPT-2 to the layout of nanoGPT, or back."""
    return {name: value.t() if name.endswith(TRANSPOSED) else value for name, value in weights.items()}


def load_nanogpt_model(work: Work, folder: Path):
    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(os.environ[NANOGPT]) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layers, heads, width = work.shape
    config = module.GPTConfig(
        block_size=work.block_size, vocab_size=work.vocabulary, n_layer=layers, n_head=heads, n_embd=width, dropout=0.0
    )
    model = module.GPT(config)
    result = model.load_state_dict(transpose_linear_weights(load_file(folder / "weights.safetensors")), strict=False)
    if result.unexpected_keys or result.missing_keys != ["lm_head.weight"]:
        raise ValueError(f"the weights do not fit nanoGPT's model: {result}")
    return model


def next_tokens(ids: torch.Tensor) -> torch.Tensor:
    """Targets of nanoGPT: the next tokens, and -1, which it ignores, at the end of a row."""
    return torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -1)], dim=1)


def run_nanogpt(recorder: Recorder, precision: str = "bf16", compiled: bool = True) -> dict:
    """Model, optimizer and loop of nanoGPT's train.py (clip 1.0, betas 0.9 and 0.95, cosine schedule)."""
    work = recorder.work
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    plain = load_nanogpt_model(work, recorder.folder).to(device())
    optimizer = plain.configure_optimizers(0.1, LEARNING_RATE, (0.9, 0.95), device())
    recorder.attach(optimizer)
    # unlike train.py, also on a CPU
    autocast = partial(torch.autocast, device(), torch.bfloat16) if precision == "bf16" else nullcontext
    recorder.start(
        precision,
        weights_sha256(transpose_linear_weights(plain.state_dict())),
        sum(map(torch.numel, plain.parameters())),
    )
    model = torch.compile(plain) if compiled else plain
    steps, calls = work.steps + work.discarded, 0

    def compute_loss(ids: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        step = calls // work.passes
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = model(ids, next_tokens(ids))[1]
        if calls % (10 * work.passes) == 0:
            loss.item()  # at the log interval of train.py
        calls += 1
        return loss

    train_loop(
        recorder, model, optimizer, compute_loss, autocast, pinned=device() == "cuda"
    )  # as in get_batch of train.py
    return recorder.record()


SIDES = {
    "trainer-default": partial(run_trainer, dropout=0.1),
    "trainer-fp32": run_trainer,
    "trainer-fp32-compile": partial(run_trainer, torch_compile=True),
    "trainer-bf16": partial(run_trainer, bf16=True),
    "trainer-bf16-compile": partial(run_trainer, bf16=True, torch_compile=True),
    "accelerate": run_accelerate,
    "nanogpt": run_nanogpt,
    "nanogpt-fp32": partial(run_nanogpt, precision="fp32"),
    "raw": run_raw,
    "raw-fused": run_raw_fused,
    "rorchat": run_rorchat,
    "rorchat-bf16": partial(run_rorchat, flags=("--bf16", "true")),
    "rorchat-muon": partial(run_rorchat, flags=("--optimizer", "muon")),
}


def full_logits_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *_, **__) -> torch.Tensor:
    """Loss from the logits of all positions in float32, as in Transformers; rorchat's fused head replaces it."""
    logits = torch.nn.functional.linear(hidden, weight)  # (B, T, D) -> (B, T, V)
    targets = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def return_false(*_, **__) -> bool:
    return False


def one_row_each(lengths, window: int) -> list[list[int]]:
    """One conversation per row, padded to the longest row of the batch; rorchat's packing replaces it."""
    return [[number] for number in range(len(lengths))]


def random_order(lengths, rows: int, batch_size: int, seed: int) -> np.ndarray:
    """Random epochs regardless of lengths; rorchat's order of rows replaces it."""
    epochs = -(-rows // len(lengths))
    draw = np.random.default_rng(seed)
    return np.concatenate([draw.permutation(len(lengths)) for _ in range(epochs)])[:rows]


def resolve_patch(target: str) -> tuple[object, str]:
    """(module or class, attribute) of the patch of a lever."""
    module, _, path = target.partition("=")[0].partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    if name not in vars(owner):  # otherwise a renamed function would be a lever without effect
        raise AttributeError(f"{target} does not exist: correct LEVERS in scripts/bench/works.py")
    return owner, name


def run_without(lever: Lever, train: Callable[..., dict], recorder: Recorder) -> dict:
    """The record of `train`, a side of rorchat, with one lever switched off."""
    for patch in lever.patches:
        (owner, name), replacement = resolve_patch(patch), patch.partition("=")[2]
        if isinstance(owner, type):
            delattr(owner, name)
        else:
            setattr(owner, name, globals()[replacement] if replacement else lambda *_, **__: nullcontext())
    return train(recorder, lever.flags)


def main(argv: list[str]) -> None:
    description, side, folder, result, *levers = argv
    recorder = Recorder(Work.read(description), Path(folder))
    record = run_without(LEVERS["rows"][levers[0]], run_rorchat, recorder) if levers else SIDES[side](recorder)
    Path(result).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
