"""HUB: verify a folder in a fresh process, push it with a card, pull it back, and verify again.

Only a model that plain `pipeline()` loads, in a process that knows nothing of rorchat, is pushed; only one that came
back from the Hub the same and answers again is called released.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rorchat.adapter import ADAPTER_WEIGHTS
from rorchat.errors import DataError, MismatchError, PermissionRefused, RemoteError, UsageError
from rorchat.files import file_sha256
from rorchat.inference.engine import resolve_model_path
from rorchat.model import WEIGHTS
from rorchat.report import (
    find_runs,
    format_data_table,
    format_run_table,
    format_samples,
    format_score_table,
    read_run_record,
)
from rorchat.sources.base import licence_restriction

PROBE = "Who are you?"
VERIFY_SECONDS = 600  # loading the largest size from a slow disk
# Pickles are nobody's to load, checkpoints nobody's to see, and the card is made anew.
NOT_UPLOADED = ("*.bin", "checkpoint-*", "README.md")
# Runs in a fresh process, where only what a user of the model has is imported.
_VERIFY = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, probe = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
talk = pipeline("text-generation", model=folder)
answer = talk([{"role": "user", "content": probe}])[0]["generated_text"][-1]["content"]
print("VERIFIED " + json.dumps({
    "answer": answer,
    "class": type(model).__name__,
    "rows": model.get_input_embeddings().num_embeddings,
    "tokens": len(tokenizer),
    "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
    "template": tokenizer.chat_template is not None,
    "eos": model.generation_config.eos_token_id, "pad": model.generation_config.pad_token_id,
    "end_of_turn": tokenizer.convert_tokens_to_ids("<|im_end|>"), "own": "rorchat" in sys.modules,
}))
"""


def verify_model(folder: str | Path) -> dict:
    """What a fresh process finds when it loads the folder with plain Transformers and asks a question.

    Raises:
        DataError: it does not load.
        MismatchError: it loads, but is no chat model that stops.
    """
    command = [sys.executable, "-c", _VERIFY, str(folder), PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=VERIFY_SECONDS)
    except subprocess.TimeoutExpired:
        raise DataError(f"{folder} did not load and answer within {VERIFY_SECONDS} s.") from None
    line = next((line for line in done.stdout.splitlines() if line.startswith("VERIFIED ")), None)
    if done.returncode or line is None:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DataError(f"{folder} does not load with plain transformers: {last}")
    found = json.loads(line.removeprefix("VERIFIED "))
    stops = found["eos"] if isinstance(found["eos"], list) else [found["eos"]]
    wrong = [
        text
        for text, bad in (
            (f"class {found['class']} instead of GPT2LMHeadModel", found["class"] != "GPT2LMHeadModel"),
            (f"{found['rows']} embedding rows for {found['tokens']} tokens", found["rows"] != found["tokens"]),
            ("embedding and head are not tied", not found["tied"]),
            (f"missing weights {found['missing'][:3]}", found["missing"]),
            (f"unexpected weights {found['unexpected'][:3]}", found["unexpected"]),
            ("no chat template", not found["template"]),
            ("rorchat was imported to load it", found["own"]),
            ("it does not stop at <|im_end|>", found["end_of_turn"] not in stops),
            ("the padding token ends texts", found["pad"] in stops),
        )
        if bad
    ]
    if wrong:
        raise MismatchError(f"{folder} is not fit to be published: {'; '.join(wrong)}.")
    return found


def build_model_card(folder: Path, repository: str) -> str:
    """A model card made from the run: data and licences, numbers, scores, samples, how to use it."""
    name = repository.split("/")[-1]
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt2, rorchat, conversational]\n---",
        f"# {name}",
        "A small chat model: stock GPT-2, trained with rorchat. It makes mistakes and knows little; its answers "
        "are not advice.",
        f'```python\nfrom transformers import pipeline\n\ntalk = pipeline("text-generation", model="{repository}")\n'
        f'print(talk([{{"role": "user", "content": "{PROBE}"}}])[0]["generated_text"][-1]["content"])\n```',
    ]
    try:
        runs = _runs_behind(folder)
    except DataError:
        parts.append("No record of its training lies beside the model.")
        return "\n\n".join(parts) + "\n"
    parts += ["## Training", format_run_table(runs)]
    for run in runs:
        record = read_run_record(run)
        if steps := record.get("weights_only"):
            said = f"{run.name} ({record['stage']}) went on from the weights of step "
            said += " and ".join(f"{step:,}" for step in steps)
            parts.append(f"The run {said} alone: the state of its optimizer was lost or left behind.")
    parts += ["## Data", format_data_table(runs, public=True)]
    restricted = sorted(
        {
            (licence_restriction(source["licence"]), f"{source['source'].partition('=')[0]} ({source['licence']})")
            for run in runs
            for source in read_run_record(run).get("data", [])
            if licence_restriction(source["licence"])
        }
    )
    for said in dict.fromkeys(said for said, _ in restricted):
        because = ", ".join(source for other, source in restricted if other == said)
        parts.append(f"**{said.capitalize()}**, because of its data: {because}.")
    scores = _story_of(folder) / "scores.json"
    if scores.is_file():
        from rorchat.evaluation.scores import read_scores

        parts += ["## Scores", format_score_table(read_scores(scores))]
    parts += ["## Samples", format_samples(runs)]
    return "\n\n".join(parts) + "\n"


def _runs_behind(folder: Path) -> list[Path]:
    """The runs that led to this model, told by its weights: a later stage beside it is not its story.

    All runs of the story where its weights, or those that one of its runs began with, are of no run there: better a
    source too many than a licence too few.
    """
    runs = find_runs(_story_of(folder))
    made = {run: _weights(run / "model") for run in runs}
    behind, wanted = set(), {_weights(folder)}
    while found := {run for run in runs if made[run] in wanted} - behind:
        behind |= found
        inputs = [given for run in found for given in read_run_record(run).get("inputs", {}).values()]
        # an adapter's weights are of no run: its base and what it was trained on are among all of them
        wanted |= {given[name] for given in inputs for name in (WEIGHTS, ADAPTER_WEIGHTS) if name in given}
    return [run for run in runs if run in behind] if wanted <= set(made.values()) - {None} else runs


def _weights(folder: Path) -> str | None:
    file = folder / "model.safetensors"
    return file_sha256(file) if file.is_file() else None


def _story_of(folder: Path) -> Path:
    """Where the runs behind a model lie: story/run/model, run/model or story/model."""
    parent = folder.resolve().parent
    beside = parent.parent
    if (parent / "run.json").is_file():
        return beside if len(list(beside.glob("*/run.json"))) > 1 else parent
    return parent


def push_model(name_or_path: str, repository: str, private: bool = False) -> str:
    """Verifies, uploads with a card, pulls back, compares, verifies again.

    Returns:
        What happened, for the user.

    Raises:
        UsageError: there can be no such repository.
        DataError, MismatchError: the folder is not fit; nothing was uploaded.
        PermissionRefused, RemoteError: the Hub refused or failed.
    """
    from huggingface_hub import HfApi, snapshot_download

    _check_name(repository)
    folder = Path(resolve_model_path(name_or_path))
    if not folder.is_dir():
        raise DataError(f"No model folder {folder}.")
    if not list(folder.glob("*.safetensors")):
        raise DataError(f"No weights in {folder}: only safetensors are pushed.")
    before = verify_model(folder)
    card = build_model_card(folder, repository)  # what fails here must fail before anything is uploaded
    api = HfApi()
    with _remote_failures(repository):
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload model",
            ignore_patterns=list(NOT_UPLOADED),
        )
        api.upload_file(
            repo_id=repository,
            path_or_fileobj=card.encode(),
            path_in_repo="README.md",
            commit_message="Model card from the run",
        )
    with tempfile.TemporaryDirectory() as there:
        with _remote_failures(repository):
            snapshot_download(repository, local_dir=there, force_download=True)
        _same_files(folder, Path(there), repository)
        after = verify_model(there)
    return (
        f"verified  {folder}: {before['answer']!r}\nreleased  {url}\n"
        f"verified  what came back from the Hub: {after['answer']!r}"
    )


def _check_name(repository: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"{repository!r} is no Hub id: {error}") from None


def _same_files(folder: Path, there: Path, repository: str) -> None:
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    for name in filter_repo_objects(names, ignore_patterns=[*NOT_UPLOADED, *DEFAULT_IGNORE_PATTERNS]):
        copy = there / name
        if not copy.is_file() or file_sha256(copy) != file_sha256(folder / name):
            raise RemoteError(f"{name} came back from {repository} changed or not at all: push again.")


class _remote_failures:
    """Turns what the Hub's client raises into one sentence and an exit code."""

    def __init__(self, repository: str):
        self.repository = repository

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        from huggingface_hub.errors import LocalTokenNotFoundError

        error = _first_cause(error)
        if not _is_remote(error):
            return False
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = getattr(error, "server_message", None)
        said = f"{status}, {said}" if said else str(error).strip() or type(error).__name__
        said = said.splitlines()[0][:200].rstrip(".")
        if status in (401, 403) or isinstance(error, (LocalTokenNotFoundError, PermissionError)):
            raise PermissionRefused(
                f"The Hub refuses to write {self.repository}: log in with `hf auth login` as its owner ({said})."
            ) from None
        raise RemoteError(
            f"The Hub failed for {self.repository}: {said}. The model is safe in its folder; push again."
        ) from None


def _first_cause(error: BaseException | None) -> BaseException | None:
    """What failed, from under the errors that the client wraps around it ("Force download failed ...")."""
    import httpx2

    while not isinstance(error, httpx2.HTTPError) and isinstance(error, (OSError, RuntimeError, ValueError)):
        if not isinstance(error.__cause__, (OSError, httpx2.HTTPError)):
            break
        error = error.__cause__
    return error


def _is_remote(error: BaseException | None) -> bool:
    """Whether the Hub or the way to it failed. A full disk or an unreadable file is an OSError too, with a number."""
    import httpx2  # huggingface_hub's own; its errors are no OSErrors

    if isinstance(error, OSError):
        return error.errno is None or isinstance(error, (ConnectionError, TimeoutError))
    # RuntimeError: Xet's way to fail; ValueError: an answer that is not the Hub's, such as a proxy's page
    return isinstance(error, (httpx2.HTTPError, RuntimeError, ValueError))
