"""The straightforward forms: what a careful reader of the papers writes down first, and toolboxes run.

Student first, teacher second, as everywhere here; no gradient flows into the teacher because none is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

EPS = 1e-7  # of the published PKT code


def kd(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0, alpha: float = 0.9
) -> Tensor:
    """Softened KL divergence beside the labels' cross-entropy."""
    log_q = F.log_softmax(student / temperature, dim=1)
    p = F.softmax(teacher / temperature, dim=1)
    soft = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
    return alpha * soft + (1 - alpha) * F.cross_entropy(student, labels)


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square between normalised maps of the mean squared activation."""
    maps = (F.normalize(features.pow(2).mean(1).flatten(1)) for features in (student, teacher))
    return (next(maps) - next(maps)).pow(2).mean()


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(student, teacher)


def nst(student: Tensor, teacher: Tensor, kernel: str = "polynomial") -> Tensor:
    """Maximum mean discrepancy, every pair of channels broadcast over the positions: ``(B, C, C', HW)``."""
    s, t = (F.normalize(features.flatten(2), dim=2) for features in (student, teacher))

    def pairs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.unsqueeze(2), y.unsqueeze(1)

    def products(x: Tensor, y: Tensor) -> Tensor:
        a, b = pairs(x, y)
        return (a * b).sum(-1)

    def distances(x: Tensor, y: Tensor) -> Tensor:
        a, b = pairs(x, y)
        return (a - b).pow(2).sum(-1)

    if kernel == "gaussian":
        width = distances(s, t).mean().detach()

    def mean(x: Tensor, y: Tensor) -> Tensor:
        if kernel == "gaussian":
            return torch.exp(-distances(x, y) / (2 * width)).mean()
        return products(x, y).pow(2 if kernel == "polynomial" else 1).mean()

    return mean(t, t) + mean(s, s) - 2 * mean(s, t)


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Both :math:`N \times N` matrices, and the mean over their entries; N times the published value."""

    def conditionals(x: Tensor) -> Tensor:
        x = x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + EPS)
        kernel = (x @ x.T + 1) / 2
        return kernel / kernel.sum(dim=1, keepdim=True)

    p, q = conditionals(teacher), conditionals(student)
    return (p * torch.log((p + EPS) / (q + EPS))).mean() * len(student)


def darkrank(student: Tensor, teacher: Tensor, list_length: int = 4) -> Tensor:
    """Soft transfer of rankings with every permutation written out."""
    scores = []
    for x in (student, teacher):
        unit = F.normalize(x)
        scores.append(-3 * torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist") ** 3)
    own = torch.eye(len(student), dtype=torch.bool, device=student.device)
    nearest = scores[1].masked_fill(own, -torch.inf).argsort(dim=1, descending=True)[:, :list_length]
    orders = torch.tensor(list(permutations(range(list_length))), device=student.device)
    log_q, log_p = (
        (s - s.flip(2).logcumsumexp(2).flip(2)).sum(2)
        for s in (x.gather(1, nearest)[:, orders] for x in scores)
    )
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def quest(scores: Tensor, teacher: Tensor, words: Tensor, beta: float) -> Tensor:
    """All distances, both softmaxes and the divergence at every position, one word an entry."""
    vectors, scores = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (teacher, scores))
    squares = vectors.pow(2).sum(dim=1, keepdim=True) + words.pow(2).sum(dim=1)
    target = torch.softmax(-beta * (squares - 2 * vectors @ words.T), dim=1)
    return F.kl_div(F.log_softmax(scores, dim=1), target, reduction="batchmean")


def retrieval_map(
    queries: Tensor, database: Tensor, query_labels: Tensor, database_labels: Tensor, block: int = 250
) -> float:
    """Mean average precision from the sorted database of each query."""
    queries, database = F.normalize(queries), F.normalize(database)
    total = 0.0
    for part, labels in zip(queries.split(block), query_labels.split(block), strict=True):
        order = (part @ database.T).argsort(dim=1, descending=True)
        relevant = database_labels[order] == labels.unsqueeze(1)
        ranks = torch.arange(1, len(database) + 1, device=order.device)
        precision = relevant.cumsum(dim=1) / ranks
        total += ((precision * relevant).sum(dim=1) / relevant.sum(dim=1)).sum().item()
    return total / len(queries)


def per_image_loader(
    images: np.ndarray, labels: Tensor, mean: Any, std: Any, *, batch_size: int, augment: bool = True
) -> DataLoader[Any]:
    """Torchvision's transforms one image at a time, in this process."""
    from PIL import Image
    from torchvision import transforms

    moves = [transforms.RandomCrop(images.shape[1], padding=4), transforms.RandomHorizontalFlip()]
    steps = transforms.Compose(
        [*(moves if augment else []), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )

    class Images(Dataset[tuple[Tensor, Tensor]]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return steps(Image.fromarray(images[index])), labels[index]

    return DataLoader(Images(), batch_size=batch_size, shuffle=augment)


def slices(images: Tensor, labels: Tensor, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of float images that lie in memory, channels first."""
    for chosen in order.split(batch_size):
        yield images[chosen], labels[chosen]


def train(
    student: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, teacher: nn.Module | None = None
) -> float:
    """One epoch of cross-entropy, or of distillation where there is a teacher; the loss is read at every step."""
    student.train()
    total = 0.0
    for images, labels in batches:
        logits = student(images).logits
        if teacher is None:
            loss = F.cross_entropy(logits, labels)
        else:
            with torch.no_grad():
                target = teacher(images).logits
            loss = kd(logits, target, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total


def pair_products(u: Tensor, v: Tensor | None, block: int = 512) -> Tensor:
    """The matrix products that a sum over all pairs and its gradient consist of, each pair of rows once.

    ``u u'``, with a second set ``v v'`` too, and the product of what comes of them with ``u`` in both orders.
    """
    n = len(u)
    gradient = torch.zeros_like(u)
    memory = u.new_empty(2, block * n)
    for start in range(0, n, block):
        rows, others = slice(start, start + block), slice(start, n)
        shape = len(u[rows]), n - start
        first, second = (flat[: shape[0] * shape[1]].view(shape) for flat in memory)
        torch.mm(u[rows], u[others].mT, out=first)
        if v is not None:
            torch.mm(v[rows], v[others].mT, out=second)
        gradient[rows].addmm_(first, u[others])
        gradient[others].addmm_(first.mT, u[rows])
    return gradient
