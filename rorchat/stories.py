"""The stories: folders of YAML files and a script, shipped in the package and found by name.

`demo/sft.yaml` names `rorchat/recipes/demo/sft.yaml` wherever the package is installed. A file of that name in the
working directory takes precedence.
"""

from pathlib import Path

from rorchat.errors import UsageError, did_you_mean

STORIES_FOLDER = Path(__file__).parent / "recipes"
ACCELERATE_FOLDER = STORIES_FOLDER / "accelerate"  # configurations of the launcher, not a story
HELP_FOLDER = STORIES_FOLDER / "help"  # the help of each training command, written by scripts/write_help.py
SCRIPT = "run.sh"


def list_stories() -> list[str]:
    """The names of all stories, sorted."""
    return sorted(path.parent.name for path in STORIES_FOLDER.glob(f"*/{SCRIPT}"))


def list_files(story: str) -> list[Path]:
    """The files of a story, sorted by name.

    Raises:
        UsageError: there is no such story.
    """
    stories = list_stories()
    if story not in stories:
        hint = did_you_mean(story, stories)
        raise UsageError(f"No story {story!r}.{hint} Stories: {', '.join(stories)}.")
    return sorted(path for path in (STORIES_FOLDER / story).iterdir() if path.is_file())


def read_summary(story: str) -> str:
    """What a story does, in one line: the first comment of its script."""
    lines = (STORIES_FOLDER / story / SCRIPT).read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("# ") for line in lines if line.startswith("# "))


def find_story_file(name: str | Path) -> Path:
    """The local file of this name or, if there is none, the file of a story in the package.

    A leading `recipes/` is ignored in the package, so that names that hold in a checkout hold everywhere.

    Raises:
        UsageError: neither exists, and the name has the form STORY/FILE.
    """
    path = Path(name)
    parts = path.parts[1:] if path.parts[:1] == ("recipes",) else path.parts
    if path.exists() or path.is_absolute() or len(parts) != 2 or ".." in parts:
        return path
    packaged = STORIES_FOLDER.joinpath(*parts)
    if packaged.is_file():
        return packaged
    if parts[0] in list_stories():
        known = [f"{parts[0]}/{path.name}" for path in list_files(parts[0]) if path.suffix == ".yaml"]
        hint = did_you_mean("/".join(parts), known)
        raise UsageError(f"No file {name}, here or in the package.{hint} The story has {', '.join(known)}.")
    stories = list_stories()
    hint = did_you_mean(parts[0], stories)
    raise UsageError(f"No file {name}, here or in the package.{hint} Stories in the package: {', '.join(stories)}.")


def find_beside(config: str | Path, name: str) -> str:
    """The file that a config names: next to the config if there is one, otherwise the name as it is.

    A file of a story in the package is returned as STORY/FILE, which names it on every machine.
    """
    sibling = Path(config).parent / name
    if not sibling.is_file():
        return name
    resolved = sibling.resolve()
    if resolved.is_relative_to(STORIES_FOLDER.resolve()):
        return str(resolved.relative_to(STORIES_FOLDER.resolve()))
    return str(sibling)


def find_accelerate_config(name: str) -> Path:
    """A launcher configuration: a local file, or one of the package by its name, such as `ddp`.

    Raises:
        UsageError: neither exists.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = ACCELERATE_FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    if packaged.is_file():
        return packaged
    known = sorted(path.stem for path in ACCELERATE_FOLDER.glob("*.yaml"))
    hint = did_you_mean(name, known)
    raise UsageError(f"No launcher configuration {name!r}.{hint} Give a file, or one of {', '.join(known)}.")
