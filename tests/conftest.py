"""Hypothesis profiles, quick for every run and thorough for thousands of cases; and one thread.

The tensors of the tests are small. A second thread does not shorten their work, and on a busy machine
the threads wait for each other: with one thread such a run takes a seventh of the time. The processes
that tests start inherit the setting. OMP_NUM_THREADS in the environment overrides it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import torch
from hypothesis import HealthCheck, Phase, settings

_slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("quick", max_examples=60, deadline=None, suppress_health_check=_slow)
settings.register_profile("thorough", max_examples=4000, deadline=None, suppress_health_check=_slow)
# For breaking the code by hand: report the first failure, do not shrink it.
settings.register_profile(
    "mutation", max_examples=120, deadline=None, suppress_health_check=_slow, phases=[Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# cuDNN takes TF32 by default where matmul does not.
torch.backends.cudnn.allow_tf32 = False
