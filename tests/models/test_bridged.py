"""What every bridged model does: writing, showing states, the loss of a response, scores of answers, edits; on tiny random ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from bridges import WRITERS, built, items_for, picture, sound
from torch import Tensor

import unisonde
from unisonde.data.item import Item
from unisonde.models.base import Generation
from unisonde.models.bridged import Bridged
from unisonde.models.trace import LayerStates, Reading, Trace

GREEDY = Generation(tokens=6, temperature=0.0)
ANSWERS = ["red.", "blue.", "green or blue."]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=WRITERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bridged:
    return built(request.param, tmp_path_factory.getbasetemp())[0]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Bridged:
    return built("llava", tmp_path_factory.getbasetemp())[0]


def shown(model: Bridged, items: list[Item], generation: Generation = GREEDY, seed: int = 0) -> tuple[dict, list]:
    """States by stack, layer and item, and the responses."""
    states: dict[tuple[str, int, int], LayerStates] = {}

    def keep(seen: LayerStates) -> None:
        assert (seen.stack, seen.layer, seen.item) not in states and seen.step == "single"
        states[seen.stack, seen.layer, seen.item] = LayerStates(**{**vars(seen), "states": seen.states.clone()})

    return states, model.respond(items, "text", generation, seed, Trace(keep))


def logits_after(model: Bridged, item: Item, tail: list[int]) -> Tensor:
    """The long way: the whole sequence by itself, without keys and values kept; the logits (V,) of what comes next."""
    prompted = model.prepare(item, 64)
    with torch.inference_mode():
        out = model.language_model(inputs_embeds=model.embed(prompted, tail), use_cache=False).logits
    return out[0, -1].double()


def log_probability(model: Bridged, item: Item, tail: list[int]) -> float:
    each = [logits_after(model, item, tail[:k]).log_softmax(-1)[token] for k, token in enumerate(tail)]
    return float(torch.stack(each).sum())


# ------------------------------------------------------------------------------------------------------------------------ states


def test_the_teacher_forced_pass_has_the_states_of_generation(model: Bridged) -> None:
    for item in items_for(model):
        with tiny.generation_states(model.llm) as passes:
            [written] = model.respond([item], "text", GREEDY)
        states, [response] = shown(model, [item])
        assert response == written
        for layer, outputs in passes.items():
            once = torch.cat([output[0] for output in outputs])
            forced = states["llm", layer, 0].states
            assert len(once) == len(forced) - 1  # generation never runs its last token
            torch.testing.assert_close(forced[: len(once)], once, **CLOSE)
    # The comparison can fail: another layer has other states.
    assert not torch.allclose(states["llm", 1, 0].states, states["llm", 2, 0].states, **CLOSE)


def test_what_is_shown(model: Bridged) -> None:
    items = items_for(model)
    states, _ = shown(model, items)
    assert [stack.name for stack in model.stacks] == ["encoder", "adapter", "llm"]
    assert {(stack, item) for stack, _, item in states} == {
        *((stack, item) for stack in ("encoder", "adapter", "llm") for item in (0, 2)),
        ("llm", 1),
    }
    for stack in model.stacks:
        layers = sorted(layer for name, layer, item in states if name == stack.name and item == 0)
        assert layers == list(range(stack.depth + 1 + (stack.norm is not None)))
    for k in (0, 2):
        prompted = model.prepare(items[k], 6)
        count = len(prompted.slots)
        encoder, adapter, llm = states["encoder", 1, k], states["adapter", 1, k], states["llm", 0, k]
        content = encoder.select("prompt", Reading())
        assert len(content) == prompted.frames and len(encoder.states) == model.lead + prompted.frames
        assert torch.equal(content, encoder.states[model.lead :])
        assert encoder.modalities("prompt") == adapter.modalities("prompt") == (model.takes,)
        assert encoder.modalities("response") == adapter.modalities("response") == ()
        # The adapter's first layer is what its module takes, its second what the decoder sees.
        assert len(adapter.states) == len(states["adapter", 0, k].states) == count
        torch.testing.assert_close(model.adapter.layers[0](states["adapter", 0, k].states), adapter.states)
        assert torch.equal(llm.select("prompt", Reading(), model.takes), adapter.states)
        words = model.language_model.get_input_embeddings()(torch.tensor(prompted.ids))
        text = [k for k in range(len(prompted.ids)) if k not in prompted.slots]
        assert torch.equal(llm.states[text], words[text])


def test_prompts_alone_have_the_states_that_they_have_before_a_response(model: Bridged) -> None:
    items = items_for(model)
    states, responses = shown(model, items)
    seen: dict[tuple[str, int, int], LayerStates] = {}
    flags = model.show(items, Trace(lambda s: seen.__setitem__((s.stack, s.layer, s.item), s)))
    assert set(seen) == set(states) and flags == [tuple(f for f in r.flags if f != "full") for r in responses]
    for place, alone in seen.items():
        assert all(span.role == "prompt" for span in alone.spans)
        torch.testing.assert_close(alone.states, states[place].states[: len(alone.states)], **CLOSE)
    assert len(seen["llm", 0, 0].states) == len(model.prepare(items[0], 0).ids)


def test_a_batch_is_its_items_one_by_one(model: Bridged) -> None:
    items = items_for(model)
    for generation in (GREEDY, Generation(tokens=5, temperature=1.2)):
        together, batch = shown(model, items, generation, 3)
        for k in (2, 1, 0):  # another order: what one item leaves in the model must not reach the next
            alone, [response] = shown(model, [items[k]], generation, 3)
            assert response == batch[k]
            assert all(torch.equal(seen.states, together[stack, layer, k].states) for (stack, layer, _), seen in alone.items())


def test_number_formats_and_identity(model: Bridged) -> None:
    identity = model.identity()
    assert identity["dtype"] == "float32" and identity["weights"] and identity["family"] == model.family
    assert identity["parameters"] == sum(p.numel() for p in model.module.parameters())
    assert set(model.apart) <= set(identity)
    assert not any(t.is_meta for t in (*model.module.parameters(), *model.module.buffers()))
    assert not any(p.requires_grad for p in model.module.parameters())


# ------------------------------------------------------------------------------------------------------------------------ scores


def test_the_loss_of_a_response_is_that_of_the_long_way(model: Bridged) -> None:
    items, responses = items_for(model), ["a red ring", "so", "two words more"]
    losses = model.response_loss(items, responses)
    expected = []
    for item, response in zip(items, responses, strict=True):
        ids = model.tokenizer(response, add_special_tokens=False)["input_ids"]
        expected.append(-log_probability(model, item, ids) / len(ids))
    assert losses.shape == (3,)
    torch.testing.assert_close(losses, torch.tensor(expected), **CLOSE)


def test_scores_of_answers_are_those_of_brute_force(model: Bridged) -> None:
    items = items_for(model)
    scores = model.answer_scores(items, ANSWERS)
    ids = [model.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in ANSWERS]
    expected = [[log_probability(model, item, tail) for tail in ids] for item in items]
    assert scores.shape == (3, 3)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-5, atol=1e-4)
    # One answer of one token, alone.
    [first] = model.answer_scores(items[:1], ["r"])
    [token] = model.tokens_of("r")
    torch.testing.assert_close(first, logits_after(model, items[0], []).log_softmax(-1)[token].float()[None], **CLOSE)


def test_scores_of_single_tokens_add_up_to_one(llava: Bridged) -> None:
    letters = [chr(code) for code in range(33, 127)]
    [scores] = llava.answer_scores(items_for(llava)[:1], letters)
    assert 0 < float(scores.exp().sum()) < 1
    logits = logits_after(llava, items_for(llava)[0], [])
    ids = torch.tensor([llava.tokens_of(letter)[0] for letter in letters])
    torch.testing.assert_close(scores.exp().sum().double(), logits.softmax(-1)[ids].sum(), **CLOSE)


def test_the_logit_lens(model: Bridged) -> None:
    item, answers = items_for(model)[0], ANSWERS
    [lens] = model.answer_scores([item], answers, layers=True)
    depth = model.llm.depth
    assert lens.shape == (depth + 2, 3)
    [scores] = model.answer_scores([item], answers)
    assert torch.equal(lens[-1], scores)
    torch.testing.assert_close(lens[-2], scores, **CLOSE)  # the last layer through norm and head is the model
    # By hand, each answer in a pass of its own, layer by layer.
    head, norm = model.language_model.get_output_embeddings(), model.llm.norm
    prompted = model.prepare(item, 20)
    for k, answer in enumerate(answers):
        tail = model.tokens_of(answer)
        with tiny.generation_states(model.llm) as passes, torch.inference_mode():
            model.language_model(inputs_embeds=model.embed(prompted, tail), use_cache=False)
        start = len(prompted.ids) - 1
        for layer in range(depth + 1):
            [states] = passes[layer]
            each = head(norm(states[0, start : start + len(tail)])).log_softmax(-1)
            torch.testing.assert_close(lens[layer, k], each[range(len(tail)), tail].sum(), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(lens[0], lens[-1])


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["red", "red wine"], "the answer 'red wine' begins with the answer 'red'"),
        (["blue", "green", "blue"], "the answer 'blue' begins with the answer 'blue'"),
        ([], "a list of one or more texts, got \\[\\]"),
        ("red", "a list of one or more texts, got 'red'"),
        (["red", ""], "'' holds no token"),
    ],
)
def test_sets_of_answers_that_cannot_be_scored(llava: Bridged, answers, said) -> None:
    with pytest.raises(ValueError, match=said):
        llava.answer_scores(items_for(llava), answers)


def test_responses_that_cannot_be_scored(llava: Bridged) -> None:
    items = items_for(llava)
    with pytest.raises(ValueError, match="3 items and 1 responses"):
        llava.response_loss(items, ["a"])
    with pytest.raises(ValueError, match="'' holds no token"):
        llava.response_loss(items[:1], [""])
    with pytest.raises(ValueError, match=r"item 'wide' takes .* has room for"):
        llava.response_loss(items[:1], ["x" * 500])


# ------------------------------------------------------------------------------------------------------------------------- edits


def test_an_edit_changes_what_the_decoder_sees_and_nothing_after_it(model: Bridged) -> None:
    items = items_for(model)
    before, _ = shown(model, items)
    loss, scores = model.response_loss(items, ["a ring"] * 3), model.answer_scores(items, ANSWERS)
    seen = []

    def flip(features: Tensor) -> Tensor:
        seen.append(features.shape)
        return -features

    with model.edited(flip):
        inside, _ = shown(model, items)
        changed = model.response_loss(items, ["a ring"] * 3), model.answer_scores(items, ANSWERS)
    slots = [model.prepare(items[k], 6).slots for k in (0, 2)]
    assert seen == [(1, len(s), 32) for s in (*slots, *slots, *slots)]
    for k, places in zip((0, 2), slots, strict=True):
        old, new = before["llm", 0, k].states, inside["llm", 0, k].states
        assert torch.equal(new[places], -old[places])
        prompt = [p for p in range(len(model.prepare(items[k], 6).ids)) if p not in places]
        assert torch.equal(new[prompt], old[prompt])
        # What comes before the decoder is as ever.
        for stack in (model.encoder, model.adapter):
            for layer in range(stack.depth + 1):
                assert torch.equal(before[stack.name, layer, k].states, inside[stack.name, layer, k].states)
    assert all((a != b)[[0, 2]].all() and torch.equal(a[1], b[1]) for a, b in zip(changed, (loss, scores), strict=True))
    after, _ = shown(model, items)
    assert all(torch.equal(seen.states, before[key].states) for key, seen in after.items())
    assert torch.equal(model.response_loss(items, ["a ring"] * 3), loss)


def test_edits_inside_one_another(llava: Bridged) -> None:
    prompted = llava.prepare(items_for(llava)[0], 4)
    plain = llava.features(prompted)
    with llava.edited(lambda z: z + 1), llava.edited(lambda z: 2 * z):
        torch.testing.assert_close(llava.features(prompted), 2 * (plain + 1))
    with pytest.raises(RuntimeError, match="mine"), llava.edited(lambda z: z + 1):
        raise RuntimeError("mine")
    assert torch.equal(llava.features(prompted), plain)
    with pytest.raises(ValueError, match=r"the edit made \(1, 3, 32\) of features \(1, 16, 32\)"), llava.edited(lambda z: z[:, :3]):
        llava.features(prompted)


def test_gradients_reach_the_features(model: Bridged) -> None:
    item, answer = items_for(model)[0], ANSWERS[1]
    leaves: list[Tensor] = []

    def leaf(features: Tensor) -> Tensor:
        leaves.append(features.detach().requires_grad_())
        return leaves[-1]

    with model.edited(leaf):
        (-model.response_loss([item], [answer])[0] * len(answer)).backward()
        model.answer_scores([item], ANSWERS, layers=True)[0, -1, 1].backward()
    # By hand: features, words, one pass.
    prompted, tail = model.prepare(item, 20), model.tokens_of(answer)
    z = model.features(prompted).detach().requires_grad_()
    ids = torch.tensor([prompted.ids + tail])
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[0, prompted.slots] = True
    embeddings = model.language_model.get_input_embeddings()(ids).masked_scatter(where[..., None], z)
    logits = model.language_model(inputs_embeds=embeddings, use_cache=False).logits[0, len(prompted.ids) - 1 : -1]
    logits.log_softmax(-1)[range(len(tail)), tail].sum().backward()
    assert z.grad is not None and z.grad.abs().max() > 1e-3
    for found in leaves:
        torch.testing.assert_close(found.grad, z.grad, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------- what it takes


def test_what_it_cannot_take(model: Bridged, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="item 'e' has an empty prompt"):
        model.respond([Item("e", "", " ")], "text", GREEDY)
    other = Item("o", "", "what?", picture(9, 9)) if model.takes == "audio" else Item("o", "", "what?", audio=sound(0.5))
    takes = "recordings" if model.takes == "audio" else "pictures"
    with pytest.raises(ValueError, match=f"item 'o' has an .* prompt; tiny/.* takes {takes} and text"):
        model.respond([other], "text", GREEDY)
    (tmp_path / "broken").write_bytes(b"neither picture nor sound")
    broken = {"audio": tmp_path / "broken"} if model.takes == "audio" else {"image": tmp_path / "broken"}
    with pytest.raises(ValueError, match="broken"):
        model.respond([Item("b", "", "what?", **broken)], "text", GREEDY)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot do the task 'image'"):
        model.respond(items_for(model), "image", GREEDY)


def test_a_prompt_that_is_too_long(model: Bridged) -> None:
    whole = items_for(model)[0]
    item = Item("much", "", "x" * 600, whole.image, audio=whole.audio)
    with pytest.raises(ValueError, match=r"item 'much' takes \d+ positions .* has room for 506"):
        model.respond([item], "text", GREEDY)
    [response] = model.respond([item], "text", GREEDY, truncate=True)
    assert "cut" in response.flags
    prompted = model.prepare(item, 6, truncate=True)
    assert len(prompted.ids) == 506 and len(prompted.slots) == len(model.prepare(whole, 6).slots)


def test_a_run_measures_every_stack(model: Bridged, tmp_path: Path) -> None:
    run = unisonde.probe(model, items_for(model), "text", tmp_path / "run", generation={"tokens": 9}, progress=False)
    rows = run.measurements()
    assert run.items()["error"].null_count() == 3
    key = [name for name in rows.columns if name not in ("value", "ceiling", "stderr", "flags")]
    assert not rows.select(key).is_duplicated().any() and not any(rows.select(key).null_count().row(0))
    prompts = rows.filter((rows["level"] == "prompt") & (rows["modality"] == model.takes))
    assert set(prompts["stack"]) == {"encoder", "adapter", "llm"} and set(prompts["item"]) == {
        items_for(model)[k].id for k in (0, 2)
    }
    assert set(rows.filter(rows["level"] == "response")["stack"]) == {"llm"}
