"""One thread per test process: the models are tiny, and two processes share two cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"  # as the command line has it before libraries are imported

import torch  # noqa: E402  # the variable must be set before

torch.set_num_threads(1)
