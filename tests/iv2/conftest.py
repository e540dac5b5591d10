"""What several tests of the models need."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def one_thread(_steady: None) -> None:
    """For files in which nothing is large: `pytest.mark.usefixtures("one_thread")`."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the vocabulary of the tiny models."""
    from tiny_stage2 import write_vocabulary

    return write_vocabulary(tmp_path_factory.mktemp("words"))
