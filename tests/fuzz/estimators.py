"""Every public function and module of kdrefs that takes tensors and is no loss, and why the others are not here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor, nn

import kdrefs
import kdrefs.methods
from kdrefs import divergences, kernels, metrics, noise, pair_sums
from kdrefs.methods import (
    ab,
    afd,
    at,
    concept_quantification,
    data_distillation,
    end2,
    fitnets,
    ft,
    internal_representations,
    jacobian_matching,
    kcd,
    ksanc,
    logit_regression,
    noisy_kd,
    pkt,
    qmi,
    quest,
    structured_kd,
)
from tests.fuzz.cases import Case
from tests.fuzz.tensors import Sizes


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _listed(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """Call ``function`` with tensors by position."""
    return lambda **tensors: function(*(tensors[name] for name in names))


def _smooth(x: Tensor) -> Tensor:
    return x.flatten(1).tanh().square().sum(1)


class _Judge(nn.Module):
    """A discriminator of maps of any shape and dtype."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.flatten(1).tanh().square().sum(1)


def _from(inputs: Any, outputs: Any) -> Any:
    """Outputs that depend on the inputs, where both are what they should be."""
    tensors = isinstance(inputs, Tensor) and isinstance(outputs, Tensor)
    if not tensors or inputs.ndim < 2 or inputs.shape[:1] != outputs.shape[:1] or inputs.is_complex():
        return outputs
    rows = inputs.flatten(1).tanh().sum(1)
    return outputs + rows.view(-1, *[1] * (outputs.ndim - 1)).to(outputs.dtype)


def _input_gradients(images: Any, labels: Any, logits: Any) -> Tensor:
    return at.input_gradients(_from(images, logits), images, labels)


def _output_jacobian(inputs: Any, outputs: Any, directions: Any = None) -> Tensor:
    return jacobian_matching.output_jacobian(_from(inputs, outputs), inputs, directions)


def _transfer_layers(sizes: Sizes) -> Callable[..., Any]:
    shapes = [(sizes["channels"], sizes["height"], sizes["columns"]), (3, 2, 2)]
    return _listed(afd.TransferLayers(shapes), "student", "teacher")


def _discriminators(sizes: Sizes) -> Callable[..., Any]:
    discriminators = afd.Discriminators((sizes["channels"], sizes["height"], sizes["columns"]), 2, hidden=3)
    return _listed(discriminators, "maps", "peer")


def _estimators(sizes: Sizes) -> nn.Module:
    estimator = ksanc.AttentionEstimator(4, sizes["width"], in_channels=sizes["channels"])
    return ksanc.TaskDrivenEstimators([estimator], sizes["classes"])


def _records(sizes: Sizes, method: str) -> Callable[..., Any]:
    value = kcd.KnowledgeValue(sizes["batch"])
    record = getattr(value, method)

    def call(**tensors: Any) -> Tensor:
        record(**tensors)
        return value.score()

    return call


def _loaded(sizes: Sizes) -> Callable[..., Any]:
    def call(total: Any, frequency: Any) -> Tensor:
        value = kcd.KnowledgeValue(sizes["batch"])
        value.load_state_dict({"total": total, "frequency": frequency})
        return value.total

    return call


def _internal(sizes: Sizes) -> Callable[..., Any]:
    def call(student: Any, teacher: Any, hidden: Any, state: Any, mask: Any = None) -> Any:
        distillation = internal_representations.InternalDistillation("all", 1)
        return distillation.internal_loss([(student, hidden)], [(teacher, state)], mask)

    return call


_MAPS = {"maps": "maps"}
_PAIR = {"x": "rows", "y": "other rows"}
_RETRIEVAL = {
    "queries": "rows", "database": "other rows", "query_labels": "labels", "database_labels": "database labels"
}  # fmt: skip
_UNKNOWN = "the label of a query need not occur in the database"
_F32 = (torch.float32,)

ESTIMATORS = [
    Case(kernels.inner_products, _PAIR),
    Case(kernels.unit_rows, {"x": "rows"}),
    Case(kernels.cosines, {"x": "rows"}),
    Case(kernels.pairwise_squared_distances, _PAIR),
    Case(kernels.pairwise_squared_distances, {"x": "rows"}),
    *(
        Case(kernel, kinds)
        for kernel in (
            kernels.cosine_kernel,
            kernels.gaussian_kernel,
            kernels.laplace_kernel,
            kernels.student_t_kernel,
            kernels.cauchy_kernel,
        )
        for kinds in (_PAIR, {"x": "rows"})
    ),
    Case(kernels.pairwise_squared_distances, _PAIR | {"same": "same"}),
    *(Case(kernels.log_kernel, _PAIR, {"kernel": kernel}) for kernel in kernels.KERNELS),
    Case(kernels.log_kernel, _PAIR | {"same": "same"}, {"kernel": "laplace"}),
    Case(metrics.retrieval, _RETRIEVAL, {"at": (1, 2)}, least={"database": 2}, refuses=_UNKNOWN),
    Case(
        metrics.retrieval,
        _RETRIEVAL,
        {"at": (1,), "variant": "official", "batch": 2},
        least={"database": 2},
        refuses=_UNKNOWN,
    ),
    Case(metrics.retrieval_map, _RETRIEVAL, refuses=_UNKNOWN),
    Case(metrics.precision_at, _RETRIEVAL, {"k": 1}, refuses=_UNKNOWN),
    Case(metrics.accuracy, {"logits": "logits", "labels": "labels"}),
    Case(metrics.agreement, {"logits": "logits", "other": "logits"}),
    Case(
        metrics.linear_probe_accuracy,
        {
            "train_features": "rows",
            "train_labels": "labels",
            "test_features": "other rows",
            "test_labels": "database labels",
        },
        {"max_iterations": 2},
    ),
    Case(noise.noise_expansion, {"x": "rows"}, {"loss": _smooth}),
    Case(noise.noise_expansion, {"x": "rows"}, {"loss": _smooth, "order": 4}),
    Case(
        noise.noise_expansion,
        {"x": "rows"},
        make=lambda _: partial(noise.noise_expansion, _smooth, probes=2, generator=_generator()),
    ),
    Case(
        pair_sums.cosine_neighbour_kl, {"student": "rows", "teacher": "wide"}, constant=frozenset({"teacher"})
    ),
    Case(
        pair_sums.cosine_neighbour_kl,
        {"student": "rows", "teacher": "wide"},
        {"diagonal": False},
        least={"batch": 2},
        constant=frozenset({"teacher"}),
    ),
    Case(
        pair_sums.class_pair_sums,
        {"features": "rows", "labels": "labels"},
        make=lambda sizes: partial(pair_sums.class_pair_sums, classes=sizes["classes"], bandwidth=1.0),
    ),
    Case(ab.activation_similarity, {"student": "maps", "teacher": "maps"}),
    Case(
        ab.Connector,
        _MAPS,
        make=lambda sizes: ab.Connector(sizes["channels"], 3),
        dtypes=_F32,
        normalises=True,
    ),
    Case(
        afd.FeatureDiscriminator,
        _MAPS,
        dtypes=_F32,
        normalises=True,
        make=lambda s: afd.FeatureDiscriminator((s["channels"], s["height"], s["columns"]), hidden=3),
    ),
    Case(
        afd.TransferLayers,
        {"student": "maps", "teacher": "small maps"},
        make=_transfer_layers,
        dtypes=_F32,
        shares="a map of the common shape is left as it is",
        names=("maps",),
    ),
    Case(
        afd.Discriminators,
        {"maps": "maps", "peer": "maps"},
        make=_discriminators,
        dtypes=_F32,
        normalises=True,
    ),
    Case(at.attention_map, {"features": "maps"}),
    Case(at.attention_map, {"features": "maps"}, {"power": 4.0, "reduction": "max"}),
    Case(at.attention_map, {"features": "maps"}, {"power": 0.5}),
    Case(
        at.input_gradients,
        {"images": "images", "labels": "labels", "logits": "logits"},
        make=lambda _: _input_gradients,
        needs=("images",),
    ),
    Case(
        concept_quantification.entropy_map,
        {"images": "images"},
        make=lambda _: partial(
            concept_quantification.entropy_map,
            nn.Sequential(nn.Tanh()),
            layer="0",
            grid=1,
            probes=2,
        ),
    ),
    Case(
        concept_quantification.entropy_map,
        {"images": "images"},
        make=lambda _: partial(
            concept_quantification.entropy_map,
            nn.Sequential(nn.Tanh()),
            layer="0",
            grid=1,
            method="optimise",
            steps=2,
            draws=2,
        ),
    ),
    Case(
        concept_quantification.concept_counts,
        {"entropy": "entropy", "foreground": "foreground"},
        least={"columns": 2},
    ),
    Case(
        concept_quantification.concept_metrics,
        {"entropy": "entropies", "foreground": "foreground", "distance": "distance"},
        least={"columns": 2},
        unbounded="shares where no image has a concept",
    ),
    Case(
        concept_quantification.weight_distance,
        {"first": "weights", "second": "weights"},
        names=("weights",),
        refuses="a first weight of zeros",
        make=lambda _: lambda first, second: concept_quantification.weight_distance([first, second]),
    ),
    Case(
        data_distillation.transformed,
        {"images": "images"},
        {"transform": data_distillation.Transform(1.5, True)},
    ),
    Case(
        data_distillation.transformed,
        {"images": "images"},
        {"transform": data_distillation.Transform()},
        shares="images under the transform that changes nothing",
    ),
    Case(
        data_distillation.ensemble_over_transforms,
        {"images": "images"},
        {"predict": torch.tanh, "transforms": data_distillation.transforms((1.0, 0.5))},
    ),
    Case(
        data_distillation.score_threshold,
        {"scores": "scores of samples"},
        make=lambda s: partial(data_distillation.score_threshold, images=s["batch"], instances=1.0),
    ),
    Case(data_distillation.hard_labels, {"candidates": "candidates"}, {"threshold": 0.5, "places": 1}),
    Case(end2.dirichlet_uncertainty, {"logits": "logits"}, unbounded="EPKL of a precision near 0"),
    Case(end2.ensemble_uncertainty, {"logits": "members"}),
    Case(
        fitnets.HintRegressor,
        _MAPS,
        dtypes=_F32,
        make=lambda s: fitnets.HintRegressor((s["channels"], s["height"], s["columns"]), (3, 1, 1)),
    ),
    Case(
        fitnets.HintRegressor,
        _MAPS,
        dtypes=_F32,
        normalises=True,
        make=lambda s: fitnets.HintRegressor(
            (s["channels"], s["height"], s["columns"]), (3, 1, 1), variant="repdistiller"
        ),
    ),
    Case(ft.Paraphraser, _MAPS, dtypes=_F32, make=lambda s: ft.Paraphraser(s["channels"], 2)),
    Case(
        ft.Paraphraser,
        _MAPS,
        dtypes=_F32,
        normalises=True,
        make=lambda s: ft.Paraphraser(s["channels"], 2, batch_norm=True).encode,
    ),
    Case(ft.Translator, _MAPS, dtypes=_F32, make=lambda s: ft.Translator(s["channels"], 2)),
    Case(
        internal_representations.InternalDistillation,
        {
            "student": "attention",
            "teacher": "attention",
            "mask": "mask",
            "hidden": "tokens",
            "state": "tokens",
        },
        make=_internal,
        constant=frozenset({"teacher", "state"}),
    ),
    Case(
        jacobian_matching.output_jacobian,
        {"inputs": "images", "directions": "directions", "outputs": "logits"},
        make=lambda _: _output_jacobian,
        needs=("inputs",),
        constant=frozenset({"directions"}),
    ),
    Case(jacobian_matching.top_class_directions, {"logits": "logits"}),
    Case(
        jacobian_matching.random_directions,
        {"logits": "logits"},
        make=lambda _: partial(jacobian_matching.random_directions, count=2, generator=_generator()),
    ),
    Case(jacobian_matching.fisher_directions, {"teacher": "logits"}),
    Case(
        jacobian_matching.fisher_directions,
        {"teacher": "logits", "directions": "directions"},
        constant=frozenset({"teacher"}),
    ),
    Case(kcd.prediction_entropy, {"logits": "logits"}, constant=frozenset({"logits"})),
    Case(
        kcd.KnowledgeValue,
        {"indices": "indices", "logits": "logits"},
        make=lambda s: _records(s, "record"),
        unbounded="the score of a point never recorded",
    ),
    Case(
        kcd.KnowledgeValue,
        {"indices": "indices", "entropies": "scores of samples"},
        make=lambda s: _records(s, "record_entropies"),
        unbounded="the score of a point never recorded",
    ),
    Case(
        kcd.KnowledgeValue,
        {"total": "scores of samples", "frequency": "indices"},
        make=_loaded,
        names=("state",),
    ),
    Case(kcd.ranks, {"score": "scores of samples"}),
    Case(kcd.condense, {"score": "scores of samples"}, {"keep": 1}),
    Case(kcd.partition, {"score": "scores of samples"}, {"keep": 1, "removed": 1}, least={"batch": 2}),
    Case(kcd.augment, {"low": "images", "dropped": "images"}),
    Case(
        ksanc.AttentionEstimator,
        {"maps": "maps", "descriptor": "rows"},
        dtypes=_F32,
        make=lambda s: ksanc.AttentionEstimator(3, s["width"], in_channels=s["channels"]),
    ),
    Case(
        ksanc.AttentionEstimator,
        {"maps": "maps", "descriptor": "rows"},
        dtypes=_F32,
        make=lambda s: ksanc.AttentionEstimator(3, s["width"], in_channels=s["channels"]).attention,
    ),
    Case(
        ksanc.TaskDrivenEstimators,
        {"descriptor": "rows", "maps": "maps"},
        dtypes=_F32,
        make=lambda s: _listed(_estimators(s), "descriptor", "maps"),
    ),
    Case(
        ksanc.LogitDiscriminator,
        {"teacher": "logits", "student": "logits"},
        dtypes=_F32,
        make=lambda s: ksanc.LogitDiscriminator(s["classes"], hidden=3),
    ),
    Case(
        ksanc.weight_penalty,
        {"first": "rows", "second": "maps"},
        names=("parameters",),
        make=lambda _: lambda first, second: ksanc.weight_penalty([first, second]),
    ),
    Case(logit_regression.logit_statistics, {"logits": "logits"}, constant=frozenset({"logits"})),
    Case(
        logit_regression.logit_regression_loss,
        {"student": "logits", "teacher": "logits", "mean": "statistic", "std": "deviation"},
        make=lambda _: (
            lambda student, teacher, mean, std: logit_regression.logit_regression_loss(
                student, teacher, statistics=logit_regression.LogitStatistics(mean, std)
            )
        ),
        constant=frozenset({"teacher"}),
        names=("statistics",),
    ),
    Case(
        logit_regression.FactorizedLinear,
        {"inputs": "rows"},
        dtypes=_F32,
        make=lambda s: logit_regression.FactorizedLinear(s["width"], 3, 2),
    ),
    Case(noisy_kd.averaged_logits, {"answers": "answers of members"}),
    Case(
        noisy_kd.add_noise,
        {"images": "images"},
        make=lambda _: partial(noisy_kd.add_noise, sigma=0.1, generator=_generator()),
    ),
    Case(
        noisy_kd.corrupt_labels,
        {"labels": "labels"},
        make=lambda s: partial(
            noisy_kd.corrupt_labels, rate=0.5, classes=s["classes"] + 1, generator=_generator()
        ),
    ),
    *(
        Case(pkt.conditional_probabilities, {"features": "rows"}, {"kernel": kernel})
        for kernel in ("cosine", "gaussian")
    ),
    *(
        Case(function, {"features": "rows", "labels": "labels"}, {"kernel": kernel})
        for function in (qmi.information_potentials, qmi.quadratic_mutual_information)
        for kernel in ("cosine", "gaussian")
    ),
    Case(
        qmi.quadratic_mutual_information,
        {"features": "rows", "labels": "labels"},
        make=lambda s: partial(qmi.quadratic_mutual_information, classes=s["classes"], bandwidth=2.0),
    ),
    Case(qmi.biased_hsic, {"kernel": "square", "other": "square"}),
    Case(qmi.mean_squared_distance, {"features": "rows"}),
    *(
        Case(
            quest.fit_vocabulary,
            {"features": "wide maps"},
            make=lambda _, method=method: partial(
                quest.fit_vocabulary, words=1, generator=_generator(), method=method, iterations=2
            ),
        )
        for method in ("lloyd", "minibatch")
    ),
    Case(quest.soft_assignment, {"features": "maps", "vocabulary": "vocabulary"}, {"beta": 0.5}),
    Case(quest.nearest_word, {"features": "maps", "vocabulary": "vocabulary"}),
    Case(quest.mean_largest_assignment, {"features": "maps", "vocabulary": "vocabulary"}, {"beta": 0.5}),
    Case(
        quest.propose_beta,
        {"features": "maps", "vocabulary": "vocabulary"},
        {"mean_largest": 0.9},
        refuses="words that stand twice",
    ),
    Case(
        quest.AssignmentPredictor, _MAPS, make=lambda s: quest.AssignmentPredictor(s["channels"], s["words"])
    ),
    Case(
        quest.quest_loss,
        {"student": "maps", "teacher": "wide maps", "vocabulary": "words"},
        make=lambda _: (
            lambda student, teacher, vocabulary: quest.quest_loss(
                [student] * 2, [teacher] * 2, [vocabulary] * 2, tau=(1.0, 2.0)
            )
        ),
        constant=frozenset({"teacher", "vocabulary"}),
    ),
    Case(
        structured_kd.HolisticDiscriminator,
        {"maps": "large maps", "images": "images"},
        dtypes=_F32,
        normalises=True,
        make=lambda s: structured_kd.HolisticDiscriminator(
            s["channels"], image_channels=s["colours"], width=2, blocks=1, attention=1
        ),
    ),
    Case(
        structured_kd.gradient_penalty,
        {"student": "maps", "teacher": "maps", "shares": "shares"},
        dtypes=_F32,
        make=lambda _: partial(structured_kd.gradient_penalty, _Judge()),
        constant=frozenset({"student", "teacher"}),
    ),
    Case(
        structured_kd.discriminator_objective,
        {"student": "large maps", "teacher": "large maps", "images": "images", "shares": "shares"},
        dtypes=_F32,
        make=lambda s: partial(
            structured_kd.discriminator_objective,
            structured_kd.HolisticDiscriminator(
                s["channels"], image_channels=s["colours"], width=2, blocks=1, attention=1
            ),
        ),
        names=("maps",),
        constant=frozenset({"student", "teacher"}),
    ),
]

# Public names without a tensor among their arguments.
NO_TENSORS = {
    "numbers only": {
        "ab_layer_weights", "peers", "transforms", "Transform", "temperature_schedule", "teacher_weight",
        "factor_channels", "phases", "condensed_size", "strengths",
    },
    "a named tuple or data class that holds what a function found": {
        "Phase", "EntropyMap", "ConceptCounts", "ConceptMetrics", "Uncertainty", "Partition", "InformationPotentials",
        "RetrievalScores", "NoiseExpansion", "LogitStatistics",
    },
    "networks, whose batches a training checks": {"train_afd", "fickle_teacher"},
}  # fmt: skip


def public_names() -> set[str]:
    """What ``kdrefs`` exports, and every public function and class of the modules of losses and estimators."""
    modules = [divergences, kernels, metrics, noise, pair_sums]
    modules += [import_module(f"kdrefs.methods.{one.name}") for one in iter_modules(kdrefs.methods.__path__)]
    found = {
        name
        for module in modules
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not module.__name__.rpartition(".")[2].startswith("_")
    }
    return found | set(kdrefs.__all__) - {"__version__"}
