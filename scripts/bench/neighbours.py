"""Compares the plan of a pretrained project with its neighbours: half and double the size, and half the vocabulary.

    python scripts/bench/neighbours.py PROJECT OUT

Every neighbour is pretrained on the project's documents for as long as the project's own model was: its tokens are the
project's times the ratio of the speeds. The speeds are measured first and kept in OUT/speeds.json: this needs a quiet
machine, the training that follows does not. The table has the bits per byte of the same held-out documents, and
`gzip -9` of all documents for comparison.
"""

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path

import yaml

from rorchat.cli.tables import print_table
from rorchat.device import detect_device
from rorchat.model import Shape, parse_shape
from rorchat.plan.scaling import format_size
from rorchat.project.schedule import choose_batch_tokens
from rorchat.project.sizing import SHAPES
from rorchat.project.timing import measure_seconds_per_token
from rorchat.rows import row_text
from rorchat.sources.registry import find_source, load_rows


class Neighbours:
    """The project and the folder of the neighbours' runs."""

    def __init__(self, project: Path, out: Path):
        self.project, self.out = project.resolve(), out.resolve()
        self.settings = yaml.safe_load((self.project / "pretrain.yaml").read_text(encoding="utf-8"))
        tokenizer = yaml.safe_load((self.project / "tokenizer.yaml").read_text(encoding="utf-8"))
        self.tokenizer_sources, self.vocabulary = tokenizer["sources"], tokenizer["vocab_size"]
        self.shape = parse_shape(self.settings["size"])

    def list_neighbours(self) -> list[tuple[Shape, int]]:
        """(shape, vocabulary) of each."""
        at = SHAPES.index(self.shape)
        shapes = [SHAPES[n] for n in (at - 1, at + 1) if 0 <= n < len(SHAPES)]
        neighbours = [(shape, self.vocabulary) for shape in shapes]
        return [*neighbours, (self.shape, self.vocabulary // 2)] if self.vocabulary >= 1024 else neighbours

    def train(self, shape: Shape, vocabulary: int, tokens: int) -> dict:
        """run.json of a neighbour; it is not trained again if it has finished."""
        run = self.out / f"{format_size(shape)}-{vocabulary}"
        command = ["--size", format_size(shape), "--output_dir", str(run)]
        if vocabulary != self.vocabulary:
            tokenizer = self.out / f"tokenizer-{vocabulary}"
            size = ["--vocab_size", str(vocabulary), "--output_dir", str(tokenizer)]
            self._rorchat("train-tokenizer", "--config", "tokenizer.yaml", *size)
            command += ["--tokenizer", str(tokenizer)]
        batch = choose_batch_tokens(tokens, self.settings["block_size"])
        steps = max(1, tokens // batch)
        command += ["--global_batch_tokens", str(batch), "--train_tokens", str(steps * batch)]
        rows = min(self.settings["per_device_train_batch_size"], batch // self.settings["block_size"])
        self._rorchat("pretrain", "--config", "pretrain.yaml", "--per_device_train_batch_size", str(rows), *command)
        return read_record(run)

    def _rorchat(self, *words: str) -> None:
        subprocess.run([sys.executable, "-m", "rorchat.cli", *words], cwd=self.project, check=True)

    def measure_speeds(self) -> list[float]:
        """Tokens per second of the plan's model and of each neighbour; not measured again."""
        path = self.out / "speeds.json"
        if not path.is_file():
            models = [(self.shape, self.vocabulary), *self.list_neighbours()]
            length = self.settings["block_size"]
            speeds = [1 / measure_seconds_per_token(detect_device(), *model, length) for model in models]
            self.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(speeds), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def documents(self) -> bytes:
        """The text that pretraining reads, conversations included."""
        texts = (row_text(row) for spec in self.settings["sources"] for row in load_rows(spec, _find_kind(spec)))
        return "\n".join(texts).encode(errors="surrogatepass")


def _find_kind(spec: str) -> str:
    kinds = find_source(spec.partition("=")[0]).kinds
    return "document" if "document" in kinds else kinds[0]


def read_record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only_speeds", action="store_true", help="measure the speeds and end")
    arguments = parser.parse_args()
    neighbours = Neighbours(arguments.project, arguments.out)
    plan_speed, *speeds = neighbours.measure_speeds()
    if arguments.only_speeds:
        return
    own = read_record(neighbours.project / "runs" / "pretrain")
    rows = [_row("plan", neighbours.shape, neighbours.vocabulary, own)]
    for (shape, vocabulary), speed in zip(neighbours.list_neighbours(), speeds, strict=True):
        tokens = int(neighbours.settings["train_tokens"] * speed / plan_speed)
        rows.append(_row("", shape, vocabulary, neighbours.train(shape, vocabulary, tokens)))
    text = neighbours.documents()
    rows.append(["gzip -9", "", "", "", "", f"{8 * len(gzip.compress(text, 9)) / len(text):.3f}"])
    print_table(["", "size", "vocabulary", "tokens", "seconds", "bits per byte"], rows)


def _row(name: str, shape: Shape, vocabulary: int, record: dict) -> list[str]:
    metrics, tokens = record["metrics"], record["settings"]["train_tokens"]
    return [
        name, format_size(shape), f"{vocabulary:,}", f"{int(tokens):,}", f"{metrics['train_seconds']:.0f}",
        f"{metrics['eval_bits_per_byte']:.3f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
