"""The same random weights in every run: bounds on errors are tight here."""

import keras
import pytest


@pytest.fixture(autouse=True)
def seeded() -> None:
    keras.utils.set_random_seed(0)
