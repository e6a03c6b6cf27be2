"""Bridged models: an encoder that hears or sees, an adapter, and a text decoder that takes the adapter's features for embeddings.

    sound or picture -> encoder -> adapter -> features --+
    prompt and response -> token embeddings -------------+-> decoder -> text

A family says how an item is prepared (`prepare`) and how the encoder's inputs become features (`bridge`); all else is here:
writing text, showing states, and what a study of mismatched decoding (arXiv 2602.23136) asks of a model. That is the loss of a
given response, the decoder's scores of a closed set of answers, at its end and along its layers, and both of them with the
features changed on their way (`edited`).

What the states are. Stacks `encoder`, `adapter`, `llm`, each from one pass, `single`. The encoder's and the adapter's passes hold
prompt spans alone: the positions that hold sound or picture; class and register tokens are template, padding is not shown. Layer
0 of the adapter is what enters it, layer 1 what leaves it. The decoder's pass runs over prompt and response (teacher forcing,
DESIGN.md, decision 3). A prompt of text alone has the decoder's pass alone.

Items run one at a time: sounds differ in length, and a batch of one needs no padding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation, Model, Response, fingerprint, item_seed
from unisonde.models.parts.answers import AnswerTokens
from unisonde.models.parts.decoder import find_stack
from unisonde.models.parts.pretrained import TOKENS, ends_of, pad_of, window_of
from unisonde.models.parts.segments import spans_of
from unisonde.models.parts.text import cut_to_window, pad, write_text
from unisonde.models.trace import Kind, Modality, Row, Span, Stack, Trace, hooked

LENS_ROWS = 256
"""States that the logit lens reads at once: enough to keep a processor busy, few enough for their logits to fit."""

SHOWN = {"audio": "recordings", "image": "pictures"}


@dataclass(frozen=True)
class Prompted:
    """An item as the model takes it.

    Attributes:
        ids: the prompt's tokens; a placeholder stands once for every feature that the adapter gives.
        spans: over `ids`, all of the role `prompt`; content that is no text is where features go.
        inputs: what the encoder takes, one batch row, or one for each piece of a long recording; empty for an item of text alone.
        frames: how many positions of the encoder hold content.
        features: what the adapter gives for it, (1, n, d), where that is known already (`Bridged.ahead`).
    """

    ids: list[int]
    spans: tuple[Span, ...]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    frames: int = 0
    flags: tuple[str, ...] = ()
    features: Tensor | None = None

    @property
    def slots(self) -> list[int]:
        """The positions of `ids` at which features go, in order."""
        held = (s for s in self.spans if s.modality != "text" and s.kind == "content")
        return [position for span in held for position in range(span.start, span.stop)]

    @property
    def modality(self) -> Modality:
        """Of the features; `text` if there are none."""
        return next((s.modality for s in self.spans if s.modality != "text" and s.kind == "content"), "text")


class Bridged(Model):
    """An encoder, an adapter and a text decoder.

    Args:
        network: all of it; its attribute `language_model` is the decoder, a causal language model of `transformers`.
        tokenizer: of the decoder.
        encoder: the encoder's layers that run, and its last norm if it runs and keeps the number of positions.
        adapter: the module from the encoder's states to features, called with one tensor.
        lead: positions of the encoder before the content: class and register tokens.
        ends: tokens that end a response, beside those that the decoder and the tokenizer name.
        apart: folders of weights that are published apart from `source`, by what they are.
        generation: sampling settings, where they differ from greedy and 64 tokens.

    Raises:
        ValueError: it cannot be told which modules are the decoder's layers.
    """

    tasks = ("text",)
    takes: ClassVar[Literal["audio", "image"]]
    """What the encoder takes."""

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        name: str,
        encoder: Stack,
        adapter: nn.Module,
        source: Path | None = None,
        generation: Generation | None = None,
        lead: int = 0,
        ends: Sequence[int] = (),
        apart: Mapping[str, Path] | None = None,
    ) -> None:
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        self.encoder = encoder
        self.adapter = Stack("adapter", (adapter,))
        self.llm = find_stack(self.language_model)
        self.lead = lead
        self.ends = sorted({*ends_of(self.language_model, tokenizer, None), *ends})
        self.pad_id = pad_of(self.language_model, tokenizer, self.ends)
        self.apart = dict(apart or {})
        self._defaults = generation or Generation(tokens=TOKENS, temperature=0.0)
        self._edits: list[Callable[[Tensor], Tensor]] = []

    @property
    def module(self) -> nn.Module:
        return self.network

    @property
    def language_model(self) -> Any:
        """The decoder, with its embeddings and its head."""
        return self.network.language_model

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return self.encoder, self.adapter, self.llm

    @property
    def window(self) -> int | None:
        """The most positions of a sequence; None if the decoder sets no bound."""
        return window_of(self.language_model)

    def defaults(self, task: Task) -> Generation:
        return self._defaults

    def identity(self) -> dict[str, Any]:
        return super().identity() | {what: fingerprint(folder) for what, folder in self.apart.items()}

    # ------------------------------------------------------------------------------------------------- of each family

    @abstractmethod
    def prepare(self, item: Item, tokens: int, truncate: bool = False) -> Prompted:
        """An item as the model takes it.

        Args:
            tokens: positions to leave for the response.

        Raises:
            ValueError: the model cannot take the item, or it is too long and `truncate` is off; the sentence names it.
        """

    @abstractmethod
    def bridge(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features, (1, n, d), of the encoder's inputs, which are on the device and in the network's number format."""

    def check(self, item: Item) -> None:
        """Raises ValueError if an item is empty, or holds what the encoder does not take."""
        if item.modality not in ("text", self.takes):
            raise ValueError(f"item {item.id!r} has an {item.modality} prompt; {self.name} takes {SHOWN[self.takes]} and text")
        if item.modality == "text" and not item.prompt.strip():
            raise ValueError(f"item {item.id!r} has an empty prompt")

    def fit(
        self, ids: list[int], spans: tuple[Span, ...], tokens: int, truncate: bool, item: Item
    ) -> tuple[list[int], tuple[Span, ...], tuple[str, ...]]:
        """A prompt that leaves `tokens` positions of the window; with `truncate` its text is cut where need be, and flagged.

        Raises:
            ValueError: it does not fit.
        """
        if self.window is None:
            return ids, spans, ()
        return cut_to_window(ids, spans, self.window - tokens, truncate, self.name, item.id)

    # ------------------------------------------------------------------------------------------------------- features

    def features(self, prompted: Prompted) -> Tensor:
        """What the decoder takes from the adapter, as `edited` has it: (1, n, d).

        Raises:
            ValueError: an edit gave another shape.
        """
        handed = self._bridged(prompted.inputs) if prompted.features is None else prompted.features
        if handed.shape[:2] != (1, len(prompted.slots)):
            raise RuntimeError(
                f"the adapter of {self.name} gave {tuple(handed.shape)}, the prompt has {len(prompted.slots)} places"
            )
        for edit in self._edits:
            changed = edit(handed)
            if changed.shape != handed.shape:
                raise ValueError(
                    f"the edit made {tuple(changed.shape)} of features {tuple(handed.shape)}; it must keep their shape"
                )
            handed = changed
        return handed

    def _bridged(self, inputs: Mapping[str, Tensor]) -> Tensor:
        kind = next(self.network.parameters()).dtype
        return self.bridge({k: v.to(self.device, kind if v.is_floating_point() else None) for k, v in inputs.items()})

    def ahead(self, prompted: Prompted) -> Prompted:
        """The same with the adapter's features worked out, so that encoder and adapter need not run again: they are not shown then."""
        if not prompted.inputs:
            return prompted
        with torch.no_grad():
            return replace(prompted, features=self._bridged(prompted.inputs), inputs={})

    def embed(self, prompted: Prompted, response_ids: Sequence[int] = ()) -> Tensor:
        """What enters the decoder: embeddings of prompt and response, with features in their places, (1, L, d)."""
        embeddings = self._words([[*prompted.ids, *response_ids]])
        if not prompted.slots:
            return embeddings
        slots = torch.tensor(prompted.slots, device=self.device)
        return embeddings.index_copy(1, slots, self.features(prompted).to(embeddings))

    def _words(self, ids: Any) -> Tensor:
        return self.language_model.get_input_embeddings()(torch.as_tensor(ids, device=self.device))

    @contextmanager
    def edited(self, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While inside, the decoder takes for features what `edit` makes of them, (1, n, d) -> (1, n, d).

        Inside one another, the outer edit comes first. Encoder and adapter run, and are shown, as ever; the decoder's layer 0 shows the
        edited features.
        """
        self._edits.append(edit)
        try:
            yield
        finally:
            self._edits.pop()

    # ------------------------------------------------------------------------------------------------------ responses

    @torch.inference_mode()
    def respond(
        self,
        items: Sequence[Item],
        task: Task,
        generation: Generation,
        seed: int = 0,
        trace: Trace | None = None,
        truncate: bool = False,
    ) -> list[Response]:
        self.check_task(task)
        # All items first: one that cannot be taken is known before any is run.
        prompts = [self.prepare(item, generation.tokens or 0, truncate) for item in items]
        responses = []
        for k, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
            with self._bridge_recorded(trace, k, prompt):
                embeddings = self.embed(prompt)
            ids = torch.tensor([prompt.ids], device=self.device)
            [written] = write_text(
                self.language_model,
                self.tokenizer,
                ids,
                torch.ones_like(ids),
                generation,
                [item_seed(seed, item)],
                self.ends,
                self.pad_id,
                embeddings=embeddings,
            )
            if trace is not None:
                tail = self._words([written.ids]) if written.ids else embeddings[:, :0]
                with trace.record(self.llm, [Row(k, prompt.spans + written.spans(len(prompt.ids)))]):
                    self._read(torch.cat([embeddings, tail], 1), 1)
            responses.append(written.response(prompt.flags))
        return responses

    @torch.inference_mode()
    def show(self, items: Sequence[Item], trace: Trace, truncate: bool = False) -> list[tuple[str, ...]]:
        """Show the states of prompts alone, without a response: the states that `respond` shows at the same positions.

        Returns:
            The flags of each item.

        Raises:
            ValueError: an item cannot be taken; the sentence names it.
        """
        prompts = [self.prepare(item, 0, truncate) for item in items]
        for k, prompt in enumerate(prompts):
            with self._bridge_recorded(trace, k, prompt):
                embeddings = self.embed(prompt)
            with trace.record(self.llm, [Row(k, prompt.spans)]):
                self._read(embeddings, 1)
        return [prompt.flags for prompt in prompts]

    @contextmanager
    def _bridge_recorded(self, trace: Trace | None, item: int, prompt: Prompted) -> Iterator[None]:
        """Show the encoder's and the adapter's states of the one pass inside. Pieces of a long recording are joined end to end."""
        if trace is None or not prompt.inputs:
            yield
            return
        kinds: list[tuple[Modality, Kind]] = [(prompt.modality, "template")] * self.lead
        spans = spans_of(kinds + [(prompt.modality, "content")] * prompt.frames)
        handed = (Span(0, len(prompt.slots), "prompt", prompt.modality),)
        with ExitStack() as passes:
            for stack, held in ((self.encoder, spans), (self.adapter, handed)):
                passes.enter_context(trace.record(stack, [Row(item, held)], unpack=lambda output: [output.flatten(0, 1)]))
            yield

    def _read(self, embeddings: Tensor, last: int) -> Tensor:
        """The decoder over embeddings (1, L, d): logits of the last positions, (1, last, V)."""
        return self.language_model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=last).logits

    # --------------------------------------------------------------------------------------------------------- scores

    def tokens_of(self, text: str) -> list[int]:
        """The tokens of a response that is given as text, without its end.

        Raises:
            ValueError: there are none.
        """
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise ValueError(f"the response {text!r} holds no token for {self.name}; give one with words")
        return ids

    def response_loss(self, items: Sequence[Item], responses: Sequence[str]) -> Tensor:
        """The loss of given responses: (N,), mean nats a token of the response, from one teacher-forced pass each.

        Tokens of the prompt are not scored, nor is the end of the response. Gradients flow, to whatever asks for them.

        Raises:
            ValueError: an item cannot be taken, a response is empty, or there are more of one than of the other.
        """
        if len(items) != len(responses):
            raise ValueError(f"there are {len(items)} items and {len(responses)} responses; give one response to each item")
        pairs = zip(items, responses, strict=True)
        return torch.stack([self.loss_of(self.prepare(item, len(self.tokens_of(said))), said) for item, said in pairs])

    def loss_of(self, prompted: Prompted, response: str) -> Tensor:
        """`response_loss` of one item that is prepared: a scalar."""
        ids = self.tokens_of(response)
        logits = self._read(self.embed(prompted, ids), len(ids) + 1)
        return F.cross_entropy(logits[0, :-1].float(), torch.tensor(ids, device=self.device))

    def answer_scores(self, items: Sequence[Item], answers: Sequence[str], layers: bool = False) -> Tensor:
        """The decoder's log-probability, in nats, that its response begins with each answer: (N, K).

        It is the sum over an answer's tokens, without an end mark. So that no response begins with two answers, none of them may
        begin with another; the probabilities of a row then add up to one at most.

        Args:
            layers: score along the decoder too, (N, L + 2, K), by the logit lens: row k < L + 1 is what the last norm and the head
                make of `h_k`, the last row is the model itself.

        Raises:
            ValueError: an item cannot be taken, there is no answer, one is empty, or one begins with another.
        """
        tails = self.tokens_of_answers(answers)
        room = max(map(len, tails))
        return torch.stack([self._scores(self.prepare(item, room), tails, layers) for item in items])

    def scores_of(self, prompted: Prompted, answers: Sequence[str], layers: bool = False) -> Tensor:
        """`answer_scores` of one item that is prepared: (K,), or (L + 2, K)."""
        return self._scores(prompted, self.tokens_of_answers(answers), layers)

    def tokens_of_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """The tokens of each of a closed set of answers.

        Raises:
            ValueError: there is no answer, one is empty, or one begins with another.
        """
        if isinstance(answers, str) or not answers:
            raise ValueError(f"answers are a list of one or more texts, got {answers!r}")
        tails = [self.tokens_of(answer) for answer in answers]
        # In dictionary order a sequence stands just before those that begin with it.
        for (short, a), (long, b) in pairwise(sorted(zip(tails, answers, strict=True))):
            if long[: len(short)] == short:
                raise ValueError(f"the answer {b!r} begins with the answer {a!r}; end each with a mark such as a full stop")
        return tails

    def _scores(self, prompted: Prompted, tails: Sequence[list[int]], layers: bool) -> Tensor:
        """(K,), or (L + 2, K). The prompt runs once; the answers go on from its keys and values, side by side."""
        padded, _ = pad(tails, self.pad_id, "right")
        ids = padded.to(self.device)
        states: dict[int, list[Tensor]] = defaultdict(list)

        def keep(layer: int, output: Tensor) -> None:
            # Of the prompt, a copy of the last position: a view would keep them all.
            states[layer].append(output if states[layer] else output[:, -1:].clone())

        with hooked(self.llm, keep) if layers else nullcontext():
            start = self.language_model(inputs_embeds=self.embed(prompted), use_cache=True, logits_to_keep=1)
            logits = [start.logits]
            if ids.shape[1] > 1:
                cache = start.past_key_values
                cache.batch_repeat_interleave(len(tails))
                logits.append(
                    self.language_model(inputs_embeds=self._words(ids[:, :-1]), past_key_values=cache, use_cache=True).logits
                )
        said = AnswerTokens.of(tails, self.device)
        own = said.sums(said.reading(logits)[None])
        if not layers:
            return own[0]
        head, norm = self.language_model.get_output_embeddings(), self.llm.norm or nn.Identity()
        read = torch.stack([said.reading(states[layer]) for layer in range(self.llm.depth + 1)])
        several = read.split(max(1, LENS_ROWS // read.shape[1]))
        return torch.cat([*(said.sums(head(norm(some))) for some in several), own])
