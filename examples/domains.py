"""Digits in three renderings, as ink, as its negative, and turned in noise: one network, normalisation of each.

    python examples/domains.py                  # scikit-learn's digits
    python examples/domains.py --data random    # patterns in noise, without scikit-learn

A batch has pictures of any renderings in any order, by a long-tailed draw: now and then a rendering has none. The
backbone is one for plain digits, and knows nothing of domains: an index tells its normalisation which picture is what.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from tsbn_kernels import convert_model, hold_absent_tasks, parameter_groups, task_index

DOMAINS = "ink", "negative", "turned"
SHARES = 0.7, 0.25, 0.05  # of the pictures that are trained on
HELD_OUT = 200  # pictures that are not


class Batch(NamedTuple):
    """Pictures ``[N, 1, 8, 8]``, the digits that they show ``[N]``, and the domain of each ``[N]``."""

    pictures: Tensor
    digits: Tensor
    domains: Tensor


def load(name: str) -> tuple[Tensor, Tensor]:
    """Pictures and their digits: scikit-learn's, or noise with a pattern in it."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(10, (600,), generator=generator)
    patterns = torch.rand(10, 1, 8, 8, generator=generator)
    return (patterns[targets] + 0.2 * torch.randn(600, 1, 8, 8, generator=generator)).clamp(0, 1), targets


def render(pictures: Tensor, domains: Tensor, generator: torch.Generator) -> Tensor:
    """Draws each picture as its domain does."""
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]).expand(len(pictures), 2, 3)
    turned = grid_sample(pictures, affine_grid(quarter, list(pictures.shape), align_corners=False), align_corners=False)
    noisy = turned + 0.2 * torch.randn(pictures.shape, generator=generator)
    return torch.stack((pictures, 1 - pictures, noisy))[domains, torch.arange(len(pictures))]


def batches(pictures: Tensor, digits: Tensor, size: int, steps: int) -> Iterator[Batch]:
    """Draws pictures and their domains, alike at each call."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (size,), generator=generator)
        domains = torch.multinomial(torch.tensor(SHARES), size, replacement=True, generator=generator)
        yield Batch(render(pictures[chosen], domains, generator), digits[chosen], domains)


def backbone() -> nn.Sequential:
    """A network for digits of one kind."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10))


def build() -> nn.Module:
    """The network with normalisation of each domain: gate, bias and statistics."""
    return convert_model(backbone(), len(DOMAINS), variant="tsbn", pretrained=False)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """A domain that a batch has no picture of is left alone by moments and decay, too."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, gate_lr_multiplier=3.0, weight_decay=0.01))
    hold_absent_tasks(optimizer, model)
    return optimizer


def predict(model: nn.Module, batch: Batch) -> Tensor:
    with task_index(batch.domains):
        logits: Tensor = model(batch.pictures)
    return logits


def accuracies(model: nn.Module, pictures: Tensor, digits: Tensor) -> dict[str, float]:
    """The share of right answers where all pictures are of one domain, for each domain."""
    model.eval()
    found = {}
    for domain, name in enumerate(DOMAINS):
        domains = torch.full_like(digits, domain)
        rendered = render(pictures, domains, torch.Generator().manual_seed(2))
        with torch.no_grad():
            right = predict(model, Batch(rendered, digits, domains)).argmax(1) == digits
        found[name] = right.float().mean().item()
    return found


def train(arguments: Any) -> None:
    torch.manual_seed(0)
    pictures, digits = load(arguments.data)
    model = build()
    optimizer = make_optimizer(model)
    drawn = batches(pictures[:-HELD_OUT], digits[:-HELD_OUT], arguments.batch, arguments.steps)
    for step, batch in enumerate(drawn, start=1):
        loss = cross_entropy(predict(model, batch), batch.digits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    shares = accuracies(model, pictures[-HELD_OUT:], digits[-HELD_OUT:])
    print("right:", ", ".join(f"{name} {share:.2f}" for name, share in shares.items()))


def parse(arguments: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "random"], default="digits")
    parser.add_argument("--batch", type=int, default=64, help="pictures in a batch")
    parser.add_argument("--steps", type=int, default=300)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(parse())
