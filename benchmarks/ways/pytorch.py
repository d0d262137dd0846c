"Good plain PyTorch: images stay on the device, where batches are taken by index and augmented"
import math
import torch, torch.nn.functional as F
from mnist_block3.model import Block3
from .common import read_split

val_bs = {'cpu': 125, 'cuda': 2500} # on a CPU the fastest of those tried; 1,000 takes twice as long an image


def augment(x):
    "Scale up the centre of one image in ten, and rotate each by up to 5°"
    angle = (torch.rand(len(x), device=x.device)*2 - 1)*5*math.pi/180
    scale = torch.where(torch.rand(len(x), device=x.device) < 0.1, 22/28, 1.)
    cos = scale*angle.cos()
    sin = scale*angle.sin()
    zero = torch.zeros_like(angle)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


def batches(images, labels, bs, train):
    "Normalised images (B, 1, 28, 28) and labels (B,); in training in random order, and augmented"
    order = (torch.randperm if train else torch.arange)(len(images), device=images.device)
    for i in order.split(bs):
        x = images[i][:,None].float()/255
        if train: x = augment(x)
        yield (x - 0.1307)/0.3081, labels[i]


def optimizer(model): return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.8, fused=True)


def train_epoch(model, batches, opt):
    "Sum of the batches' losses, a tensor"
    model.train()
    total = 0
    for xb,yb in batches:
        loss = F.nll_loss(model(xb), yb)
        opt.zero_grad()
        loss.backward()
        opt.step()
        total += loss.detach()
    return total


@torch.inference_mode()
def evaluate(model, batches):
    "How many are right"
    model.eval()
    return sum((model(xb).argmax(1) == yb).sum() for xb,yb in batches).item()


def run(clock, device, n_train, n_epoch, compiled=False, **kwargs):
    "Train, and evaluate on the test images"
    images,labels = [t[:n_train].to(device) for t in read_split('train')]
    test_images,test_labels = [t.to(device) for t in read_split('t10k')]
    model = Block3().to(device)
    if compiled: model.compile()
    opt = optimizer(model)
    sched = torch.optim.lr_scheduler.StepLR(opt, step_size=15, gamma=0.1)
    clock('fit')
    for _ in range(n_epoch):
        clock('train')
        loss = train_epoch(model, batches(images, labels, 64, True), opt)
        sched.step()
        clock('valid')
        n_right = evaluate(model, batches(test_images, test_labels, val_bs[device], False))
        loss.item()
        clock('end')
    return dict(accuracy=n_right/len(test_labels))
