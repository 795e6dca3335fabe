"""What the notes say about how methods relate, each statement with its verdict and proof."""

from __future__ import annotations

from reproductions.relations import proofs
from reproductions.relations.relation import Relation, proved_by

_FIRST, _SECOND = "note of 2024-03-22", "survey in two parts"

RELATIONS: tuple[Relation, ...] = (
    Relation(
        id="R1",
        group="Beginnings",
        where=f"{_FIRST}, remark on the two papers of 2014",
        statement="Regressing logits and distilling softened probabilities are in fact the same idea.",
        verdict="holds with conditions",
        answer=(
            r"For $T \to \infty$ and logits of mean zero, $T^2 KL \to \frac{1}{2K} \lVert s - t \rVert^2$, which is "
            r"the regression divided by $K$. At the temperatures in use they differ, and regression alone matches the "
            r"mean of the logits, on which no prediction depends."
        ),
        check=proofs.check_logit_regression,
        errata=(
            "logit_regression/L2",
            "kd/K1",
        ),
    ),
    Relation(
        id="R2",
        group="What to transfer",
        where=f"{_FIRST}, FitNets, first sentence and remark",
        statement="FitNets does not align the feature maps of the two networks directly.",
        verdict="does not hold",
        answer="Its first stage aligns every value of one map with the same value of the other, through a regressor.",
        check=proved_by("fitnets/F1"),
        errata=("fitnets/F1",),
    ),
    Relation(
        id="R3",
        group="What to transfer",
        where="commonly said of the linear kernel",
        statement="With a linear kernel, NST is spatial attention transfer.",
        verdict="holds with conditions",
        answer=(
            "Where maps are not negative, all channels of a network have one norm, p = 1 and the mean map is "
            "normalised once more; or with one channel. In general attention transfer normalises after averaging over "
            "the channels, NST before."
        ),
        check=proved_by("nst/N2"),
        errata=("nst/N2",),
    ),
    Relation(
        id="R4",
        group="What to transfer",
        where="commonly said of the polynomial kernel",
        statement="Attention transfer with p = 2 is contained in NST with the polynomial kernel.",
        verdict="holds",
        answer=(
            "For channels of unit norm, its map is the diagonal of the matrix that NST matches, normalised. NST also "
            "compares which positions respond together."
        ),
        check=proofs.check_at_in_nst,
    ),
    Relation(
        id="R5",
        group="What to transfer",
        where="commonly said of the polynomial kernel",
        statement="NST with the polynomial kernel matches Gram matrices, as style transfer does.",
        verdict="holds",
        answer=(
            r"Exactly, but the matrices are over positions, $HW \times HW$. Those of style transfer are over channels, "
            r"$C \times C$, and give another loss."
        ),
        check=proofs.check_nst_is_gram_matching,
        errata=("nst/N3",),
    ),
    Relation(
        id="R6",
        group="What to transfer",
        where=f"{_FIRST}, remark under Activation Boundaries",
        statement="The boundaries that NST learns are insensitive to weak responses; AB strengthens weak neurons.",
        verdict="holds with conditions",
        answer=(
            "Of AB it is true: it reads signs only, and the weakest neuron counts as much as the strongest. Of NST it "
            "is true within a channel and false between channels, each of which is normalised; and NST learns no "
            "boundary."
        ),
        check=proofs.check_weak_responses,
        errata=(
            "ab/B1",
            "nst/N5",
        ),
    ),
    Relation(
        id="R7",
        group="What to transfer",
        where=f"{_FIRST}, remark under DarkRank",
        statement="DarkRank and NST have exactly the same architecture.",
        verdict="does not hold",
        answer=(
            "What they share is a sketch: a loss on a feature beside the task's. NST compares the channels of one "
            "sample, DarkRank the samples of one batch, and what changes the one may leave the other alone."
        ),
        check=proofs.check_darkrank,
        errata=("darkrank/D6",),
    ),
    Relation(
        id="R8",
        group="What to transfer",
        where=f"{_FIRST}, remark under Factor Transfer",
        statement="Factor transfer is the first to help both networks with an auxiliary network.",
        verdict="does not hold",
        answer=(
            "FitNets' regressor is one. New in factor transfer is one on the *teacher's* side, trained without labels."
        ),
        check=proofs.check_auxiliary_network,
    ),
    Relation(
        id="R9",
        group="Data and quality",
        where=f"{_FIRST}, Data Distillation",
        statement="Data distillation goes on training the model with which it made the labels.",
        verdict="open",
        answer=(
            "Whether the paper trains the same model further or another one anew could not be read, and no formula "
            "decides it."
        ),
        check=None,
    ),
    Relation(
        id="R10",
        group="Data and quality",
        where=f"{_FIRST}, Local Affine Approximations",
        statement="Matching Jacobians is matching soft labels with noise added to the input.",
        verdict="holds with conditions",
        answer=(
            "To second order in the noise, for the squared error, with the same isotropic noise for both networks and "
            "where they are affine around the input."
        ),
        check=proved_by("jacobian_matching/J8"),
        errata=("jacobian_matching/J8",),
    ),
    Relation(
        id="R11",
        group="Ensembles and noise",
        where=f"{_SECOND}, Ensemble Distribution Distillation, picture 10",
        statement="The total uncertainty of an ensemble is that of the data plus that of knowledge.",
        verdict="holds",
        answer=(
            "By definition: the entropy of the mean prediction is the mean entropy plus the mutual information. For a "
            "Dirichlet distribution both have closed forms."
        ),
        check=proofs.check_uncertainties,
    ),
    Relation(
        id="R12",
        group="Ensembles and noise",
        where=f"{_SECOND}, Ensemble Distribution Distillation, first paragraph",
        statement="EnD² is trained with a KL divergence, like ensemble distillation.",
        verdict="does not hold",
        answer=(
            "With the likelihood of the members' predictions under a Dirichlet distribution. It sees how far members "
            "disagree, which a divergence of mean predictions does not; and unlike any divergence it has no lower "
            "bound."
        ),
        check=proofs.check_likelihood,
        errata=("end2/E2",),
    ),
    Relation(
        id="R13",
        group="Intermediate layers and structure",
        where=f"{_SECOND}, Structured Knowledge Distillation, picture 31",
        statement=r"Pixel-wise distillation is $KL(q^s \,\|\, q^t)$, knowledge distillation on each pixel.",
        verdict="does not hold",
        answer=(
            r"Knowledge distillation is $KL(q^t \,\|\, q^s)$, and so is, up to a constant, the cross-entropy of the "
            r"authors' code. The printed direction has another gradient."
        ),
        check=proofs.check_pixelwise,
    ),
    Relation(
        id="R14",
        group="Intermediate layers and structure",
        where=f"{_SECOND}, Structured Knowledge Distillation, picture 33",
        statement=r"The pair-wise loss is the sum over the graph times $W'H'\alpha/\beta$.",
        verdict="does not hold",
        answer=(
            r"The graph has $W'H'\alpha/\beta$ edges, so that the mean over them has the factor "
            r"$\beta/(W'H'\alpha)$. The printed one is its inverse."
        ),
        check=proofs.check_pairwise_factor,
    ),
)
