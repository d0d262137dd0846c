"What ways share that load nothing of fastai: the bundled files, and the clock"
import gzip, time
from pathlib import Path
import numpy as np
import torch
import mnist_block3

mnist_path = Path(mnist_block3.__file__).parent/'mnist'


def read_split(split):
    "Images, uint8 (N, 28, 28), and labels, int64 (N,), of `split`: 'train' or 't10k'"
    def read(name, skip):
        data = gzip.decompress((mnist_path/f'{split}-{name}.gz').read_bytes())
        return torch.from_numpy(np.frombuffer(data, np.uint8, offset=skip).copy())
    return read('images-idx3-ubyte', 16).view(-1, 28, 28), read('labels-idx1-ubyte', 8).long()


class Clock:
    "Note when a fit begins ('fit'), and in each epoch training ('train'), evaluation ('valid') and its 'end'"
    def __init__(self, device):
        self.device = device
        self.marks = []

    def __call__(self, event):
        if self.device == 'cuda': torch.cuda.synchronize()
        self.marks.append((event, time.perf_counter()))

    def at(self, event): return [t for e,t in self.marks if e == event]

    def epochs(self):
        "Seconds of each epoch: to train, to evaluate, and since the last epoch or the call of `fit`"
        ends = self.at('end')
        times = zip(self.at('fit') + ends, self.at('train'), self.at('valid'), ends)
        return [dict(train=valid-train, valid=end-valid, epoch=end-last) for last,train,valid,end in times]
