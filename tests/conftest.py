"""Hypothesis profiles: quick for every run, thorough for thousands of cases."""

import os

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
