"""Networks that return logits and named features, pre- and post-activation.

>>> from kdrefs.nets import build
>>> build("tiny_cnn", classes=10)  # doctest: +ELLIPSIS
TinyCNN(...)
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from kdrefs.nets.extract import FeatureNet
from kdrefs.nets.output import Output
from kdrefs.nets.resnet import (
    CifarResNet,
    PreActResNet18,
    resnet8,
    resnet8x4,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from kdrefs.nets.small import PlainCNN, SmallCNN, TinyCNN
from kdrefs.nets.wide_resnet import WideResNet

__all__ = [
    "CifarResNet",
    "FeatureNet",
    "Output",
    "PlainCNN",
    "PreActResNet18",
    "SmallCNN",
    "TinyCNN",
    "WideResNet",
    "build",
    "names",
    "resnet8",
    "resnet8x4",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet56",
    "resnet110",
]

_NETS: dict[str, Callable[..., nn.Module]] = {
    "tiny_cnn": TinyCNN,
    "small_cnn": SmallCNN,
    "plain_cnn": PlainCNN,
    "cifar_resnet": CifarResNet,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet8x4": resnet8x4,
    "resnet32x4": resnet32x4,
    "preact_resnet18": PreActResNet18,
    "wide_resnet": WideResNet,
}


def names() -> tuple[str, ...]:
    """The names that :func:`build` knows."""
    return tuple(_NETS)


def build(name: str, **options: Any) -> nn.Module:
    """Build a network by name, so that a configuration can hold it as text.

    Args:
        name: One of :func:`names`.
        options: Arguments of the network's constructor.

    Returns:
        A network whose ``forward`` returns :class:`Output`, initialised from torch's global generator.

    Raises:
        ValueError: If the name is unknown, or an option is out of range.
        TypeError: If the network has no such option.
    """
    if name not in _NETS:
        close = difflib.get_close_matches(name, _NETS, n=3) or sorted(_NETS)
        raise ValueError(
            f"name must be one of kdrefs.nets.names(), got {name!r}; did you mean {', '.join(close)}?"
        )
    return _NETS[name](**options)
