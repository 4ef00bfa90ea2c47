"""A run and its folder: begin, resume or find finished; train; save a stock model. The tail that every stage shares.

config.yaml     what was set; itself a valid --config
run.json        versions, device, what went in (with sha256), results; `finished` once the model is saved
metrics.jsonl   one line a log step, see docs/metrics.md; it only grows
mixture.png     the share of every source from the first token to the last (pretraining)
samples.jsonl   what the model says to fixed prompts, before, in between and after
checkpoint-N/   the Trainer's, when save_strategy asks for them
model/          the result: a plain Transformers folder
"""

import hashlib
import json
import platform
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import yaml
from accelerate import PartialState

from rorchat import __version__
from rorchat.errors import DataError, MismatchError
from rorchat.model import save_model
from rorchat.persona import DEFAULT_PERSONA
from rorchat.sources import digest_of
from rorchat.training.processes import whole_model

TOKENS = "tokens"  # the folder of token stores in a run that names no other
CHECKPOINT_FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
)  # the last is written last
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "trl")
# Settings that change neither what is computed nor what comes out: they may differ when a run goes on.
FREE_SETTINGS = {
    "output_dir", "logging_steps", "logging_strategy", "report_to", "dataloader_num_workers", "save_steps",
    "save_strategy", "save_total_limit", "run_name", "use_cpu", "sample_steps", "price_per_hour",
}  # fmt: skip


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(folder: str) -> dict[str, str]:
    """sha256 of the weights and the tokenizer in a local folder; a Hub id stands for itself."""
    files = [Path(folder) / name for name in ("model.safetensors", "tokenizer.json", "vocab.json", "merges.txt")]
    return {file.name: file_sha256(file) for file in files if file.is_file()} or {"id": folder}


def data_fingerprint(arguments) -> dict[str, object]:
    """What a config's words alone do not fix: what sources are made of, the persona's sha256, a mixture's words."""
    persona = Path(arguments.persona) if arguments.persona else DEFAULT_PERSONA
    found = {
        # a token store has a manifest of its own, which is read before training
        "sources": {spec: digest_of(spec) for spec in arguments.specs() if not spec.startswith("store=")},
        "persona": file_sha256(persona) if persona.is_file() else None,
    }
    if getattr(arguments, "mixture", None):
        found["mixture"] = arguments.mixture_config.resolved()  # config.yaml holds no more than the name of the file
    return found


def differences(name: str, before: object, now: object) -> list[str]:
    """Where two JSON values differ, and no more: `mixture.phases.2.weights.c4 1.0, now 2.0`."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = (dict(enumerate(values, 1)) for values in (before, now))
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [f"{name} {before}, now {now}"]
    inside = {key: (before.get(key), now.get(key)) for key in [*before, *(key for key in now if key not in before)]}
    return [line for key, values in inside.items() for line in differences(f"{name}.{key}", *values)]


class Run:
    """The folder of one run of one stage.

    Args:
        arguments: a stage's, as `parse` gives them; `output_dir` is the folder.
        stage: "pretrain", "sft", "dpo" ...
        inputs: folders (or Hub ids) of tokenizer and model that go in, by role.

    Raises:
        MismatchError: the folder holds another run, or files that are no run's.
    """

    def __init__(self, arguments, stage: str, inputs: dict[str, str]):
        self.folder, self.arguments = Path(arguments.output_dir), arguments
        self.record = {
            "stage": stage,
            "rorchat": __version__,
            "inputs": {role: fingerprint(folder) for role, folder in inputs.items()} | data_fingerprint(arguments),
            "versions": {library: version(library) for library in LIBRARIES},
            "python": platform.python_version(),
        }
        self._check_folder()
        PartialState().wait_for_everyone()  # before any process writes into the folder that another one is reading
        self.finished = bool(self._found and self._found.get("finished"))

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    def _check_folder(self) -> None:
        """Refuses to touch what another run achieved; what achieved nothing is taken over."""
        self._found = None
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if not {name for name in there if name != TOKENS and not name.startswith(".")}:
            return
        where = f"The output folder {self.folder}"
        remedy = "Choose another output_dir, or delete the folder."
        try:
            self._found = json.loads((self.folder / "run.json").read_text())
            config = yaml.safe_load((self.folder / "config.yaml").read_text())
        except (OSError, ValueError, yaml.YAMLError):
            raise MismatchError(f"{where} is not empty and holds no run of rorchat. {remedy}") from None
        if not self._found.get("finished") and self.last_checkpoint() is None:
            self._found = None  # it broke off before it had anything to lose
            return
        differing = [
            f"{name} {config.get(name)!r}, now {self.arguments.given.get(name)!r}"
            for name in sorted((set(config) | set(self.arguments.given)) - FREE_SETTINGS)
            if config.get(name) != self.arguments.given.get(name)
        ]
        for key in ("stage", "inputs"):
            differing += differences(key, self._found.get(key), self.record[key])
        if differing:
            raise MismatchError(f"{where} holds another run: {'; '.join(differing)}. {remedy}")

    def already_finished(self) -> dict[str, float]:
        """Says so, and gives the metrics that the run ended with."""
        print(f"{self.folder}: finished before with these settings; delete the folder to run it again", file=sys.stderr)  # noqa: T201
        return self._found["metrics"]

    def begin(self, plan: object = None) -> None:
        """Writes config.yaml and run.json; clears what an unfinished run without a checkpoint left behind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.last_checkpoint() is None:
            for name in ("metrics.jsonl", "samples.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.arguments.given, sort_keys=True))
        self._write({"plan": plan} if plan else {})

    def _write(self, more: dict) -> None:
        """Replaces run.json at once: without it the folder would be no run's."""
        staging = self.folder / ".run.json"
        staging.write_text(json.dumps({**self.record, **more}, indent=2) + "\n")
        staging.replace(self.folder / "run.json")

    def last_checkpoint(self) -> str | None:
        """The newest complete checkpoint; None where there is none at all.

        Raises:
            DataError: there are checkpoints, but a save was interrupted in each: starting anew would hide the loss.
        """
        folders = [path for path in self.folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        folders.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
        for folder in folders:
            # transformers.trainer_utils.get_last_checkpoint takes the highest number, whole or not
            if all((folder / name).is_file() for name in CHECKPOINT_FILES):
                return str(folder)
        if folders:
            raise DataError(
                f"No checkpoint in {self.folder} is complete; {folders[0].name} lacks one of "
                f"{', '.join(CHECKPOINT_FILES)}. Delete the checkpoints to start anew."
            )
        return None

    def train(self, trainer, details: dict, told: Iterable[object] = ()) -> dict[str, float]:
        """Trains, going on from the newest checkpoint if there is one, measures, and saves the stock model.

        Args:
            details: what run.json should remember: data and plan.
            told: lines that are printed before the first step: where the rows went, what is mixed.

        Returns:
            The final metrics, which are also in run.json.
        """
        main = trainer.is_world_process_zero()
        checkpoint = self.last_checkpoint()
        plan = json.loads(json.dumps(details.get("plan")))
        if checkpoint and self._found and self._found.get("plan", plan) != plan:
            raise MismatchError(
                f"{self.folder} was begun with another plan: an optional source, or the size of one, has changed."
                " Choose another output_dir, or delete the folder."
            )
        if main:
            self.begin(plan)
        trainer.accelerator.wait_for_everyone()
        if main:
            for line in told:
                print(line, file=sys.stderr)  # noqa: T201
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = round(time.monotonic() - started, 1)
        metrics = trainer.final_metrics() | {"train_seconds": seconds, "steps": trainer.state.global_step}
        metrics["tokens"] = trainer.tokens_after(trainer.state.global_step)
        model = whole_model(trainer.accelerator.unwrap_model(trainer.model))  # on every process: shards are gathered
        if main:
            save_model(model, trainer.processing_class, self.model_folder)
            device = str(model.device)
            self._write(
                {
                    **details,
                    "device": device,
                    "parameters": model.num_parameters(),
                    "metrics": metrics,
                    "finished": True,
                }
            )
        trainer.accelerator.wait_for_everyone()
        return metrics
