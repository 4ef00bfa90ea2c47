"""The scaling law of small models, and the choice of a size by it."""

import pytest

from rorchat.model import Shape, count_scaling_parameters
from rorchat.project.sizing import LAW, SHAPES, choose_size, effective_bytes, predict
from rorchat.project.vocabulary import Vocabulary

VOCABULARIES = [Vocabulary(512, 2.0, 2.0), Vocabulary(2048, 3.0, 3.0)]


def test_larger_models_and_more_text_have_a_lower_loss():
    usual = LAW.bits_per_byte(1e6, 1e7, 1e9, 1024)
    assert LAW.bits_per_byte(2e6, 1e7, 1e9, 1024) < usual
    assert LAW.bits_per_byte(1e6, 2e7, 1e9, 1024) < usual
    assert LAW.bits_per_byte(1e6, 1e7, 1e9, 2048) < usual


def test_a_repeated_byte_is_worth_less_than_a_new_one():
    assert effective_bytes(1e6, 1e6) == 1e6 and effective_bytes(5e5, 1e6) == 5e5
    assert 1.9e6 < effective_bytes(2e6, 1e6) < 2e6
    assert effective_bytes(1e9, 1e6) == pytest.approx(16.4e6)


def test_shapes_rise_and_can_be_trained():
    sizes = [count_scaling_parameters(shape, 1024) for shape in SHAPES]
    assert sizes == sorted(sizes)
    assert all(shape.n_embd % shape.n_head == 0 for shape in SHAPES)


def test_the_size_with_the_lowest_predicted_loss_is_chosen():
    def tokens_in_time(shape: Shape, vocabulary: Vocabulary) -> int:
        return int(1e13 / count_scaling_parameters(shape, vocabulary.size))

    chosen = choose_size(VOCABULARIES, 10**8, tokens_in_time)
    every = [predict(s, v, tokens_in_time(s, v), 10**8) for s in SHAPES for v in VOCABULARIES]
    assert chosen.bits_per_byte == min(size.bits_per_byte for size in every)
    longer = choose_size(VOCABULARIES, 10**10, lambda shape, vocabulary: 1000 * tokens_in_time(shape, vocabulary))
    assert longer.parameters > chosen.parameters and longer.bits_per_byte < chosen.bits_per_byte


def test_epochs_count_passes_over_the_text():
    assert predict(SHAPES[0], VOCABULARIES[0], 1000, 500).epochs == 4.0


def test_without_time_the_smallest_model_is_chosen():
    assert choose_size(VOCABULARIES, 1000, lambda *_: 0).shape == SHAPES[0]
