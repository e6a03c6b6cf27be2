"""Parity of Show-o: drawing step by step, a question about a picture with its answer, and text alone.

The recorded sampler drew by `torch.multinomial`, whose stream is not recorded, so the token ids that entered each step are fed, and
the codes that it returned; what the sampler decides by itself is compared: how many codes stay masked after each step, and which
one it masks at the end, where its noise is zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from unisonde.models.base import Generation
from unisonde.models.parts.checkpoint import Keys, empty, fill
from unisonde.models.parts.magvit2 import Magvit2, Magvit2Config
from unisonde.models.parts.sampling import guided
from unisonde.models.parts.showo_network import KEYS, PhiSizes, Showo, ShowoConfig, visibility
from unisonde.models.showo import Clip, Drawing, Encoded, ShowO, remask
from unisonde.models.trace import hooked
from unisonde.study.parity.fixture import Fixture

INPUTS = (r"t2i\.input_ids", r"t2i\.step_inputs", r"t2i\.generated", r"mmu\.input_ids", r"lm\.input_ids")


class Letters:
    """A tokenizer whose tokens are single characters, so that recorded token ids can be a prompt's text."""

    unk_token_id = None

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.count = config["llm_vocab"]
        self.bos_token_id, self.eos_token_id = config["special"]["<|sot|>"], config["special"]["<|eot|>"]

    def __len__(self) -> int:
        return self.count

    def __call__(self, text: str, **_: Any) -> dict[str, list]:
        return {"input_ids": [ord(c) for c in text], "offset_mapping": [(k, k + 1) for k in range(len(text))]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def config_of(official: Mapping[str, Any]) -> ShowoConfig:
    """Ours of the fixture's configuration.

    Raises:
        ValueError: the ids of its marks are not where ours are.
    """
    config = ShowoConfig(
        w_clip_vit=True,
        vocab_size=official["vocab"],
        llm_vocab_size=official["llm_vocab"],
        codebook_size=official["codebook"],
        num_vq_tokens=official["n_vq"],
        num_new_special_tokens=official["n_special"],
        max_seq_length=official["max_text"],
        llm=PhiSizes.of(official["phi"]),
        clip_width=32,
    )
    ours = {
        name: config.mark("[PAD]" if name == "<|pad|>" else name) for name in official["special"] if name[2:5] not in ("sot", "eot")
    }
    if any(official["special"][name] != number for name, number in ours.items()) or config.mask != official["run"]["mask_token_id"]:
        raise ValueError(f"the marks are {ours} and {config.mask} with us, {official['special']} in the fixture")
    return config


def model_of(official: Mapping[str, Any], weights: Mapping[str, Tensor], keys: Keys = KEYS) -> ShowO:
    """Our model of the fixture; its image tokenizer and vision tower are not part of it."""
    config = config_of(official)
    network = empty(lambda: Showo(config))
    fill(network, weights.items(), keys, "cpu", torch.float32, "showo")
    sizes = Magvit2Config(32, (1,), (1,), (1,), (1,), bits=config.codebook_size.bit_length() - 1)
    nothing: Any = SimpleNamespace()
    return ShowO(network, empty(lambda: Magvit2(sizes)), Letters(official), "showo", clip=Clip(nothing, nothing))


@torch.inference_mode()
def check(fixture: Fixture) -> None:
    model = model_of(fixture.config, fixture.weights)
    check_drawing(fixture, model)
    check_question(fixture, model)
    check_text(fixture, model)


def passes(model: ShowO, run: Callable[[], Any]) -> tuple[list[list[Tensor]], Any]:
    """The states of every pass inside, layer by layer, and what `run` gave."""
    seen: dict[int, list[Tensor]] = defaultdict(list)
    with hooked(model.network.stack, lambda layer, output: seen[layer].append(output.clone())):
        result = run()
    return [list(layers) for layers in zip(*(seen[layer] for layer in sorted(seen)), strict=True)], result


def blocked(sees: Tensor) -> Tensor:
    """A mask in the official form: 0 where a row sees a column, the least 64-bit integer where not."""
    return torch.zeros(sees.shape).masked_fill(~sees, torch.iinfo(torch.int64).min)[:, None]


def check_drawing(fixture: Fixture, model: ShowO) -> None:
    network, config, run = model.network, model.config, fixture.config["run"]["t2i"]
    pad = config.mark("[PAD]")
    window, steps = config.prompt_window, run["steps"]
    official = fixture.feed("t2i.input_ids")
    # The fixture's prompts begin, after [PAD], with two marks and end with one; their words go through our template.
    texts = ["".join(chr(i) for i in row[:window].tolist() if i != pad)[2:-1] for row in official]
    prompts = [model.assemble(text, "image").ids for text in [*texts, *[""] * len(texts)]]
    ids = torch.tensor([[pad] * (window - len(p)) + p for p in prompts])
    there = ids != pad
    drawing = Drawing(network, ids, there)
    blank = torch.zeros(len(texts), config.num_vq_tokens, dtype=torch.long)
    stays = blank == 0
    whole = torch.cat([ids, drawing.picture_ids(blank, stays)], 1)
    conditional, unconditional = whole.chunk(2)
    if not torch.equal(conditional, official):
        raise ValueError("t2i.input_ids: our template gives other token ids")
    fixture.compare("t2i.uncond_ids", unconditional)
    fixture.compare("t2i.mask", blocked(drawing.sees))

    [prompt_states], _ = passes(model, drawing.read_prompts)
    inputs = fixture.feed("t2i.step_inputs")
    generated = fixture.feed("t2i.generated")
    for step, tokens in enumerate(inputs):
        picture = tokens[: len(texts), -config.num_vq_tokens - 1 : -1]
        masked = picture == config.mask
        codes = torch.where(masked, 0, picture - config.first_code)
        theirs, ours = (which.sum(1).tolist() for which in (masked, stays))
        if theirs != ours:
            raise ValueError(f"t2i.step_inputs: {theirs} codes are masked at step {step}, {ours} by our schedule")
        [states], final = passes(model, partial(drawing.states, codes, masked))
        fixture.states(f"t2i.step{step}", [torch.cat(pair, 1) for pair in zip(prompt_states, states, strict=True)])
        if step == 0:
            fixture.compare("t2i.logits0", network.logits(torch.cat([prompt_states[-1], final], 1)))
        with_prompt, without = network.code_logits(final[:, 1:-1]).chunk(2)
        logits = guided(with_prompt, without, 1 + run["guidance"])
        guesses = torch.where(masked, generated, codes)
        stays = remask(logits, guesses, masked, step, steps, run["temperature"], torch.full(codes.shape, 0.5))
    fixture.compare("t2i.final_ids", torch.cat([ids[: len(texts)], drawing.picture_ids(guesses, stays)[: len(texts)]], 1))

    done = Drawing(network, ids[: len(texts)], there[: len(texts)])
    settled = torch.zeros_like(generated, dtype=torch.bool)
    fixture.compare("t2i.finished_ids", torch.cat([done.ids, done.picture_ids(generated, settled)], 1))
    (before, after), final = passes(model, lambda: (done.read_prompts(), done.states(generated, settled))[1])
    states = [torch.cat(pair, 1) for pair in zip(before, after, strict=True)]
    fixture.states("t2i.finished", states)
    fixture.compare("t2i.finished_logits", network.logits(states[-1]))


def check_question(fixture: Fixture, model: ShowO) -> None:
    ids = fixture.feed("mmu.input_ids")[0].tolist()
    shown = range(ids.index(model.config.mark("<|eoi|>")) + 1)
    prompt = Encoded(ids, (), everywhere=shown)
    embedded = model.embed([prompt], None)
    fixture.compare("mmu.mask", blocked(visibility(*model.layout([prompt], [len(ids)]))))
    settings = Generation(tokens=fixture.config["run"]["mmu"]["tokens"], temperature=0.0)
    model.eos_id = -1  # the recorded loop had no end either
    run, [written] = passes(model, lambda: model.write([prompt], embedded, settings, [0]))
    fixture.compare("mmu.generated", torch.tensor(written.ids))
    fixture.states("mmu.prefill", run[0])
    fixture.compare("mmu.logits", model.network.logits(run[0][-1]))
    for number in range(len(run)):
        fixture.states(f"mmu.gen{number}", [torch.cat(parts, 1) for parts in zip(*run[: number + 1], strict=True)])


def check_text(fixture: Fixture, model: ShowO) -> None:
    prompt = Encoded(fixture.feed("lm.input_ids")[0].tolist(), ())
    [states], final = passes(model, lambda: model.read([prompt], model.embed([prompt], None), [[]]))
    fixture.states("lm.prefill", states)
    fixture.compare("lm.logits", model.network.logits(final))
