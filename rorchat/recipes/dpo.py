"""Train a chat model on preferences: direct preference optimization (DPO).

rorchat dpo --config demo/dpo.yaml
accelerate launch --quiet recipes/dpo.py --model runs/gpt2-chat --sources preference=pairs.jsonl \\
    --output_dir runs/gpt2-dpo
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rorchat.console import configure_libraries
from rorchat.errors import exits_with_one_line
from rorchat.training.launcher import find_waiting_parent, follow

if TYPE_CHECKING:
    from rorchat.training.result import TrainingResult


@exits_with_one_line
def main(argv: list[str] | None = None) -> dict[str, float]:
    configure_libraries()  # before they are imported
    return train(argv).metrics


def train(argv: Sequence[str] | None = None, settings: Mapping[str, object] | None = None) -> "TrainingResult":
    """Trains with the settings of the command line and of Python, see `rorchat.training.arguments.parse`."""
    from rorchat.training.arguments import parse
    from rorchat.training.chat_stage import run_chat_stage
    from rorchat.training.dpo import ChatDPOTrainer, DPOArguments, load_preferences

    arguments = parse(DPOArguments, argv, settings)
    return run_chat_stage("dpo", arguments, load_preferences, ChatDPOTrainer)


if __name__ == "__main__":
    follow(find_waiting_parent())  # first: the end of a launcher is noticed from here on
    main()
