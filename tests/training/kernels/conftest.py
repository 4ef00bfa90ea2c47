import pytest
from kernel_support import build_stock_model
from transformers import GPT2LMHeadModel


@pytest.fixture(scope="module")
def stock() -> GPT2LMHeadModel:
    return build_stock_model()
