"""Two linear layers with a GELU between them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from iv2kernels import dispatch
from iv2kernels.dispatch import Impl


def mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, approximate="tanh", impl=None):
    return reference(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate)


def reference(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate):
    """The definition."""
    h = F.gelu(F.linear(x, fc1_weight, fc1_bias), approximate=approximate)
    return F.linear(h, fc2_weight, fc2_bias)
