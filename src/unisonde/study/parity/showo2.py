"""Parity of Show-o2: dual path, omni mask, prompt layouts, Euler sampling with guidance, and greedy text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from unisonde.models.parts.sampling import draw
from unisonde.models.parts.showo2_network import Showo2Config, Showo2Network, additive, filled, flow_times, visible
from unisonde.models.parts.text import pad
from unisonde.models.showo2 import Marks, drawing, image_places, read_block
from unisonde.models.trace import Stack, hooked
from unisonde.study.parity.fixture import Fixture

INPUTS = (r"t2i\.text_tokens", r"t2i\.z0", r"und\.latent", r"lm\.input_ids")


def config_of(fixture: Fixture) -> Showo2Config:
    raw, llm, head, siglip = (fixture.config[part] for part in ("model", "qwen2", "head", "siglip"))
    return Showo2Config(
        hidden=llm["hidden_size"],
        ffn=llm["intermediate_size"],
        layers=llm["num_hidden_layers"],
        heads=llm["num_attention_heads"],
        kv_heads=llm["num_key_value_heads"],
        vocabulary=raw["llm_vocab_size"],
        tied=llm["tie_word_embeddings"],
        positions=llm["max_position_embeddings"],
        rope_theta=llm["rope_theta"],
        latent_channels=raw["image_latent_dim"],
        patch=raw["patch_size"],
        grid=raw["image_latent_height"],
        window=fixture.feed("t2i.text_tokens").shape[1],
        semantic_width=siglip["hidden"],
        semantic_ffn=siglip["inter"],
        semantic_layers=siglip["layers"] - 1,  # the last one is left out
        semantic_heads=siglip["heads"],
        semantic_grid=raw["image_latent_height"],
        flow_width=head["hidden"],
        flow_ffn=head["inter"],
        flow_layers=head["layers"],
        flow_heads=head["heads"],
        flow_kv_heads=head["kv"],
    )


def marks_of(fixture: Fixture) -> Marks:
    ids = fixture.config["ids"]
    return Marks(ids["bos"], ids["eos"], ids["boi"], ids["eoi"], ids["img"], ids["pad"])


@contextmanager
def passes_of(network: Showo2Network) -> Iterator[list[list[Tensor]]]:
    """The passes that run inside: for each, what entered and left the layers, and what left the last norm."""
    passes: list[list[Tensor]] = []

    def take(layer: int, output: Tensor) -> None:
        if layer == 0:
            passes.append([])
        passes[-1].append(output.clone())

    with hooked(Stack("llm", tuple(network.showo.model.layers), network.showo.model.norm), take):
        yield passes


@torch.inference_mode()
def check(fixture: Fixture) -> None:
    config = config_of(fixture)
    network = filled(config, fixture.weights.items(), "cpu", torch.float32, fixture.name)
    drawn(fixture, network)
    understood(fixture, network)
    ids = fixture.feed("lm.input_ids")
    with passes_of(network) as passes:
        states = network.states(
            network.showo.model.embed_tokens(ids), additive(visible(torch.zeros_like(ids).bool()), torch.float32)
        )
    fixture.states("lm", passes[0])
    fixture.compare("lm.logits", network.showo.lm_head(states))


def drawn(fixture: Fixture, network: Showo2Network) -> None:
    """Text to image. Of the recorded ids only the prompts are taken; the rest of the sequence is laid out anew."""
    config, marks, run = network.config, marks_of(fixture), fixture.config["run"]["t2i"]
    noise = fixture.feed("t2i.z0")
    recorded = fixture.feed("t2i.text_tokens").tolist()
    prompts = [row[1 : row.index(marks.begin_image)] for row in recorded[: len(noise)]] + [[]] * len(noise)
    sequences = [drawing(prompt, marks, config.tokens) for prompt in prompts]
    ids, _ = pad([*sequences, [marks.pad] * config.window], marks.pad, "right")
    ids = ids[:-1]
    starts = torch.tensor([len(prompt) + 2 for prompt in prompts])
    where = image_places(starts, config.tokens + 1, ids.shape[1])
    mask = additive(visible(where), torch.float32)
    fixture.compare("t2i.text_tokens", ids)
    fixture.compare("t2i.modality_positions", torch.stack([where.int().argmax(1), where.sum(1)], -1)[:, None])
    fixture.compare("t2i.mask", mask)

    with passes_of(network) as passes:
        latents, t = noise.repeat(2, 1, 1, 1), torch.full((len(ids),), run["single_t"])
        embeddings, time = network.embed(ids, where, latents, t)
        states = network.states(embeddings, mask)
        fixture.compare("t2i.single.v", network.velocity(states, time, where, mask))
        fixture.compare("t2i.single.logits", network.showo.lm_head(states))
    fixture.states("t2i.single", passes[0])

    times = flow_times(run["num_steps"])
    fixture.compare("t2i.t", times[:-1, None].expand(-1, len(ids)))
    with passes_of(network) as passes:
        fixture.compare("t2i.latent", network.draw(ids, where, noise, times, run["guidance"]))
    for step, layers in enumerate(passes):
        fixture.states(f"t2i.step{step}", layers)


def understood(fixture: Fixture, network: Showo2Network) -> None:
    """Image and text to text: our own loop writes, and one pass over all of it gives the same states."""
    marks, run = marks_of(fixture), fixture.config["run"]["und"]
    latents, tokens = fixture.feed("und.latent"), network.config.semantic_tokens
    before = [*run["prefix_ids"], marks.begin_image]
    ids = torch.tensor([before + [marks.image] * (tokens + 1) + run["suffix_ids"][1:]])  # the suffix begins with the mark
    starts = torch.tensor([len(before)])
    where, block = (places(starts, tokens + 1, ids.shape[1]) for places in (image_places, read_block))
    time = torch.tensor([run["time"]])
    embeddings, embedded = network.embed(ids, where, latents, time)
    fixture.compare("und.semantic", network.semantic(latents))
    fixture.compare("und.fused", network.fused(latents))
    fixture.compare("und.time_embed", network.time_embed_proj(embedded)[:, None])
    fixture.compare("und.inputs_embeds", embeddings)
    fixture.compare("und.modality_positions", torch.stack([block.int().argmax(1), block.sum(1)], -1)[:, None])
    fixture.compare("und.mask", additive(visible(block), torch.float32))

    with passes_of(network) as passes:
        written = network.write(
            embeddings,
            block,
            torch.ones_like(ids),
            lambda logits, step: draw(logits, 0.0, torch.zeros(1)),
            run["tokens"],
            marks.eos,
        )
    fixture.compare("und.generated", written[0])
    fixture.states("und.prefill", passes[0])
    for token in range(len(passes)):
        fixture.states(f"und.gen{token}", [torch.cat(pieces, 1) for pieces in zip(*passes[: token + 1], strict=True)])

    longer = torch.cat([ids, written[:, :-1]], 1)
    where, block = (places(starts, tokens + 1, longer.shape[1]) for places in (image_places, read_block))
    embeddings, _ = network.embed(longer, where, latents, time)
    with passes_of(network) as passes:
        states = network.states(embeddings, additive(visible(block), torch.float32))
    fixture.compare("und.logits", network.showo.lm_head(states[:, : ids.shape[1]]))
    for token in range(written.shape[1]):
        fixture.states(f"und.gen{token}", [layer[:, : ids.shape[1] + token] for layer in passes[0]])
