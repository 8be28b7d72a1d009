"""From a residual network to training steps of three tasks; ``torchvision.models.resnet18()`` goes the same way."""

import torch
from torch import Tensor, nn

from tsbn_kernels import MultiTaskModel, convert_model, parameter_groups


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


stem = [nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
backbone = nn.Sequential(*stem, Block(32), Block(32), nn.AdaptiveAvgPool2d(1), nn.Flatten())

heads = {"smiling": nn.Linear(32, 1), "eyeglasses": nn.Linear(32, 1), "young": nn.Linear(32, 1)}
# pretrained=False: this backbone is new. A trained one keeps its weights, as the gates that every task starts from.
model = MultiTaskModel(convert_model(backbone, num_tasks=len(heads), pretrained=False), heads)
optimizer = torch.optim.Adam(parameter_groups(model, lr=3e-4))  # gates at 100 times the rate

images, labels = torch.randn(8, 3, 64, 64), {task: torch.randint(2, (8, 1)).float() for task in heads}
for step in range(5):
    predictions = model(images)
    loss = sum(nn.functional.binary_cross_entropy_with_logits(predictions[task], labels[task]) for task in heads)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
