"""Pretrain a stock GPT-2 on documents.

rorchat pretrain --config demo/pretrain.yaml
rorchat pretrain --accelerate_config ddp --num_processes 8 --config my.yaml --learning_rate 1e-3
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
    from rorchat.inference.engine import resolve_model_path
    from rorchat.model import build_model, check_fit, load_checkpoint, zero_output_projections
    from rorchat.persona import load_persona
    from rorchat.tokenizer import load_tokenizer
    from rorchat.training.arguments import parse
    from rorchat.training.pretrain import (
        PretrainArguments,
        PretrainTrainer,
        build_mixture,
        describe_mixture,
        prepare_token_stores,
        show_plan,
    )
    from rorchat.training.result import TrainingResult
    from rorchat.training.run_folder import RunFolder
    from rorchat.training.sample_prompts import first_words
    from rorchat.training.train_and_save import train as run_training

    arguments = parse(PretrainArguments, argv, settings)
    base = resolve_model_path(arguments.model) if arguments.model else None
    with RunFolder(arguments, "pretrain", {"start": base or arguments.tokenizer}) as run:
        if run.is_finished:
            return TrainingResult(run.finished_metrics(), run.folder)

        persona = load_persona(arguments.persona) if arguments.persona else None
        tokenizer = load_tokenizer(base or arguments.tokenizer, persona)
        if base:
            model = load_checkpoint(base, tokenizer, arguments.seed)
        else:
            model = build_model(arguments.size, tokenizer, arguments.block_size, arguments.seed)
            if arguments.optimizer == "muon":
                zero_output_projections(model)
        check_fit(model, tokenizer, arguments.block_size)

        history = run.mixture_history
        stores = prepare_token_stores(arguments, tokenizer, history)
        if arguments.sample_prompts is None:
            arguments.sample_prompts = first_words(stores, tokenizer)
        mixture = build_mixture(arguments, stores, history)
        context = run.context(describe_mixture(mixture.plan, stores, history, arguments.max_eval_tokens))
        trainer = PretrainTrainer(model, arguments, tokenizer, mixture, stores, context)
        metrics = run_training(run, trainer, startup_messages=show_plan(mixture.plan, run.folder))
        return TrainingResult(metrics, run.folder)


if __name__ == "__main__":
    follow(find_waiting_parent())  # first: the end of a launcher is noticed from here on
    main()
