"""JanusFlow against the recorded official model: understanding, and four steps of rectified flow with guidance."""

from __future__ import annotations

import copy
from itertools import count
from typing import Any

import torch
from torch import Tensor

from unisonde.models.janusflow import image_slots
from unisonde.models.parts.checkpoint import empty, fill
from unisonde.models.parts.flow_llama import KEYS, Flow, JanusFlowConfig, JanusFlowNetwork, even_times
from unisonde.models.parts.sampling import euler
from unisonde.models.parts.segments import spans_of
from unisonde.models.trace import hooked
from unisonde.study.parity.fixture import Fixture

INPUTS = (r"und\.input_ids", r"und\.pixel_values", r"t2i\.tokens", r"t2i\.z0")


def check(fixture: Fixture) -> None:
    """Build the tiny model and compare every output."""
    network = build(fixture)
    with torch.inference_mode():
        understand(fixture, network)
        draw(fixture, network)


def build(fixture: Fixture) -> JanusFlowNetwork:
    """The tiny model, filled as a checkpoint is. The fixture has the tower's sizes under `siglip`."""
    raw: dict[str, Any] = copy.deepcopy(fixture.config)
    raw["vision_und_enc_config"]["params"] |= raw["siglip"]
    config = JanusFlowConfig.from_dict(raw)
    network = empty(lambda: JanusFlowNetwork(config)).eval()
    fill(network, fixture.weights.items(), KEYS, "cpu", torch.float32, fixture.name)
    return network


def understand(fixture: Fixture, network: JanusFlowNetwork) -> None:
    ids, pixels = fixture.feed("und.input_ids"), fixture.feed("und.pixel_values")
    placeholder = fixture.config["run"]["ids"]["image"]
    spans = [
        spans_of([("image", "content") if token == placeholder else ("text", "content") for token in row]) for row in ids.tolist()
    ]
    where = image_slots(spans, [0] * len(ids), ids.shape[1])
    embeddings = network.embed(ids, network.see(pixels.flatten(0, 1)), where)
    fixture.compare("und.inputs_embeds", embeddings)
    layers: list[Tensor] = []
    with hooked(network.stack, lambda _, states: layers.append(states.clone())):
        final = network.llm(inputs_embeds=embeddings, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    fixture.states("und.prefill", layers)
    fixture.compare("und.logits", network.language_model.lm_head(final))


def draw(fixture: Fixture, network: JanusFlowNetwork) -> None:
    """The prompts are the conditional rows; the unconditional ones, masks and positions are our own."""
    tokens, z = fixture.feed("t2i.tokens"), fixture.feed("t2i.z0")
    run = fixture.config["run"]
    settings, pad_id = run["t2i"], run["ids"]["pad"]
    prompts = tokens[: len(z), :-1].tolist()  # the last token gives way to the time token
    flow = Flow(network, prompts, pad_id, settings["cfg_weight"])
    response = 1 + settings["tokens"]
    fixture.compare("t2i.tokens", torch.cat([flow.branches.ids, tokens[:, -1:]], 1))
    fixture.compare("t2i.attention_mask", flow.branches.attention(response))

    layers: list[Tensor] = []
    entered: list[tuple[Tensor, Tensor]] = []
    watch = network.vision_gen_enc_model.register_forward_hook(lambda module, args, output: entered.append(output))
    with hooked(network.stack, lambda _, states: layers.append(states.clone())):
        flow.read()
        prompt = list(layers)
        steps = count()

        def velocity(z: Tensor, time: float) -> Tensor:
            layers.clear()
            found, step = flow.velocity(z, time), next(steps)
            # The official loop runs the prompt again each time; ours runs it once.
            fixture.states(f"t2i.step{step}", [torch.cat(parts, 1) for parts in zip(prompt, layers, strict=True)])
            fixture.compare(f"t2i.v{step}", found)
            return found

        fixture.compare("t2i.z_final", euler(velocity, z, even_times(settings["steps"])))
    watch.remove()
    patches, time = entered[0]
    fixture.compare("t2i.enc_out", torch.cat([patches, patches]))
    fixture.compare("t2i.t_emb", torch.cat([time, time]))
