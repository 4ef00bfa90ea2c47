"""Mixture files as an argument of pretraining, and how runs with other mixtures are compared."""

from pathlib import Path

import pytest
from mixture_support import MIXTURE, write_mixture

from rorchat.errors import UsageError
from rorchat.mixture.mixture_file import read_mixture


def pretrain_arguments(folder: Path, **more):
    from rorchat.training.pretrain import PretrainArguments

    settings = {"output_dir": str(folder / "run"), "block_size": 16, "global_batch_tokens": 16, "max_steps": 9}
    return PretrainArguments(**settings | {"per_device_train_batch_size": 1, "use_cpu": True} | more)


def test_a_mixture_replaces_sources_and_weights(tmp_path):
    path = str(write_mixture(tmp_path, MIXTURE))
    for more in ({"sources": ["text=a"]}, {"weights": [1.0]}, {"columns": ["text=a"]}):
        with pytest.raises(UsageError, match=f"Both mixture and {next(iter(more))}"):
            pretrain_arguments(tmp_path, mixture=path, **more)
    assert pretrain_arguments(tmp_path, mixture=path).source_specs() == [
        "c4=data/c4",
        "cosmopedia=data/tales",
        "alpaca=data/alpaca",
    ]
    with pytest.raises(UsageError, match="No sources"):
        pretrain_arguments(tmp_path)


def test_columns_and_commits_become_parts_of_the_sources(tmp_path):
    arguments = pretrain_arguments(tmp_path, sources=["text=me/docs", "tinytown=60"], columns=["text=body"])
    assert arguments.source_specs() == arguments.sources == ["text=me/docs:text=body", "tinytown=60"]
    arguments.pin_sources({"text=me/docs:text=body": "text=pinned"})
    assert arguments.source_specs() == arguments.sources == ["text=pinned", "tinytown=60"]
    with pytest.raises(UsageError, match="Source 'tinytown' cannot read the columns text"):
        pretrain_arguments(tmp_path, sources=["tinytown=60"], columns=["text=body"])


def test_runs_compare_the_content_of_mixture_files(tmp_path):
    from rorchat.training.checkpointing.fingerprint import fingerprint_data

    path = write_mixture(tmp_path, MIXTURE)
    first = fingerprint_data(pretrain_arguments(tmp_path, mixture=str(path)))
    path.write_text(MIXTURE.replace("50", "51"))
    assert fingerprint_data(pretrain_arguments(tmp_path, mixture=str(path))) != first
    path.write_text(MIXTURE + "# a comment\n")
    assert fingerprint_data(pretrain_arguments(tmp_path, mixture=str(path))) == first


def test_a_difference_between_mixtures_has_a_path(tmp_path):
    from rorchat.training.checkpointing.fingerprint import compare_metadata

    before = read_mixture(write_mixture(tmp_path, MIXTURE)).to_dict()
    now = read_mixture(write_mixture(tmp_path, MIXTURE.replace("{c4: 1}", "{c4: 2}"))).to_dict()
    (change,) = compare_metadata({"mixture": before}, {"mixture": now}, elastic=True)
    assert (change.name, change.before, change.now, change.is_fatal) == ("mixture.phases.1.weights.c4", 1.0, 2.0, True)
    assert compare_metadata({"mixture": before}, {"mixture": before}, elastic=True) == []
    (change,) = compare_metadata({"a": {"b": [1]}}, {"a": {"b": [1, 2]}}, elastic=True)
    assert (change.name, change.before, change.now) == ("a.b", [1], [1, 2])


def test_only_differences_that_change_results_are_fatal():
    from rorchat.training.checkpointing.fingerprint import compare_metadata

    before = {"settings": {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "logging_steps": 5}, "processes": 1}
    before |= {"versions": {"torch": "2.12"}}
    now = {"settings": {"learning_rate": 1e-4, "per_device_train_batch_size": 2, "logging_steps": 1}, "processes": 2}
    now |= {"versions": {"torch": "2.13"}}
    elastic, rigid = (
        {d.name: d.is_fatal for d in compare_metadata(before, now, elastic=elastic)} for elastic in (True, False)
    )
    assert elastic == {
        "learning_rate": True, "per_device_train_batch_size": False, "processes": False, "versions.torch": False,
    }  # fmt: skip
    assert [name for name in rigid if rigid[name]] == ["learning_rate", "per_device_train_batch_size", "processes"]
