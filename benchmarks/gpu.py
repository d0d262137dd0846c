"""What only a GPU can show, for `gpu.sh`: whether the captured step is right, and what it consists of. Each result is saved at once."""
import json
from argparse import ArgumentParser
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
import torch
from torch import nn
from torch.profiler import profile, ProfilerActivity
from mnist_block3.all import Block3, block3_learner, Callback, Checkpoint, history, mnist_dls, ProgressCallback, set_seed
from mnist_block3.run import run_environment
from mnist_block3.steps import Steps


def trained(fit, device, n_train, model=None, fast=True, **kwargs):
    "A learner after `fit`, without a progress bar and logs"
    set_seed(0)
    learn = block3_learner(mnist_dls(device=device, n_train=n_train, **kwargs), model and model(), fast=fast)
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): fit(learn)
    return learn


@contextmanager
def without_capture():
    "Steps are taken eagerly, by the same code"
    init = Steps.__init__
    def eager(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.graph = False
    Steps.__init__ = eager
    try: yield
    finally: Steps.__init__ = init


def difference(a, b):
    "The largest between two learners' weights and buffers"
    pairs = zip(a.model.state_dict().values(), b.model.state_dict().values())
    return max((p.double() - q.double()).abs().max().item() for p,q in pairs)


class Double(nn.Module):
    def forward(self, x): return x.double()

def model64(): return nn.Sequential(Double(), Block3(drop=0.).double())


def engine(device, n_train):
    "Which engine ran, and why where it was not the graph"
    fast_epoch = trained(lambda learn: learn.fit(1), device, n_train).fast_epoch
    return dict(engine=fast_epoch.engine, why=fast_epoch.why)


def graph_against_eager(device, n_train):
    "0 where two epochs of the full recipe end with the same weights to the bit"
    def fit(learn): learn.fit_tuned(2, drop=0.1, elastic=0.5)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        graph = trained(fit, device, n_train)
        with without_capture(): eager = trained(fit, device, n_train)
    return dict(difference=difference(graph, eager), engines=[graph.fast_epoch.engine, eager.fast_epoch.engine])


def graph_against_float64(device, n_train):
    "The largest difference from fastai's own loop in float64, without random changes"
    fit = partial(trained, lambda learn: learn.fit(2), device, min(n_train, 640), model64, aug_tfms=[])
    return dict(difference=difference(fit(), fit(fast=False)))


def resumed(device, n_train):
    "0 where a fit that was interrupted after an epoch and resumed ends with the weights of one that was not, to the bit"
    def stop(cb):
        if cb.epoch == 1: raise KeyboardInterrupt
    def fit(learn, *cbs): learn.fit_tuned(3, cbs=cbs)
    def interrupted(learn):
        with suppress(KeyboardInterrupt): fit(learn, Checkpoint(path), Callback(after_epoch=stop))
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True), TemporaryDirectory() as folder:
        path = Path(folder)/'checkpoint'
        whole = trained(fit, device, n_train)
        trained(interrupted, device, n_train)
        assert path.exists()
        again = trained(lambda learn: fit(learn, Checkpoint(path, resume=True)), device, n_train)
    return dict(difference=difference(whole, again), engines=[whole.fast_epoch.engine, again.fast_epoch.engine])


def kernels(device, n_train):
    "Kernels a step, and the 20 that took longest, in an epoch"
    activity = ProfilerActivity.CUDA if device == 'cuda' else ProfilerActivity.CPU
    learn = trained(lambda learn: None, device, n_train)
    with profile(activities=[activity]) as prof, learn.no_logging(): learn.fit(1)
    spent,count = Counter(),Counter()
    for event in prof.events():
        spent[event.name] += event.device_time if device == 'cuda' else event.self_cpu_time_total
        count[event.name] += 1
    costly = [dict(name=name[:100], us=us, n=count[name]) for name,us in spent.most_common(20)]
    return dict(a_step=count.total()/len(learn.dls.train), costly=costly)


def tuned_accuracies(device, n_train, seeds=20):
    "Accuracy and seconds of the tuned recipe, one seed after another"
    rows = []
    for seed in range(seeds):
        set_seed(seed)
        learn = block3_learner(mnist_dls(device=device, n_train=n_train))
        with learn.no_bar(), learn.no_logging(): learn.fit_tuned(14 if seeds > 1 else 1)
        table = history(learn)
        rows.append(dict(seed=seed, accuracy=table.valid_accuracy.iloc[-1], seconds=table.seconds.sum()))
    return rows


def changed(device, n_train, change=lambda learn: None, **kwargs):
    "Seconds of a later epoch, and the engine, with one thing changed"
    def fit(learn):
        change(learn)
        learn.fit(3)
    learn = trained(fit, device, n_train, **kwargs)
    return dict(seconds=history(learn).seconds[1:].min(), engine=learn.fast_epoch.engine)


def one_thing_changed(device, n_train):
    "What channels-last layers, no augmentation and no dropout do to an epoch"
    def channels_last(learn): learn.model.to(memory_format=torch.channels_last)
    ways = {'as it is': {}, 'channels last': dict(change=channels_last), 'no augmentation': dict(aug_tfms=[]),
            'no dropout': dict(model=lambda: Block3(drop=0.))}
    return {way: changed(device, n_train, **kwargs) for way,kwargs in ways.items()}


def compiled_layers(device, n_train):
    "What layers compiled by `torch.compile` do to an epoch, within the captured step"
    return changed(device, n_train, lambda learn: learn.model.compile())


parts = dict(check=[engine, graph_against_eager, graph_against_float64],
             study=[resumed, kernels, one_thing_changed, tuned_accuracies, compiled_layers])

def main():
    p = ArgumentParser(description=__doc__)
    p.add_argument('part', choices=parts)
    p.add_argument('out', type=Path, help='a JSON file')
    p.add_argument('--device', default='cuda', help='cpu or cuda')
    p.add_argument('--n_train', type=int, default=6400, help='training images')
    args = p.parse_args()
    results = run_environment(torch.device(args.device, 0) if args.device == 'cuda' else torch.device(args.device))
    for part in parts[args.part]:
        more = dict(seeds=1) if part is tuned_accuracies and args.device == 'cpu' else {}
        n_train = None if part is tuned_accuracies and args.device == 'cuda' else args.n_train
        results[part.__name__] = part(args.device, n_train, **more)
        args.out.write_text(json.dumps(results, indent=1))
        print(part.__name__, results[part.__name__], flush=True)
        if part is engine and results['engine']['engine'] != 'graph': return 'The steps are not captured: nothing else is worth its time'


if __name__ == '__main__': raise SystemExit(main())
