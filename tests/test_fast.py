"The fast path against fastai's own loop: the same result, by whichever path, on a CPU and under `pytest -m cuda` on a GPU"
import copy, shutil, signal, subprocess, sys
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
import fastai.callback.progress
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.data import CollectDataCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.preds import MCDropoutCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.optimizer import Adam, SGD
from fastprogress.fastprogress import NBMasterBar
from mnist_block3.all import (block3_learner, Block3, Callback, CancelEpochException, CancelFitException, CancelTrainException, CrossEntropyLossFlat, CSVLogger, CutMix, CropRotate,
                              DataLoaders, EarlyStoppingCallback, F1Score, FetchPredsCallback, history, JudgeAlso, LabelSmoothingCrossEntropyFlat, Learner,
                              load_learner, MixUp, mnist_dls, NLLLossFlat, noop, OptimWrapper, ParamScheduler, ProgressCallback, Recorder,
                              ReduceLROnPlateau, RandTransform, SaveModelCallback, SchedCos, SchedLin, set_seed, SkipToEpoch,
                              StepDecay, TensorImage, TerminateOnNaNCallback, accuracy, error_rate)
from mnist_block3.fast import FastEpoch, held_signals, Steps


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
def device(request): return request.param


class Double(nn.Module):
    def forward(self, x): return x.double()


def model64(): return nn.Sequential(Double(), Block3(drop=0.).double())


# rates that float32 has exactly, as the fused SGD of CUDA reads them
rates = dict(lr=1/64, mom=0.75)


def make(device='cpu', fast=True, dls=None, model=None, n_train=200, bs=64, compile=False, seed=0, aug_tfms=(), cbs=None, **kwargs):
    "A learner whose weights, order and everything random follow from `seed`"
    set_seed(seed)
    model = model64() if model is None else model()
    dls = mnist_dls(valid='reference', n_train=n_train, bs=bs, device=device, aug_tfms=list(aug_tfms)) if dls is None else dls()
    learn = block3_learner(dls, model, fast=fast, cbs=cbs and cbs(), **(rates | kwargs))
    learn.fast_epoch.use_compile,learn.fast_epoch.min_steps = compile,0
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def diff(a, b): return max((p.double()-q.double()).abs().max().item() for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()))


def both(device, fit=lambda o: o.fit(2), want='fast', **kwargs):
    "The same fit with `fast=True`, by the path that is expected, and with `fast=False`"
    a,b = make(device, **kwargs),make(device, fast=False, **kwargs)
    start = copy.deepcopy(a.model)
    for o in (a,b):
        set_seed(1)
        fit(o)
    want = 'plain' if want == 'plain' else 'eager' if device == 'cpu' else 'graph'
    assert (a.fast_epoch.engine, b.fast_epoch.engine) == (want, 'plain'), a.fast_epoch.why
    # a scheduled rate is rounded to float32 on CUDA
    assert diff(a, b) <= (1e-6 if device == 'cuda' and len(set(a.recorder.lrs)) > 2 else 1e-9)
    assert any(not torch.equal(p, q) for p,q in zip(a.model.parameters(), start.parameters())), 'nothing was trained'
    assert len(a.recorder.losses) == len(b.recorder.losses) and len(a.recorder.lrs) == len(b.recorder.lrs)
    for k in ('losses', 'lrs', 'iters'): assert np.allclose(*([float(v) for v in getattr(o.recorder, k)] for o in (a,b)), rtol=1e-5), k
    assert np.allclose(*([float(v) for row in o.recorder.values for v in row if v is not None] for o in (a,b)), rtol=1e-4, atol=1e-6)
    assert a.recorder.hps.keys() == b.recorder.hps.keys()
    for k,v in a.recorder.hps.items(): assert np.allclose(v, b.recorder.hps[k], rtol=1e-9)
    ha,hb = history(a).drop(columns=['seconds', 'time'], errors='ignore'),history(b).drop(columns=['seconds', 'time'], errors='ignore')
    assert list(ha) == list(hb) and np.allclose(ha.astype(float), hb.astype(float), rtol=1e-4, atol=1e-6)
    assert (a.train_iter, a.epoch) == (b.train_iter, b.epoch) and a.pct_train == pytest.approx(b.pct_train)
    for p,q in zip(a.opt.hypers, b.opt.hypers): assert {k: v for k,v in p.items() if k in ('lr','mom','wd')} == {k: v for k,v in q.items() if k in ('lr','mom','wd')}
    assert a.fast_epoch.steps is None, 'nothing of the epoch stays'
    return a,b


def torch_steps(model, dls, order, lr, mom):
    "The loop that everyone knows"
    opt,d = torch.optim.SGD(model.parameters(), lr=lr, momentum=mom),dls.train_ds.items
    for i in order.split(dls.train.bs):
        opt.zero_grad()
        F.nll_loss(model(((d.images[i][:,None].float()/255 - 0.1307)/0.3081)), d.labels[i].long()).backward()
        opt.step()


def test_the_tuned_recipe(device):
    both(device, lambda o: o.fit_tuned(3, aug=0.))


@pytest.mark.parametrize('compile', [False, True])
def test_the_tuned_recipe_with_all_its_parts(device, compile):
    "The two paths draw other random numbers, so that only what is learnt can be compared"
    a,b = (make(device, fast=o, model=Block3, n_train=3200, compile=compile) for o in (True, False))
    for o in (a,b): o.fit_tuned(2)
    assert a.fast_epoch.engine != 'plain' and b.fast_epoch.engine == 'plain'
    la,lb = (np.mean([float(v) for v in o.recorder.losses[-20:]]) for o in (a,b))
    assert la == pytest.approx(lb, rel=0.15) and history(a).valid_accuracy.iloc[-1] > 0.9


@pytest.mark.parametrize('compile', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_to_judge_also_as_the_reference_did_changes_nothing(device, compile):
    a,b = (make(device, model=Block3, compile=compile, dls=lambda: mnist_dls(n_train=200, device=device)) for _ in range(2))
    for o,cbs in ((a, JudgeAlso()), (b, None)):
        set_seed(1)
        o.fit(2, cbs=cbs)
    assert a.fast_epoch.engine == b.fast_epoch.engine != 'plain'
    assert diff(a, b) == 0 and history(a).reference_total.tolist() == [200, 200]


class Order(Callback):
    "Keep the order in which the images come"
    def after_train(self): self.learn.order_seen = self.fast_epoch.steps.order.clone()


@pytest.mark.parametrize('compile', [False, True])
def test_fifty_steps_in_float64(device, compile):
    a,b = make(device, n_train=800, bs=16, compile=compile, cbs=Order),make(device, n_train=800, bs=16, fast=False)
    twin = copy.deepcopy(a.model).train()
    for o in (a,b): o.fit(1)
    assert a.fast_epoch.engine == {('cpu',False): 'eager', ('cpu',True): 'compiled', ('cuda',False): 'graph', ('cuda',True): 'compiled graph'}[device, compile]
    assert len(a.recorder.losses) == 50 and diff(a, b) < 1e-9
    torch_steps(twin, a.dls, a.order_seen, **rates)
    assert max((p-q).abs().max().item() for p,q in zip(a.model.state_dict().values(), twin.state_dict().values())) < 1e-9


@pytest.mark.parametrize('compile', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_step_in_float32(device, compile):
    a,b = (make(device, fast=o, n_train=64, model=partial(Block3, drop=0.), compile=compile) for o in (True, False))
    start = copy.deepcopy(a.model)
    for o in (a,b): o.fit(1)
    assert a.fast_epoch.engine != 'plain'
    for p,q,s in zip(a.model.parameters(), b.model.parameters(), start.parameters()): assert (p-q).norm() <= 1e-3*(q-s).norm()
    for p,q in zip(a.model.buffers(), b.model.buffers()): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('compile', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bfloat16(device, compile):
    a,b,c = (make(device, fast=o, compile=compile, n_train=64, model=partial(Block3, drop=0.)) for o in (True, False, False))
    for o in (a.to_bf16(), b.to_bf16(), c): o.fit(1)
    assert a.fast_epoch.engine != 'plain'
    assert all(p.dtype == torch.float32 for p in a.model.parameters())
    # bfloat16 has 8 bits: by both paths it lies as far from float32, and the two lie near each other
    assert a.recorder.losses[0] != c.recorder.losses[0] and a.recorder.losses[0].item() == pytest.approx(b.recorder.losses[0].item(), rel=2e-3)
    assert b.recorder.losses[0].item() == pytest.approx(c.recorder.losses[0].item(), rel=2e-2)


@pytest.mark.parametrize('compile', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_with_everything_on_accuracy_is_the_same_in_distribution(device, compile):
    def accuracies(fast):
        out = []
        for seed in range(5):
            learn = make(device, fast=fast, compile=compile, model=Block3, n_train=2560, seed=seed, aug_tfms=[CropRotate()])
            learn.fit(1, lr=0.1)
            assert (learn.fast_epoch.engine != 'plain') == fast
            out.append(history(learn).valid_accuracy.iloc[-1])
        return np.array(out)
    a,b = accuracies(True),accuracies(False)
    assert a.min() > 0.5 and not np.array_equal(a, b)
    assert abs(a.mean()-b.mean()) < 2*np.sqrt(a.var(ddof=1)/5 + b.var(ddof=1)/5)


class Halve(Callback):
    def after_epoch(self): self.opt.set_hyper('lr', self.opt.hypers[-1]['lr']/2)

class Weigh(Callback):
    "Changes what a graph would have kept"
    def before_epoch(self): self.opt.set_hyper('wd', 0.1*self.epoch)

class Slower(Callback):
    def before_epoch(self): self.opt.set_hyper('mom', 0.5*self.epoch)

class Late(Callback):
    order = 70
    def before_train(self): self.opt.set_hyper('lr', 1/128)

class Flat(Callback):
    def after_pred(self):
        if self.training: self.learn.pred = self.pred*0.9


@pytest.mark.filterwarnings('ignore:You are shadowing')
@pytest.mark.parametrize('cbs,want', [
    (None, 'fast'), (EarlyStoppingCallback, 'fast'), (partial(EarlyStoppingCallback, min_delta=100.), 'fast'), (SaveModelCallback, 'fast'),
    (partial(SaveModelCallback, every_epoch=True, with_opt=True), 'fast'), (ReduceLROnPlateau, 'fast'), (CSVLogger, 'fast'), (BnFreeze, 'fast'),
    (ChannelsLast, 'fast'), (partial(SkipToEpoch, 1), 'fast'), (partial(ParamScheduler, {'lr': SchedLin(0.1, 0.01)}), 'fast'),
    (partial(ParamScheduler, {'lr': SchedCos(0.1, 0.01), 'mom': SchedLin(0.5, 0.9)}), 'fast'), (partial(ParamScheduler, {'wd': SchedLin(0., 0.1)}), 'plain'),
    (partial(StepDecay, 1, 0.5), 'fast'), (Halve, 'fast'), (Weigh, 'fast'), (Slower, 'fast'), (Late, 'plain'), (Flat, 'plain'),
    (MixUp, 'plain'), (CutMix, 'plain'), (GradientClip, 'plain'), (partial(GradientAccumulation, 128), 'plain'), (TerminateOnNaNCallback, 'plain'),
    (partial(ShortEpochCallback, 0.5), 'plain'), (MCDropoutCallback, 'fast'), (partial(MixedPrecision, 'fp16'), 'plain'), (ActivationStats, 'plain'), (CollectDataCallback, 'plain'), (FetchPredsCallback, 'fast'),
    (partial(Callback, after_batch=lambda self: None), 'plain'), (partial(Callback, after_epoch=lambda self: None), 'fast'),
], ids=lambda o: getattr(getattr(o, 'func', o), '__name__', o) if not isinstance(o, str) else o)
def test_callbacks(device, tmp_path, cbs, want): both(device, want=want, cbs=cbs, path=tmp_path)


def worst(pred, targ): return F.nll_loss(pred, targ, reduction='none').max().float()


@pytest.mark.parametrize('kwargs,want', [
    (dict(opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9, weight_decay=1e-2, nesterov=True)), 'fast'),
    (dict(opt_func=partial(OptimWrapper, opt=torch.optim.SGD)), 'fast'), (dict(mom=0), 'fast'), (dict(wd=0.1), 'fast'),
    (dict(opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9, dampening=0.5)), 'plain'),
    (dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)), 'plain'), (dict(opt_func=partial(SGD, mom=0.9)), 'plain'), (dict(opt_func=Adam), 'plain'),
    (dict(loss_func=CrossEntropyLossFlat()), 'fast'), (dict(loss_func=LabelSmoothingCrossEntropyFlat()), 'fast'),
    (dict(loss_func=NLLLossFlat(weight=torch.arange(1., 11.))), 'fast'), (dict(loss_func=NLLLossFlat(reduction='sum'), lr=2**-12), 'plain'),
    (dict(loss_func=lambda p,y: F.nll_loss(p, y).float()), 'plain'),
    (dict(metrics=[accuracy, error_rate]), 'fast'), (dict(metrics=[accuracy, F1Score(average='macro')]), 'fast'), (dict(metrics=[accuracy, worst]), 'fast'), (dict(metrics=[]), 'fast'),
    (dict(splitter=lambda m: [list(m[1].input_block.parameters()), list(m[1].head.parameters())], fit=lambda o: o.fit(2, lr=slice(1/256, 1/64))), 'fast'),
    (dict(model=lambda: nn.Sequential(Double(), nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(676, 10), nn.LogSoftmax(1)).double()), 'fast'),
    (dict(cbs=lambda: Recorder(train_metrics=True)), 'plain'),
])
def test_optimizers_losses_metrics_and_models(device, kwargs, want):
    if device == 'cuda' and getattr(kwargs.get('loss_func'), 'func', None) and kwargs['loss_func'].func.weight is not None: kwargs['loss_func'].func.cuda()
    both(device, want=want, **kwargs)


class Dim(RandTransform):
    "Everybody's own transform: without `augment` the fast path does not know what it does"
    def encodes(self, x:TensorImage): return x*0.5

class KnownDim(Dim):
    def augment(self, x): return x*0.5

class OtherCropRotate(CropRotate):
    "What `augment` does is no longer what the transform does"
    def encodes(self, x:TensorImage): return x*0.5


@pytest.mark.parametrize('kwargs,want', [
    (dict(bs=32), 'fast'), (dict(bs=200), 'fast'), (dict(bs=300), 'fast'), (dict(bs=100), 'fast'), (dict(valid='test'), 'fast'),
    (dict(aug_tfms=[Dim()]), 'plain'), (dict(aug_tfms=[KnownDim()]), 'fast'), (dict(aug_tfms=[KnownDim(p=0.5)]), 'plain'),
    (dict(aug_tfms=[OtherCropRotate()]), 'plain'), (dict(item_tfms=Dim(p=1.)), 'plain'),
])
def test_loaders(device, kwargs, want):
    both(device, lambda o: o.fit(1), want, dls=lambda: mnist_dls(**(dict(valid='reference', n_train=200, device=device, aug_tfms=[]) | kwargs)))


def test_loader_of_torch_and_of_dropped_batches(device):
    def dropping():
        dls = mnist_dls(valid='reference', n_train=200, device=device, aug_tfms=[])
        return DataLoaders(dls.train.new(drop_last=True), dls.valid, device=dls.device)
    a,_ = both(device, dls=dropping)
    assert len(a.recorder.losses) == 2*3
    def of_torch():
        d = mnist_dls(valid='reference', n_train=128, device=device, aug_tfms=[]).train_ds.items
        dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset((d.images[:,None]/255).cpu(), d.labels.long().cpu()), 64)
        return DataLoaders(dl, dl)
    both(device, want='plain', dls=of_torch)


def test_hooks(device):
    seen = []
    def fit(learn):
        handle = learn.model[1].head.register_forward_hook(lambda *args: seen.append(1))
        learn.fit(1)
        handle.remove()
    both(device, fit, 'plain')
    assert len(seen) == 2*(4+4)
    def fit(learn):
        handle = next(learn.model.parameters()).register_hook(lambda g: g*2)
        learn.fit(1)
        handle.remove()
    both(device, fit, 'plain')


def two_fits(learn): learn.fit(1); learn.fit(2)
def schedulers(learn): learn.fit_one_cycle(2, 1/8); learn.fit_flat_cos(1, 1/64); learn.fit(1)
def frozen(learn): learn.freeze(); learn.fit(1); learn.unfreeze(); learn.fit(1)
def reloaded(learn): learn.fit(1); learn.save('a'); learn.fit(1); learn.load('a'); learn.fit(1)
def found(learn): learn.lr_find(num_it=5, show_plot=False); learn.fit(1)
def exported(learn): learn.fit(1); learn.export('a.pkl'); learn.fit(1)
def looked(learn): learn.fit(1); learn.validate(); learn.get_preds(); learn.predict(learn.dls.train_ds.items[0][0]); learn.fit(1)
def continued(learn): learn.fit(3, start_epoch=1)
def reset(learn): learn.fit(1); learn.fit(1, reset_opt=True)
def then_channels_last(learn): learn.fit(1); learn.add_cb(ChannelsLast()); learn.fit(1)
def named_device(learn): learn.fit(1); learn.dls.to(learn.dls.device.type); learn.fit(1)


@pytest.mark.parametrize('fit', [two_fits, schedulers, frozen, reloaded, found, exported, looked, continued, reset, then_channels_last, named_device], ids=lambda o: o.__name__)
def test_between_fits(device, tmp_path, fit):
    two = lambda m: [list(m[1].input_block.parameters()), [p for n,p in m[1].named_parameters() if not n.startswith('input_block')]]
    a,b = both(device, fit, splitter=two, path=tmp_path)
    if fit is exported:
        back = load_learner(tmp_path/'a.pkl', cpu=device == 'cpu')
        digit = a.dls.train_ds.items[0][0]
        with back.no_bar(): assert back.predict(digit)[2].shape == (10,)


class Boom(Callback):
    def after_epoch(self): raise ValueError('boom')


def test_signals_are_held_until_they_are_let_through(listening_to_ctrl_c):
    done = []
    with pytest.raises(KeyboardInterrupt), held_signals(signal.SIGINT) as held:
        for i in range(3):
            done.append(f'{i} begun')
            if i == 1: signal.raise_signal(signal.SIGINT)
            done.append(f'{i} done')
            held.let()
    assert done == ['0 begun', '0 done', '1 begun', '1 done']
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_signal_does_not_wait(listening_to_ctrl_c):
    done = []
    with pytest.raises(KeyboardInterrupt), held_signals(signal.SIGINT):
        for i in range(3):
            done.append(i)
            if i: signal.raise_signal(signal.SIGINT)
    assert done == [0, 1, 2]


def test_a_signal_that_ends_the_process_waits_too():
    code = 'import signal; from mnist_block3.fast import held_signals\n' \
           'with held_signals(signal.SIGTERM): signal.raise_signal(signal.SIGTERM); print("done", flush=True)\n' \
           'print("never", flush=True)'
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (res.returncode, res.stdout) == (-signal.SIGTERM, 'done\n')


@pytest.mark.parametrize('at', [1, 3])
def test_fastais_own_loop_ends_at_a_step_too(device, at, listening_to_ctrl_c):
    class Signal(Callback):
        def after_pred(self):
            if self.training and self.train_iter == at - 1: signal.raise_signal(signal.SIGINT)
    seen,learn = [],make(device, fast=False)
    opt_step = torch.optim.SGD.step
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(torch.optim.SGD, 'step', lambda self, *args: (opt_step(self, *args), seen.append(1)))
        learn.fit(2, cbs=Signal())
    assert len(seen) == len(learn.recorder.losses) == learn.train_iter == at
    assert 'all_batches' not in vars(learn) and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize('cancel', [CancelTrainException, CancelEpochException, CancelFitException])
def test_a_signal_is_not_lost_where_a_callback_ends_the_epoch(cancel, listening_to_ctrl_c):
    class Both(Callback):
        def after_pred(self):
            if not self.training: return
            signal.raise_signal(signal.SIGINT)
            raise cancel
    with pytest.raises(KeyboardInterrupt): make(fast=False).fit(1, cbs=Both())


@pytest.mark.parametrize('fast', [True, False])
def test_two_signals_in_a_step_are_both_let_through(monkeypatch, fast, listening_to_ctrl_c):
    came,old = [],signal.signal(signal.SIGTERM, lambda num, frame: came.append(num))
    def send(): [signal.raise_signal(o) for o in (signal.SIGINT, signal.SIGTERM)]
    class Signals(Callback):
        def after_pred(self): send()
    try:
        if fast: monkeypatch.setattr(Steps, '__call__', lambda self, i, step=Steps.__call__: (step(self, i), send()))
        with pytest.raises(KeyboardInterrupt): make(fast=fast).fit(1, cbs=[] if fast else Signals())
        assert came == [signal.SIGTERM]
    finally: signal.signal(signal.SIGTERM, old)


def test_ctrl_c_again_while_handlers_are_put_back(monkeypatch, listening_to_ctrl_c):
    set_handler,term = signal.signal,signal.getsignal(signal.SIGTERM)
    def again(num, handler):
        old = set_handler(num, handler)
        if (num, handler) == (signal.SIGINT, signal.default_int_handler): signal.raise_signal(signal.SIGINT)
        return old
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(signal, 'signal', again)
        with held_signals(signal.SIGINT, signal.SIGTERM): pass
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (signal.default_int_handler, term)


def test_a_learners_own_loop_is_taken_and_kept():
    learn,n = make(),[]
    def mine():
        n.append((learn.epoch, learn.training))
        Learner.all_batches(learn)
    learn.all_batches = mine
    learn.fit(2)
    assert n == [(0, True), (0, False), (1, True), (1, False)] and learn.all_batches is mine and learn.fast_epoch.why == 'the learner has its own all_batches'


def test_nothing_is_left_of_a_fit_that_did_not_come_to_its_steps():
    class Refuse(Callback):
        def before_train(self): raise ValueError('no')
    learn = make(fast=False)
    with pytest.raises(ValueError, match='no'): learn.fit(1, cbs=Refuse())
    learn.remove_cb(FastEpoch)
    learn.fit(1)
    assert len(history(learn)) == 1 and 'all_batches' not in vars(learn)


def test_a_loop_of_ones_own_cannot_begin_within_an_epoch(device):
    class Mine(Learner):
        def all_batches(self): super().all_batches()
    class Midway(Callback):
        def before_train(self): self.learn.fast_epoch.begin_after(1, 0)
    base = make(device, fast=False)
    learn = Mine(base.dls, base.model, loss_func=base.loss_func, opt_func=base.opt_func, cbs=FastEpoch())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        with pytest.raises(ValueError, match='Mine has a loop of its own'): learn.fit(1, cbs=Midway())


@pytest.mark.parametrize('at', [1, 3, 4, 6])
def test_ctrl_c_ends_at_a_step(device, monkeypatch, at, listening_to_ctrl_c):
    "What is left is what so many steps leave, and the next fit is as good as any"
    take,taken = Steps.__call__,[]
    def interrupted(self, i):
        take(self, i)
        taken.append(i)
        if len(taken) == at: signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(Steps, '__call__', interrupted)
    a = make(device)
    set_seed(1)
    with pytest.raises(KeyboardInterrupt): a.fit(2)
    assert len(taken) == at == sum(a.recorder.iters[-1:]) + len(a.recorder.losses[sum(a.recorder.iters[-1:]):])
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.train_iter == at: raise KeyboardInterrupt
    b = make(device, fast=False)
    set_seed(1)
    with pytest.raises(KeyboardInterrupt): b.fit(2, cbs=Stop())
    assert diff(a, b) < 1e-9
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    for o in (a,b):
        set_seed(2)
        o.dls.train.rng.seed(3)
        o.fit(1)
    assert a.fast_epoch.engine != 'plain' and diff(a, b) < 1e-9


def test_an_exception_leaves_nothing_stale(device, tmp_path):
    a,b = make(device, path=tmp_path),make(device, fast=False, path=tmp_path)
    for o in (a,b):
        set_seed(1)
        with pytest.raises(ValueError, match='boom'): o.fit(2, cbs=Boom())
        o.export('boom.pkl')
        assert (tmp_path/'boom.pkl').stat().st_size < 1_000_000
        for p in o.model.parameters(): p.data = p.data*0.9 # other tensors: a graph of the last fit would not see them
        o.fit(1)
    assert a.fast_epoch.engine != 'plain' and diff(a, b) < 1e-9


def test_a_model_that_cannot_be_tried_is_left_to_fastai(device):
    calls = []
    class Moody(Block3):
        def forward(self, x):
            calls.append(1)
            if len(calls) == 1: raise RuntimeError('not today')
            return super().forward(x)
    learn = make(device, model=Moody)
    said = []
    learn.logger = said.append
    learn.fit(1)
    assert learn.fast_epoch.engine == 'plain' and "Taking fastai's own training loop: RuntimeError: not today" in said
    assert len(learn.recorder.losses) == 4


def test_trying_leaves_no_trace(device):
    learn = make(device, model=Block3)
    learn.create_opt()
    learn.dls.train.before_iter()
    learn.model.to(learn.dls.device).train()
    start,rng = copy.deepcopy(learn.model.state_dict()),[torch.get_rng_state(), device == 'cuda' and torch.cuda.get_rng_state()]
    opt = learn.opt.opt
    steps = Steps(learn.model, learn.loss_func, [lambda x: x.float()/255], learn.dls.train_ds.items, opt.param_groups, opt.state, 200, 64, graph=device == 'cuda')
    steps.start(range(200), [[0.1]]*4, [[0.8]]*4)
    steps.prepare()
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, start[k]), k
    assert torch.equal(torch.get_rng_state(), rng[0])
    if device == 'cuda': assert torch.equal(torch.cuda.get_rng_state(), rng[1])
    assert all(not s['momentum_buffer'].any() for s in opt.state.values())
    assert not steps.losses.any() and steps.n_right == 0 and all(p.grad is None for p in learn.model.parameters())
    steps(0)
    assert steps.losses[0] > 0 and not torch.equal(learn.model.state_dict()['head.weight'], start['head.weight'])


def test_short_fits_and_machines_without_compiler_take_the_plain_loop(monkeypatch):
    said = []
    learn = make()
    learn.fast_epoch.use_compile,learn.fast_epoch.min_steps,learn.logger = None,None,said.append
    learn.fit(1)
    assert (learn.fast_epoch.engine, learn.fast_epoch.why) == ('plain', 'the fit is short')
    assert not any("fastai's own" in str(o) for o in said)
    learn.fast_epoch.min_steps = 8
    monkeypatch.setattr(shutil, 'which', lambda o: None)
    learn.fit(2)
    assert learn.fast_epoch.engine == 'plain' and "Taking fastai's own training loop: there is no C++ compiler" in said
    assert sum("fastai's own" in str(o) for o in said) == 1


def test_a_second_learner_compiles_nothing_anew():
    def graphs(seed):
        make(model=Block3, compile=True, seed=seed, aug_tfms=[CropRotate()], n_train=128).fit(2)
        return counters['stats']['unique_graphs']
    assert graphs(0) == graphs(1) == graphs(2)


def test_progress_bar(monkeypatch):
    "Told within the epoch or after it, what is recorded is the same"
    told,tell = [],FastEpoch._tell
    monkeypatch.setattr(FastEpoch, '_tell', lambda self, n: told.append(n) or tell(self, n))
    monkeypatch.setattr(FastEpoch, 'bar_seconds', 0.)
    def fit(learn):
        learn.add_cb(ProgressCallback())
        learn.fit_one_cycle(2, 1/8)
    a,_ = both('cpu', fit)
    assert told == [1, 2, 3, 4, 4]*2
    assert len(a.recorder.values) == 2 and a.recorder.metric_names[:3] == ['epoch', 'train_loss', 'valid_loss']


def test_the_reason_is_no_row_of_the_log(tmp_path, capsys):
    learn = make(cbs=lambda: [CSVLogger(), GradientClip()], path=tmp_path)
    learn.logger = print
    learn.fit(1)
    assert "Taking fastai's own training loop: GradientClip listens to before_step" in capsys.readouterr().out
    assert len((tmp_path/'history.csv').read_text().splitlines()) == 2


def test_the_reason_stays_in_a_notebook(monkeypatch, capsys):
    "A notebook's bar shows its table in place of any text that it was given before"
    class Bar(NBMasterBar):
        def on_iter_begin(self): "There is nowhere to draw here"
        show = on_iter_begin
        def write(self, line, table=False): assert table, line
    monkeypatch.setattr(fastai.callback.progress, 'master_bar', Bar)
    learn = make(cbs=lambda: [GradientClip()])
    learn.add_cb(ProgressCallback())
    learn.logger = print
    learn.fit(1)
    assert "Taking fastai's own training loop: GradientClip listens to before_step" in capsys.readouterr().out


def test_evaluation_after_a_fit_keeps_what_ran_it():
    learn = make()
    learn.fit(1)
    learn.validate()
    learn.get_preds()
    assert (learn.fast_epoch.engine, learn.fast_epoch.why) == ('eager', None)


def test_no_batches():
    def empty():
        dls = mnist_dls(valid='reference', n_train=20, device='cpu', aug_tfms=[])
        return DataLoaders(dls.train.new(drop_last=True), dls.valid, device=dls.device)
    learn = make(dls=empty)
    learn.fit(1)
    assert (learn.fast_epoch.engine, learn.fast_epoch.why) == ('plain', 'there are no batches')


class Counting(nn.Module):
    "Changes itself in Python, and asks NumPy for random numbers"
    def __init__(self):
        super().__init__()
        self.body,self.calls = Block3(drop=0.).double(),0
        self.register_buffer('mean', torch.zeros((), dtype=torch.double))
    def forward(self, x):
        x = x.double()*np.random.uniform(0.9, 1.1)
        if self.training: self.calls,self.mean = self.calls+1,0.9*self.mean + 0.1*x.detach().mean()
        return self.body(x - self.mean)


def test_models_that_change_themselves(device):
    a,_ = both(device, want='plain' if device == 'cuda' else 'fast', model=Counting)
    assert a.model.calls == 8


class ClearState(Callback):
    def before_epoch(self): self.opt.clear_state()

class Smooth(Callback):
    "Changes a number of the loss that a graph would have kept"
    def before_epoch(self): self.loss_func.func.label_smoothing = 0.1*self.epoch

class Stronger(Callback):
    "Changes a number of the augmentation that a graph would have kept"
    def before_epoch(self): self.dls.train.after_batch.fs[1].draw = 5.*self.epoch


@pytest.mark.parametrize('kwargs', [dict(cbs=ClearState), dict(cbs=Smooth, loss_func=CrossEntropyLossFlat()), dict(cbs=Stronger, aug_tfms=[CropRotate(p=0, draw=1.)])],
                         ids=lambda o: o['cbs'].__name__)
def test_changes_between_epochs(device, kwargs): both(device, **kwargs)



@pytest.mark.cuda
def test_nothing_waits_for_the_device():
    learn = make('cuda', model=Block3, aug_tfms=[CropRotate()], n_train=6400)
    start,tell = Steps.start,FastEpoch._tell
    def strict(*args):
        start(*args)
        torch.cuda.set_sync_debug_mode('error')
    def lenient(*args):
        torch.cuda.set_sync_debug_mode('default')
        tell(*args)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Steps, 'start', strict)
        m.setattr(FastEpoch, '_tell', lenient)
        learn.fit(2)
    assert learn.fast_epoch.engine == 'graph' and history(learn).valid_accuracy.iloc[-1] > 0.9


@pytest.mark.cuda
def test_random_numbers_differ_from_replay_to_replay():
    learn = make('cuda', model=partial(Block3, drop=0.5), n_train=64, lr=1e-9)
    learn.fit(6)
    assert np.ptp([float(o) for o in learn.recorder.losses]) > 1e-3, 'the same dropout in each replay'


@pytest.mark.cuda
def test_trains_and_predicts_on_a_gpu():
    learn = block3_learner(mnist_dls(n_train=6400))
    learn.remove_cb(ProgressCallback)
    learn.fit(2)
    assert learn.fast_epoch.engine == 'graph' and learn.dls.device.type == 'cuda'
    assert next(learn.model.parameters()).is_cuda and learn.dls.train_ds.items.images.is_cuda
    assert history(learn).valid_accuracy.iloc[-1] > 0.9
    assert learn.predict(learn.dls.valid_ds.items[0][0])[0] == '7'
