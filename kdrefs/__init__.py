"""Reference implementations of knowledge-distillation papers, each tested against its authors' own code.

The public names are loaded on first use, so that ``import kdrefs`` costs nothing and does not import torch.

An argument that should be a tensor and is none is a ``TypeError``; a shape, dtype, number or name that does not fit is
a ``ValueError``. Either names the argument. Losses never look at a tensor's values.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdrefs.divergences import jeffreys_divergence as jeffreys_divergence
    from kdrefs.divergences import kl_divergence as kl_divergence
    from kdrefs.divergences import quadratic_divergence as quadratic_divergence
    from kdrefs.divergences import softened_cross_entropy as softened_cross_entropy
    from kdrefs.divergences import softened_kl as softened_kl
    from kdrefs.kernels import cauchy_kernel as cauchy_kernel
    from kdrefs.kernels import cosine_kernel as cosine_kernel
    from kdrefs.kernels import gaussian_kernel as gaussian_kernel
    from kdrefs.kernels import laplace_kernel as laplace_kernel
    from kdrefs.kernels import log_kernel as log_kernel
    from kdrefs.kernels import pairwise_squared_distances as pairwise_squared_distances
    from kdrefs.kernels import student_t_kernel as student_t_kernel
    from kdrefs.methods.ab import Connector as Connector
    from kdrefs.methods.ab import ab_layer_weights as ab_layer_weights
    from kdrefs.methods.ab import ab_loss as ab_loss
    from kdrefs.methods.ab import activation_similarity as activation_similarity
    from kdrefs.methods.afd import Discriminators as Discriminators
    from kdrefs.methods.afd import FeatureDiscriminator as FeatureDiscriminator
    from kdrefs.methods.afd import TransferLayers as TransferLayers
    from kdrefs.methods.afd import adversarial_loss as adversarial_loss
    from kdrefs.methods.afd import discriminator_loss as discriminator_loss
    from kdrefs.methods.afd import mutual_logit_loss as mutual_logit_loss
    from kdrefs.methods.afd import train_afd as train_afd
    from kdrefs.methods.at import at_loss as at_loss
    from kdrefs.methods.at import attention_map as attention_map
    from kdrefs.methods.at import gradient_at_loss as gradient_at_loss
    from kdrefs.methods.at import input_gradients as input_gradients
    from kdrefs.methods.concept_quantification import concept_counts as concept_counts
    from kdrefs.methods.concept_quantification import concept_metrics as concept_metrics
    from kdrefs.methods.concept_quantification import entropy_map as entropy_map
    from kdrefs.methods.concept_quantification import weight_distance as weight_distance
    from kdrefs.methods.cqd import cqd_loss as cqd_loss
    from kdrefs.methods.darkrank import hard_darkrank_loss as hard_darkrank_loss
    from kdrefs.methods.darkrank import soft_darkrank_loss as soft_darkrank_loss
    from kdrefs.methods.data_distillation import ensemble_over_transforms as ensemble_over_transforms
    from kdrefs.methods.data_distillation import hard_labels as hard_labels
    from kdrefs.methods.data_distillation import score_threshold as score_threshold
    from kdrefs.methods.end2 import dirichlet_uncertainty as dirichlet_uncertainty
    from kdrefs.methods.end2 import end2_loss as end2_loss
    from kdrefs.methods.end2 import end_loss as end_loss
    from kdrefs.methods.end2 import ensemble_uncertainty as ensemble_uncertainty
    from kdrefs.methods.end2 import temperature_schedule as temperature_schedule
    from kdrefs.methods.fitnets import HintRegressor as HintRegressor
    from kdrefs.methods.fitnets import hint_loss as hint_loss
    from kdrefs.methods.fitnets import teacher_weight as teacher_weight
    from kdrefs.methods.ft import Paraphraser as Paraphraser
    from kdrefs.methods.ft import Translator as Translator
    from kdrefs.methods.ft import factor_channels as factor_channels
    from kdrefs.methods.ft import factor_loss as factor_loss
    from kdrefs.methods.ft import paraphraser_loss as paraphraser_loss
    from kdrefs.methods.internal_representations import InternalDistillation as InternalDistillation
    from kdrefs.methods.internal_representations import attention_kl as attention_kl
    from kdrefs.methods.internal_representations import cls_cosine_loss as cls_cosine_loss
    from kdrefs.methods.jacobian_matching import fisher_directions as fisher_directions
    from kdrefs.methods.jacobian_matching import jacobian_loss as jacobian_loss
    from kdrefs.methods.jacobian_matching import output_jacobian as output_jacobian
    from kdrefs.methods.jacobian_matching import random_directions as random_directions
    from kdrefs.methods.jacobian_matching import top_class_directions as top_class_directions
    from kdrefs.methods.kcd import KnowledgeValue as KnowledgeValue
    from kdrefs.methods.kcd import augment as augment
    from kdrefs.methods.kcd import condense as condense
    from kdrefs.methods.kcd import condensed_size as condensed_size
    from kdrefs.methods.kcd import partition as partition
    from kdrefs.methods.kcd import prediction_entropy as prediction_entropy
    from kdrefs.methods.kd import kd_loss as kd_loss
    from kdrefs.methods.ksanc import AttentionEstimator as AttentionEstimator
    from kdrefs.methods.ksanc import LogitDiscriminator as LogitDiscriminator
    from kdrefs.methods.ksanc import TaskDrivenEstimators as TaskDrivenEstimators
    from kdrefs.methods.ksanc import ksanc_loss as ksanc_loss
    from kdrefs.methods.ksanc import logit_adversarial_loss as logit_adversarial_loss
    from kdrefs.methods.ksanc import logit_discriminator_loss as logit_discriminator_loss
    from kdrefs.methods.ksanc import weight_penalty as weight_penalty
    from kdrefs.methods.logit_regression import FactorizedLinear as FactorizedLinear
    from kdrefs.methods.logit_regression import LogitStatistics as LogitStatistics
    from kdrefs.methods.logit_regression import logit_regression_loss as logit_regression_loss
    from kdrefs.methods.logit_regression import logit_statistics as logit_statistics
    from kdrefs.methods.noisy_kd import add_noise as add_noise
    from kdrefs.methods.noisy_kd import averaged_logits as averaged_logits
    from kdrefs.methods.noisy_kd import corrupt_labels as corrupt_labels
    from kdrefs.methods.noisy_kd import fickle_teacher as fickle_teacher
    from kdrefs.methods.noisy_kd import soft_randomization_loss as soft_randomization_loss
    from kdrefs.methods.nst import nst_loss as nst_loss
    from kdrefs.methods.pkt import conditional_probabilities as conditional_probabilities
    from kdrefs.methods.pkt import nystrom_pkt_loss as nystrom_pkt_loss
    from kdrefs.methods.pkt import pkt_loss as pkt_loss
    from kdrefs.methods.pkt import supervised_pkt_loss as supervised_pkt_loss
    from kdrefs.methods.qmi import InformationPotentials as InformationPotentials
    from kdrefs.methods.qmi import biased_hsic as biased_hsic
    from kdrefs.methods.qmi import information_potentials as information_potentials
    from kdrefs.methods.qmi import quadratic_mutual_information as quadratic_mutual_information
    from kdrefs.methods.quest import AssignmentPredictor as AssignmentPredictor
    from kdrefs.methods.quest import fit_vocabulary as fit_vocabulary
    from kdrefs.methods.quest import mean_largest_assignment as mean_largest_assignment
    from kdrefs.methods.quest import nearest_word as nearest_word
    from kdrefs.methods.quest import propose_beta as propose_beta
    from kdrefs.methods.quest import quest_loss as quest_loss
    from kdrefs.methods.quest import soft_assignment as soft_assignment
    from kdrefs.methods.structured_kd import HolisticDiscriminator as HolisticDiscriminator
    from kdrefs.methods.structured_kd import discriminator_objective as discriminator_objective
    from kdrefs.methods.structured_kd import gradient_penalty as gradient_penalty
    from kdrefs.methods.structured_kd import holistic_loss as holistic_loss
    from kdrefs.methods.structured_kd import pairwise_loss as pairwise_loss
    from kdrefs.methods.structured_kd import pixelwise_loss as pixelwise_loss
    from kdrefs.metrics import RetrievalScores as RetrievalScores
    from kdrefs.metrics import accuracy as accuracy
    from kdrefs.metrics import agreement as agreement
    from kdrefs.metrics import linear_probe_accuracy as linear_probe_accuracy
    from kdrefs.metrics import precision_at as precision_at
    from kdrefs.metrics import retrieval as retrieval
    from kdrefs.metrics import retrieval_map as retrieval_map
    from kdrefs.noise import NoiseExpansion as NoiseExpansion
    from kdrefs.noise import noise_expansion as noise_expansion

__version__ = "0.1.0"

# Module -> public names. A name here also stands in the block above, for type checkers and editors.
_EXPORTS = {
    "kdrefs.divergences": (
        "jeffreys_divergence",
        "kl_divergence",
        "quadratic_divergence",
        "softened_cross_entropy",
        "softened_kl",
    ),
    "kdrefs.kernels": (
        "cauchy_kernel",
        "cosine_kernel",
        "gaussian_kernel",
        "laplace_kernel",
        "log_kernel",
        "pairwise_squared_distances",
        "student_t_kernel",
    ),
    "kdrefs.methods.ab": (
        "Connector",
        "ab_layer_weights",
        "ab_loss",
        "activation_similarity",
    ),
    "kdrefs.methods.afd": (
        "Discriminators",
        "FeatureDiscriminator",
        "TransferLayers",
        "adversarial_loss",
        "discriminator_loss",
        "mutual_logit_loss",
        "train_afd",
    ),
    "kdrefs.methods.at": (
        "at_loss",
        "attention_map",
        "gradient_at_loss",
        "input_gradients",
    ),
    "kdrefs.methods.concept_quantification": (
        "concept_counts",
        "concept_metrics",
        "entropy_map",
        "weight_distance",
    ),
    "kdrefs.methods.cqd": ("cqd_loss",),
    "kdrefs.methods.darkrank": (
        "hard_darkrank_loss",
        "soft_darkrank_loss",
    ),
    "kdrefs.methods.data_distillation": (
        "ensemble_over_transforms",
        "hard_labels",
        "score_threshold",
    ),
    "kdrefs.methods.end2": (
        "dirichlet_uncertainty",
        "end2_loss",
        "end_loss",
        "ensemble_uncertainty",
        "temperature_schedule",
    ),
    "kdrefs.methods.fitnets": (
        "HintRegressor",
        "hint_loss",
        "teacher_weight",
    ),
    "kdrefs.methods.ft": (
        "Paraphraser",
        "Translator",
        "factor_channels",
        "factor_loss",
        "paraphraser_loss",
    ),
    "kdrefs.methods.internal_representations": (
        "InternalDistillation",
        "attention_kl",
        "cls_cosine_loss",
    ),
    "kdrefs.methods.jacobian_matching": (
        "fisher_directions",
        "jacobian_loss",
        "output_jacobian",
        "random_directions",
        "top_class_directions",
    ),
    "kdrefs.methods.kcd": (
        "KnowledgeValue",
        "augment",
        "condense",
        "condensed_size",
        "partition",
        "prediction_entropy",
    ),
    "kdrefs.methods.kd": ("kd_loss",),
    "kdrefs.methods.ksanc": (
        "AttentionEstimator",
        "LogitDiscriminator",
        "TaskDrivenEstimators",
        "ksanc_loss",
        "logit_adversarial_loss",
        "logit_discriminator_loss",
        "weight_penalty",
    ),
    "kdrefs.methods.logit_regression": (
        "FactorizedLinear",
        "LogitStatistics",
        "logit_regression_loss",
        "logit_statistics",
    ),
    "kdrefs.methods.noisy_kd": (
        "add_noise",
        "averaged_logits",
        "corrupt_labels",
        "fickle_teacher",
        "soft_randomization_loss",
    ),
    "kdrefs.methods.nst": ("nst_loss",),
    "kdrefs.methods.pkt": (
        "conditional_probabilities",
        "nystrom_pkt_loss",
        "pkt_loss",
        "supervised_pkt_loss",
    ),
    "kdrefs.methods.qmi": (
        "InformationPotentials",
        "biased_hsic",
        "information_potentials",
        "quadratic_mutual_information",
    ),
    "kdrefs.methods.quest": (
        "AssignmentPredictor",
        "fit_vocabulary",
        "mean_largest_assignment",
        "nearest_word",
        "propose_beta",
        "quest_loss",
        "soft_assignment",
    ),
    "kdrefs.methods.structured_kd": (
        "HolisticDiscriminator",
        "discriminator_objective",
        "gradient_penalty",
        "holistic_loss",
        "pairwise_loss",
        "pixelwise_loss",
    ),
    "kdrefs.metrics": (
        "RetrievalScores",
        "accuracy",
        "agreement",
        "linear_probe_accuracy",
        "precision_at",
        "retrieval",
        "retrieval_map",
    ),
    "kdrefs.noise": (
        "NoiseExpansion",
        "noise_expansion",
    ),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
