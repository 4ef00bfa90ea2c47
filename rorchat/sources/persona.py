"""Who the model is: conversations about the persona of a YAML file, with variety and without an API."""

from collections.abc import Iterator

from rorchat.persona import Persona, conversations, load_persona

KIND = "conversation"
LICENCE = "Apache-2.0"


def generate(kind: str, amount: int, seed: int, persona: Persona | None) -> Iterator[dict]:
    """`amount` conversations about the persona (None: about RorChat)."""
    for messages in conversations(persona or load_persona(), amount, seed):
        yield {"messages": messages}
