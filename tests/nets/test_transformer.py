"""The transformer: its layers against torch's own, padding, copied layers, BERT's weights."""

import pytest
import torch
from torch import nn

from kdrefs.nets.transformer import Transformer, from_bert
from kdrefs.training import Members

TOKENS = torch.tensor([[1, 5, 4, 0, 0], [1, 2, 3, 4, 5]])


def small(depth: int = 2, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(8, 3, width=16, heads=2, depth=depth, feedforward=24, length=5).eval()


def torch_layer(layer: nn.Module) -> nn.TransformerEncoderLayer:
    """PyTorch's encoder layer with the same weights."""
    other = nn.TransformerEncoderLayer(
        16, 2, 24, dropout=0.0, activation="gelu", batch_first=True, layer_norm_eps=1e-12
    )
    joined = [layer.query, layer.key, layer.value]
    weights = {
        "self_attn.in_proj_weight": torch.cat([part.weight for part in joined]),
        "self_attn.in_proj_bias": torch.cat([part.bias for part in joined]),
    }
    names = {
        "self_attn.out_proj": layer.output, "norm1": layer.norm, "linear1": layer.expand,
        "linear2": layer.contract, "norm2": layer.norm_feedforward,
    }  # fmt: skip
    for name, part in names.items():
        weights |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    other.load_state_dict(weights)
    return other.train()  # the path without fused kernels


def test_layers_are_those_of_torch():
    network = small()
    features = network(TOKENS, TOKENS != 0).features
    states = network.norm(network.tokens(TOKENS) + network.positions.weight)
    for number, layer in enumerate(network.layers, start=1):
        states = torch_layer(layer)(states, src_key_padding_mask=TOKENS == 0)
        kept = TOKENS != 0
        torch.testing.assert_close(features[f"layer{number}"][kept], states[kept], rtol=1e-4, atol=1e-5)


def test_attention_is_the_softmax_of_the_scores_over_tokens():
    network = small()
    output = network(TOKENS, TOKENS != 0)
    for number in (1, 2):
        scores, attention = (output.features[f"{name}{number}"] for name in ("scores", "attention"))
        assert scores.shape == attention.shape == (2, 2, 5, 5)
        assert attention[0, :, :, 3:].max() == 0
        torch.testing.assert_close(attention[0, :, :, :3], scores[0, :, :, :3].softmax(-1))
    assert output.logits.shape == (2, 3)
    assert output.features["layer2"].shape == (2, 5, 16)


def test_padding_changes_nothing():
    network = small()
    alone = network(TOKENS[:1, :3])
    padded = network(TOKENS[:1], TOKENS[:1] != 0)
    other = network(TOKENS[:1].masked_fill(TOKENS[:1] == 0, 7), TOKENS[:1] != 0)
    torch.testing.assert_close(padded.logits, alone.logits)
    torch.testing.assert_close(other.logits, alone.logits)
    assert not torch.allclose(network(TOKENS[:1]).logits, alone.logits)


def test_layers_are_copied_in_order():
    teacher, student = small(depth=4), small(depth=2, seed=1)
    student.copy_layers(teacher, (2, 4))
    for own, number in zip(student.layers, (2, 4), strict=True):
        for name, value in own.state_dict().items():
            assert torch.equal(value, teacher.layers[number - 1].state_dict()[name])
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)
    same = small(depth=4, seed=2)
    same.copy_layers(teacher, (1, 2, 3, 4))
    assert torch.equal(same(TOKENS).logits, teacher(TOKENS).logits)
    for layers in ((1,), (0, 1), (1, 5)):
        with pytest.raises(ValueError, match="layers must be 2 numbers from 1 to 4"):
            student.copy_layers(teacher, layers)


def test_members_are_the_networks():
    networks = [small(seed=seed) for seed in (0, 1)]
    output = Members(networks)(torch.stack([TOKENS, TOKENS.flip(0)]), torch.ones(2, 2, 5, dtype=torch.bool))
    torch.testing.assert_close(output.logits[0], networks[0](TOKENS).logits)
    torch.testing.assert_close(output.logits[1], networks[1](TOKENS.flip(0)).logits)


def bert_weights(network: Transformer) -> dict[str, torch.Tensor]:
    """The network under the names of the transformers library, with two segments."""
    names = {
        "tokens": "embeddings.word_embeddings", "norm": "embeddings.LayerNorm", "pooler": "pooler.dense",
        "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
        "output": "attention.output.dense", "expand": "intermediate.dense", "contract": "output.dense",
        "norm_feedforward": "output.LayerNorm",
    }  # fmt: skip
    segments = torch.randn(2, 16, generator=torch.Generator().manual_seed(5))
    found = {
        "embeddings.position_embeddings.weight": network.positions.weight - segments[0],
        "embeddings.token_type_embeddings.weight": segments,
    }
    for name, value in network.state_dict().items():
        *path, kind = name.split(".")
        if path[0] == "layers":
            part = {"norm": "attention.output.LayerNorm"}.get(path[2], names[path[2]])
            found[f"encoder.layer.{path[1]}.{part}.{kind}"] = value
        elif path[0] in names:
            found[f"{names[path[0]]}.{kind}"] = value
    return {name: value.detach() for name, value in found.items()}


def test_bert_s_weights_give_bert_s_states():
    network = small()
    found = from_bert(bert_weights(network), heads=2, classes=7, length=4)
    assert (found.length, found.classifier.out_features) == (4, 7)
    ours, theirs = (module(TOKENS[:, :4], TOKENS[:, :4] != 0) for module in (network, found.eval()))
    torch.testing.assert_close(ours.features["layer2"], theirs.features["layer2"])
    torch.testing.assert_close(ours.features["pooled"], theirs.features["pooled"])
    weights = bert_weights(network)
    del weights["encoder.layer.1.output.dense.bias"]
    with pytest.raises(ValueError, match=r"weights: no tensor 'encoder\.layer\.1\.output\.dense\.bias'"):
        from_bert(weights, heads=2, classes=7, length=4)


def test_errors_name_the_argument():
    network = small()
    with pytest.raises(ValueError, match="heads must divide width 16, got 3"):
        Transformer(8, 3, width=16, heads=3)
    with pytest.raises(ValueError, match="depth must be a positive integer, got 0"):
        Transformer(8, 3, depth=0)
    with pytest.raises(ValueError, match=r"tokens must have shape \(B, 1 to 5\), got \(2, 6\)"):
        network(torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask must have the shape of tokens \(2, 5\), got \(2, 4\)"):
        network(TOKENS, torch.ones(2, 4))
