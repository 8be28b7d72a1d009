"""How good the predictions are: F1 of each task."""

from __future__ import annotations

import torch
from torch import Tensor


class Confusion:
    """Counts of right and wrong answers of T tasks, added up over batches."""

    def __init__(self, tasks: int) -> None:
        self.counts = torch.zeros(3, tasks, dtype=torch.long)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Logits ``[T, N]``, of which those above 0 (a probability of 0.5) say 1; labels ``[N, T]``."""
        says, true = logits.T > 0, labels > 0.5
        found = torch.stack([(says & true).sum(0), (says & ~true).sum(0), (~says & true).sum(0)])
        self.counts += found.to(self.counts.device)

    def f1(self) -> list[float]:
        """``2 TP / (2 TP + FP + FN)`` of each task; 0 where nothing was, or was called, a 1."""
        true_positives, false_positives, false_negatives = self.counts.double()
        total = 2 * true_positives + false_positives + false_negatives
        return (2 * true_positives / total.clamp_min(1)).tolist()  # type: ignore[no-any-return]
