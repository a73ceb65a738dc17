"""Vision, audio and encoder models of transformers through from_pretrained: compress, save, reload, the same bits."""

from pathlib import Path

import pytest
import torch
from helpers import relative_error
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_hyper import HyperConfig
from hf_hyper.nn import HyperEmbedding
from hf_hyper.nn.replace import hyper_modules
from hf_hyper.pipeline.report import summarize

IMAGE = {"pixel_values": (2, 3, 64, 64)}


def whisper() -> WhisperForConditionalGeneration:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "d_model": 64, "vocab_size": 120, "num_mel_bins": 20}
    tokens = {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    lengths = {"max_source_positions": 30, "max_target_positions": 20}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens, **lengths))


def bert() -> BertForMaskedLM:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 200}
    return BertForMaskedLM(BertConfig(hidden_size=64, max_position_embeddings=64, **sizes))


def vit() -> ViTForImageClassification:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return ViTForImageClassification(ViTConfig(image_size=64, patch_size=16, num_labels=32, **sizes))


def resnet() -> ResNetForImageClassification:
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_labels=32, **sizes))


def mobilenet() -> MobileNetV2ForImageClassification:
    return MobileNetV2ForImageClassification(MobileNetV2Config(image_size=64, depth_multiplier=0.35, num_labels=32))


ZOO = {
    "mobilenet": (mobilenet, IMAGE),
    "resnet": (resnet, IMAGE),
    "vit": (vit, IMAGE),
    "whisper": (whisper, {"input_features": (1, 20, 60), "decoder_input_ids": (1, 7)}),
    "bert": (bert, {"input_ids": (2, 11)}),
}


@torch.no_grad()
def logits(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randint(3, 100, shape, generator=generator)
        if name.endswith("ids")
        else torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    return model.eval()(**inputs).logits


@pytest.mark.parametrize("options", [{"bits": 5}, {"bits": 6.5, "hyperfunction": "winding"}], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_model_survives_compression_saving_and_loading(name: str, options: dict, tmp_path: Path) -> None:
    make, inputs = ZOO[name]
    original = make().eval()
    original.save_pretrained(tmp_path / "original")
    config = HyperConfig(**options, compress_embeddings=True, modules_to_not_convert=[])
    load = type(original).from_pretrained
    model = load(tmp_path / "original", quantization_config=config, dtype=torch.float32)
    kinds = {type(layer).__name__ for _, layer in hyper_modules(model)}
    assert "HyperLinear" in kinds
    wanted = {"whisper": "HyperConv1d", "bert": "HyperEmbedding"}.get(name, "HyperConv2d")
    assert wanted in kinds
    left = [type(m) for m in model.modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d)]
    assert len(left) <= 5, left
    assert model.dtype == torch.float32
    got = logits(model, inputs)
    assert relative_error(got, logits(original, inputs)) < 0.2
    model.save_pretrained(tmp_path / "compressed")
    again, info = load(tmp_path / "compressed", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again, inputs), got)
    report = summarize(tmp_path / "compressed")
    assert {record.name for record in report.tensors} == {name for name, _ in hyper_modules(model)}
    assert report.compressed_weights == sum(layer.layout.num_weights for _, layer in hyper_modules(model))
    plain = again.dequantize()
    assert relative_error(logits(plain, inputs), got) < 1e-4


def test_embeddings_tied_to_the_head_stay(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    config = HyperConfig(bits=4, compress_embeddings=True)
    model = BertForMaskedLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    kept = model.get_submodule("bert.embeddings.word_embeddings")
    assert not isinstance(kept, HyperEmbedding)
    assert kept.weight is model.get_submodule("cls.predictions.decoder").weight
    assert isinstance(model.get_submodule("bert.embeddings.position_embeddings"), HyperEmbedding)


def test_pruned_checkpoint_keeps_its_zeros(tmp_path: Path) -> None:
    original = vit()
    with torch.no_grad():
        for module in original.modules():
            if isinstance(module, nn.Linear):
                module.weight[
                    module.weight.abs() < module.weight.abs().flatten().kthvalue(module.weight.numel() * 3 // 4).values
                ] = 0
    original.save_pretrained(tmp_path / "original")
    load = ViTForImageClassification.from_pretrained
    model = load(tmp_path / "original", quantization_config=HyperConfig(bits=4), dtype=torch.float32)
    for name, layer in hyper_modules(model):
        weight = original.get_submodule(name).weight
        if isinstance(original.get_submodule(name), nn.Linear):
            assert torch.equal(layer.weight == 0, weight == 0)
            assert layer.bits_per_weight < 3.4
    model.save_pretrained(tmp_path / "compressed")
    again = load(tmp_path / "compressed")
    assert torch.equal(logits(again, IMAGE), logits(model, IMAGE))
