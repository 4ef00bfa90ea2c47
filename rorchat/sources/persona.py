"""Persona: conversations and preferences about the model itself, generated from a persona file without an API."""

from collections.abc import Iterator

from rorchat.persona import Persona, generate_conversations, generate_preferences, load_persona
from rorchat.rows import message

KIND = ("conversation", "preference")
LICENCE = "Apache-2.0"
SIZE = "any amount, generated"
ABOUT_PERSONA = True


def generate(kind: str, amount: int, seed: int, persona: Persona | None) -> Iterator[dict]:
    """`amount` conversations or preferences about the persona; None for the default one, RorChat."""
    persona = persona or load_persona()
    if kind == "conversation":
        for messages in generate_conversations(persona, amount, seed):
            yield {"messages": messages}
        return
    for question, better, worse in generate_preferences(persona, amount, seed):
        yield {
            "prompt": [message("user", question)],
            "chosen": [message("assistant", better)],
            "rejected": [message("assistant", worse)],
        }
