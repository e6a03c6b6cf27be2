"""Tiny random models and a tokenizer of bytes, in the hub's layout, for the tests of whatever wraps `transformers` models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from unisonde.models.trace import LayerStates, Stack, hooked

SIZE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
GROUPED = SIZE | {"num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "vocab_size": 320, "bos_token_id": 256, "eos_token_id": 257}
IDS = {"vocab_size": 320, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}

CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", GROUPED),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 3}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}),
    "phi": ("PhiConfig", SIZE),
    "phi3": ("Phi3Config", GROUPED),
    "gemma": ("GemmaConfig", GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", GROUPED | {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", GROUPED | {"head_dim": 8, "sliding_window": 8}),
    "gpt2": ("GPT2Config", GPT),
    "gpt-neox": ("GPTNeoXConfig", SIZE),
    "gpt-j": ("GPTJConfig", GPT | {"rotary_dim": 4}),
    "opt": ("OPTConfig", SIZE | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "opt-post-norm": ("OPTConfig", SIZE | {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": ("BloomConfig", IDS | {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "falcon": ("FalconConfig", IDS | {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}),
    "mpt": ("MptConfig", IDS | {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 256}),
    "olmo2": ("Olmo2Config", GROUPED),
    "lfm2": ("Lfm2Config", GROUPED | {"layer_types": ["conv", "full_attention", "conv"]}),
    "mamba": ("MambaConfig", IDS | {"hidden_size": 32, "num_hidden_layers": 3}),
}


def causal(family: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny causal language model. At weights of the published scale, 0.02, three layers this narrow hardly change a state."""
    name, settings = CAUSAL[family]
    torch.manual_seed(seed)
    network = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**(settings | changes)))
    return enliven(network, seed)


def enliven(network: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.12, generator=generator)
    return network.eval()


def byte_tokenizer(special: Sequence[str] = (), template: str | None = None, bos: bool = False) -> Any:
    """Bytes 0..255, `<s>` 256, `</s>` 257, then the special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: k for k, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"extra_special_tokens": list(special)})
    if bos:
        from tokenizers.processors import TemplateProcessing

        fast.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    fast.chat_template = template
    return fast


class Kept:
    """An observer that keeps everything: `states[item, layer]`, one pass a step."""

    def __init__(self) -> None:
        self.seen: list[LayerStates] = []

    def __call__(self, seen: LayerStates) -> None:
        self.seen.append(seen)

    @property
    def states(self) -> dict[tuple[int, int], Tensor]:
        return {(s.item, s.layer): s.states for s in self.seen}

    def spans(self, item: int = 0) -> tuple:
        return next(s.spans for s in self.seen if s.item == item)


@contextmanager
def generation_states(stack: Stack) -> Iterator[dict[int, list[Tensor]]]:
    """What every layer gives in every pass inside, in order: layer -> tensors (B, n, d)."""
    passes: dict[int, list[Tensor]] = {}
    with hooked(stack, lambda layer, output: passes.setdefault(layer, []).append(output.detach().clone())):
        yield passes
