"""Any torch module: every kind of layer, pruning, saving, and what is left alone."""

import copy
import io

import pytest
import torch
from helpers import relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from hf_hyper import ConfigError, FormatError, HyperConfig, ShapeError, compress_module, load_module
from hf_hyper.nn import HyperEmbedding, HyperLayer, HyperLinear
from hf_hyper.nn.replace import hyper_modules

CONFIGS = [{"bits": 4}, {"bits": 6.5, "hyperfunction": "winding"}]
LAYERS = {
    "linear": (nn.Linear(48, 40), (3, 48)),
    "conv1d": (nn.Conv1d(16, 24, 5, stride=2, padding=2), (2, 16, 20)),
    "conv2d": (nn.Conv2d(16, 32, 3, padding="same", padding_mode="reflect", bias=False), (2, 16, 8, 8)),
    "grouped": (nn.Conv2d(32, 64, 3, groups=4, dilation=2), (2, 32, 8, 8)),
    "depthwise": (nn.Conv2d(96, 96, 3, groups=96, padding=1), (2, 96, 6, 6)),
    "pointwise": (nn.Conv2d(40, 24, 1), (2, 40, 5, 5)),
    "conv3d": (nn.Conv3d(8, 16, 3), (1, 8, 5, 5, 5)),
    "transposed1d": (nn.ConvTranspose1d(16, 24, 4, stride=2, output_padding=1), (2, 16, 9)),
    "transposed2d": (nn.ConvTranspose2d(32, 16, 2, stride=2, groups=2), (2, 32, 4, 4)),
    "transposed3d": (nn.ConvTranspose3d(16, 8, 2), (1, 16, 3, 3, 3)),
}


class UNet(nn.Module):
    """A little of what diffusers' UNets have: down, middle, up, skip, time embedding, group norm, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64))
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(8, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.up = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.last = nn.Conv2d(64, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = self.first(x)
        h = nn.functional.silu(self.norm(self.down(skip) + self.time(t)[:, :, None, None]))
        tokens = h.flatten(2).transpose(1, 2)
        h = h + self.attention(tokens, tokens, tokens)[0].transpose(1, 2).view_as(h)
        return self.last(torch.cat([self.up(h), skip], 1))


def save_and_load(model: nn.Module, skeleton: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save({"config": model.hyper_config.to_dict(), "state": model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    return load_module(skeleton, saved["state"], saved["config"])


@pytest.mark.parametrize("options", CONFIGS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name: str, options: dict) -> None:
    plain, shape = copy.deepcopy(LAYERS[name][0]), LAYERS[name][1]
    plain.requires_grad_(False)
    x = torch.randn(shape)
    wanted, weight = plain(x), plain.weight.clone()
    layer = compress_module(copy.deepcopy(plain), HyperConfig(**options)).requires_grad_(False)
    assert isinstance(layer, HyperLayer)
    assert isinstance(layer, type(plain))
    assert "weight" not in dict(layer.named_parameters())
    assert layer.weight.shape == weight.shape
    assert relative_error(layer.weight, weight) < (0.12 if options["bits"] == 4 else 0.03)
    assert relative_error(layer(x), wanted) < (0.15 if options["bits"] == 4 else 0.03)
    assert layer.bits_per_weight < 1.45 * options["bits"]
    again = save_and_load(layer, copy.deepcopy(plain))
    assert torch.equal(again(x), layer(x))
    restored = layer.restored(torch.float32).requires_grad_(False)
    assert type(restored) is type(plain)
    assert relative_error(restored(x), layer(x)) < 1e-5
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert torch.equal(layer.to(torch.float32).weight, again.weight)


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_a_whole_network(options: dict) -> None:
    net = UNet().eval()
    x, t = torch.randn(2, 3, 8, 8), torch.randn(2, 16)
    wanted, before = net(x, t), sum(p.nbytes for p in net.parameters())
    compressed = compress_module(copy.deepcopy(net), HyperConfig(**options))
    names = [name for name, _ in hyper_modules(compressed)]
    assert names == ["time.0", "time.2", "first", "down", "up", "last"]
    assert type(compressed.norm) is nn.GroupNorm
    assert relative_error(compressed(x, t), wanted) < (0.1 if options["bits"] == 4 else 0.03)
    assert sum(p.nbytes for p in compressed.parameters()) < before / 2
    again = save_and_load(compressed, UNet().eval())
    assert torch.equal(again(x, t), compressed(x, t))
    assert again.hyper_config.tensor_schemes == compressed.hyper_config.tensor_schemes


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_embeddings_decode_the_rows_that_are_asked_for(options: dict) -> None:
    plain = nn.Sequential(nn.Embedding(300, 72, padding_idx=0), nn.Linear(72, 32))
    wanted = plain[0].weight.detach().clone()
    left = compress_module(copy.deepcopy(plain), HyperConfig(**options))
    assert type(left[0]) is nn.Embedding
    model = compress_module(copy.deepcopy(plain), HyperConfig(**options, compress_embeddings=True))
    assert isinstance(model[0], HyperEmbedding)
    index = torch.tensor([[0, 299, 17], [128, 127, 17]])
    rows = model[0](index)
    torch.testing.assert_close(rows, model[0].weight[index], rtol=1e-5, atol=1e-5)
    assert relative_error(rows, wanted[index]) < (0.12 if options["bits"] == 4 else 0.03)
    assert torch.equal(save_and_load(model, copy.deepcopy(plain))(index), model(index))


@pytest.mark.parametrize("options", CONFIGS, ids=str)
@pytest.mark.parametrize("amount", [0.5, 0.9])
def test_pruned_networks_keep_their_zeros(options: dict, amount: float) -> None:
    net = UNet().eval()
    layers = [net.first, net.down, net.up, net.time[2]]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", amount)
    x, t = torch.randn(2, 3, 8, 8), torch.randn(2, 16)
    wanted = net(x, t)
    zeros = {name: net.get_submodule(name).weight == 0 for name in ("first", "down", "up", "time.2")}
    compress_module(net, HyperConfig(**options))
    for name, zero in zeros.items():
        layer = net.get_submodule(name)
        assert isinstance(layer, HyperLayer)
        assert (layer.weight[zero] == 0).all()
        assert int((layer.weight == 0).sum()) == int(zero.sum())
    assert relative_error(net(x, t), wanted) < (0.12 if options["bits"] == 4 else 0.03)
    assert net.down.bits_per_weight < (1 - amount) * options["bits"] + 1.2  # the mask takes at most one bit
    again = save_and_load(net, UNet().eval())
    assert torch.equal(again(x, t), net(x, t))


def test_pruning_and_compression_multiply() -> None:
    """The ratio of the paper's combined rows, 13.8 to 17.9 times below float32, at four fifths pruned."""
    layer = nn.Conv2d(128, 256, 3)
    prune.l1_unstructured(layer, "weight", 0.8)
    assert 32 / compress_module(layer, HyperConfig(bits=4)).bits_per_weight > 17.9


def test_what_is_left_alone() -> None:
    shared = nn.Linear(32, 32)
    tied = nn.Linear(32, 48)
    net = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(32),
            "tiny": nn.Linear(32, 2),
            "shared": nn.Sequential(shared, shared),
            "tied": tied,
            "other": nn.Linear(32, 48),
            "parametrized": parametrizations.weight_norm(nn.Linear(32, 32)),
            "limited": nn.Embedding(40, 32, max_norm=1.0),
            "named": nn.Linear(32, 32),
            "stored": nn.Linear(32, 32),
        }
    )
    net["other"].weight = tied.weight
    compress_module(net, HyperConfig(bits=4, modules_to_not_convert=["named"], compress_embeddings=True))
    assert [name for name, _ in hyper_modules(net)] == ["stored"]
    assert isinstance(net["stored"], HyperLinear)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="no layer of ReLU is left to compress"):
        compress_module(nn.ReLU(), HyperConfig(bits=4))
    model = compress_module(nn.Sequential(nn.Linear(32, 32)), HyperConfig(bits=4))
    with pytest.raises(ConfigError, match="compressed layers already"):
        compress_module(model, HyperConfig(bits=4))
    with pytest.raises(ConfigError, match="weight of a HyperLinear cannot be assigned"):
        model[0].weight = nn.Parameter(torch.zeros(32, 32))
    with pytest.raises(FormatError, match=r"names the compressed layer '0', which ReLU does not have"):
        load_module(nn.ReLU(), model.state_dict(), model.hyper_config)
    with pytest.raises(FormatError, match=r"0.codes is \(2, 2, 32\) of torch.int32, wanted \(4, 2, 32\)"):
        load_module(nn.Sequential(nn.Linear(32, 64)), model.state_dict(), model.hyper_config)
    broken = nn.Conv2d(16, 16, 3)
    with torch.no_grad():
        broken.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ShapeError, match="weight: nan"):
        compress_module(broken, HyperConfig(bits=4))


def test_gradients_reach_the_inputs() -> None:
    layer = compress_module(nn.Conv2d(16, 32, 3), HyperConfig(bits=4))
    x = torch.randn(1, 16, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
