"""Drawing, by numbers that are known beforehand."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from unisonde.models.parts.sampling import draw, euler, guided, normals, uniforms

CPU = torch.device("cpu")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_even_numbers_give_tokens_by_their_share(temperature: float) -> None:
    """Of n even numbers in [0, 1), each token gets its probability's share, up to one at either end."""
    logits, n = torch.tensor([0.3, -1.0, 2.0, 0.0, -4.0]), 20_000
    even = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = draw(logits.expand(n, -1), temperature, even)
    shares = (logits.double() / temperature).softmax(-1)
    assert (torch.bincount(drawn, minlength=5) - n * shares).abs().max() <= 1
    assert (drawn.diff() >= 0).all()


def test_the_ends_of_the_interval() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(3, -1)
    assert draw(logits, 1.0, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 2, 2]


def test_no_temperature_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    assert draw(logits, 0.0, torch.tensor([0.99, 0.99])).tolist() == [1, 0]


def test_rows_depend_on_their_seed_alone() -> None:
    for make in (lambda seeds: uniforms(seeds, 6, CPU), lambda seeds: normals(seeds, (2, 3))):
        both = make([4, 9])
        assert torch.equal(both[1:], make([9])) and not torch.equal(both[0], both[1])
    assert normals([1], (2, 3)).dtype == torch.float32 and uniforms([1], 2, CPU).dtype == torch.float64


def test_guidance() -> None:
    c, u = torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0])
    assert torch.equal(guided(c, u, 1.0), c) and torch.equal(guided(c, u, 0.0), u)
    assert guided(c, u, 5.0).tolist() == [5.0, 12.0]


def test_euler_on_a_flow_that_is_known() -> None:
    """dz/dt = a z takes z to z times the product of 1 + a dt; every time but the last is asked for, inside its context."""
    times, seen = [0.0, 0.1, 0.4, 1.0], []

    @contextmanager
    def around(step: int):
        seen.append(("in", step))
        yield
        seen.append(("out", step))

    def velocity(z: torch.Tensor, time: float) -> torch.Tensor:
        seen.append(("at", time))
        return 2.0 * z

    end = euler(velocity, torch.tensor([1.0, -3.0]), times, around)
    growth = 1.2 * 1.6 * 2.2
    assert torch.allclose(end, torch.tensor([growth, -3 * growth]))
    assert seen == [one for k, t in enumerate(times[:-1]) for one in (("in", k), ("at", t), ("out", k))]
    assert euler(velocity, torch.tensor([1.0]), [0.0, 0.5]).item() == 2.0
