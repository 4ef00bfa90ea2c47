"""Folders of `datasets` are read: the rows of a saved dataset, without its caches and its other splits."""

import json
import random
from pathlib import Path

import pyarrow
import pytest
from support import chat_row, read_source, succeeded, write

from rorchat.errors import DataError
from rorchat.inspection.guess import guess_row_format
from rorchat.reading.saved_datasets import choose_files

ROWS = [{"text": f"Row {number}."} for number in range(7)]


def write_arrow(path: Path, rows: list[dict], *, with_footer: bool = False) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = pyarrow.ipc.new_file if with_footer else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


@pytest.mark.parametrize("with_footer", [False, True])
def test_arrow_files_of_both_kinds_are_read(with_footer, tmp_path):
    path = write_arrow(tmp_path / "a.ARROW", ROWS, with_footer=with_footer)
    rows, loaded = read_source(f"text={path}", "document")
    assert rows == ROWS and loaded.place == f"{path}, row 6"


def test_a_saved_dataset_is_read_by_every_source(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    for source in ("text", "prose", "books"):
        rows, loaded = read_source(f"{source}={tmp_path / 'saved'}", "document")
        assert rows == ROWS and loaded.stats.reading.unread == {}
    datasets.Dataset.from_list([chat_row(f"Say {n}.", f"{n}") for n in range(5)]).save_to_disk(tmp_path / "chats")
    assert len(read_source(f"messages={tmp_path / 'chats'}", "conversation")[0]) == 5
    assert guess_row_format(tmp_path / "chats") == "messages"


def test_only_the_training_split_of_several_is_read(tmp_path):
    import datasets

    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    rows, loaded = read_source(f"text={tmp_path / 'saved'}", "document")
    assert rows == [{"text": "train"}] and len(loaded.stats.reading.unread) == 2
    output = succeeded("check", f"text={tmp_path / 'saved'}")
    assert "split 'test' of a saved dataset, of which 'train' is read: to read it, give its folder" in output
    assert read_source(f"text={tmp_path / 'saved' / 'test'}", "document")[0] == [{"text": "test"}]
    del splits["train"]
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "others")
    assert len(read_source(f"text={tmp_path / 'others'}", "document")[0]) == 2


def test_caches_and_files_of_an_earlier_save_are_not_read(tmp_path):
    for name in ("data-00000-of-00001.arrow", "data-00000-of-00002.arrow", "cache-1f3c.arrow"):
        write_arrow(tmp_path / "saved" / name, [{"text": name}])
    write(tmp_path / "saved", "dataset_info.json", "{}")
    write(tmp_path / "saved", "state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    rows, loaded = read_source(f"text={tmp_path / 'saved'}", "document")
    assert rows == [{"text": "data-00000-of-00001.arrow"}] and len(loaded.stats.reading.unread) == 2
    (tmp_path / "saved" / "state.json").unlink()  # as in the cache of `load_dataset`
    rows, loaded = read_source(f"text={tmp_path / 'saved'}", "document")
    assert len(rows) == 2 and list(loaded.stats.reading.unread.values()) == [
        "a cache of `datasets`, whose rows are copies"
    ]


@pytest.mark.parametrize("state", ["{", "[]", '{"_data_files": 5}', '{"_data_files": [5]}', "\xff"])
def test_a_damaged_description_does_not_hide_rows(state, tmp_path):
    write_arrow(tmp_path / "data-00000-of-00001.arrow", ROWS)
    write(tmp_path, "dataset_info.json", state)
    write(tmp_path, "state.json", state.encode("latin-1"))
    write(tmp_path, "dataset_dict.json", state.encode("latin-1"))
    files, left_out = choose_files(sorted(tmp_path.iterdir()))
    assert tmp_path / "data-00000-of-00001.arrow" in files and left_out == {}


def test_json_files_of_other_folders_are_rows(tmp_path):
    for name in ("state.json", "dataset_info.json", "dataset_dict.json"):
        write(tmp_path, name, '{"text": "A row."}')
    assert len(read_source(f"text={tmp_path}", "document")[0]) == 3


def test_damage_to_an_arrow_file_rejects_the_rest_of_it(tmp_path):
    content = write_arrow(tmp_path / "whole.arrow", ROWS).read_bytes()
    for size, least in ((len(content) - 60, 3), (len(content) // 2, 0), (20, 0), (5, 0)):
        path = write(tmp_path, "cut.arrow", content[:size])
        rows, loaded = read_source(f"text={path}", "document", allow_empty=True)
        assert loaded.stats.rejects == {"not Arrow": 1} and len(rows) >= least
    path = write(tmp_path, "none.arrow", b"")
    with pytest.raises(DataError):
        read_source(f"text={path}", "document")


def test_flipped_bytes_cost_at_most_the_file(tmp_path):
    rows = [{"text": f"Row {n}.", "more": [{"a": "é" * n}]} for n in range(9)]
    content, rng, rejects = write_arrow(tmp_path / "whole.arrow", rows).read_bytes(), random.Random(0), set()
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path = write(tmp_path, "damaged.arrow", bytes(damaged))
        rejects |= set(read_source(f"text={path}", "document", allow_empty=True)[1].stats.rejects)
    assert "not Arrow" in rejects and len(rejects) > 1
