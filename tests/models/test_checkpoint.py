"""Official checkpoints: renamed, split, read from any kind of file, strictly, and never more in memory than has to be."""

from __future__ import annotations

import argparse
import json
import re
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unisonde.models.parts.checkpoint import Keys, Rename, empty, fill, tensors_of, weight_files

KEYS = Keys(
    renames=(
        Rename(r"blocks\.(\d+)\.qkv\.(\w+)", (r"layers.\1.q.\2", r"layers.\1.k.\2", r"layers.\1.v.\2")),
        Rename(r"pos_embed", "positions.weight", squeeze=True),
        Rename(r"head\.(.+)", r"out.\1"),
        Rename(r"head\.weight", "never.reached"),
    ),
    ignored={r"counter": "of training", r"pool\..*": "never run"},
)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))


class Small(nn.Module):
    """Two layers, a position table, a head; a buffer that is stored, and one that is computed."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.positions = nn.Embedding(6, 4)
        self.embed = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        if tied:
            self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(2, dtype=torch.float64))
        self.register_buffer("frequencies", torch.arange(3.0), persistent=False)


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    held = {f"blocks.{k}.qkv.{name}": random(12, *rest) for k in range(2) for name, rest in (("weight", (4,)), ("bias", ()))}
    held |= {
        "pos_embed": random(1, 6, 4),
        "head.weight": random(5, 4),
        "embed.weight": random(5, 4),
        "scale": torch.tensor([2.0, 3.0]),
    }
    return held | {"counter": torch.tensor(7), "pool.weight": random(3)}


def filled(held: dict[str, Tensor], keys: Keys = KEYS, tied: bool = False, dtype: torch.dtype | None = None) -> Small:
    network = empty(lambda: Small(tied))
    fill(network, held.items(), keys, "cpu", dtype, "small")
    return network


# --------------------------------------------------------------------------------------------------------------------- tables


def test_names_splits_and_squeezed_dimensions() -> None:
    held = checkpoint()
    network = filled(held)
    query, key, value = held["blocks.1.qkv.weight"].split(4)
    layer = network.layers[1]
    for part, expected in ((layer.q, query), (layer.k, key), (layer.v, value)):
        assert torch.equal(part.weight, expected)
    assert torch.equal(layer.v.bias, held["blocks.1.qkv.bias"][8:])
    assert torch.equal(network.positions.weight, held["pos_embed"][0])
    assert torch.equal(network.out.weight, held["head.weight"])  # the first rule that matches counts
    assert torch.equal(network.embed.weight, held["embed.weight"])  # a key that no rule names keeps its name


def test_a_rule_matches_a_whole_key() -> None:
    assert KEYS.of("my.pos_embed") == (None, ("my.pos_embed",))
    assert KEYS.of("pos_embed.weight") == (None, ("pos_embed.weight",))
    assert KEYS.ignores("pool.a.b") and not KEYS.ignores("whirlpool.a") and not KEYS.ignores("counters")


def test_shapes_are_those_that_filling_gives() -> None:
    held = checkpoint()
    shapes = KEYS.shapes({key: tuple(tensor.shape) for key, tensor in held.items()})
    assert shapes == {key: tuple(tensor.shape) for key, tensor in filled(held).state_dict().items()}


def test_a_number_without_dimensions() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.zeros(()))

    network = empty(One)
    fill(network, [("logit_scale", torch.tensor(4.6))], Keys((Rename("logit_scale", "temperature"),)), "cpu", None, "one")
    assert network.temperature.item() == pytest.approx(4.6)


# ------------------------------------------------------------------------------------------------------------------ strictness


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h.pop("embed.weight"), "the checkpoint of small lacks embed.weight; it is not this model's, or not whole"),
        (lambda h: h.pop("scale"), "lacks scale;"),
        (lambda h: h.pop("blocks.0.qkv.bias"), "lacks layers.0.k.bias, layers.0.q.bias, layers.0.v.bias;"),
        (lambda h: [h.pop(key) for key in list(h)], "lacks embed.weight, layers.0.k.bias, .* and 12 more;"),
        (lambda h: h.update(extra=torch.zeros(1)), "has unknown extra;"),
        (lambda h: h.update(frequencies=torch.zeros(3)), "has unknown frequencies;"),  # computed: a stored copy may be rounded
        (lambda h: h.update(embed=torch.zeros(1)), "has unknown embed;"),
        (lambda h: h.update({"blocks.2.qkv.bias": torch.zeros(12)}), r"has unknown blocks\.2\.qkv\.bias;"),
        (lambda h: h.update({"head.weight": torch.zeros(4, 5)}), r"in another shape head\.weight \(4, 5\) instead of \(5, 4\)"),
        (lambda h: h.update({"embed.weight": torch.zeros(20)}), r"in another shape embed\.weight \(20,\) instead of \(5, 4\)"),
        (lambda h: h.update({"pos_embed": torch.zeros(2, 6, 4)}), r"in another shape pos_embed \(2, 6, 4\) instead of \(6, 4\)"),
        (
            lambda h: h.update({"blocks.0.qkv.bias": torch.zeros(13)}),
            r"in another shape blocks\.0\.qkv\.bias \(13,\) instead of \(4,\)",
        ),
        (
            lambda h: h.update({"blocks.0.qkv.bias": torch.zeros(15)}),
            r"in another shape blocks\.0\.qkv\.bias \(5,\) instead of \(4,\)",
        ),
        (
            lambda h: h.update({"blocks.0.qkv.bias": torch.zeros(())}),
            r"in another shape blocks\.0\.qkv\.bias \(\) instead of \(4,\)",
        ),
    ],
)
def test_what_does_not_fit_exactly_is_refused(change, said: str) -> None:
    held = checkpoint()
    change(held)
    with pytest.raises(ValueError, match=said):
        filled(held)


def test_what_a_family_says_the_checkpoint_lacks() -> None:
    held = checkpoint()
    del held["scale"]
    network = filled(held, Keys(KEYS.renames, KEYS.ignored, absent={"scale": "computed"}))
    assert network.scale.tolist() == [1.0, 1.0]


# ------------------------------------------------------------------------------------------------------------- tied, buffers


@pytest.mark.parametrize("stored", ["embed.weight", "head.weight", "both"])
def test_tied_parameters_stay_one(stored: str) -> None:
    held = checkpoint()
    if stored == "both":
        held["head.weight"] = held["embed.weight"].clone()
    else:
        del held[{"embed.weight": "head.weight", "head.weight": "embed.weight"}[stored]]
    network = filled(held, tied=True)
    assert network.out.weight is network.embed.weight and not network.out.weight.is_meta
    assert torch.equal(network.out.weight, held["head.weight" if stored == "head.weight" else "embed.weight"])


def test_a_tied_parameter_that_is_nowhere_is_missing() -> None:
    held = checkpoint()
    del held["embed.weight"], held["head.weight"]
    with pytest.raises(ValueError, match=r"lacks embed\.weight, out\.weight"):
        filled(held, tied=True)


def test_a_tied_head_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, tie_word_embeddings=True)
    held = {key: tensor for key, tensor in LlamaForCausalLM(config).state_dict().items() if key != "lm_head.weight"}
    network = empty(lambda: LlamaForCausalLM(config))
    fill(network, held.items(), Keys(), "cpu", None, "llama")
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert torch.isfinite(network(torch.tensor([[1, 2, 3]])).logits).all()


def test_an_empty_module_has_real_buffers_and_no_parameters() -> None:
    network = empty(Small)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert network.frequencies.tolist() == [0, 1, 2] and network.scale.tolist() == [1, 1]


def test_buffers_keep_their_number_format_and_parameters_take_the_one_asked_for() -> None:
    network = filled(checkpoint(), dtype=torch.bfloat16)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert network.scale.dtype == torch.float64 and network.scale.tolist() == [2.0, 3.0]
    assert network.frequencies.dtype == torch.float32
    half = {key: t.half() if t.is_floating_point() else t for key, t in checkpoint().items()}
    assert {p.dtype for p in filled(half).parameters()} == {torch.float16}


# ----------------------------------------------------------------------------------------------------------------------- files


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def shards(folder: Path, held: dict[str, Tensor], stem: str, extension: str) -> None:
    keys, index = list(held), {}
    for number in range(3):
        name = f"{stem}-0000{number + 1}-of-00003.{extension}"
        part = {key: held[key] for key in keys[number::3]}
        save_file(part, folder / name) if extension == "safetensors" else torch.save(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / f"{stem}.{extension}.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize(("stem", "extension"), [("model", "safetensors"), ("pytorch_model", "bin"), ("network", "bin")])
@pytest.mark.parametrize("whole", [True, False])
def test_weights_whole_and_in_shards(tmp_path: Path, stem: str, extension: str, whole: bool) -> None:
    held = checkpoint()
    if whole:
        (save_file if extension == "safetensors" else torch.save)(held, tmp_path / f"{stem}.{extension}")
    else:
        shards(tmp_path, held, stem, extension)
    files = weight_files(str(tmp_path), "model", "pytorch_model", "network")
    assert len(files) == (1 if whole else 3)
    assert equal(dict(tensors_of(files)), held)


def test_the_first_name_that_is_there_counts(tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "pytorch_model.bin")
    assert [file.name for file in weight_files(str(tmp_path))] == ["pytorch_model.bin"]
    save_file(checkpoint(), tmp_path / "model.safetensors")
    assert [file.name for file in weight_files(str(tmp_path))] == ["model.safetensors"]
    torch.save(checkpoint(), tmp_path / "kl16.ckpt")
    assert [file.name for file in weight_files(str(tmp_path), "kl16.ckpt")] == ["kl16.ckpt"]


def test_a_pickle_may_hold_its_weights_deeper_and_may_be_old(tmp_path: Path) -> None:
    held = checkpoint()
    torch.save({"epoch": 3, "state_dict": held}, tmp_path / "a.ckpt")
    torch.save({"model": {"module": held}}, tmp_path / "b.ckpt")
    torch.save({"ema": held, "other": 1}, tmp_path / "c.ckpt")
    torch.save(held, tmp_path / "d.bin", _use_new_zipfile_serialization=False)
    assert equal(dict(tensors_of([tmp_path / "a.ckpt"])), held)
    assert equal(dict(tensors_of([tmp_path / "b.ckpt"])), held)
    assert equal(dict(tensors_of([tmp_path / "c.ckpt"], inside=("ema",))), held)
    assert equal(dict(tensors_of([tmp_path / "d.bin"])), held)


def test_no_weights_and_a_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no weights: none of model\.safetensors, pytorch_model\.safetensors is there"):
        weight_files(str(tmp_path))
    with pytest.raises(ValueError, match=r"none of kl16\.ckpt is there"):
        weight_files(str(tmp_path), "kl16.ckpt")
    shards(tmp_path, checkpoint(), "model", "safetensors")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00003\.safetensors, which model\.safetensors\.index\.json names"):
        weight_files(str(tmp_path))


@pytest.mark.parametrize("index", ["{torn", "[]", '{"metadata": {}}', '{"weight_map": ["a"]}'])
def test_a_damaged_index(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index of shards"):
        weight_files(str(tmp_path))


def test_a_shard_that_went_lost_in_the_index_is_noticed(tmp_path: Path) -> None:
    shards(tmp_path, checkpoint(), "model", "safetensors")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if "00002" not in name}
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks"):
        filled(dict(tensors_of(weight_files(str(tmp_path)))))


class Code:
    """What would run if this were unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("it-ran"),))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("what", ["code", "settings"])
def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(tmp_path: Path, monkeypatch, what: str, old: bool) -> None:
    monkeypatch.chdir(tmp_path)
    extra = Code() if what == "code" else argparse.Namespace(rate=1)
    held = checkpoint() | {"extra": extra}
    torch.save(held, tmp_path / "model.bin", _use_new_zipfile_serialization=not old)
    with pytest.raises(
        ValueError, match=r"holds more than plain weights \(it names .*never done here; convert it to safetensors"
    ) as error:
        list(tensors_of([tmp_path / "model.bin"]))
    assert not (tmp_path / "it-ran").exists()
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    torch.load(tmp_path / "model.bin", weights_only=False)  # it would have run
    assert (tmp_path / "it-ran").exists() == (what == "code")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda whole: whole[: len(whole) // 2], "is no whole checkpoint"),
        (lambda whole: b"", "is no checkpoint"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "is no checkpoint .it begins with b'version"),
        (lambda whole: b"<!DOCTYPE html>", "is no checkpoint .it begins with b'<!DOCTYPE"),
    ],
)
@pytest.mark.parametrize("extension", ["bin", "safetensors"])
def test_damaged_files_are_named(tmp_path: Path, damage, said: str, extension: str) -> None:
    file = tmp_path / f"model.{extension}"
    (save_file if extension == "safetensors" else torch.save)(checkpoint(), file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="is no whole safetensors file" if extension == "safetensors" else said) as error:
        list(tensors_of([file]))
    assert str(file) in str(error.value) and "download it again" in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_list_of_tensors_is_refused(tmp_path: Path) -> None:
    for held in ([1, 2], {"a": 1}, {"state_dict": [torch.zeros(1)]}):
        torch.save(held, tmp_path / "model.bin")
        with pytest.raises(ValueError, match="something else than named tensors"):
            list(tensors_of([tmp_path / "model.bin"]))


# ---------------------------------------------------------------------------------------------------------------------- memory


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64 * (k + 1), bias=False) for k in range(6))


class Ledger:
    """Float32 tensors that are read one at a time, and the most bytes that were ever there at once: theirs and the model's."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.alive, self.peak, self.largest = network, 0, 0, 0

    def read(self, keys: tuple[str, ...] | None = None) -> Iterator[tuple[str, Tensor]]:
        for key, parameter in dict(self.network.named_parameters()).items():
            array = np.ones(tuple(parameter.shape), dtype=np.float32)
            self.alive += array.nbytes
            self.largest = max(self.largest, array.nbytes)
            weakref.finalize(array, self._gone, array.nbytes)  # runs once no tensor, and no view of one, needs the memory
            tensor = torch.from_numpy(array)
            del array
            self.peak = max(self.peak, self.alive + self.model)
            yield key, tensor
            del tensor

    @property
    def model(self) -> int:
        return sum(p.nbytes for p in self.network.parameters() if not p.is_meta)

    def _gone(self, size: int) -> None:
        self.alive -= size


@pytest.mark.parametrize("keys", [Keys(), Keys(ignored={r"layers\.5\..*": "largest"}, absent={r"layers\.5\..*": "so"})])
def test_the_peak_is_the_model_and_its_largest_tensor(keys: Keys) -> None:
    network = empty(Wide)
    ledger = Ledger(network)
    fill(network, ledger.read(), keys, "cpu", torch.bfloat16, "wide")
    assert ledger.alive == 0
    assert ledger.model == sum(2 * 64 * 64 * (k + 1) for k in range(6) if not keys.ignores(f"layers.{k}.weight"))
    assert ledger.largest == 4 * 64 * 64 * 6
    assert ledger.peak <= ledger.model + ledger.largest


def test_the_ledger_sees_a_reader_that_keeps_what_it_has_read() -> None:
    network = empty(Wide)
    ledger = Ledger(network)
    held = list(ledger.read())
    assert ledger.alive == sum(tensor.nbytes for _, tensor in held) and ledger.peak == ledger.alive > 2 * ledger.largest


def test_fused_tensors_are_let_go_too() -> None:
    network = empty(Small)
    sizes = {key: tuple(tensor.shape) for key, tensor in checkpoint().items()}
    alive: list[weakref.ref] = []

    def read() -> Iterator[tuple[str, Tensor]]:
        for key, shape in sizes.items():
            assert not [ref for ref in alive if ref() is not None], f"something is still there when {key} is read"
            array = np.ones(shape, dtype=np.float32)
            alive.append(weakref.ref(array))
            tensor = torch.from_numpy(array)
            del array
            yield key, tensor
            del tensor

    fill(network, read(), KEYS, "cpu", None, "small")  # float32 to float32: nothing forces a copy


@pytest.mark.parametrize("extension", ["bin", "safetensors"])
def test_every_parameter_has_memory_of_its_own(tmp_path: Path, extension: str) -> None:
    """Not a window on a file that is mapped, and not a part of another's: the file may go, and the weights can be saved."""
    held = checkpoint()
    file = tmp_path / f"model.{extension}"
    (save_file if extension == "safetensors" else torch.save)(held, file)
    network = empty(Small)
    fill(network, tensors_of([file]), KEYS, "cpu", None, "small")
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(network.layers[0].k.weight, held["blocks.0.qkv.weight"][4:8])
    save_file(network.state_dict(), tmp_path / "again.safetensors")
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in network.parameters())


def test_errors_name_at_most_four() -> None:
    held = checkpoint() | {f"extra{k}": torch.zeros(1) for k in range(9)}
    with pytest.raises(ValueError) as error:
        filled(held)
    assert len(re.findall(r"extra\d", str(error.value))) == 4 and "and 5 more" in str(error.value)
