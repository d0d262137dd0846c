"The schedules against plain PyTorch loops in float64, and the learner among fastai's own methods"
import copy
from functools import partial
import matplotlib.pyplot as plt, pytest, torch, torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset
from mnist_block3.all import (
    accuracy, block3_learner, Block3, block_report, Callback, ClassificationInterpretation, CSVLogger, DataLoaders,
    EpochLines, error_rate, F1Score, history, L, Learner, load_learner, mnist_dls, NLLLossFlat, noop, ParamScheduler,
    plot_history, ProgressCallback, SchedLin, set_seed, ShortEpochCallback, skm_to_fastai, TorchSGD)

@pytest.fixture(autouse=True)
def small_mnist(mnist, monkeypatch):
    "Few digits, which no test has to read again"
    digits = mnist[0][:96], mnist[1][:100]
    monkeypatch.setattr('mnist_block3.data.load_digits', lambda source=None: digits)

def as_input(images): return (images[:,None]/255 - 0.1307)/0.3081

@pytest.fixture
def batches(mnist):
    data = TensorDataset(as_input(mnist[0].images[:48]).double(), mnist[0].labels[:48].long())
    return DataLoader(data, batch_size=16)

@pytest.fixture
def dls64(batches): return DataLoaders(batches, batches)

def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def learner64(dls, drop=0., **kwargs): return quiet(block3_learner(dls, Block3(drop=drop).double(), **kwargs))
def learner(**kwargs): return quiet(block3_learner(mnist_dls(bs=32, device='cpu'), **kwargs))
def diff(a, b): return max((p-q).abs().max() for p,q in zip(a.state_dict().values(), b.state_dict().values()))

def torch_loop(model, batches, epochs, opt, after_step=noop, after_epoch=noop):
    "The loop that everyone knows"
    for _ in range(epochs):
        for xb,yb in batches:
            opt.zero_grad()
            F.nll_loss(model(xb), yb).backward()
            opt.step()
            after_step()
        after_epoch()

def torch_fit(model, batches, epochs, lr=0.02, mom=0.8, step_size=15, gamma=0.1):
    opt = torch.optim.SGD(model.train().parameters(), lr=lr, momentum=mom)
    torch_loop(model, batches, epochs, opt, after_epoch=StepLR(opt, step_size, gamma).step)


@pytest.mark.parametrize('epochs,settings', [(16, {}), (5, dict(lr=0.01, mom=0.9, step_size=2, gamma=0.5))])
def test_fit_equals_a_plain_loop(batches, dls64, epochs, settings):
    learn = learner64(dls64, **settings)
    start = copy.deepcopy(learn.model)
    twin = copy.deepcopy(learn.model)
    learn.fit(epochs)
    torch_fit(twin, batches, epochs, **settings)
    assert diff(learn.model, twin) < 1e-9 < diff(twin, start)

def test_a_plain_fit_is_the_schedule_whatever_came_before(batches, dls64):
    learn = learner64(dls64)
    learn.fit_one_cycle(1, 0.1)
    learn.fit(1, lr=0.01)
    assert learn.recorder.lrs == [0.01]*3
    learn.opt.clear_state()
    twin = copy.deepcopy(learn.model)
    learn.fit(2)
    torch_fit(twin, batches, 2)
    assert diff(learn.model, twin) < 1e-9

def test_fastais_schedules_stay_as_they_are(dls64):
    learn = learner64(dls64, step_size=1)
    sgd = partial(TorchSGD, momentum=0.8)
    plain = quiet(Learner(dls64, copy.deepcopy(learn.model), loss_func=NLLLossFlat(), opt_func=sgd))
    for each in (learn, plain): each.fit_one_cycle(2, 0.1)
    assert diff(learn.model, plain.model) < 1e-12
    assert learn.recorder.hps == plain.recorder.hps

def test_step_decay_among_others(dls64):
    learn = learner64(dls64, step_size=2)
    learn.fit(3, cbs=ParamScheduler({'mom': SchedLin(0.9, 0.5)}))
    assert learn.recorder.lrs == pytest.approx([0.02]*6 + [0.002]*3)
    assert learn.opt.hypers[0]['mom'] == 0.8
    def halve(cb): cb.opt.set_hyper('lr', cb.opt.hypers[-1]['lr']/2)
    learn.fit(3, cbs=Callback(after_epoch=halve))
    assert learn.recorder.lrs == pytest.approx([0.02]*3 + [0.01]*3 + [0.0005]*3)
    learn.recorder.plot_sched()
    assert plt.gca().lines[0].get_ydata() == pytest.approx(learn.recorder.lrs)

def test_the_logger_is_put_back(tmp_path):
    "Which the progress bar and `CSVLogger` together would not do"
    learn = block3_learner(mnist_dls(bs=32, device='cpu'), cbs=CSVLogger(), path=tmp_path)
    learn.fit(1)
    assert learn.logger == print


def test_history_is_of_the_last_fit(dls64):
    learn = learner64(dls64, step_size=1)
    for n_epoch,start_epoch,epochs in [(3, 0, [1, 2, 3]), (1, 0, [1]), (3, 1, [1, 2, 3]), (5, 4, [5])]:
        learn.fit(n_epoch, start_epoch=start_epoch)
        learn.validate()
        assert history(learn).epoch.tolist() == epochs
    assert history(learn).lr.tolist() == pytest.approx([0.02*0.1**4])
    other = Learner(dls64, learn.model, loss_func=NLLLossFlat())
    with pytest.raises(ValueError, match='make it with block3_learner'): history(other)

def test_history_of_an_epoch_cut_short():
    "fastai's `Recorder` gives such an epoch no training loss"
    learn = learner()
    learn.fit(1, cbs=ShortEpochCallback(short_valid=False))
    row = history(learn).iloc[-1]
    assert [row.valid_loss, row.valid_accuracy] == pytest.approx(learn.validate(), rel=1e-5) and 'train_loss' not in row

def test_history_counts_right_predictions():
    "In training over the whole epoch, in the evaluation as `get_preds` gives them"
    right = []
    def look(cb):
        if cb.training: right.append(cb.pred.argmax(1) == cb.y)
    learn = learner()
    learn.fit(1, cbs=Callback(after_loss=look))
    probs,targs = learn.get_preds()
    row = history(learn).iloc[-1]
    assert row.train_accuracy == pytest.approx(torch.cat(right).float().mean().item())
    assert (row.correct, row.total) == ((probs.argmax(1) == targs).sum(), 100)
    assert row.valid_accuracy == pytest.approx(row.correct/100)
    assert row.valid_loss == pytest.approx(F.nll_loss(probs.log(), targs).item(), rel=1e-3)

def fitted(metrics, fast, train_metrics=False):
    "The history of a fit, its lines in a log, and the titles of its plot"
    learn = block3_learner(mnist_dls(valid='reference', device='cpu'), metrics=metrics, cbs=EpochLines(), fast=fast)
    learn.recorder.train_metrics = train_metrics
    lines = []
    learn.epoch_lines.write = lines.append
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    titles = [ax.get_title() for ax in plot_history(history(learn)).axes]
    plt.close('all')
    return history(learn), lines, titles

@pytest.mark.parametrize('fast,train_metrics', [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize('metrics', [error_rate, [F1Score(average='macro'), accuracy]])
def test_accuracy_or_error_rate_among_metrics(metrics, fast, train_metrics):
    "What scikit-learn counts is in the history, the log, the plot and the report"
    rows,lines,titles = fitted([*L(metrics), skm_to_fastai(accuracy_score)], fast, train_metrics)
    want = rows['valid_accuracy_score' if train_metrics else 'accuracy_score']
    assert rows.valid_accuracy.tolist() == pytest.approx(want, abs=1e-6)
    assert rows.correct.tolist() == pytest.approx(want*96)
    percents = [f'{100*accuracy:.2f} %' for accuracy in want]
    assert [percent in line for percent,line in zip(percents, lines)] == [True, True]
    assert percents[-1] in block_report(rows) and 'Evaluation accuracy' in titles

@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('metrics', [None, F1Score(average='macro')])
def test_without_an_accuracy(metrics, fast):
    rows,lines,titles = fitted(metrics, fast)
    assert 'valid_loss' in rows and ('f1_score' in rows) == bool(metrics)
    assert [f'{loss:.4f}' in line and '%' not in line for loss,line in zip(rows.valid_loss, lines)] == [True, True]
    assert titles == ['Training loss', 'Evaluation loss']
    with pytest.raises(ValueError, match='^block_report needs the accuracy: pass metrics=accuracy to block3_learner$'):
        block_report(rows)


def test_lr_find_leaves_weights_and_history(dls64, tmp_path):
    learn = learner64(dls64, path=tmp_path)
    learn.fit(1)
    before = copy.deepcopy(learn.model)
    rows = history(learn)
    learn.lr_find(num_it=20, show_plot=False)
    assert len(set(learn.recorder.lrs)) > 10
    assert diff(learn.model, before) == 0 and history(learn).equals(rows)


def test_predict(mnist):
    learn = learner(pretrained=True)
    label,idx,probs = learn.predict(mnist[1].images[0])
    with torch.no_grad(): want = learn.model.eval()(as_input(mnist[1].images[:1]))[0].exp()
    torch.testing.assert_close(probs, want, atol=1e-5, rtol=1e-4)
    assert label == str(int(idx)) == '7'

def test_save_load_export(mnist, tmp_path):
    learn = learner(pretrained=True, path=tmp_path)
    def probs(learn): return learn.predict(mnist[1].images[0])[2]
    want = probs(learn)
    learn.save('weights')
    for p in learn.model.parameters(): p.data.zero_()
    learn.load('weights')
    assert torch.equal(probs(learn), want)
    learn.export('learn.pkl')
    assert (tmp_path/'learn.pkl').stat().st_size < 1_000_000
    assert torch.equal(probs(quiet(load_learner(tmp_path/'learn.pkl'))), want)

def test_interpretation_and_show_results():
    learn = learner(pretrained=True)
    interp = ClassificationInterpretation.from_learner(learn)
    probs,targs = learn.get_preds()
    assert (interp.confusion_matrix() == confusion_matrix(targs, probs.argmax(1), labels=range(10))).all()
    interp.plot_confusion_matrix()
    interp.plot_top_losses(4, cmap='gray')
    assert 'Prediction/Actual' in plt.gcf()._suptitle.get_text()
    learn.show_results(max_n=4)
    assert sum('\n' in ax.get_title() for ax in plt.gcf().axes) == 4


@pytest.mark.parametrize('wd,nesterov', [(0., False), (1e-2, True)])
def test_fit_tuned_equals_a_plain_loop(batches, dls64, wd, nesterov):
    "Dropout is switched off, and fastai computes the rate in float32"
    learn = learner64(dls64, drop=0.3)
    start = copy.deepcopy(learn.model)
    twin = Block3(drop=0.).double()
    twin.load_state_dict(start.state_dict())
    learn.fit_tuned(5, aug=0., wd=wd, nesterov=nesterov)
    opt = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=wd, nesterov=nesterov)
    sched = LambdaLR(opt, lambda i: min(i/3, (15-i)/12)) # of 15 steps
    torch_loop(twin, batches, 5, opt, after_step=sched.step)
    update_bn(batches, twin)
    assert diff(learn.model, twin) < 1e-5 < diff(twin, start)

def test_precise_statistics_are_those_of_the_images_as_they_are(mnist):
    "Without the dropout and the augmentation of the fit"
    def trained(precise_bn):
        set_seed(0)
        learn = learner()
        learn.fit_tuned(2, precise_bn=precise_bn, drop=0.3)
        return learn.model
    ours = trained(True)
    running = trained(False)
    twin = Block3(drop=0.)
    twin.load_state_dict(running.state_dict())
    update_bn(as_input(mnist[0].images[:96]).split(32), twin)
    assert diff(ours, twin) < 1e-5 < diff(ours, running)

def test_precise_statistics_are_taken_once_and_whole(dls64, monkeypatch):
    "If you interrupt the computation, the statistics of the training stay"
    learn = learner64(dls64)
    epochs = []
    def interrupted(model, dl):
        epochs.append(learn.epoch)
        model.input_block[2].running_mean.zero_()
        raise KeyboardInterrupt
    monkeypatch.setattr('mnist_block3.learner._average_moments', interrupted)
    with pytest.raises(KeyboardInterrupt): learn.fit_tuned(2, aug=0.)
    assert epochs == [1] and learn.model.input_block[2].running_mean.any()

def test_an_interrupted_fit_tuned_puts_everything_back():
    learn = learner()
    learn.create_opt()
    def settings():
        sgd, = learn.opt.opt.param_groups
        tfms = [type(tfm).__name__ for tfm in learn.dls.train.after_batch.fs]
        return sgd['momentum'], sgd['weight_decay'], sgd['nesterov'], learn.model.input_block[-1].p, tfms
    def look(cb):
        assert settings() == (0.9, 1e-4, True, 0., ['IntToFloatTensor', 'Distort', 'Normalize'])
        raise KeyboardInterrupt
    cb = Callback(after_batch=look)
    with pytest.raises(KeyboardInterrupt): learn.fit_tuned(1, wd=1e-4, nesterov=True, cbs=cb)
    assert settings() == (0.8, 0, False, 0.01, ['IntToFloatTensor', 'CropRotate', 'Normalize'])

def test_augmentation_needs_a_loader_that_transforms_batches(dls64):
    with pytest.raises(ValueError, match='aug=0'): learner64(dls64).fit_tuned(1)
