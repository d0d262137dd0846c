"A fit after one that raised or was interrupted: it ends, and is as good as that of a new learner"
import copy, signal, subprocess, sys
import pytest, torch
from mnist_block3.all import block3_learner, Callback, CSVLogger, MixUp, history, mnist_dls, set_seed


@pytest.fixture(autouse=True)
def not_for_ever():
    "A fit that never returns fails its test"
    def late(num, frame): raise TimeoutError('this test takes for ever')
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture(scope='module')
def dls(): return mnist_dls(valid='reference', n_train=40, bs=16, device='cpu')


def new_learner(dls, fast):
    set_seed(0)
    learn = block3_learner(dls)
    learn.fast_epoch.on = fast
    return learn


def raising(event, error):
    class Raise(Callback):
        order = 70 # after the others have set things up
    def method(self): raise error
    setattr(Raise, event, method)
    return Raise()


def twin_of(learn, dls, fast):
    "A new learner with the weights of `learn`, and the optimizer's memory of its steps"
    twin = new_learner(dls, fast)
    twin.model.load_state_dict(learn.model.state_dict())
    twin.create_opt()
    sgd = twin.opt.opt
    sgd.load_state_dict(sgd.state_dict() | dict(state=copy.deepcopy(learn.opt.opt.state_dict()['state'])))
    return twin


def find(learn): learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)

def weights_after(learn, fit):
    set_seed(1)
    learn.dls.train.rng.seed(1)
    fit(learn)
    return copy.deepcopy(learn.model.state_dict())


def same(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())


@pytest.mark.filterwarnings('ignore:You are shadowing')
@pytest.mark.parametrize('fast', [True, False], ids=['fast', 'plain'])
@pytest.mark.parametrize('error', [ValueError('boom'), KeyboardInterrupt()], ids=['exception', 'ctrl-c'])
@pytest.mark.parametrize('event', ['before_fit', 'after_backward', 'after_batch', 'after_epoch'])
def test_the_next_fit(dls, tmp_path, event, error, fast):
    "With the progress bar on, and with a logger of fastai among the callbacks"
    learn = new_learner(dls, fast)
    learn.path = tmp_path
    learn.add_cb(CSVLogger())
    with pytest.raises(type(error)): learn.fit_one_cycle(2, 0.1, cbs=raising(event, error))
    with pytest.raises(type(error)): learn.fit_tuned(2, cbs=raising(event, error))
    assert learn.logger is print
    for fit in (lambda learn: learn.fit(1), lambda learn: learn.fit_tuned(1), find, lambda learn: learn.fit_one_cycle(1, 0.1)):
        twin = twin_of(learn, dls, fast)
        assert same(weights_after(learn, fit), weights_after(twin, fit))
        assert learn.opt.hypers == twin.opt.hypers
        assert learn.fast_epoch.engine == ('kernels' if fast and fit is not find else 'plain')
    assert history(learn).epoch.tolist() == [1]


def test_neither_loss_nor_autocast_of_the_fit_stays(dls):
    learn = new_learner(dls, fast=False).to_bf16()
    loss_func = learn.loss_func
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[MixUp(), raising('after_pred', KeyboardInterrupt())])
    assert learn.loss_func is loss_func
    assert not torch.is_autocast_enabled('cpu')
    with pytest.raises(KeyboardInterrupt): learn.get_preds(cbs=raising('after_pred', KeyboardInterrupt()))
    assert not torch.is_autocast_enabled('cpu')


def test_an_interrupted_lr_find_restores_the_weights(dls, tmp_path):
    learn = new_learner(dls, fast=False)
    learn.path = tmp_path
    before = copy.deepcopy(learn.model.state_dict())
    learn.add_cb(raising('after_batch', KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): find(learn)
    assert same(learn.model.state_dict(), before)
    assert not list((tmp_path/'models').iterdir())


def test_an_evaluation_afterwards_is_no_epoch(dls):
    learn = new_learner(dls, fast=False)
    learn.fit(1)
    with pytest.raises(ValueError): learn.fit(1, cbs=raising('after_batch', ValueError('boom')))
    learn.validate()
    assert len(history(learn)) == 0


script = """
from mnist_block3.all import *
learn = block3_learner(mnist_dls(valid='reference', n_train=200, device='cpu'))
class Boom(Callback):
    def after_batch(self): raise KeyboardInterrupt
try: learn.fit(1, cbs=Boom())
except KeyboardInterrupt: pass
learn.fit(1)
learn.validate()
learn.fit(1)
print('it ends', len(history(learn)))
"""


def test_in_a_terminal():
    res = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=100)
    assert (res.returncode, res.stderr) == (0, '')
    assert res.stdout.splitlines()[-1] == 'it ends 1'


@pytest.mark.slow
def test_in_a_notebook():
    nbformat = pytest.importorskip('nbformat')
    nbclient = pytest.importorskip('nbclient')
    pytest.importorskip('ipykernel')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(script)])
    nbclient.NotebookClient(nb, timeout=100).execute()
    assert 'it ends 1' in str(nb.cells[0].outputs)
