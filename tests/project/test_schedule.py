"""How the time is divided between the stages."""

from dataclasses import replace

import pytest
from project_support import make_machine, make_scheduler, make_survey, write_data

from rorchat.project.schedule import MIN_BATCH_TOKENS, Base, Scheduler, choose_batch_tokens, relative_cost
from rorchat.project.sizing import SHAPES
from rorchat.project.vocabulary import Vocabulary

SHAPE, VOCABULARY = SHAPES[2], Vocabulary(1024, 2.5, 2.5)


@pytest.fixture
def given(tmp_path):
    return write_data(tmp_path)


@pytest.mark.parametrize("hours", [0.1, 0.2])
def test_the_stages_take_the_time_that_was_asked_for(given, hours):
    """As long as there is enough text; the machine is so slow that there is."""
    scheduler = make_scheduler(given, hours, seconds_per_gflop=0.2)
    schedule = scheduler.schedule(SHAPE, VOCABULARY)
    assert schedule.total_seconds == pytest.approx(hours * 3600, rel=0.01)
    assert list(schedule.tokens) == ["pretrain", "midtrain", "sft", "dpo"]
    assert list(schedule.seconds) == [
        "tokenizer", "pretrain", "midtrain", "sft", "dpo", "evaluate", "gate", "report"
    ]  # fmt: skip


def test_the_training_time_follows_from_the_speed(given):
    scheduler = make_scheduler(given, 0.5, seconds_per_gflop=0.4)
    schedule = scheduler.schedule(SHAPE, VOCABULARY)
    slower = replace(scheduler, machine=make_machine(0.8)).schedule(SHAPE, VOCABULARY)
    assert slower.tokens["pretrain"] == pytest.approx(schedule.tokens["pretrain"] / 2, rel=0.3)
    measured = replace(scheduler, measured={(SHAPE, 1024): 2 * scheduler.seconds_per_token(SHAPE, VOCABULARY)})
    assert measured.schedule(SHAPE, VOCABULARY).tokens == slower.tokens
    assert measured.seconds_per_token(SHAPES[3], VOCABULARY) == scheduler.seconds_per_token(SHAPES[3], VOCABULARY)


def test_conversations_are_not_repeated_more_than_is_useful(given):
    short, long = (make_scheduler(given, hours).schedule(SHAPE, VOCABULARY) for hours in (1.0, 10.0))
    assert short.tokens["sft"] == long.tokens["sft"] and short.tokens["dpo"] == long.tokens["dpo"]
    assert long.size.epochs == pytest.approx(3.8, rel=0.01) and long.total_seconds < 36_000


def test_few_chats_are_not_repeated_in_midtraining_and_the_rest_is_documents(given):
    scheduler = make_scheduler(given, 1.0)
    schedule = scheduler.schedule(SHAPE, VOCABULARY)
    tokens = schedule.tokens["midtrain"]
    weights = scheduler.midtrain_weights(tokens, VOCABULARY)
    assert sum(weights.values()) == pytest.approx(100) and weights["documents"] >= 30
    for group in ("conversations", "persona"):
        passes = weights[group] / 100 * tokens / scheduler.count_tokens(group, VOCABULARY)
        assert passes <= 3.801
    assert scheduler.midtrain_weights(1000, VOCABULARY) == {"documents": 30, "conversations": 60, "persona": 10}
    assert scheduler.midtrain_weights(2 * tokens, VOCABULARY)["conversations"] == pytest.approx(30, rel=0.01)


def test_time_that_a_stage_cannot_use_goes_to_the_others(tmp_path):
    """Few documents and the many conversations of Tinytown: pretraining ends early, the time is kept all the same."""
    scheduler = make_scheduler({"documents": write_data(tmp_path)["documents"]}, 0.3, seconds_per_gflop=0.05)
    schedule = scheduler.schedule(SHAPE, VOCABULARY)
    assert schedule.size.epochs == pytest.approx(3.8, rel=0.01)
    assert schedule.total_seconds == pytest.approx(0.3 * 3600, rel=0.01)
    training = {stage: schedule.seconds[stage] for stage in ("midtrain", "sft")}
    assert training["midtrain"] == pytest.approx(training["sft"], rel=0.01)


def test_a_short_time_still_trains_every_stage(given):
    tokens = make_scheduler(given, 0.01).schedule(SHAPE, VOCABULARY).tokens
    assert min(tokens.values()) >= 10 * MIN_BATCH_TOKENS


def test_stages_depend_on_the_data(given):
    def stages(**options):
        return Scheduler(make_survey(options), make_machine(), 0.5).stages

    assert stages(documents=given["documents"]) == ["pretrain", "midtrain", "sft"]
    assert stages(conversations=given["conversations"]) == ["pretrain", "midtrain", "sft"]
    assert stages(documents=given["documents"], preferences=given["preferences"]) == [
        "pretrain",
        "midtrain",
        "sft",
        "dpo",
    ]


def test_a_base_model_needs_no_tokenizer_and_no_pretraining(given):
    base = Base("gpt2", SHAPES[9], Vocabulary(50_304, 4.4, 4.4), 1024)
    survey = make_survey(given, from_scratch=False)
    scheduler = Scheduler(survey, make_machine(), 1.0, base)
    assert base.is_large and scheduler.stages == ["midtrain", "sft", "dpo"]
    schedule = scheduler.schedule(base.shape, base.vocabulary)
    assert "tokenizer" not in schedule.seconds and schedule.total_seconds <= 1.01 * 3600


def test_batches_grow_with_the_run():
    assert choose_batch_tokens(100_000, 256) == 2048
    assert choose_batch_tokens(9_000_000, 256) == 8192
    assert choose_batch_tokens(10**11, 1024) == 524_288
    for tokens in (10**6, 10**7, 10**8):
        assert tokens / choose_batch_tokens(tokens, 256) >= 488


def test_the_head_of_a_chat_stage_costs_less_with_fewer_labels():
    assert relative_cost("pretrain", SHAPE, 8192) == 1.1
    assert relative_cost("sft", SHAPE, 8192) < relative_cost("sft", SHAPE, 512) < 1.15
