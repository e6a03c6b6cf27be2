"""`watch`: what is kept, what stays apart, and that the network is left as it was."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import tiny
import torch
from torch import Tensor, nn

from unisonde.measure import Protocol, conditional_entropy, entropy
from unisonde.models.watch import watch

BITS = Protocol(pca=None)


class Block(nn.Module):
    def __init__(self, width: int, wrap: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, None]:
        x = x + self.inner(x)
        return (x, None) if self.wrap else x


class Network(nn.Module):
    """Four blocks; the last adds to its input in place, as networks do."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(width, wrap=k % 2 == 1) for k in range(3)])
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        for block in self.blocks:
            y = block(x)
            x = y[0] if isinstance(y, tuple) else y
        if fail:
            raise RuntimeError("on purpose")
        x.add_(1.0)
        return self.head(x)


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_with_kwargs) for m in module.modules())


def run(network: Network, x: Tensor) -> list[Tensor]:
    """The states by hand."""
    states = []
    for block in network.blocks:
        x = x + block.inner(x)
        states.append(x.detach())
    return states


def test_calls_rows_and_layers_are_kept_apart() -> None:
    network, first, second = Network(), torch.randn(2, 5, 6), torch.randn(1, 9, 6)
    with watch(network, "blocks.*") as watched:
        network(first)
        network(second)
    assert watched.layers == ("blocks.0", "blocks.1", "blocks.2") and watched.calls == 2
    assert set(watched.states) == {(c, r, f"blocks.{k}") for c, r in ((0, 0), (0, 1), (1, 0)) for k in range(3)}
    for call, x in enumerate((first, second)):
        for k, states in enumerate(run(network, x)):
            for row in range(len(x)):
                # Exactly: also the last block's, to which the network adds in place afterwards.
                assert torch.equal(watched.states[call, row, f"blocks.{k}"], states[row])


def test_sequences_without_a_batch() -> None:
    network, x = Network(), torch.randn(5, 6)
    with watch(network, "blocks.0") as watched:
        network(x)
    assert list(watched.states) == [(0, 0, "blocks.0")] and watched.states[0, 0, "blocks.0"].shape == (5, 6)


def test_entropies_are_those_of_the_states() -> None:
    network, x = Network(), torch.randn(2, 12, 6)
    with watch(network, "blocks.*") as watched:
        network(x)
    for (call, row, layer), estimate in watched.entropy(BITS).items():
        assert estimate == entropy(run(network, x)[int(layer[-1])][row], BITS) and call == 0
    found = watched.conditional_entropy(slice(0, 5), slice(5, None), BITS)
    assert found[0, 1, "blocks.2"] == conditional_entropy(run(network, x)[2][1, :5], run(network, x)[2][1, 5:], BITS)


def test_a_mask_leaves_padding_out() -> None:
    network, x = Network(), torch.randn(2, 12, 6)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    with watch(network, "blocks.1") as watched:
        network(x)
    masked = watched.entropy(BITS, mask=mask)
    assert [e.n for e in masked.values()] == [12, 8]
    assert masked[0, 1, "blocks.1"] == entropy(run(network, x)[1][1, 4:], BITS)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 11\), but blocks.1 has 12 states in row 0 of call 0"):
        watched.entropy(BITS, mask=mask[:, 1:])


def test_a_star_is_one_part_of_a_name() -> None:
    lm = tiny.causal("llama")
    with watch(lm) as watched:
        lm(torch.arange(5)[None])
    assert watched.layers == tuple(f"model.layers.{k}" for k in range(3))
    with watch(lm, ["model.layers.[01]", "model.norm"]) as watched:
        pass
    assert watched.layers == ("model.layers.0", "model.layers.1", "model.norm")


def test_states_of_a_language_model() -> None:
    lm, ids = tiny.causal("gpt2"), torch.arange(14).view(2, 7)
    with watch(lm, "transformer.h.*") as watched, torch.inference_mode():
        expected = lm(ids, output_hidden_states=True).hidden_states
    for row in range(2):
        for k in range(2):
            assert torch.equal(watched.states[0, row, f"transformer.h.{k}"], expected[k + 1][row])


def test_every_token_of_generate_is_a_call() -> None:
    lm = tiny.causal("llama")
    with watch(lm) as watched:
        lm.generate(torch.arange(4)[None], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert [len(watched.states[call, 0, "model.layers.2"]) for call in range(watched.calls)] == [4, 1, 1]


def test_layers_that_run_without_the_watched_module() -> None:
    network, x = Network(), torch.randn(1, 4, 6)
    with watch(network, "blocks.*") as watched:
        for _ in range(2):
            network.blocks[1](network.blocks[0](x))
    assert watched.calls == 2 and set(watched.states) == {(c, 0, f"blocks.{k}") for c in range(2) for k in range(2)}


def test_a_layer_that_runs_twice_in_a_call() -> None:
    network = Network()
    network.blocks[1] = network.blocks[0]
    x = torch.randn(1, 4, 6)
    with watch(network, "blocks.0") as watched:
        network(x)
    assert list(watched.states) == [(0, 0, "blocks.0"), (0, 0, "blocks.0#2")]
    assert not torch.equal(*watched.states.values())


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("block.*", r"no layer of Network is called 'block.*'; did you mean blocks.*"),
        ("zzz", "there are blocks, blocks.*, blocks.*.inner, head"),
    ],
)
def test_names_that_match_nothing(pattern: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)), watch(Network(), pattern):
        raise AssertionError("not reached")


def test_outputs_that_are_no_sequences() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1))
    with pytest.raises(ValueError, match=r"0 gave a tensor of shape \(1, 2, 3, 3\)"), watch(network, "0"):
        network(torch.randn(1, 1, 3, 3))
    assert hooks(network) == 0


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    network = Network()
    with watch(network, "blocks.*") as watched:
        assert hooks(network) > 0
    assert hooks(network) == 0
    with pytest.raises(RuntimeError, match="on purpose"), watch(network, "blocks.*") as watched:
        network(torch.randn(1, 4, 6), fail=True)
    assert hooks(network) == 0 and watched.calls == 1
    network(torch.randn(1, 4, 6))
    assert watched.calls == 1


def test_a_call_that_fails_does_not_run_into_the_next() -> None:
    network, x = Network(), torch.randn(1, 4, 6)
    with watch(network, "blocks.*") as watched:
        with pytest.raises(RuntimeError):
            network(x, fail=True)
        network.blocks[0](x)
        network(x)
    assert watched.calls == 3 and (1, 0, "blocks.1") not in watched.states


def test_the_network_is_neither_moved_nor_changed() -> None:
    network, x = Network(), torch.randn(2, 5, 6)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    plain = network(x)
    with watch(network, "blocks.*", device="meta") as watched:
        seen = network(x)
    assert torch.equal(plain, seen) and seen.requires_grad
    assert all(torch.equal(v, before[k]) and v.device.type == "cpu" for k, v in network.state_dict().items())
    assert all(s.device.type == "meta" and not s.requires_grad for s in watched.states.values())


def test_memory_goes_with_the_object() -> None:
    network = Network()
    with watch(network, "blocks.*") as watched:
        network(torch.randn(2, 5, 6))
    kept = [weakref.ref(states) for states in watched.states.values()]
    gc.disable()
    try:
        del watched
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()
