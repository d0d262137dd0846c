"The fast path against fastai's own loop, on a CPU, and with `pytest -m cuda` on a GPU"
import copy, itertools, time
from functools import partial
import fastai.callback.progress, numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from fastai.callback.core import _inner_loop
from fastprogress.fastprogress import ConsoleMasterBar, NBMasterBar
from mnist_block3.all import (
    accuracy, ActivationStats, Block3, block3_learner, BnFreeze, Callback, CancelTrainException,
    CancelValidException, ChannelsLast, CropRotate, CrossEntropyLossFlat, CSVLogger, DataLoaders,
    EarlyStoppingCallback, error_rate, F1Score, FastEpoch, GradientClip, history,
    LabelSmoothingCrossEntropyFlat, MCDropoutCallback, MixedPrecision, MixUp, mnist_dls, NLLLossFlat, noop,
    OptimWrapper, ParamScheduler, Perplexity, ProgressCallback, RandTransform, Recorder, SaveModelCallback,
    SchedCos, SchedLin, set_seed, SGD, ShortEpochCallback, TensorImage)
from mnist_block3.fast import why_plain
from mnist_block3.steps import Steps

on_cuda = partial(pytest.param, marks=pytest.mark.cuda)

@pytest.fixture(params=['cpu', on_cuda('cuda')])
def device(request): return request.param

@pytest.fixture(autouse=True)
def small_mnist(mnist, monkeypatch):
    "Few digits, which no test has to read again"
    digits = mnist[0][:6400], mnist[1][:200]
    monkeypatch.setattr('mnist_block3.data.load_digits', lambda source=None: digits)

def test_show_batch_unique_leaves_the_fast_path():
    "One image under several random transforms, before a fit"
    dls = mnist_dls(n_train=640, device='cpu')
    dls.show_batch(unique=True)
    images,labels,_ = dls.show_batch(unique=True, show=False)
    assert labels.unique().numel() == 1 and not torch.equal(images[0], images[1])
    assert sorted(itertools.islice(dls.train.get_idxs(), 641)) == list(range(640)) # fastai's had no end
    learn = block3_learner(dls)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.fast_epoch.why is None

class Double(nn.Module):
    def forward(self, x): return x.double()
def model64(): return nn.Sequential(Double(), Block3(drop=0.).double())

def make(device='cpu', fast=True, data={}, dls=mnist_dls, model=model64, cbs=None, seed=0, logger=noop, **kwargs):
    "A learner whose weights and order of images follow from `seed`; its rates are exact in float32"
    set_seed(seed)
    model = model()
    dls = dls(**dict(valid='reference', n_train=40, bs=16, aug_tfms=[], device=device) | data)
    learn = block3_learner(dls, model, cbs=cbs and cbs(), **dict(lr=1/64, mom=0.75) | kwargs)
    learn.remove_cb(ProgressCallback)
    learn.fast_epoch.on = fast
    learn.logger = logger
    return learn

def weights(learn): return copy.deepcopy(learn.model).cpu()
def diff(a, b): return max((p-q).abs().max() for p,q in zip(a.state_dict().values(), b.state_dict().values()))

def train_both(device='cpu', fit=lambda learn: learn.fit(2), want='fast', **kwargs):
    "Train with and without the fast path: the result is the same, and the first takes the path `want`"
    ours = make(device, **kwargs)
    plain = make(device, fast=False, **kwargs)
    start = weights(ours)
    for learn in (ours, plain):
        set_seed(1)
        fit(learn)
    fast = ('kernels', 'eager') if device == 'cpu' else ('graph',)
    assert ours.fast_epoch.engine in (fast if want == 'fast' else (want,)), ours.fast_epoch.why
    assert plain.fast_epoch.engine == 'plain'
    rounded = device == 'cuda' # scheduled rates become float32 there
    assert diff(weights(ours), weights(plain)) < (1e-6 if rounded else 1e-9)
    assert diff(weights(ours), start) > 1e-4, 'nothing was trained'
    a,b = recorded(ours),recorded(plain)
    assert list(a) == list(b)
    for k in a: np.testing.assert_allclose(a[k], b[k], rtol=1e-5, atol=1e-9, err_msg=k)

def recorded(learn):
    rec = learn.recorder
    steps = dict(iters=rec.iters, lrs=rec.lrs, losses=[float(loss) for loss in rec.losses])
    counters = [learn.epoch, learn.iter, learn.train_iter, learn.pct_train]
    hypers = [h.get(k, 0) for h in learn.opt.hypers for k in ('lr', 'mom', 'wd')]
    table = history(learn).drop(columns='seconds').astype(float).add_prefix('epoch_')
    return dict(counters=counters, hypers=hypers) | steps | rec.hps | dict(table)


def tuned(learn): learn.fit_tuned(2, aug=0.)
def schedulers(learn): learn.fit_one_cycle(2, 1/8); learn.fit_flat_cos(1, 1/64); learn.fit(1)
def two_rates(learn): learn.fit(2, lr=slice(1/256, 1/64))
def frozen(learn): learn.freeze(); learn.fit(1); learn.unfreeze(); learn.fit(1)
def loaded(learn): learn.fit(1); learn.save('a'); learn.fit(1); learn.load('a'); learn.fit(1)
def exported(learn): learn.fit(1); learn.export('a.pkl'); learn.fit(1)
def new_optimizer(learn): learn.fit(1); learn.fit(1, reset_opt=True)
def late_start(learn): learn.fit(3, start_epoch=1)
def stopped_early(learn): learn.fit(3, cbs=EarlyStoppingCallback(min_delta=100.))
def found_rate(learn): learn.lr_find(num_it=5, show_plot=False); learn.fit(1)
def channels_last(learn): learn.fit(1); learn.add_cb(ChannelsLast()); learn.fit(1)
def named_device(learn): learn.fit(1); learn.dls.to(learn.dls.device.type); learn.fit(1)
def evaluated(learn): learn.fit(1); learn.predict(learn.dls.train_ds[0][0]); learn.fit(1); learn.validate()
def shown(learn): learn.fast_epoch.bar_seconds = 0.; learn.add_cb(ProgressCallback()); learn.fit_one_cycle(2)

class Spread(nn.CrossEntropyLoss):
    "Keeps a running figure, in training and in evaluation"
    def __init__(self):
        super().__init__()
        self.register_buffer('std', torch.ones(()))
    def forward(self, pred, targ):
        self.std.mul_(0.9).add_(0.1*pred.detach().std())
        return super().forward(pred*self.std, targ)
def running_loss(learn): learn.loss_func.func = Spread(); learn.fit(2)

@pytest.mark.parametrize('fit', [
    tuned, schedulers, two_rates, frozen, loaded, exported, new_optimizer, late_start, stopped_early,
    found_rate, channels_last, named_device, evaluated, shown, running_loss])
def test_fits(device, tmp_path, fit):
    def two_groups(model):
        params = list(model.parameters())
        return [params[:4], params[4:]]
    train_both(device, fit, splitter=two_groups, path=tmp_path)

def test_fifty_steps_equal_plain_pytorch(device):
    learn = make(device, data=dict(n_train=396, bs=8))
    learn.dls.train.shuffle = False
    model = weights(learn).train()
    learn.fit(1)
    assert learn.fast_epoch.engine != 'plain' and len(learn.recorder.losses) == 50
    opt = torch.optim.SGD(model.parameters(), lr=1/64, momentum=0.75)
    digits = learn.dls.train_ds.items.to('cpu')
    for images,labels in zip(digits.images.split(8), digits.labels.split(8)):
        opt.zero_grad()
        F.nll_loss(model((images[:,None].float()/255 - 0.1307)/0.3081), labels.long()).backward()
        opt.step()
    assert diff(weights(learn), model) < 1e-9

def test_a_step_in_float32_and_in_bfloat16(device, monkeypatch):
    "The paths agree as far as rounding lets them, and bfloat16 is not float32"
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    def step(fast, bf16=False):
        learn = make(device, fast, dict(n_train=16), model=partial(Block3, drop=0.), lr=1.)
        if bf16: learn.to_bf16()
        start = nn.utils.parameters_to_vector(weights(learn).parameters())
        learn.fit(1)
        assert (learn.fast_epoch.engine != 'plain') == fast
        end = nn.utils.parameters_to_vector(weights(learn).parameters())
        assert end.dtype == torch.float32
        return end - start, learn.recorder.losses[0].item()
    ours,loss = step(fast=True)
    plain,_ = step(fast=False)
    assert (ours - plain).norm() < 1e-3*plain.norm()
    _,loss16 = step(fast=True, bf16=True)
    _,plain16 = step(fast=False, bf16=True)
    assert loss16 == pytest.approx(plain16, rel=2e-3)
    assert loss16 != loss and loss16 == pytest.approx(loss, rel=2e-2)

@pytest.mark.slow
@pytest.mark.parametrize('fit', [lambda learn: learn.fit(1, lr=0.1), lambda learn: learn.fit_tuned(1)])
def test_with_everything_on_accuracy_is_the_same_in_distribution(device, fit):
    "With augmentation and dropout the two paths draw different random numbers"
    def accuracies(fast):
        data = dict(n_train=2560, bs=64, aug_tfms=[CropRotate()])
        learns = [make(device, fast, data, model=Block3, seed=seed) for seed in range(10)]
        for learn in learns: fit(learn)
        assert {learn.fast_epoch.engine != 'plain' for learn in learns} == {fast}
        return np.array([history(learn).valid_accuracy.iloc[-1] for learn in learns])
    ours = accuracies(True)
    plain = accuracies(False)
    assert ours.min() > 0.5 and not np.array_equal(ours, plain)
    assert abs(ours.mean() - plain.mean()) < 3*np.sqrt(ours.var(ddof=1)/10 + plain.var(ddof=1)/10)


class SkipsParts(Callback):
    def before_validate(self):
        if self.epoch == 0: raise CancelValidException
    def before_train(self):
        if self.epoch == 1: raise CancelTrainException

class LateRate(Callback):
    order = 70 # after `FastEpoch`
    def before_train(self): self.opt.set_hyper('lr', 1/128)

class JudgesAnother(Callback):
    "Has another model evaluated, as a mean of weights would be"
    order = 0
    def before_validate(self):
        self.trained = self.learn.model
        self.learn.model = copy.deepcopy(self.trained)
        for p in self.learn.model.parameters(): p.data *= 0.9
    def after_validate(self): self.learn.model = self.trained

@pytest.mark.filterwarnings('ignore:You are shadowing') # `ActivationStats` does
@pytest.mark.parametrize('cbs,want', [
    (partial(SaveModelCallback, every_epoch=True, with_opt=True), 'fast'), (BnFreeze, 'fast'),
    (MCDropoutCallback, 'fast'), (SkipsParts, 'fast'), (JudgesAnother, 'fast'), (LateRate, 'plain'),
    (partial(ParamScheduler, {'lr': SchedCos(0.1, 0.01), 'mom': SchedLin(0.5, 0.9)}), 'fast'),
    (partial(ParamScheduler, {'wd': SchedLin(0., 0.1)}), 'plain'), (ActivationStats, 'plain'),
    (partial(ShortEpochCallback, 0.5), 'plain'), (partial(MixedPrecision, 'fp16'), 'plain'),
    (partial(Recorder, train_metrics=True), 'plain'), (MixUp, 'plain'),
], ids=lambda value: getattr(getattr(value, 'func', value), '__name__', value))
def test_callbacks(device, tmp_path, cbs, want): train_both(device, want=want, cbs=cbs, path=tmp_path)

def test_a_callback_of_any_batch_event_takes_fastais_loop():
    learn = make()
    learn.create_opt()
    for event in _inner_loop:
        with learn.added_cbs(Callback(**{event: noop})):
            assert why_plain(learn, learn.fast_epoch) == f'Callback listens to {event}'

def torch_opt(opt, **kwargs): return dict(opt_func=partial(OptimWrapper, opt=opt, **kwargs))
def worst(pred, targ): return F.nll_loss(pred, targ, reduction='none').max().float()

@pytest.mark.parametrize('kwargs,want', [
    (torch_opt(torch.optim.SGD, momentum=0.9, weight_decay=1e-2, nesterov=True), 'fast'),
    (torch_opt(torch.optim.SGD, momentum=0.9, dampening=0.5), 'plain'), (dict(mom=0), 'fast'),
    (torch_opt(torch.optim.AdamW), 'plain'), (dict(opt_func=partial(SGD, mom=0.9)), 'plain'),
    (dict(loss_func=LabelSmoothingCrossEntropyFlat()), 'fast'),
    (dict(loss_func=NLLLossFlat(weight=torch.arange(1., 11.))), 'fast'),
    (dict(loss_func=NLLLossFlat(reduction='sum'), lr=2**-12), 'plain'),
    (dict(loss_func=lambda pred,targ: F.nll_loss(pred, targ).float()), 'plain'),
    (dict(metrics=[accuracy, error_rate, F1Score(average='macro'), worst]), 'fast'),
    (dict(metrics=[]), 'fast'), (dict(metrics=Perplexity()), 'plain'),
])
def test_optimizers_losses_and_metrics(device, kwargs, want): train_both(device, want=want, **kwargs)

def linear(): return nn.Sequential(Double(), nn.Flatten(), nn.Linear(784, 10), nn.LogSoftmax(1)).double()

def hooked(kind):
    model = linear()
    if kind == 'module': model[2].register_forward_hook(lambda module, args, out: out*2)
    else: model[2].weight.register_hook(lambda grad: grad*2)
    return model

class Counting(nn.Sequential):
    "Changes itself in Python, and asks NumPy for random numbers, which a captured graph would do once"
    n_calls = 0
    def forward(self, x):
        self.n_calls += 1
        return super().forward(x*np.random.uniform(0.9, 1.1) + 0.1*self.n_calls)
def counting(): return Counting(linear())

class CountingInPlace(nn.Sequential):
    "Counts its steps in a tensor that is no buffer"
    def forward(self, x):
        if self.training: self.n_calls += 1
        return super().forward(x + 0.1*self.n_calls)
def counting_in_place():
    model = CountingInPlace(linear())
    model.n_calls = torch.zeros(())
    return model

@pytest.mark.parametrize('device,model,want', [
    ('cpu', linear, 'fast'), on_cuda('cuda', linear, 'fast'), ('cpu', counting, 'fast'),
    on_cuda('cuda', counting, 'plain'), ('cpu', counting_in_place, 'fast'),
    on_cuda('cuda', counting_in_place, 'plain'), ('cpu', partial(hooked, 'module'), 'plain'),
    ('cpu', partial(hooked, 'gradient'), 'plain'),
])
def test_models(device, model, want): train_both(device, want=want, model=model)

class Dim(RandTransform): # has no `augment`
    def encodes(self, x:TensorImage): return x*0.5

class KnownDim(Dim):
    def augment(self, x): return x*0.5

class OtherCropRotate(CropRotate): # no longer does what `augment` does
    def encodes(self, x:TensorImage): return x*0.5

def drop_last_dls(**data):
    dls = mnist_dls(**data)
    return DataLoaders(dls.train.new(drop_last=True), dls.valid, device=dls.device)

def torch_dls(device, **data):
    digits = mnist_dls(device='cpu', **data).train_ds.items
    dl = DataLoader(TensorDataset(digits.images[:,None]/255, digits.labels.long()), 16)
    return DataLoaders(dl, dl, device=device)

@pytest.mark.parametrize('dls,data,want', [
    (mnist_dls, dict(bs=20), 'fast'), (mnist_dls, dict(bs=64), 'fast'), (drop_last_dls, {}, 'fast'),
    (mnist_dls, dict(valid='test'), 'fast'), (torch_dls, {}, 'plain'),
    (mnist_dls, dict(aug_tfms=[KnownDim()]), 'fast'), (mnist_dls, dict(aug_tfms=[KnownDim(p=0.5)]), 'plain'),
    (mnist_dls, dict(aug_tfms=[Dim()]), 'plain'), (mnist_dls, dict(aug_tfms=[OtherCropRotate()]), 'plain'),
    (mnist_dls, dict(item_tfms=Dim(p=1.), n_train=16), 'plain'),
])
def test_loaders(device, dls, data, want): train_both(device, want=want, dls=dls, data=data)


def wd(cb): cb.opt.set_hyper('wd', 0.1*cb.epoch)
def mom(cb): cb.opt.set_hyper('mom', 0.5*cb.epoch)
def state(cb): cb.opt.clear_state()
def smoothing(cb): cb.loss_func.func.label_smoothing = 0.1*cb.epoch
def angle(cb): cb.dls.train.after_batch.fs[1].draw = 5.*cb.epoch
def batch_size(cb): cb.dls.train.bs = 16 + 4*cb.epoch

@pytest.mark.parametrize('change', [wd, mom, state, smoothing, angle, batch_size])
def test_a_change_between_epochs(device, change):
    rotated = dict(aug_tfms=[CropRotate(p=0, draw=1.)])
    cbs = partial(Callback, before_epoch=change)
    train_both(device, data=rotated, loss_func=CrossEntropyLossFlat(), cbs=cbs)

def test_steps_are_prepared_once_a_fit(monkeypatch):
    prepared = []
    monkeypatch.setattr(Steps, 'prepare', lambda steps: prepared.append(steps))
    learn = make(step_size=1)
    learn.fit(3)
    learn.fit_one_cycle(3)
    assert len(prepared) == 2 and learn.fast_epoch.steps is None

class CountOps(TorchDispatchMode):
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))

@pytest.fixture
def instant(monkeypatch):
    "Steps and predictions take no time: what remains of an epoch is what a GPU would wait for"
    def predict(cb, dl, idxs): return torch.zeros(len(idxs), 10), torch.zeros(len(idxs), dtype=torch.long)
    monkeypatch.setattr(Steps, '__call__', lambda steps, i: None)
    monkeypatch.setattr(FastEpoch, '_predict', predict)

both_recipes = pytest.mark.parametrize('fit', [
    lambda learn, n: learn.fit(n), lambda learn, n: learn.fit_tuned(n, precise_bn=False)], ids=['fit', 'fit_tuned'])

@both_recipes
def test_between_two_epochs_no_operation_is_done_step_by_step(instant, fit):
    def n_ops(n_train):
        learn = make(data=dict(valid='test', n_train=n_train))
        with CountOps() as count: fit(learn, 3)
        assert learn.fast_epoch.engine == 'kernels' and len(learn.recorder.losses) == 3*n_train//16
        return count.n
    assert n_ops(320) == n_ops(3200)

@pytest.mark.slow
@both_recipes
def test_between_two_epochs_the_host_is_soon_done(instant, monkeypatch, mnist, fit):
    "In 4.6 to 4.9 ms of CPU time; before the schedule and the order of images were cheap, in 13 and 48 ms"
    monkeypatch.setattr('mnist_block3.data.load_digits', lambda source=None: mnist)
    ended = []
    cb = partial(Callback, after_epoch=lambda cb: ended.append(time.thread_time()))
    fit(make(data=dict(valid='test', n_train=None, bs=64), model=Block3, cbs=cb), 30)
    assert np.diff(ended).min() < 0.008

def test_an_exception_leaves_nothing_stale(device, tmp_path):
    def boom(cb): raise ValueError('boom')
    def fit(learn):
        with pytest.raises(ValueError, match='boom'): learn.fit(2, cbs=Callback(after_epoch=boom))
        learn.export('boom.pkl')
        assert (tmp_path/'boom.pkl').stat().st_size < 1_000_000
        for p in learn.model.parameters(): p.data = p.data*0.9 # in other memory than a stale graph would read
        learn.fit(1)
    train_both(device, fit, path=tmp_path)


def reasons(said):
    start = "Taking fastai's own training loop: "
    return [line.removeprefix(start) for line in said.splitlines() if line.startswith(start)]

class Moody(nn.Sequential):
    "Fails when it is tried at first, when its graph is drawn and when a step is tried, and never again"
    calls = itertools.count()
    def forward(self, x): return super().forward(x) if next(self.calls) > 2 else 1/0

@pytest.mark.parametrize('kwargs,reason', [
    (dict(model=lambda: Moody(linear())), 'ZeroDivisionError: division by zero'),
    (dict(dls=drop_last_dls, data=dict(n_train=10)), 'there are no batches'),
])
def test_what_stands_in_the_way_is_said(capsys, kwargs, reason):
    learn = make(logger=print, **kwargs)
    learn.fit(1)
    assert learn.fast_epoch.engine == 'plain'
    assert reasons(capsys.readouterr().out) == [reason]

def test_without_a_compiler_pytorch_takes_the_steps(monkeypatch, capsys):
    monkeypatch.setattr('mnist_block3.fast.why_no_kernels', lambda: 'there is no C++ compiler')
    learn = make(logger=print)
    learn.fit(2)
    assert learn.fast_epoch.engine == 'eager'
    assert capsys.readouterr().out.count('The kernels for this CPU cannot be used: there is no C++ compiler') == 1

class NotebookBar(NBMasterBar):
    "Shows its table in place of any text that it was given before; there is nowhere to draw here"
    def on_iter_begin(self): pass
    show = on_iter_begin
    def write(self, line, table=False): assert table, line

@pytest.mark.parametrize('bar', [None, ConsoleMasterBar, NotebookBar])
def test_the_reason_is_said_once(tmp_path, monkeypatch, capsys, bar):
    "With each progress bar, and it is no row of a CSV log"
    learn = make(logger=print, path=tmp_path)
    monkeypatch.setattr(fastai.callback.progress, 'master_bar', bar)
    if bar: learn.add_cb(ProgressCallback())
    learn.fit(2, cbs=[GradientClip(), CSVLogger()])
    assert reasons(capsys.readouterr().out) == ['GradientClip listens to before_step']
    assert len((tmp_path/'history.csv').read_text().splitlines()) == 3


@pytest.mark.cuda
def test_nothing_waits_for_the_device(monkeypatch):
    "In the steps of a learner as it is by default, which then predicts"
    step = Steps.__call__
    def strict(*args):
        torch.cuda.set_sync_debug_mode('error')
        step(*args)
        torch.cuda.set_sync_debug_mode('default')
    monkeypatch.setattr(Steps, '__call__', strict)
    learn = block3_learner(mnist_dls(n_train=6400))
    learn.remove_cb(ProgressCallback)
    learn.fit(2)
    assert learn.fast_epoch.engine == 'graph' and learn.dls.device.type == 'cuda'
    assert next(learn.model.parameters()).is_cuda and learn.dls.train_ds.items.images.is_cuda
    assert history(learn).valid_accuracy.iloc[-1] > 0.9
    assert learn.predict(learn.dls.valid_ds.items[0][0])[0] == '7'

@pytest.mark.cuda
def test_random_numbers_differ_from_replay_to_replay():
    learn = make('cuda', model=partial(Block3, drop=0.5), data=dict(n_train=16), lr=1e-9)
    learn.fit(6)
    assert np.ptp([float(loss) for loss in learn.recorder.losses]) > 1e-3, 'the same dropout in each replay'
