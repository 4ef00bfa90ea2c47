"""Comparison of tokenizers: measures checked by hand, the embedded domains, the command and its errors."""

import shutil
import sys

import pytest
from tokenizers import AddedToken

import rorchat.cli
from rorchat.errors import DataError, UsageError
from rorchat.tokenizer import token_bytes, train_tokenizer
from rorchat.tokenizer.compare import (
    Domain,
    builtin_domains,
    compare_tokenizers,
    comparison_notes,
    comparison_rows,
    draw_comparison,
    read_domain,
)

MANY = 10**6


@pytest.fixture(scope="module")
def merged():
    """The bytes, "ab" and " ab": 258 ordinary tokens."""
    return train_tokenizer(["ab ab ab"], 320)


@pytest.fixture(scope="module")
def unmerged():
    """The bytes and one merge that the texts of this file never use."""
    return train_tokenizer(["xy"], 320)


@pytest.fixture(scope="module")
def folders(merged, unmerged, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizers")
    merged.save_pretrained(out / "merged")
    unmerged.save_pretrained(out / "unmerged")
    return out


@pytest.fixture
def rorchat_command(monkeypatch, capsys, tmp_path):
    """`rorchat tokenizer compare ...` in this process and an empty folder: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["rorchat", "tokenizer", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            rorchat.cli.main()
        return stopped.value.code or 0, *capsys.readouterr()

    return run


def test_measures_equal_those_counted_by_hand(merged):
    comparison = compare_tokenizers({"merged": merged}, [read_domain("x", ["ab ab", "é ab"], MANY)])
    measure = comparison.measures["x"]["merged"]
    # "ab ab" has 2 tokens, "é ab" has 3 (the two bytes of é, and " ab"); 10 bytes and 4 words, 4 different tokens
    assert comparison.ordinary == {"merged": 258}
    assert (measure.tokens, measure.bytes_per_token, measure.tokens_per_word) == (5, 10 / 5, 5 / 4)
    assert measure.unused_share == 254 / 258
    assert measure.decoded_bytes == 10


def test_the_total_weighs_domains_by_their_size(merged):
    domains = [read_domain("x", ["ab ab ab"], MANY), read_domain("y", ["é"], MANY)]
    comparison = compare_tokenizers({"merged": merged}, domains)
    together = comparison.measures["all together"]["merged"]
    assert comparison.measures["x"]["merged"].unused_share == 256 / 258
    assert (together.bytes_per_token, together.tokens_per_word) == (10 / 5, 5 / 4)
    assert together.unused_share == 254 / 258


def test_control_strings_in_a_text_are_counted_as_text(merged):
    comparison = compare_tokenizers({"merged": merged}, [read_domain("x", ["<|im_end|>"], MANY)])
    assert comparison.measures["x"]["merged"].tokens == 10
    assert comparison.measures["x"]["merged"].bytes_per_token == 1.0


def test_the_table_marks_the_best_and_shows_differences_in_percent(merged, unmerged):
    domains = [read_domain("x", ["ab ab"], MANY), read_domain("y", ["éé"], MANY)]
    _, rows = comparison_rows(compare_tokenizers({"a": merged, "b": unmerged}, domains))
    assert rows[0] == ["x", "5", "5", "**2.500**", "1.000", "99.2%", "1.000 (-60.0%)", "2.500", "98.8%"]
    assert [rows[1][3], rows[1][6]] == ["1.000", "1.000 (+0.0%)"]


def test_a_domain_is_cut_at_the_limit_and_noted(merged):
    domain = read_domain("x", ["ab ab", "ab ab"], 7)
    assert (domain.texts, domain.characters, domain.truncated) == (["ab ab", "ab"], 7, True)
    assert "truncated to --max_characters: x" in comparison_notes(compare_tokenizers({"merged": merged}, [domain]))


def test_a_tokenizer_that_changes_text_is_noted(merged):
    wrong = Domain("x", ["ab"], characters=3, utf8_bytes=3, words=1)
    notes = comparison_notes(compare_tokenizers({"merged": merged}, [wrong]))
    assert "merged changes the text of x: its tokens decode to 2 bytes, not 3" in notes


def test_an_added_plain_token_counts_its_utf8_bytes():
    tokenizer = train_tokenizer(["ab"], 320)
    tokenizer.add_tokens([AddedToken("ßß", normalized=False)])
    assert token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids("ßß")] == 4


def test_the_builtin_domains_are_six_texts_of_some_hundred_words(merged):
    domains = builtin_domains(MANY)
    assert [d.name for d in domains] == ["news", "science", "code", "mathematics", "dialogue", "german"]
    assert all(250 <= domain.words <= 400 and not domain.truncated for domain in domains)
    comparison = compare_tokenizers({"merged": merged}, domains)
    assert comparison.measures["all together"]["merged"].decoded_bytes == sum(d.utf8_bytes for d in domains)


def test_the_command_works_without_any_file_and_writes_none(rorchat_command, folders, tmp_path):
    code, output, _ = rorchat_command(folders / "merged", f"bytes={folders / 'unmerged'}")
    lines = output.splitlines()
    assert code == 0
    assert lines[0].startswith("| domain | characters | UTF-8 bytes | merged: bytes/token |")
    assert [line.split(" | ")[0] for line in lines[2:9]] == [
        "| news", "| science", "| code", "| mathematics", "| dialogue", "| german", "| all together",
    ]  # fmt: skip
    assert "ordinary tokens: merged 258, bytes 257" in lines
    assert list(tmp_path.iterdir()) == []


def test_the_command_reads_files_and_sources_and_draws_a_picture(rorchat_command, folders, tmp_path):
    (tmp_path / "a.txt").write_text("ab ab")
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "ab"}, '
                                          '{"role": "assistant", "content": "ab ab"}]}\n')  # fmt: skip
    code, output, _ = rorchat_command(
        folders / "merged", "--data", "letters=a.txt", "--data", "talk=messages=chats.jsonl", "--out", "drawn"
    )
    assert code == 0
    assert "| letters | 5 | 5 | 2.500 | 1.000 | 99.2% |" in output
    assert "| talk | 7 | 7 | 2.333 | 1.000 | 99.2% |" in output
    assert "plot  drawn/tokenizers.png" in output
    assert (tmp_path / "drawn" / "tokenizers.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_a_labelled_bar_for_every_value(merged, unmerged, tmp_path, monkeypatch):
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    domains = [read_domain("x", ["ab ab"], MANY), read_domain("y", ["éé"], MANY)]
    draw_comparison(compare_tokenizers({"a": merged, "b": unmerged}, domains), tmp_path / "tokenizers.png")
    (axis,) = pyplot.gcf().axes
    assert [round(bar.get_height(), 3) for bar in axis.patches] == [2.5, 1.0, 1.5, 1.0, 1.0, 1.0]
    assert [label.get_text() for label in axis.texts] == ["2.50", "1.00", "1.50", "1.00", "1.00", "1.00"]
    assert [label.get_fontweight() == "bold" for label in axis.texts] == [True, False, True, False, False, False]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["x", "y", "all together"]
    monkeypatch.undo()
    pyplot.close("all")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere/"], 65, "No tokenizer at nowhere/"),
        (["=merged"], 2, "give FOLDER, a Hub id, or NAME=FOLDER"),
        (["{}/merged", "{}/merged"], 2, "Two tokenizers have the name 'merged'"),
        (["a={}/merged", "a={}/unmerged"], 2, "Two tokenizers have the name 'a'"),
        (["{}/merged", "--data", "a=gone.txt"], 65, "No file or folder gone.txt"),
        (["{}/merged", "--data", "a.txt"], 2, "give LABEL=PATH"),
        (["{}/merged", "--data", "a=a.txt", "--data", "a=b.txt"], 2, "Two domains have the name 'a'"),
        (["{}/merged", "--data", "a=dailydialg=a.txt"], 2, "Did you mean 'dailydialog'?"),
        (["{}/merged", "--data", "a=empty.txt"], 65, "empty"),
        (["{}/merged", "--data", "all together=a.txt"], 2, "the name is reserved for the total"),
        (["{}/merged", "--max_characters", "0"], 2, "it must be at least 1"),
    ],
)
def test_invalid_comparisons_are_one_line_and_an_exit_code(
    rorchat_command, folders, tmp_path, arguments, code, message
):
    (tmp_path / "a.txt").write_text("ab ab")
    (tmp_path / "empty.txt").write_text(" \n ")
    stopped, printed, error = rorchat_command(*(word.format(folders) for word in arguments))
    assert (stopped, printed) == (code, "")
    assert len(error.splitlines()) == 1 and error.startswith("error: ")
    assert message in error


def test_tokenizers_of_the_same_name_are_named_by_the_folders_in_which_they_differ(rorchat_command, folders, tmp_path):
    for name, source in (("one/first/tokenizer", "merged"), ("two/first/tokenizer", "unmerged"), ("model", "merged")):
        shutil.copytree(folders / source, tmp_path / name)
    places = [tmp_path / name for name in ("one/first/tokenizer", "two/first/tokenizer", "model")]
    code, output, _ = rorchat_command(*places)
    assert code == 0
    header = [cell.strip() for cell in output.splitlines()[0].split("|")]
    names = [cell.removesuffix(": bytes/token") for cell in header if cell.endswith(": bytes/token")]
    assert names == ["one", "two", "model"]
    code, output, _ = rorchat_command(places[0], f"tokenizer={places[1]}")  # a given name is kept
    assert code == 0 and "| first: bytes/token |" in output and "| tokenizer: bytes/token |" in output


def test_empty_and_reserved_domains_are_refused():
    with pytest.raises(DataError, match="has no text"):
        read_domain("blank", ["  \n"], MANY)
    with pytest.raises(UsageError, match="reserved for the total"):
        read_domain("all together", ["ab"], MANY)


def test_gpt2s_own_tokenizer_has_50256_ordinary_tokens(gpt2_tokenizer):
    domain = read_domain("x", ["Hello world"], MANY)
    comparison = compare_tokenizers({"gpt2": gpt2_tokenizer}, [domain])
    assert comparison.ordinary == {"gpt2": 50_256}
    assert comparison.measures["x"]["gpt2"].bytes_per_token == 11 / 2
