"The captured step, as far as a CPU can show it: with a recorder in place of CUDA graphs, and with fake tensors of a GPU"
import itertools
from functools import partial
from types import SimpleNamespace
import numpy as np
import pytest, torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from recorder import install
from mnist_block3.all import (
    Block3, block3_learner, Callback, Checkpoint, CropRotate, CrossEntropyLossFlat, Distort, history, mnist_dls,
    ParamScheduler, ProgressCallback, SchedLin, set_seed)
from mnist_block3.sources import Images
from mnist_block3.kernels import PythonState
from mnist_block3.steps import Started, Steps


def new_learner(model=None, data={}, **kwargs):
    set_seed(0)
    dls = mnist_dls(**dict(valid='reference', n_train=150, bs=16, device='cpu') | data)
    learn = block3_learner(dls, model and model(), **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.fast_epoch.use_kernels = False
    return learn


class Box:
    "A sequence of one's own"
    def __init__(self, values): self.values = values
    def __len__(self): return len(self.values)
    def __getitem__(self, i): return self.values[i]
    def __setitem__(self, i, value): self.values[i] = value

class Dims(CropRotate):
    "Multiplies images by a number that is in a container"
    limits = [0., 1.]
    def augment(self, x): return super().augment(x)*float(np.asarray(self.limits)[1])

def fit_three(learn): learn.fit(3)
def fit_tuned(learn): learn.fit_tuned(3)
def one_cycle(learn): learn.fit_one_cycle(2, 0.1)
def two_fits(learn): learn.fit(1); learn.fit_tuned(1); learn.fit(2)
def everything(learn):
    "Scheduled rate and momentum, weight decay, Nesterov, elastic bending and dropout"
    mom = ParamScheduler({'mom': SchedLin(0.7, 0.9)})
    learn.fit_tuned(2, wd=1e-2, nesterov=True, elastic=0.5, drop=0.1, cbs=mom)
def other_limits(learn, kind=None):
    "A list in a transform changes between two epochs, or a list of its class, an array, a tensor, an object"
    tfm = learn.dls.train.after_batch.fs[1] = Dims()
    if kind: tfm.limits = kind([0., 1.])
    def change(cb): tfm.limits[1] = 1. - 0.2*cb.epoch
    learn.fit(3, cbs=Callback(before_epoch=change))
def resumed(learn, folder):
    def stop(cb):
        if cb.epoch == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=[Checkpoint(folder/'c'), Callback(after_epoch=stop)])
    learn.fit(3, cbs=Checkpoint(folder/'c', resume=True))


@pytest.mark.parametrize('fit', [
    fit_three, fit_tuned, one_cycle, two_fits, everything, resumed, other_limits,
    *[partial(other_limits, kind=kind) for kind in (list, np.array, torch.tensor, Box)]])
def test_graph_equals_the_eager_steps_to_the_bit(at_hand, monkeypatch, tmp_path, fit):
    "Weights, losses and history, with a short last batch"
    if fit is resumed: eager_fit,fit = fit_three,partial(resumed, folder=tmp_path)
    else: eager_fit = fit
    eager = new_learner()
    with eager.no_logging(): eager_fit(eager)
    graphs = install(monkeypatch)
    graph = new_learner()
    with graph.no_logging(): fit(graph)
    assert (eager.fast_epoch.engine, graph.fast_epoch.engine) == ('eager', 'graph'), graph.fast_epoch.why
    assert len(graphs) >= 3 # images ahead, full and short batch
    torch.testing.assert_close(graph.model.state_dict(), eager.model.state_dict(), rtol=0, atol=0)
    assert graph.recorder.losses == eager.recorder.losses
    assert history(graph).drop(columns='seconds').equals(history(eager).drop(columns='seconds'))


class Waits(nn.Sequential):
    "Asks for a number on the device"
    def forward(self, x): return super().forward(x)*(1 if x.sum().item() > 0 else 2)

class Counts(nn.Sequential):
    "Changes a list, as a plain attribute"
    def forward(self, x):
        if not hasattr(self, 'calls'): self.calls = []
        self.calls.append(1)
        return super().forward(x)

class Replaces(nn.Sequential):
    "Replaces a tensor that is no buffer"
    mean = torch.zeros(())
    def forward(self, x):
        self.mean = 0.5*self.mean + 0.5*x.mean().detach()
        return super().forward(x - self.mean)

class Alternates(nn.Sequential):
    "Is as it was after every second step"
    on = False
    def forward(self, x):
        self.on = not self.on
        return super().forward(x*(1.1 if self.on else 1.))

class CountsWithin(nn.Sequential):
    "Counts in an object that pickle does not take"
    def __init__(self, *args):
        super().__init__(*args)
        self.state = SimpleNamespace(n=0, rate=lambda n: 1 + 0.01*n)
    def forward(self, x):
        self.state.n += 1
        return super().forward(x*self.state.rate(self.state.n))

class CountingRotate(CropRotate):
    n = 0
    def augment(self, x):
        self.n += 1
        return super().augment(x)

class OwnDice(CropRotate):
    "Draws from a generator of its own, in an object of its own"
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dice = SimpleNamespace(rng=np.random.default_rng(0))
    def augment(self, x): return super().augment(x) if self.dice.rng.random() < 0.5 else 1 - x

class RunningLoss(nn.CrossEntropyLoss):
    "Replaces a buffer of its own"
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.register_buffer('mean', torch.zeros(()))
    def forward(self, pred, targ):
        self.mean = 0.9*self.mean + 0.1*pred.mean().detach()
        return super().forward(pred - self.mean, targ)

class Running(CrossEntropyLossFlat):
    def __init__(self):
        super().__init__()
        self.func = RunningLoss()

@pytest.mark.parametrize('what,kwargs', [
    ('waits', dict(model=lambda: Waits(Block3(drop=0.)))), ('list', dict(model=lambda: Counts(Block3(drop=0.)))),
    ('tensor', dict(model=lambda: Replaces(Block3(drop=0.)))),
    ('alternates', dict(model=lambda: Alternates(Block3(drop=0.)))),
    ('within', dict(model=lambda: CountsWithin(Block3(drop=0.)))),
    ('transform', dict(model=partial(Block3, drop=0.), aug_tfms=lambda: [CountingRotate(p=0, draw=5.)])),
    ('generator', dict(model=partial(Block3, drop=0.), aug_tfms=lambda: [OwnDice(p=0, draw=5.)])),
    ('loss', dict(model=partial(Block3, drop=0.), loss=Running))], ids=lambda value: value if isinstance(value, str) else '')
def test_graph_is_refused_and_fastais_loop_takes_over(at_hand, monkeypatch, what, kwargs):
    "With the weights that it would have had alone"
    def trained(fast, aug_tfms=list, loss=CrossEntropyLossFlat, **kwargs):
        learn = new_learner(data=dict(aug_tfms=aug_tfms()), loss_func=loss(), fast=fast, **kwargs)
        with learn.no_logging(): learn.fit(2)
        return learn
    plain = trained(False, **kwargs)
    install(monkeypatch)
    refused = trained(True, **kwargs)
    assert refused.fast_epoch.engine == 'plain' and refused.fast_epoch.why
    torch.testing.assert_close(refused.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)


def test_graph_is_refused_where_a_model_throws_a_coin():
    "As torchvision's transforms do, by the CPU's generator"
    class Coin(nn.Module):
        def forward(self, x): return x if torch.rand(1) < 0.5 else -x
    model = Coin()
    state = PythonState(model)
    model(torch.ones(1))
    assert not state.unchanged()
    state.restore()
    assert state.unchanged()


def test_graph_is_refused_where_a_count_lies_elsewhere(at_hand, monkeypatch):
    "In a variable of the module, which no attribute leads to"
    count = itertools.count()
    class Counts(nn.Sequential):
        def forward(self, x): return super().forward(x*(1 + 0.01*next(count)))
    install(monkeypatch)
    learn = new_learner(lambda: Counts(Block3()))
    with learn.no_logging(): learn.fit(1)
    assert learn.fast_epoch.engine == 'plain' and 'changes something in Python' in learn.fast_epoch.why


def test_graph_is_refused_where_a_number_on_the_cpu_changes():
    "On a GPU an operation takes a single number of a CPU tensor, and a captured graph keeps it"
    def calls(number):
        with Started(torch.device('cuda:0')) as started: torch.ones(2)*torch.tensor(number)
        return started.calls
    assert calls(1.) == calls(1.) != calls(2.)


class Devices(TorchDispatchMode):
    "Fails where an operation has a CPU tensor, or needs to know a number on the device"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        assert {t.device.type for t in tensors} <= {'cuda'}, func
        assert func is not torch.ops.aten._local_scalar_dense.default
        return out

needs_fake_gpu = pytest.mark.skipif(
    torch.__version__.startswith('2.9'), reason='there a fake GPU needs a driver for random numbers')

@needs_fake_gpu
def test_graph_rotates_images_that_are_not_square():
    with FakeTensorMode(), torch.device('cuda:0'), Devices(): CropRotate().augment(torch.zeros(4, 1, 28, 20))

@needs_fake_gpu
@pytest.mark.parametrize('tfm', [CropRotate(), Distort(elastic=1.)], ids=['crop', 'elastic'])
@pytest.mark.parametrize('sched_mom', [False, True])
def test_graph_has_no_tensor_of_the_cpu(monkeypatch, tfm, sched_mom):
    "The backward pass needs a real device"
    with FakeTensorMode(), torch.device('cuda:0'):
        model = Block3()
        digits = Images(torch.zeros(200, 28, 28, dtype=torch.uint8), torch.zeros(200, dtype=torch.uint8))
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
        def to_float(x): return x.float()/255
        steps = Steps(model, nn.NLLLoss(), [to_float, tfm.augment], digits, opt, n=150, bs=64, sched_mom=sched_mom)
        def backward(loss):
            for p in model.parameters(): p.grad = torch.zeros_like(p)
        def sgd_step(params, grads, bufs, lr, *options):
            assert {t.device.type for t in [*params, *grads, *bufs, lr]} == {'cuda'}
        monkeypatch.setattr(torch.Tensor, 'backward', backward)
        monkeypatch.setattr('mnist_block3.steps.sgd_step', sgd_step) # its fused operation takes no fake tensors
        with Devices():
            for part in steps.parts.values(): part()
