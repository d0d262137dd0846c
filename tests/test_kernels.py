"The kernels against plain PyTorch"
import os, pickle, shutil, signal, subprocess, sys, threading, time
from contextlib import contextmanager
from copy import deepcopy
from unittest import mock
import pytest, torch, torch.nn.functional as F
from hypothesis import given, Phase, settings, strategies as st
from torch import nn
from mnist_block3 import kernels
from mnist_block3.augment import crop_rotate, distort, uniform_amounts
from mnist_block3.kernels import Run, fuse, kernel_threads, why_no_kernels
from mnist_block3.model import Block3

slow = pytest.mark.slow

@pytest.fixture
def n_threads():
    "A function that sets the number of threads until the test ends"
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

@pytest.fixture
def rebuild(monkeypatch):
    "The kernels are built anew, and what the test built is forgotten"
    kernels._build.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    kernels._build.cache_clear()

@pytest.fixture(scope='session')
def digits(mnist):
    train = mnist[0]
    return train.images[:640,None].float()/255, train.labels[:640].long()

def runs(model): return [m for m in model.modules() if isinstance(m, Run)]

@contextmanager
def dropout_by(mask):
    "PyTorch's dropout layers use what `mask` gives for a shape and a probability"
    def forward(drop, x):
        if not (drop.training and drop.p): return x
        shape = x.shape[:2] if isinstance(drop, nn.Dropout2d) else x.shape
        return x*mask(shape.numel(), drop.p).view(*shape, *[1]*(4-len(shape)))
    with mock.patch.object(nn.Dropout, 'forward', forward), mock.patch.object(nn.Dropout2d, 'forward', forward): yield

@contextmanager
def recorded_masks():
    "All masks of dropout in a forward pass, by kernels or by PyTorch's layers"
    tape,masks = [],Run.masks
    def record(run, plan):
        addresses,drawn = masks(run, plan)
        if drawn is not None: tape.append(drawn.clone())
        return addresses, drawn
    def draw(size, p):
        tape.append(torch.bernoulli(torch.full((size,), 1-p).double())/(1-p))
        return tape[-1]
    with mock.patch.object(Run, 'masks', record), dropout_by(draw): yield tape

def replayed_masks(tape):
    rest = torch.cat(tape) if tape else None
    def mask(size, p):
        nonlocal rest
        first,rest = rest.split([size, len(rest)-size])
        return first
    return dropout_by(mask)

def results(net, owner, x):
    "Output, gradients, running statistics; `owner` has the weights of `net`"
    owner.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = net(x)
    if out.requires_grad: out.backward(torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out))
    grads = {name: p.grad for name,p in owner.named_parameters() if p.grad is not None}
    return dict(out=out.detach(), x=x.grad) | deepcopy(grads) | deepcopy(dict(owner.named_buffers()))

def assert_close(ours, plain, tol=1e-9):
    assert ours.keys() == plain.keys()
    for name,b in plain.items():
        assert ours[name].shape == b.shape
        if b.numel(): assert (ours[name]-b).abs().max() <= tol*(1 + b.abs().max()), name

def compare(model, x, n_steps=1, tol=1e-9, n_runs=1):
    "`fuse(model)` gives what `model` gives, by `n_runs` runs"
    plain = deepcopy(model)
    fused = fuse(model)
    assert len(runs(fused)) == n_runs
    for _ in range(n_steps):
        with recorded_masks() as tape: ours = results(fused, model, x)
        with replayed_masks(tape): assert_close(ours, results(plain, plain, x), tol)

def randomise(model):
    "Weights, gammas and betas of both signs, running statistics as after some training"
    for name,t in model.state_dict().items():
        if t.is_floating_point(): t.uniform_(0.2, 2) if 'running_var' in name else t.uniform_(-1, 1)
    return model.double()

def small(*after, ni=3, nf=6, **kwargs):
    return randomise(nn.Sequential(nn.Conv2d(ni, nf, 3, **kwargs), nn.ReLU(), nn.BatchNorm2d(nf), *after))

def images(n=9, c=3, h=7, w=8): return torch.randn(n, c, h, w).double()


# Training on real digits

def train(net, owner, digits, lrs, bs=16, n_batches=40, mom=0.9):
    x,y = digits
    opt = torch.optim.SGD(owner.parameters(), lr=0, momentum=mom)
    for i,lr in enumerate(lrs):
        opt.param_groups[0]['lr'] = lr
        at = slice(i%n_batches*bs, (i%n_batches+1)*bs)
        F.nll_loss(net(x[at]), y[at]).backward()
        opt.step()
        opt.zero_grad()

@pytest.mark.parametrize('lrs,n_batches', [
    pytest.param(50*[1/16], 40, id='50 steps'),
    pytest.param([0.1**(epoch//6)/16 for epoch in range(16) for _ in range(3)], 3, id='16 epochs over a step of StepLR')])
def test_training_in_double(digits, lrs, n_batches):
    digits = digits[0].double(), digits[1]
    model = Block3(drop=0.).double()
    plain = deepcopy(model)
    train(fuse(model), model, digits, lrs, n_batches=n_batches)
    train(plain, plain, digits, lrs, n_batches=n_batches)
    assert_close(model.state_dict(), plain.state_dict())

def augmented(x):
    x = crop_rotate(x, uniform_amounts(x, 15), 1 - uniform_amounts(x, 0.1).abs())
    shift = uniform_amounts(x, 2)
    return distort(x, uniform_amounts(x, 10), shift, -shift, 1 + uniform_amounts(x, 0.1))

@pytest.mark.parametrize('pretrained', [False, True])
@pytest.mark.parametrize('tfm', [nn.Identity(), augmented])
def test_float32_is_as_exact_as_pytorch(digits, pretrained, tfm):
    "In the middle of several batches: in some a rounded number falls to the other side of a ReLU, by PyTorch too"
    model = Block3(pretrained, drop=0.)
    nets = fuse(model), deepcopy(model), deepcopy(model).double()
    def errors(x, y):
        x = tfm(x)
        grads = []
        for net in nets:
            dtype = next(net.parameters()).dtype
            grads.append(torch.autograd.grad(F.nll_loss(net(x.to(dtype)), y), list(net.parameters())))
        return torch.tensor([[(g-exact).norm()/exact.norm() for g,exact in zip(net, grads[2])] for net in grads[:2]])
    ours,plain = torch.stack([errors(x, y) for x,y in zip(*[t[:208].split(16) for t in digits])]).median(0).values
    assert (ours <= plain.clamp(min=1e-4)).all()


# Random networks

class Net(nn.Module):
    "Blocks one after the other, some added to their input, some with a function for ReLU"
    def __init__(self, blocks, adds, relus):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.adds = adds
        self.relus = relus

    def forward(self, x):
        for block,add,relu in zip(self.blocks, self.adds, self.relus):
            y = F.relu(block(x)) if relu else block(x)
            x = x + y if add else y
        return x

@st.composite
def networks(draw):
    "A network, images for it, and which of its weights are frozen"
    def pick(*values): return draw(st.sampled_from(values))
    n,c,h,w = shape = [draw(st.integers(1, top)) for top in (70, 4, 13, 13)]
    blocks,adds,relus = [],[],[]
    for _ in range(draw(st.integers(1, 4))):
        k = pick(1, 3, 5)
        pad = draw(st.integers(max(0, (k+1-min(h,w))//2), k-1))
        nf = draw(st.integers(1, 33))
        h2,w2 = h+2*pad-k+1, w+2*pad-k+1
        add = pick(True, False) and (nf,h2,w2) == (c,h,w)
        norm = pick(True, False) and n*h2*w2 > 1
        layers = [nn.ReLU()]*pick(0, 1) + [nn.BatchNorm2d(nf, momentum=pick(0.1, None, 0.5))]*norm
        layers = [nn.Conv2d(c, nf, k, padding=pad, bias=pick(True, False)), *draw(st.permutations(layers))]
        layers += pick([], [nn.Dropout2d(0.3)], [nn.Dropout(0.4)], [nn.Dropout2d(0.2), nn.Dropout(0.2)])
        c,h,w = nf,h2,w2
        if min(h,w) > 1 and not add and pick(True, False):
            layers.insert(draw(st.integers(1, len(layers))), nn.MaxPool2d(2))
            h,w = h//2,w//2
        blocks.append(nn.Sequential(*layers))
        adds.append(add)
        relus.append(pick(True, False))
    pool = pick(None, nn.AdaptiveAvgPool2d(1), nn.AvgPool2d((h,w)))
    if pool: blocks[-1].append(pool)
    torch.manual_seed(draw(st.integers(0, 99)))
    model = randomise(Net(blocks, adds, relus))
    for p in model.parameters(): p.requires_grad_(pick(True, True, True, False))
    return model, torch.randn(shape).double()

@pytest.mark.parametrize('n_examples', [30, pytest.param(200, marks=slow)])
def test_random_networks(n_examples, n_threads):
    @settings(max_examples=n_examples, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
    @given(networks(), st.sampled_from(['train', 'eval', 'frozen']), st.integers(1, 3))
    def check(network, mode, threads):
        model,x = network
        n_threads(threads)
        model.train(mode != 'eval')
        for m in model.modules():
            if mode == 'frozen' and isinstance(m, nn.BatchNorm2d): m.eval()
        compare(model, x, n_steps=2, tol=1e-8, n_runs=len(runs(fuse(model))))
        with torch.no_grad(), recorded_masks() as tape: ours = fuse(model)(x)
        with torch.no_grad(), replayed_masks(tape): assert_close(dict(out=ours), dict(out=model(x)), 1e-8)
    check()

@pytest.mark.parametrize('pad', [0, 1, 2])
def test_large_images(pad):
    "Whose rows go through the first convolution in several portions"
    compare(small(nn.Conv2d(32, 32, 1), nn.MaxPool2d(2), nn.Conv2d(32, 4, 5), nf=32, padding=pad), images(5, 3, 31, 34))
    plain = small(ni=1, nf=33, padding=pad)
    ours = deepcopy(plain)
    x = images(5, 1, 40, 37)
    for net in (fuse(ours), plain): net(x).square().sum().backward()
    for p,q in zip(ours.parameters(), plain.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)

def test_a_channel_that_hardly_varies():
    "keeps its variance in float32"
    x = 100 + torch.randn(64, 1, 12, 12)/10
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4))
    exact = deepcopy(model).double()
    torch.testing.assert_close(fuse(model)(x).double(), exact(x.double()), rtol=0, atol=2e-2)

def test_ties_in_a_pool():
    compare(small(nn.MaxPool2d(2), nn.Conv2d(6, 2, 1)), images().round())


# Dropout

@pytest.mark.parametrize('drop', [nn.Dropout(0.3), nn.Dropout2d(0.3)])
def test_dropout_keeps_its_share_and_scale(drop):
    net = fuse(nn.Sequential(nn.Conv2d(1, 20, 1), drop))
    x = torch.ones(500, 1, 2, 2)
    with torch.no_grad():
        for p in net.parameters(): p.fill_(0.5)
        first,second = net(x),net(x)
    assert set(first.unique().tolist()) == {0, torch.tensor(1/0.7).item()}
    assert not torch.equal(first, second)
    whole = first.flatten(2).eq(0).float().mean(2)
    assert abs(whole.mean() - 0.3) < 0.02
    assert bool(set(whole.unique().tolist()) <= {0, 1}) == isinstance(drop, nn.Dropout2d)


# To the bit

def test_threads_do_not_change_a_bit(digits, n_threads):
    def trained(threads):
        n_threads(threads)
        torch.manual_seed(0)
        model = Block3(drop=0.1)
        train(fuse(model), model, digits, 4*[1/16], bs=72)
        with torch.no_grad(): out = fuse(model.eval())(digits[0][:300])
        return [out, *model.state_dict().values()]
    one = trained(1)
    for threads in (2, 3):
        for a,b in zip(one, trained(threads)): assert torch.equal(a, b)

def test_two_python_threads_at_once(n_threads):
    n_threads(2)
    nets = [small(nn.Dropout2d(0.)) for _ in range(4)]
    x = images(64, h=20, w=20)
    want = [results(net, net, x) for net in map(deepcopy, nets)]
    wrong = []
    def work(net, want):
        torch.set_num_threads(2)
        fused,start = fuse(net),deepcopy(net.state_dict())
        for _ in range(100):
            net.load_state_dict(start)
            try: assert_close(results(fused, net, x), want)
            except AssertionError as e: wrong.append(e)
    workers = [threading.Thread(target=work, args=args) for args in zip(nets, want)]
    for w in workers: w.start()
    for w in workers: w.join()
    assert not wrong


# What is not covered

class Calls(nn.Module):
    "`small` with a forward pass of its own"
    def __init__(self, forward):
        super().__init__()
        self.net,self.conv = small(),randomise(nn.Conv2d(6, 6, 3, padding=1))
        self.register_buffer('n_calls', torch.zeros(()))
        self.n = 0
        self.call = forward
    def forward(self, x): return self.call(self, self.net(x))

def coin(m, x): return x if torch.rand(()) < 0.5 else m.conv(x)
def counter(m, x):
    m.n += 1
    return x*m.n
def counter_in_a_buffer(m, x):
    m.n_calls += 1
    return x*m.n_calls
def control_flow(m, x): return x if x.sum() > 0 else m.conv(x)
def twice(m, x): return m.conv(m.conv(x))
def twice_apart(m, x): return m.conv(torch.sin(m.conv(x)))
def by_keyword(m, x): return m.conv(input=x)
def in_place(m, x): return F.relu(m.conv(x), inplace=True) + x
def two_readers(m, x):
    y = m.conv(x)
    return F.relu(y) + y

@pytest.mark.parametrize('forward,n_runs', [
    (coin, 0), (counter, 0), (counter_in_a_buffer, 0), (control_flow, 0),
    (twice, 1), (twice_apart, 2), (by_keyword, 1), (in_place, 2), (two_readers, 1)])
def test_forward_in_python(forward, n_runs):
    model = Calls(forward)
    plain = deepcopy(model)
    x = images()
    torch.manual_seed(1)
    net = fuse(model)
    assert len(runs(net)) == n_runs
    ours = [results(net, model, x) for _ in range(5)]
    torch.manual_seed(1)
    for a in ours: assert_close(a, results(plain, plain, x))

def shared_norm():
    norm = nn.BatchNorm2d(6)
    return randomise(nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 6, 1), norm))

@pytest.mark.parametrize('model,n_runs', [
    (small(nn.Conv2d(6, 6, 3, stride=2)), 1),
    (small(nn.Conv2d(6, 6, 3, groups=2)), 1),
    (small(nn.Conv2d(6, 6, 3, dilation=2)), 1),
    (small(nn.Conv2d(6, 6, (1,3))), 1),
    (small(nn.Conv2d(6, 6, 3, padding='same')), 1),
    (small(nn.Conv2d(6, 6, 3, padding=1, padding_mode='reflect')), 1),
    (small(nn.Conv2d(6, 6, 3, padding=3)), 1),
    (small(nn.MaxPool2d(3)), 1),
    (small(nn.MaxPool2d(2, stride=1)), 1),
    (small(nn.MaxPool2d(2, ceil_mode=True)), 1),
    (small(nn.AvgPool2d(2)), 1),
    (small(nn.AvgPool2d((5,6), divisor_override=3)), 1),
    (small(nn.AdaptiveAvgPool2d(2)), 1),
    (small(nn.BatchNorm2d(6, affine=False)), 1),
    (small(nn.Flatten(), nn.Linear(180, 2)), 1),
    (small(nn.BatchNorm2d(6, track_running_stats=False)), 1),
    (randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False))), 1),
    (shared_norm(), 1),
    (randomise(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.ReLU(), nn.Conv2d(6, 6, 1))), 1),
    (small().to(memory_format=torch.channels_last), 1)], ids=str)
def test_other_layers(model, n_runs):
    model.to(torch.float64)
    compare(model, images(), 2, n_runs=n_runs)
    compare(model.eval(), images(), n_runs=n_runs)

def test_old_weight_norm():
    model = small()
    plain = deepcopy(model)
    for m in (model, plain): nn.utils.weight_norm(m[0])
    x = images()
    fused = fuse(model)
    assert not runs(fused)
    assert_close(results(fused, model, x), results(plain, plain, x))

def test_pool_with_indices():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)
            self.pool = nn.MaxPool2d(2, return_indices=True)
        def forward(self, x): return self.pool(self.conv(x))[0]
    compare(Net().double(), images())

@pytest.mark.parametrize('where', ['', 'net', 'net.0', 'net.1'])
def test_hooks_are_called(where):
    model = Calls(twice)
    shapes = []
    model.get_submodule(where).register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    x = images()
    fused = fuse(model)
    plain = deepcopy(model)
    for net in (fused, plain): net(x)
    assert shapes == 2*[(9,6,5,6)]

@pytest.mark.parametrize('x', [
    images().to(memory_format=torch.channels_last), images()[::2,:,:,1:], images().transpose(2, 3), images(0)],
    ids=['channels_last', 'not contiguous', 'transposed', 'empty'])
def test_other_images(x):
    model = small()
    if not len(x): model.eval()
    compare(model, x)

@pytest.mark.parametrize('x', [images(c=4), images().float(), images()[0,0], torch.randn(1,3,3,3).double()],
    ids=['channels', 'type', 'dimensions', 'one number a channel'])
def test_errors_are_those_of_pytorch(x):
    model = small()
    with pytest.raises((RuntimeError, ValueError)) as plain: deepcopy(model)(x)
    with pytest.raises(plain.type): fuse(model)(x)

def test_weights_elsewhere():
    with pytest.raises(RuntimeError, match='device'): fuse(small().to('meta'))(images())

def test_autocast_and_half(digits):
    model = Block3(drop=0.).eval()
    x = digits[0][:20]
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(fuse(model)(x), deepcopy(model)(x))
    assert torch.equal(fuse(model.bfloat16())(x.bfloat16()), model(x.bfloat16()))


# As any module

def test_gradients_add_up():
    model = small()
    plain = deepcopy(model)
    for net in (fuse(model), plain):
        x = images()*0 + 1
        a,b = net(x),net(2*x) # two forward passes before the first backward pass
        b.square().sum().backward(retain_graph=True)
        a.sum().backward()
        b.square().sum().backward()
    for p,q in zip(model.parameters(), plain.parameters()): torch.testing.assert_close(p.grad, q.grad)

def test_a_weight_changed_before_the_backward_pass_raises():
    model = small()
    loss = fuse(model)(images()).sum()
    with torch.no_grad(): model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()

def test_one_set_of_buffers_is_enough():
    "for many forward passes without a backward pass, and for all batch sizes"
    net = fuse(small())
    for n in range(1, 100): net(images(n))
    assert [len(free) for free in runs(net)[0].free.values()] == [1]

@pytest.mark.parametrize('change', [
    deepcopy, lambda net: pickle.loads(pickle.dumps(net)), lambda net: net.float().double(),
    lambda net: (net.load_state_dict(deepcopy(net.state_dict()), assign=True), net)[1]],
    ids=['deepcopy', 'pickle', 'double', 'assign'])
def test_copies_of_a_fused_model(change):
    model = small()
    x = images()
    fused = fuse(model)
    fused(x)
    net = change(fused)
    plain = deepcopy(model)
    assert runs(net)
    assert_close(dict(out=net(x).detach()), dict(out=plain(x).detach()), 1e-6)
    torch.optim.SGD(net.parameters(), lr=1).zero_grad()
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())

def test_weights_loaded_into_the_model():
    model,other = small(),small()
    fused = fuse(model)
    model.load_state_dict(other.state_dict(), assign=True)
    assert_close(dict(out=fused(images()*0+1).detach()), dict(out=other(images()*0+1).detach()))

@pytest.mark.parametrize('no_grad', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('training', [True, False])
def test_without_gradients(no_grad, training):
    model = small().train(training)
    x = images(70)
    with no_grad(): out = fuse(deepcopy(model))(x)
    assert not out.requires_grad
    torch.testing.assert_close(out.clone(), model(x).detach())


# The build

def test_fork_after_use(n_threads):
    n_threads(2)
    model,x = small(),images(40)
    want = fuse(model)(x)
    pid = os.fork()
    if pid == 0:
        try: os._exit(0 if torch.equal(fuse(model)(x), want) else 1)
        finally: os._exit(2)
    end = time.time() + 20
    while (done := os.waitpid(pid, os.WNOHANG)) == (0,0) and time.time() < end: time.sleep(0.01)
    if done == (0,0): os.kill(pid, signal.SIGKILL)
    assert done == (pid,0)

def test_ctrl_c(listening_to_ctrl_c, n_threads):
    n_threads(2)
    model,x = small(),images(64, 3, 20, 20)
    net = fuse(model)
    for delay in (0.05, 0.1, 0.15):
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            while True: net(x).sum().backward()
    compare(model, x)

def right(): compare(small(), images(), n_runs=1)

@pytest.mark.parametrize('env', [dict(PATH='', CXX=''), dict(CXX='false')], ids=['none', 'fails'])
def test_no_compiler(env, rebuild):
    for name,value in env.items(): rebuild.setenv(name, value)
    why = why_no_kernels()
    assert 'compiler' in why and '\n' not in why and len(why) < 120
    right()

@slow
@pytest.mark.parametrize('march,needs', [
    ('x86-64-v4', ['AVX512']), ('x86-64-v3', ['AVX2', 'AVX512']), ('x86-64', ['DEFAULT', 'AVX2', 'AVX512'])])
def test_other_processors(march, needs, rebuild, digits, n_threads):
    if torch.backends.cpu.get_cpu_capability() not in needs: pytest.skip(f'this processor lacks {march}')
    rebuild.setattr(kernels, 'march', march)
    test_float32_is_as_exact_as_pytorch(digits, True, nn.Identity())
    test_training_in_double(digits, 10*[1/16], 10)
    test_random_networks(40, n_threads)
    assert kernels._build('double', march)[1] is None

@slow
@pytest.mark.skipif(not shutil.which('clang++'), reason='needs clang++')
def test_clang(rebuild, digits, n_threads):
    rebuild.setenv('CXX', 'clang++')
    test_float32_is_as_exact_as_pytorch(digits, True, nn.Identity())
    test_random_networks(40, n_threads)
    assert why_no_kernels() is None

@slow
def test_no_place_for_the_library(rebuild):
    rebuild.setenv('XDG_CACHE_HOME', '/dev/null/x')
    assert why_no_kernels() is None
    right()

use = """
import torch
from torch import nn
from mnist_block3.kernels import fuse, why_no_kernels
torch.set_num_threads(2)
net = fuse(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)))
for _ in range(20): net(torch.randn(64, 1, 20, 20)).sum().backward()
assert why_no_kernels() is None
"""

@slow
def test_processes_at_once_build_once_and_end_well(tmp_path):
    "`compiler` says that it has been called"
    compiler = tmp_path/'compiler'
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-shared*-o*) echo >> {tmp_path}/calls;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    env = os.environ | dict(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path/'cache'))
    users = [subprocess.Popen([sys.executable, '-c', use], env=env) for _ in range(3)]
    assert [user.wait() for user in users] == [0,0,0]
    assert len((tmp_path/'calls').read_text().splitlines()) == 1
    assert len(list((tmp_path/'cache/mnist_block3').glob('*.so'))) == 1


def test_max_pooling_passes_nan_on():
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.MaxPool2d(2))
    x = torch.randn(3, 1, 6, 6)
    for i in range(3): x[i,0,i,1] = torch.nan
    torch.testing.assert_close(fuse(model)(x), model(x), equal_nan=True)


class ReplacesItsParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.register_buffer('mean', torch.zeros(8, 1, 1))
        self.seen = []
    def forward(self, x):
        x = self.conv(x)
        self.mean = 0.9*self.mean + 0.1*x.mean((0, 2, 3))[:,None,None]
        self.seen = x.shape
        return x - self.mean

def test_a_model_that_replaces_its_parts_stays_as_it_was():
    model = ReplacesItsParts()
    mean,seen = model.mean, model.seen
    assert fuse(model) is model
    assert model.mean is mean and model.seen is seen and not mean.any() and seen == []


def test_pytorch_keeps_its_threads_where_it_does_convolutions():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with kernel_threads(fuse(Block3())): assert torch.get_num_threads() == 1
        with kernel_threads(fuse(nn.Sequential(Block3(), nn.Conv2d(10, 4, 1, stride=2)))): assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 3
    finally: torch.set_num_threads(before)
