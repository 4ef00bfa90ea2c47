"""Any dataset of the Hub is a source: its revision, configuration, split, columns, licence and errors."""

import json

import pytest
from fake_hub import TOKEN, FakeHub
from hub_datasets import QUESTIONS, as_lines, as_parquet, card, read_sources
from support import chat_row

PAIR = {"prompt": "What is red?", "chosen": "A colour.", "rejected": "No."}
CONFIGS = [{"config_name": "one", "data_files": "one/*.jsonl"}, {"config_name": "two", "data_files": "two/*.jsonl"}]
CASES = {
    "messages=me/qa": 50,
    "messages=me/qa:split=test": 3,
    "messages=hf://datasets/me/qa:split=test": 3,
    "messages=me/qa:split=tst": None,
    "messages=me/qa@v1": 1,
    "messages=me/qa@v9": None,
    "messages=me/qa:streaming=true": 50,
    "text=me/qa": None,
    "text=me/qa:text=question": 50,
    "text=me/qa:text=body": None,
    "messages=me/chats": 2,
    "preference=me/pairs": 1,
    "preference=me/named:prompt=ask:chosen=good:rejected=bad": 1,
    "text=me/configs": None,
    "text=me/configs:two": 2,
    "text=me/configs:three": None,
    "text=me/plain": 3,
    "text=me/script": None,
    "text=me/pictures": None,
    "text=me/private": None,
    "text=me/gated": None,
    "text=me/nothing": None,
    "text=me/broken": None,
    "alpaca": 1,
}


@pytest.fixture(scope="module")
def hub():
    with FakeHub() as hub:
        data = {"data/train-00000-of-00001.parquet": as_parquet(QUESTIONS, 10)}
        newest = data | {
            "README.md": card(license="cc-by-nc-4.0"),
            "data/test-00000-of-00001.parquet": as_parquet(QUESTIONS[:3]),
        }
        hub.add_dataset("me/qa", {"train.jsonl": as_lines(QUESTIONS[:1])}, newest, names={"v1": 0})
        hub.add_dataset(
            "me/chats", {"README.md": card(license="mit"), "a.jsonl": as_lines([chat_row(), chat_row("Q")])}
        )
        hub.add_dataset("me/pairs", {"README.md": card(license="unknown"), "a.json": json.dumps([PAIR]).encode()})
        hub.add_dataset("me/named", {"a.csv": b"ask,good,bad\nWhat is red?,A colour.,No.\n"})
        texts = {f"{name}/a.jsonl": as_lines([{"text": name}] * (2 if name == "two" else 1)) for name in ("one", "two")}
        hub.add_dataset("me/configs", {"README.md": card(configs=CONFIGS), **texts})
        hub.add_dataset(
            "me/plain", {"a.txt": b"First\nstory.\n<|endoftext|>\nSecond.\n<|endoftext|>", "b.txt": b"Third.\n"}
        )
        hub.add_dataset("me/script", {"script.py": b"raise SystemExit('this code ran')"})
        hub.add_dataset("me/pictures", {"a.png": b"\x89PNG"})
        hub.add_dataset("me/private", {"a.jsonl": as_lines([{"text": "secret"}])}, private=True)
        hub.add_dataset("me/gated", {"a.jsonl": as_lines([{"text": "gated"}])}, gated=True)
        hub.add_dataset("me/broken", {"a.parquet": b"PAR1 is not enough"})
        row = {"instruction": "Name a colour.", "input": "", "output": "Red."}
        hub.add_dataset("tatsu-lab/alpaca", {"README.md": card(license="mit"), "a.parquet": as_parquet([row])})
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def answers(hub, home):
    return read_sources(hub, home, *CASES)


@pytest.mark.parametrize("spec", [spec for spec in CASES if CASES[spec]])
def test_rows_are_read_whole_and_in_parts(spec, answers):
    answer = answers[spec]
    assert "message" not in answer, answer.get("message")
    assert len(answer["rows"]) == answer["kept"] == answer["rows_in"] == CASES[spec]
    assert answer["rows_of_parts"] == answer["rows"]


def test_known_columns_become_messages_and_pairs(answers):
    row = answers["messages=me/qa"]["rows"][7]
    assert row == chat_row("What is 7?", "It is 7.")
    assert answers["messages=me/qa:streaming=true"]["rows"] == answers["messages=me/qa"]["rows"]
    pair = answers["preference=me/pairs"]["rows"]
    assert answers["preference=me/named:prompt=ask:chosen=good:rejected=bad"]["rows"] == pair
    assert pair[0]["chosen"] == [{"role": "assistant", "content": "A colour."}]


def test_a_text_file_is_one_document_or_divided_at_the_end_of_text(answers):
    assert [row["text"] for row in answers["text=me/plain"]["rows"]] == ["First\nstory.", "Second.", "Third."]


def test_a_long_text_is_cut_as_in_a_local_folder(hub, tmp_path):
    text = "A sentence of some words. " * 1000
    hub.add_dataset("me/long", {"book.txt": text.encode()})
    (tmp_path / "book.txt").write_text(text)
    answers = read_sources(hub, tmp_path, "text=me/long", "text=book.txt")
    assert answers["text=me/long"]["rows"] == answers["text=book.txt"]["rows"] and answers["text=me/long"]["kept"] > 2


def test_the_record_names_commit_configuration_and_split(answers, hub):
    commits = [hub.datasets["me/qa"].commit_id(index) for index in (0, 1)]
    expected = {"dataset": "me/qa", "config": "default", "split": "train"}
    assert answers["messages=me/qa"]["hub"] == expected | {"revision": commits[1]}
    assert answers["messages=me/qa@v1"]["hub"] == expected | {"revision": commits[0]}
    assert answers["messages=me/qa"]["pinned"] == f"messages=me/qa:default:split=train@{commits[1]}"
    commit = hub.datasets["tatsu-lab/alpaca"].commit_id()
    assert answers["alpaca"]["pinned"] == f"alpaca=@{commit}" and answers["alpaca"]["hub"]["revision"] == commit


def test_the_licence_is_the_one_of_the_card(answers):
    assert answers["messages=me/qa"]["licence"] == "cc-by-nc-4.0 (not for commercial use)"
    assert answers["messages=me/chats"]["licence"] == "mit"
    assert answers["preference=me/pairs"]["licence"] == "unstated: the dataset's card names no licence"
    assert answers["messages=me/qa@v1"]["licence"] == "unstated: the dataset has no card"
    assert answers["alpaca"]["licence"].startswith("CC BY-NC 4.0")  # a named source knows it


ERRORS = {
    "messages=me/qa:split=tst": (2, "no split 'tst'. Did you mean 'test'? Splits: train, test"),
    "messages=me/qa@v9": (2, "no revision 'v9'"),
    "text=me/qa": (65, "only question, answer. Name the columns, as in --columns text=question"),
    "text=me/qa:text=body": (65, "no column 'body', only question, answer"),
    "text=me/configs": (2, "several configurations. Choose one, as in me/configs:one. Configurations: one, two"),
    "text=me/configs:three": (
        2,
        "no configuration 'three'. Choose one, as in me/configs:one. Configurations: one, two",
    ),
    "text=me/script": (65, "is made by a script, and code of a dataset is never run"),
    "text=me/pictures": (65, "'imagefolder'; only parquet, json, csv, text can be read"),
    "text=me/private": (77, "or it is private: check the name, or log in with `hf auth login`"),
    "text=me/gated": (77, "is gated: accept its terms on "),
    "text=me/nothing": (77, "There is no dataset me/nothing on the Hub, or it is private"),
    "text=me/broken": (65, "`datasets` cannot read me/broken"),
}


@pytest.mark.parametrize("spec", [spec for spec in CASES if not CASES[spec]])
def test_an_error_is_one_line_with_the_choices_and_its_exit_code(spec, answers):
    code, words = ERRORS[spec]
    assert answers[spec]["code"] == code and words in answers[spec]["message"], answers[spec]
    assert "\n" not in answers[spec]["message"]


def test_a_token_opens_private_and_gated_datasets_and_a_missing_one_is_missing(hub, tmp_path):
    answers = read_sources(hub, tmp_path, "text=me/private", "text=me/gated", "text=me/nothing", token=TOKEN)
    assert [answers[f"text=me/{name}"]["rows"] for name in ("private", "gated")] == [
        [{"text": "secret"}], [{"text": "gated"}],
    ]  # fmt: skip
    assert answers["text=me/nothing"]["code"] == 65
    assert answers["text=me/nothing"]["message"].startswith("There is no dataset me/nothing on the Hub, and no local")


def test_a_local_folder_takes_precedence_unless_the_hub_is_named(hub, tmp_path):
    folder = tmp_path / "me" / "configs"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(as_lines([{"text": "local"}]))
    answers = read_sources(hub, tmp_path, "text=me/configs", "text=me/configs:two", "text=hf://datasets/me/configs:one")
    assert [answer["rows"] for answer in answers.values()] == [
        [{"text": "local"}], [{"text": "two"}] * 2, [{"text": "one"}],
    ]  # fmt: skip


def test_the_cache_is_read_without_a_network_at_exactly_the_commit(tmp_path):
    with FakeHub() as hub:
        dataset = hub.add_dataset("me/t", {"README.md": card(license="mit"), "a.jsonl": as_lines([{"text": "old"}])})
        first = read_sources(hub, tmp_path, "text=me/t")["text=me/t"]
        dataset.commits.append({"a.jsonl": as_lines([{"text": "new"}])})
        assert read_sources(hub, tmp_path, "text=me/t")["text=me/t"]["rows"] == [{"text": "new"}]
        requests = len(hub.requests)
        pinned = read_sources(hub, tmp_path, first["pinned"])[first["pinned"]]
        assert pinned["rows"] == [{"text": "old"}] and pinned["licence"] == "mit"
        assert len(hub.requests) == requests
        missing = f"{first['pinned'][:-40]}{'0' * 40}"
        offline = read_sources(hub, tmp_path, first["pinned"], "text=me/t", missing, "text=me/u", HF_HUB_OFFLINE="1")
    assert offline[first["pinned"]]["rows"] == [{"text": "old"}]
    assert offline["text=me/t"]["rows"] == [{"text": "new"}]  # the last one that was downloaded
    assert offline[missing]["code"] == offline["text=me/u"]["code"] == 76
    assert "there is no local path me/u" in offline["text=me/u"]["message"]
    stopped = read_sources(hub, tmp_path, "text=me/u", first["pinned"])
    assert stopped["text=me/u"]["code"] == 76 and stopped[first["pinned"]]["rows"] == [{"text": "old"}]


def test_a_failing_hub_is_a_remote_error(tmp_path):
    with FakeHub() as hub:
        hub.failing = {"GET .*": 500}
        answer = read_sources(hub, tmp_path, "text=me/t")["text=me/t"]
    assert answer["code"] == 76 and "text=PATH" in answer["message"] and "\n" not in answer["message"]


def test_real_rows_are_the_same_from_the_hub_as_from_their_files(shared_data, tmp_path):
    """Files of real datasets, as repositories of the Hub: Parquet, JSON Lines, an array of JSON and compressed text."""
    files = {
        "text": "fineweb_edu/sample.parquet",
        "messages": "gsm8k/train.jsonl",
        "alpaca": "alpaca/alpaca_tiny.json",
        "preference": "preference/ultrafeedback_eval_200.jsonl",
        "prompt_completion": "chat/dolly_hhrlhf_train_small.jsonl",
    }
    with FakeHub() as hub:
        for name, path in files.items():
            file = shared_data / path
            hub.add_dataset(f"real/{name}", {f"train{file.suffix}": file.read_bytes()})
        specs = {f"{name}=real/{name}": f"{name}={shared_data / path}" for name, path in files.items()}
        answers = read_sources(hub, tmp_path, *specs, *specs.values())
    for spec, local in specs.items():
        assert answers[spec]["rows"] == answers[local]["rows"] != [], spec
        assert answers[spec]["rejects"] == answers[local]["rejects"]


@pytest.mark.slow
def test_a_large_split_is_streamed_so_that_the_first_rows_need_only_the_first_file(tmp_path):
    rows = [{"text": f"row {number}"} for number in range(200)]
    with FakeHub() as hub:
        files = {f"train-{number:05d}.jsonl": as_lines(rows[number * 40 :][:40]) for number in range(5)}
        hub.add_dataset("me/large", files)
        small = read_sources(hub, tmp_path / "small", "text=me/large")["text=me/large"]
        home = tmp_path / "large"
        assert sum(hub.sent[name] for name in files) >= sum(map(len, files.values()))
        hub.sent.clear()
        size = sum(map(len, files.values()))
        limit = f"from rorchat.sources import hub_dataset; hub_dataset.STREAM_ABOVE_BYTES = {size - 1}"
        take = "from itertools import islice; first = list(islice(load_rows('text=me/large', 'document'), 3))"
        first = read_sources(hub, home, setup=f"{limit}\n{take}\nanswers['first'] = first")["first"]
        assert first == rows[:3]
        assert [bool(hub.sent.get(name)) for name in files] == [True, False, False, False, False]
        streamed = read_sources(hub, home, "text=me/large", setup=limit)["text=me/large"]
        kept = read_sources(hub, home, "text=me/large:streaming=false", setup=limit)["text=me/large:streaming=false"]
    assert streamed["rows"] == streamed["rows_of_parts"] == small["rows"] == kept["rows"] == rows
    assert (streamed["parts"], small["parts"], kept["parts"]) == (5, 1, 1)
