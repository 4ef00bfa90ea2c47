"""The encoding of a text file is found where it is certain; other files are refused with the reason."""

import codecs
import random
import zipfile

import pytest
from support import SENTENCES, write

from rorchat.reading import text_encodings
from rorchat.reading.text_encodings import TextEncoding, detect_encoding
from rorchat.rows import RejectedRow

ENGLISH = "“It’s a small café,” he said — and the naïve waiter smiled. It was the best of times.\r\n" * 20
FRENCH = "Le café est fermé, mais la crêperie à côté est ouverte. Où êtes-vous allé, Zoë? L’œuvre coûte 5 €.\n" * 20
GERMAN = "Der Bäcker backt süße Brötchen für die Gäste aus Österreich – «sehr schön»!\n" * 20
SPANISH = "El niño comió una manzana en la montaña. ¿Qué tal? ¡Bien!\n" * 20
ICELANDIC = "Það er gaman að læra íslensku, þótt hún sé erfið.\n" * 20
RUSSIAN = "Привет, мир! Все счастливые семьи похожи друг на друга.\n" * 20
POLISH = "Zażółć gęślą jaźń. Był to dzień pełen światła, a wiatr szumiał w gałęziach.\n" * 20
CHINESE = "今天天气很好，我们去公园散步。\n" * 20  # noqa: RUF001
EVERY_LANGUAGE = "\n".join(SENTENCES)

FOUND = [
    (ENGLISH.encode(), "UTF-8"),
    (EVERY_LANGUAGE.encode(), "UTF-8"),
    (EVERY_LANGUAGE.encode("utf-8-sig"), "UTF-8"),
    (EVERY_LANGUAGE.encode("utf-16"), "UTF-16"),
    (codecs.BOM_UTF16_BE + RUSSIAN.encode("utf-16-be"), "UTF-16"),
    (EVERY_LANGUAGE.encode("utf-32"), "UTF-32"),
    (FRENCH.encode("utf-16-le"), "UTF-16"),
    (GERMAN.encode("utf-16-be"), "UTF-16"),
    *((text.encode("cp1252"), "Windows-1252") for text in (ENGLISH, FRENCH, GERMAN, SPANISH, ICELANDIC)),
    (SPANISH.encode("latin-1"), "Windows-1252"),
    ("Grüße".encode("latin-1"), "Windows-1252"),
    (b"It was. " * 50_000 + b"na\xefve" + b" It went." * 50_000, "Windows-1252"),  # one byte in 0.8 MB
    (b"", "UTF-8"),
]


@pytest.mark.parametrize(("content", "name"), FOUND, ids=range(len(FOUND)))
def test_the_encoding_of_a_text_is_found_and_decodes_it(content, name, tmp_path):
    encoding = detect_encoding(write(tmp_path, "a.txt", content))
    assert isinstance(encoding, TextEncoding) and encoding.name == name and encoding.is_certainly_text
    assert encoding.mark_bytes in (0, len(codecs.BOM_UTF8), 2, 4)
    content[encoding.mark_bytes :].decode(encoding.codec)


REFUSED = [
    (RUSSIAN.encode("cp1251"), "invalid UTF-8: convert it to UTF-8"),
    ("int main() { return 0; }  // Привет\n".encode("cp1251") * 20, "invalid UTF-8: convert it to UTF-8"),
    (RUSSIAN.encode("koi8-r"), "invalid UTF-8: convert it to UTF-8"),
    (POLISH.encode("iso-8859-2"), "invalid UTF-8: convert it to UTF-8"),
    (POLISH.encode("cp1250"), "invalid UTF-8: convert it to UTF-8"),
    (CHINESE.encode("gb18030"), "invalid UTF-8: convert it to UTF-8"),
    (CHINESE.encode("utf-16-le"), "% of its bytes are"),  # without a mark, nothing is certain
    (codecs.BOM_UTF16_LE + b"a\0b\0\0\xd8", "damaged UTF-16"),
    (random.Random(0).randbytes(20_000), "% of its bytes are"),
    (bytes(random.Random(0).choices(range(128), k=20_000)), "% of its bytes are control characters"),
    (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG picture"),
    (b"%PDF-1.7\n1 0 obj\n", "a PDF file"),
    (b"{\\rtf1 It was.}", "an RTF document"),
]


@pytest.mark.parametrize(("content", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_a_file_that_is_not_certainly_text_is_refused_with_the_reason(content, reason, tmp_path):
    refused = detect_encoding(write(tmp_path, "a.txt", content))
    assert isinstance(refused, RejectedRow) and refused.reason == "not text" and reason in refused.detail


def test_a_word_document_is_a_zip_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "letter.docx", "w") as archive:
        archive.writestr("word/document.xml", "<w:t>It was.</w:t>")
    assert "ZIP archive" in detect_encoding(tmp_path / "letter.docx").detail


def test_utf8_with_few_invalid_bytes_is_damaged_not_another_encoding(tmp_path):
    for text in (EVERY_LANGUAGE * 5, "Você está no tênis e vê a vovó.\n" * 50, "It was the best of times.\n" * 50):
        for bad in (b"\xff", b"\xe9", b"\x81", "你".encode()[:2]):
            if text.isascii() and bad in (b"\xff", b"\xe9"):
                continue  # Windows-1252
            content = text.encode()
            damaged = content[:1000] + bad + content[1000:]
            encoding = detect_encoding(write(tmp_path, f"{len(text)}-{bad.hex()}.txt", damaged))
            assert (encoding.name, encoding.is_damaged, encoding.is_certainly_text) == ("UTF-8", True, False)


def test_control_characters_are_no_certain_text(tmp_path):
    encoding = detect_encoding(write(tmp_path, "a", b"It was the best of times.\x1b[31m It was the worst of times."))
    assert (encoding.name, encoding.has_controls, encoding.is_certainly_text) == ("UTF-8", True, False)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_the_encoding_does_not_depend_on_the_block_size(block, tmp_path, monkeypatch):
    monkeypatch.setattr(text_encodings, "BLOCK_BYTES", block)
    for number, (content, name) in enumerate(FOUND[:12]):
        assert detect_encoding(write(tmp_path, f"{block}-{number}", content[:3000])).name == name


def test_real_books_are_found_to_be_what_they_are(shared_data):
    names = {path.name: detect_encoding(path).name for path in (shared_data / "books").iterdir()}
    assert names == {"11-0.txt": "UTF-8", "1342-0.txt": "UTF-8", "84-0.txt": "UTF-8", "1661-8.txt": "Windows-1252"}
