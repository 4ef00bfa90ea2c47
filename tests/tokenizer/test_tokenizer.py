"""Tokenizers have control tokens, reproduce text, and have a fingerprint of their ids."""

import json
import random
import runpy
import shutil

import pytest
from support import ROOT, SENTENCES
from transformers import AutoTokenizer

from rorchat.chatml import CONTROL_TOKENS, encode_text
from rorchat.errors import DataError, UsageError
from rorchat.tokenizer import load_tokenizer, token_bytes, tokenizer_sha256, train_tokenizer
from rorchat.tokenizer.training_text import PIECE_CHARACTERS, BoundedText


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    alphabet = "ab zA1239.,'\n\t <|>_éß你🙂\u200b\x00\r"
    return ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(count)]


def test_a_trained_tokenizer_reproduces_any_text(tokenizer):
    texts = random_texts(2000)
    assert [tokenizer.decode(ids) for ids in encode_text(tokenizer, texts)] == texts


def test_a_trained_tokenizer_has_the_requested_size():
    tokenizer = train_tokenizer(["few words"], 512)
    assert len(tokenizer) == 512
    assert len(set(tokenizer.get_vocab().values())) == 512


def test_control_tokens_are_special_and_pad_differs_from_eos(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))
    assert len(set(ids)) == 4
    assert set(ids) <= set(tokenizer.all_special_ids)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_no_merge_spells_a_control_token():
    tokenizer = train_tokenizer(["<|im_start|>user\nx<|im_end|> <|pad|><|reserved_0|>" * 20] * 20, 384)
    special = set(tokenizer.all_special_ids)
    ids = encode_text(tokenizer, ["<|im_start|> <|im_end|> <|pad|> <|endoftext|> <|reserved_0|>"])[0]
    assert not special & set(ids)


def test_digits_are_single_tokens(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(encode_text(tokenizer, ["12 + 345"])[0])
    assert [piece for piece in pieces if piece.isdigit()] == ["1", "2", "3", "4", "5"]


def test_a_saved_tokenizer_loads_with_plain_transformers(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = random_texts(200)
    assert encode_text(loaded, texts) == encode_text(tokenizer, texts)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.padding_side == "left"
    assert tokenizer_sha256(loaded) == tokenizer_sha256(tokenizer)
    assert tokenizer_sha256(load_tokenizer(str(tmp_path))) == tokenizer_sha256(tokenizer)


def test_the_fingerprint_depends_on_the_vocabulary_not_on_the_persona(tokenizer):
    texts = ["some text to learn from"] * 3
    assert tokenizer_sha256(train_tokenizer(texts, 320)) != tokenizer_sha256(train_tokenizer(texts, 384))


def test_gpt2s_original_files_get_control_tokens(gpt2_tokenizer):
    assert len(gpt2_tokenizer) == 50_304
    assert encode_text(gpt2_tokenizer, ["Hello world"]) == [[15496, 995]]
    assert gpt2_tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)) == [50256, 50258, 50259, 50257] or (
        sorted(gpt2_tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))) == [50256, 50257, 50258, 50259]
        or sorted(gpt2_tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)))[0] == 50256
    )


def test_both_forms_of_gpt2s_files_give_the_same_tokenizer(gpt2_tokenizer, tmp_path):
    gpt2_tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert tokenizer_sha256(again) == tokenizer_sha256(gpt2_tokenizer)
    assert len(again) == 50_304


def test_token_bytes_add_up_to_the_utf8_length_of_any_text(tokenizer):
    sizes = token_bytes(tokenizer)
    for text in random_texts(500):
        assert sum(sizes[token] for token in encode_text(tokenizer, [text])[0]) == len(text.encode())
    assert [sizes[index] for index in tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))] == [0, 0, 0, 0]


def test_training_reads_at_most_max_characters():
    read = 0

    def texts():
        nonlocal read
        for _ in range(1000):
            read += 1
            yield "x" * 100

    train_tokenizer(texts(), 320, max_characters=1000)
    assert read <= 11


def test_the_last_text_is_cut_at_the_limit():
    text = BoundedText(["ab", "äb" * 4, "never"], max_characters=5)
    assert list(text) == ["ab", "äbä"]
    assert (text.characters, text.utf8_bytes, text.stopped) == (5, 7, True)
    cut = train_tokenizer(["ab ab ab", "xyxyxy"], 320, max_characters=8)
    assert tokenizer_sha256(cut) == tokenizer_sha256(train_tokenizer(["ab ab ab"], 320))


def test_text_that_ends_at_the_limit_is_complete():
    text = BoundedText(["abc", "de", ""], max_characters=5)
    assert (list(text), text.characters, text.stopped) == (["abc", "de"], 5, False)


def test_a_long_text_is_split_before_the_space_of_a_word():
    rng = random.Random(1)
    words = "".join(rng.choices(["word", " ", "  ", "\n\n", "12", "é", "!"], k=120_000))
    pieces = list(BoundedText([words], max_characters=10**9))
    assert "".join(pieces) == words
    assert max(map(len, pieces)) <= PIECE_CHARACTERS
    assert all(piece[0].isspace() and not piece[1].isspace() for piece in pieces[1:])
    assert [len(piece) for piece in BoundedText(["x" * 250_000], max_characters=10**9)] == [100_000, 100_000, 50_000]


def test_pieces_give_the_same_tokens_as_the_whole_text(tokenizer, monkeypatch):
    whole = " ".join(SENTENCES * 5) + "\n\n \tthe  end \n of it"
    monkeypatch.setattr("rorchat.tokenizer.training_text.PIECE_CHARACTERS", 40)
    pieces = list(BoundedText([whole], max_characters=10**9))
    assert len(pieces) > 100
    assert sum(encode_text(tokenizer, pieces), []) == encode_text(tokenizer, [whole])[0]
    in_pieces = tokenizer_sha256(train_tokenizer([whole], 384))
    monkeypatch.setattr("rorchat.tokenizer.training_text.PIECE_CHARACTERS", 10**9)
    assert in_pieces == tokenizer_sha256(train_tokenizer([whole], 384))


def test_progress_in_a_log_is_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr("rorchat.tokenizer.training_text.LOG_INTERVAL_SECONDS", 0)
    list(BoundedText(["ab", "cde"], max_characters=100, show=True))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("2 characters read, ") and lines[0].endswith(" a second")
    assert lines[1].startswith("5 characters read, ") and lines[2].startswith("5 characters read in ")
    assert len(lines) == 3


def test_a_limit_of_zero_is_refused():
    with pytest.raises(UsageError, match="at least 1"):
        train_tokenizer(["x"], 320, max_characters=0)


@pytest.mark.parametrize(("bound", "stopped", "message"), [(10**9, False, "all of the text"), (9, True, "stopped at")])
def test_the_recipe_reports_how_much_text_it_read(tmp_path, capsys, bound, stopped, message):
    (tmp_path / "a.txt").write_text("ab äb ab ab")
    out = tmp_path / "out"
    words = ["--sources", f"text={tmp_path / 'a.txt'}", "--vocab_size", "320", "--output_dir", str(out)]
    metrics = runpy.run_path(str(ROOT / "recipes" / "tokenizer.py"))["main"]([*words, "--max_characters", str(bound)])
    characters = min(11, bound)
    record = json.loads((out / "tokenizer_training.json").read_text())
    assert record.items() >= metrics.items() and len(record["sources"]) == 1
    assert {key: metrics[key] for key in metrics if key != "seconds"} == {
        "vocab_size": 320,
        "characters": characters,
        "utf8_bytes": characters + 1,
        "stopped_at_max_characters": stopped,
    }
    printed = capsys.readouterr().out
    assert f"320 tokens, trained on {characters} characters ({characters + 1} UTF-8 bytes) in " in printed
    assert f"({message}" in printed


@pytest.mark.parametrize(("size", "message"), [(1000, "multiple of 64"), (192, "at least")])
def test_invalid_vocabulary_sizes_are_refused(size, message):
    with pytest.raises(UsageError, match=message):
        train_tokenizer(["x"], size)


def test_training_without_text_is_a_data_error():
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], 320)


def test_a_folder_without_a_tokenizer_is_a_data_error(tmp_path):
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(DataError, match="weights.bin"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="No tokenizer at"):
        load_tokenizer(str(tmp_path / "nothing"))
    for no_hub_id in ("no/such/folder", "nowhere/", "~/no-tokenizer"):
        with pytest.raises(DataError, match="No tokenizer at"):
            load_tokenizer(no_hub_id)


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(500)} | {"[UNK]": 500}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(DataError, match="does not reproduce text"):
        load_tokenizer(str(tmp_path))
    shutil.rmtree(tmp_path)


def test_the_recipe_names_files_that_are_not_read(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes("Die Gäste aus Österreich.".encode("latin-1"))
    (folder / "b.png").write_bytes(b"\x89PNG")
    words = ["--sources", f"text={folder}", "--vocab_size", "320", "--output_dir", str(tmp_path / "out")]
    runpy.run_path(str(ROOT / "recipes" / "tokenizer.py"))["main"](words)
    lines = capsys.readouterr().err.splitlines()
    at = lines.index(f"text={folder}: 1 of 1 rows kept")
    assert lines[at + 1] == "  1 file decoded as Windows-1252: a.txt"
    assert lines[at + 2] == "  1 file not read (14% of the bytes): b.png (unknown suffix .png, not text: a PNG picture)"
