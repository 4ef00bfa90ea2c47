"""Measures what size, length and vocabulary do to small models, and fits the scaling law of rorchat/project/sizing.py.

    python scripts/bench/small_models.py run BOOKS.jsonl OUT     # trains the grid; resumes where it stopped
    python scripts/bench/small_models.py fit OUT                 # prints the constants and the error of every run

BOOKS.jsonl has one document of English prose per line (`{"text": ...}`). A run is pretraining with the settings that
`rorchat new` writes; its bits per byte are those of the held-out documents after the last step.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

from rorchat.model import count_scaling_parameters, parse_shape
from rorchat.project.sizing import effective_bytes

BLOCK_SIZE, BATCH_TOKENS = 256, 2048
#: (vocabulary, size, tokens)
GRID = (
    (512, "2x2x64", 524_288), (1024, "2x2x64", 524_288), (4096, "2x2x64", 524_288), (8192, "2x2x64", 524_288),
    (1024, "2x2x64", 2_097_152), (512, "4x4x128", 524_288), (1024, "4x4x128", 524_288), (1024, "4x4x192", 524_288),
)  # fmt: skip
EXPONENTS = {
    "alpha": np.arange(0.1, 0.85, 0.05), "beta": np.arange(0.1, 0.65, 0.05), "gamma": np.arange(0.3, 1.25, 0.1)
}  # fmt: skip
SMOOTH = 1e-6  # keeps the least squares solvable where two terms are nearly proportional


def run_grid(text: Path, out: Path) -> None:
    """Trains every run of GRID that is not in OUT/results.jsonl yet."""
    from rorchat.recipes import pretrain, tokenizer

    results = out / "results.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    done = {tuple(record["run"]) for record in read_results(out)} if results.is_file() else set()
    for vocabulary, size, tokens in GRID:
        if (vocabulary, size, tokens) in done:
            continue
        folder = out / f"tokenizer-{vocabulary}"
        tokenizer.main(["--sources", f"text={text}", "--vocab_size", str(vocabulary), "--output_dir", str(folder)])
        run = out / f"{vocabulary}-{size}-{tokens}"
        metrics = pretrain.main([
            "--sources", f"text={text}", "--tokenizer", str(folder), "--token_store", f"{folder}-store", "--size", size,
            "--block_size", str(BLOCK_SIZE), "--per_device_train_batch_size", str(BATCH_TOKENS // BLOCK_SIZE),
            "--global_batch_tokens", str(BATCH_TOKENS), "--train_tokens", str(tokens), "--optimizer", "muon",
            "--matrix_learning_rate", "1e-2", "--validation_share", "0.05", "--eval_strategy", "no",
            "--output_dir", str(run),
        ])  # fmt: skip
        store = json.loads(next(Path(f"{folder}-store").glob("*/manifest.json")).read_text(encoding="utf-8"))
        record = {
            "run": [vocabulary, size, tokens],
            "bits_per_byte": metrics["eval_bits_per_byte"],
            "nats_per_token": metrics["eval_loss"],
            "seconds": metrics["train_seconds"],
            "training_bytes": sum(s["utf8_bytes"] for s in store["shards"] if s["split"] == "train"),
            "training_tokens": sum(s["tokens"] for s in store["shards"] if s["split"] == "train"),
        }
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def fit(records: list[dict]) -> tuple[dict[str, float], np.ndarray]:
    """Least squares for every combination of exponents; the coefficients must not be negative.

    Returns:
        (constants of the law, error of each run in bits per byte).
    """
    values = np.array([record["bits_per_byte"] for record in records])
    parameters, data, vocabulary = (np.array(column) for column in zip(*map(_inputs, records), strict=True))
    best: tuple[float, dict[str, float], np.ndarray] | None = None
    for exponents in itertools.product(*EXPONENTS.values()):
        terms = [x**-e for x, e in zip((parameters, data, vocabulary), exponents, strict=True)]
        scale = np.array([1.0, *(term.mean() for term in terms)])
        matrix = np.stack([np.ones_like(values), *terms], axis=1) / scale  # (R, 4)
        solution = np.linalg.solve(matrix.T @ matrix + SMOOTH * np.eye(4), matrix.T @ values) / scale
        errors = matrix * scale @ solution - values
        if (solution >= 0).all() and (best is None or (errors**2).sum() < best[0]):
            constants = dict(zip(("E", "A", "B", "C"), solution.tolist(), strict=True))
            best = (errors**2).sum(), constants | dict(zip(EXPONENTS, map(float, exponents), strict=True)), errors
    if best is None:
        raise SystemExit("No combination of exponents has coefficients that are not negative: more runs are needed.")
    return best[1], best[2]


def _inputs(record: dict) -> tuple[float, float, float]:
    """(parameters, effective bytes, vocabulary) of a run."""
    vocabulary, size, tokens = record["run"]
    bytes_read = tokens * record["training_bytes"] / record["training_tokens"]
    parameters = count_scaling_parameters(parse_shape(size), vocabulary)
    return parameters, effective_bytes(bytes_read, record["training_bytes"]), vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("text", type=Path)
    run.add_argument("out", type=Path)
    commands.add_parser("fit").add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run_grid(arguments.text, arguments.out)
        return
    records = read_results(arguments.out)
    constants, errors = fit(records)
    print(", ".join(f"{name}={value:.4g}" for name, value in constants.items()))
    print("| vocabulary | size | tokens | bits per byte | law - run |\n|---|---|---|---|---|")
    for record, error in zip(records, errors, strict=True):
        vocabulary, size, tokens = record["run"]
        print(f"| {vocabulary:,} | {size} | {tokens:,} | {record['bits_per_byte']:.3f} | {error:+.3f} |")


if __name__ == "__main__":
    main()
