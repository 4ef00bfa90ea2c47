"""Measures how many tokens and seconds an optimizer needs to reach a validation loss. Repeat to add missing runs.

    python scripts/bench/tokens_to_loss.py ../data/corpus_prose runs/bench          # all runs, hours on two cores
    python scripts/bench/tokens_to_loss.py ../data/corpus_prose runs/bench --sides nanogpt --seeds 0
    python scripts/bench/tokens_to_loss.py ../data/corpus_prose runs/bench --race "ours 0.2"
    python scripts/bench/tokens_to_loss.py ../data/corpus_prose runs/longer --steps 976 --seeds 0   # 8M tokens

Models have 4 layers of width 256, a vocabulary of 4,096 trained on the same text, and steps of 8,192 tokens in rows of
256. The target is the final validation loss of nanoGPT's recipe after 2M tokens (AdamW 6e-4, betas 0.9 and 0.95, weight
decay 0.1, cosine to a tenth). "AdamW tuned" is the best of a grid of learning rates, schedules and warm-up steps over
the same 2M tokens. Our recipe runs its full schedule, including the cooldown, over a share of those tokens; its
figure is the smallest share whose mean loss over the seeds reaches the target.

All runs use `recipes/pretrain.py`, so that data, initial weights (except Muon's projections) and evaluation are equal.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEP_TOKENS, BLOCK_SIZE, STEPS = 8192, 256, 244  # 2.0M tokens
ADAMW = ["--optimizer", "adamw", "--weight_decay", "0.1"]
SCHEDULES = {"cosine": "cosine_with_min_lr", "cooldown": "warmup_stable_decay"}
OURS = ["--optimizer", "muon"]  # learning rates and schedule of the recipe
SHARES = (0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.35, 1.0)
GRID = [(rate, schedule, "10") for rate in ("1e-3", "2e-3", "4e-3") for schedule in SCHEDULES]
GRID += [(rate, "cooldown", warmup) for rate in ("1e-3", "2e-3", "4e-3") for warmup in ("40", "80")]
GRID += [(rate, "cooldown", "120") for rate in ("2e-3", "4e-3", "6e-3")] + [("4e-3", "cooldown", "160")]


def adamw(rate: str, schedule: str, warmup: str) -> list[str]:
    return [*ADAMW, "--learning_rate", rate, "--lr_scheduler_type", SCHEDULES[schedule], "--warmup_steps", warmup]


SIDES = {
    "nanogpt": adamw("6e-4", "cosine", "10"),
    **{f"adamw {rate} {schedule} {warmup}": adamw(rate, schedule, warmup) for rate, schedule, warmup in GRID},
    **{f"ours {share:g}": OURS for share in SHARES},
}


def count_steps(side: str, steps: int) -> int:
    return round(steps * float(side.split()[1])) if side.startswith("ours") else steps


def run(side: str, seed: int, data: str, folder: Path, steps: int, tokenizer: Path | None = None) -> dict:
    """Run the recipe once; returns validation losses, tokens and seconds. `steps` are those of the AdamW sides."""
    out = folder / f"{side.replace(' ', '-')}-{seed}"
    flags = {
        "sources": f"prose={data}", "tokenizer": tokenizer or folder / "tokenizer", "size": "4x4x256",
        "block_size": BLOCK_SIZE,
        "per_device_train_batch_size": 16, "global_batch_tokens": STEP_TOKENS, "max_steps": count_steps(side, steps),
        "seed": seed, "data_seed": seed, "token_store": folder / f"tokens-{seed}", "output_dir": out,
        "eval_steps": 0.25, "logging_steps": 5, "save_strategy": "no",
    }  # fmt: skip
    words = [sys.executable, "recipes/pretrain.py", *(str(w) for name in flags for w in (f"--{name}", flags[name]))]
    subprocess.run(
        [*words, *SIDES[side]],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        stderr=subprocess.DEVNULL,
    )
    metrics = json.loads((out / "run.json").read_text(encoding="utf-8"))["metrics"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [(line["tokens"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    training = metrics["train_seconds"] - sum(line.get("eval_seconds", 0) for line in lines)
    return {
        "side": side, "seed": seed, "loss": metrics["eval_loss"], "tokens": metrics["tokens"],
        "seconds": round(training, 1), "curve": curve,
    }  # fmt: skip


def race(side: str, data: str, folder: Path, times: float) -> dict:
    """Compare a side with Transformers' Trainer with its defaults, which gets up to `times` as much time.

    The defaults are AdamW 5e-5 falling to 0 over three epochs of the 2M tokens, 8 rows per step, dropout 0.1, float32.
    The Trainer gets the rows of our mixture and a new stock GPT-2; time for evaluations is not counted.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    from rorchat.evaluation.loss import compute_dataset_loss
    from rorchat.mixture.collators import collate_padded
    from rorchat.mixture.dataset import Mixture, ValidationRows
    from rorchat.mixture.mixture_file import MixtureConfig
    from rorchat.mixture.plan import Plan
    from rorchat.mixture.stores import count_rows_per_epoch
    from rorchat.tokenizer import load_tokenizer, token_bytes
    from rorchat.tokens.store import TokenStore

    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    folder = folder / f"race-{int(time.time())}"
    ours = run(side, 0, data, folder, STEPS, folder.parent / "tokenizer")
    store = TokenStore(folder / "tokens-0" / "prose", "prose")
    rows = STEPS * STEP_TOKENS // BLOCK_SIZE
    plan = Plan(
        MixtureConfig.from_specs([f"prose={data}"], None), count_rows_per_epoch([store], BLOCK_SIZE), rows, BLOCK_SIZE
    )
    sizes = {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": BLOCK_SIZE, "vocab_size": len(tokenizer)}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    validation_rows, bytes_of = ValidationRows(store, BLOCK_SIZE), torch.tensor(token_bytes(tokenizer))
    curve: list[tuple[float, float]] = []

    def collate(batch):
        return collate_padded(batch, 0)

    class Clock(TrainerCallback):
        spent, since = 0.0, 0.0

        def on_train_begin(self, *_, **__):
            self.since = time.monotonic()

        def on_step_end(self, args, state, control, **__):
            now = self.spent + time.monotonic() - self.since
            if now < ours["seconds"] * (len(curve) + 1):
                return
            model.eval()
            loss = compute_dataset_loss(model, validation_rows, collate, bytes_of, 8).per_token
            model.train()
            curve.append((round(now, 1), round(loss, 4)))
            print(f"Trainer, defaults: {loss:.4f} after {now:.0f} s", file=sys.stderr)
            control.should_training_stop = loss <= ours["loss"] or now > times * ours["seconds"]
            self.spent, self.since = now, time.monotonic()

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), use_cpu=True, report_to="none", save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=Mixture([store], plan, 0), callbacks=[Clock()]).train()
    return {"ours": ours, "trainer": curve}


def prepare(data: str, folder: Path) -> None:
    words = ["--sources", f"prose={data}", "--vocab_size", "4096", "--output_dir", str(folder / "tokenizer")]
    subprocess.run([sys.executable, "recipes/tokenizer.py", *words], cwd=ROOT, check=True)


def print_results(records: list[dict], steps: int) -> None:
    """Print a table of all runs so far and the smallest share that reaches each target."""
    losses: dict[str, dict[int, float]] = {}  # by side, then by seed
    for record in records:
        losses.setdefault(record["side"], {})[record["seed"]] = record["loss"]
    print("| side | tokens | seeds | validation loss (nats/token) | spread |\n|---|---|---|---|---|")
    for side in [side for side in SIDES if side in losses]:
        by_seed = losses[side].values()
        spread = f"{min(by_seed):.3f} to {max(by_seed):.3f}"
        tokens, mean = count_steps(side, steps) * STEP_TOKENS, statistics.mean(by_seed)
        print(f"| {side} | {tokens:,} | {len(by_seed)} | {mean:.3f} | {spread} |")
    for name, side in (("nanoGPT's recipe", "nanogpt"), ("AdamW tuned", find_best_of_grid(losses))):
        if sentence := describe_share(losses, side, steps):
            print(f"\nto the loss of {name} ({side}), {sentence}")


def mean_over(seeds: list[int], by_seed: dict[int, float]) -> float:
    return statistics.mean(by_seed[seed] for seed in seeds)


def find_best_of_grid(losses: dict[str, dict[int, float]]) -> str:
    """The side of the grid with the lowest mean over the seeds that all of them have run, or an empty string."""
    grid = {side: by_seed for side, by_seed in losses.items() if side.startswith("adamw")}
    seeds = sorted(set.intersection(*map(set, grid.values()))) if grid else []
    return min(grid, key=lambda side: mean_over(seeds, grid[side])) if seeds else ""


def describe_share(losses: dict[str, dict[int, float]], side: str, steps: int) -> str:
    """The smallest share of ours whose mean loss reaches that of the side, over the seeds that both have run.

    Returns an empty string if they have no seed in common.
    """
    compared = []
    for ours in (name for name in SIDES if name.startswith("ours") and name in losses):
        if seeds := sorted(losses[ours].keys() & losses.get(side, {}).keys()):
            target, loss = mean_over(seeds, losses[side]), mean_over(seeds, losses[ours])
            compared.append((ours, f"{target:.3f} over seeds {', '.join(map(str, seeds))}", loss <= target))
    for ours, target, is_reached in compared:
        if is_reached:
            return f"{target}: {count_steps(ours, steps) / steps:.3f} of the tokens ({ours})"
    return f"{compared[-1][1]}: not reached" if compared else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of prose (Parquet, JSON Lines or text)")
    parser.add_argument("folder", type=Path, help="folder for the runs and results.jsonl")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES), metavar="SIDE")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the AdamW sides; ours take a share of them")
    parser.add_argument("--race", metavar="SIDE", help="compare a side with Transformers' Trainer with its defaults")
    parser.add_argument("--times", type=float, default=12.5, help="time limit of the Trainer as a multiple of ours")
    arguments = parser.parse_args()
    data, folder = str(Path(arguments.data).resolve()), arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").is_dir():
        prepare(data, folder)
    if arguments.race:
        print(json.dumps(race(arguments.race, data, folder, arguments.times)))
        return
    results = folder / "results.jsonl"
    records = (
        [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
    )
    for seed in arguments.seeds:
        for side in arguments.sides:
            if any(record["side"] == side and record["seed"] == seed for record in records):
                continue
            started = time.monotonic()
            records.append(run(side, seed, data, folder, arguments.steps))
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(records[-1]) + "\n")
            print(
                f"{side}, seed {seed}: {records[-1]['loss']:.4f} in {time.monotonic() - started:.0f} s", file=sys.stderr
            )
    print_results([json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()], arguments.steps)


if __name__ == "__main__":
    main()
