"""Pretrain a stock GPT-2 on documents.

rorchat pretrain --config demo/pretrain.yaml
accelerate launch --num_processes 8 recipes/pretrain.py --config my.yaml --learning_rate 1e-3
"""

from rorchat.errors import exits_with_one_line
from rorchat.inference.engine import resolve_model_path
from rorchat.model import build_model, check_fit, load_checkpoint, zero_output_projections
from rorchat.persona import load_persona
from rorchat.tokenizer import load_tokenizer
from rorchat.training.arguments import parse
from rorchat.training.pretrain import PretrainArguments, PretrainTrainer, details_of, show_plan, stores_of
from rorchat.training.run_folder import Run


def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments = parse(PretrainArguments, argv)
    base = resolve_model_path(arguments.model) if arguments.model else None
    source = base or arguments.tokenizer
    run = Run(arguments, "pretrain", {"start": source})
    if run.finished:
        return run.already_finished()

    tokenizer = load_tokenizer(source, load_persona(arguments.persona) if arguments.persona else None)
    if base:
        model = load_checkpoint(base, tokenizer, arguments.seed)
    else:
        model = build_model(arguments.size, tokenizer, arguments.block_size, arguments.seed)
        if arguments.optimizer == "muon":
            zero_output_projections(model)
    check_fit(model, tokenizer, arguments.block_size)
    stores = stores_of(arguments, tokenizer, run.past)
    trainer = PretrainTrainer(model, arguments, tokenizer, stores, run.past)
    plan = trainer.mixture.plan
    return run.train(trainer, details_of(plan, stores, run.past), told=show_plan(plan, run.folder))


if __name__ == "__main__":
    exits_with_one_line(main)()
