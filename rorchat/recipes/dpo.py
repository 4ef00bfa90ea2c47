"""Train a chat model on preferences: direct preference optimization (DPO).

rorchat dpo --config demo/dpo.yaml
accelerate launch recipes/dpo.py --model runs/gpt2-chat --sources preference=my_pairs.jsonl --output_dir runs/gpt2-dpo
"""

from rorchat.errors import exits_with_one_line
from rorchat.inference.engine import resolve_model_path
from rorchat.model import check_fit, load_checkpoint
from rorchat.tokenizer import load_tokenizer
from rorchat.training.arguments import parse
from rorchat.training.dpo import DPOArguments, PreferenceTrainer, load_preferences
from rorchat.training.lora import build_adapter
from rorchat.training.run_folder import Run


def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments = parse(DPOArguments, argv)
    base = resolve_model_path(arguments.model)
    run = Run(arguments, "dpo", {"start": base})
    if run.finished:
        return run.already_finished()

    tokenizer = load_tokenizer(base, require_chat=True)
    model = load_checkpoint(base, tokenizer, arguments.seed)
    check_fit(model, tokenizer, arguments.max_length, "max_length")
    adapter = build_adapter(model, tokenizer, arguments, base)
    max_length = arguments.max_length or model.config.n_positions
    train, validation, tallies = load_preferences(arguments, tokenizer, max_length)
    trainer = PreferenceTrainer(model, arguments, tokenizer, train, validation)
    trainer.adapter = adapter
    return run.train(trainer, {"data": [tally.summary() for tally in tallies]}, told=tallies)


if __name__ == "__main__":
    exits_with_one_line(main)()
