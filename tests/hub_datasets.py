"""Datasets for the fake Hub, and a process that reads them as users do."""

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import preloaded
import pyarrow
import pyarrow.parquet
from fake_hub import FakeHub

QUESTIONS = [{"question": f"What is {number}?", "answer": f"It is {number}."} for number in range(50)]

#: Reads sources in one process, because `huggingface_hub` reads its settings only once, on import
_READ = """
import json, sys
from rorchat.console import configure_libraries
configure_libraries()
from rorchat.errors import RorchatError
from rorchat.sources.registry import find_source, load_rows, pin_spec, source_parts
answers = {}
exec(sys.argv[2])
for spec in json.loads(sys.argv[1]):
    try:
        rows = load_rows(spec, find_source(spec.partition("=")[0]).kinds[0])
        answers[spec] = {"rows": list(rows), "place": rows.place, **rows.stats.summary(), "pinned": pin_spec(spec)}
        parts = [list(load_rows(spec, rows.kind, part=part)) for part in source_parts(spec)]
        answers[spec] |= {"parts": len(parts), "rows_of_parts": sum(parts, [])}
    except RorchatError as error:
        answers[spec] = {"code": error.exit_code, "message": str(error)}
print(json.dumps(answers))
"""


def as_parquet(rows: list[dict], row_group_size: int | None = None) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=row_group_size)
    return file.getvalue()


def as_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def card(**metadata) -> bytes:
    """README.md with these metadata."""
    return ("---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items()) + "---\n").encode()


def read_sources(
    hub: FakeHub, home: Path, *specs: str, token: str | None = None, setup: str = "", **environment: str
) -> dict[str, Any]:
    """{spec: rows, counts, licence ... or exit code and message}, read in another process.

    Args:
        setup: Python code that runs there first.
    """
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [preloaded.client("python"), "-c", _READ, json.dumps(specs), setup],
        env=hub.environment(home, token) | {"HF_HUB_OFFLINE": "0"} | environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert set(specs) <= set(answers)
    return answers
