"""A small project: data on disk, and a machine whose speed is given instead of measured."""

from pathlib import Path

from support import json_lines

from rorchat.device import find_device
from rorchat.persona import load_persona
from rorchat.project.schedule import Scheduler
from rorchat.project.survey import Survey, survey_sources
from rorchat.project.timing import Machine

WORDS = "the cat sat on a mat and looked at her two small dogs while rain fell over green hills near old farm".split()


def write_data(folder: Path) -> dict[str, list[str]]:
    """Documents, conversations and preferences, as the options of `rorchat new` name them."""
    texts = [" ".join(WORDS[(n * step) % len(WORDS)] for step in range(1, 160)) + f". {n}" for n in range(400)]
    (folder / "texts.jsonl").write_text(json_lines(*({"text": text} for text in texts)), encoding="utf-8")
    chats = [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": texts[n][:200]}]}
        for n in range(60)
    ]
    (folder / "chats.jsonl").write_text(json_lines(*chats), encoding="utf-8")
    pairs = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(50)]
    (folder / "pairs.jsonl").write_text(json_lines(*pairs), encoding="utf-8")
    return {
        "documents": [f"text={folder / 'texts.jsonl'}"],
        "conversations": [f"messages={folder / 'chats.jsonl'}"],
        "preferences": [f"preference={folder / 'pairs.jsonl'}"],
    }


def make_survey(given: dict[str, list[str]], from_scratch: bool = True) -> Survey:
    return survey_sources(given, load_persona(), from_scratch=from_scratch)


def make_machine(seconds_per_gflop: float = 0.02, startup_seconds: float = 5.0, block_size: int = 256) -> Machine:
    """A CPU that computes at a constant rate."""
    points = [(flops, flops / 1e9 * seconds_per_gflop) for flops in (1e6, 1e9)]
    return Machine(find_device("cpu"), 1, startup_seconds, block_size, points)


def make_scheduler(given: dict[str, list[str]], hours: float = 0.25, **machine: float) -> Scheduler:
    return Scheduler(make_survey(given), make_machine(**machine), hours)
