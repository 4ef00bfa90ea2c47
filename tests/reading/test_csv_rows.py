"""A damaged CSV row does not affect the others, and only one row is in memory at a time."""

import tracemalloc

import pytest
from support import read_source, write

from rorchat.sources.registry import load_rows


@pytest.mark.parametrize("bad", [[0], [10], [10, 11, 500], [999]])
def test_an_unclosed_quotation_mark_rejects_only_its_row(bad, tmp_path):
    lines = [f'{number},"row {number},\n""two"" lines"' for number in range(1000)]
    for number in bad:
        lines[number] = f'{number},"row'
    path = write(tmp_path, "rows.csv", "id,text\n" + "\n".join(lines) + "\n")
    _, loaded = read_source(f"text={path}", "document", allow_empty=True)
    assert loaded.stats.rejects.keys() == {"not CSV"} and loaded.stats.kept >= 1000 - 2 * len(bad)
    lines = [f"row {number}" for number in range(1000)]
    for number in bad:
        lines[number] = f'"row {number}'
    path = write(tmp_path, "plain.csv", "text\n" + "\n".join(lines) + "\n")
    rows, loaded = read_source(f"text={path}", "document", allow_empty=True)
    if len(bad) == 1:
        assert (loaded.stats.rows_in, loaded.stats.rejects) == (1000, {"not CSV": 1})
        assert loaded.stats.places["not CSV"][0].startswith(f"{path}:{bad[0] + 2} (")
    else:
        assert loaded.stats.rows_in == 1000 and loaded.stats.rejects == {"not CSV": 3}


def test_duplicate_columns_are_rejected_but_unnamed_ones_are_not(tmp_path):
    twice = write(tmp_path, "twice.csv", "text,text\na,b\nc,d\n")
    _, loaded = read_source(f"text={twice}", "document", allow_empty=True)
    assert (loaded.stats.rows_in, loaded.stats.rejects) == (2, {"duplicate keys": 2})
    blank = write(tmp_path, "blank.csv", "text,,\na,b,c\n")
    assert read_source(f"text={blank}", "document")[0] == [{"text": "a"}]
    latin = write(tmp_path, "latin.csv", b"text,na\xefve\na,b\n")
    _, loaded = read_source(f"text={latin}", "document", allow_empty=True)
    assert loaded.stats.places == {
        "invalid UTF-8": [f"{tmp_path / 'latin.csv'}:1 (in the header; the rest of the file is lost)"]
    }


def test_csv_is_read_in_the_memory_of_one_row(tmp_path):
    path = write(tmp_path, "rows.csv", "text\n" + "".join(f"{'a story ' * 100}{n}\n" for n in range(10_000)))
    assert path.stat().st_size > 8_000_000
    tracemalloc.start()
    rows = load_rows(f"text={path}", "document")
    assert sum(1 for _ in rows) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
