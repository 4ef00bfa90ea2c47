"""Compares preparing a token store from a file with tokenizing texts in memory, in MB of UTF-8 per second.

    python scripts/bench/tokenization.py prose=DATA/corpus_prose DATA/gpt2_tokenizer
    python scripts/bench/tokenization.py prose=DATA/corpus_prose runs/my-tokenizer --workers 2

    rorchat     all of `rorchat data prepare`: read, check, hash, tokenize, write shards and manifest
    tiktoken    encode_ordinary_batch of the texts in memory with as many threads (vocabulary of GPT-2 only)
    tokenizers  encode_batch_fast of the texts in memory with as many threads

The sides are interleaved in one process; the median of the rounds counts. All sides must give the same ids.
"""

import argparse
import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", help="NAME=PATH")
parser.add_argument("tokenizer", help="folder")
parser.add_argument("--workers", type=int, default=1)
parser.add_argument("--rounds", type=int, default=5)
arguments = parser.parse_args()
os.environ["RAYON_NUM_THREADS"] = str(arguments.workers)
os.environ["TOKENIZERS_PARALLELISM"] = "true" if arguments.workers > 1 else "false"

from rorchat.sources.registry import load_rows  # noqa: E402
from rorchat.tokenizer import load_tokenizer  # noqa: E402
from rorchat.tokens.encode import GPT2_PATTERN, Encoder  # noqa: E402
from rorchat.tokens.prepare import prepare  # noqa: E402
from rorchat.validation_split import text_digest  # noqa: E402


def read_texts(source: str) -> list[str]:
    """The texts without duplicates, as in the store."""
    seen, texts = set(), []
    for row in load_rows(source, "document"):
        mark = text_digest(row["text"])
        if mark not in seen:
            seen.add(mark)
            texts.append(row["text"])
    return texts


def make_sides(tokenizer, texts: list[str], folder: Path) -> dict:
    """Functions that run each side: rorchat returns its store, the others lists of ids."""
    engine = tokenizer.backend_tokenizer
    engine.encode_special_tokens = True

    def rorchat():
        shutil.rmtree(folder, ignore_errors=True)
        return prepare(arguments.source, tokenizer, folder, validation_share=0.01, workers=arguments.workers)

    def tokenizers():
        return [encoding.ids for encoding in engine.encode_batch_fast(texts, add_special_tokens=False)]

    sides = {"rorchat": rorchat, "tokenizers": tokenizers}
    encoder = Encoder(tokenizer)
    if encoder.pattern == GPT2_PATTERN and encoder._merger is not None:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        ranks = encoder._merger._mergeable_ranks
        reference = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
        # ranks equal ids except for single bytes, which GPT-2 orders differently
        sides["tiktoken"] = lambda: reference.encode_ordinary_batch(texts, num_threads=arguments.workers)
    return sides


def ids_are_equal(results: dict, texts: int) -> bool:
    """Whether all sides give the same ids, as sorted lists: a store orders documents by split."""
    store = results["rorchat"]
    ours = np.concatenate([store.slice(split, 0, store.tokens(split)) for split in ("train", "validation")])
    theirs = np.array([token for ids in results["tokenizers"] for token in ids], dtype=np.int64)
    ends = np.full(texts, store.manifest.end_of_text_id)
    equal = np.array_equal(np.sort(ours), np.sort(np.concatenate([theirs, ends])))
    return equal and sum(map(len, results.get("tiktoken", results["tokenizers"]))) == len(theirs)


def main() -> int:
    tokenizer = load_tokenizer(arguments.tokenizer)
    texts = read_texts(arguments.source)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        sides = make_sides(tokenizer, texts, Path(folder) / "store")
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        equal = ids_are_equal({name: work() for name, work in sides.items()}, len(texts))
        for _ in range(arguments.rounds):
            for name, work in sides.items():
                gc.collect()
                started = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - started)
    print(f"{len(texts):,} texts, {megabytes:.1f} MB, {len(tokenizer):,} tokens, {arguments.workers} workers")
    rates = {name: megabytes / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:12} {rate:6.1f} MB/s   rorchat is {rates['rorchat'] / rate:.2f}x")
    print("ids equal" if equal else "IDS DIFFER")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
