"""Feature vectors of tiny random bridged models: the right positions, resumed runs, failed items."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tiny
from bridges import built
from known import pictures, recordings

from unisonde.data.item import Item
from unisonde.models.base import Generation
from unisonde.models.trace import Reading, Trace
from unisonde.study.decoding import features as room
from unisonde.study.decoding.features import ADAPTER_OUT, Features, Hook, collect


@pytest.fixture(scope="module", params=["ultravox", "prismatic-dinov2"])
def model(request, tmp_path_factory):
    return built(request.param, tmp_path_factory.getbasetemp())[0]


@pytest.fixture
def ultravox(tmp_path_factory):
    return built("ultravox", tmp_path_factory.getbasetemp())[0]


def test_vectors_are_those_of_a_response(model, tmp_path) -> None:
    """Held against the states that are shown while the model responds, at the same positions."""
    items = recordings(3) if model.takes == "audio" else pictures(3)
    found = collect(model, items, tmp_path / "f", progress=False)
    depths = {stack.name: stack.depth + 1 + (stack.norm is not None) for stack in model.stacks}
    assert [h for h in found.hooks if h.pool == "mean"] == [Hook(s, k) for s, n in depths.items() for k in range(n)]
    assert [h for h in found.hooks if h.pool == "last"] == [Hook("llm", k, "last") for k in range(depths["llm"])]
    for k, item in enumerate(items):
        kept = tiny.Kept()
        model.respond([item], "text", Generation(tokens=2, temperature=0.0), trace=Trace(kept))
        for seen in kept.seen:
            states = seen.select("prompt", Reading(), model.takes).double().mean(0)
            np.testing.assert_allclose(found.at(Hook(seen.stack, seen.layer))[k], states, rtol=1e-5, atol=1e-5)
            if seen.stack == "llm":
                last = seen.states[len(model.prepare(item, 0).ids) - 1]
                np.testing.assert_allclose(found.at(Hook("llm", seen.layer, "last"))[k], last, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.at(ADAPTER_OUT), found.at(Hook("llm", 0)))
    assert found.last == Hook("llm", depths["llm"] - 1)
    assert not np.allclose(found.at(Hook("llm", 1)), found.at(Hook("llm", 2)))


def test_labels_and_rows(ultravox, tmp_path) -> None:
    found = collect(ultravox, recordings(3), tmp_path / "f", name="tones", progress=False)
    assert found.attributes == ["speaker", "take"] and (len(found), found.data, found.model) == (3, "tones", ultravox.name)
    assert found.labels("speaker").tolist() == ["ann", "bob", "ann"] and found.labels("take").tolist() == ["0", "0", "1"]
    assert found.groups(None) is None
    with pytest.raises(ValueError, match="no item has a label 'mood'; there are speaker, take"):
        found.labels("mood")
    with pytest.raises(ValueError, match="no vectors of llm:99:mean"):
        found.at(Hook("llm", 99))
    assert found.run.measurements().is_empty() and found.run.items()["n_prompt"].min() > 0


def test_texts_have_the_decoder_alone(ultravox, tmp_path) -> None:
    texts = [Item("t0", "", "two blue squares"), Item("t1", "", "a ring", labels={"speaker": "ann"})]
    found = collect(ultravox, texts, tmp_path / "f", progress=False)
    assert {hook.stack for hook in found.hooks} == {"llm"}
    with pytest.raises(ValueError, match="item 't0' has no label 'speaker'"):
        found.labels("speaker")
    with pytest.raises(ValueError, match="prompts of audio and text; take the features of each kind"):
        collect(ultravox, [*texts, *recordings(1)], tmp_path / "g", progress=False)


def test_a_killed_run_goes_on(ultravox, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(room, "CHUNK", 2)
    items = recordings(5)
    whole = collect(ultravox, items, tmp_path / "f", progress=False)
    parts = whole.run.parts()
    assert len(parts) == 3
    shutil.rmtree(parts[1])
    left = parts[0].stat().st_mtime_ns
    again = collect(ultravox, items, tmp_path / "f", progress=False)
    assert again.run.parts()[0].stat().st_mtime_ns == left
    assert again.table["item"].to_list() == [item.id for item in items]
    np.testing.assert_array_equal(again.at(again.last), whole.at(whole.last))
    with pytest.raises(ValueError, match="holds a run with"):
        collect(ultravox, items[:4], tmp_path / "f", progress=False)
    np.testing.assert_array_equal(Features.open(tmp_path / "f").at(ADAPTER_OUT), whole.at(ADAPTER_OUT))


def test_an_item_that_fails_is_recorded(ultravox, tmp_path) -> None:
    broken = Item("broken", "", "x", audio=tmp_path / "gone.wav")
    found = collect(ultravox, [*recordings(2), broken], tmp_path / "f", progress=False)
    assert found.table["item"].to_list() == ["r0", "r1"]
    assert found.run.items()["error"].drop_nulls().str.contains("gone.wav").to_list() == [True]
    with pytest.raises(ValueError, match="none of the 1 items could be taken"):
        collect(ultravox, [broken], tmp_path / "g", progress=False)
    with pytest.raises(ValueError, match="no items"):
        collect(ultravox, [], tmp_path / "h", progress=False)
    with pytest.raises(ValueError, match="the same id"):
        collect(ultravox, recordings(1) * 2, tmp_path / "h", progress=False)
