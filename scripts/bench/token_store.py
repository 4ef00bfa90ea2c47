"""Measures how long it takes to open existing token stores and to read random rows of them.

    python scripts/bench/token_store.py                      # four stores of 5, then of 250 million tokens each

Each size runs in a separate process: seconds from the imports to the first row of a plan of 10^9 rows (read manifests,
map arrays, make the plan, check the row), milliseconds per random row, and the growth of the process after 2,000 rows
(RssAnon, which excludes the pages of memory-mapped files). Then workers read random rows, each others, as those of a
DataLoader do: CPU seconds of all of them if they share the record of checked blocks, and if each checks for itself.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

ROWS, BLOCK_SIZE, SOURCES = 10**9, 1024, 4
WORKERS, ROWS_OF_WORKER = 4, 20_000


def make_stores(folder: Path, tokens: int) -> list[Path]:
    """Write stores of random ids in the format of `rorchat.tokens.prepare`."""
    from rorchat.tokens.store import Manifest
    from rorchat.tokens.store_writer import ArrayWriter, StoreWriter

    stores = []
    for source in range(SOURCES):
        store = folder / f"source-{source}"
        store.mkdir(parents=True)
        writer = StoreWriter(store, Manifest(f"source-{source}", "none", "none", 50_304, 50_256, 0.01, 0))
        for split, count in (("train", tokens), ("validation", tokens // 100)):
            array = ArrayWriter(writer.next_path(split), np.uint16)
            draw = np.random.default_rng(source)
            for start in range(0, count, 10**7):
                array.write(draw.integers(0, 50_000, min(10**7, count - start), dtype=np.uint16))
            array.close()
            writer.add_shard(split, np.zeros(1, dtype=np.int64), count * 4)
        writer.close()
        stores.append(store)
    return stores


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(folders: list[str]) -> dict[str, float]:
    from rorchat.mixture.dataset import Mixture
    from rorchat.mixture.mixture_file import MixtureConfig
    from rorchat.mixture.plan import Plan
    from rorchat.mixture.stores import count_rows_per_epoch
    from rorchat.tokens.store import TokenStore

    before, started = anonymous_bytes(), time.perf_counter()
    stores = [TokenStore(folder) for folder in folders]
    config = MixtureConfig.from_specs([store.name for store in stores], [4, 3, 2, 1])
    mixture = Mixture(stores, Plan(config, count_rows_per_epoch(stores, BLOCK_SIZE), ROWS, BLOCK_SIZE), seed=0)
    mixture[0]
    first = time.perf_counter() - started
    times = []
    for row in np.random.default_rng(0).integers(0, ROWS, 2000).tolist():
        started = time.perf_counter()
        mixture[row]
        times.append(1000 * (time.perf_counter() - started))
    return {
        "first row, s": first,
        "random row, ms (median)": statistics.median(times),
        "random row, ms (99 %)": float(np.quantile(times, 0.99)),
        "grown, MB": (anonymous_bytes() - before) / 1e6,
    }


def measure_workers(folders: list[str], shares_record: bool) -> dict[str, float]:
    from rorchat.tokens import store as store_module

    if not shares_record:
        store_module.open_record = lambda path, crcs: np.zeros(len(crcs), dtype=np.uint8)
    stores = [store_module.TokenStore(folder) for folder in folders]
    for worker in range(WORKERS):
        if not os.fork():
            draw = np.random.default_rng(worker)
            for source in draw.integers(0, SOURCES, ROWS_OF_WORKER).tolist():
                start = int(draw.integers(0, stores[source].tokens("train") - BLOCK_SIZE))
                stores[source].slice("train", start, start + BLOCK_SIZE)
            os._exit(0)
    for _ in range(WORKERS):
        os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    name = "with a shared record" if shares_record else "each for itself"
    return {f"{WORKERS} workers, CPU s ({name})": used.ru_utime + used.ru_stime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[5, 250], help="million tokens of each store")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--stores", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(MEASUREMENTS[arguments.measure](arguments.stores)))
        return
    for millions in arguments.millions:
        with tempfile.TemporaryDirectory() as folder:
            stores = make_stores(Path(folder), millions * 10**6)
            measured = {}
            for name in MEASUREMENTS:
                words = [sys.executable, __file__, "--measure", name, "--stores", *map(str, stores)]
                measured |= json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        text = ", ".join(f"{name} {value:.3f}" for name, value in measured.items())
        print(f"{SOURCES} stores of {millions:,}M tokens: {text}")


MEASUREMENTS = {  # a process each
    "rows": measure,
    "private": partial(measure_workers, shares_record=False),
    "shared": partial(measure_workers, shares_record=True),
}

if __name__ == "__main__":
    main()
