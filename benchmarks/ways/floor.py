"What the machine can do at best, and the least work that an image is"
import math, time
import torch, torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from mnist_block3.model import Block3, layer_table


def seconds(f, device, n=10):
    "Shortest of `n` calls"
    sync = torch.cuda.synchronize if device == 'cuda' else lambda: None
    def once():
        began = time.perf_counter()
        f()
        sync()
        return time.perf_counter() - began
    once()
    return min(once() for _ in range(n))


def work():
    """FLOPs and bytes an image, in training and in evaluation, float32.

    PyTorch's own counter finds the FLOPs (a multiply-add is two). Bytes are the least that a pass by units
    moves. The image is read. Forward, each unit's output is written and read; backward, it is read again, and
    its gradient written and read. Weights are left out, since a batch shares them."""
    bs = 64
    model = Block3()
    x = torch.randn(bs, 1, 28, 28)
    y = torch.zeros(bs, dtype=torch.long)
    with FlopCounterMode(display=False) as train: F.nll_loss(model(x), y).backward()
    with torch.no_grad(), FlopCounterMode(display=False) as valid: model(x)
    table = layer_table(model)
    n_out = sum(math.prod(shape) for shape in table.output_shape[table.layer == 'Dropout2d'])
    return dict(train_flops=train.get_total_flops()/bs, valid_flops=valid.get_total_flops()/bs,
                train_bytes=4*(28*28 + 5*n_out), valid_bytes=4*(28*28 + 2*n_out))


def run(clock, device, **kwargs):
    "Speed of a large matrix product and of a large copy, in float32, and `work`"
    n = 8192 if device == 'cuda' else 2048
    a,b,c = (torch.randn(n, n, device=device) for _ in range(3))
    src = torch.randn(2**26, device=device)
    dst = torch.empty_like(src)
    return dict(flops_per_s=2*n**3/seconds(lambda: torch.mm(a, b, out=c), device),
                bytes_per_s=2*src.nbytes/seconds(lambda: dst.copy_(src), device), **work())
