"""One thread per test process: the models are tiny, and two processes share two cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402  # the variable must be set before

torch.set_num_threads(1)
