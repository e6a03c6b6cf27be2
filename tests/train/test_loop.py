"""The training loop: the same end whether or not it was killed on the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unisonde.train.loop import Schedule, autocast_dtype, fit

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


def test_a_finished_training_is_not_repeated(tmp_path) -> None:
    first = train(tmp_path)
    again = train(tmp_path, stop=0)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_rate_rises_then_falls_to_zero() -> None:
    rates = [SCHEDULE.rate_at(step) for step in range(30)]
    assert rates[4] == max(rates) == pytest.approx(5e-2) and rates[0] == pytest.approx(1e-2)
    assert rates[5:] == sorted(rates[5:], reverse=True) and SCHEDULE.rate_at(30) == pytest.approx(0)


def test_a_loss_that_is_not_finite_stops_it(tmp_path) -> None:
    net = network()
    with pytest.raises(ArithmeticError, match="loss of test is nan at step"):
        fit("test", net, lambda step: net(torch.full((1, 4), float("nan"))).sum(), SCHEDULE, tmp_path / "c.pt", 1)


def test_precision_is_one_of_three() -> None:
    assert autocast_dtype("fp32") is None and autocast_dtype("bf16") is torch.bfloat16
    with pytest.raises(ValueError, match="auto, bf16 or fp32"):
        autocast_dtype("fp8")
