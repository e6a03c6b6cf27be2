"""The prompt list that comes with the package: its balance, and that its riddles have the answers that it gives."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, permutations, product

from unisonde.data import prompts

ITEMS = {item.id: item for item in prompts.read()}


def test_sixteen_of_each_category() -> None:
    assert list(Counter(item.category for item in ITEMS.values()).items()) == [
        ("composition", 16),
        ("deductive", 16),
        ("inductive", 16),
        ("abductive", 16),
    ]
    assert all(id == f"{item.category}-{id[-2:]}" for id, item in ITEMS.items())
    skills = Counter((item.category, item.labels["skill"]) for item in ITEMS.values())
    assert all(count == (4 if category in ("composition", "deductive") else 8) for (category, _), count in skills.items())


def test_lengths_vary_between_20_and_120_words() -> None:
    lengths = [len(item.prompt.split()) for item in ITEMS.values()]
    assert min(lengths) >= 20 and max(lengths) <= 120
    for category in ("composition", "deductive", "inductive", "abductive"):
        own = [len(item.prompt.split()) for item in ITEMS.values() if item.category == category]
        assert min(own) <= 40 and max(own) >= 100


def test_text_is_clean() -> None:
    for item in ITEMS.values():
        assert item.modality == "text"
        assert item.prompt == " ".join(item.prompt.split()) and item.prompt.isprintable()
        assert item.prompt[-1] in ".?"


def test_answers_are_given_where_something_is_asked() -> None:
    for item in ITEMS.values():
        assert ("answer" in item.labels) == (item.category != "composition")
        assert "answer" not in item.labels or item.labels["answer"] not in item.prompt


def test_no_two_prompts_are_alike() -> None:
    words = {id: frozenset(item.prompt.lower().split()) for id, item in ITEMS.items()}
    alike = {(a, b): len(words[a] & words[b]) / len(words[a] | words[b]) for a, b in combinations(words, 2)}
    assert max(alike.values()) < 0.4


# The deductive prompts that have one answer: all cases tried.


def test_mugs() -> None:
    found = [
        row
        for row in permutations(["red", "white", "green", "striped"])
        if row.index("green") in (0, 3) and row.index("white") == row.index("green") + 1 and row.index("striped") < row.index("red")
    ]
    assert [", ".join(row) for row in found] == [ITEMS["deductive-01"].labels["answer"]]


def test_supper() -> None:
    found = []
    for dishes in permutations(["salad", "stew", "plum tart"]):
        ana, _, chidi = dishes
        if ana not in ("stew", "plum tart") and chidi == "plum tart":  # in a hat, nothing hot and nothing sweet; something sweet
            found.append(dishes)
    assert found == [("salad", "stew", "plum tart")]
    parts = ITEMS["deductive-02"].labels["answer"].split("; ")
    assert all(dish in part for dish, part in zip(found[0], parts, strict=False))


def test_florist() -> None:
    #          name        tall   scented colour
    buckets = [
        ("lilies", True, True, "white"),
        ("sunflowers", True, False, "yellow"),
        ("daisies", False, False, "white"),
        ("freesias", False, True, "yellow"),
    ]
    found = []
    for back_left, back_right, front_left, front_right in permutations(buckets):
        touching = [(back_left, back_right), (front_left, front_right), (back_left, front_left), (back_right, front_right)]
        if (
            all(b[1] for b in (back_left, back_right))
            and all(b[2] for b in (back_left, front_left))
            and all(a[3] != b[3] for a, b in touching)
        ):
            found.append(
                f"back row: {back_left[0]} left, {back_right[0]} right; front row: {front_left[0]} left, {front_right[0]} right"
            )
    assert found == [ITEMS["deductive-03"].labels["answer"]]


def test_parking() -> None:
    found = []
    for row in set(permutations(["van", "taxi", "motorcycle", "empty", "empty"])):
        van, taxi, motorcycle = (row.index(name) for name in ("van", "taxi", "motorcycle"))
        beside = [row[place] for place in (motorcycle - 1, motorcycle + 1) if 0 <= place < 5]
        if van in (1, 3) and row[van - 1] == row[van + 1] == "empty" and "empty" not in beside and taxi > van:
            found.append(row)
    assert ["from the left: " + ", ".join(row) for row in found] == [ITEMS["deductive-04"].labels["answer"]]


def test_garden_bed() -> None:
    bed = {(row, place): "" for row, place in product(range(3), range(5))}
    for row, place in bed:
        bed[row, place] = "bean" if row == 0 else "marigold" if place in (0, 4) else "lettuce"
    eaten = [
        (row, place)
        for (row, place), plant in bed.items()
        if plant == "lettuce" and "marigold" not in (bed.get((row, place - 1)), bed.get((row, place + 1)))
    ]
    bed |= {cell: "radish" for cell in eaten} | {(0, 2): "rose"}
    rows = [", ".join(bed[row, place] for place in range(5)) for row in range(3)]
    assert rows[1] == rows[2]
    answer = ITEMS["deductive-16"].labels["answer"]
    assert answer == f"first row: {rows[0]}; second and third row: {rows[1]}; one bean in a pot on the fence"


def test_octave() -> None:
    """Twelve keys from C: the white ones are 0, 2, 4, 5, 7, 9, 11 half-tones up."""
    keys = ", ".join("white" if tone in (0, 2, 4, 5, 7, 9, 11) else "dark" for tone in range(12))
    assert ITEMS["inductive-14"].labels["answer"] == keys
