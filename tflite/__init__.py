"""Export to TensorFlow Lite, inspection, verification and benchmark on this machine and on phones."""

import os

# Read once, when TensorFlow is loaded; without it every command starts with ten lines about missing CUDA libraries.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
