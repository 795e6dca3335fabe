"""Mistakes in the note on data distillation, each with its proof."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs.data.landmarks import heat_maps, peaks
from kdrefs.methods.data_distillation import ensemble_over_transforms, transformed, transforms
from reproductions.harness.errata import Erratum, Evidence, draw


def _check_continued() -> Evidence:
    """A classifier of two hidden units, one of which the first training left dead."""
    x = draw(200, 1, seed=0)
    y = (x[:, 0].abs() > 0.7).long()  # needs one unit a side

    def logits(weights: Tensor) -> Tensor:
        hidden = torch.relu(x * weights[:2] + weights[2:4])
        return torch.stack([torch.zeros(len(x), dtype=x.dtype), hidden @ weights[4:6] + weights[6]], 1)

    def trained(start: list[float]) -> float:
        weights = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([weights], 0.05)
        for _ in range(400):
            optimizer.zero_grad()
            loss = F.cross_entropy(logits(weights), y)
            loss.backward()
            optimizer.step()
        return 100 * float((logits(weights).argmax(1) == y).double().mean())

    # The second unit answers to nothing in the data: all its gradients are 0.
    continued = trained([1.0, 0.0, 0.0, -9.0, 1.0, 1.0, -1.0])
    retrained = trained([1.0, -1.0, 0.0, 0.0, 1.0, 1.0, -1.0])
    return Evidence(
        holds=retrained > 97 > continued + 5,
        summary=(
            f"The same data with all their true labels, the same steps: a network that was trained into a corner "
            f"before ends at {continued:.0f} % when it is trained further, one that starts anew at {retrained:.0f} %. "
            "The two are not one procedure; which is better for landmarks is measured in the run."
        ),
        values={"trained further": continued, "trained anew": retrained},
    )


def _check_order() -> Evidence:
    scores = torch.tensor([[0.9, 0.1], [0.45, 0.55], [0.45, 0.55]], dtype=torch.float64)
    averaged = int(scores.mean(0).argmax())
    votes = int(torch.bincount(scores.argmax(1), minlength=2).argmax())
    # Two views of a landmark, each sure of a place of its own, one much less so.
    rows = torch.tensor([[[4.5, 4.5, 0.0]], [[11.5, 4.5, 0.0]]])
    maps = torch.tensor([0.9, 0.3]).view(2, 1, 1, 1) * heat_maps(rows, 1, (9, 16))
    label = peaks(maps.mean(0, keepdim=True), 1)[0, 0, 0]
    mean_of_labels = peaks(maps, 1)[:, 0, 0].mean()
    return Evidence(
        holds=averaged == 0
        and votes == 1
        and abs(float(label) - 4.5) < 0.3 < 3 < abs(float(mean_of_labels) - 4.5),
        summary=(
            f"Three views give the first class 0.9, 0.45 and 0.45: labels that are put together say the second class, "
            f"averaged scores the first. Two views put a landmark at 4.5 (score 0.9) and at 11.5 (0.3): the mean of "
            f"the labels is {float(mean_of_labels):.1f}, where none of them is; the label of the mean is "
            f"{float(label):.1f}."
        ),
        values={"mean of labels": float(mean_of_labels), "label of the mean": float(label)},
    )


def _check_inverse() -> Evidence:
    rows = torch.cat(
        [torch.rand(40, 1, 2, generator=torch.Generator().manual_seed(0)) * 20 + 6, torch.zeros(40, 1, 1)], 2
    )
    images = heat_maps(rows, 1, (32, 32), sigma=1.5)  # a network that finds everything is the identity
    chosen = transforms((0.75, 1.0, 1.25))

    def error(maps: Tensor) -> float:
        return float((peaks(maps, 1)[:, 0, :2] - rows[:, 0, :2]).norm(dim=1).mean())

    right = error(ensemble_over_transforms(lambda copy: copy, images, chosen))
    canvas = torch.zeros(40, 1, 40, 40)
    for one in chosen:
        copy = transformed(images, one)
        canvas[:, :, : copy.shape[2], : copy.shape[3]] += copy / len(chosen)
    wrong = error(canvas)
    return Evidence(
        holds=right < 0.5 < 3 < wrong,
        summary=(
            f"A network that finds every landmark, under three scales and mirrors: its averaged heat maps are off by "
            f"{right:.2f} pixels on average when each is mapped back first, and by {wrong:.1f} when they are not."
        ),
        values={"mapped back": right, "as they are": wrong},
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="D1",
        kind="note",
        where="note, Data Distillation (笔记：然后与原本的标记数据合并再继续训练该模型)",
        printed="The labels are merged with the annotated ones and the training of the model is continued.",
        right=(
            "A student is trained anew on the union, from the weights that the teacher started from, with a fixed "
            "share of each kind in every mini-batch. Training the teacher further is another procedure."
        ),
        check=_check_continued,
    ),
    Erratum(
        id="D2",
        kind="note",
        where="note, Data Distillation (笔记：计算出一个标签后进行聚合)",
        printed="A label is computed for the transformed data and then aggregated.",
        right=(
            "The model's outputs are averaged over the transforms and the label is made of their mean. The other way "
            "round the scores are lost, and places are averaged that exclude each other."
        ),
        check=_check_order,
    ),
    Erratum(
        id="D3",
        kind="note",
        where="note, Data Distillation (笔记：对未标记的数据做数据变换)",
        printed="The predictions of transformed data are aggregated.",
        right=(
            "Only after each was mapped back into the frame of the image: mirrored maps are mirrored back (and left "
            "and right kinds change places), scaled ones are brought to one size."
        ),
        check=_check_inverse,
    ),
)
