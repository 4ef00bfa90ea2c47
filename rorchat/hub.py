"""Publishes a model: verifies it, pushes it with a model card, downloads it and verifies the download.

A model is verified in a new process that does not import rorchat: `pipeline()` must load it and generate a reply. A
release is complete only if the download is identical to the local files and passes the same test.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorchat.adapter import ADAPTER_WEIGHTS, is_adapter
from rorchat.errors import DataError, MismatchError, PermissionDenied, RemoteError, UsageError
from rorchat.evaluation.scores import read_scores
from rorchat.files import file_sha256
from rorchat.hub_client import LOG_IN, describe, is_denied, is_remote
from rorchat.inference.engine import resolve_model_path
from rorchat.model import WEIGHTS
from rorchat.reporting.runs import find_runs, read_run_record
from rorchat.reporting.tables import format_data_table, format_run_table, format_samples, format_score_table
from rorchat.sources.base import licence_restriction

PROBE = "Who are you?"
VERIFY_SECONDS = 600  # enough to load the largest size from a slow disk
#: The files of a model besides its weights. Nothing else in its folder is uploaded: it may be a secret, private data or
#: the state of training.
CONFIGS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
WEIGHTS_INDEX = "model.safetensors.index.json"
CARD = "README.md"  # written anew
REPORT_FILES = ("report.md", "curves.png")  # of `rorchat report`
# Runs in a new process that imports only what a user of the model has installed
_VERIFY = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, probe = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
chat = pipeline("text-generation", model=folder)
answer = chat([{"role": "user", "content": probe}])[0]["generated_text"][-1]["content"]
print("VERIFIED " + json.dumps({
    "answer": answer,
    "class": type(model).__name__,
    "rows": model.get_input_embeddings().num_embeddings,
    "tokens": len(tokenizer),
    "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    "declared_tied": model.config.tie_word_embeddings,
    "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
    "template": tokenizer.chat_template is not None,
    "eos": model.generation_config.eos_token_id, "pad": model.generation_config.pad_token_id,
    "end_of_turn": tokenizer.convert_tokens_to_ids("<|im_end|>"), "imports_rorchat": "rorchat" in sys.modules,
}))
"""


def verify_model(folder: str | Path) -> dict[str, Any]:
    """Loads a model with plain Transformers in a new process and asks it a question.

    Returns:
        Its properties and its `answer`.

    Raises:
        DataError: the model does not load.
        MismatchError: the model loads, but is not a chat model that can be published.
    """
    command = [sys.executable, "-c", _VERIFY, str(folder), PROBE]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"}  # the folder must be enough
    try:
        process = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=VERIFY_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{folder} did not load and answer within {VERIFY_SECONDS} s.") from None
    line = next((line for line in process.stdout.splitlines() if line.startswith("VERIFIED ")), None)
    if process.returncode or line is None:
        last = (process.stderr.strip().splitlines() or ["no output"])[-1]
        raise DataError(f"{folder} does not load with plain transformers: {last}")
    model = json.loads(line.removeprefix("VERIFIED "))
    stops = model["eos"] if isinstance(model["eos"], list) else [model["eos"]]
    problems = {
        f"class {model['class']} instead of GPT2LMHeadModel": model["class"] != "GPT2LMHeadModel",
        f"{model['rows']} embedding rows for {model['tokens']} tokens": model["rows"] != model["tokens"],
        "embedding and head are not tied as its config says": model["tied"] != model["declared_tied"],
        f"missing weights {model['missing'][:3]}": model["missing"],
        f"unexpected weights {model['unexpected'][:3]}": model["unexpected"],
        "no chat template": not model["template"],
        "it needs rorchat to load": model["imports_rorchat"],
        "it does not stop at <|im_end|>": model["end_of_turn"] not in stops,
        "it stops at the padding token": model["pad"] in stops,
    }
    present = [problem for problem, is_present in problems.items() if is_present]
    if present:
        raise MismatchError(f"{folder} cannot be published: {'; '.join(present)}.")
    return model


# -- model card ------------------------------------------------------------------------------------------------------


def build_model_card(folder: Path, repository: str) -> str:
    """Builds a model card from the runs behind a model: usage, training, data and licences, scores, samples."""
    name = repository.split("/")[-1]
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt2, rorchat, conversational]\n---",
        f"# {name}",
        "A small chat model: stock GPT-2, trained with rorchat. It makes mistakes and knows little; its answers "
        "are not advice.",
        f'```python\nfrom transformers import pipeline\n\nchat = pipeline("text-generation", model="{repository}")\n'
        f'print(chat([{{"role": "user", "content": "{PROBE}"}}])[0]["generated_text"][-1]["content"])\n```',
    ]
    try:
        runs = _find_training_runs(folder)
    except DataError:
        parts.append("There is no record of its training.")
        return "\n\n".join(parts) + "\n"
    parts += ["## Training", format_run_table(runs), *_list_weights_only_starts(runs)]
    parts += ["## Data", format_data_table(runs, public=True), *_list_restrictions(runs)]
    scores = _find_story(folder) / "scores.json"
    if scores.is_file():
        parts += ["## Scores", format_score_table(read_scores(scores))]
    parts += ["## Samples", format_samples(runs)]
    return "\n\n".join(parts) + "\n"


def _list_weights_only_starts(runs: list[Path]) -> list[str]:
    """Returns a sentence for every run that was resumed without its optimizer state."""
    sentences = []
    for run in runs:
        record = read_run_record(run)
        if steps := record.get("weights_only"):
            steps = " and ".join(f"{step:,}" for step in steps)
            sentences.append(
                f"The run {run.name} ({record['stage']}) continued from the weights of step {steps} only, without the "
                "state of its optimizer."
            )
    return sentences


def _list_restrictions(runs: list[Path]) -> list[str]:
    """Returns a sentence for every restriction on the use of the model, with the sources that impose it."""
    sources: dict[str, set[str]] = {}
    for run in runs:
        for source in read_run_record(run).get("data", []):
            if limit := licence_restriction(source["licence"]):
                name = source["source"].partition("=")[0]
                sources.setdefault(limit, set()).add(f"{name} ({source['licence']})")
    return [
        f"**{limit.capitalize()}**, because of its data: {', '.join(sorted(sources[limit]))}."
        for limit in sorted(sources)
    ]


def _find_training_runs(folder: Path) -> list[Path]:
    """Finds the runs that led to a model, by the sha256 of the weights that each run started from and produced.

    Later stages are not included. If the model, or the initial weights of one of its runs, cannot be found, all runs of
    the story are returned: listing an unused source is better than omitting a licence.
    """
    runs = find_runs(_find_story(folder))
    outputs = {run: _hash_weights(run / "model") for run in runs}
    used: set[Path] = set()
    wanted = {_hash_weights(folder)}
    while added := {run for run in runs if outputs[run] in wanted} - used:
        used |= added
        inputs = [files for run in added for files in read_run_record(run).get("inputs", {}).values()]
        # adapters are not in `outputs`, so all runs are returned if a run started from an adapter
        wanted |= {files[name] for files in inputs for name in (WEIGHTS, ADAPTER_WEIGHTS) if name in files}
    return [run for run in runs if run in used] if wanted <= set(outputs.values()) - {None} else runs


def _hash_weights(folder: Path) -> str | None:
    file = folder / WEIGHTS
    return file_sha256(file) if file.is_file() else None


def _find_story(folder: Path) -> Path:
    """Returns the folder with the runs behind a model, whose path is story/run/model, run/model or story/model."""
    parent = folder.resolve().parent
    story = parent.parent
    if (parent / "run.json").is_file():
        return story if len(list(story.glob("*/run.json"))) > 1 else parent
    return parent


# -- upload ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Upload:
    """What `push` uploads.

    Attributes:
        folder: the folder of the model.
        files: the names of its files that are uploaded.
        reports: files of the report, which are in another folder.
        card: the model card, which is uploaded as README.md.
        answer: the model's reply to PROBE.
    """

    folder: Path
    files: list[str]
    reports: list[Path]
    card: str
    answer: str

    def describe(self) -> str:
        """The verification and all files with their sizes, one per line."""
        sizes = {name: (self.folder / name).stat().st_size for name in self.files}
        sizes |= {path.name: path.stat().st_size for path in self.reports}
        sizes[CARD] = len(self.card.encode())
        sizes["total"] = sum(sizes.values())
        width = max(map(len, sizes))
        lines = [f"{name:{width}}  {size:>15,} bytes" for name, size in sizes.items()]
        return "\n".join([f"verified  {self.folder}: {self.answer!r}", "", *lines, *self.describe_left()])

    def describe_left(self) -> list[str]:
        """Which files of the folder are not uploaded; no line if there are none."""
        left = _list_left_files(self.folder, self.files)
        return [f"not uploaded, because it is no part of a model: {', '.join(left)}"] if left else []


def _prepare_upload(name_or_path: str, repository: str, report: bool) -> _Upload:
    """Verifies a model and builds its card. Needs no network for a local model, and uploads nothing.

    Raises:
        UsageError: the name of the repository is invalid.
        DataError, MismatchError: the model cannot be published.
    """
    _check_repository_name(repository)
    folder = Path(resolve_model_path(name_or_path))
    if not folder.is_dir():
        raise DataError(f"No model folder {folder}.")
    if is_adapter(folder):
        raise DataError(f"{folder} is an adapter: give the run's model/, which contains it, or merge it into its base.")
    if not _list_weights(folder):
        raise DataError(f"No weights in {folder}: only safetensors are pushed.")
    reports = _find_reports(folder) if report else []
    answer = verify_model(folder)["answer"]
    return _Upload(folder, _list_uploaded_files(folder), reports, build_model_card(folder, repository), answer)


def _list_weights(folder: Path) -> list[str]:
    """The names of the files with the weights of a model: one file, or an index and the shards that it names."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        return []
    try:
        shards = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} cannot be read ({error!r}): save the model again.") from None
    strange = [name for name in shards if Path(name).name != name or not name.endswith(".safetensors")]
    if strange:
        raise DataError(f"{index} names {strange[0]!r}, which is no file of weights beside it: save the model again.")
    return [WEIGHTS_INDEX, *shards]


def _list_uploaded_files(folder: Path) -> list[str]:
    """The names of the files of a model folder that are uploaded; the card is not among them."""
    return sorted(name for name in (*CONFIGS, *_list_weights(folder)) if (folder / name).is_file())


def _list_left_files(folder: Path, uploaded: list[str]) -> list[str]:
    """The names of the other files and folders in a model folder."""
    return sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in (*uploaded, CARD))


def _find_reports(folder: Path) -> list[Path]:
    """The files that `rorchat report` has written for the run of a model, or for its story."""
    story = _find_story(folder)
    for place in (folder.resolve().parent, story):
        found = [place / name for name in REPORT_FILES if (place / name).is_file()]
        if len(found) == len(REPORT_FILES):
            return found
    raise DataError(f"There is no report to upload: write it with rorchat report {story}")


def push(name_or_path: str, repository: str, private: bool = False, dry_run: bool = False, report: bool = False) -> str:
    """Verifies a model, uploads it with a card, downloads it, compares all files, and verifies the download.

    Args:
        dry_run: verify the model and build the card, but upload nothing; the Hub is not contacted.
        report: also upload report.md and curves.png of the model's run or story, as `rorchat report` has written them.

    Returns:
        A summary for the user; after a dry run, it ends with the card.

    Raises:
        UsageError: the name of the repository is invalid.
        DataError, MismatchError: the model cannot be published; nothing was uploaded.
        PermissionDenied, RemoteError: the Hub denied access or failed.
    """
    from huggingface_hub import HfApi, snapshot_download

    upload = _prepare_upload(name_or_path, repository, report)
    folder = upload.folder
    if dry_run:
        return f"{upload.describe()}\n\nnothing was uploaded; the card (README.md) would be:\n\n{upload.card}"
    api = HfApi()
    with translate_hub_errors(repository):
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload model",
            allow_patterns=upload.files,
        )
        for path in upload.reports:
            api.upload_file(
                repo_id=repository, path_or_fileobj=path, path_in_repo=path.name, commit_message="Report of the run"
            )
        api.upload_file(
            repo_id=repository,
            path_or_fileobj=upload.card.encode(),
            path_in_repo=CARD,
            commit_message="Model card from the run",
        )
    with tempfile.TemporaryDirectory() as download:
        with translate_hub_errors(repository):
            snapshot_download(repository, local_dir=download, force_download=True)
        compare_files(folder, Path(download), repository)
        after = verify_model(download)
    lines = [
        f"verified  {folder}: {upload.answer!r}",
        f"released  {url}",
        f"verified  download from the Hub: {after['answer']!r}",
        *upload.describe_left(),
    ]
    return "\n".join(lines)


def _check_repository_name(repository: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"{repository!r} is not a valid name of a Hub repository: {error}") from None


def compare_files(folder: Path, download: Path, repository: str) -> None:
    """Raises RemoteError unless every uploaded file of a folder is identical in its download."""
    for name in _list_uploaded_files(folder):
        copy = download / name
        if not copy.is_file() or file_sha256(copy) != file_sha256(folder / name):
            raise RemoteError(
                f"{name} is missing or different in the download from {repository}: push the model again."
            )


@contextlib.contextmanager
def translate_hub_errors(repository: str) -> Iterator[None]:
    """Converts errors of the Hub client to RorchatErrors with one-line messages. Other errors are not changed."""
    try:
        yield
    except Exception as wrapped:
        error = _find_cause(wrapped)
        if not is_remote(error):
            raise
        message = describe(error)
        if is_denied(error):
            raise PermissionDenied(
                f"The Hub denied write access to {repository}: {LOG_IN} as its owner ({message})."
            ) from None
        raise RemoteError(
            f"Publishing {repository} failed: {message}. The local model is unchanged; push it again."
        ) from None


def _find_cause(error: BaseException) -> BaseException:
    """Returns the original error, which the Hub client may wrap in others ("Force download failed ...")."""
    import httpx2  # the client of huggingface_hub; its errors are not OSErrors

    while not isinstance(error, httpx2.HTTPError) and isinstance(error, (OSError, RuntimeError, ValueError)):
        if not isinstance(error.__cause__, (OSError, httpx2.HTTPError)):
            break
        error = error.__cause__
    return error
