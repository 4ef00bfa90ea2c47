"""`rorchat data list`, `check` and `show`: their output; an error is one line on stderr and an exit code."""

import contextlib
import json
import os
import pty
import re
import subprocess

import preloaded
import pytest
import typer
from support import RORCHAT, TEXTS, chat_row, command, refused, succeeded, write

import rorchat.cli
from rorchat.chatml import encode_conversation
from rorchat.cli.data import format_in_brackets, format_in_colour
from rorchat.errors import UsageError
from rorchat.inspection import ShownToken
from rorchat.sources.base import LOSS_BY_KIND
from rorchat.sources.registry import find_source, list_sources

COMMANDS = {
    "list": [],
    "check": [
        "--as", "--columns", "--rejects", "--tokenizer", "--max_length", "--against", "--min_characters",
        "--max_characters", "--max_repetition", "--min_letters", "--min_latin",
    ],
    "show": ["--tokenizer", "--row", "--as", "--columns"],
    "prepare": [
        "--tokenizer", "--out", "--workers", "--validation_share", "--seed", "--persona", "--columns", "--against",
        "--min_characters", "--max_characters", "--max_repetition", "--min_letters", "--min_latin",
    ],
    "verify": [],
    "import": ["--tokenizer", "--out"],
    "plan": [
        "--tokenizer", "--train_tokens", "--stores", "--block_size", "--validation_share", "--seed", "--persona",
        "--out",
    ],
}  # fmt: skip


def cells_of(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


# -- list and help ---------------------------------------------------------------------------------------------------


def test_the_list_shows_kind_home_size_licence_and_loss_of_every_source():
    lines = [line for line in succeeded("list").splitlines() if line.startswith("|")]
    rows = {cells[0]: cells for cells in (cells_of(line) for line in lines)}
    assert set(list_sources()) == {name for name in rows if name.strip("-: ") and name != "source"}
    for name in list_sources():
        source = find_source(name)
        assert rows[name][2:] == [
            ", ".join(find_source(name).kinds),
            rows[name][3],
            source.size,
            source.licence,
            "; ".join(LOSS_BY_KIND[kind] for kind in find_source(name).kinds),
        ]
        home = "generated" if source.is_generated else source.hub["path"] if source.hub else "your files"
        assert rows[name][3] == home


def test_the_list_ends_with_the_sources_that_have_restrictions():
    last = succeeded("list").splitlines()[-1]
    named = last.partition(": ")[2].rstrip(".").split(", ")
    expected = [
        name for name in list_sources() if re.search("not for commercial use|^unstated", find_source(name).licence)
    ]
    assert named == expected and "alpaca" in named and "pile" in named


def test_the_commands_have_exactly_these_options():
    group = typer.main.get_command(rorchat.cli.data.app)
    assert set(group.commands) == set(COMMANDS)
    for name, options in COMMANDS.items():
        spelled = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert {option for option in spelled if option.startswith("--")} == {*options, "--help"} - {"--help"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_mentions_each_option(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output = succeeded(name, "--help")
    assert [option for option in [*COMMANDS[name], "--help"] if option not in output] == []


# -- check -----------------------------------------------------------------------------------------------------------


def test_check_prints_counts_and_writes_rejected_rows(tmp_path):
    rows = [chat_row(), chat_row("a", ""), chat_row(), chat_row("b", "c")]
    path = write(tmp_path, "rows.jsonl", rows)
    done = subprocess.run(
        [RORCHAT, "data", "check", path, "--rejects", tmp_path / "rejects.jsonl"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "read as 'messages'; use --as to read it as another format",
        f"messages={path}: 2 of 4 rows kept",
        f"  1 rejected: empty reply, first at {path}:2 (message 1)",
        f"  1 rejected: duplicate, first at {path}:3",
        f"rejects  {tmp_path / 'rejects.jsonl'}",
    ]
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(row["place"], row["row"]) for row in rejects] == [(f"{path}:2", rows[1]), (f"{path}:3", rows[2])]


def test_columns_are_named_before_or_after_the_source(saved, tmp_path):
    path = write(tmp_path, "faq.csv", "q,a\nWhat is red?,A colour.\n")
    spec, columns = f"messages={path}", ("--columns", "user=q", "assistant=a")
    named = f"{spec}:user=q:assistant=a"
    for arguments in ((path, *columns), (spec, *columns), (*columns, spec), (named,)):
        assert succeeded("check", *arguments) == f"{named}: 1 of 1 rows kept\n"
    assert "conversation: " in succeeded("show", path, *columns, "--tokenizer", saved)
    error = refused(65, "check", spec, "--columns", "user=q", "assistant=b")
    assert error.endswith("can be used. Name the columns, as in --columns user=question assistant=answer")
    assert "Did you mean 'user'" in refused(2, "check", path, "--columns", "usr=q")


def test_prepare_reads_named_columns_and_a_rerun_opens_the_store(saved, tmp_path):
    path = write(tmp_path, "texts.jsonl", [{"body": text, "other": f"{text} Again."} for text in TEXTS])
    arguments = ("prepare", f"text={path}", "--columns", "text=body", "--tokenizer", saved, "--out", tmp_path / "store")
    first = succeeded(*arguments, "--validation_share", 0.2, "--workers", 1)
    assert re.search(r"train: 2\d\d documents", first)
    assert succeeded(*arguments, "--validation_share", 0.2) == first
    other = [word.replace("text=body", "text=other") if isinstance(word, str) else word for word in arguments]
    assert "contains a different token store" in refused(78, *other, "--validation_share", 0.2)


def test_check_accepts_a_format_filters_evaluation_sets_and_a_length(saved, tmp_path):
    question = "which of these seven animals would a careful farmer never keep in the kitchen of his house"
    rows = [
        {"prompt": "a", "completion": "short"},
        {"prompt": "What is red?", "completion": "word " * 300},
        {"prompt": question, "completion": "The cow is what he would not keep."},
        {"prompt": "What is the capital of Peru?", "completion": "The capital of Peru is Lima."},
        {"prompt": "And of Chile?", "completion": "12345678901234567890123"},
        {"prompt": "And of Russia?", "completion": "Москва, столица России"},
        {"prompt": "And again?", "completion": "Yes, again.\n" * 9},
    ]
    path = write(tmp_path, "rows.jsonl", rows)
    evaluation = write(tmp_path, "evaluation.jsonl", [{"question": question}])
    output = succeeded(
        "check", path, "--as", "prompt_completion", "--tokenizer", saved, "--max_length", 200, "--against", evaluation,
        "--min_characters", 10, "--max_characters", 10_000, "--max_repetition", 0.5, "--min_letters", 0.6,
        "--min_latin", 0.6,
    )  # fmt: skip
    counts = re.findall(r"  (\d+) rejected: ([\w -]+), first at [^(]*:(\d+)", output)
    assert {reason: (int(count), int(line)) for count, reason, line in counts} == {
        "too short": (1, 1),
        "over-long": (1, 2),
        "contaminated": (1, 3),
        "few letters": (1, 5),
        "other script": (1, 6),
        "repetition": (1, 7),
    }
    assert f"prompt_completion={path}: 1 of 7 rows kept" in output and "read as" not in output
    assert "over-long, first at" in output and "10,000" not in output  # by its tokens, not its 1,500 characters
    assert "1 of 7" in succeeded("check", path, "--as", "prompt_completion", "--min_characters", 1000)


def test_a_file_name_that_is_not_utf8_is_printed_escaped(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jsonl", "w", encoding="utf-8") as file:
        file.write('{"text": "a"}\n5\n')
    done = subprocess.run(
        [RORCHAT, "data", "check", f"text={tmp_path}"],
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
    )
    assert (done.returncode, done.stderr) == (0, "") and "caf\\udce9.jsonl:2" in done.stdout


def test_check_reports_licences_and_repairs(tmp_path):
    path = write(tmp_path, "rows.jsonl", [{"question": "b'Solve 2*x = 4.'", "answer": "b'2'"}])
    assert "1 of them repaired: byte literal" in succeeded("check", f"math_dataset={path}")
    path = write(tmp_path, "rows.jsonl", [{"instruction": "a", "input": "", "output": "b"}])
    assert "licence: CC BY-NC 4.0 (not for commercial use)" in succeeded("check", f"alpaca={path}")


def test_a_file_without_a_usable_row_is_counted_and_ends_with_65(tmp_path):
    path = write(tmp_path, "rows.jsonl", [chat_row("a", "")] * 3)
    assert refused(65, "check", path) == f"error: No row of messages={path} can be used."
    assert "3 rejected: empty reply" in command("data", "check", path).stdout


def test_check_refuses_a_project_and_says_where_its_sources_are(tmp_path):
    for name in ("run.sh", "plan.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match=f"is a project, not data: its sources are in {tmp_path / 'plan.json'}"):
        rorchat.cli.data.check(str(tmp_path))


def test_rejects_never_overwrite_the_checked_files(tmp_path):
    path = write(tmp_path, "folder/rows.jsonl", [chat_row()])
    before = path.read_bytes()
    for source, rejects in ((path, path), (f"messages={path}", path), (path.parent, path.parent / "rejects.jsonl")):
        assert "choose another file" in refused(2, "check", source, "--rejects", rejects)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    assert "choose another file" in refused(2, "check", path, "--rejects", link)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


def test_check_names_files_not_read_and_counts_rows_of_another_format(tmp_path):
    (tmp_path / "train-1.jsonl").write_text(json.dumps({"text": "It was."}) + "\n")
    (tmp_path / "other.txt").write_text("Left alone.")
    output = succeeded("check", f"prose={tmp_path}")
    assert (
        "1 of 1 rows kept" in output
        and "1 file not read (35% of the bytes): other.txt (not one of the files of prose)" in output
    )
    rows = [{"text": f"It was {n}."} for n in range(40)] + [{"else": n} for n in range(10)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "10 rows have a different format than 'text'" in succeeded("check", tmp_path / "mixed.jsonl")


def test_check_makes_a_table_of_a_folder_of_several_formats(saved, tmp_path):
    folder = tmp_path / "mine"
    write(folder, "chats/a.jsonl", [chat_row(f"Hello {n}") for n in range(5)] + [chat_row("a", "")])
    write(folder, "letter.txt", "Dear reader, it was.")
    write(folder, "pairs.jsonl", [{"prompt": "What is red?", "chosen": "A colour.", "rejected": "No."}] * 3)
    write(folder, "numbers.jsonl", [{"a": 1}])
    write(folder, "cover.png", b"\x89PNG" * 99)
    output = succeeded("check", folder, "--rejects", tmp_path / "rejects.jsonl")
    rows = {cells[0]: cells[1:] for cells in map(cells_of, output.splitlines()) if len(cells) == 5}
    assert {name: rows[name] for name in sorted(rows) if "." in name} == {
        "chats/a.jsonl": ["messages", "6", "5", "1 empty reply"],
        "letter.txt": ["text", "1", "1", "none"],
        "numbers.jsonl": ["-", "-", "-", "no row has a known format"],
        "pairs.jsonl": ["preference", "3", "1", "2 duplicate"],
    }
    assert "4 files: 7 of 10 rows kept" in output
    assert re.search(r"^1 file not read \(\d\d% of the bytes\): cover.png \(unknown suffix .png", output, re.MULTILINE)
    rejects = [json.loads(line)["reason"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert rejects == ["empty reply", "duplicate", "duplicate"]
    assert "choose another file" in refused(2, "check", folder, "--rejects", folder / "rejects.jsonl")
    output = succeeded("check", folder, "--tokenizer", saved, "--max_length", 20, "--min_characters", 12)
    assert "letter.txt" in output and "too short" in output and "over-long" in output
    assert f"text={folder}: 1 of 11 rows kept" in succeeded("check", folder, "--as", "text")  # as one source
    assert "No row of" in refused(65, "check", folder, "--min_characters", 10_000)


# -- show ------------------------------------------------------------------------------------------------------------


def test_show_puts_trained_tokens_in_brackets(saved, tokenizer, tmp_path):
    path = write(tmp_path, "rows.jsonl", [chat_row("Not me"), chat_row("Hello", "Hi!\nThere.")])
    encoded = encode_conversation(tokenizer, chat_row("Hello", "Hi!\nThere.")["messages"])
    head, _, shown = succeeded("show", path, "--tokenizer", saved, "--row", 1).partition("\n")
    trained = sum(label != -100 for label in encoded.labels)
    assert head == f"{path}:2, conversation: {len(encoded.input_ids)} tokens, {trained} of them in the loss"
    (bracketed,) = re.findall("⟦(.*?)⟧", shown, re.DOTALL)
    assert bracketed.replace("|", "").replace("⏎", "") == "Hi!\nThere.<im_end>"
    assert shown.count("\033") == 0
    plain = re.sub(r"(?<!<)\|(?!>)|[⟦⟧⏎]", "", shown)
    assert plain.rstrip("\n") == tokenizer.decode(encoded.input_ids).rstrip("\n")


def test_brackets_surround_trained_tokens_and_bars_separate_tokens():
    tokens = [
        ShownToken(text, trained, False) for text, trained in (("a", 0), ("b\n", 1), ("c", 1), ("d", 0), ("e", 1))
    ]
    assert format_in_brackets(tokens) == "a⟦b⏎\n|c⟧d⟦e⟧"
    assert format_in_brackets([]) == ""


def test_trained_tokens_are_green_on_a_terminal(saved, tokenizer, tmp_path):
    path = write(tmp_path, "rows.jsonl", [chat_row("Hello", "Hi!\nThere.")])
    arguments = [preloaded.client("rorchat"), "data", "show", path, "--tokenizer", saved]
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    control, terminal = pty.openpty()
    done = subprocess.run(arguments, stdout=terminal, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while piece := os.read(control, 2**16):
            shown += piece
    os.close(control)
    assert (done.returncode, done.stderr) == (0, "")
    shown = shown.decode().replace("\r\n", "\n")
    painted = re.findall("\033\\[([\\d;]+)m(?:\033\\[1m)?([^\033]*)\033\\[0m", shown)
    green = "".join(text for colour, text in painted if colour in ("30;48;5;114", "30;48;5;157"))
    assert green.replace("⏎", "") == "Hi!There.<|im_end|>"
    grey = "".join(text for colour, text in painted if colour in ("37;48;5;238", "37;48;5;242"))
    assert grey.endswith("<|im_start|>assistant⏎⏎") and "⟦" not in shown


def test_neighbouring_tokens_have_different_shades_and_control_tokens_are_bold():
    tokens = [ShownToken("a", True, False), ShownToken("b", True, False), ShownToken("<|im_end|>", True, True)]
    colours = re.findall("\033\\[30;48;5;(\\d+)m(\033\\[1m)?(a|b|<\\|im_end\\|>)\033\\[0m", format_in_colour(tokens))
    assert colours == [("114", "", "a"), ("157", "", "b"), ("114", "\033[1m", "<|im_end|>")]


def test_show_names_files_that_are_not_read(saved, tmp_path):
    write(tmp_path, "a.txt", "It was.")
    write(tmp_path, "b.png", b"\x89PNG")
    done = command("data", "show", f"text={tmp_path}", "--tokenizer", saved)
    assert done.returncode == 0 and done.stderr.startswith("1 file not read (36% of the bytes): b.png (unknown suffix")


def test_show_prints_documents_and_both_sides_of_a_preference(saved, tmp_path):
    path = write(tmp_path, "rows.jsonl", [{"prompt": "What is red?", "chosen": "A colour.", "rejected": "No."}])
    output = succeeded("show", path, "--tokenizer", saved)
    assert re.findall(r", (\w+): \d+ tokens", output) == ["chosen", "rejected"]
    path = write(tmp_path, "letter.txt", "Dear reader")
    head, _, shown = succeeded("show", path, "--tokenizer", saved).partition("\n")
    count, trained = re.findall(r"(\d+) tokens, (\d+) of them", head)[0]
    assert count == trained and shown.startswith("⟦<|endoftext|>|") and shown.endswith("⟧\n")


# -- errors ----------------------------------------------------------------------------------------------------------

# (arguments, exit code, message); {rows} is a good file, {tok} the tokenizer, {out} a new folder
PREPARE, SHOW = "prepare text={rows} --tokenizer {tok} --out {out}", "show {rows} --tokenizer {tok}"
ERRORS = [
    ("check nosuch", 2, "No source named 'nosuch'"),
    ("check alpacca={rows}", 2, "Did you mean 'alpaca'?"),
    ("check {out}/none.jsonl", 65, "No file or folder"),
    ("check text={out}/none.jsonl", 65, "No file or folder"),
    ("check text", 2, "give a file or folder"),
    ("check tinytown", 2, "needs a number of rows"),
    ("check tinytown=-5", 2, "needs a number of rows"),
    ("check {rows} --as nosuch", 2, "No source named 'nosuch'"),
    ("check text={rows} --as messages", 2, "already names its source"),
    ("check {rows} --max_length 100", 2, "--tokenizer and --max_length go together"),
    ("check {rows} --tokenizer {tok}", 2, "--tokenizer and --max_length go together"),
    ("check {rows} --tokenizer {tok} --max_length 0", 2, "--max_length is 0"),
    ("check {rows} --tokenizer {tok} --max_length -5", 2, "--max_length is -5"),
    ("check {rows} --tokenizer {out} --max_length 5", 65, "No tokenizer at"),
    ("check {rows} --min_characters -1", 2, "min_characters is -1"),
    ("check {rows} --min_characters 9 --max_characters 8", 2, "no text fits"),
    ("check {rows} --max_repetition 1.5", 2, "max_repetition is 1.5"),
    ("check {rows} --min_letters 2", 2, "min_letters is 2.0"),
    ("check {rows} --min_latin -0.1", 2, "min_latin is -0.1"),
    ("check {rows} --min_latin nan", 2, "min_latin is nan"),
    ("check {rows} --against {out}", 65, "{out}"),
    ("check {rows} --rejects {out}/none/r.jsonl", 74, "{out}/none/r.jsonl"),
    (SHOW + " --row -1", 2, "--row is -1"),
    (SHOW + " --row 300", 65, "has no row 300"),
    ("show {out}.jsonl --tokenizer {tok}", 65, "No file or folder"),
    ("show {rows} --tokenizer {out}", 65, "No tokenizer at"),
    ("show {rows} --tokenizer {rows}", 65, "No tokenizer at"),
    (PREPARE + " --workers 0", 2, "--workers is 0"),
    (PREPARE + " --validation_share 1", 2, "--validation_share is 1.0"),
    (PREPARE + " --validation_share -0.5", 2, "--validation_share is -0.5"),
    (PREPARE + " --validation_share nan", 2, "--validation_share is nan"),
    ("prepare text={one} --tokenizer {tok} --out {out}", 65, "has one document, which cannot be divided"),
    (PREPARE + " --persona {out}/none.yaml", 65, "none.yaml"),
    (PREPARE + " --against {out}", 65, "{out}"),
    (PREPARE + " --min_letters 7", 2, "min_letters is 7.0"),
    ("prepare nosuch={rows} --tokenizer {tok} --out {out}", 2, "No source named 'nosuch'"),
    ("prepare preference={rows} --tokenizer {tok} --out {out}", 2, "contains preferences"),
    ("prepare text={out} --tokenizer {tok} --out {out}", 65, "No file or folder"),
    ("prepare messages={rows} --tokenizer {tok} --out {out}", 65, "missing field"),
    ("verify {out}", 65, "is not a token store"),
    ("verify {rows}", 65, "is not a token store"),
    ("plan {rows} --tokenizer {tok} --train_tokens -1 --stores {out}", 2, "rows.jsonl"),
    (
        "plan {mixture} --tokenizer {tok} --train_tokens 999 --stores {out} --block_size 9 --validation_share 3",
        2,
        "--validation_share is 3.0",
    ),
    ("plan {mixture} --tokenizer {tok} --train_tokens 999 --stores {out} --block_size 1", 2, "--block_size 1"),
    ("plan {mixture} --tokenizer {out} --train_tokens 9999 --stores {out}", 65, "No tokenizer at"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), ERRORS)
def test_an_error_is_one_line_with_its_exit_code(arguments, code, message, saved, tmp_path):
    rows = write(tmp_path, "rows.jsonl", [{"text": text} for text in TEXTS])
    names = {"rows": rows, "tok": saved, "out": tmp_path / "out"}
    names["mixture"] = write(tmp_path, "mixture.yaml", f"sources: {{a: 'text={rows}'}}\n")
    names["one"] = write(tmp_path, "one.txt", "It was the best of times.")
    line = refused(code, *(word.format(**names) for word in arguments.split()))
    assert message.format(**names) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", ["check", "check a --bogus", "show a", "plan a --train_tokens x", "nosuch", "prepare"]
)
def test_invalid_arguments_are_one_line_without_a_traceback(arguments):
    done = command("data", *arguments.split())
    assert (done.returncode, done.stdout, done.stderr.count("Traceback")) == (2, "", 0)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", ["check {missing}", "prepare text={missing} --tokenizer {saved} --out {missing}.store"]
)
def test_an_error_is_one_line_in_a_separate_process(arguments, saved, tmp_path):
    missing = tmp_path / "missing.jsonl"
    arguments = arguments.format(missing=missing, saved=saved).split()
    done = subprocess.run([RORCHAT, "data", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr == f"error: No file or folder {missing}.\n"
