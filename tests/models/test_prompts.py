"""What is refused before a model runs, and where the features of a picture go."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tiny import byte_tokenizer

from unisonde.data.item import Item
from unisonde.models.parts.prompts import check_marks, check_prompt, check_words, picture_places
from unisonde.models.trace import Span

PICTURE = Image.new("RGB", (4, 4))


def test_a_tokenizer_without_its_marks() -> None:
    tokenizer = byte_tokenizer(["<a>", "<b>"])
    check_marks(tokenizer, ["<a>", "<b>"], "mine", "Family")
    with pytest.raises(ValueError, match="the tokenizer of mine lacks <c>, <d>: it is not Family's"):
        check_marks(tokenizer, ["<a>", "<c>", "<d>"], "mine", "Family")


@pytest.mark.parametrize(
    ("item", "task", "said"),
    [
        (Item("a", "c", " \n"), "text", "item 'a' has an empty prompt"),
        (Item("a", "c", ""), "image", "item 'a' has an empty prompt"),
        (Item("a", "c", "a cat", audio=Path("a.wav")), "text", "item 'a' has an audio prompt; mine takes text and pictures alone"),
        (Item("a", "c", "a cat", PICTURE), "image", "item 'a' has an image prompt; mine draws from text prompts alone"),
    ],
)
def test_prompts_of_nothing_and_pictures_to_draw_from(item, task, said) -> None:
    with pytest.raises(ValueError, match=said):
        check_prompt(item, task, "mine")


def test_prompts_that_are_taken() -> None:
    for item, task in ((Item("a", "c", "a cat"), "image"), (Item("a", "c", "", PICTURE), "text")):
        check_prompt(item, task, "mine")


class Words:
    """A tokenizer of two words."""

    known, unk_token_id, bos_token_id, eos_token_id = {"a": 1, "cat": 2, ".": 3}, 0, 4, 5

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.known.get(token, self.unk_token_id)


def test_unknown_words_are_named_once_and_in_order() -> None:
    item = Item("x", "c", "A dog, a cat, a Bee.")
    with pytest.raises(ValueError, match="mine does not know the words ,, Bee, dog of item 'x'; it was trained on few"):
        check_words(Words(), [1, 0, 1, 2, 0], item, "mine")
    check_words(Words(), [1, 2, 3], item, "mine")


def test_an_unknown_token_that_also_ends_says_nothing() -> None:
    tokenizer = Words()
    tokenizer.eos_token_id = 0
    check_words(tokenizer, [0, 1, 0], Item("x", "c", "a dog"), "mine")


def test_features_go_where_the_spans_say() -> None:
    rows = [
        (Span(0, 2, "prompt", "text", "template"), Span(2, 4, "prompt", "image"), Span(4, 5, "prompt", "text")),
        (Span(0, 1, "prompt", "image", "template"), Span(1, 3, "prompt", "image")),
        (Span(0, 3, "prompt", "text"),),
    ]
    assert picture_places(rows, [0, 0, 0], 5).int().tolist() == [[0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0] * 5]
    assert picture_places(rows, [0, 2, 2], 5).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1], [0] * 5]
    assert picture_places(rows[:1], [0], 6, before=1).int().tolist() == [[0, 1, 1, 1, 0, 0]]
