"""What `rorchat new` reads of the user's data."""

import json
from statistics import median

import pytest
from project_support import make_survey, write_data
from support import chat_row, json_lines

from rorchat.errors import DataError, UsageError
from rorchat.project.survey import ADDED_CONVERSATIONS, ADDED_DOCUMENTS, guess_language, survey_sources


def test_every_row_is_counted_and_measured(tmp_path):
    given = write_data(tmp_path)
    documents = make_survey(given).of("documents")[0]
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert (documents.rows, documents.utf8_bytes) == (400, sum(len(text.encode()) for text in texts))
    assert documents.lengths[0] == pytest.approx(median(map(len, texts)), abs=1)
    assert documents.lengths[0] <= documents.lengths[1] <= documents.lengths[2] <= max(map(len, texts))
    assert documents.language == "en" and documents.language_share > 0.9
    assert set(documents.sample) <= set("\n".join(texts))


def test_rejected_rows_are_reported(tmp_path):
    given = write_data(tmp_path)
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    stats = make_survey(given).of("conversations")[0].stats
    assert stats.rows_in == 61 and stats.kept == 60 and sum(stats.rejects.values()) == 1


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    survey = make_survey({"documents": ["texts.jsonl"], "conversations": ["messages=chats.jsonl"]})
    assert survey.of("documents")[0].spec == f"text={tmp_path / 'texts.jsonl'}"
    assert survey.of("conversations")[0].spec == f"messages={tmp_path / 'chats.jsonl'}"


def test_a_path_with_a_dollar_sign_is_refused(tmp_path):
    (tmp_path / "$x").mkdir()
    (tmp_path / "$x" / "a.jsonl").write_text('{"text": "One sentence."}\n')
    with pytest.raises(UsageError, match="rename it"):
        make_survey({"documents": [str(tmp_path / "$x" / "a.jsonl")]})


def test_rows_of_another_kind_name_the_right_option(tmp_path):
    write_data(tmp_path)
    with pytest.raises(UsageError, match="read as messages .conversations.: give it as --conversations"):
        make_survey({"documents": [str(tmp_path / "chats.jsonl")]})
    with pytest.raises(UsageError, match="give it as --documents"):
        make_survey({"conversations": [str(tmp_path / "texts.jsonl")]})


def test_a_missing_path_and_data_without_a_usable_row_are_refused(tmp_path):
    with pytest.raises(DataError, match="No file or folder"):
        make_survey({"documents": [str(tmp_path / "nothing.txt")]})
    (tmp_path / "empty.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match="no row can be used"):
        make_survey({"conversations": [f"messages={tmp_path / 'empty.jsonl'}"]})


def test_generated_text_is_added_where_something_is_missing(tmp_path):
    given = write_data(tmp_path)
    complete = make_survey(given)
    added = [source.spec for source in complete.sources if source.is_added]
    assert added == ["persona=1000", "persona=50"]  # conversations and pairs
    assert complete.utf8_bytes("documents") > 200_000
    only_documents = make_survey({"documents": given["documents"]})
    assert ADDED_CONVERSATIONS in [source.spec for source in only_documents.of("conversations")]
    from_model = survey_sources({"conversations": given["conversations"]}, from_scratch=False)
    assert not from_model.of("documents")


def test_the_language_of_most_rows_is_named():
    german = ["Guten Morgen, wie geht es Ihnen heute?"] * 8
    assert guess_language([*german, "How are you today, my friend?", "1234"]) == ("de", 8 / 9)
    assert guess_language(["123", "  "]) == ("", 0.0)


def test_columns_of_a_source_stay_in_its_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faq.csv").write_text("q:1,a\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(9)))
    survey = make_survey({"conversations": ["messages=faq.csv:user=q%3A1:assistant=a"]})
    (source, *_) = survey.of("conversations")
    assert source.spec == f"messages={tmp_path / 'faq.csv'}:user=q%3A1:assistant=a" and source.rows == 9
    with pytest.raises(DataError, match=r"faq.csv:user=q%3A1:assistant=a; or, the other way round, messages="):
        make_survey({"conversations": ["messages=faq.csv"]})
    with pytest.raises(UsageError, match="write messages=faq.csv:user=a"):
        make_survey({"conversations": ["faq.csv:user=a:assistant=b"]})


def test_many_conversations_are_pretrained_on_if_there_are_no_documents(tmp_path):
    chats = [chat_row(f"What is {n}?", "It is a number. " * 40) for n in range(400)]
    (tmp_path / "chats.jsonl").write_text(json_lines(*chats))
    survey = make_survey({"conversations": [f"messages={tmp_path / 'chats.jsonl'}"]})
    assert survey.of("documents") == [] and survey.pretraining == survey.of("conversations")
    (tmp_path / "chats.jsonl").write_text(json_lines(*chats[:50]))
    survey = make_survey({"conversations": [f"messages={tmp_path / 'chats.jsonl'}"]})
    assert [source.spec for source in survey.of("documents")] == [ADDED_DOCUMENTS]
    assert [source.option for source in survey.pretraining] == ["documents", "conversations", "conversations"]
