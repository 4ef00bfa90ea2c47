"""A run and its folder: begin, resume or find finished; train; save a stock model. The tail that every stage shares.

config.yaml     what was set; itself a valid --config
run.json        versions, device, what went in (with sha256), results; `finished` once the model is saved
metrics.jsonl   one line a log step, see docs/metrics.md; it only grows
mixture.png     the share of every source from the first token to the last (pretraining)
samples.jsonl   what the model says to fixed prompts, before, in between and after
checkpoint-N/   what a run goes on from, see rorchat/training/checkpoint.py; those that did not verify have another name
model/          the result: a plain Transformers folder
"""

import json
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml
from accelerate import PartialState

from rorchat import __version__
from rorchat.errors import DataError, DivergedError, Interrupted, MismatchError
from rorchat.lock import alone
from rorchat.model import save_model
from rorchat.persona import DEFAULT_PERSONA
from rorchat.sources import digest_of
from rorchat.tokens.past import closed, require_same_data
from rorchat.tokens.store import Manifest, sha256_of
from rorchat.training.checkpoint import Checkpoints
from rorchat.training.processes import whole_model
from rorchat.training.resume import listening

TOKENS = "tokens"  # the folder of token stores in a run that names no other
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "trl")
# Settings that change neither what is computed nor what comes out: they may differ when a run goes on.
FREE_SETTINGS = {
    "output_dir", "logging_steps", "logging_strategy", "report_to", "dataloader_num_workers", "save_steps",
    "save_strategy", "save_total_limit", "run_name", "use_cpu", "sample_steps", "price_per_hour", "ddp_timeout",
    "new_phase",
}  # fmt: skip
#: How a mixture was said; what it says is compared in its place.
SAID = {"mixture", "sources", "weights"}
#: What another mixture changes, and nothing else does.
MIXED = ("inputs.mixture", "inputs.sources")
#: What changes roundings alone where the order of the data does not hang on it.
ELASTIC = {
    "processes",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "compile",
    "gradient_checkpointing",
}
REMEDY = "Choose another output_dir, or delete the folder."
APPEND = "Give --new_phase to go on with another mixture, choose another output_dir, or delete the folder."


def fingerprint(folder: str) -> dict[str, str]:
    """sha256 of the weights and the tokenizer in a local folder; a Hub id stands for itself."""
    files = [Path(folder) / name for name in ("model.safetensors", "tokenizer.json", "vocab.json", "merges.txt")]
    return {file.name: sha256_of(file) for file in files if file.is_file()} or {"id": folder}


def data_fingerprint(arguments) -> dict[str, object]:
    """What a config's words alone do not fix: what sources are made of, the persona's sha256, what is mixed how."""
    persona = Path(arguments.persona) if arguments.persona else DEFAULT_PERSONA
    found = {
        "sources": {spec: _digest_of(spec) for spec in arguments.specs()},
        "persona": sha256_of(persona) if persona.is_file() else None,
    }
    if hasattr(arguments, "mixture_config"):
        found["mixture"] = arguments.mixture_config.resolved()  # config.yaml holds no more than the name of the file
    return found


def _digest_of(spec: str) -> str:
    kind, _, where = spec.partition("=")
    if kind != "store":
        return digest_of(spec)
    try:
        return Manifest.read(Path(where)).content_sha256()
    except DataError:  # which is told when it is opened, unless it is optional
        return ""


@dataclass(frozen=True)
class Difference:
    """Where what a checkpoint was made with and what goes on from it differ."""

    name: str
    before: object
    now: object
    fatal: bool
    new_phase: bool = False


def differences(before: dict, now: dict, elastic: bool, new_phase: bool = False) -> list[Difference]:
    """Where two identities of a run differ, but for what changes nothing.

    Args:
        elastic: the data come in the same order for any number of processes and size of micro-batch.
        new_phase: another mixture is appended, and so is no other run.
    """
    free = FREE_SETTINGS | (SAID if elastic else set())
    mild = {"versions", "python", "rorchat"} | (ELASTIC if elastic else set())

    def walk(name: str, before: object, now: object) -> Iterator[Difference]:
        if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
            before, now = (dict(enumerate(values, 1)) for values in (before, now))
        if isinstance(before, dict) and isinstance(now, dict):
            for key in [*before, *(key for key in now if key not in before)]:
                if not (name == "settings" and key in free):
                    yield from walk(f"{name}.{key}" if name else str(key), before.get(key), now.get(key))
        elif before != now:
            own = name.removeprefix("settings.")
            mixed = new_phase and name.startswith(MIXED)
            yield Difference(own, before, now, own.split(".")[0] not in mild and not mixed, mixed)

    return list(walk("", before, now))


def _is_another_mixture(found: list[Difference]) -> bool:
    """Whether the mixture differs, and nothing that does not follow from it; data alone may not change."""
    names = [each.name for each in found]
    return all(name.startswith(MIXED) for name in names) and any(name.startswith(MIXED[0]) for name in names)


def table(found: list[Difference]) -> list[str]:
    """Differences in lines, what decides first."""
    rows = [("", "then", "now", "")]
    for each in sorted(found, key=lambda each: not each.fatal):
        what = "another run" if each.fatal else "new phase" if each.new_phase else "goes on, with other roundings"
        rows.append((each.name, *(json.dumps(value) for value in (each.before, each.now)), what))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


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
            "processes": PartialState().num_processes,
            "settings": arguments.given,
        }
        self._held = ExitStack()  # until the run ends, or the process
        self._held.enter_context(listening())
        if PartialState().is_main_process:
            self._held.enter_context(alone(self.folder))
        self.appends = False  # whether another mixture goes on from the checkpoint
        self._look()
        if getattr(arguments, "new_phase", False) and self._found is None:
            raise MismatchError(
                f"The output folder {self.folder} has no checkpoint, so that there is nothing to go on with: leave "
                "new_phase out."
            )
        PartialState().wait_for_everyone()  # before any process writes into the folder that another one is reading
        self.finished = bool(self._found and self._found.get("finished"))

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    @property
    def past(self) -> list[dict]:
        """What was mixed before, as `rorchat.tokens.past` keeps it; empty while the first mixture goes on."""
        return self.record.get("past", [])

    def _look(self) -> None:
        """Refuses to touch what another run achieved; what achieved nothing is taken over."""
        self._found = self.checkpoint = None
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if not {name for name in there if name != TOKENS and not name.startswith(".")}:
            return
        try:
            self._found = json.loads((self.folder / "run.json").read_text())
        except (OSError, ValueError):
            raise MismatchError(
                f"The output folder {self.folder} is not empty and holds no run of rorchat. {REMEDY}"
            ) from None
        if not self._found.get("finished"):
            self.checkpoint = Checkpoints(self.folder).newest()
            if self.checkpoint is None:
                self._found = None  # it broke off before it had anything to lose
                return
        # run.json is of the last start, which may not have come as far as a checkpoint
        before = self.checkpoint.about["identity"] if self.checkpoint else self._found
        past = self._past_behind(before)
        if past:
            self.record["past"] = past
        self._require_same({**before, "past": past} if past else before, self.record)

    def _past_behind(self, before: dict) -> list[dict]:
        """The past of what goes on; with `new_phase`, where another mixture was asked for, that of before is closed."""
        past, arguments = before.get("past", []), self.arguments
        if not (self.checkpoint and getattr(arguments, "new_phase", False) and "windows" in before):
            return past
        step = self.checkpoint.step
        own = closed(before, step * (arguments.global_batch_tokens // arguments.block_size))
        require_same_data([*past, own], self.record["inputs"])
        if own["mixture"] == self.record["inputs"]["mixture"]:
            return past
        if step >= arguments.max_steps:
            raise MismatchError(
                f"{self.checkpoint.folder} is of the last step: there are no tokens left for a new phase. Leave "
                "new_phase out, and give the mixture of before."
            )
        self.appends = True
        return [*past, own]

    def _require_same(self, before: dict, now: dict) -> None:
        """Raises MismatchError where two identities differ in what decides; tells where they differ in what matters."""
        before = {key: before.get(key) for key in now}
        found = differences(before, now, elastic=self.record["stage"] == "pretrain", new_phase=self.appends)
        if found and PartialState().is_main_process:
            print(*table(found), sep="\n", file=sys.stderr)  # noqa: T201
        fatal = [each for each in found if each.fatal]
        if fatal:
            said = "; ".join(f"{each.name} {each.before}, now {each.now}" for each in fatal)
            remedy = APPEND if self.checkpoint and _is_another_mixture(fatal) else REMEDY
            raise MismatchError(f"The output folder {self.folder} holds another run: {said}. {remedy}")

    def already_finished(self) -> dict[str, float]:
        """Says so, and gives the metrics that the run ended with."""
        self._held.close()
        print(f"{self.folder}: finished before with these settings; delete the folder to run it again", file=sys.stderr)  # noqa: T201
        return self._found["metrics"]

    def begin(self, plan: object = None) -> None:
        """Writes config.yaml and run.json; clears what an unfinished run without a checkpoint left behind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint is None:
            for name in ("metrics.jsonl", "samples.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.arguments.given, sort_keys=True))
        self._write({"plan": plan} if plan else {})

    def _write(self, more: dict) -> None:
        """Replaces run.json at once: without it the folder would be no run's."""
        staging = self.folder / ".run.json"
        staging.write_text(json.dumps({**self.record, **more}, indent=2) + "\n")
        staging.replace(self.folder / "run.json")

    def train(self, trainer, details: dict, told: Iterable[object] = ()) -> dict[str, float]:
        """As `_train`; then other processes may have the folder."""
        with self._held:
            return self._train(trainer, details, told)

    def _train(self, trainer, details: dict, told: Iterable[object]) -> dict[str, float]:
        """Trains, going on from the newest checkpoint if there is one, measures, and saves the stock model.

        Args:
            details: what run.json should remember: data and plan.
            told: lines that are printed before the first step: where the rows went, what is mixed.

        Returns:
            The final metrics, which are also in run.json.
        """
        main = trainer.is_world_process_zero()
        plan = json.loads(json.dumps(details.get("plan")))
        trainer.identity = {**self.record, **json.loads(json.dumps(details))}
        if self.appends:
            trainer.meter.new_phase = {"sources": [*self.record["inputs"]["mixture"]["sources"]]}
        elif self.checkpoint:
            self._require_same(self.checkpoint.about["identity"], {**self.record, "plan": plan})
        if main:
            self.begin(plan)
            trainer.require_room()
        trainer.accelerator.wait_for_everyone()
        if main:
            for line in told:
                print(line, file=sys.stderr)  # noqa: T201
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=self.checkpoint and str(self.checkpoint.folder))
        if trainer.interruptions.stopping:
            step = trainer.state.global_step
            saved = any(each.step == step for each in trainer.checkpoints.committed())
            raise Interrupted(
                f"Stopped at step {step}, which is {'saved: the same command goes on' if saved else 'not saved'}."
            )
        seconds = round(time.monotonic() - started, 1)
        if not trainer.is_finite():
            raise DivergedError(
                "The last step left weights that are no numbers. The same command goes on from the last checkpoint, if "
                "there is one; lower learning_rate in a new output_dir."
            )
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
