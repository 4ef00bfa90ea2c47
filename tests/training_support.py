"""Trainers for tests, with or without the folder of a run."""

from rorchat.tokens.store import TokenStore
from rorchat.training.context import StageContext
from rorchat.training.pretrain import PretrainArguments, PretrainTrainer, build_mixture, prepare_token_stores


def build_pretrain_trainer(
    model,
    arguments: PretrainArguments,
    tokenizer,
    trainer_class: type = PretrainTrainer,
    context: StageContext | None = None,
    stores: list[TokenStore] | None = None,
) -> PretrainTrainer:
    stores = stores or prepare_token_stores(arguments, tokenizer)
    mixture = build_mixture(arguments, stores)
    return trainer_class(model, arguments, tokenizer, mixture, stores, context or StageContext())
