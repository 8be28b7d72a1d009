"""The process that makes the calls: says which one it begins, and how each ended, a line of JSON for each."""

from __future__ import annotations

import json
import random
import resource
import sys
import warnings

import torch

from fuzz.calls import Outcome, judge
from fuzz.layers import functional_call, layer_call
from fuzz.models import MODEL_CALLS
from fuzz.programs import program_call
from fuzz.rows import row_call

MEMORY = 16 << 30  # of addresses: an allocation without bounds is an error, not the end of the machine
TARGETS = {
    "calls": [functional_call] * 10 + [layer_call] * 6 + [row_call] * 4 + MODEL_CALLS,
    "rows": [row_call],
    "programs": [program_call],
}


def one_call(seed: int, index: int, kind: str = "calls") -> tuple[str, Outcome]:
    """Makes call ``index`` of a kind; the same for the same seed."""
    rng = random.Random(f"{seed}/{index}")
    torch.manual_seed(rng.getrandbits(32))
    call = rng.choice(TARGETS[kind])(rng)
    print(json.dumps({"begin": index, "text": call.text}), flush=True)
    return call.text, judge(call)


def main(seed: int, first: int, last: int, kind: str) -> None:
    """Calls ``first`` to ``last - 1``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # most calls are too small for more
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for index in range(first, last):
        _, outcome = one_call(seed, index, kind)
        print(json.dumps({"end": index, "kind": outcome.kind, "detail": outcome.detail}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
