"""The words of a caption, found in the embeddings that a video becomes for a language model.

Next-token prediction through a small language model does not begin: which embedding says what, and
whether the model looks there, must be found at once. Here each word of a caption has to be like one
of the embeddings, which are thereby words that the model reads already.

As in classification by words (Huang et al., SuperClass, 2024, arXiv:2411.03313), words weigh by how
few captions have them; the candidates are those of the batch, as in a contrastive loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def words_loss(
    embeddings: Tensor,  # [B, Q, C]
    table: Tensor,  # [V, C]
    captions: Sequence[Sequence[int]],  # B
) -> Tensor:
    r"""Cross-entropy of the words of captions among those of all captions of the batch.

    .. math:: L = -\frac{1}{B} \sum_b \sum_w t_{bw} \log \mathrm{softmax}_w
        \Big( \log \sum_q \exp(e_{bq} \cdot E_w) \Big), \quad
        t_{bw} \propto \log(B / n_w) \text{ for the words } w \text{ of caption } b

    with :math:`n_w` the number of captions that have the word, over all ranks' batches.

    Args:
        embeddings: Those of each video.
        table: The language model's embeddings of its tokens.
        captions: Token numbers of each caption; how often a word comes does not matter.

    Returns:
        The mean over the captions; one of which all words are in all captions counts as zero.

    Raises:
        ValueError: There are not as many captions as videos.
    """
    if len(captions) != len(embeddings):
        raise ValueError(
            f"words_loss: captions must be one a video, {len(embeddings)}, got {len(captions)}"
        )
    has = torch.zeros(len(captions), len(table), dtype=torch.bool)
    for row, words in zip(has, captions, strict=True):
        row[list(words)] = True
    has = has.to(embeddings.device)
    counts = torch.cat([has.sum(0), torch.tensor([len(has)], device=has.device)])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
    candidates = counts[:-1].nonzero()[:, 0]
    weights = torch.log(counts[-1] / counts[candidates])
    targets = has[:, candidates] * weights
    told = targets.sum(1) > 0
    targets = targets[told] / targets[told].sum(1, keepdim=True)
    scores = (embeddings[told] @ table[candidates].T.to(embeddings.dtype)).float().logsumexp(1)
    return -(targets * scores.log_softmax(-1)).sum() / len(has)
