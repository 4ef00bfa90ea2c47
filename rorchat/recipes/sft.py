"""Teach a model to chat: supervised fine-tuning (SFT) on conversations.

rorchat sft --config demo/sft.yaml
accelerate launch recipes/sft.py --model gpt2 --sources alpaca persona=500 --output_dir runs/gpt2-chat
"""

from rorchat.errors import exits_with_one_line
from rorchat.inference.engine import resolve_model_path
from rorchat.model import check_fit, load_checkpoint
from rorchat.persona import load_persona
from rorchat.tokenizer import load_tokenizer
from rorchat.training.arguments import parse
from rorchat.training.lora import build_adapter
from rorchat.training.run_folder import Run
from rorchat.training.sft import ChatTrainer, SFTArguments, load_conversations


def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments = parse(SFTArguments, argv)
    base = resolve_model_path(arguments.model)
    run = Run(arguments, "sft", {"start": base})
    if run.finished:
        return run.already_finished()

    tokenizer = load_tokenizer(base, load_persona(arguments.persona) if arguments.persona else None)
    model = load_checkpoint(base, tokenizer, arguments.seed)
    check_fit(model, tokenizer, arguments.max_length, "max_length")
    adapter = build_adapter(model, tokenizer, arguments, base)
    max_length = arguments.max_length or model.config.n_positions
    train, validation, tallies = load_conversations(arguments, tokenizer, max_length)
    trainer = ChatTrainer(model, arguments, tokenizer, train, validation)
    trainer.adapter = adapter
    return run.train(trainer, {"data": [tally.summary() for tally in tallies]}, told=tallies)


if __name__ == "__main__":
    exits_with_one_line(main)()
