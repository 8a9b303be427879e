"""One thread for all tests: the models are so small that a second one costs more than it gives on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch

torch.set_num_threads(1)
