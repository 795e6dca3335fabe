"""The table of all losses, and what their tests do alike.

A new loss is a line in ``LOSSES``; ``tests/test_transforms.py`` and ``tests/fuzz/`` take it from there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdrefs import divergences
from kdrefs.methods import (
    ab,
    afd,
    at,
    cqd,
    darkrank,
    end2,
    fitnets,
    ft,
    internal_representations,
    jacobian_matching,
    kd,
    ksanc,
    logit_regression,
    noisy_kd,
    nst,
    pkt,
    quest,
    structured_kd,
)

# Sizes, and inputs by the names of theirs: samples of classes, vectors of two widths, maps of two channel numbers
# and sizes. An argument that is no tensor of numbers from a normal distribution has its own entry below.
SIZES = {
    "batch": 8, "classes": 10, "judgements": 11, "members": 5, "width": 5, "channels": 6, "height": 4, "columns": 4,
    "teacher width": 9, "teacher height": 6, "teacher columns": 6, "directions": 2, "colours": 3, "landmarks": 3,
    "heads": 2, "length": 4,
}  # fmt: skip
SHAPES = {
    "logits": ("batch", "classes"), "log-probabilities": ("batch", "classes"),
    "rows": ("batch", "width"), "wide": ("batch", "teacher width"),
    "maps": ("batch", "channels", "height", "columns"),
    "wide maps": ("batch", "teacher width", "teacher height", "teacher columns"),
    "jacobians": ("batch", "directions", "colours", "height", "columns"), "words": ("channels", "teacher width"),
    "answers": ("batch",), "judged": ("batch", "judgements"), "members": ("batch", "members", "classes"),
    "attention": ("batch", "heads", "length", "length"), "scores": ("batch", "heads", "length", "length"),
    "labels": ("batch",), "landmarks": ("landmarks",), "mask": ("batch", "length"),
}  # fmt: skip
INTEGERS = {
    "labels": torch.arange(8) % 3,
    "landmarks": torch.tensor([5, 1, 6]),
    "mask": torch.arange(32).view(8, 4) % 5,
}
VALUES = {
    "log-probabilities": lambda x: x.log_softmax(-1),
    "attention": lambda x: x.softmax(-1),
}

# The loss, its tensors (the student's first), its options.
LOSSES = [
    (divergences.kl_divergence, ("log-probabilities", "log-probabilities"), {}),
    (divergences.jeffreys_divergence, ("log-probabilities", "log-probabilities"), {}),
    (divergences.quadratic_divergence, ("log-probabilities", "log-probabilities"), {}),
    (divergences.softened_kl, ("logits", "logits"), {"temperature": 4.0}),
    (divergences.softened_cross_entropy, ("logits", "logits"), {"temperature": 4.0}),
    (kd.kd_loss, ("logits", "logits"), {}),
    (kd.kd_loss, ("logits", "logits", "labels"), {}),
    (fitnets.hint_loss, ("maps", "maps"), {}),
    (logit_regression.logit_regression_loss, ("logits", "logits"), {}),
    (cqd.cqd_loss, ("logits", "logits", "labels"), {}),
    (noisy_kd.soft_randomization_loss, ("logits", "logits", "labels"), {}),
    (end2.end_loss, ("logits", "members"), {}),
    (end2.end2_loss, ("logits", "members"), {"temperature": 2.5}),
    (ab.ab_loss, ("maps", "maps"), {}),
    (ft.paraphraser_loss, ("maps", "maps"), {}),
    (ft.factor_loss, ("maps", "maps"), {}),
    (internal_representations.attention_kl, ("attention", "attention"), {}),
    (internal_representations.attention_kl, ("scores", "scores", "mask"), {"scores": True}),
    (internal_representations.attention_kl, ("scores", "scores"), {"scores": True, "variant": "textbrewer"}),
    (internal_representations.cls_cosine_loss, ("rows", "rows"), {}),
    (afd.discriminator_loss, ("answers", "answers"), {}),
    (afd.adversarial_loss, ("answers",), {}),
    (afd.mutual_logit_loss, ("logits", "logits", "labels"), {}),
    (afd.mutual_logit_loss, ("logits", "logits", "labels"), {"temperature": 1.0, "weight": 0.3}),
    (at.at_loss, ("maps", "wide maps"), {}),
    (at.at_loss, ("maps", "wide maps"), {"power": 1.0}),
    (at.at_loss, ("maps", "wide maps"), {"power": 4.0, "reduction": "max"}),
    (at.at_loss, ("maps", "wide maps"), {"variant": "official"}),
    (at.gradient_at_loss, ("maps", "maps"), {}),
    (darkrank.soft_darkrank_loss, ("rows", "wide"), {}),
    (darkrank.soft_darkrank_loss, ("rows", "wide"), {"variant": "official"}),
    (darkrank.hard_darkrank_loss, ("rows", "wide"), {}),
    (darkrank.hard_darkrank_loss, ("rows", "wide"), {"variant": "official"}),
    (darkrank.hard_darkrank_loss, ("rows", "wide"), {"variant": "rkd"}),
    (jacobian_matching.jacobian_loss, ("jacobians", "jacobians"), {}),
    (jacobian_matching.jacobian_loss, ("jacobians", "jacobians"), {"normalize": True}),
    (jacobian_matching.jacobian_loss, ("jacobians", "jacobians"), {"squared": False}),
    (ksanc.ksanc_loss, ("logits", "logits"), {}),
    (ksanc.ksanc_loss, ("logits", "logits", "judged", "labels", "rows", "rows"), {"adversarial": 0.5}),
    (ksanc.logit_adversarial_loss, ("judged", "labels"), {}),
    (ksanc.logit_discriminator_loss, ("judged", "judged", "labels"), {"mu": 0.1}),
    (nst.nst_loss, ("maps", "wide maps"), {"kernel": "linear"}),
    (nst.nst_loss, ("maps", "wide maps"), {}),
    (nst.nst_loss, ("maps", "wide maps"), {"degree": 3, "offset": 0.5}),
    (nst.nst_loss, ("maps", "wide maps"), {"kernel": "gaussian"}),
    (pkt.pkt_loss, ("rows", "wide"), {}),
    (pkt.pkt_loss, ("rows", "wide"), {"kernel": "gaussian", "diagonal": False}),
    (pkt.pkt_loss, ("rows", "wide"), {"kernel": "student_t", "divergence": "jeffreys"}),
    (pkt.pkt_loss, ("rows", "wide"), {"variant": "official"}),
    (pkt.supervised_pkt_loss, ("rows", "labels"), {}),
    (pkt.nystrom_pkt_loss, ("rows", "wide", "landmarks"), {}),
    (structured_kd.pixelwise_loss, ("maps", "maps"), {}),
    (structured_kd.pixelwise_loss, ("maps", "maps"), {"variant": "printed"}),
    (structured_kd.pixelwise_loss, ("maps", "maps"), {"variant": "official"}),
    (structured_kd.pairwise_loss, ("maps", "wide maps"), {}),
    (structured_kd.pairwise_loss, ("maps", "wide maps"), {"alpha": 9}),
    (structured_kd.pairwise_loss, ("maps", "wide maps"), {"alpha": 5, "beta": 4}),
    (structured_kd.pairwise_loss, ("maps", "wide maps"), {"variant": "official"}),
    (structured_kd.pairwise_loss, ("maps", "wide maps"), {"variant": "cirkd"}),
    (structured_kd.holistic_loss, ("answers", "answers"), {}),
    (quest.quest_loss, ("maps", "wide maps", "words"), {"beta": 0.2}),
]


def value_and_gradient(loss: Callable[[Tensor], Tensor], student: Tensor) -> tuple[float, Tensor]:
    """A loss and its gradient with respect to its argument, which is left as it was."""
    student = torch.as_tensor(student).clone().requires_grad_()
    value = loss(student)
    value.backward()
    return value.item(), student.grad


def assert_vmap_equals_a_loop(
    loss: Callable[[Tensor, Tensor], Tensor], students: Tensor, teachers: Tensor
) -> None:
    """Raise unless ``vmap`` over the first dimension gives what a loop gives, value and gradient."""
    pairs = list(zip(students, teachers, strict=True))
    torch.testing.assert_close(
        torch.vmap(loss)(students, teachers), torch.stack([loss(s, t) for s, t in pairs])
    )
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(loss))(students, teachers),
        torch.stack([value_and_gradient(lambda x, t=t: loss(x, t), s)[1] for s, t in pairs]),
    )
