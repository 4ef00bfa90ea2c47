"""The help of a recipe: its own settings in groups, one line each, then the most used ones of Transformers."""

from dataclasses import MISSING, Field, fields, is_dataclass

#: Settings of Transformers that `--help` shows even if a stage keeps their defaults; `--help_all` shows every one.
COMMON_SETTINGS = (
    "output_dir", "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "warmup_steps", "weight_decay", "lr_scheduler_type",
    "logging_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "report_to",
    "seed", "bf16", "fp16",
)  # fmt: skip


def format_help(arguments_type: type, command: str) -> str:
    """The text of `--help`.

    Args:
        arguments_type: the dataclass of a stage's settings.
        command: what the user typed, such as `rorchat sft`.
    """
    lines = [
        f"usage: {command} [--config FILE.yaml] [--SETTING VALUE ...]",
        "",
        "Settings come from the defaults, then from the YAML file, then from the command line.",
        "  --config FILE  a YAML file, or one of a story in the package, such as demo/sft.yaml (rorchat recipes list)",
    ]
    groups = _groups(arguments_type)
    width = 2 + max(len(_name_and_type(entry)) for _, entries in groups for entry in entries)
    for title, entries in groups:
        lines += ["", f"{title}:"]
        lines += [f"  {_name_and_type(entry):{width}}{_explain(entry, arguments_type)}".rstrip() for entry in entries]
    lines += [
        "",
        "All settings, with those of Transformers and TRL: --help_all",
        "Several processes: --num_processes 8, or --accelerate_config FILE (or cpu, ddp, fsdp, multi_node).",
    ]
    return "\n".join(lines) + "\n"


def _groups(arguments_type: type) -> list[tuple[str, list[Field]]]:
    """(title, settings) of every dataclass of this package that a stage is composed of, then Transformers'."""
    classes = [base for base in arguments_type.__mro__ if is_dataclass(base)]
    ours = [base for base in classes if base.__module__.startswith("rorchat.") or base is arguments_type]
    foreign = {entry.name for base in classes if base not in ours for entry in fields(base)}
    common = [name for name in COMMON_SETTINGS if name in foreign]
    entries = {entry.name: entry for entry in fields(arguments_type) if entry.init}
    groups = []
    for base in ours:
        names = [name for name in vars(base).get("__annotations__", {}) if name in entries and name not in common]
        # a setting of Transformers is ours if we explain it
        names = [name for name in names if name not in foreign or _help_of(base, name)]
        if names:
            groups.append((_title(base, arguments_type), [entries[name] for name in names]))
    if common:
        groups.append(("Common settings of Transformers and TRL", [entries[name] for name in common]))
    return groups


def _title(base: type, arguments_type: type) -> str:
    if base is arguments_type:
        return "Settings of this stage"
    return (base.__doc__ or base.__name__).splitlines()[0].rstrip(".")


def _name_and_type(entry: Field) -> str:
    known = [("list", "LIST"), ("bool", "BOOL"), ("int", "INT"), ("float", "FLOAT"), ("str", "STR"), ("dict", "JSON")]
    kind = entry.type.__name__ if isinstance(entry.type, type) else str(entry.type)
    return f"--{entry.name} {next((label for name, label in known if name in kind), 'VALUE')}"


def _explain(entry: Field, arguments_type: type) -> str:
    """What a setting does (the first sentence of what Transformers or TRL say) and its default."""
    text = ""
    for base in arguments_type.__mro__:
        if not text and entry.name in vars(base).get("__annotations__", {}):
            text = _help_of(base, entry.name)
            if text and not base.__module__.startswith("rorchat."):
                text = text.split(". ")[0].rstrip(".") + "."
    default = getattr(entry.default, "value", entry.default)  # enums of Transformers
    return text if default in (None, "", False) or default is MISSING else f"{text} [{default}]".lstrip()


def _help_of(base: type, name: str) -> str:
    """The help in a dataclass's own definition of a setting, on one line."""
    (entry,) = (entry for entry in fields(base) if entry.name == name)
    return " ".join(entry.metadata.get("help", "").split())
