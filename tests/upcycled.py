"""Mixtures of experts made of stories260K, so that their quality can be judged on real text."""

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

__all__ = ["upcycled"]


@torch.no_grad()
def upcycled(source: object, experts: int = 8, chosen: int = 2, difference: float = 0.3) -> PreTrainedModel:
    """A Mixtral whose experts are noisy copies of a Llama's MLP.

    Every expert's weights are those of the MLP plus Gaussian noise of `difference` times their standard deviation; the
    router is random, with a bias of scale towards the first experts, so that some are seen often and others rarely.

    Args:
        source: Folder of the Llama.
        experts: Experts of a layer.
        chosen: Experts a token.
        difference: How far experts are apart.
    """
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    same += ("bos_token_id", "eos_token_id", "head_dim")
    fields = {name: getattr(dense.config, name) for name in same}
    config = MixtralConfig(**fields, num_local_experts=experts, num_experts_per_tok=chosen)
    model = MixtralForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(1)
    model.load_state_dict({k: v for k, v in dense.state_dict().items() if ".mlp." not in k}, strict=False)
    for own, other in zip(model.model.layers, dense.model.layers, strict=True):
        mlp, bank = other.mlp, own.mlp.experts
        fused = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        for weight, target in ((fused, bank.gate_up_proj), (mlp.down_proj.weight, bank.down_proj)):
            noise = torch.randn(target.shape, generator=draw) * weight.std() * difference
            target.copy_(weight + noise)
        sizes = torch.linspace(2.0, 0.5, experts).unsqueeze(1) / config.hidden_size**0.5
        own.mlp.gate.weight.copy_(torch.randn(own.mlp.gate.weight.shape, generator=draw) * sizes)
    return model
