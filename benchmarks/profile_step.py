"""Where the time of a training step goes on a CPU, in fastai's own loop and in the fast path.

A row is the time in its operations, without that of other rows, by `torch.profiler`; the rest is Python.
The profiler costs time itself, most where operations are many and small. So rows are shares, and `step_ms`
is the time of a step without the profiler."""
import json, re, time
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path
from torch.profiler import profile, ProfilerActivity, record_function
from mnist_block3.all import *
from mnist_block3.data import ImagesDL
from mnist_block3.run import run_environment
from bench import here, start

rows = { # the first that fits the names of an operation and of all around it, outermost first
    'loading and augmentation': r'loading|affine_grid_generator',
    'optimizer': r'Optimizer|_fused_sgd',
    'kernels, backward': r'_RunFunctionBackward',
    'kernels, forward': r'_RunFunction',
    'convolution, backward': r'aten::convolution_backward',
    'convolution, forward': r'aten::(conv2d|convolution|mkldnn_convolution)\b',
    'BatchNorm and other layers': r'aten::'}
rest = 'Python and the rest'


def row_of(event):
    "The row that an operation belongs to"
    names = []
    while event:
        names.insert(0, event.name)
        event = event.cpu_parent
    return next((row for row,pattern in rows.items() if re.search(pattern, '/'.join(names))), rest)


def shares(prof, seconds):
    "Share of each row in `seconds` of profiled training"
    spent = Counter({row: 0. for row in [*rows, rest]})
    for event in prof.events(): spent[row_of(event)] += event.self_cpu_time_total/1e6/seconds
    spent[rest] += 1 - spent.total()
    return dict(spent)


class ProfileEpoch(Callback):
    "Time the training of each epoch, and profile that of the last"
    order = 59
    def before_fit(self):
        self.seconds = []
        self.prof = profile(activities=[ProfilerActivity.CPU])

    def before_train(self):
        if self.epoch+1 == self.n_epoch: self.prof.start()
        self.began = time.perf_counter()

    def after_train(self):
        self.seconds.append(time.perf_counter() - self.began)
        if self.epoch+1 == self.n_epoch: self.prof.stop()


def named_batches(batches):
    "`batches`, each made under the name 'loading'"
    batches = iter(batches)
    while True:
        with record_function('loading'): batch = next(batches, None)
        if batch is None: return
        yield batch


def profile_way(fast, n_steps):
    "Milliseconds a step, and the share of each row"
    learn = block3_learner(mnist_dls(n_train=64*n_steps, device='cpu'), fast=fast)
    cb = ProfileEpoch()
    with learn.no_bar(), learn.no_logging(): learn.fit(4, cbs=cb)
    _,*plain,profiled = cb.seconds
    way = 'fast' if fast else 'plain'
    return dict(way=way, engine=learn.fast_epoch.engine, step_ms=1e3*min(plain)/n_steps,
                profiled_step_ms=1e3*profiled/n_steps, share=shares(cb.prof, profiled))


def main():
    p = ArgumentParser(description=__doc__)
    p.add_argument('--n_steps', type=int, default=200, help='steps to profile')
    p.add_argument('--out', type=Path, default=here.parent/'nbs'/'results'/'speed'/'profile-cpu.json')
    args = p.parse_args()
    old_iter = ImagesDL.__iter__
    ImagesDL.__iter__ = lambda self: named_batches(old_iter(self))
    ways = [profile_way(fast, args.n_steps) for fast in (False, True)]
    for way in ways:
        print(f'\n{way["way"]} ({way["engine"]}): {way["step_ms"]:.1f} ms a step, '
              f'{way["profiled_step_ms"]:.1f} while profiled')
        for row,share in way['share'].items(): print(f'  {row:28} {100*share:5.1f} %')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = dict(start=start(), n_steps=args.n_steps, **run_environment(torch.device('cpu')))
    args.out.write_text(json.dumps(about | dict(ways=ways), indent=1))


if __name__ == '__main__': main()
