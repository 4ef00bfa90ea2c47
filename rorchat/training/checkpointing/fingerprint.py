"""What a run is made of, and whether what goes on is the same run: settings, data, tokenizer, template, versions.

It is written into run.json and every checkpoint, and compared before a run goes on: what differs is another run, or
does not matter, or changes roundings alone, or was allowed.
"""

import json
import platform
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import version
from pathlib import Path

from accelerate import PartialState

from rorchat import __version__
from rorchat.adapter import ADAPTER_BASE, ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rorchat.errors import DataError
from rorchat.files import file_sha256
from rorchat.mixture.history import names_without_paths, without_paths
from rorchat.persona import DEFAULT_PERSONA
from rorchat.sources.registry import source_digest
from rorchat.tokens.store import Manifest, store_folder

FINGERPRINTED = (
    "model.safetensors", "config.json", "tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja",
    ADAPTER_WEIGHTS, ADAPTER_CONFIG, ADAPTER_BASE,
)  # fmt: skip
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "trl")
# Settings that change neither what is computed nor what comes out: they may differ when a run goes on.
FREE_SETTINGS = {
    "output_dir", "logging_steps", "logging_strategy", "report_to", "dataloader_num_workers", "save_steps",
    "save_strategy", "save_total_limit", "run_name", "use_cpu", "sample_steps", "price_per_hour", "ddp_timeout",
    "mirror", "new_phase", "weights_only", "eval_steps", "eval_strategy", "eval_on_start", "eval_delay",
    "sample_prompts", "base_text", "disable_tqdm", "log_level", "log_level_replica", "logging_first_step",
    "dataloader_prefetch_factor", "dataloader_pin_memory", "dataloader_persistent_workers",
    # what these lead to is compared: contents, by sha256, and the precision
    "tokenizer", "model", "persona", "token_store", "replay", "bf16", "fp16",
}  # fmt: skip
ANOTHER_RUN, WEIGHTS_ALONE = "another run", "the weights alone go on"
#: How a mixture was said; what it says is compared in its place.
SAID = {"mixture", "sources", "weights"}
#: What another mixture changes, and nothing else does.
MIXED = ("inputs.mixture", "inputs.sources")
#: What the weights know nothing of: it may change where they alone go on.
OPTIMIZATION = {
    "optimizer", "learning_rate", "matrix_learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "cooldown_share", "seed",
}  # fmt: skip
#: What changes roundings alone where the order of the data does not hang on it.
ELASTIC = {
    "processes",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "compile",
    "gradient_checkpointing",
}


def fingerprint(folder: str) -> dict[str, str]:
    """sha256 of weights, config, tokenizer and template in a local folder; a Hub id stands for itself."""
    files = [Path(folder) / name for name in FINGERPRINTED]
    return {file.name: file_sha256(file) for file in files if file.is_file()} or {"id": folder}


def data_fingerprint(arguments) -> dict[str, object]:
    """What a config's words alone do not fix: what sources are made of, the persona's sha256, what is mixed how, and
    the sha256 of files with a user's rewards."""
    persona = Path(arguments.persona) if arguments.persona else DEFAULT_PERSONA
    found = {
        "sources": {spec: _digest_of(spec) for spec in arguments.specs()},
        "persona": file_sha256(persona) if persona.is_file() else None,
    }
    if getattr(arguments, "replay", None):
        found["replay"] = _digest_of(arguments.replay)
    if getattr(arguments, "reward_files", None):
        found["rewards"] = arguments.reward_files
    if hasattr(arguments, "mixture_config"):
        found["mixture"] = arguments.mixture_config.to_dict()  # config.yaml holds no more than the name of the file
    return found


def _digest_of(spec: str) -> str:
    folder = store_folder(spec)
    if not folder:
        return source_digest(spec)
    try:
        return Manifest.read(folder).content_sha256()
    except DataError:  # which is told when it is opened, unless it is optional
        return ""


def identity_of(arguments, stage: str, inputs: dict[str, str]) -> dict[str, object]:
    """What a run is made of, as JSON.

    Args:
        arguments: a stage's, as `parse` gives them.
        stage: "pretrain", "sft", "dpo" ...
        inputs: folders (or Hub ids) of tokenizer and model that go in, by role.
    """
    return {
        "stage": stage,
        "rorchat": __version__,
        "inputs": {role: fingerprint(folder) for role, folder in inputs.items()} | data_fingerprint(arguments),
        "versions": {library: version(library) for library in LIBRARIES},
        "python": platform.python_version(),
        "processes": PartialState().num_processes,
        "device": "cuda" if arguments.on_gpu else "cpu",
        "precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32",
        "settings": _not_default(arguments),
    }


def _not_default(arguments) -> dict[str, object]:
    """What was set to something else than the default: to say the default is to say nothing."""
    defaults = {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(arguments)
    }
    return {name: value for name, value in arguments.given.items() if defaults[name] != value}


@dataclass(frozen=True)
class Difference:
    """Where what a checkpoint was made with and what goes on from it differ, and what follows."""

    name: str
    before: object
    now: object
    follows: str

    @property
    def is_fatal(self) -> bool:
        return self.follows == ANOTHER_RUN

    @property
    def is_mixture(self) -> bool:
        return self.name.startswith(MIXED)


def differences(
    before: dict, now: dict, elastic: bool, new_phase: bool = False, weights_only: bool = False
) -> list[Difference]:
    """Where two identities of a run differ, but for what changes nothing.

    Args:
        before: may hold more than `now`, which is not compared.
        elastic: the data come in the same order for any number of processes and size of micro-batch.
        new_phase: another mixture is appended, and so is no other run.
        weights_only: nothing of the optimizer goes on, so that it may be another.
    """
    free = FREE_SETTINGS | (SAID if elastic else set())
    mild = {"versions", "python", "rorchat", "device", "precision", "tf32"} | (ELASTIC if elastic else set())

    def follows(name: str) -> str:
        if name.split(".")[0] in mild:
            return "goes on, with other roundings"
        if new_phase and name.startswith(MIXED):
            return "new phase"
        if weights_only and name.split(".")[0] in OPTIMIZATION:
            return WEIGHTS_ALONE
        return ANOTHER_RUN

    before = {key: before.get(key) for key in now}
    if "settings" in now:
        names = {*(before["settings"] or {}), *now["settings"]} - free
        before, now = (_comparable(each, names) for each in (before, now))
    if "plan" in now:
        before, now = ({**each, "plan": _without_places(each["plan"])} for each in (before, now))
    return [Difference(name, *values, follows(name)) for name, *values in _unequal("", before, now)]


def _comparable(identity: dict, names: set[str]) -> dict:
    """An identity with the settings of these names, and its local sources named by what they are made of."""
    settings = {name: (identity["settings"] or {}).get(name, "default") for name in sorted(names)}
    inputs = without_paths(identity.get("inputs") or {})
    if isinstance(settings.get("sources"), list):
        made_of = names_without_paths(identity["inputs"]["sources"])
        settings["sources"] = [made_of.get(spec, spec) for spec in settings["sources"]]
    return identity | {"settings": settings} | ({"inputs": inputs} if "inputs" in identity else {})


def _without_places(plan: object) -> object:
    """A plan without its sources' specs, which say where they lie."""
    if isinstance(plan, dict):
        return {key: _without_places(value) for key, value in plan.items() if key != "source"}
    return [_without_places(value) for value in plan] if isinstance(plan, list) else plan


def _unequal(name: str, before: object, now: object) -> Iterator[tuple[str, object, object]]:
    """(name, value, other value) of what differs, inside of dictionaries and lists of the same length."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = (dict(enumerate(values, 1)) for values in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _unequal(f"{name}.{key}" if name else str(key), before.get(key), now.get(key))
    elif before != now:
        yield name.removeprefix("settings."), before, now


def table(found: list[Difference]) -> list[str]:
    """Differences in lines, what decides first."""
    rows = [("", "then", "now", "")]
    for each in sorted(found, key=lambda each: not each.is_fatal):
        rows.append((each.name, *(json.dumps(value) for value in (each.before, each.now)), each.follows))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
