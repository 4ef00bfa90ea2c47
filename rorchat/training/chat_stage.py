"""Runs a chat stage (SFT, DPO, GRPO) from its arguments to a saved model. The recipes differ only in the parts."""

from collections.abc import Callable

from rorchat.inference.engine import resolve_model_path
from rorchat.model import check_fit, load_checkpoint
from rorchat.persona import load_persona
from rorchat.tokenizer import load_tokenizer
from rorchat.training.data import Split, limit_split
from rorchat.training.result import TrainingResult
from rorchat.training.run_folder import RunFolder
from rorchat.training.sample_prompts import user_messages
from rorchat.training.stage import ChatStageTrainer
from rorchat.training.train_and_save import train
from rorchat.validation_split import EVALUATED_SHARE


def run_chat_stage(
    stage: str,
    arguments,
    load_data: Callable[..., Split],
    trainer_class: Callable[..., ChatStageTrainer],
    *,
    add_control_tokens: bool = False,
) -> TrainingResult:
    """Loads the model and the data, trains, and saves the model.

    Args:
        stage: "sft", "dpo" or "grpo".
        load_data: (arguments, tokenizer, max_length) -> Split; `max_length` is the longest row in tokens.
        add_control_tokens: accept a model that cannot chat yet, and add the ChatML control tokens to it.

    Returns:
        The final metrics, and the folder of the run.
    """
    base = resolve_model_path(arguments.model)
    with RunFolder(arguments, stage, {"start": base}) as run:
        if run.is_finished:
            return TrainingResult(run.finished_metrics(), run.folder)

        persona = load_persona(arguments.persona) if add_control_tokens and arguments.persona else None
        tokenizer = load_tokenizer(base, persona, require_chat=not add_control_tokens)
        model = load_checkpoint(base, tokenizer, arguments.seed)
        check_fit(model, tokenizer, arguments.max_row_length(), "max_length")
        adapter = arguments.create_adapter(model, tokenizer, base)
        split = load_data(arguments, tokenizer, arguments.max_row_length() or model.config.n_positions)
        if arguments.sample_prompts is None:
            arguments.sample_prompts = user_messages(
                split.all_validation(), tokenizer, arguments.sources, model.config.n_positions, arguments.reply_tokens
            )
        reply_tokens = arguments.eval_reply_tokens(model.config.n_positions)
        split, share = limit_split(split, arguments.eval_columns, arguments.max_eval_tokens, reply_tokens)
        context = run.context({"data": split.summary(), EVALUATED_SHARE: share}, adapter)
        trainer = trainer_class(model, arguments, tokenizer, split.train, split.validation, context)
        startup_messages = [*split.row_stats, *trainer.startup_notes(split.row_stats)]
        return TrainingResult(train(run, trainer, startup_messages), run.folder)
