"""What an installed wheel must do, in any PyTorch: import, forward, backward, native kernels."""

import torch

import tsbn_kernels
from tsbn_kernels.backends import cpu

layer = tsbn_kernels.FusedTSigmaBN2d(3, 5)
x = torch.randn(6, 5, 8, 8, requires_grad=True)
dy = torch.randn(6, 5, 8, 8)
layer(x).backward(dy)
plain = torch.cat([layer.task(t).train()(part) for t, part in enumerate(x.detach().chunk(3))])
assert torch.allclose(layer(x), plain, atol=1e-5)
assert x.grad.abs().max() > 0
assert cpu.available, cpu.detail()
print(torch.__version__, tsbn_kernels.__file__, cpu.available)
