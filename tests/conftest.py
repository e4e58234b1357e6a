"""Settings for every test: quiet TensorFlow, no display, the same examples from hypothesis in every run."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when TensorFlow is first imported
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis

# The first call of a Keras layer traces and compiles, so hypothesis' time limit for one example says nothing here.
hypothesis.settings.register_profile("mobiatt", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("mobiatt")
