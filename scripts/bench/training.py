"""One side of one work, in this process; its record goes to a JSON file.

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
from material import STORE, Rows, first_loss, loaded_model, tokenizer_of, weights_sha256
from watch import Watch
from works import LEVERS, NANOGPT, Lever, Work

LEARNING_RATE = 6e-4
IGNORED = -100  # of Transformers, in labels
MAX_GRAD_NORM = 1.0


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def begin(watch: Watch, model, precision: str) -> None:
    watch.begins(precision, weights_sha256(model.state_dict()), model.num_parameters())


def input_ids(inputs: dict) -> torch.Tensor:
    return inputs["input_ids"]


def watched(trainer_class: type, watch: Watch, seen: Callable[[dict], torch.Tensor] = input_ids) -> type:
    """A Trainer that tells what it reads, loses and when it steps.

    Args:
        seen: what is kept of a batch.
    """

    class Watched(trainer_class):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            watch.attach(self.optimizer)
            return optimizer

        def training_step(self, model, inputs, *args, **kwargs):
            watch.read(seen(inputs))
            loss = super().training_step(model, inputs, *args, **kwargs)
            watch.lost(loss)
            return loss

    return Watched


def trainer(watch: Watch, dropout: float = 0.0, **settings) -> dict:
    """Transformers' Trainer with its defaults, but that it reads the rows in order, saves nothing and draws no bar."""
    from transformers import Trainer, TrainingArguments

    work = watch.work
    model = loaded_model(work, watch.folder, dropout)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=work.steps + work.discarded, per_device_train_batch_size=work.rows,
            gradient_accumulation_steps=work.passes, use_cpu=device() == "cpu", train_sampling_strategy="sequential",
            save_strategy="no", report_to="none", disable_tqdm=True, **settings,
        )  # fmt: skip
        made = watched(Trainer, watch)(model=model, args=arguments, train_dataset=Rows(watch.folder))
        plain = first_loss(work, watch.folder, model) if dropout else None
        begin(watch, model, "bf16" if arguments.bf16 else "fp32")
        made.train()
    record = watch.record(plain)
    if plain is None:
        # transformers 5.23 divides GPT-2's loss by all T positions of a row; the first is no target
        record["first_loss"] *= work.block_size / (work.block_size - 1)
    return record


def rorchat_trainer(watch: Watch, output: str, flags: tuple[str, ...] = ()):
    """The PretrainTrainer that recipes/pretrain.py makes of these settings, its model with the initial weights."""
    from rorchat.tokens.store import TokenStore
    from rorchat.training.arguments import parse
    from rorchat.training.pretrain import PretrainArguments, PretrainTrainer

    work = watch.work
    argv = ["--sources", f"{STORE}={watch.folder / STORE}", "--output_dir", output, "--eval_strategy", "no"]
    argv += ["--save_strategy", "no"]
    argv += ["--block_size", str(work.block_size), "--per_device_train_batch_size", str(work.rows)]
    argv += ["--global_batch_tokens", str(work.tokens_a_step), "--max_steps", str(work.steps + work.discarded)]
    if "--bf16" in flags and device() == "cpu":
        argv += ["--use_cpu", "true"]  # transformers 5.23 refuses bf16 on a CPU that is not asked for by name
    arguments = parse(PretrainArguments, [*argv, "--optimizer", "adamw", *flags])
    model = loaded_model(work, watch.folder)
    store = TokenStore(watch.folder / STORE, STORE)
    return watched(PretrainTrainer, watch)(model, arguments, tokenizer_of(work), [store])


def precision_of(arguments) -> str:
    return "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"


def rorchat(watch: Watch, flags: tuple[str, ...] = ()) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        made = rorchat_trainer(watch, folder, flags)
        begin(watch, made.model, precision_of(made.args))
        made.train()
        return watch.record()


def loop(watch: Watch, model, optimizer, loss_of, autocast, pinned: bool = False) -> None:
    """The plain loop: forward, backward, clip, step.

    Args:
        pinned: batches go to a GPU from pinned memory, and nothing waits for the copy.
    """
    work, rows = watch.work, Rows(watch.folder)
    for number in range(work.steps + work.discarded):
        for part in range(work.passes):
            ids = rows.batch((number * work.passes + part) * work.rows, work.rows)
            ids = (ids.pin_memory() if pinned else ids).to(device(), non_blocking=pinned)
            watch.read(ids)
            with autocast():
                loss = loss_of(ids) / work.passes
            watch.lost(loss)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def raw(watch: Watch) -> dict:
    model = loaded_model(watch.work, watch.folder).to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    watch.attach(optimizer)
    begin(watch, model, "fp32")
    loop(watch, model, optimizer, lambda ids: model(input_ids=ids, labels=ids).loss, nullcontext)
    return watch.record()


def raw_fused(watch: Watch) -> dict:
    """The loop with the model, optimizer and precision that rorchat would train with, and nothing of a Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        made = rorchat_trainer(watch, folder)
    model, optimizer, precision = made.model, made.create_optimizer(), precision_of(made.args)
    if precision == "fp16":
        raise RuntimeError("rorchat trains in fp16 on this device, for which a plain loop has no loss scale.")
    autocast = partial(torch.autocast, device(), torch.bfloat16) if precision == "bf16" else nullcontext
    begin(watch, model, precision)
    loop(watch, model, optimizer, lambda ids: model(input_ids=ids, labels=ids).loss, autocast)
    return watch.record()


def accelerate_loop(watch: Watch) -> dict:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    work = watch.work
    model = loaded_model(work, watch.folder)
    accelerator = Accelerator(cpu=device() == "cpu", gradient_accumulation_steps=work.passes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    watch.attach(optimizer)
    begin(watch, model, "fp32")
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Rows(watch.folder), work.rows))
    for batch in loader:
        with accelerator.accumulate(model):
            watch.read(batch["input_ids"])
            loss = model(**batch).loss
            watch.lost(loss / work.passes)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
    return watch.record()


#: GPT-2's Conv1D keeps (in, out), nanoGPT's Linear (out, in); the names are the same.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def in_other_layout(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPT-2's weights as nanoGPT keeps them, and the other way round."""
    return {name: value.t() if name.endswith(TRANSPOSED) else value for name, value in weights.items()}


def nanogpt_model(work: Work, folder: Path):
    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(os.environ[NANOGPT]) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layers, heads, width = work.shape
    config = module.GPTConfig(
        block_size=work.block_size, vocab_size=work.vocabulary, n_layer=layers, n_head=heads, n_embd=width, dropout=0.0
    )
    model = module.GPT(config)
    left = model.load_state_dict(in_other_layout(load_file(folder / "weights.safetensors")), strict=False)
    if left.unexpected_keys or left.missing_keys != ["lm_head.weight"]:
        raise ValueError(f"the weights do not fit nanoGPT's model: {left}")
    return model


def next_tokens(ids: torch.Tensor) -> torch.Tensor:
    """nanoGPT's targets: the token behind each one. It ignores -1, at the end of a row, as GPT-2's loss stops there."""
    return torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -1)], dim=1)


def nanogpt(watch: Watch, precision: str = "bf16", compiled: bool = True) -> dict:
    """Its model and optimizer, and the loop of its train.py (clip 1.0, betas 0.9 and 0.95, a cosine of the rate)."""
    work = watch.work
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    plain = nanogpt_model(work, watch.folder).to(device())
    optimizer = plain.configure_optimizers(0.1, LEARNING_RATE, (0.9, 0.95), device())
    watch.attach(optimizer)
    # train.py takes no autocast on a CPU; here it does where the row says so
    autocast = partial(torch.autocast, device(), torch.bfloat16) if precision == "bf16" else nullcontext
    watch.begins(
        precision, weights_sha256(in_other_layout(plain.state_dict())), sum(map(torch.numel, plain.parameters()))
    )
    model = torch.compile(plain) if compiled else plain
    steps, told = work.steps + work.discarded, 0

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        nonlocal told
        step = told // work.passes
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = model(ids, next_tokens(ids))[1]
        if told % (10 * work.passes) == 0:
            loss.item()  # its log interval
        told += 1
        return loss

    loop(watch, model, optimizer, loss_of, autocast, pinned=device() == "cuda")  # as its get_batch
    return watch.record()


SIDES = {
    "trainer-default": partial(trainer, dropout=0.1),
    "trainer-fp32": trainer,
    "trainer-fp32-compile": partial(trainer, torch_compile=True),
    "trainer-bf16": partial(trainer, bf16=True),
    "trainer-bf16-compile": partial(trainer, bf16=True, torch_compile=True),
    "accelerate": accelerate_loop,
    "nanogpt": nanogpt,
    "nanogpt-fp32": partial(nanogpt, precision="fp32"),
    "raw": raw,
    "raw-fused": raw_fused,
    "rorchat": rorchat,
    "rorchat-bf16": partial(rorchat, flags=("--bf16", "true")),
    "rorchat-muon": partial(rorchat, flags=("--optimizer", "muon")),
}


def full_logits_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *_, **__) -> torch.Tensor:
    """What rorchat's head replaces: the logits of all positions, in float32 for the loss, as Transformers has them."""
    logits = torch.nn.functional.linear(hidden, weight)  # (B, T, D) -> (B, T, V), under autocast in its dtype
    targets = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def no(*_, **__) -> bool:
    return False


def one_a_row(lengths, window: int) -> list[list[int]]:
    """What rorchat's packing replaces: rows of one conversation each, padded to the longest of their batch."""
    return [[number] for number in range(len(lengths))]


def random_order(lengths, rows: int, batch_size: int, seed: int) -> np.ndarray:
    """What rorchat's order of rows replaces: epochs in random order, whatever lengths meet in a batch."""
    epochs = -(-rows // len(lengths))
    draw = np.random.default_rng(seed)
    return np.concatenate([draw.permutation(len(lengths)) for _ in range(epochs)])[:rows]


def located(target: str) -> tuple[object, str]:
    """(module or class, name) of a lever's patch."""
    module, _, path = target.partition("=")[0].partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    if name not in vars(owner):  # a lever that is gone is an error, not one without effect
        raise AttributeError(f"no {target} to turn off: mend LEVERS in scripts/bench/works.py")
    return owner, name


def without(lever: Lever, train: Callable[..., dict], watch: Watch) -> dict:
    """What `train`, which is rorchat, does with one lever turned."""
    for patch in lever.patches:
        (owner, name), replacement = located(patch), patch.partition("=")[2]
        if isinstance(owner, type):
            delattr(owner, name)
        else:
            setattr(owner, name, globals()[replacement] if replacement else lambda *_, **__: nullcontext())
    return train(watch, lever.flags)


def main(argv: list[str]) -> None:
    description, side, folder, result, *levers = argv
    watch = Watch(Work.read(description), Path(folder))
    record = without(LEVERS["rows"][levers[0]], rorchat, watch) if levers else SIDES[side](watch)
    Path(result).write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])
