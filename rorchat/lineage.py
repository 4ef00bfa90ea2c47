"""The runs behind a model: the one that made it, and those that it started from, as their run.json files record.

A run.json names the model that its run started from. Followed back, they lead to the pretraining run. This tells which
data and which persona a model was trained on, without the user repeating it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rorchat.adapter import ADAPTER_BASE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_base, weights_sha256
from rorchat.errors import DataError
from rorchat.files import file_sha256
from rorchat.inference.engine import locate_model
from rorchat.persona import DEFAULT_PERSONA, Persona, load_persona
from rorchat.sources.registry import CHAT_PREFIX
from rorchat.tokenizer import find_run

#: Files that make up a model; patterns for weights in several files
MODEL_FILES = (
    "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model-*.bin", "pytorch_model.bin.index.json", "config.json", "tokenizer.json", "vocab.json",
    "merges.txt", "chat_template.jinja", ADAPTER_WEIGHTS, ADAPTER_CONFIG, ADAPTER_BASE,
)  # fmt: skip
SMOKE_SUFFIX = "-smoke"  # of the folder of a smoke run


def fingerprint_model(folder: str) -> dict[str, str]:
    """The sha256 of weights, config, tokenizer and template in a local folder; `{"id": ...}` for a Hub id.

    For an adapter of PEFT alone, which has no record of its base model, the weights of that model in a local folder are
    included.
    """
    files = [file for pattern in MODEL_FILES for file in sorted(Path(folder).glob(pattern)) if file.is_file()]
    digests = {file.name: file_sha256(file) for file in files}
    base = None if ADAPTER_BASE in digests else find_base(folder)
    if base and Path(base).is_dir() and (digest := weights_sha256(base)):
        digests["base"] = digest
    return digests or {"id": folder}


def find_previous_runs(model: str) -> Iterator[tuple[Path, dict]]:
    """Yields (folder, run.json) of the runs that led to a model, latest first, as far back as they are on this disk."""
    seen: set[Path] = set()
    run = find_run(model)
    while run and run[0].resolve() not in seen:
        yield run
        folder, record = run
        seen.add(folder.resolve())
        run = _find_initial_run(folder, record)


def _find_initial_run(folder: Path, record: dict) -> tuple[Path, dict] | None:
    """Finds the run whose model a run started from, at the recorded path or next to the run.

    Returns None if there is no such run, or if its model has changed since.
    """
    model = record["settings"].get("model")
    if not model:
        return None
    for path in (Path(model), folder.parent / Path(model).name):
        if path.is_dir() and fingerprint_model(locate_model(str(path))) == record["inputs"].get("start"):
            return find_run(str(path))
    return None


def list_trained_sources(model: str) -> set[str]:
    """The names of all sources, such as `tinytown`, of the run of a model and of the runs that it started from.

    Empty if there is no record of the model's training.
    """
    specs: list[str] = []
    for _, record in find_previous_runs(model):
        specs += [source["source"] for source in record.get("data", [])]  # of a token store: what it was made from
        specs += record["inputs"].get("sources", {})  # an unfinished run has no data yet
    return {spec.partition("=")[0].removeprefix(CHAT_PREFIX) for spec in specs}


@dataclass(frozen=True)
class TrainedPersona:
    """A persona, and where it is from, in words."""

    persona: Persona
    origin: str


def find_persona(model: str, given: str | None = None) -> TrainedPersona:
    """The persona that a model was trained with: that of its run, or of the nearest earlier run that names one.

    A relative path in the record of a run is one from the folder where training was started: it is looked for in the
    present folder, and in the two folders above the run.

    Args:
        given: a persona file, which takes precedence over the runs.

    Returns:
        The persona and its origin. Without a record of a persona file, it is the default persona.

    Raises:
        DataError: the persona file of the run no longer exists, or a persona file cannot be used.
    """
    if given:
        return TrainedPersona(load_persona(given), f"{given}, as given")
    for folder, record in find_previous_runs(model):
        file = record["settings"].get("persona")
        if not file:
            continue
        places = (Path(), *folder.absolute().parents[:2])
        path = next((place / file for place in places if (place / file).is_file()), None)
        if path is None:
            raise DataError(
                f"{model} was trained with the persona file {file}, according to {folder / 'run.json'}, but there is "
                "no such file here: give it with --persona."
            )
        changed = file_sha256(path) != record["inputs"].get("persona")
        note = ", which has changed since then" if changed else ""
        return TrainedPersona(load_persona(path), f"{path}, from {folder / 'run.json'}{note}")
    return TrainedPersona(load_persona(DEFAULT_PERSONA), "the default: no run of the model names a persona file")
