"""What holds for every test process."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # there is a process for each core
