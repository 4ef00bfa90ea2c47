"""The mixture file is parsed exactly, and errors in it are reported in one line."""

import json

import pytest
from mixture_support import MIXTURE, write_mixture

from rorchat.errors import UsageError
from rorchat.mixture.mixture_file import MixtureConfig, Phase, Source, read_mixture


def test_a_mixture_file_is_parsed_into_sources_and_phases(tmp_path):
    config = read_mixture(write_mixture(tmp_path, MIXTURE))
    assert config.sources["c4"] == Source("c4=data/c4")
    assert config.sources["tales"] == Source("cosmopedia=data/tales", 4.0, True)
    assert config.phases == (
        Phase(share=0.6, weights={"c4": 1.0}),
        Phase(share=0.2, ramp_to={"tales": 50.0, "alpaca": 0.6}, replay=0.1),
        Phase(share=0.2),
        Phase(tokens=2000),
    )
    assert json.loads(json.dumps(config.to_dict()))["phases"][3]["tokens"] == 2000


def test_a_source_of_a_mixture_can_name_its_columns_and_a_dataset_of_the_hub(tmp_path):
    sources = (
        "a: {from: text=me/docs@v1, columns: {text: body}}, b: {from: messages=b.csv, columns: {user: q, assistant: a}}"
    )
    config = read_mixture(write_mixture(tmp_path, f"sources: {{{sources}}}\n"))
    assert [source.spec for source in config.sources.values()] == [
        "text=me/docs:text=body@v1",
        "messages=b.csv:user=q:assistant=a",
    ]
    pinned = config.with_specs({"text=me/docs:text=body@v1": "text=other"})
    assert [source.spec for source in pinned.sources.values()] == ["text=other", "messages=b.csv:user=q:assistant=a"]


def test_a_mixture_file_without_phases_has_one_phase(tmp_path):
    plain = read_mixture(write_mixture(tmp_path, "sources: {a: text=a, b: text=b}\n"))
    assert plain.phases == (Phase(share=1.0),)
    weighed = read_mixture(write_mixture(tmp_path, "sources: {a: text=a, b: text=b}\nweights: {a: 1, b: 30%}\n"))
    assert weighed.phases == (Phase(share=1.0, weights={"a": 1.0, "b": 0.3}),)


def test_equivalent_mixture_files_are_equal(tmp_path):
    first = read_mixture(write_mixture(tmp_path, MIXTURE)).to_dict()
    equivalent = MIXTURE.replace("60%", "0.6").replace("c4: c4=data/c4", "c4: {from: c4=data/c4}")
    assert read_mixture(write_mixture(tmp_path, equivalent)).to_dict() == first
    assert read_mixture(write_mixture(tmp_path, MIXTURE.replace("50", "51"))).to_dict() != first


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("phases:", "phaess:", "unknown key 'phaess'. Did you mean 'phases'"),
        ("optional: true", "optinal: true", "source 'tales': unknown key 'optinal'. Did you mean 'optional'"),
        ("optional: true", "columns: [text]", "source 'tales': columns is .'text'.; give ROLE: COLUMN"),
        ("optional: true", "columns: {txt: a}", "source 'tales': columns: no role 'txt'. Did you mean 'text'"),
        ("optional: true", "columns: {text: a}", "source 'tales': Source 'cosmopedia' cannot read the columns text"),
        ("optional: true", "optional: maybe", "source 'tales': optional is 'maybe'; give true or false"),
        ("max_epochs: 4", "max_epochs: -1", "source 'tales': max_epochs is -1; give a non-negative number"),
        ("max_epochs: 4", "max_epochs: 0", "max_epochs is 0; give a positive number"),
        ("c4: c4=data/c4", "c4: 5", "source 'c4' must contain `key: value` lines, but is a int"),
        ("c4: c4=data/c4", "c4/x: c4=data/c4", "source 'c4/x': the name is also used as a folder name"),
        ("alpaca: alpaca=data/alpaca", "c4: c4=twice", "duplicate key 'c4'"),
        ("{c4: 1}", "{alpaka: 1}", "phase 1: weights names 'alpaka', which is not a source. Did you mean 'alpaca'"),
        ("{c4: 1}", "{c4: -1}", "phase 1: weights: c4 is -1; give a non-negative number"),
        ("{c4: 1}", "{c4: true}", "phase 1: weights: c4 is True; give a non-negative number"),
        ("{c4: 1}", "{c4: .nan}", "phase 1: weights: c4 is nan; give a non-negative number"),
        ("{c4: 1}", "{c4: .inf}", "phase 1: weights: c4 is inf; give a non-negative number"),
        ("{c4: 1}", "{c4: 0}", "phase 1: weights are all 0"),
        ("{c4: 1}", "[1, 2]", r"phase 1: weights is \[1, 2\]; give one number per source"),
        ("share: 60%, weights", "share: 60%, weigths", "phase 1: unknown key 'weigths'. Did you mean 'weights'"),
        ("share: 60%", "share: 50%", "shares of the phases sum to 90 %: they must sum to 100 %"),
        ("share: 60%", "share: 160%", "phase 1: share is '160%'; give more than 0 and at most 100 %"),
        ("share: 60%", "share: 0", "phase 1: share is 0; give more than 0"),
        ("share: 60%", "share: 60%, tokens: 5", "phase 1: give its length either as share .* or as tokens"),
        ("share: 60%, weights", "weights", "phase 1: give its length either as share"),
        ("60%, weights", "60%, ramp_to", "phase 1: ramp_to needs a previous phase, but this is the first"),
        ("60%, weights", "60%, replay: 5%, weights", "phase 1: replay needs a previous phase"),
        ("0.2, ramp_to", "0.2, weights: {c4: 1}, ramp_to", "phase 2: both weights and ramp_to"),
        ("replay: 10%", "replay: lots", "phase 2: replay is 'lots'; give a non-negative number"),
        ("share: 20%}", "share: 20%, replay: 10%}", "phase 3: replay needs weights or ramp_to"),
        ("tokens: 2_000", "tokens: 0.5", "phase 4: tokens is 0.5; give a whole number"),
        ("phases:", "weights: {c4: 1}\nphases:", "both phases and weights"),
        ("phases:", "phases: []\nother:", "unknown key 'other'"),
    ],
)
def test_an_error_in_a_mixture_file_is_one_line(old, new, message, tmp_path):
    assert old in MIXTURE
    path = write_mixture(tmp_path, MIXTURE.replace(old, new, 1))
    with pytest.raises(UsageError, match=message) as failure:
        read_mixture(path)
    assert str(path) in str(failure.value) and "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "text", ["", "5", "sources: []", "sources: {}", "sources: {a: text=a}\nphases: 3", "{", "? {a: 1}\n: 2"]
)
def test_an_invalid_mixture_file_is_one_line(text, tmp_path):
    with pytest.raises(UsageError) as failure:
        read_mixture(write_mixture(tmp_path, text))
    assert str(tmp_path) in str(failure.value) and "\n" not in str(failure.value)
    with pytest.raises(UsageError, match="Cannot read the mixture .*missing.yaml: No such file"):
        read_mixture(tmp_path / "missing.yaml")


def test_a_mixture_from_specs_has_unique_names():
    config = MixtureConfig.from_specs(["text=a", "text=b", "tinytown=5", "text=c"], [1, 2, 3, 4])
    assert list(config.sources) == ["text", "text-2", "tinytown", "text-3"]
    assert config.phases[0].weights == {"text": 1, "text-2": 2, "tinytown": 3, "text-3": 4}
    assert MixtureConfig.from_specs(["text=a"]).phases == (Phase(share=1.0),)


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 2.0], [1, 2, 3, 4], [1, 0, 1], [1, -1, 1], [1, float("nan"), 1], [1, float("inf"), 1]]
)
def test_wrong_weights_are_a_usage_error(weights):
    with pytest.raises(
        UsageError, match=rf"{len(weights)} weights .* for 3 sources: give one positive number per source"
    ):
        MixtureConfig.from_specs(["a", "b", "c"], weights)


def test_all_missing_variables_are_named_at_once_with_examples(tmp_path, monkeypatch):
    text = """
sources:
  c4: c4=$C4
  talk: {from: "chat:tinytown=${TALK}"}
  tales: cosmopedia=$ROOT_FOLDER/tales
  more: text=$ROOT_FOLDER/more
against: [$HELD_OUT]
"""
    for name in ("C4", "TALK", "ROOT_FOLDER", "HELD_OUT"):
        monkeypatch.delenv(name, raising=False)
    path = write_mixture(tmp_path, text)
    with pytest.raises(UsageError) as failure:
        read_mixture(path)
    assert str(failure.value) == (
        f"{path}: environment variables that are not set: C4, TALK, ROOT_FOLDER, HELD_OUT. Set each to the path of its "
        "data, as in `export C4=/data/c4 TALK=/data/tinytown ROOT_FOLDER=/data HELD_OUT=/data`, or remove the sources "
        "that use them."
    )
    for name in ("C4", "TALK", "ROOT_FOLDER", "HELD_OUT"):
        monkeypatch.setenv(name, name.lower())
    config = read_mixture(path)
    specs = [source.spec for source in config.sources.values()]
    assert specs == ["c4=c4", "chat:tinytown=talk", "cosmopedia=root_folder/tales", "text=root_folder/more"]
    assert config.against == ("held_out",)
