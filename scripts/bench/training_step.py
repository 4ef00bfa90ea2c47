"""What the fused head and the fused GELU buy: seconds and memory of a training step, against stock Transformers.

    python scripts/bench/training_step.py                       # the shape of the demo
    python scripts/bench/training_step.py --size 6x5x160 --vocabulary 50304 --rows 16

Sides are interleaved in one process, the median of the steps counts; losses are compared as proof of equal work. Memory
is each side's own process.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rorchat.model import shape_of
from rorchat.training.loss import fuse_gelu, fuse_head

SIDES = {"stock": (), "fused head": (fuse_head,), "fused head and gelu": (fuse_head, fuse_gelu)}


def model_of(arguments: argparse.Namespace) -> GPT2LMHeadModel:
    shape = shape_of(arguments.size)
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=arguments.vocabulary, n_positions=arguments.block_size, n_layer=shape.n_layer,
            n_head=shape.n_head, n_embd=shape.n_embd, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def prepared(arguments: argparse.Namespace, sides: list[str]) -> dict:
    born, models = model_of(arguments), {}
    for side in sides:
        model = copy.deepcopy(born)
        for fuse in SIDES[side]:
            fuse(model)
        models[side] = (model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
    return models


def step(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> tuple[float, float]:
    """(loss, seconds)"""
    started = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), time.perf_counter() - started


def peak_memory(side: str) -> int:
    """Bytes of a process of its own that steps one side."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", side]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="demo")
    parser.add_argument("--vocabulary", type=int, default=768)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", help="measure the memory of this side alone")
    arguments = parser.parse_args()
    sides = [arguments.only] if arguments.only else list(SIDES)
    models = prepared(arguments, sides)
    draw = torch.Generator().manual_seed(0)
    seconds = {side: [] for side in sides}
    losses = {side: [] for side in sides}
    for number in range(arguments.steps + 2):
        ids = torch.randint(0, arguments.vocabulary, (arguments.rows, arguments.block_size), generator=draw)
        for side, (model, optimizer) in models.items():
            loss, took = step(model, optimizer, ids)
            losses[side].append(loss)
            if number >= 2:  # the first steps allocate
                seconds[side].append(took)
    if arguments.only:
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        return
    tokens = arguments.rows * arguments.block_size
    stock = statistics.median(seconds["stock"])
    print(
        f"{arguments.size}, {arguments.vocabulary:,} words, {tokens:,} tokens a step, {torch.get_num_threads()} threads"
    )
    for side in sides:
        median = statistics.median(seconds[side])
        print(
            f"{side:20}  {tokens / median:8,.0f} tokens/s  {stock / median:5.2f}x  {peak_memory(side) / 1e9:5.2f} GB "
            f"peak  first loss {losses[side][0]:.5f}"
        )


if __name__ == "__main__":
    main()
