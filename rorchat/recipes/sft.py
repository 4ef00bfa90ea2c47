"""Teach a model to chat: supervised fine-tuning (SFT) on conversations.

rorchat sft --config demo/sft.yaml
accelerate launch --quiet recipes/sft.py --model gpt2 --sources alpaca persona=500 --output_dir runs/gpt2-chat
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
    from rorchat.training.sft import ChatSFTTrainer, SFTArguments, load_conversations

    arguments = parse(SFTArguments, argv, settings)
    return run_chat_stage("sft", arguments, load_conversations, ChatSFTTrainer, add_control_tokens=True)


if __name__ == "__main__":
    follow(find_waiting_parent())  # first: the end of a launcher is noticed from here on
    main()
