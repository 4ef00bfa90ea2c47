"""Files of the stories are found by name; local files take precedence."""

from pathlib import Path

import pytest
import yaml

from rorchat import stories
from rorchat.errors import UsageError
from rorchat.stories import STORIES_FOLDER, find_beside, find_story_file, list_stories


def test_every_folder_of_recipes_is_a_story_or_known():
    folders = {path.name for path in STORIES_FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*list_stories(), "accelerate", "help"}
    for story in list_stories():
        assert len(stories.read_summary(story)) > 40


@pytest.mark.parametrize("name", ["demo/sft.yaml", "recipes/demo/sft.yaml"])
def test_a_packaged_file_is_found_unless_a_local_one_exists(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_story_file(name) == STORIES_FOLDER / "demo" / "sft.yaml"
    local = tmp_path / name
    local.parent.mkdir(parents=True)
    local.touch()
    assert find_story_file(name) == Path(name)


def test_an_unknown_story_file_names_the_nearest_and_lists_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="Did you mean 'demo/sft.yaml'.* demo/pretrain.yaml"):
        find_story_file("demo/stf.yaml")
    with pytest.raises(UsageError, match="Did you mean 'demo'.* first-words"):
        find_story_file("dmo/sft.yaml")


@pytest.mark.parametrize("name", ["none.yaml", "/nowhere/demo/sft.yaml", "../demo/sft.yaml", "my/own/sft.yaml"])
def test_other_names_are_left_to_the_reader_of_the_file(name):
    assert find_story_file(name) == Path(name)


def test_a_file_beside_the_config_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.yaml").touch()
    Path("configs").mkdir()
    assert find_beside("configs/sft.yaml", "here.yaml") == "here.yaml"
    Path("configs/here.yaml").touch()
    assert find_beside("configs/sft.yaml", "here.yaml") == "configs/here.yaml"
    packaged = STORIES_FOLDER / "rorchat-124m" / "pretrain.yaml"
    assert find_beside(packaged, yaml.safe_load(packaged.read_text())["mixture"]) == "rorchat-124m/mixture.yaml"
