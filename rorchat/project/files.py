"""Writes a project's folder: a YAML file per stage with the reasons in comments, run.sh, persona.yaml, plan.json."""

import getpass
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rorchat.errors import UsageError
from rorchat.files import to_json
from rorchat.persona import DEFAULT_PERSONA
from rorchat.plan.scaling import format_size
from rorchat.plan.show import format_duration
from rorchat.project.settings import ProjectSettings, StageSettings
from rorchat.project_folder import PLAN, RUNS, SCRIPT

WIDTH = 110
COMMANDS = {"tokenizer": "train-tokenizer", "midtrain": "pretrain"}  # {stage: its command}, where they differ


@dataclass(frozen=True)
class ProjectFiles:
    """The files of a project, for a folder that `write` creates."""

    folder: Path
    settings: ProjectSettings
    persona: Path | None

    def write(self) -> None:
        """Creates the folder with all files."""
        require_new(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.persona:
            shutil.copy(self.persona, self.folder / "persona.yaml")
        else:
            (self.folder / "persona.yaml").write_text(default_persona(self.folder), encoding="utf-8")
        for name, stage in self.settings.stages().items():
            (self.folder / f"{name}.yaml").write_text(format_yaml(stage), encoding="utf-8")
        (self.folder / SCRIPT).write_text(self._script(), encoding="utf-8")
        (self.folder / SCRIPT).chmod(0o755)
        (self.folder / PLAN).write_text(to_json(self._plan(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def commands(self) -> dict[str, str]:
        """{stage: its command in run.sh}, in order."""
        stages = self.settings.scheduler.stages
        commands = {name: f"rorchat {COMMANDS.get(name, name)} --config {name}.yaml" for name in self.settings.stages()}
        last = f"{RUNS}/{stages[-1]}"
        compared = f"{RUNS}/pretrain {last}" if "pretrain" in stages else last
        commands["evaluate"] = f"rorchat evaluate {compared} --out {RUNS}/scores.json"
        before = f" --before {RUNS}/sft" if stages[-1] != "sft" else ""
        commands["gate"] = f"rorchat gate {last}{before} --persona persona.yaml --out {RUNS}/behaviour.json"
        commands["report"] = f"rorchat report {RUNS}"
        return commands

    def _script(self) -> str:
        minutes = format_duration(self.settings.schedule.total_seconds / 3600)
        lines = [
            "#!/usr/bin/env bash",
            f"# {self.folder.name}: a chat model from your own data, planned for {minutes}.",
            "#",
            f"#   rorchat run {self.folder.name}",
            "#",
            "# runs these commands and shows how much time is left; run it again to resume after a stop.",
            "set -euo pipefail",
            'cd "$(dirname "$0")"',
            "",
            *self.commands().values(),
        ]
        return "\n".join(lines) + "\n"

    def _plan(self) -> dict[str, Any]:
        schedule, scheduler = self.settings.schedule, self.settings.scheduler
        return {
            "hours": scheduler.hours,
            "device": scheduler.machine.device.name,
            "gpus": scheduler.machine.gpus,
            "startup_seconds": scheduler.machine.startup_seconds,
            "base": scheduler.base.name if scheduler.base else None,
            "size": format_size(schedule.size.shape),
            "vocabulary": schedule.size.vocabulary.size,
            "predicted_bits_per_byte": schedule.size.bits_per_byte if not scheduler.base else None,
            "sources": [source.summary() for source in scheduler.survey.sources],
            "stages": [
                {"name": name, "command": command, "seconds": round(schedule.seconds.get(name, 0.0), 1)}
                for name, command in self.commands().items()
            ],
        }


def require_new(folder: Path) -> None:
    """Raises UsageError if the folder exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} already exists and is not an empty folder: give another folder.")


def format_yaml(stage: StageSettings) -> str:
    """A settings file: wrapped comments, then one setting per line."""
    comments = [line for text in stage.comments for line in textwrap.wrap(text, WIDTH, break_on_hyphens=False)]
    settings = yaml.safe_dump(stage.values, sort_keys=False, allow_unicode=True, width=WIDTH, default_flow_style=None)
    return "".join(f"# {line}\n" for line in comments) + settings


def choose_names(folder: Path) -> tuple[str, str]:
    """The names of the model and of its maker, from those of the project and of the user."""
    return folder.resolve().name.replace("-", " ").replace("_", " ").title(), getpass.getuser().title()


def default_persona(folder: Path) -> str:
    """A persona file with the name of the project, for the user to edit."""
    name, maker = choose_names(folder)
    return (
        "# Who the model is. Edit these lines before you run the project. Its `facts`, `unknowns`, `manner` and\n"
        f"# `system` message can be added, as in {DEFAULT_PERSONA}.\n"
        + yaml.safe_dump({"name": name, "maker": maker}, sort_keys=False, allow_unicode=True)
    )
