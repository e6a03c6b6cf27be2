"""Janus-Pro agrees with the official code array by array, and a small mistake anywhere does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unisonde.models import janus_pro as family
from unisonde.models.parts.checkpoint import Rename
from unisonde.models.parts.janus_keys import KEYS
from unisonde.study.parity import janus_pro, verify
from unisonde.study.parity.fixture import TOLERANCE, Fixture


@pytest.fixture
def fixture(shared: Path) -> Fixture:
    return Fixture(shared / "parity", "janus_pro", janus_pro.INPUTS)


def wrong(fixture: Fixture) -> dict[str, float]:
    """The outputs that differ, and by how much."""
    janus_pro.check(fixture)
    return {name: d.largest for name, d in fixture.differences.items() if not d.ok}


def test_every_output_agrees(shared: Path, tmp_path: Path) -> None:
    for suffix in ("json", "safetensors", "npz"):
        (tmp_path / f"janus_pro.{suffix}").symlink_to(shared / "parity" / f"janus_pro.{suffix}")
    [verdict] = verify(tmp_path)
    assert verdict.ok and not verdict.left and not verdict.error
    # 5 inputs; the token ids of drawing are fed and, with our unconditional rows, compared.
    assert (verdict.arrays, verdict.inputs, verdict.compared) == (121, 5, 117)
    assert verdict.largest < 1e-5 < TOLERANCE


def test_another_rotary_base_differs(fixture: Fixture) -> None:
    fixture.config["language_config"]["rope_theta"] = 5000.0
    found = wrong(fixture)
    assert "und.prefill.h1" in found and "t2i.step0.h1" in found
    assert (
        "und.inputs_embeds" not in found and "t2i.step0.h0" not in found
    )  # rotary positions change nothing before the first layer


def test_one_masked_column_differs(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pad: Callable = family.pad

    def without_one(sequences, value, side):
        ids, mask = pad(sequences, value, side)
        mask[:, 2] = 0
        return ids, mask

    monkeypatch.setattr(family, "pad", without_one)
    found = wrong(fixture)
    assert "t2i.step0.h1" in found and "t2i.cfg_logits" in found and "und.gen0.h1" in found


@pytest.mark.parametrize(
    ("swapped", "seen"),
    [
        (("self_attn.q_proj", "self_attn.k_proj"), "und.inputs_embeds"),  # of the tower: in the fused matrix the query comes first
        (("mid.block_1", "mid.block_2"), "t2i.image"),
        (("model.aligner.fc1.bias", "model.aligner.hidden_layers.0.bias"), "und.inputs_embeds"),
        (("model.generation_embeddings.weight", "model.vqmodel.quantize.embedding.weight"), "t2i.step1.h0"),
    ],
)
def test_swapped_keys_differ(fixture: Fixture, monkeypatch: pytest.MonkeyPatch, swapped, seen) -> None:
    one, other = swapped

    class Swapped(type(KEYS)):  # type: ignore[misc]
        def of(self, key: str) -> tuple[Rename | None, tuple[str, ...]]:
            rename, names = super().of(key)
            return rename, tuple(
                name.replace(one, "\0").replace(other, one).replace("\0", other) if "language_model" not in name else name
                for name in names
            )

    monkeypatch.setattr(janus_pro, "KEYS", Swapped(**vars(KEYS)))
    assert seen in wrong(fixture)


def test_the_tanh_activation_differs(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def tanh(config, image_token):
        made = family.configuration(config, image_token)
        made.vision_config.hidden_act = "gelu_pytorch_tanh"
        return made

    monkeypatch.setattr(janus_pro, "configuration", tanh)
    assert "und.prefill.final" in wrong(fixture)


def test_a_repeated_position_differs(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    cumsum = torch.Tensor.cumsum

    def stuck(self, *args, **kwargs):
        counted = cumsum(self, *args, **kwargs)
        return counted.clamp(max=4) if counted.dtype == torch.int64 else counted

    monkeypatch.setattr(torch.Tensor, "cumsum", stuck)
    assert "t2i.step1.h1" in wrong(fixture)


def test_guidance_and_unconditional_prompts_are_compared(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture.config["run"]["t2i"]["cfg_weight"] = 4.9
    assert set(wrong(fixture)) == {"t2i.cfg_logits"}
    fixture.differences.clear()
    monkeypatch.setattr(family.JanusPro, "unconditional", lambda self, ids: [*[self.pad_id] * (len(ids) - 1), ids[-1]])
    assert "t2i.tokens" in wrong(fixture)


def test_the_quantiser_of_transformers_differs(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `JanusPro.codes_of` mends: codes are looked up among vectors of unit length."""

    def stock(self: family.JanusPro, pixels: torch.Tensor) -> torch.Tensor:
        return self.network.model.vqmodel.encode(pixels).image_tokens

    monkeypatch.setattr(family.JanusPro, "codes_of", stock)
    assert set(wrong(fixture)) == {"vq.encode_idx"}


def test_one_layer_of_other_weights_differs(fixture: Fixture) -> None:
    fixture.weights["language_model.model.layers.2.mlp.up_proj.weight"][0, 0] += 0.05
    found = wrong(fixture)
    assert "und.prefill.h3" in found and "und.prefill.h2" not in found


def test_a_recorded_state_cannot_be_fed(fixture: Fixture) -> None:
    for name in ("und.prefill.h0", "t2i.cfg_logits", "und.generated", "vq.encode_idx"):
        with pytest.raises(ValueError, match="never fed"):
            fixture.feed(name)
    assert not fixture.fed
