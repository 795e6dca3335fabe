r"""What public toolboxes of knowledge distillation got wrong, each with its proof.

Only what belongs to no column; mistakes in the implementations of a method with a column of its own stand there. The
code was read at the commits named; checks compute its arithmetic anew, in :mod:`reproductions.toolboxes.losses` and
:mod:`reproductions.toolboxes.loops`.
"""

from __future__ import annotations

from reproductions.harness.errata import Erratum
from reproductions.toolboxes import loops, losses

TITLE = "Public toolboxes"

ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="T1",
        kind="code",
        where="torchdistill@3e4373c: torchdistill/losses/mid_level.py, SPKDLoss",
        printed=r"Similarity-preserving distillation with rows normalised by `normalize(G, 1)`.",
        right=(
            r"The second argument is the *order* of the norm, so rows are divided by their sum of magnitudes. The "
            r"paper (arXiv:1907.09682) and the other toolboxes divide by the Euclidean norm. The two losses have no "
            r"constant ratio, and theirs falls faster with the batch size."
        ),
        check=losses.check_row_norm,
    ),
    Erratum(
        id="T2",
        kind="code",
        where=(
            "RepDistiller@b84f547: distiller_zoo/AB.py; mmrazor@90c7af1: mmrazor/models/losses/ab_loss.py; "
            "Knowledge-Distillation-Zoo@65470c8: kd_losses/ab.py; torchdistill@3e4373c: "
            "torchdistill/losses/mid_level.py"
        ),
        printed=(
            r"Three losses under the name of activation boundaries: the sum over the neurons (torchdistill), 3/1000 "
            r"of it (RepDistiller, MMRazor), the mean over them (Zoo)."
        ),
        right=(
            r"The paper (arXiv:1811.03233) sums over the neurons. 3/1000 is the *weight* of the authors' CIFAR-10 "
            r"script, hidden here inside the loss; with the mean, a weight means another strength for each size of "
            r"layer. A weight can be carried over only together with the reduction it was tuned with."
        ),
        check=losses.check_boundary_scales,
    ),
    Erratum(
        id="T3",
        kind="code",
        where="RepDistiller@b84f547: distiller_zoo/FT.py",
        printed=(
            "Factor transfer: the squared factors, averaged over their channels, normalised, compared position by "
            "position."
        ),
        right=(
            r"The paper (arXiv:1802.04977) compares the normalised factors themselves. What is computed is attention "
            r"transfer on factors, blind to signs and to which channel says what."
        ),
        check=losses.check_factor,
    ),
    Erratum(
        id="T4",
        kind="code",
        where="RepDistiller@b84f547: distiller_zoo/CC.py (by its comment as received from the authors)",
        printed=(
            r"Correlation congruence as the mean of $\sum_d |s_i - t_i|_d \, |s_{i+1} - t_{i+1}|_d$ over successive "
            r"samples."
        ),
        right=(
            r"The paper (arXiv:1904.01802) compares correlations: $\frac{1}{N^2} \sum_{ij} (k(s_i, s_j) - "
            r"k(t_i, t_j))^2$. The printed form has no correlation within a network in it, depends on the order of the "
            r"batch, and is 0 as soon as every second sample agrees."
        ),
        check=losses.check_successive_differences,
    ),
    Erratum(
        id="T5",
        kind="code",
        where="torchdistill@3e4373c: torchdistill/losses/mid_level.py, CCKDLoss",
        printed=(
            r"The Frobenius norm of the difference of the kernel matrices, over $N^2$; the series of the Gaussian "
            r"kernel on features as a linear layer returns them."
        ),
        right=(
            r"The paper has the *square* of the norm over $N^2$, a mean over pairs. Theirs falls with the batch "
            r"size. The series holds for unit vectors only; for longer ones it is no Gaussian and has no bound."
        ),
        check=losses.check_series,
    ),
    Erratum(
        id="T6",
        kind="code",
        where="mdistiller@a08d46f: mdistiller/distillers/VID.py",
        printed=(
            "Variational information distillation; the parameters of the variances are kept in a Python list and left "
            "out of the learnable parameters."
        ),
        right=(
            r"The variances are what is variational: they weigh each channel by how well it can be predicted. Never "
            r"registered, they are never optimised, and the loss is the mean square times a tenth."
        ),
        check=losses.check_variances,
    ),
    Erratum(
        id="T7",
        kind="code",
        where="KD_Lib@a94d236: KD_Lib/KD/vision/noisy/noisy_teacher.py",
        printed="The default `nn.MSELoss()` of the student's `log_softmax` and the teacher's `softmax`.",
        right=(
            r"The pair of arguments is that of `nn.KLDivLoss`. A squared difference of a logarithm and a probability "
            r"is least at nearly uniform predictions whatever the teacher says: it smooths, it does not distil."
        ),
        check=losses.check_log_probabilities,
    ),
    Erratum(
        id="T8",
        kind="code",
        where=(
            "image_classification_sota, issue 19, against appendix A.1 of the paper; copied to mmrazor@90c7af1: "
            "mmrazor/models/losses/dist_loss.py and torchdistill@3e4373c: torchdistill/losses/mid_level.py, DISTLoss"
        ),
        printed=r"DIST's correlation terms times $\tau^2$.",
        right=(
            r"$\tau^2$ makes up for a divergence whose gradient falls as $1/\tau^2$. A correlation does not depend on "
            r"the scale of its arguments, so its gradient does not fall, and the factor multiplies the weight by "
            r"$\tau^2$. The paper's listing has none. At the default $\tau = 1$ it does nothing."
        ),
        check=losses.check_relation_scale,
    ),
    Erratum(
        id="T9",
        kind="code",
        where="KD_Lib@a94d236: KD_Lib/KD/common/base_class.py, _train_student and _evaluate_model",
        printed=(
            "`train()` once before the first epoch; the evaluation after each epoch calls `eval()` on the same network."
        ),
        right=(
            "Training mode has to be set again. From the second epoch on the student trains with the statistics of the "
            "first one and without dropout."
        ),
        check=loops.check_mode,
    ),
    Erratum(
        id="T10",
        kind="code",
        where=(
            "KD_Lib@a94d236: KD_Lib/KD/common/base_class.py; Knowledge-Distillation-Zoo@65470c8: kd_losses/sobolev.py"
        ),
        printed=(
            "The teacher runs with gradients on, its output is not detached (KD_Lib); the teacher's input gradient is "
            "taken with `create_graph=True` and then detached (Zoo)."
        ),
        right="Nothing trains the teacher: no graph through it is needed, for values or for gradients.",
        check=loops.check_teacher_graph,
    ),
    Erratum(
        id="T11",
        kind="code",
        where="mdistiller@a08d46f: mdistiller/engine/trainer.py; issue 30 says so of the tables of their paper",
        printed="The result of a run is the best of its epochs' accuracies on the test set.",
        right=(
            "A maximum over the test set is biased upwards, the more so the longer the run and the less steady the "
            "method. Report the last epoch, or choose on held-out training data."
        ),
        check=loops.check_best_epoch,
    ),
)
