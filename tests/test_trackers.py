"fastai's trackers with the default learner: they write what the fit used"
import pytest
from fastai.callback.hook import ActivationStats
from mnist_block3.all import Block3, block3_learner, Callback, CSVLogger, history, mnist_dls, ReduceLROnPlateau, SGD


@pytest.fixture(scope='module')
def dls(): return mnist_dls(valid='reference', n_train=128, device='cpu') # 2 steps an epoch


class Used(Callback):
    "The values of each step, from PyTorch's optimizer itself"
    def before_fit(self): self.values = dict(lr=[], momentum=[])
    def before_step(self):
        for k,v in self.values.items(): v.append(self.opt.opt.param_groups[0][k])


@pytest.mark.parametrize('fit', ['fit', 'fit_tuned', 'fit_one_cycle'])
def test_tensorboard_logs_each_step(dls, tmp_path, capsys, fit):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = block3_learner(dls, cbs=[Used(), TensorBoardCallback(tmp_path, trace_model=False, log_preds=False)])
    with learn.no_bar(): getattr(learn, fit)(2)
    assert capsys.readouterr().out.count("Taking fastai's own training loop") == 1
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag,key in (('lr_0', 'lr'), ('mom_0', 'momentum')):
        logged = {e.step: e.value for e in events.Scalars(tag)} # evaluation repeats the last step
        assert list(logged) == [1, 2, 3, 4]
        assert list(logged.values()) == pytest.approx(learn.used.values[key])


def test_wandb_offline(dls, tmp_path):
    wandb = pytest.importorskip('wandb')
    from fastai.callback.wandb import WandbCallback
    with wandb.init(mode='offline', dir=tmp_path) as run:
        learn = block3_learner(dls, cbs=[Used(), WandbCallback()])
        with learn.no_bar(): learn.fit(2)
        logged = dict(run.summary)
    last = history(learn).iloc[-1]
    assert [logged['valid_loss'], logged['accuracy']] == pytest.approx([last.valid_loss, last.valid_accuracy])
    assert logged['lr_0'] == learn.used.values['lr'][-1] and 'Prediction_Samples' in logged
    assert list(tmp_path.glob('wandb/offline-run-*/*.wandb'))


def test_csv_has_the_rows_of_history(dls, tmp_path):
    learn = block3_learner(dls, cbs=CSVLogger(), path=tmp_path)
    with learn.no_bar(): learn.fit(2)
    rows = learn.csv_logger.read_log().rename(columns={'accuracy': 'valid_accuracy'})
    same = ['train_loss', 'valid_loss', 'valid_accuracy']
    assert rows[same].values == pytest.approx(history(learn)[same].values, rel=1e-12)


def test_activation_stats_with_the_tuned_recipe(dls):
    model = Block3()
    learn = block3_learner(dls, model, cbs=ActivationStats(modules=[model.head]))
    with learn.no_bar(): learn.fit_tuned(1) # `PreciseBN` at its end copies the model
    assert len(learn.activation_stats.stats) == 2


@pytest.mark.parametrize('fast', [True, False])
def test_plateaus_lower_the_rate_as_with_fastais_own_sgd(dls, fast):
    def rates(**kwargs):
        learn = block3_learner(dls, fast=fast, cbs=ReduceLROnPlateau(min_delta=100), **kwargs)
        with learn.no_bar(): learn.fit(4)
        return history(learn).lr.tolist(), learn.fast_epoch.engine
    ours,engine = rates()
    assert engine == ('kernels' if fast else 'plain')
    assert ours == rates(opt_func=SGD)[0] == pytest.approx([0.02, 0.02, 0.002, 0.0002])
