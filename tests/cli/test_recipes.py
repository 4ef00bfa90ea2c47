"""`rorchat recipes`: the stories are listed, and copies run from any folder."""

import pytest
from recipe_commands import inside, refused
from support import command

from rorchat.stories import STORIES_FOLDER, list_files, list_stories


def test_every_story_is_listed_with_its_files():
    done = command("recipes", "list")
    assert done.returncode == 0
    for story in list_stories():
        assert f"\n{story}: " in "\n" + done.stdout
        for path in list_files(story):
            assert f"{story}/{path.name}" in done.stdout


@pytest.mark.parametrize("folder", [None, "mine"])
def test_a_copy_has_the_settings_and_the_script(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command("recipes", "copy", "rangeflow-124m", *([folder] if folder else []))
    copied = tmp_path / (folder or "rangeflow-124m")
    assert done.returncode == 0 and f"bash {copied.relative_to(tmp_path) / 'run.sh'}" in done.stdout
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == {
        path.name: path.read_bytes() for path in list_files("rangeflow-124m")
    }
    assert command("recipes", "copy", "rangeflow-124m", copied).returncode == 2  # never overwritten


def test_a_copied_config_uses_the_mixture_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command("recipes", "copy", "rangeflow-124m", "mine")
    (tmp_path / "mine" / "mixture.yaml").write_text("sources: {}\n")
    refused(inside("pretrain", "--config", "mine/pretrain.yaml"), 2, "mine/mixture.yaml: no sources")
    refused(inside("pretrain", "--config", "rangeflow-124m/pretrain.yaml"), 2, str(STORIES_FOLDER), "not set: C4")
