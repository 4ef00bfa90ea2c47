"""Train a chat model on rewards: group relative policy optimization (GRPO) on questions with known answers.

rorchat grpo --config demo/grpo.yaml
accelerate launch recipes/grpo.py --model runs/gpt2-chat --sources gsm8k --output_dir runs/gpt2-grpo
"""

from rorchat.errors import exits_with_one_line
from rorchat.inference.engine import resolve_model_path
from rorchat.model import check_fit, load_checkpoint
from rorchat.tokenizer import load_tokenizer
from rorchat.training.arguments import parse
from rorchat.training.grpo import GRPOArguments, PolicyTrainer, load_questions, reply_length
from rorchat.training.run_folder import Run


def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments = parse(GRPOArguments, argv)
    base = resolve_model_path(arguments.model)
    run = Run(arguments, "grpo", {"start": base})
    if run.finished:
        return run.already_finished()

    tokenizer = load_tokenizer(base, require_chat=True)
    model = load_checkpoint(base, tokenizer, arguments.seed)
    check_fit(model, tokenizer)
    arguments.max_completion_length = reply_length(arguments, model.config.n_positions)
    train, validation, tallies = load_questions(arguments, tokenizer, model.config.n_positions)
    trainer = PolicyTrainer(model, arguments, tokenizer, train, validation)
    return run.train(trainer, {"data": [tally.summary() for tally in tallies]}, told=tallies)


if __name__ == "__main__":
    exits_with_one_line(main)()
