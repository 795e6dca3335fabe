"""A training recipe in words, line by line, made from the dataclasses that the runs are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kdrefs.data.batches import Augment
from reproductions.protocols.joint import Training
from reproductions.protocols.pairs import PAIRS, Net, Pair, Recipe, weights_digest

Line = tuple[str, str]


def recipe_lines(training: Training, seeds: Sequence[int]) -> Iterator[Line]:
    """Yield what the rows of a table share: the name of each part and what it is, in Markdown.

    Args:
        training: The table's recipe.
        seeds: Of the profile that runs it.
    """
    pair = PAIRS[training.pair]
    yield "Images", f"{pair.data}, {augmentation(pair.augment)}; {normalisation(pair)}"
    yield "Teacher", teacher(pair)
    yield "Student", network(training.student or pair.student)
    if training.views is None:
        yield "Views", "new ones in every epoch; the teacher is asked on every batch"
    else:
        fixed = (
            "1, the same in every epoch" if training.views == 1 else f"{training.views}, fixed and in turn"
        )
        yield "Views", f"{fixed}; the teacher is asked once for each"
    yield "Epochs", str(training.epochs)
    yield from optimisation(training, str(training.rate))
    changes = "initial weights and batch order"
    if pair.teacher_weights is None:
        changes += ", and the teacher"
    yield "Seeds", f"{len(seeds)} ({', '.join(map(str, seeds))}), each with its own {changes}"
    if pair.teacher_weights is None:
        yield "Intervals", "over students and teachers"
    else:
        yield "Intervals", "over students, given this teacher"
    yield "Reported", "the last epoch; none is chosen"


def optimisation(recipe: Training | Recipe, rates: str) -> Iterator[Line]:
    """Yield the lines that a student's training and a supervised one have in common."""
    name = "Adam"
    if recipe.optimizer == "sgd":
        name = "SGD, momentum 0.9" + (", Nesterov" if recipe.nesterov else "")
    yield "Batch size", str(recipe.batch_size)
    yield "Optimiser", f"{name}, weight decay {recipe.weight_decay:g}"
    yield "Learning rate", f"{rates}, {schedule(recipe)}"
    precision = {"float32": "float32", "bf16": "bfloat16 where autocast allows it"}
    yield "Precision", precision[recipe.precision]


def schedule(recipe: Training | Recipe) -> str:
    """What becomes of the learning rate."""
    if recipe.milestones is not None:
        return (
            f"divided by 10 at the start of epochs {', '.join(map(str, recipe.milestones))}, counted from 0"
        )
    if recipe.optimizer == "adam" and isinstance(recipe, Recipe):
        return "constant within a stage"
    return "reached over the first eighth of the steps, then down to 0 in a straight line"


def teacher(pair: Pair) -> str:
    """The teacher and where its weights come from."""
    if pair.teacher_weights is not None:
        digest = weights_digest(pair) or "not there"
        return (
            f"{network(pair.teacher)}; committed weights `{pair.teacher_weights}`, SHA-256 `{digest[:16]}…`"
        )
    recipe = pair.teacher_recipe
    epochs = " + ".join(str(epochs) for epochs, _ in recipe.stages)
    rates = " then ".join(f"{rate:g}" for _, rate in recipe.stages)
    parts = [f"{name.lower()} {text}" for name, text in optimisation(recipe, rates)]
    return (
        f"{network(pair.teacher)}; trained on the labels for each seed: {epochs} epochs, {'; '.join(parts)}"
    )


def network(net: Net) -> str:
    """A network and its options."""
    options = ", ".join(f"{name} {value}" for name, value in net.options.items())
    return f"`{net.name}`" + (f" ({options})" if options else "")


def augmentation(augment: Augment) -> str:
    """What is done to a training image."""
    parts = ["random flips"] if augment.flip else []
    parts += [f"random crops after {augment.crop} pixels of padding"] if augment.crop else []
    return " and ".join(parts) or "not augmented"


def normalisation(pair: Pair) -> str:
    """What is subtracted from the channels, and what they are divided by."""
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (pair.mean, pair.std))
    return f"mean {mean}, standard deviation {std}"
