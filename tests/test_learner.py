"The schedule against a plain PyTorch loop in float64, and the learner among fastai's own methods"
import copy
from functools import partial
import matplotlib.pyplot as plt, pytest, torch, torch.nn.functional as F
from sklearn.metrics import confusion_matrix
from torch.utils.data import DataLoader as TorchDL, TensorDataset
from fastai.callback.training import GradientClip
from fastai.data.load import DataLoader as FastaiDL
from mnist_block3.all import (Adam, block3_learner, Block3, Callback, ClassificationInterpretation, CSVLogger, CutMix, DataLoaders,
                              EarlyStoppingCallback, ForFit, history, Learner, load_learner, MixUp, mnist_dls, NLLLossFlat, noop, OptimWrapper,
                              ParamScheduler, PreciseBN, ProgressCallback, SaveModelCallback, SchedLin, set_seed, SetDropout, SetSGD, TrainTfms)


@pytest.fixture
def batches(mnist):
    x,y = mnist[0].images[:96],mnist[0].labels[:96].long()
    return TorchDL(TensorDataset(((x/255 - 0.1307)/0.3081)[:,None].double(), y), batch_size=32)


@pytest.fixture
def dls64(batches): return DataLoaders(batches, batches)


def model64(): return Block3(drop=0.).double()


def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def torch_fit(model, batches, epochs, lr=0.02, mom=0.8, step_size=15, gamma=0.1):
    "The loop that everyone knows"
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=mom)
    sched = torch.optim.lr_scheduler.StepLR(opt, step_size, gamma)
    for _ in range(epochs):
        for xb,yb in batches:
            opt.zero_grad()
            F.nll_loss(model(xb), yb).backward()
            opt.step()
        sched.step()


def diff(a, b): return max((p-q).abs().max().item() for p,q in zip(a.state_dict().values(), b.state_dict().values()))


def test_sixteen_epochs_equal_a_plain_loop(batches, dls64):
    model = model64()
    twin,start = copy.deepcopy(model),copy.deepcopy(model)
    learn = quiet(block3_learner(dls64, model))
    learn.fit(16)
    torch_fit(twin.train(), batches, 16)
    assert diff(model, twin) < 1e-9 < diff(model, start)
    assert learn.recorder.hps['lr'] == pytest.approx([0.02]*45 + [0.002]*3)
    learn.recorder.plot_sched()
    assert plt.gca().lines[0].get_ydata() == pytest.approx([0.02]*45 + [0.002]*3)
    learn.fit(1)
    assert learn.recorder.hps['lr'] == pytest.approx([0.02]*3)


def test_other_rates_and_steps(batches, dls64):
    model = model64()
    twin = copy.deepcopy(model)
    quiet(block3_learner(dls64, model, lr=0.01, mom=0.9, step_size=2, gamma=0.5)).fit(5)
    torch_fit(twin.train(), batches, 5, 0.01, 0.9, 2, 0.5)
    assert diff(model, twin) < 1e-9


def test_starting_later_continues_the_schedule(dls64):
    learn = quiet(block3_learner(dls64, model64(), step_size=2))
    learn.fit(5, start_epoch=3)
    assert learn.recorder.hps['lr'] == pytest.approx([0.002]*3 + [0.0002]*3)


def test_step_decay_leaves_schedulers_alone(dls64):
    model = model64()
    twin = copy.deepcopy(model)
    learn = quiet(block3_learner(dls64, model, step_size=1))
    plain = quiet(Learner(dls64, twin, loss_func=NLLLossFlat(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.8)))
    for o in (learn, plain): o.fit_one_cycle(3, 0.1)
    assert diff(model, twin) < 1e-12
    assert learn.recorder.hps == plain.recorder.hps


def test_step_decay_gets_along_with_others(dls64):
    learn = quiet(block3_learner(dls64, model64(), step_size=1))
    learn.fit(2, cbs=ParamScheduler({'mom': SchedLin(0.9, 0.5)})) # of momentum alone: the rate steps on
    assert learn.recorder.lrs == pytest.approx([0.02]*3 + [0.002]*3)
    assert learn.opt.hypers[0]['mom'] == 0.8
    class Halve(Callback):
        def after_epoch(self): self.opt.set_hyper('lr', self.opt.hypers[-1]['lr']/2)
    learn = quiet(block3_learner(dls64, model64(), step_size=2))
    learn.fit(3, cbs=Halve)
    assert learn.recorder.lrs == pytest.approx([0.02]*3 + [0.01]*3 + [0.0005]*3)


def test_a_plain_fit_is_the_schedule_whatever_came_before(batches, dls64):
    model = model64()
    learn = quiet(block3_learner(dls64, model))
    learn.fit_one_cycle(1, 0.1)
    learn.fit(1, lr=0.01)
    assert learn.recorder.lrs == [0.01]*3
    learn.opt.clear_state()
    twin = copy.deepcopy(model)
    learn.fit(2)
    torch_fit(twin.train(), batches, 2)
    assert diff(model, twin) < 1e-9


@pytest.mark.parametrize('cb', [partial(EarlyStoppingCallback, monitor='accuracy'), partial(SaveModelCallback, monitor='accuracy'), MixUp, CutMix,
                                GradientClip, CSVLogger])
def test_stock_callbacks(small_dls, tmp_path, cb):
    learn = quiet(block3_learner(small_dls, cbs=cb(), path=tmp_path))
    learn.fit(2)
    assert len(history(learn)) == 2 and history(learn).train_loss.notna().all()


def test_history_is_of_the_last_fit(dls64):
    learn = quiet(block3_learner(dls64, model64(), step_size=1))
    for fit,epochs in ((dict(n_epoch=3), [1,2,3]), (dict(n_epoch=1), [1]), (dict(n_epoch=3, start_epoch=1), [1,2,3]), (dict(n_epoch=5, start_epoch=4), [5])):
        learn.fit(**fit)
        learn.validate()
        assert history(learn).epoch.tolist() == epochs
    assert history(learn).lr.tolist() == pytest.approx([0.02*0.1**4])
    with pytest.raises(ValueError, match='make it with block3_learner'): history(Learner(dls64, model64(), loss_func=NLLLossFlat()))


def test_lr_find_is_not_disturbed(dls64, tmp_path):
    learn = quiet(block3_learner(dls64, model64(), path=tmp_path))
    learn.fit(1)
    before,rows = copy.deepcopy(learn.model),history(learn)
    learn.lr_find(num_it=20, show_plot=False)
    assert len(set(learn.recorder.lrs)) > 10
    assert diff(learn.model, before) == 0
    assert history(learn).equals(rows)


def test_loss_is_torchs(dls64):
    logp,targ = torch.randn(16, 10).log_softmax(1),torch.randint(0, 10, (16,))
    loss = NLLLossFlat()
    assert torch.equal(loss(logp, targ), F.nll_loss(logp, targ))
    loss.reduction = 'none'
    assert torch.equal(loss(logp, targ), F.nll_loss(logp, targ, reduction='none'))


def test_history_counts_what_get_preds_counts(small_dls):
    learn = quiet(block3_learner(mnist_dls(n_train=640, device='cpu')))
    learn.fit(2)
    h = history(learn)
    probs,targs = learn.get_preds()
    assert len(history(learn)) == 2
    correct = int((probs.argmax(1) == targs).sum())
    assert (h.correct.iloc[-1], h.total.iloc[-1]) == (correct, 10_000)
    assert h.valid_accuracy.iloc[-1] == pytest.approx(correct/10_000)
    assert h.valid_loss.iloc[-1] == pytest.approx(F.nll_loss(probs.log(), targs).item(), rel=1e-3)
    assert list(h.epoch) == [1, 2] and (h.seconds > 0).all()


def test_training_accuracy_is_over_the_whole_epoch(dls64):
    seen = []
    class Count(Callback):
        order = 40
        def after_batch(self):
            if self.training: seen.append((self.pred.argmax(1) == self.y).float())
    learn = quiet(block3_learner(dls64, model64(), cbs=Count))
    learn.fit(1)
    assert history(learn).train_accuracy[0] == pytest.approx(torch.cat(seen).mean().item())


def test_predict_and_get_preds(trained, mnist):
    image = trained.dls.train_ds.items[5][0]
    label,idx,probs = trained.predict(image)
    x = (image[None,None]/255 - 0.1307)/0.3081
    with torch.no_grad(): want = trained.model.eval()(x)[0].exp()
    torch.testing.assert_close(probs, want, atol=1e-5, rtol=1e-4)
    assert label == str(int(idx)) == str(int(want.argmax()))
    for bad in (torch.zeros(28,28), torch.zeros(3,28,28, dtype=torch.uint8), torch.zeros(32,32, dtype=torch.uint8), 7):
        with pytest.raises(ValueError, match='Expected a picture, or 28×28 bytes'): trained.predict(bad)


def test_save_load_export(trained, mnist, tmp_path):
    trained.path = tmp_path
    trained.save('weights')
    want = trained.predict(mnist[1].images[0])[2]
    for p in trained.model.parameters(): p.data.zero_()
    trained.load('weights')
    assert torch.equal(trained.predict(mnist[1].images[0])[2], want)
    full = quiet(block3_learner(mnist_dls(device='cpu'), trained.model, path=tmp_path))
    full.export('learn.pkl')
    assert (tmp_path/'learn.pkl').stat().st_size < 1_000_000
    back = quiet(load_learner(tmp_path/'learn.pkl'))
    assert torch.equal(back.predict(mnist[1].images[0])[2], want)
    full.fit(0) # the learner goes on after it was exported


def test_interpretation_and_show_results(trained):
    interp = ClassificationInterpretation.from_learner(trained)
    probs,targs = trained.get_preds()
    # the reference protocol draws its evaluation images anew, so the matrix is compared on the counts of the truth
    assert (interp.confusion_matrix().sum(1) == confusion_matrix(targs, probs.argmax(1), labels=range(10)).sum(1)).all()
    interp.plot_confusion_matrix()
    interp.plot_top_losses(4, cmap='gray')
    assert 'Prediction/Actual' in plt.gcf()._suptitle.get_text()
    trained.show_results(max_n=4)
    titles = [ax.get_title() for ax in plt.gcf().axes]
    assert sum('\n' in o for o in titles) == 4
    plt.close('all')


@pytest.mark.parametrize('kwargs', [dict(lr=0), dict(lr=-1), dict(lr=slice(0.1, -1)), dict(lr=float('inf')), dict(lr='a'), dict(lr=[0.1, 0.2]), dict(gamma=0), dict(mom=1), dict(mom=-0.1), dict(step_size=0), dict(step_size=1.5)])
def test_bad_settings(small_dls, kwargs):
    with pytest.raises(ValueError, match=f'^{next(iter(kwargs))}='): block3_learner(small_dls, **kwargs)


def torch_fit_tuned(model, batches, epochs, lr=0.1, mom=0.9, pct_start=0.2, **kwargs):
    "The tuned recipe without augmentation, in plain PyTorch"
    n = epochs*len(batches)
    up_down = lambda i: i/n/pct_start if i/n <= pct_start else (1 - i/n)/(1 - pct_start)
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=mom, **kwargs)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, up_down)
    for _ in range(epochs):
        for xb,yb in batches:
            opt.zero_grad()
            F.nll_loss(model(xb), yb).backward()
            opt.step()
            sched.step()
    torch.optim.swa_utils.update_bn(batches, model)


@pytest.mark.parametrize('ours,theirs', [({}, {}), (dict(wd=1e-2, nesterov=True), dict(weight_decay=1e-2, nesterov=True))])
def test_the_tuned_recipe_equals_a_plain_loop(batches, dls64, ours, theirs):
    model = Block3(drop=0.3).double()
    twin,start = Block3(drop=0.).double(),copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    quiet(block3_learner(dls64, model)).fit_tuned(5, aug=0., **ours)
    torch_fit_tuned(twin.train(), batches, 5, **theirs)
    assert diff(model, twin) < 1e-5 < diff(model, start), 'fastai computes the rate in float32'


@pytest.mark.parametrize('drop', [0., 0.3])
def test_precise_statistics_are_those_of_the_images_as_they_are(mnist, drop):
    learns = []
    for on in (True, False):
        set_seed(0)
        learns.append(quiet(block3_learner(mnist_dls(n_train=200, valid='reference', device='cpu'))))
        learns[-1].fit_tuned(2, precise_bn=on, drop=drop)
    ours,running = (o.model for o in learns)
    twin = Block3(drop=0.)
    twin.load_state_dict(running.state_dict())
    torch.optim.swa_utils.update_bn(((mnist[0].images[:200,None]/255 - 0.1307)/0.3081).split(64), twin)
    assert diff(ours, twin) < 1e-5 < diff(ours, running)
    assert {m.momentum for m in ours.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}
    assert {m.p for m in ours.modules() if isinstance(m, torch.nn.Dropout2d)} == {0.01}


def test_precise_statistics_with_a_loader_of_fastai_that_has_no_pipelines(batches):
    data = [(x,y) for xb,yb in batches for x,y in zip(xb, yb)]
    dl = FastaiDL(data, bs=32)
    model = model64()
    quiet(block3_learner(DataLoaders(dl, dl), model)).fit_tuned(1, aug=0.)
    twin = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, twin)
    assert diff(model, twin) < 1e-9


def test_precise_statistics_are_whole_or_not_there():
    "And they are taken once, after the last epoch"
    learn,taken = quiet(block3_learner(mnist_dls(n_train=128, valid='reference', device='cpu'))),[]
    class Breaks(PreciseBN):
        def after_train(self):
            before = copy.deepcopy(self.model)
            hook = None
            if self.epoch + 1 == self.n_epoch: hook = self.model.avg_pool.register_forward_hook(lambda *_: 1/0)
            try: super().after_train()
            finally:
                if hook: hook.remove()
                taken.append((self.epoch, diff(self.model, before)))
    with pytest.raises(ZeroDivisionError): learn.fit(2, cbs=Breaks())
    assert taken == [(0, 0.), (1, 0.)]


def state(learn):
    "All that `fit_tuned` sets for its length"
    sgd = [(o['momentum'], o['weight_decay'], o['nesterov']) for o in learn.opt.opt.param_groups]
    return sgd,[m.p for m in learn.model.modules() if isinstance(m, torch.nn.Dropout2d)],list(learn.dls.train.after_batch.fs)


class Seen(Callback):
    "What `state` is in training; raises `error` in the second batch"
    def __init__(self, error=None): self.error = error
    def after_batch(self):
        self.learn.in_training = state(self.learn)
        if self.error and self.training and self.iter: raise self.error


@pytest.mark.parametrize('error', [None, ZeroDivisionError('x'), KeyboardInterrupt()], ids=str)
def test_the_tuned_recipe_puts_everything_back(error):
    learn = quiet(block3_learner(mnist_dls(n_train=128, valid='reference', device='cpu')))
    learn.create_opt()
    before = state(learn)
    if error:
        with pytest.raises(type(error)): learn.fit_tuned(1, wd=1e-4, nesterov=True, cbs=Seen(error))
    else: learn.fit_tuned(1, wd=1e-4, nesterov=True, cbs=Seen())
    sgd,drops,tfms = learn.in_training
    assert sgd == [(0.9, 1e-4, True)] and set(drops) == {0.} and [type(o).__name__ for o in tfms] == ['IntToFloatTensor', 'Distort', 'Normalize']
    assert state(learn) == before and before[0] == [(0.8, 0, False)]
    assert not any(isinstance(o, ForFit) for o in learn.cbs)
    learn.fit(1)
    assert learn.recorder.lrs == [0.02]*2


@pytest.mark.parametrize('mistake', [dict(lr=0.), dict(mom=1.), dict(wd=-1.), dict(pct_start=1.), dict(drop=1.), dict(aug=-1.), dict(elastic=float('nan'))])
def test_a_mistake_in_the_tuned_recipe(dls64, mistake):
    name, = mistake
    with pytest.raises(ValueError, match=f'^{name}='): block3_learner(dls64, model64()).fit_tuned(1, **mistake)


def test_the_tuned_recipe_is_for_sgd(dls64):
    with pytest.raises(ValueError, match='options of torch.optim.SGD, but opt_func makes a Optimizer'):
        quiet(block3_learner(dls64, model64(), opt_func=Adam)).fit_tuned(1, aug=0.)


def test_augmentation_needs_a_loader_that_transforms_batches(dls64):
    with pytest.raises(ValueError, match='aug=0'): quiet(block3_learner(dls64, model64())).fit_tuned(1)


@pytest.mark.parametrize('error', [None, KeyboardInterrupt()], ids=str)
def test_one_setting_over_another(error):
    "What is set last is put back first"
    learn = quiet(block3_learner(mnist_dls(n_train=128, valid='reference', device='cpu')))
    learn.create_opt()
    before = state(learn)
    cbs = [SetDropout(0.3), TrainTfms(), SetSGD(momentum=0.5), Seen(error)]
    if error:
        with pytest.raises(KeyboardInterrupt): learn.fit_tuned(1, cbs=cbs)
    else: learn.fit_tuned(1, cbs=cbs)
    sgd,drops,tfms = learn.in_training
    assert sgd[0][0] == 0.5 and set(drops) == {0.3} and [type(o).__name__ for o in tfms] == ['IntToFloatTensor', 'Normalize']
    assert state(learn) == before
