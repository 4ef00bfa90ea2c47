"""Folders of `datasets`: which of their files hold rows.

`Dataset.save_to_disk` writes Arrow files, `state.json`, which names them, and `dataset_info.json`. Beside them may be
caches of `Dataset.map`, whose rows are copies. `DatasetDict.save_to_disk` writes a folder for each split and
`dataset_dict.json`.
"""

import json
from collections.abc import Iterable
from pathlib import Path

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
ARROW = ".arrow"
TRAIN = "train"  # the split that is read, as on the Hub


def choose_files(files: Iterable[Path]) -> tuple[list[Path], dict[Path, str]]:
    """(the files without those that describe a saved dataset, Arrow files to leave out -> why), in the same order."""
    files = list(files)
    tables = {file.parent for file in files if file.suffix.lower() == ARROW}
    infos = {file.parent for file in files if file.name == INFO} & tables
    splits = {file.parent: _read_list(file, "splits") for file in files if file.name == SPLITS}
    data_files = {folder: _list_data_files(folder) for folder in infos}
    chosen, left_out = [], {}
    for file in files:
        folder = file.parent
        if (file.name in (STATE, INFO) and folder in infos) or (file.name == SPLITS and splits[folder]):
            continue
        if why := _leave_out_split(file, splits) or _leave_out_cache(file, data_files.get(folder)):
            left_out[file] = why
        else:
            chosen.append(file)
    return chosen, left_out


def _list_data_files(folder: Path) -> set[str]:
    """The names of the files with the rows; empty if `state.json` does not say."""
    files = _read_list(folder / STATE, "_data_files")
    return {str(file.get("filename")) for file in files if isinstance(file, dict)}


def _read_list(path: Path, key: str) -> list:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, list) else []


def _leave_out_split(file: Path, splits: dict[Path, list]) -> str:
    for folder in file.parents:
        if TRAIN in (names := splits.get(folder, [])):
            split = file.relative_to(folder).parts[0]
            if split != TRAIN and split in names:
                return f"split {split!r} of a saved dataset, of which {TRAIN!r} is read: to read it, give its folder"
    return ""


def _leave_out_cache(file: Path, data_files: set[str] | None) -> str:
    if data_files is None or file.suffix.lower() != ARROW:
        return ""
    is_data = file.name in data_files if data_files else not file.name.startswith("cache-")
    return "" if is_data else "a cache of `datasets`, whose rows are copies"
