"""BAGEL against the recorded official model: a picture, a text and greedy words; four steps of flow with guidance; the autoencoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from unisonde.models.bagel import Marks, arrange, drawing_contexts, read_rows
from unisonde.models.parts import flux_vae
from unisonde.models.parts.bagel_flow import Canvas, Guidance, flow_times
from unisonde.models.parts.bagel_network import BagelConfig, BagelNetwork, filled, from_squares, places_of, sinusoids, squares
from unisonde.models.parts.sampling import draw
from unisonde.models.parts.segments import spans_of
from unisonde.models.trace import hooked
from unisonde.study.parity import bagel_vae
from unisonde.study.parity.fixture import Fixture

INPUTS = (r"und\.image", r"und\.text_ids", r"t2i\.text_ids", r"t2i\.packed_init_noises", r"vae\.x")


def config_of(fixture: Fixture) -> BagelConfig:
    raw = copy.deepcopy(fixture.config)
    raw["vit"]["num_hidden_layers"] += 1  # the fixture says how many there are, the published file one more
    own = {
        "vision_places": raw["vit_max_num_patch_per_side"],
        "latent_channels": raw["vae"]["z_channels"],
        "latent_patch": raw["latent_patch_size"],
        "latent_places": raw["max_latent_size"],
        "reduction": raw["vae"]["downsample"],
    }
    return BagelConfig.from_dicts(raw["llm"], raw["vit"], own)


def marks_of(fixture: Fixture) -> Marks:
    ids = fixture.config["tok"]
    return Marks(ids["bos_token_id"], ids["eos_token_id"], ids["start_of_image"], ids["end_of_image"])


@contextmanager
def passes_of(network: BagelNetwork) -> Iterator[list[list[Tensor]]]:
    """The passes that run inside: for each, what entered and left the layers, and what left the last norms; of the first row."""
    passes: list[list[Tensor]] = []

    def take(layer: int, output: Tensor) -> None:
        if layer == 0:
            passes.append([])
        passes[-1].append(output[0].clone())

    with hooked(network.stack, take):
        yield passes


@torch.inference_mode()
def check(fixture: Fixture) -> None:
    """Build the tiny model and compare every output."""
    network = filled(config_of(fixture), fixture.weights.items(), "cpu", torch.float32, fixture.name)
    tables(network)
    understood(fixture, network)
    drawn(fixture, network)
    bagel_vae.check(fixture)


def tables(network: BagelNetwork) -> None:
    """The fixed tables of places, which the checkpoint holds, are those that a twin begins with.

    Raises:
        ValueError: they are not.
    """
    for table in (network.latent_pos_embed, network.vit_pos_embed):
        made = sinusoids(int(len(table.pos_embed) ** 0.5), table.pos_embed.shape[1])
        if not torch.allclose(made, table.pos_embed, atol=1e-5):
            raise ValueError("the official table of places is not what `sinusoids` makes")


def understood(fixture: Fixture, network: BagelNetwork) -> None:
    """A picture and a text in one pass, where the official code makes two, and then word by word; and all of it in one pass again."""
    config, marks, run = network.config, marks_of(fixture), fixture.config["run"]["und"]
    pixels, text = fixture.feed("und.image"), fixture.feed("und.text_ids").tolist()
    patches = squares(pixels, config.vision_patch)
    grid = (pixels.shape[1] // config.vision_patch, pixels.shape[2] // config.vision_patch)
    picture = [marks.begin_image, *[marks.begin_image] * len(patches), marks.end_image]
    held = [("text", "template"), *[("image", "content")] * len(patches), ("text", "template"), *[("text", "content")] * len(text)]
    ids, spans = [*picture, *text, marks.bos], spans_of([*held, ("text", "template")])  # type: ignore[list-item]
    layout = arrange(spans)
    length = len(picture)

    fixture.compare("und.vit.packed_vit_tokens", patches)
    fixture.compare("und.vit.packed_vit_position_ids", places_of(grid, config.vision_places))
    outer = torch.tensor([k for k in range(length) if not layout.filled[k]])
    fixture.compare("und.vit.packed_text_indexes", outer)
    fixture.compare("und.vit.packed_text_ids", torch.tensor(ids)[outer])
    fixture.compare("und.vit.packed_vit_token_indexes", torch.tensor(layout.filled).nonzero()[:, 0])
    fixture.compare("und.vit.packed_position_ids", torch.tensor(layout.places[:length]))
    fixture.compare("und.text_pos", torch.tensor(layout.places[length:-1]))
    fixture.compare("und.start_pos", torch.tensor(layout.places[-1:]))

    features = network.seen(pixels)
    with passes_of(network) as passes:
        states, context = read_rows(network, [ids], [layout], [features], marks.eos, "left")
        written = network.write(
            states[:, -1],
            context.past or (),
            context.places,
            context.there,
            lambda logits, step: draw(logits, 0.0, torch.zeros(1)),
            run["greedy_tokens"] - 1,  # the start token is the first that is recorded
            marks.eos,
        )
    start = len(ids) - 1
    fixture.compare("und.generated", torch.cat([torch.tensor([[marks.bos]]), written], 1).T)
    fixture.states("und.img", [layer[:length] for layer in passes[0]])
    fixture.states("und.text", [layer[length:start] for layer in passes[0]])
    fixture.states("und.gen0", [layer[start:] for layer in passes[0]])
    for token, layers in enumerate(passes[1:], 1):
        fixture.states(f"und.gen{token}", layers)

    longer = spans_of([*held, *[("text", "template")] * (1 + written.shape[1])])  # type: ignore[list-item]
    with passes_of(network) as passes:
        read_rows(network, [ids + written[0].tolist()], [arrange(longer)], [features], marks.eos, "right")
    for token in range(written.shape[1] + 1):
        fixture.states(f"und.gen{token}", [layer[start + token : start + token + 1] for layer in passes[0]])


def drawn(fixture: Fixture, network: BagelNetwork) -> None:
    """Text to image: the prompt, and passes in the order of their calls, conditional and, within the interval, without the text."""
    config, marks, run = network.config, marks_of(fixture), fixture.config["run"]["t2i"]
    ids = fixture.feed("t2i.text_ids").tolist()
    noise = fixture.feed("t2i.packed_init_noises")[None]
    grid = (run["image"][0] // config.stride, run["image"][1] // config.stride)
    spans = spans_of([("text", "content")] * len(ids))
    with passes_of(network) as passes:
        contexts = drawing_contexts(network, [ids], [arrange(spans)], marks.eos)
    fixture.states("t2i.prompt", passes[0])
    canvas = Canvas(network, marks.begin_image, marks.end_image, grid)
    length = canvas.tokens + 2
    fixture.compare("t2i.packed_text_ids", torch.tensor([canvas.begin, canvas.end]))
    fixture.compare("t2i.packed_text_indexes", torch.tensor([0, length - 1]))
    fixture.compare("t2i.packed_vae_token_indexes", torch.arange(1, length - 1))
    fixture.compare("t2i.packed_vae_position_ids", places_of(grid, config.latent_places))
    fixture.compare("t2i.packed_position_ids", contexts.whole.places.expand(length))
    fixture.compare("t2i.cfg_position_ids", contexts.without_text.places.expand(length))

    above, until = run["cfg_interval"]
    guidance = Guidance(run["cfg_text_scale"], run["cfg_img_scale"], above, until, run["cfg_renorm_type"], run["cfg_renorm_min"])
    with passes_of(network) as passes:
        latents = canvas.draw(contexts, noise, flow_times(run["num_timesteps"]), guidance)
    recorded = {name.split(".")[1] for name in fixture.arrays if name.startswith("t2i.pass")}
    if len(passes) != len(recorded):
        raise ValueError(f"ours made {len(passes)} passes, the official code {len(recorded)}")
    for number, layers in enumerate(passes):
        fixture.states(f"t2i.pass{number}", layers)
    fixture.compare("t2i.latent", latents[0])
    z = from_squares(latents, grid, config.latent_patch)
    fixture.compare("t2i.z", z)
    fixture.compare("t2i.image", flux_vae.decode(bagel_vae.build(fixture), z))
