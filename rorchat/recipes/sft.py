"""Teach a model to chat: supervised fine-tuning (SFT) on conversations.

rorchat sft --config demo/sft.yaml
accelerate launch recipes/sft.py --model gpt2 --sources alpaca persona=500 --output_dir runs/gpt2-chat
"""

from rorchat.console import configure_libraries
from rorchat.errors import exits_with_one_line


def main(argv: list[str] | None = None) -> dict[str, float]:
    configure_libraries()  # before they are imported
    from rorchat.training.arguments import parse
    from rorchat.training.chat_stage import run_chat_stage
    from rorchat.training.sft import ChatSFTTrainer, SFTArguments, load_conversations

    return run_chat_stage("sft", parse(SFTArguments, argv), load_conversations, ChatSFTTrainer, add_control_tokens=True)


if __name__ == "__main__":
    exits_with_one_line(main)()
