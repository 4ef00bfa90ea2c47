"""The metadata that identifies a run, and the comparison that decides whether a checkpoint belongs to it.

`run.json` and every checkpoint hold the metadata: settings, sha256 of data, tokenizer, template and model, library
versions. Before a run resumes, the two are compared. Each difference either means another run, or has no effect on the
result beyond floating-point rounding, or was explicitly allowed.
"""

import platform
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import version
from pathlib import Path

from accelerate import PartialState

from rorchat import __version__
from rorchat.adapter import is_adapter, read_adapter
from rorchat.errors import DataError
from rorchat.files import file_sha256, to_json
from rorchat.lineage import fingerprint_model
from rorchat.mixture.history import names_without_paths, without_paths
from rorchat.persona import DEFAULT_PERSONA
from rorchat.sources.registry import source_digest
from rorchat.tokens.store import Manifest, store_folder
from rorchat.training.arguments import StageArguments

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "trl")
#: Settings that affect neither the computation nor its result. They may change when a run resumes.
FREE_SETTINGS = {
    "output_dir", "logging_steps", "logging_strategy", "report_to", "dataloader_num_workers", "save_steps",
    "save_strategy", "save_total_limit", "run_name", "use_cpu", "sample_steps", "price_per_hour", "ddp_timeout",
    "mirror", "new_phase", "weights_only", "eval_steps", "eval_strategy", "eval_on_start", "eval_delay",
    "sample_prompts", "base_text", "disable_tqdm", "log_level", "log_level_replica", "logging_first_step",
    "max_eval_tokens", "dataloader_prefetch_factor", "dataloader_pin_memory", "dataloader_persistent_workers",
    # compared in another form: the sha256 of what they refer to, and the name of the precision
    "tokenizer", "model", "persona", "token_store", "replay", "bf16", "fp16",
}  # fmt: skip
#: Settings that define a mixture. The resolved mixture is compared instead.
MIXTURE_SETTINGS = {"mixture", "sources", "weights"}
#: Entries of the metadata that change with the mixture, and with nothing else.
MIXTURE = "inputs.mixture"
MIXTURE_ENTRIES = (MIXTURE, "inputs.sources")
#: Settings of the optimizer. They may change when only the weights of a checkpoint are loaded.
OPTIMIZER_SETTINGS = {
    "optimizer", "learning_rate", "matrix_learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "cooldown_share", "seed",
}  # fmt: skip
#: Entries that affect only rounding in stages whose order of rows does not depend on them, such as pretraining.
ELASTIC_ENTRIES = {
    "processes", "per_device_train_batch_size", "per_device_eval_batch_size", "compile", "gradient_checkpointing",
}  # fmt: skip
#: Entries that affect only rounding in every stage.
ROUNDING_ENTRIES = {"versions", "python", "rorchat", "device", "precision", "tf32"}
#: Entries that are not compared, because others follow from them: the commits of datasets are in `inputs.sources`.
DERIVED_ENTRIES = ("hub",)
ANOTHER_RUN = "another run"
ONLY_WEIGHTS = "resumes from the weights only"


def fingerprint_data(arguments: StageArguments) -> dict[str, object]:
    """What the settings refer to: digests of sources, persona, replayed text and reward files; and the mixture."""
    persona = Path(arguments.persona) if arguments.persona else DEFAULT_PERSONA
    data: dict[str, object] = {
        "sources": {spec: _source_digest(spec) for spec in arguments.source_specs()},
        "persona": file_sha256(persona) if persona.is_file() else None,
    }
    if replay := arguments.replay_source():
        data["replay"] = _source_digest(replay)
    if reward_files := arguments.reward_files():
        data["rewards"] = reward_files
    if (mixture := arguments.resolved_mixture()) is not None:
        data["mixture"] = mixture  # config.yaml has only the name of the mixture file
    return data


def _source_digest(spec: str) -> str:
    folder = store_folder(spec)
    if not folder:
        return source_digest(spec)
    try:
        return Manifest.read(folder).content_sha256()
    except DataError:  # reported when the store is opened, unless the source is optional
        return ""


def collect_run_metadata(arguments: StageArguments, stage: str, inputs: dict[str, str]) -> dict[str, object]:
    """The metadata that identifies a run, as JSON.

    Args:
        stage: "pretrain", "sft", "dpo" or "grpo".
        inputs: folders or Hub ids of the tokenizer and the model that the run starts from, by role.

    Raises:
        MismatchError: an adapter's base model has changed since the adapter was trained.
        DataError: an adapter or its base model cannot be found.
    """
    for folder in filter(is_adapter, inputs.values()):
        read_adapter(Path(folder))  # before a finished run is taken for one with this base
    return {
        "stage": stage,
        "rorchat": __version__,
        "inputs": {role: fingerprint_model(folder) for role, folder in inputs.items()} | fingerprint_data(arguments),
        "versions": {library: version(library) for library in LIBRARIES},
        "python": platform.python_version(),
        "processes": PartialState().num_processes,
        "device": "cuda" if arguments.on_gpu else "cpu",
        "precision": arguments.precision,
        "settings": _non_default_settings(arguments),
    }


def _non_default_settings(arguments: StageArguments) -> dict[str, object]:
    """The settings whose value is not the default. Setting a default explicitly does not make another run."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(arguments)
    }
    return {name: value for name, value in arguments.given.items() if defaults[name] != value}


@dataclass(frozen=True)
class Difference:
    """One entry in which the metadata of a checkpoint and of the current run differ, and the consequence."""

    name: str
    before: object
    now: object
    consequence: str

    @property
    def is_fatal(self) -> bool:
        return self.consequence == ANOTHER_RUN

    @property
    def is_mixture(self) -> bool:
        return self.name.startswith(MIXTURE_ENTRIES)


def compare_metadata(
    before: dict, now: dict, *, elastic: bool, new_phase: bool = False, weights_only: bool = False
) -> list[Difference]:
    """The entries in which the metadata of two runs differ, except entries without an effect.

    Args:
        before: the metadata of the checkpoint. Entries that `now` does not have are not compared.
        now: the metadata of the current run.
        elastic: True if the order of the data does not depend on the number of processes and the micro-batch size.
        new_phase: True if a changed mixture is to be appended, so that it is not another run.
        weights_only: True if the optimizer state is not resumed, so that its settings may change.
    """
    free = FREE_SETTINGS | (MIXTURE_SETTINGS if elastic else set())
    rounding = ROUNDING_ENTRIES | (ELASTIC_ENTRIES if elastic else set())

    def consequence(name: str) -> str:
        if name.split(".")[0] in rounding:
            return "resumes, with different rounding"
        if new_phase and name.startswith(MIXTURE_ENTRIES):
            return "new phase"
        if weights_only and name.split(".")[0] in OPTIMIZER_SETTINGS:
            return ONLY_WEIGHTS
        return ANOTHER_RUN

    now = {key: value for key, value in now.items() if key not in DERIVED_ENTRIES}
    before = {key: before.get(key) for key in now}
    if "settings" in now:
        names = {*(before["settings"] or {}), *now["settings"]} - free
        before, now = (_without_locations(metadata, names) for metadata in (before, now))
    if "plan" in now:
        before, now = ({**metadata, "plan": _without_specs(metadata["plan"])} for metadata in (before, now))
    return [Difference(name, old, new, consequence(name)) for name, old, new in _unequal_entries("", before, now)]


def _without_locations(metadata: dict, names: set[str]) -> dict:
    """Metadata reduced to these settings, with local sources named by their contents instead of their paths."""
    settings = {name: (metadata["settings"] or {}).get(name, "default") for name in sorted(names)}
    inputs = without_paths(metadata.get("inputs") or {})
    if isinstance(settings.get("sources"), list):
        names_by_spec = names_without_paths(metadata["inputs"]["sources"])
        settings["sources"] = [names_by_spec.get(spec, spec) for spec in settings["sources"]]
    return metadata | {"settings": settings} | ({"inputs": inputs} if "inputs" in metadata else {})


def _without_specs(plan: object) -> object:
    """A plan without the specs of its sources, which contain paths."""
    if isinstance(plan, dict):
        return {key: _without_specs(value) for key, value in plan.items() if key != "source"}
    return [_without_specs(value) for value in plan] if isinstance(plan, list) else plan


def _unequal_entries(name: str, before: object, now: object) -> Iterator[tuple[str, object, object]]:
    """(name, value before, value now) of unequal entries, descending into dicts and lists of equal length."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = (dict(enumerate(values, 1)) for values in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _unequal_entries(f"{name}.{key}" if name else str(key), before.get(key), now.get(key))
    elif before != now:
        yield name.removeprefix("settings."), before, now


def format_differences(differences: list[Difference]) -> list[str]:
    """The lines of a table, differences that mean another run first."""
    rows = [("", "before", "now", "")]
    for difference in sorted(differences, key=lambda difference: not difference.is_fatal):
        before, now = to_json(difference.before), to_json(difference.now)
        rows.append((difference.name, before, now, difference.consequence))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
