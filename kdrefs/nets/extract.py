"""Any traceable model, such as torchvision's, as a network with named features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdrefs.nets.output import Output


class FeatureNet(nn.Module):
    """Wrap ``model`` so that its forward returns :class:`Output` with the features asked for.

    Tracing is torchvision's (:mod:`torchvision.models.feature_extraction`); parameters and buffers are shared with
    ``model``, not copied. In-place activations are run out of place, because they would overwrite the
    pre-activations that are asked for: the ``inplace`` flags of the model's layers are switched off. (Tracing
    itself turns ``x += y`` into ``x = x + y``.)

    Args:
        model: A model that ``torch.fx`` can trace, called with one batch of images.
        layers: Feature name -> node of the traced model, for example
            ``{"layer4_pre": "layer4.1.add", "layer4": "layer4", "pool": "flatten"}``. A module's path stands for
            its output; ``torchvision.models.feature_extraction.get_graph_node_names`` lists all nodes.
        logits: Node of the class scores; ``None`` takes the model's output.

    Raises:
        ImportError: If torchvision is not installed.
        ValueError: If a node does not exist, or the output is another node in training than in evaluation.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, str], *, logits: str | None = None) -> None:
        super().__init__()
        try:
            from torchvision.models import feature_extraction
        except ImportError as error:
            raise ImportError("FeatureNet needs torchvision: pip install torchvision") from error
        train_nodes, eval_nodes = feature_extraction.get_graph_node_names(model)
        if logits is None:
            if train_nodes[-1] != eval_nodes[-1]:
                raise ValueError(
                    f"logits must be named: the output is {train_nodes[-1]!r} in training and "
                    f"{eval_nodes[-1]!r} in evaluation"
                )
            logits = train_nodes[-1]
        known = set(train_nodes) & set(eval_nodes)
        places = {f"layers[{name!r}]": node for name, node in layers.items()}
        for place, node in {**places, "logits": logits}.items():
            if not any(other == node or other.startswith(f"{node}.") for other in known):
                raise ValueError(f"{place} names no node of the model: {node!r}")
        # One node may serve two names, which torchvision's mapping node -> name cannot express.
        self.nodes = {**layers}
        self.logits = logits
        self.model = feature_extraction.create_feature_extractor(
            model, return_nodes={node: node for node in (*layers.values(), logits)}
        )
        _run_out_of_place(self.model)

    def forward(self, images: Tensor) -> Output:
        """Classify ``images`` as the model does."""
        values: dict[str, Tensor] = self.model(images)
        return Output(values[self.logits], {name: values[node] for name, node in self.nodes.items()})


def _run_out_of_place(extractor: Any) -> None:
    for layer in extractor.modules():
        if getattr(layer, "inplace", False) is True:
            layer.inplace = False
    for graph in (extractor.train_graph, extractor.eval_graph):
        for node in graph.nodes:
            if node.kwargs.get("inplace") is True:
                node.kwargs = {**node.kwargs, "inplace": False}
    # A change of mode makes the extractor compile the graph of that mode.
    training = extractor.training
    extractor.train(not training).train(training)
