"PyTorch Lightning with its usual MNIST data module: torchvision's dataset, and worker processes"
import gzip, os
import lightning as L, torch, torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import transforms as T
from torchvision.datasets import MNIST
from mnist_block3.model import Block3
from .common import mnist_path
from .reference import optimizer, tfms

n_workers = max(1, os.cpu_count()//2)


def make_files(folder, splits):
    "Unpack the bundled files as torchvision lays them out"
    raw = folder/'MNIST'/'raw'
    raw.mkdir(parents=True)
    for f in mnist_path.glob('*.gz'): (raw/f.stem).write_bytes(gzip.decompress(f.read_bytes()))


def make_dl(ds, **kwargs): return DataLoader(ds, batch_size=64, num_workers=n_workers, **kwargs)


class MNISTDataModule(L.LightningDataModule):
    def __init__(self, folder, n_train):
        super().__init__()
        self.folder = folder
        self.n_train = n_train

    def setup(self, stage):
        self.train = Subset(MNIST(self.folder, train=True, transform=tfms), range(self.n_train))
        self.test = MNIST(self.folder, train=False, transform=T.Compose(tfms.transforms[-2:]))

    def train_dataloader(self): return make_dl(self.train, shuffle=True)
    def val_dataloader(self): return make_dl(self.test)


class LitBlock3(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Block3()

    def training_step(self, batch, batch_idx):
        loss = F.nll_loss(self.model(batch[0]), batch[1])
        self.log('train_loss', loss)
        return loss

    def validation_step(self, batch, batch_idx):
        pred = self.model(batch[0])
        self.log('val_loss', F.nll_loss(pred, batch[1]))
        self.log('val_acc', (pred.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        opt = optimizer(self)
        return [opt], [torch.optim.lr_scheduler.StepLR(opt, step_size=15, gamma=0.1)]


class Timer(L.Callback):
    def __init__(self, clock): self.clock = clock
    def on_train_epoch_start(self, *args): self.clock('train')
    def on_validation_start(self, *args): self.clock('valid')
    def on_validation_end(self, *args): self.clock('end')


def run(clock, device, n_train, n_epoch, files, **kwargs):
    "Train, and evaluate on the test images"
    accelerator = 'gpu' if device == 'cuda' else 'cpu'
    trainer = L.Trainer(max_epochs=n_epoch, accelerator=accelerator, devices=1, logger=False,
                        callbacks=[Timer(clock)], enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False, num_sanity_val_steps=0)
    model = LitBlock3()
    data = MNISTDataModule(files, n_train)
    clock('fit')
    trainer.fit(model, data)
    return dict(accuracy=trainer.callback_metrics['val_acc'].item(), lightning=L.__version__)
