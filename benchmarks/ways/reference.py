"The reference's way: PIL transforms in worker processes, a plain loop with `.item()` at every step"
import time
from functools import partial
import torch, torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from mnist_block3.model import Block3
from .common import read_split

tfms = T.Compose([
    T.RandomApply([T.CenterCrop(22)], p=0.1),
    T.Resize((28,28)),
    T.RandomRotation((-5., 5.), fill=0),
    T.ToTensor(),
    T.Normalize((0.1307,), (0.3081,))])


class PILDigits(Dataset):
    def __init__(self, images, labels):
        self.images = images.numpy()
        self.labels = labels.tolist()

    def __len__(self): return len(self.labels)
    def __getitem__(self, i): return tfms(Image.fromarray(self.images[i])), self.labels[i]


def optimizer(model): return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.8)


def train_epoch(model, batches, opt, device):
    "Mean loss and accuracy over the epoch"
    model.train()
    losses = []
    n_right = 0
    n = 0
    for xb,yb in batches:
        xb,yb = xb.to(device),yb.to(device)
        opt.zero_grad()
        pred = model(xb)
        loss = F.nll_loss(pred, yb)
        loss.backward()
        opt.step()
        losses.append(loss.item())
        n_right += (pred.argmax(1) == yb).sum().item()
        n += len(yb)
    return sum(losses)/len(losses), n_right/n


def evaluate(model, batches, device):
    "Mean loss and accuracy"
    model.eval()
    loss = 0
    n_right = 0
    n = 0
    with torch.no_grad():
        for xb,yb in batches:
            xb,yb = xb.to(device),yb.to(device)
            pred = model(xb)
            loss += F.nll_loss(pred, yb, reduction='sum').item()
            n_right += (pred.argmax(1) == yb).sum().item()
            n += len(yb)
    return loss/n, n_right/n


def seconds_on_test(model, device):
    "Seconds of an evaluation on the 10,000 test images, by the same loader"
    began = time.perf_counter()
    evaluate(model, DataLoader(PILDigits(*read_split('t10k')), batch_size=64, num_workers=2), device)
    return time.perf_counter() - began


def run(clock, device, n_train, n_epoch, **kwargs):
    "Train, and evaluate on the training images with the training transforms, as the reference did"
    images,labels = read_split('train')
    ds = PILDigits(images[:n_train], labels[:n_train])
    make_dl = partial(DataLoader, ds, batch_size=64, shuffle=True, num_workers=2, pin_memory=device == 'cuda')
    train_dl = make_dl()
    test_dl = make_dl()
    model = Block3().to(device)
    opt = optimizer(model)
    sched = torch.optim.lr_scheduler.StepLR(opt, step_size=15, gamma=0.1)
    clock('fit')
    for _ in range(n_epoch):
        clock('train')
        train_epoch(model, train_dl, opt, device)
        sched.step()
        clock('valid')
        accuracy = evaluate(model, test_dl, device)[1]
        clock('end')
    return dict(accuracy=accuracy, valid_10000=seconds_on_test(model, device))
