"""The part of a spec after `NAME=`: a path, or a dataset of the Hub, with options."""

import pytest
from support import write

from rorchat.errors import UsageError
from rorchat.sources.hub_dataset import HubDataset
from rorchat.sources.location import add_columns, format_spec, may_name_dataset, parse_location
from rorchat.sources.registry import find_source, is_pin_of, list_sources, locate, source_digest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATASETS = {
    "text=me/data": HubDataset("me/data"),
    "text=hf://datasets/me/data": HubDataset("me/data"),
    "text=me/data:small": HubDataset("me/data", "small"),
    "text=me/data@v1.0": HubDataset("me/data", revision="v1.0"),
    "text=me/data@refs/convert/parquet": HubDataset("me/data", revision="refs/convert/parquet"),
    "text=me/data:small:split=test:streaming=true@v1": HubDataset("me/data", "small", "test", "v1", True),
    "text=hf://datasets/me/data:small@v1": HubDataset("me/data", "small", revision="v1"),
    "messages=me/da.ta_1-2": HubDataset("me/da.ta_1-2", source="messages"),
    "alpaca=someone/cleaned": HubDataset("someone/cleaned", source="alpaca"),
}


@pytest.mark.parametrize("spec", DATASETS)
def test_a_dataset_of_the_hub_is_parsed_and_written_as_the_same(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    location = locate(spec)
    assert location.dataset == DATASETS[spec] and location.path is None and not location.columns
    assert locate(format_spec(spec.partition("=")[0], location)) == location


@pytest.mark.parametrize("where", ["my_texts/", "/data/me", "./me/data", "~/me/data", "me/data.jsonl", "me/data.csv.gz",
                                   "me/data/deep", "me", "me/data/", "../me/data", "a b/c"])  # fmt: skip
def test_anything_else_is_a_path_even_if_it_does_not_exist(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    location = locate(f"text={where}")
    assert location.dataset is None and location.path is not None
    assert not may_name_dataset(where)


def test_an_existing_path_takes_precedence_and_this_is_told_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "notes").mkdir(parents=True)
    for _ in range(2):
        location = locate("text=me/notes")
        assert location.dataset is None and str(location.path) == "me/notes"
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "give hf://datasets/me/notes" in message
    for spec in ("text=hf://datasets/me/notes", "text=me/notes@v1", "text=me/notes:split=test", "text=me/notes:small"):
        assert locate(spec).dataset.path == "me/notes"
    assert capsys.readouterr().err == ""


def test_columns_are_options_of_paths_and_of_datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rows.csv", "odd@name.csv"):
        path = write(tmp_path, name, "a")
        location = locate(f"messages={path}:user=q:assistant=a")
        assert str(location.path) == str(path) and location.columns == {"user": "q", "assistant": "a"}
        assert locate(f"messages={path}").columns == {}
    location = locate("messages=me/data:small:user=q:assistant=a@v1")
    assert location.columns == {"user": "q", "assistant": "a"}
    assert (location.dataset.config, location.dataset.revision) == ("small", "v1")


WRONG = {
    "text=me/data:splt=x": "unknown option 'splt'. Did you mean 'split'",
    "text=me/data:user=x": "unknown option 'user'",
    "text=me/data:streaming=yes": "streaming is 'yes'; give true or false",
    "text=me/data:split=": "split is ''; give a name",
    "messages=me/data:user=q": "cannot read the columns user: it takes user and assistant or messages",
    "text=rows.csv:split=x": "rows.csv is a local path, which has no revision, split or streaming",
    "text=rows.csv@v1": "rows.csv is a local path",
    "alpaca=:split=test": "its split and columns are fixed",
}


@pytest.mark.parametrize("spec", WRONG)
def test_a_wrong_option_is_a_usage_error_of_one_line(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "rows.csv", "a")
    with pytest.raises(UsageError) as failure:
        locate(spec)
    assert WRONG[spec] in str(failure.value) and "\n" not in str(failure.value)


def test_a_commit_of_a_named_source_keeps_its_other_arguments():
    for name in list_sources():
        source = find_source(name)
        if source.hub is None:
            continue
        pinned = parse_location(source, f"@{COMMIT}").dataset
        assert (pinned.path, pinned.split, pinned.revision) == (source.hub["path"], source.hub["split"], COMMIT)
        more = {key: value for key, value in source.hub.items() if key in ("data_files", "data_dir")}
        assert dict(pinned.files) == more and pinned.config == source.hub.get("name")
        assert format_spec(name, parse_location(source, f"@{COMMIT}")) == f"{name}=@{COMMIT}"
        assert is_pin_of(f"{name}=@{COMMIT}", name) and not is_pin_of(name, f"{name}=@{COMMIT}")


def test_added_columns_go_to_the_sources_that_take_them_and_only_once(tmp_path):
    path = write(tmp_path, "rows.csv", "a")
    columns = {"user": "my question", "assistant": "a:b"}
    specs = [f"messages={path}", "persona=100", "alpaca", "messages=me/data@v1", f"text={path}"]
    added = add_columns(specs, columns)
    options = ":user=my question:assistant=a%3Ab"
    assert added == [f"messages={path}{options}", "persona=100", "alpaca", f"messages=me/data{options}@v1", specs[4]]
    assert add_columns(added, columns) == added
    assert locate(added[0]).columns == locate(added[3]).columns == columns
    with pytest.raises(UsageError, match="Source 'persona' cannot read the columns user, assistant"):
        add_columns(["persona=100"], columns)


def test_a_digest_changes_with_the_columns_and_the_commit(tmp_path):
    path = write(tmp_path, "rows.csv", "a,b\nc,d\n")
    assert len({source_digest(f"text={path}{columns}") for columns in ("", ":text=a", ":text=b")}) == 3
    pinned = f"text=me/data:default:split=train@{COMMIT}"
    specs = [pinned, pinned.replace("train", "test"), f"{pinned[:-1]}8", pinned.replace("@", ":text=a@"), "alpaca",
             f"alpaca=@{COMMIT}"]  # fmt: skip
    assert len({source_digest(spec) for spec in specs}) == len(specs)


@pytest.mark.parametrize(
    ("spec", "matches"),
    [
        ("text=me/data", True),
        ("text=me/data:small", True),
        ("text=me/data:split=test", True),
        ("text=me/data:other", False),
        ("text=me/data:split=train", False),
        ("text=me/data@v1", False),
        ("text=me/else", False),
        ("messages=me/data", False),
        ("text=me/data:text=body", False),
        ("text=nowhere/", False),
    ],
)
def test_a_pinned_spec_fits_what_leaves_its_parts_open(spec, matches):
    assert is_pin_of(f"text=me/data:small:split=test@{COMMIT}", spec) == matches
