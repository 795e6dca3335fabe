"""Batch normalisation folded into the layer before it, for networks that are no longer trained.

A frozen teacher normalises with fixed statistics, which is an affine map per channel. Behind a convolution it only
rescales the filters and shifts the bias, so that a forward pass has one operation less for each of them.

>>> import torch
>>> from kdrefs.nets import build
>>> from kdrefs.nets.fold import fold_batchnorm
>>> teacher = build("resnet8").eval()
>>> fast = fold_batchnorm(teacher)
>>> images = torch.randn(2, 3, 32, 32)
>>> torch.allclose(fast(images).logits, teacher(images).logits, atol=1e-5)
True
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from kdrefs.nets.output import check_images

_Module = TypeVar("_Module", bound=nn.Module)

# Exactly these: a subclass, or a layer with a parametrisation, may compute something else.
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batchnorm(module: _Module) -> _Module:
    r"""Copy a network for evaluation, with every batch normalisation that follows a layer folded into that layer.

    .. math:: W' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} W, \qquad
              b' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} (b - \mu) + \beta

    with the running statistics :math:`\mu, \sigma^2`. The copy computes the same values to rounding, features
    included, with the same ``forward``; a normalisation that was folded passes on its input.
    :func:`normalised_layers` says which are: all of them in ``CifarResNet``, ``TinyCNN`` and ``SmallCNN``; in the
    pre-activation networks (``PreActResNet18``, ``WideResNet``) the second one of each block and that of a stem
    which nothing else sees, while those that normalise a residual sum stay as they are.

    Args:
        module: A network that ``torch.fx`` can trace; it is left as it is.

    Returns:
        A copy in eval mode whose parameters do not require gradients. It is not meant to be trained.

    Raises:
        ValueError: If the network cannot be traced.
    """
    folded = copy.deepcopy(module).eval().requires_grad_(False)
    for norm_name, layer_name in normalised_layers(folded).items():
        layer: Any = folded.get_submodule(layer_name)
        norm: Any = folded.get_submodule(norm_name)
        layer.weight, layer.bias = fuse_conv_bn_weights(
            layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        folded.set_submodule(norm_name, _Rows() if isinstance(layer, nn.Linear) else nn.Identity())
    return folded.eval()


def normalised_layers(module: nn.Module) -> dict[str, str]:
    """Find the batch normalisations that :func:`fold_batchnorm` folds.

    Those are the ones with running statistics whose input is the output of a convolution or linear layer that
    nothing else sees. Modules that are used more than once, or have hooks, are left out.

    Returns:
        Path of a normalisation -> path of the layer before it.

    Raises:
        ValueError: If the network cannot be traced.
    """
    try:
        # What checks the images looks at their shape, which a traced value does not have.
        nodes = fx.Tracer(autowrap_functions=(check_images,)).trace(module).nodes
    except Exception as error:
        raise ValueError(f"module: {type(module).__name__} cannot be traced by torch.fx: {error}") from error
    uses = Counter(str(node.target) for node in nodes if node.op == "call_module")
    # A parameter that is read directly, as by a penalty on its norm, must keep its value.
    uses.update(str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr")
    pairs = {}
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        norm, layer = str(node.target), str(before.target)
        once = uses[norm] == uses[layer] == 1
        if once and _can_fold(module.get_submodule(layer), module.get_submodule(norm)):
            pairs[norm] = layer
    return pairs


class _Rows(nn.Module):
    """Stands for a normalisation behind a linear layer, which has normalised another dimension if not of rows."""

    def forward(self, rows: Tensor) -> Tensor:
        """Return ``rows``."""
        if rows.ndim != 2:
            raise ValueError(
                f"a folded linear layer takes (batch, features), got {tuple(rows.shape)} behind it"
            )
        return rows


def _can_fold(layer: Any, norm: Any) -> bool:
    if type(layer) not in _LAYERS or type(norm) not in _NORMS:
        return False
    channels = layer.out_features if type(layer) is nn.Linear else layer.out_channels
    hooks = any(part._forward_hooks or part._forward_pre_hooks for part in (layer, norm))
    return norm.running_mean is not None and norm.num_features == channels and not hooks
