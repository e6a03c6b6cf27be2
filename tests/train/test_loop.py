"""The training loop: the same end whether or not it was killed on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from unisonde.train.loop import Schedule, autocast_dtype, fit, optimizers_of

SCHEDULE = Schedule(steps=30, rate=5e-2, warmup=5)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_of(net: nn.Module, stop: int | None = None):
    def loss(step: int) -> torch.Tensor:
        if step == stop:
            raise KeyboardInterrupt
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return (net(inputs)[:, 0] - inputs.sum(1)).square().mean()

    return loss


def train(tmp_path, stop: int | None = None) -> dict[str, torch.Tensor]:
    net = network()
    fit("test", net, loss_of(net, stop), SCHEDULE, tmp_path / "c.pt", 16)
    return net.state_dict()


def test_it_learns_and_is_deterministic(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = train(tmp_path / "a"), train(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)
    net = network()
    before = loss_of(net)(99).item()
    net.load_state_dict(first)
    assert loss_of(net)(99).item() < 0.5 * before


def test_stopped_by_hand_it_ends_where_it_would_have(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    whole = train(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop=17)
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step"] == 17
    resumed = train(tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_follows_the_mean_gradient_of_its_batches(tmp_path, threads) -> None:
    """Three batches a step, on threads, are one batch of the three together; the batches of the steps follow one another."""
    numbers = []

    def of_one(number: int) -> torch.Tensor:
        numbers.append(number)
        return loss_of(nets[0])(number)

    def of_three(step: int) -> torch.Tensor:
        return torch.stack([loss_of(nets[1])(number) for number in range(3 * step, 3 * step + 3)]).mean()

    nets = network(), network()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fit("test", nets[0], of_one, SCHEDULE, tmp_path / "parts.pt", 48, batches=3)
        fit("test", nets[1], of_three, SCHEDULE, tmp_path / "whole.pt", 48)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert sorted(numbers) == list(range(3 * SCHEDULE.steps))
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5


def test_what_a_loss_does_not_use_stays(tmp_path) -> None:
    net = nn.ModuleList([network(), network()])
    before = [parameter.clone() for parameter in net[1].parameters()]
    fit("test", net, loss_of(net[0]), SCHEDULE, tmp_path / "c.pt", 16, batches=2)
    assert all(torch.equal(a, b) for a, b in zip(before, net[1].parameters(), strict=True))


def test_a_finished_training_is_not_repeated(tmp_path) -> None:
    first = train(tmp_path)
    again = train(tmp_path, stop=0)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_rate_rises_then_falls_to_zero() -> None:
    shares = [SCHEDULE.share_at(step) for step in range(30)]
    assert shares[4] == max(shares) == pytest.approx(1) and shares[0] == pytest.approx(0.2)
    assert shares[5:] == sorted(shares[5:], reverse=True) and SCHEDULE.share_at(30) == pytest.approx(0)


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.last(x)


MUON = replace(SCHEDULE, rate=1e-2, matrix_rate=2e-2)


def test_muon_has_the_matrices_of_layers_and_nothing_else() -> None:
    net = Layered()
    adam, muon = optimizers_of(net, MUON)
    assert [p.shape for group in muon.param_groups for p in group["params"]] == [(8, 8), (8, 8)]
    held = [id(p) for optimizer in (adam, muon) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, net.parameters()))
    assert len(optimizers_of(net, SCHEDULE)) == 1


def test_with_muon_too_it_ends_where_it_would_have(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    ends = []
    for folder, stop in ((tmp_path / "a", None), (tmp_path, 17), (tmp_path, None)):
        net = Layered()
        start = {name: weight.clone() for name, weight in net.state_dict().items()}
        if stop is None:
            fit("test", net, loss_of(net), MUON, folder / "c.pt", 16)
            ends.append(net.state_dict())
        else:
            with pytest.raises(KeyboardInterrupt):
                fit("test", net, loss_of(net, stop), MUON, folder / "c.pt", 16)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)
    assert all(not torch.equal(ends[0][name], start[name]) for name in start)


def test_a_loss_that_is_not_finite_stops_it(tmp_path) -> None:
    net = network()
    with pytest.raises(ArithmeticError, match="loss of test is nan at step"):
        fit("test", net, lambda step: net(torch.full((1, 4), float("nan"))).sum(), SCHEDULE, tmp_path / "c.pt", 1)


def test_precision_is_one_of_three() -> None:
    assert autocast_dtype("fp32") is None and autocast_dtype("bf16") is torch.bfloat16
    with pytest.raises(ValueError, match="auto, bf16 or fp32"):
        autocast_dtype("fp8")
