"""One `Trace` for every kind of model: toys of a masked, a two-stage and a packed one, readings, and what is refused.

The toys are as small as they can be and still make the calls that real families make. Each is checked in the way that
settles it: the recorded input is run again, by hand, and gives the same states.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from threading import Barrier, current_thread

import pytest
import torch
from torch import Tensor, nn

from unisonde.models.trace import LayerStates, Reading, Row, Span, Stack, Trace, first_tensor, hooked, recorded, step_name

WIDTH, CODES, MASK, STEPS = 8, 6, 20, 4


class Layer(nn.Module):
    """Attention without heads, and a tuple out, as older `transformers` layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        scores = hidden_states @ hidden_states.mT
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e9)
        return hidden_states + self.mix(scores.softmax(-1) @ hidden_states).tanh(), None


class Body(nn.Module):
    def __init__(self, depth: int = 3, keywords: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(depth)])
        self.norm = nn.LayerNorm(WIDTH)
        self.keywords = keywords

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            [x, _] = layer(hidden_states=x, mask=mask) if self.keywords else layer(x, mask)
        return self.norm(x)

    def by_hand(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """h0..hL and `final`."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], mask)[0])
        return [*states, self.norm(states[-1])]


class Masked(nn.Module):
    """Draws an image as masked models do: all codes masked, every pass sees both ways and settles some, with guidance.

    The prompt runs in a pass of its own; the response's passes see it through its embeddings, but show image positions alone.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(MASK + 1, WIDTH)
        self.body = Body()
        self.head = nn.Linear(WIDTH, MASK)
        self.stack = Stack("llm", tuple(self.body.layers), self.body.norm)
        self.inputs: dict[str, Tensor] = {}

    @torch.no_grad()
    def draw(self, prompts: list[list[int]], trace: Trace) -> Tensor:
        longest, count = max(map(len, prompts)), len(prompts)
        ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts])
        lengths = torch.tensor([len(p) for p in prompts])
        causal = torch.ones(longest, longest).tril().bool()
        prompt_rows = [
            Row(k, (Span(0, 1, "prompt", "text", "template"), Span(1, len(p), "prompt", "text"))) for k, p in enumerate(prompts)
        ]
        self.inputs["single"] = ids
        with trace.record(self.stack, prompt_rows, "single"):
            self.body(self.embed(ids), causal)

        image = tuple(
            [
                Span(longest, longest + CODES, "response", "image"),
                Span(longest + CODES, longest + CODES + 1, "response", "image", "template"),
            ]
        )
        image_rows = [Row(k, image) for k in range(count)]
        codes = torch.full((count, CODES), MASK)
        for step in range(STEPS):
            name = "final" if step == STEPS - 1 else f"{step:04d}"
            both = self._sequence(ids, codes)
            self.inputs[name] = both
            with trace.record(self.stack, [*image_rows, *[None] * count], name):
                states = self.body(self.embed(both), self._visible(lengths, longest))
            scores = self.head(states[:, longest : longest + CODES])
            scores = scores[count:] + 3.0 * (scores[:count] - scores[count:])
            codes = torch.where(
                torch.arange(CODES) < CODES * (step + 1) // STEPS, torch.where(codes == MASK, scores.argmax(-1), codes), MASK
            )
        if trace.wants("clean"):
            both = self._sequence(ids, codes)
            self.inputs["clean"] = both
            with trace.record(self.stack, [*image_rows, *[None] * count], "clean"):
                self.body(self.embed(both), self._visible(lengths, longest))
        return codes

    @staticmethod
    def _sequence(ids: Tensor, codes: Tensor) -> Tensor:
        end = torch.full((len(ids), 1), 1)
        return torch.cat([torch.cat([ids, codes, end], 1), torch.cat([torch.zeros_like(ids), codes, end], 1)])

    @staticmethod
    def _visible(lengths: Tensor, longest: int) -> Tensor:
        seen = torch.arange(longest + CODES + 1) < lengths[:, None]
        seen[:, longest:] = True
        return torch.cat([seen, seen])[:, None]

    def again(self, step: str, lengths: list[int]) -> list[Tensor]:
        """The states of a recorded input, by hand."""
        ids = self.inputs[step]
        longest = max(lengths)
        mask = torch.ones(longest, longest).tril().bool() if step == "single" else self._visible(torch.tensor(lengths), longest)
        with torch.no_grad():
            return self.body.by_hand(self.embed(ids), mask)


PROMPTS = [[2, 5, 7, 3], [2, 9], [2, 4, 4]]
ALL_STEPS = ["single", "0000", "0001", "0002", "final"]


def watched(reading: Reading) -> tuple[Masked, list[LayerStates], Tensor]:
    toy, seen = Masked(), []
    return toy, seen, toy.draw(PROMPTS, Trace(seen.append, reading))


# -- masked generation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "steps"),
    [("final", ["single", "final"]), ("clean", ["single", "clean"]), ("all", [*ALL_STEPS, "clean"])],
)
def test_the_steps_that_a_reading_takes(step: str, steps: list[str]) -> None:
    _, seen, _ = watched(Reading(step=step))  # type: ignore[arg-type]
    assert list(dict.fromkeys(s.step for s in seen)) == steps
    # Each step: h0, three layers and the last norm, of three items each; and layer by layer, for nothing is kept back.
    assert [(s.step, s.layer, s.item) for s in seen] == [(name, layer, k) for name in steps for layer in range(5) for k in range(3)]


def test_what_is_read_changes_nothing_that_is_drawn() -> None:
    codes = [watched(Reading(step=step))[2] for step in ("final", "clean", "all")]  # type: ignore[arg-type]
    assert all(torch.equal(c, codes[0]) for c in codes) and (codes[0] < MASK).all()


def test_states_are_those_of_the_recorded_input() -> None:
    toy, seen, _ = watched(Reading(step="all"))
    lengths = [len(p) for p in PROMPTS]
    longest = max(lengths)
    for s in seen:
        expected = toy.again(s.step, lengths)[s.layer][s.item]
        if s.step == "single":
            assert torch.equal(s.select("prompt", Reading()), expected[1 : lengths[s.item]])
            assert torch.equal(s.select("prompt", Reading(spans="all")), expected[: lengths[s.item]])
            assert len(s.select("response", Reading())) == 0 and s.modalities("prompt") == ("text",)
        else:
            assert torch.equal(s.select("response", Reading()), expected[longest : longest + CODES])
            assert len(s.select("response", Reading(spans="all"))) == CODES + 1
            assert len(s.select("prompt", Reading(spans="all"))) == 0 and s.modalities("response") == ("image",)


def test_unread_rows_are_dropped_and_steps_differ() -> None:
    toy, seen, _ = watched(Reading(step="all"))
    assert {s.item for s in seen} == {0, 1, 2}
    last = {s.step: s.states for s in seen if s.item == 0 and s.layer == 3}
    assert not torch.equal(last["0000"], last["final"]) and not torch.equal(last["final"], last["clean"])
    # The unconditional half has other states, so a mistaken row would have shown above.
    expected = toy.again("final", [len(p) for p in PROMPTS])[3]
    assert not torch.allclose(expected[0], expected[3])


def test_a_row_of_an_item_keeps_its_number() -> None:
    body, seen = Body(), []
    rows = [None, Row(7, (Span(0, 2, "prompt", "text"),)), Row(3, (Span(1, 4, "prompt", "text"),))]
    x = torch.randn(3, 5, WIDTH)
    with Trace(seen.append).record(Stack("llm", tuple(body.layers), body.norm), rows):
        body(x)
    assert [(s.item, len(s.states)) for s in seen[:2]] == [(7, 2), (3, 4)]  # what no span covers is not handed on
    assert torch.equal(seen[0].select("prompt", Reading()), x[1, :2]) and torch.equal(
        seen[1].select("prompt", Reading()), x[2, 1:4]
    )


# -- two stages, packing --------------------------------------------------------------------------------------------------------


def test_two_stacks() -> None:
    torch.manual_seed(0)
    writer, painter, seen = Body(2), Body(4, keywords=True), []
    stacks = [Stack("mllm", tuple(writer.layers), writer.norm), Stack("dit", tuple(painter.layers))]
    trace = Trace(seen.append, Reading(step="all"))
    x, noise = torch.randn(1, 5, WIDTH), torch.randn(1, 3, WIDTH)
    prompt, response = Span(0, 5, "prompt", "text"), Span(5, 8, "response", "image")
    with trace.record(stacks[0], [Row(0, (prompt,))]):
        context = writer(x)
    for step in ("0000", "final"):
        joint = torch.cat([context, noise], 1)
        with trace.record(stacks[1], [Row(0, (prompt, response))], step):
            noise = painter(joint)[:, 5:]
    assert {(s.stack, s.step) for s in seen} == {("mllm", "single"), ("dit", "0000"), ("dit", "final")}
    assert [s.layer for s in seen if s.stack == "mllm"] == [0, 1, 2, 3] and stacks[0].final == 3
    # No norm is announced: layers end at the depth.
    final = [s for s in seen if (s.stack, s.step) == ("dit", "final")]
    assert [s.layer for s in final] == [0, 1, 2, 3, 4]
    for s, expected in zip(final, painter.by_hand(joint), strict=False):
        assert torch.equal(s.select("prompt", Reading()), expected[0, :5])
        assert torch.equal(s.select("response", Reading(), "image"), expected[0, 5:])
    for s, expected in zip([s for s in seen if s.stack == "mllm"], writer.by_hand(x), strict=True):
        assert torch.equal(s.states, expected[0])


def test_packed_sequences() -> None:
    torch.manual_seed(0)
    body, seen, lengths = Body(), [], [4, 2, 3]
    sequences = [torch.randn(n, WIDTH) for n in lengths]
    # One axis for all, each sees its own: as flash attention packs, (sum of lengths, d).
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    rows = [Row(k, (Span(0, n, "prompt", "text"),)) for k, n in enumerate(lengths)]
    with Trace(seen.append).record(Stack("llm", tuple(body.layers), body.norm), rows, unpack=lambda states: states.split(lengths)):
        body(torch.cat(sequences), owner[:, None] == owner)
    for s in seen:
        alone = body.by_hand(sequences[s.item])[s.layer]
        torch.testing.assert_close(s.states, alone, rtol=1e-6, atol=1e-6)


# -- several rows at once -------------------------------------------------------------------------------------------------------


def test_rows_of_a_layer_are_observed_at_once_and_the_pass_waits_for_them() -> None:
    body, together = Body(), Barrier(3, timeout=30)
    seen: list[tuple[int, int, str, bool, int]] = []

    def observe(states: LayerStates) -> None:
        together.wait()  # breaks unless all three are here at once
        inference = torch.is_inference_mode_enabled()
        seen.append((states.layer, states.item, current_thread().name, inference, torch.get_num_threads()))

    rows = [Row(k, (Span(0, 2, "prompt", "text"),)) for k in range(3)]
    before = torch.get_num_threads()
    with torch.inference_mode(), Trace(observe, threads=3).record(stack(body), rows):
        body(torch.randn(3, 2, WIDTH))
    assert [layer for layer, *_ in seen] == [layer for layer in range(5) for _ in rows]
    assert all({item for number, item, *_ in seen if number == layer} == {0, 1, 2} for layer in range(5))
    assert all(name.startswith("row") and inference and threads == 1 for _, _, name, inference, threads in seen)
    assert torch.get_num_threads() == before


def test_threads_change_no_state() -> None:
    body, x = Body(), torch.randn(4, 5, WIDTH)
    rows = [None, *(Row(k, (Span(0, 5, "prompt", "text"),)) for k in (2, 0, 1))]
    found: dict[int, dict[tuple[int, int], Tensor]] = {1: {}, 2: {}}
    for threads, states in found.items():
        trace = Trace(lambda seen, into=states: into.update({(seen.layer, seen.item): seen.states.clone()}), threads=threads)
        with trace.record(stack(body), rows):
            body(x)
    assert len(found[1]) == 15 and found[1].keys() == found[2].keys()
    assert all(torch.equal(found[1][place], found[2][place]) for place in found[1])


# -- what is refused ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def body() -> Iterator[Body]:
    """A body whose hooks must be gone afterwards."""
    body = Body()
    yield body
    assert all(not (m._forward_hooks or m._forward_pre_hooks) for m in body.modules())


ROW = Row(0, (Span(0, 2, "prompt", "text"),))


def stack(body: Body) -> Stack:
    return Stack("llm", tuple(body.layers), body.norm)


def nobody(_: LayerStates) -> None:
    pass


def test_two_passes_in_one_recording(body: Body) -> None:
    with (
        pytest.raises(RuntimeError, match="layer 0 of 'llm' ran twice in one recorded pass"),
        Trace(nobody).record(stack(body), [ROW]),
    ):
        for _ in range(2):
            body(torch.randn(1, 2, WIDTH))


def test_another_number_of_rows(body: Body) -> None:
    with (
        pytest.raises(RuntimeError, match="layer 0 of 'llm' gave 2 rows, 1 were announced"),
        Trace(nobody).record(stack(body), [ROW]),
    ):
        body(torch.randn(2, 2, WIDTH))


def test_layers_that_never_ran(body: Body) -> None:
    with (
        pytest.raises(RuntimeError, match=r"gave 2 of 5 layers \(step 'final'\)"),
        Trace(nobody).record(stack(body), [ROW], "final"),
    ):
        body.layers[0](torch.randn(1, 2, WIDTH))
    with pytest.raises(RuntimeError, match="gave 0 of 5 layers"), Trace(nobody).record(stack(body), [ROW]):
        pass


def test_an_error_in_the_pass_is_the_one_that_is_seen(body: Body) -> None:
    with pytest.raises(KeyError, match="on purpose"), Trace(nobody).record(stack(body), [ROW]):
        body(torch.randn(1, 2, WIDTH))
        raise KeyError("on purpose")


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_the_observer_ends_the_pass(body: Body, threads: int) -> None:
    def full(_: LayerStates) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), Trace(full, threads=threads).record(stack(body), [ROW]):
        body(torch.randn(1, 2, WIDTH))


def test_a_step_that_is_not_wanted_has_no_hooks(body: Body) -> None:
    with Trace(nobody, Reading(step="final")).record(stack(body), [ROW], "0003"):
        assert not body.layers[0]._forward_hooks
        for _ in range(2):  # nor is it checked
            body(torch.randn(1, 2, WIDTH))


def test_hooked_counts_nothing_and_checks_nothing(body: Body) -> None:
    calls: dict[int, int] = defaultdict(int)
    with hooked(stack(body), lambda layer, _: calls.__setitem__(layer, calls[layer] + 1)):
        for _ in range(3):
            body(torch.randn(1, 2, WIDTH))
    assert calls == {layer: 3 for layer in range(5)}


# -- small things ---------------------------------------------------------------------------------------------------------------


def test_states_carry_no_gradient(body: Body) -> None:
    seen: list[LayerStates] = []
    with Trace(seen.append).record(stack(body), [ROW]):
        body(torch.randn(1, 2, WIDTH, requires_grad=True))
    assert not any(s.states.requires_grad for s in seen)


def test_selection_joins_the_spans_of_a_role_in_order() -> None:
    spans = (
        Span(0, 1, "prompt", "text", "template"),
        Span(1, 3, "prompt", "image"),
        Span(3, 4, "prompt", "text", "template"),
        Span(4, 6, "prompt", "text"),
        Span(6, 7, "response", "text"),
    )
    states = torch.arange(7.0)[:, None]
    seen = LayerStates("llm", "single", 0, 0, spans, states)
    assert seen.select("prompt", Reading()).flatten().tolist() == [1, 2, 4, 5]
    assert seen.select("prompt", Reading(spans="all")).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert seen.select("prompt", Reading(), "image").flatten().tolist() == [1, 2]
    assert seen.select("prompt", Reading(), "audio").shape == (0, 1)
    one = seen.select("response", Reading())
    assert one.data_ptr() == states[6:].data_ptr()  # not copied
    assert seen.modalities("prompt") == ("image", "text") and seen.modalities("response") == ("text",)


def test_readings() -> None:
    digests = {Reading(spans, step).digest() for spans in ("content", "all") for step in ("final", "clean", "all")}  # type: ignore[arg-type]
    assert len(digests) == 6 and Reading().digest() == Reading("content", "final").digest()
    for wrong in ({"spans": "some"}, {"step": "first"}):
        with pytest.raises(ValueError, match="got"):
            Reading(**wrong)  # type: ignore[arg-type]


def test_the_tensor_of_an_output() -> None:
    x = torch.ones(1)
    for output in (x, (x, None), [None, x], {"mask": None, "hidden_states": x}):
        assert first_tensor(output) is x
    for output in (None, 3, (), {"a": None}):
        with pytest.raises(TypeError, match="holds no tensor"):
            first_tensor(output)


def test_names_of_steps() -> None:
    assert [step_name(step, 3) for step in range(3)] == ["0000", "0001", "final"] and step_name(0, 1) == "final"


def test_a_pass_without_a_trace_is_run_all_the_same() -> None:
    body = Body()
    stack, states, seen = Stack("llm", tuple(body.layers), body.norm), torch.randn(1, 4, WIDTH), []
    rows = [Row(0, (Span(0, 4, "prompt", "text"),))]
    with recorded(None, stack, rows):
        body(states)
    with recorded(Trace(seen.append), stack, rows, "final"):
        body(states)
    assert [s.step for s in seen] == ["final"] * (stack.depth + 2)


def test_a_reading_of_some_stacks() -> None:
    stacks = (Stack("one", (torch.nn.Identity(),)), Stack("two", (torch.nn.Identity(),)))
    seen: list[str] = []
    trace = Trace(lambda states: seen.append(states.stack), Reading(stacks=("two",)))
    for stack in stacks:
        with trace.record(stack, [Row(0, (Span(0, 2, "prompt", "text"),))]):
            stack.layers[0](torch.zeros(1, 2, 3))
    assert seen == ["two", "two"] and trace.wants("single", "two") and not trace.wants("single", "one")
    assert Reading().digest() == Reading(stacks=None).digest() != Reading(stacks=("two",)).digest()
    Reading(stacks=("two",)).check("toy", stacks)
    with pytest.raises(ValueError, match="toy has no stack three; it has one, two"):
        Reading(stacks=("three", "two")).check("toy", stacks)
    for wrong in ("two", ()):
        with pytest.raises(ValueError, match="tuple of names of stacks"):
            Reading(stacks=wrong)  # type: ignore[arg-type]
