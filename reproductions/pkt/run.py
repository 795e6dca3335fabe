"""The PKT experiments: transfer of a representation, measured by retrieval.

``reproduce run pkt`` (quick, digits, under a minute) · ``reproduce run pkt --profile standard`` (CIFAR-10, about two
hours on two CPU cores) · ``reproduce run pkt --profile paper --device cuda`` (the published recipe).

Three questions, each a *setting* of the plan, and PKT's row in the table that all methods share (``<data>-table``):

- ``<data>``: does PKT give a better representation than the student alone, KD and hints, as the paper's table says?
- ``<data>-10pct``: the same when the student saw labels of a tenth of the images only.
- ``<data>-hog``: can hand-crafted features teach a network, without any label or trained teacher?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdrefs.data.cache import Split
from kdrefs.methods.pkt import pkt_loss
from kdrefs.metrics import accuracy, linear_probe_accuracy, retrieval
from kdrefs.training import whole_batch
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.protocols import classification, embeddings
from reproductions.protocols.embeddings import Config, setting_of, trained
from reproductions.protocols.handcrafted import fixed_features
from reproductions.protocols.pairs import PAIRS, load_pair_data, make_batches, representations
from reproductions.protocols.rows import Method, feature_of, labels_and

COLUMN = "pkt"
TITLE = "Probabilistic Knowledge Transfer"
PAPER = "passalis2018pkt"

METRICS = {
    "map": Metric(unit="%", format=".1f", title="mAP", delta=1.0),
    "map_official": Metric(
        unit="%", format=".1f", title="mAP as the authors' evaluator computes it", delta=1.0
    ),
    "map_11pt": Metric(unit="%", format=".1f", title="11-point interpolated mAP", delta=1.0),
    "p1": Metric(unit="%", format=".1f", title="precision at 1", delta=1.0),
    "p10": Metric(unit="%", format=".1f", title="precision at 10", delta=1.0),
    "p100": Metric(unit="%", format=".1f", title="precision at 100", delta=1.0),
    "probe": Metric(unit="%", format=".1f", title="linear-probe accuracy", delta=1.0),
    "accuracy": Metric(unit="%", format=".1f", title="classification accuracy", delta=1.0),
    "agreement": classification.METRICS["agreement"],
    "cross_entropy": classification.METRICS["cross_entropy"],
}

ROWS = ("pkt",)  # of the shared table
TABLE = "-table"  # how the data of its runs end
ROW_WEIGHT = 30_000.0  # of the authors' loss, HobbitLong/RepDistiller@b84f547

PROFILES = embeddings.PROFILES


def plan(config: Config) -> list[Run]:
    """Every run of a profile in order of execution: setting by setting, arm by arm, seed by seed.

    Arms that nothing random enters (raw pixels, HoG, a committed teacher) run once.
    """
    once = {"pixels", "hog"} | ({"teacher"} if PAIRS[config.pair].teacher_weights else set())
    runs = [
        Run(column=COLUMN, profile=config.profile, data=setting.data, arm=arm, seed=seed)
        for setting in config.settings
        for arm in setting.arms
        for seed in (config.seeds[:1] if arm in once else config.seeds)
    ]
    return runs + (classification.plan(COLUMN, shared(config)) if config.table else [])


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What of a profile decides a run's values: the shared table's recipe, or all the rest."""
    if run.data.endswith(TABLE):
        return classification.relevant_config(run, shared(config))
    return embeddings.relevant_config(config)


def together(run: Run, config: Config, device: str) -> str | None:
    """Runs of the shared table may share a training."""
    return classification.together(run, shared(config), device) if run.data.endswith(TABLE) else None


def execute_together(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
    """Train the shared table's row for several seeds in one."""
    methods = {"pkt": row(runs[0].data)}
    return classification.execute_together(runs, shared(config), context, methods, __name__)


def shared(config: Config) -> classification.Config:
    """The profile's part of the shared table, with the profile's seeds."""
    assert config.table is not None
    return replace(config.table, seeds=config.seeds)


def row(data: str) -> Method:
    """PKT beside the labels, between the layers before their classifiers, as in RepDistiller."""
    pair = PAIRS[{"digits-table": "digits", "cifar10-table": "cifar10-small"}[data]]
    student, guide = pair.student.feature, pair.teacher.feature
    return labels_and(
        ROW_WEIGHT,
        lambda output, targets: pkt_loss(
            whole_batch(output.features[student]), whole_batch(targets[guide]), variant="official"
        ),
        {guide: feature_of(guide)},
    )


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """Train what the run needs and evaluate it: its representation, or its predictions in the shared table."""
    if run.data.endswith(TABLE):
        return execute_together([run], config, context)[0]
    setting = setting_of(run, config)
    train, test, _ = load_pair_data(PAIRS[config.pair], probe=context.max_steps is not None)
    if run.arm in ("pixels", "hog"):
        database, queries = fixed_features(run.arm, config.hog_cell, PAIRS[config.pair], context, train, test)
        return _scores(database, queries, train, test)
    module, feature = trained(run, config, context)
    pair = PAIRS[config.pair]
    sides = [
        representations(module, make_batches(pair, split, device=context.device, training=False), feature)
        for split in (train, test)
    ]
    scores = _scores(sides[0][feature], sides[1][feature], train, test)
    if run.arm in ("teacher", "student") or (run.arm == "kd" and not setting.handcrafted):
        scores["accuracy"] = 100 * accuracy(sides[1]["logits"].cpu(), torch.from_numpy(test.labels).long())
    return scores


def _scores(database: Tensor, queries: Tensor, train: Split, test: Split) -> dict[str, float]:
    """Retrieval of same-class training images by test images, and a linear probe, on the same features."""
    labels, wanted = torch.from_numpy(train.labels).long(), torch.from_numpy(test.labels).long()
    found = retrieval(queries, database, wanted, labels, at=(1, 10, 100))
    official = retrieval(queries, database, wanted, labels, at=(1, 10, 100), variant="official")
    return {
        "map": 100 * found.mean_average_precision,
        "map_official": 100 * official.mean_average_precision,
        "map_11pt": 100 * found.eleven_point,
        "p1": 100 * found.precision[1],
        "p10": 100 * found.precision[10],
        "p100": 100 * found.precision[100],
        "probe": 100 * linear_probe_accuracy(database, labels, queries, wanted),
    }
