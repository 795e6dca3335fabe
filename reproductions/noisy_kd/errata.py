r"""What the note and a public port of noisy collaboration got wrong, each with its proof.

Sources: *note*, the literature note that this book arranges; *code*, SforAiDl/KD_Lib@a94d236, as read. No code of the
authors was found.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdrefs.methods.noisy_kd import add_noise, corrupt_labels, fickle_teacher, soft_randomization_loss
from reproductions.harness.errata import Erratum, Evidence, draw


def _gradient(student: Tensor, teacher: Tensor, temperature: float, divergence: str) -> Tensor:
    student = student.clone().requires_grad_()
    labels = torch.zeros(len(student), dtype=torch.int64)
    loss = soft_randomization_loss(
        student, teacher, labels, temperature=temperature, alpha=1, divergence=divergence
    )
    return torch.autograd.grad(loss, student)[0] * len(student)


def _check_direction() -> Evidence:
    student, teacher = 3 * draw(64, 10, seed=1), 3 * draw(64, 10, seed=2)
    gaps: dict[float, float] = {}
    known = 0.0
    for temperature in (1.0, 4.0, 1000.0):
        forward, reverse = (_gradient(student, teacher, temperature, name) for name in ("forward", "reverse"))
        gaps[temperature] = float((forward - reverse).norm() / forward.norm())
        hinton = temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1))
        known = max(known, float((forward - hinton).abs().max()))
    return Evidence(
        holds=known < 1e-12 and gaps[1.0] > 0.5 and gaps[4.0] > 0.1 and gaps[1000.0] < 0.01,
        summary=(
            f"The gradient of KL(T‖S) is distillation's, τ(softmax(s/τ) - softmax(t/τ)), to {known:.0e}. That of "
            f"what is printed differs by {gaps[1.0]:.2f} of its size at τ = 1, {gaps[4.0]:.2f} at 4, "
            f"{gaps[1000.0]:.4f} at 1000: only at high temperatures both are one."
        ),
        values={f"τ = {temperature:g}": gap for temperature, gap in gaps.items()},
    )


def _check_third_mechanism() -> Evidence:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = (
            nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Dropout(0.4), nn.Linear(64, 5)).double().eval()
        )
        images = draw(8, 6, seed=3)
        with torch.no_grad():
            still = [teacher(images) for _ in range(2)]
            with fickle_teacher(teacher):
                moved = torch.stack([teacher(images) for _ in range(200)])
    same = float((still[0] - still[1]).abs().max())
    spread = float(moved.std(0).mean() / still[0].std())
    return Evidence(
        holds=same == 0 and spread > 0.1 and not any(part.training for part in teacher.modules()),
        summary=(
            f"One batch, the same images and labels each time: a teacher in eval mode answers alike (difference "
            f"{same:g}), with active dropout its logits vary by {spread:.2f} of their own deviation. Neither input "
            "nor supervision was touched."
        ),
        values={"eval mode": same, "dropout active": spread},
    )


def _check_multiplicative() -> Evidence:
    generator = torch.Generator().manual_seed(0)
    level = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64).repeat(50_000, 1)
    printed = add_noise(level, 0.1**0.5, generator=generator, variant="kd_lib").std(0)
    right = add_noise(level, 0.1**0.5, generator=generator).std(0)
    # The same picture in other units: with the mean subtracted, grey is what gets no noise.
    shifted = add_noise(level - 0.5, 0.1**0.5, generator=generator, variant="kd_lib").std(0)
    deviations = [round(value, 3) for value in printed.tolist()]
    return Evidence(
        holds=float(printed[0]) == 0
        and float(shifted[2]) == 0
        and bool((right / 0.1**0.5 - 1).abs().max() < 0.02)
        and abs(float(printed[1] / printed[3]) - 0.1) < 0.01,
        summary=(
            f"Deviations at pixel values 0, 0.1, 0.5 and 1: {', '.join(f'{x:.3f}' for x in deviations)}, where "
            f"additive noise has {float(right.mean()):.3f} at each. After the mean 0.5 is subtracted, grey "
            "gets none."
        ),
        values={"black": float(printed[0]), "white": float(printed[3]), "additive": float(right.mean())},
    )


def _printed_labels(labels: Tensor, channels: int, rate: float, generator: torch.Generator) -> Tensor:
    """The port's rule: the beginning of the batch, classes below the number of channels, one more where it is equal."""
    changed = labels.clone()
    for place in range(int(rate * len(labels))):
        drawn = int(torch.randint(channels, (), generator=generator))
        changed[place] = drawn if drawn != labels[place] else drawn + 1
    return changed


def _check_first_of_batch() -> Evidence:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(320) % 10
    batches = [_printed_labels(part, 3, 0.25, generator) for part in labels.split(32)]
    wrong = torch.stack([new != old for new, old in zip(batches, labels.split(32), strict=True)])
    places = sorted(set(wrong.nonzero()[:, 1].tolist()))
    default = _printed_labels(labels[:32], 3, 0.02, generator)
    missed = int((default != labels[:32]).sum())
    ours = corrupt_labels(labels, 0.02, 10, generator=generator)
    return Evidence(
        holds=places == list(range(8)) and missed == 0 and int((ours != labels).sum()) == 6,
        summary=(
            f"Ten batches of 32 at a rate of 0.25: the places of wrong labels are {places[0]} to {places[-1]} in every "
            f"batch. At the port's default rate of 0.02 a batch of 32 has int(0.64) = {missed} wrong labels, so that "
            f"nothing is corrupted; of 320 samples it should be {int((ours != labels).sum())}."
        ),
        values={"wrong at the default rate": missed},
    )


def _check_channels_for_classes() -> Evidence:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) % 10
    colour, grey = (_printed_labels(labels, channels, 1.0, generator) for channels in (3, 1))
    ours = corrupt_labels(labels, 1.0, 10, generator=generator)
    seen = [sorted(set(found.tolist())) for found in (colour, grey, ours)]
    return Evidence(
        holds=seen[0] == [0, 1, 2, 3] and seen[1] == [0, 1] and seen[2] == list(range(10)),
        summary=(
            f"Ten classes, every label corrupted: with colour images the new classes are {seen[0]}, with grey ones "
            f"{seen[1]}; drawn from the other classes they are {seen[2][0]} to {seen[2][-1]}."
        ),
        values={"classes, colour": len(seen[0]), "classes, grey": len(seen[1])},
    )


def _check_divided_by_classes() -> Evidence:
    student, teacher, labels = draw(16, 100, seed=5), draw(16, 100, seed=6), torch.arange(16)
    options = {"temperature": 20.0, "alpha": 1}
    ours = float(soft_randomization_loss(student, teacher, labels, **options))  # type: ignore[arg-type]
    student, teacher = student / 20, teacher / 20
    pointwise = nn.functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none")
    printed = float(400 * pointwise.mean())
    return Evidence(
        holds=abs(ours / printed - 100) < 1e-9,
        summary=(
            f"A hundred classes: the divergence is {ours:.4f}, the port's {printed:.6f}, {ours / printed:.6g} times "
            "less. Beside a cross-entropy that is not divided, its weight of 0.5 is one of 0.005."
        ),
        values={"divergence": ours, "printed": printed},
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="N1",
        kind="note",
        where="Noisy Collaboration in Knowledge Distillation, the loss (picture 11)",
        printed=r"The divergence is $KL(S^\tau(x + \delta) \,\|\, T^\tau(x))$.",
        right=(
            r"Distillation minimises $KL(T^\tau(x) \,\|\, S^\tau(x + \delta))$. Whether the paper means its formula "
            "or ordinary distillation is open; ours has both, the latter by default."
        ),
        check=_check_direction,
    ),
    Erratum(
        id="N2",
        kind="note",
        where="Noisy Collaboration in Knowledge Distillation, both paragraphs",
        printed="Variability is introduced by noise on the level of the input or of the supervision signal; one loss.",
        right=(
            "The paper has three mechanisms, and the note describes the second only. The first, the fickle teacher, "
            "changes neither input nor labels nor loss: the teacher's dropout stays active."
        ),
        check=_check_third_mechanism,
    ),
    Erratum(
        id="N3",
        kind="code",
        where="SforAiDl/KD_Lib@a94d236: KD_Lib/KD/vision/noisy/utils.py, add_noise",
        printed=r"Gaussian noise is added as $x\,(1 + \sqrt{v}\,\epsilon)$.",
        right=(
            r"That is multiplicative noise: black pixels get none. The paper's is $x + \delta$. What counts as black "
            "depends on the normalisation."
        ),
        check=_check_multiplicative,
    ),
    Erratum(
        id="N4",
        kind="code",
        where="SforAiDl/KD_Lib@a94d236: KD_Lib/KD/vision/noisy/messy_collab.py",
        printed="A share of the labels of each batch is perturbed at random.",
        right=(
            "It is the *first* labels of the batch, rounded down in each: with the default rate and batches below 50 "
            "images there are none."
        ),
        check=_check_first_of_batch,
    ),
    Erratum(
        id="N5",
        kind="code",
        where="SforAiDl/KD_Lib@a94d236: KD_Lib/KD/vision/noisy/messy_collab.py",
        printed="The new label is drawn from `range(data.shape[1])`, where `data` is the batch of images.",
        right="That is the number of *channels*, 3 or 1, in place of the number of classes.",
        check=_check_channels_for_classes,
    ),
    Erratum(
        id="N6",
        kind="code",
        where="SforAiDl/KD_Lib@a94d236: KD_Lib/KD/vision/noisy/soft_random.py and messy_collab.py",
        printed="The divergence is `nn.KLDivLoss()` with its default reduction.",
        right="The default averages over batch *and* classes: the divergence divided by the number of classes.",
        check=_check_divided_by_classes,
    ),
)
