"A run that dies: at any moment, by any signal, on a full disk; and the one that goes on"
import errno, json, multiprocessing, os, random, re, signal, stat, subprocess, sys, time
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from fastai.callback.progress import ShowGraphCallback
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import Adam, Larc, ranger, RMSProp, SGD
from safetensors.torch import load_file
from mnist_block3.all import (accuracy, block3_learner, Callback, CancelValidException, Checkpoint, checkpoint_bytes, DataLoaders, EarlyStoppingCallback, F1Score, history, L, Learner, locked, mnist_dls, new_run_dir,
                              OptimWrapper, read_checkpoint, ReduceLROnPlateau, resume_run, run_files, run_settings, SaveModelCallback, set_seed, Study,
                              sweep, TfmdDL, train_run, Transform, WeightedDL, write_whole)
from mnist_block3 import run as run_module
from mnist_block3 import sweep as sweep_module
from mnist_block3.cli import block3_export, block3_train
from mnist_block3.fast import Steps

few = dict(epochs=4, n_train=40, bs=8, valid='reference', device='cpu') # batches are small throughout, since a step costs what its images do
fork = multiprocessing.get_context('forkserver')
fork.set_forkserver_preload(['mnist_block3.all'])


def work(folder, recipe):
    "Begin a run or go on with it, in a process of its own"
    torch.set_num_threads(1)
    if multiprocessing.current_process().name != 'MainProcess': sys.stdout = open(os.devnull, 'w')
    if (Path(folder)/'settings.json').exists(): resume_run(folder)
    else: train_run(folder, recipe=recipe, **few)


def weights(folder): return load_file(Path(folder)/'weights.safetensors')

def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Weights at the end of runs that nothing has happened to, and how long they took"
    made,first = {},fork.Process(target=print) # the server starts with the first
    first.start()
    first.join()
    for recipe in ('reference', 'tuned'):
        folder,began = tmp_path_factory.mktemp(recipe)/'run',time.perf_counter()
        p = fork.Process(target=work, args=(folder, recipe))
        p.start()
        p.join()
        assert p.exitcode == 0
        made[recipe] = weights(folder),time.perf_counter() - began
    return made


def killed_and_resumed(folder, recipe, whole, rng):
    "Kill a run at random moments until it has ended by itself; how often that was"
    want,took = whole[recipe]
    for n in range(100):
        p = fork.Process(target=work, args=(folder, recipe))
        p.start()
        p.join(rng.uniform(0.2, 1.1)*took)
        alive = p.is_alive()
        p.kill()
        p.join()
        if not alive and p.exitcode == 0: break
    assert same(weights(folder), want)
    assert {o.name for o in folder.iterdir()} == set(run_files)
    return n


@pytest.mark.parametrize('recipe', ['reference', 'tuned'])
def test_killed_at_any_moment(tmp_path, whole, recipe):
    rng,n,i = random.Random(recipe),0,0
    while n < 3:
        n += killed_and_resumed(tmp_path/str(i), recipe, whole, rng)
        i += 1


@pytest.mark.slow
def test_killed_fifty_times(tmp_path, whole):
    rng,n,i = random.Random(0),0,0
    while n < 50:
        n += killed_and_resumed(tmp_path/str(i), ('reference', 'tuned')[i%2], whole, rng)
        i += 1


def test_resumed_after_each_epoch(tmp_path, at_hand, monkeypatch, whole):
    "With what is in memory gone, as after a kill between two epochs, the last one included"
    save = Checkpoint.save
    torch.set_num_threads(1)
    for last in range(1, 5):
        def stop(self, *part):
            save(self, *part)
            if self.epoch + 1 == last and not part: raise KeyboardInterrupt()
        monkeypatch.setattr(Checkpoint, 'save', stop)
        with pytest.raises(KeyboardInterrupt): train_run(tmp_path/str(last), **few)
        monkeypatch.setattr(Checkpoint, 'save', save)
        assert read_checkpoint(tmp_path/str(last)/'checkpoint.safetensors')['epoch'] == last
        learn,folder = resume_run(tmp_path/str(last))
        assert same(weights(folder), whole['reference'][0])
        summary = json.loads((folder/'summary.json').read_text())
        assert (summary['resumed_after'], summary['results']['total']) == (dict(epochs=last, steps=0), few['n_train'])
        assert len((folder/'history.csv').read_text().splitlines()) == 5


class Signal(Callback):
    "Send SIGINT in step `n` of epoch `e`, counted from 0; step 5 is the evaluation"
    def __init__(self, e, n): self.when = e,n
    def send(self, n):
        if (self.epoch, n) == self.when: signal.raise_signal(signal.SIGINT)
    def before_validate(self): self.send(5)

class SignalInLoop(Signal):
    def after_pred(self):
        if self.training: self.send(self.iter)


class StepsTaken(Callback):
    n_taken = 0
    def after_step(self): self.n_taken += 1


def some_steps(monkeypatch, fast, recipe, *cbs, stop=None, device='cpu'):
    "A fit of three epochs of five steps each, the last one shorter, that SIGINT may stop"
    set_seed(0)
    learn = block3_learner(mnist_dls(valid='reference', n_train=38, bs=8, device=device), fast=fast)
    learn.fast_epoch.use_compile,learn.fast_epoch.min_steps = False,0
    stop = stop and (Signal if fast else SignalInLoop)(*stop)
    with monkeypatch.context() as m, learn.no_bar(), learn.no_logging():
        if stop and fast: m.setattr(Steps, '__call__', lambda self, n, step=Steps.__call__: (step(self, n), stop.send(n)))
        getattr(learn, recipe)(3, cbs=[*cbs, *[stop]*(stop is not None)])
    assert learn.fast_epoch.engine == (('eager' if device == 'cpu' else 'graph') if fast else 'plain')
    return learn


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
def to_the_bit(request):
    "A device whose kernels give the same bits each time"
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True): yield request.param


@pytest.mark.parametrize('recipe', ['fit', 'fit_tuned'])
@pytest.mark.parametrize('fast', [True, False])
def test_stopped_at_a_step(tmp_path, at_hand, monkeypatch, listening_to_ctrl_c, to_the_bit, recipe, fast):
    "In the first epoch, a later one, the last; at the first step, the last, after it: the step is done and kept, and what is left is done once"
    fit = partial(some_steps, monkeypatch, fast, recipe, device=to_the_bit)
    whole = fit()
    for e,n in ((0,0), (0,5), (1,3), (1,4), (2,1), (2,5)):
        file = tmp_path/f'{e}{n}'
        with pytest.raises(KeyboardInterrupt): fit(Checkpoint(file), stop=(e, n))
        state = read_checkpoint(file)
        assert (state['epoch'], state['part']['n'], state['train_iter']) == (e, min(n+1, 5), 5*e + min(n+1, 5))
        done = StepsTaken()
        learn = fit(Checkpoint(file, resume=True), *[done]*(not fast))
        assert fast or done.n_taken == 15 - state['train_iter']
        assert same(learn.model.state_dict(), whole.model.state_dict())
        assert history(learn).drop(columns='seconds').equals(history(whole).drop(columns='seconds'))
        for k in ('losses', 'lrs', 'iters', 'values'): assert getattr(learn.recorder, k) == getattr(whole.recorder, k), k


class Cut(Callback):
    "End the fit where its epoch `e` has ended, as a kill does"
    order = 99
    def __init__(self, e): self.e = e
    def after_epoch(self):
        if self.epoch == self.e: raise KeyboardInterrupt


def stopped_and_resumed(tmp_path, make, *cbs, stop, fit='fit', file='c', **kwargs):
    "Two learners of `make`: one that was left alone, and one that has gone on where a third was stopped"
    def go(*more):
        learn = make()
        with learn.no_bar(), learn.no_logging(): getattr(learn, fit)(3, cbs=[*(o() for o in cbs), *more], **kwargs)
        return learn
    whole = go()
    with pytest.raises(KeyboardInterrupt): go(Checkpoint(tmp_path/file), stop)
    assert [o.name for o in tmp_path.iterdir() if o.suffix == '.lock'] == []
    return whole,go(Checkpoint(tmp_path/file, resume=True))

def plain(dls=None, **kwargs):
    set_seed(0)
    return block3_learner(dls() if dls else mnist_dls(valid='reference', n_train=38, bs=8, device='cpu'), fast=False, **kwargs)

def ended_alike(a, b):
    assert same(a.model.state_dict(), b.model.state_dict())
    assert history(a).drop(columns='seconds').equals(history(b).drop(columns='seconds'))
    for k in ('losses', 'lrs', 'iters', 'values', 'hps'): assert getattr(a.recorder, k) == getattr(b.recorder, k), k


@pytest.mark.parametrize('stop', [SignalInLoop(1, 2), Cut(1)])
@pytest.mark.parametrize('fit,kwargs', [
    ('fit_one_cycle', {}), ('fit_flat_cos', {}), ('fit', dict(opt_func=Adam)), ('fit', dict(opt_func=ranger)), ('fit', dict(opt_func=Larc)), ('fit_one_cycle', dict(opt_func=RMSProp)),
    ('fit', dict(opt_func=partial(OptimWrapper, opt=torch.optim.Adafactor))), ('fit', dict(opt_func=partial(OptimWrapper, opt=torch.optim.RMSprop))), ('fit', dict(mom=0.)), ('fit_one_cycle', dict(mom=0.)),
    ('fit_one_cycle', dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))), ('fit', dict(start_epoch=1))])
def test_other_schedules_and_optimizers(tmp_path, at_hand, listening_to_ctrl_c, fit, kwargs, stop):
    start = {k: v for k,v in kwargs.items() if k == 'start_epoch'}
    made = {k: v for k,v in kwargs.items() if k not in start}
    whole,resumed = stopped_and_resumed(tmp_path, partial(plain, **made), stop=stop, fit=fit, **start)
    ended_alike(whole, resumed)
    assert list(history(resumed).epoch) == ([2, 3] if start else [1, 2, 3])


def test_an_optimizer_that_cannot_be_kept(tmp_path, at_hand):
    "Is refused with the first epoch, and not when it is too late"
    class Odd(torch.optim.SGD):
        def step(self, *args):
            super().step(*args)
            for o in self.param_groups[0]['params']: self.state[o]['memory'] = torch.zeros(len(self.state[o].get('memory', [])) + 1)
    learn = plain(opt_func=partial(OptimWrapper, opt=Odd))
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='c: Checkpoint cannot keep this fit: its Odd has another form'): learn.fit(1, cbs=Checkpoint(tmp_path/'c'))
    assert list(tmp_path.iterdir()) == []


class Worst(Callback):
    "Make the results of some epochs the best so far, and the others the worst"
    order = 59
    def after_epoch(self):
        if self.recorder.values[-1][0] < 100: self.recorder.values[-1][0] = 1000. + (self.epoch in (1, 3)) * (self.epoch - 10)


@pytest.mark.parametrize('stop', [SignalInLoop(3, 2), SignalInLoop(2, 4), Cut(0), Cut(1), Cut(2), Cut(3), Cut(4)])
@pytest.mark.parametrize('how', [{}, dict(with_opt=True), dict(every_epoch=2), dict(at_end=True)])
def test_callbacks_that_follow_the_results_see_them_again(tmp_path, at_hand, monkeypatch, listening_to_ctrl_c, stop, how):
    "The best of the skipped epochs stays the best, and their model, which is on the disk, is not replaced by another"
    made = []
    for name in ('whole', 'resumed'):
        (tmp_path/name).mkdir()
        monkeypatch.chdir(tmp_path/name)
        def go(*more):
            learn = plain(opt_func=SGD)
            cbs = [Worst(), SaveModelCallback(monitor='train_loss', **how), ReduceLROnPlateau('train_loss', patience=2), EarlyStoppingCallback('train_loss', patience=9)]
            with learn.no_bar(), learn.no_logging(): learn.fit(5, cbs=[*cbs, *more])
            return learn
        if name == 'resumed':
            with pytest.raises(KeyboardInterrupt): go(Checkpoint('c'), stop)
        learn = go(*[Checkpoint('c', resume=True)]*(name == 'resumed'))
        models = {o.name: torch.load(o, weights_only=False) for o in sorted(Path('models').iterdir())}
        made.append((learn, {k: v['model'] if how.get('with_opt') else v for k,v in models.items()}))
    (whole,files),(resumed,again) = made
    ended_alike(whole, resumed)
    assert files.keys() == again.keys() and all(same(v, again[k]) for k,v in files.items())
    assert len(files) == (3 if 'every_epoch' in how else 1)


def test_early_stopping_counts_on(tmp_path, at_hand, listening_to_ctrl_c):
    whole,resumed = stopped_and_resumed(tmp_path, plain, partial(EarlyStoppingCallback, min_delta=1e3, patience=2), stop=SignalInLoop(1, 1))
    ended_alike(whole, resumed)
    assert len(history(whole)) == len(whole.recorder.values) == 3 and whole.epoch == 2


def test_a_fit_that_is_to_stop_in_an_epoch_that_is_skipped(tmp_path, at_hand, listening_to_ctrl_c):
    "Has the weights that were kept, and not those that it began with"
    def fit(patience, *cbs):
        learn = plain()
        with learn.no_bar(), learn.no_logging(): learn.fit(5, cbs=[EarlyStoppingCallback(min_delta=1e3, patience=patience), *cbs])
        return learn
    with pytest.raises(KeyboardInterrupt): fit(9, Checkpoint(tmp_path/'c'), SignalInLoop(3, 2))
    learn = fit(1, Checkpoint(tmp_path/'c', resume=True))
    assert learn.epoch < 3 and same(learn.model.state_dict(), read_checkpoint(tmp_path/'c')['model'])


@pytest.mark.filterwarnings('ignore')
def test_the_graph_has_the_skipped_epochs(tmp_path, at_hand, listening_to_ctrl_c):
    def fit(*cbs):
        learn,graph = plain(),ShowGraphCallback()
        with learn.no_logging(): learn.fit(3, cbs=[graph, *cbs])
        return graph.nb_batches
    with pytest.raises(KeyboardInterrupt): fit(Checkpoint(tmp_path/'c'), SignalInLoop(2, 2))
    assert fit(Checkpoint(tmp_path/'c', resume=True)) == [5, 10, 15]


def test_epochs_without_evaluation_and_results_that_are_no_numbers(tmp_path, at_hand, listening_to_ctrl_c):
    class Seldom(Callback):
        def before_validate(self):
            if self.epoch != 1: raise CancelValidException
    whole,resumed = stopped_and_resumed(tmp_path, partial(plain, metrics=[accuracy, F1Score(average=None)]), Seldom, stop=Cut(1))
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert [len(o) for o in whole.recorder.values] == [len(o) for o in resumed.recorder.values] == [1, 4, 1]


def test_two_fits_of_one_learner(tmp_path, at_hand):
    "With `resume` each goes on with what was interrupted, and not with what the one before it has done"
    def two(*cbs):
        learn = plain(cbs=[*cbs])
        with learn.no_bar(), learn.no_logging():
            for lr in (0.02, 0.01): learn.fit(1, lr=lr)
        return learn
    assert same(two(Checkpoint(tmp_path/'c', resume=True)).model.state_dict(), two().model.state_dict())


def test_evaluation_within_a_fit(tmp_path, at_hand, listening_to_ctrl_c):
    class Look(Callback):
        def after_train(self):
            values = self.recorder.values
            self.learn.validate()
            self.recorder.values,self.recorder.log = values,L(self.epoch)
    with pytest.raises(KeyboardInterrupt):
        learn = plain(cbs=Checkpoint(tmp_path/'c', resume=True))
        with learn.no_bar(), learn.no_logging(): learn.fit(3, cbs=[Look(), SignalInLoop(2, 1)])
    assert (read_checkpoint(tmp_path/'c')['epoch'], read_checkpoint(tmp_path/'c')['part']['n']) == (2, 2)


def test_a_refused_checkpoint_leaves_all_as_it_was(tmp_path, at_hand):
    learn = plain(cbs=Checkpoint(tmp_path/'c', resume=True))
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
        other = plain(cbs=Checkpoint(tmp_path/'c', resume=True))
        with other.no_bar(), other.no_logging(), pytest.raises(ValueError, match='is of a fit of 2 epochs, not 3'): other.fit(3)
    assert len(history(learn)) == 2 and [o.name for o in tmp_path.iterdir()] == ['c']


@pytest.mark.parametrize('loader', ['weighted', 'workers'])
def test_loaders_that_draw_as_the_epoch_begins(tmp_path, at_hand, listening_to_ctrl_c, loader):
    "From NumPy for the order, or from torch for the seeds of their workers, as fastai's own do"
    def dls():
        dls = mnist_dls(valid='reference', n_train=38, bs=8, device='cpu')
        if loader == 'weighted': dls.train.__class__,dls.train.wgts = WeightedDL,np.arange(1, 39)/741
        else: dls.train = TfmdDL([(torch.full((1,28,28), i/64), i%10) for i in range(40)], bs=8, shuffle=True, num_workers=1, after_item=Shift())
        return dls
    ended_alike(*stopped_and_resumed(tmp_path, partial(plain, dls), stop=SignalInLoop(1, 1)))

class Shift(Transform):
    def encodes(self, o:tuple): return o[0] + torch.rand(()),o[1]


def test_no_step_is_kept_while_gradients_wait(tmp_path, at_hand, listening_to_ctrl_c):
    "They would be lost: the epoch is what is gone on from"
    learn = plain()
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt):
        learn.fit(3, cbs=[GradientAccumulation(16), Checkpoint(tmp_path/'c'), SignalInLoop(1, 2)])
    state = read_checkpoint(tmp_path/'c')
    assert (state['epoch'], state['part']['n']) == (1, 0)


def test_only_a_fit_is_kept(tmp_path, at_hand, monkeypatch, listening_to_ctrl_c):
    "A learner whose own the checkpoint is, and all that is not a fit"
    monkeypatch.chdir(tmp_path)
    def stopped():
        learn = plain(cbs=[Checkpoint('c', resume=True), SignalInLoop(1, 2)])
        with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(3)
        return learn,Path('c').read_bytes()
    whole = plain()
    with whole.no_bar(), whole.no_logging(): whole.fit(3)
    learn,kept = stopped()
    with learn.no_bar(), learn.no_logging():
        for use in (learn.validate, learn.get_preds, partial(learn.lr_find, num_it=3, show_plot=False, suggest_funcs=None), partial(learn.export, 'e.pkl')):
            use()
            assert Path('c').read_bytes() == kept
        learn.remove_cb(SignalInLoop)
        other = plain(cbs=Checkpoint('c', resume=True)) # as in a cell that is run again
        with other.no_bar(), other.no_logging(): other.fit(3)
        ended_alike(whole, other)
        kept = Path('c').read_bytes()
        for use in (other.validate, other.get_preds): use()
        assert Path('c').read_bytes() == kept and not Path('.c.lock').exists()
        learn.fit(3)
        assert len(history(learn)) == 3


def test_of_two_fits_at_once_the_later_has_the_file(tmp_path, at_hand):
    class Inner(Callback):
        def before_train(self):
            learn = plain()
            with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Checkpoint(tmp_path/'c'))
    learn = plain()
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='c is in use by another fit'): learn.fit(2, cbs=[Checkpoint(tmp_path/'c'), Inner()])
    assert read_checkpoint(tmp_path/'c')['n_epoch'] == 1 and [o.name for o in tmp_path.iterdir()] == ['c']


def test_what_a_checkpoint_is_not_for(tmp_path, at_hand):
    "Is said before anything is trained"
    (tmp_path/'folder').mkdir()
    dls = mnist_dls(valid='reference', n_train=64, device='cpu')
    data = torch.utils.data.TensorDataset(torch.rand(64,1,28,28), torch.arange(64) % 10)
    other = DataLoaders(*(torch.utils.data.DataLoader(data, 64) for _ in range(2)))
    stock = Learner(dls, plain().model, loss_func=torch.nn.functional.nll_loss)
    for learn,file,error in ((stock, 'c', 'that block3_learner has made'), (block3_learner(other), 'c', "for fastai's loaders"), (plain(), 'folder', 'is a folder')):
        class Never(Callback):
            def before_train(self): raise AssertionError
        with learn.no_bar(), learn.no_logging(), pytest.raises((ValueError, OSError), match=error): learn.fit(1, cbs=[Checkpoint(tmp_path/file), Never()])
    assert [o.name for o in tmp_path.iterdir()] == ['folder']


def test_a_finished_run_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    _,folder = train_run(tmp_path/'run', **few | dict(epochs=1))
    def refused(self, missing_ok=False): raise OSError(errno.EROFS, 'Read-only file system', str(self))
    monkeypatch.setattr(Path, 'unlink', refused)
    assert resume_run(folder)[0] is None


def test_stopped_twice_in_an_epoch(tmp_path, at_hand, monkeypatch, listening_to_ctrl_c):
    whole = some_steps(monkeypatch, True, 'fit_tuned')
    for n in (0, 2, 3):
        with pytest.raises(KeyboardInterrupt): some_steps(monkeypatch, True, 'fit_tuned', Checkpoint(tmp_path/'c', resume=True), stop=(1, n))
    learn = some_steps(monkeypatch, True, 'fit_tuned', Checkpoint(tmp_path/'c', resume=True))
    assert same(learn.model.state_dict(), whole.model.state_dict())
    assert history(learn).drop(columns='seconds').equals(history(whole).drop(columns='seconds'))


def test_stopped_while_it_writes(tmp_path, at_hand, monkeypatch, listening_to_ctrl_c):
    "The write comes first"
    fsync = os.fsync
    def interrupted(fd):
        if stat.S_ISREG(os.fstat(fd).st_mode): signal.raise_signal(signal.SIGINT)
        fsync(fd)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, 'fsync', interrupted)
        some_steps(monkeypatch, False, 'fit', Checkpoint(tmp_path/'c'))
    assert read_checkpoint(tmp_path/'c')['part']['n'] == 5
    assert [o.name for o in tmp_path.iterdir()] == ['c']


def test_a_finished_run_has_nothing_left_to_do(tmp_path, capsys):
    _,folder = train_run(tmp_path/'run', **few | dict(epochs=1))
    before = {o: o.read_bytes() for o in folder.iterdir()}
    block3_train.__wrapped__(resume=str(folder))
    assert 'is finished' in capsys.readouterr().out
    assert {o: o.read_bytes() for o in folder.iterdir()} == before


def test_settings_are_kept(tmp_path, capsys):
    "And what is not as it was is said"
    about = dict(json.loads((train_run(tmp_path/'a', **few | dict(epochs=1))[1]/'settings.json').read_text()))
    folder = new_run_dir(tmp_path/'b')
    about['versions']['torch'],about['machine']['threads'] = '1.0',3
    write_whole(folder/'settings.json', json.dumps(about).encode())
    threads = torch.get_num_threads()
    try:
        capsys.readouterr()
        resume_run(folder)
        said = capsys.readouterr().out.splitlines()[0]
        assert re.fullmatch(r'Going on with torch \S+ \(was 1\.0\): the result may differ in its last digits', said)
        assert torch.get_num_threads() == 3
    finally: torch.set_num_threads(threads)


def test_another_path_is_said_at_once(tmp_path, capsys):
    folder = train_run(tmp_path/'run', **few | dict(epochs=2))[1]
    for o in run_files[1:]: (folder/o).unlink()
    learn = block3_learner(mnist_dls(**{k: few[k] for k in ('valid', 'n_train', 'bs', 'device')}), fast=False)
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[Checkpoint(folder/'checkpoint.safetensors'), Cut(0)])
    state = read_checkpoint(folder/'checkpoint.safetensors')
    write_whole(folder/'checkpoint.safetensors', checkpoint_bytes(state | dict(engine='eager')))
    capsys.readouterr()
    resume_run(folder)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == 'It began with the steps: eager, and goes on with: plain' and said[1].startswith('epoch  2/2') and len(said) == 2


def test_a_folder_is_named_as_soon_as_it_can_be_gone_on_with(tmp_path, monkeypatch):
    for begun in (False, True):
        def stop(folder):
            if (folder/'settings.json').exists() == begun: raise KeyboardInterrupt
        monkeypatch.setattr(run_module, '_sync_folder', stop)
        with pytest.raises(KeyboardInterrupt) as e: train_run(tmp_path/str(begun), **few)
        assert getattr(e.value, 'run_folder', None) == (tmp_path/'True' if begun else None)
    monkeypatch.undo()
    monkeypatch.setattr(run_module, '_learner', lambda run: signal.default_int_handler(2, None))
    with pytest.raises(KeyboardInterrupt) as e: resume_run(tmp_path/'True')
    assert e.value.run_folder == tmp_path/'True'


def test_other_ranks_leave_the_files_of_the_first(tmp_path, monkeypatch):
    folder = train_run(tmp_path/'run', **few | dict(epochs=1))[1]
    (folder/'summary.json').unlink()
    (folder/'.checkpoint.safetensors.tmp').touch()
    monkeypatch.setenv('RANK', '1')
    resume_run(folder)
    assert (folder/'.checkpoint.safetensors.tmp').exists() and not (folder/'summary.json').exists()


def test_reproducible_is_kept(tmp_path, monkeypatch):
    "It asks cuDNN, which a CPU does not have, for kernels that compute the same bits each time"
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    for given in (False, True):
        train_run(tmp_path/str(given), reproducible=given, **few | dict(epochs=1))
        assert torch.backends.cudnn.deterministic == given
    torch.backends.cudnn.deterministic = False
    for name in ('summary.json', 'weights.safetensors'): (tmp_path/'True'/name).unlink()
    assert resume_run(tmp_path/'True')[0] and torch.backends.cudnn.deterministic


@pytest.mark.parametrize('kwargs,message', [
    (dict(resume='none'), 'none is no run folder: it has no settings.json'),
    (dict(resume='bad'), 'cannot be read'),
    (dict(resume='odd'), 'is not of a run'),
    (dict(resume='wrong'), "valid='tset'"),
    (dict(resume='none', epochs=3, lr=1.), 'epochs, lr: a run that is resumed keeps the settings'),
])
def test_a_mistake_in_resuming(tmp_path, monkeypatch, kwargs, message):
    monkeypatch.chdir(tmp_path)
    for name,text in dict(bad='{', odd='[1]', wrong=json.dumps(dict(settings=dict(valid='tset'), began='', versions={}, machine={}))).items():
        Path(name).mkdir()
        Path(name, 'settings.json').write_text(text)
    with pytest.raises(SystemExit) as e: block3_train.__wrapped__(**kwargs)
    assert e.value.code.startswith('block3_train: ') and message in e.value.code and '\n' not in e.value.code


def test_a_folder_has_one_process(tmp_path):
    folder = new_run_dir(tmp_path/'run')
    code = f'import fcntl, os, time; fd = os.open({str(folder)!r}, os.O_RDONLY); fcntl.flock(fd, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)'
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE) as p:
        p.stdout.readline()
        with pytest.raises(ValueError, match='in use by another process'): train_run(folder, **few)
        p.kill()
    assert list(folder.iterdir()) == []
    train_run(folder, **few | dict(epochs=1))


def console(folder, *args):
    "`block3_train`, which listens to Ctrl-C, as a job in the background does not"
    return subprocess.Popen([Path(sys.executable).parent/'block3_train', *args], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS='1'), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


@pytest.mark.parametrize('num,code,fast', [(signal.SIGINT, 130, '--fast'), (signal.SIGTERM, 143, '--no_fast')])
def test_signals(tmp_path, num, code, fast):
    "One line on how to go on, which works, from the very step"
    run = dict(epochs=3, n_train=1920, bs=16, valid='reference', device='cpu')
    args = [str(o) for k,v in run.items() for o in (f'--{k}', v)] + ['--no_fast']*(fast == '--no_fast')
    p = console(tmp_path, *args, '--out', 'a run')
    for line in p.stdout:
        if line.startswith('epoch  1'): break
    time.sleep(0.2)
    for _ in range(2): # one is enough, and two are no harm
        p.send_signal(num)
        time.sleep(0.5)
    _,err = p.communicate(timeout=60)
    assert (p.returncode, err) == (code, "block3_train: stopped; go on with: block3_train --resume 'a run'\n")
    state = read_checkpoint(tmp_path/'a run'/'checkpoint.safetensors')
    assert state['epoch'] == 1 and 0 < state['part']['n'] < 120
    q = console(tmp_path, '--resume', 'a run')
    out,err = q.communicate(timeout=60)
    assert (q.returncode, err) == (0, '') and [o[:8] for o in out.splitlines() if o.startswith('epoch')] == ['epoch  2', 'epoch  3']
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: train_run(tmp_path/'whole', fast=fast == '--fast', **run)
    finally: torch.set_num_threads(threads)
    assert same(weights(tmp_path/'a run'), weights(tmp_path/'whole'))


@pytest.mark.parametrize('num,code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize('command', ['block3_train', 'block3_predict'])
def test_stopped_before_it_has_begun(tmp_path, num, code, command):
    "While the libraries are imported, which takes seconds"
    with open(tmp_path/'err', 'w+') as err:
        p = subprocess.Popen([Path(sys.executable).parent/command, 'x.png'], stderr=err, cwd=tmp_path,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        while not any(o in Path(f'/proc/{p.pid}/maps').read_text() for o in ('libtorch', '_pickle')): time.sleep(0.01)
        p.send_signal(num)
        p.wait(60)
        err.seek(0)
        assert (p.returncode, err.read()) == (code, f'{command}: stopped\n')
    assert [o.name for o in tmp_path.iterdir()] == ['err']


class Full:
    "A disk on which the write `n` fails: it is full, or takes a part of it, or the rename does not work"
    def __init__(self, monkeypatch, how, n):
        self.left,self.how = n,how
        for module,name,f in ((os, 'fsync', self.fsync), (os, 'replace', self.replace), (run_module, 'open', self.open)):
            monkeypatch.setattr(module, name, f, raising=False)

    def hit(self, how):
        if how != self.how: return False
        self.left -= 1
        return self.left == -1

    def fsync(self, fd):
        if stat.S_ISREG(os.fstat(fd).st_mode) and self.hit('full'): raise OSError(errno.ENOSPC, 'No space left on device')
        return os_fsync(fd)

    def replace(self, a, b):
        if self.hit('rename'): raise OSError(errno.EIO, 'Input/output error', str(a), None, str(b))
        return os_replace(a, b)

    def open(self, file, mode):
        f = open(file, mode)
        if not self.hit('short'): return f
        class Short:
            __enter__ = lambda o: o
            __exit__ = lambda o, *args: f.close()
            def write(o, data):
                f.write(data[:len(data)//2])
                raise OSError(errno.ENOSPC, 'No space left on device')
        return Short()

os_fsync,os_replace,faults = os.fsync,os.replace,('full', 'short', 'rename')


def failing(monkeypatch, how, work, mended):
    "Do `work` with its write 0 failing, 1 failing and so on, and what is `mended` after each; how many writes there are, which are all that it does"
    for n in range(40):
        with monkeypatch.context() as m:
            disk = Full(m, how, n)
            try: work(n)
            except (OSError, SystemExit) as e: assert 'No space left' in str(e) or 'Input/output' in str(e)
            if disk.left >= 0: return n
        mended(n)


def tidy(folder): assert not [o for o in Path(folder).rglob('*') if o.name.endswith('.tmp')]


@pytest.mark.parametrize('how', faults)
def test_every_write_of_a_run_may_fail(tmp_path, at_hand, monkeypatch, capsys, how):
    "One line that names file and remedy, nothing half written, the last checkpoint as it was; and with room again the run goes on"
    two = few | dict(epochs=2, n_train=16)
    want = weights(train_run(tmp_path/'whole', **two)[1])
    def work(n):
        try: block3_train.__wrapped__(**two, out=str(tmp_path/f'{n}'))
        except SystemExit as e:
            assert e.code.startswith('block3_train: ') and '\n' not in e.code and str(tmp_path/f'{n}') in e.code
            assert ('go on with: block3_train --resume' in e.code) == (n > 0)
            raise
    def mended(n):
        folder = tmp_path/f'{n}'
        tidy(folder)
        if (folder/'checkpoint.safetensors').exists(): read_checkpoint(folder/'checkpoint.safetensors')
        if (folder/'settings.json').exists(): resume_run(folder)
        else: train_run(folder, **two)
        assert same(weights(folder), want), n
    assert failing(monkeypatch, how, work, mended) == 9, 'settings, two checkpoints an epoch, and four files at the end'


@pytest.mark.parametrize('how', faults)
def test_every_write_of_a_sweep_may_fail(tmp_path, at_hand, monkeypatch, how):
    "No table is half written, no run is in it twice or called failed, and the sweep goes on"
    run = run_settings(**few | dict(epochs=1, valid='test'))
    _,folder = train_run(tmp_path/'run', **few | dict(epochs=1, valid='test'))
    files = {o.name: o.read_bytes() for o in folder.iterdir()} | {'mistakes.csv': b'index,label,pred,loss\n1,2,3,0.5\n'}
    monkeypatch.setattr(sweep_module, 'run_alone', lambda *args: files)
    def work(n): sweep([run, run | dict(seed=1)], tmp_path/f'{n}', jobs=1, log=[].append)
    def mended(n):
        tidy(tmp_path/f'{n}')
        work(n)
        study = Study(tmp_path/f'{n}')
        for table in ('study', 'epochs', 'mistakes'): assert sorted(study.read(table).seed) == [0, 1]
        assert not (study.folder/'failures.csv').exists()
        for o in study.done: assert (study.folder/'weights'/f'{o}.safetensors').read_bytes() == files['weights.safetensors']
    assert failing(monkeypatch, how, work, mended) == 8, 'weights and three tables for each run'


@pytest.mark.parametrize('how', faults)
def test_every_write_of_an_export_may_fail(tmp_path, monkeypatch, capsys, how):
    def work(n): block3_export.__wrapped__(formats='safetensors,js', out=str(tmp_path/f'{n}'))
    def mended(n):
        tidy(tmp_path/f'{n}')
        work(n)
        assert {o.name for o in (tmp_path/f'{n}').iterdir()} == {'block3.safetensors', 'block3.js'}
    assert failing(monkeypatch, how, work, mended) == 2


@pytest.mark.parametrize('how', faults)
def test_every_write_of_a_notebooks_checkpoint_may_fail(tmp_path, at_hand, monkeypatch, how):
    def fit(n, **kwargs):
        learn = block3_learner(mnist_dls(valid='reference', n_train=64, device='cpu'))
        with learn.no_bar(), learn.no_logging(): learn.fit(3, cbs=Checkpoint(tmp_path/f'{n}', **kwargs))
        return learn
    def mended(n):
        tidy(tmp_path)
        assert (tmp_path/f'{n}').exists() == (n > 0)
        if n: assert read_checkpoint(tmp_path/f'{n}')['train_iter'] == (n+1)//2
        assert len(history(fit(n, resume=True))) == 3
    assert failing(monkeypatch, how, fit, mended) == 6


def test_killed_in_its_first_write(tmp_path):
    "Nothing is there to go on with: the same command begins anew"
    folder = tmp_path/'run'
    folder.mkdir()
    (folder/'.settings.json.tmp').write_text('{')
    with pytest.raises(ValueError, match='is begun again as it was begun'): resume_run(folder)
    train_run(folder, **few | dict(epochs=1))
    assert {o.name for o in folder.iterdir()} == set(run_files)


def test_killed_in_its_last_act(tmp_path, capsys):
    "The run is finished, and what was to be removed is still there"
    _,folder = train_run(tmp_path/'run', **few | dict(epochs=1))
    for o in ('checkpoint.safetensors', '.plots.png.tmp'): (folder/o).touch()
    block3_train.__wrapped__(resume=str(folder))
    assert 'is finished' in capsys.readouterr().out and {o.name for o in folder.iterdir()} == set(run_files)


def on_a_small_disk(folder):
    "Begin a run where a file may have 20,000 bytes: writes are cut short there, by the system itself"
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    torch.set_num_threads(1)
    try: block3_train.__wrapped__(**few, out=folder)
    except SystemExit as e: os._exit(7 if 'File too large' in e.code and '\n' not in e.code else 8)


def test_short_writes(tmp_path, whole):
    folder = tmp_path/'run'
    p = fork.Process(target=on_a_small_disk, args=(str(folder),))
    p.start()
    p.join()
    assert p.exitcode == 7
    assert [o.name for o in folder.iterdir()] == ['settings.json']
    work(folder, 'reference')
    assert same(weights(folder), whole['reference'][0])


@pytest.mark.slow
def test_compiled_run_goes_on(tmp_path, monkeypatch, listening_to_ctrl_c):
    "To the bit, on the path that long runs on a CPU take"
    monkeypatch.setattr('mnist_block3.fast.compile_steps', 0)
    want = train_run(tmp_path/'a', **few)[0]
    assert want.fast_epoch.engine == 'compiled'
    step,n_done = Steps.__call__,[]
    def interrupted(self, n):
        step(self, n)
        n_done.append(n)
        if len(n_done) == 7: signal.raise_signal(signal.SIGINT)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Steps, '__call__', interrupted)
        train_run(tmp_path/'b', **few)
    assert read_checkpoint(tmp_path/'b'/'checkpoint.safetensors')['part']['n'] == 2
    learn,_ = resume_run(tmp_path/'b')
    assert learn.fast_epoch.engine == 'compiled' and same(weights(tmp_path/'b'), weights(tmp_path/'a'))


def test_a_checkpoint_has_one_fit(tmp_path, at_hand):
    "A lock that goes with the process that holds it, and with the fit, however that ends"
    lock,dls = tmp_path/'.c.lock',mnist_dls(valid='reference', n_train=64, device='cpu')
    def fit(*cbs):
        learn = block3_learner(dls)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[*cbs, Checkpoint(tmp_path/'c')])
    code = f'import fcntl, os, time; fd = os.open({str(lock)!r}, os.O_CREAT); fcntl.flock(fd, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)'
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE) as p:
        p.stdout.readline()
        with pytest.raises(ValueError, match='c is in use by another fit'): fit()
        p.kill()
    assert not (tmp_path/'c').exists()
    class Boom(Callback):
        def before_train(self): 1/0
    with pytest.raises(ZeroDivisionError): fit(Boom())
    assert not lock.exists()
    with locked(tmp_path/'c'), pytest.raises(ValueError, match='in use'): fit()
    fit()
    assert [o.name for o in tmp_path.iterdir()] == ['c']


def test_a_lock_goes_with_the_interpreter(tmp_path):
    "Also that of a fit that Ctrl-C ended, and without a word"
    code = """
import sys
from mnist_block3.all import *
class Stop(Callback):
    def before_train(self): raise KeyboardInterrupt
learn = block3_learner(mnist_dls(valid='reference', n_train=64, device='cpu'), cbs=[Checkpoint(sys.argv[1]), Stop()])
try: learn.fit(1)
except KeyboardInterrupt: print(*Path(sys.argv[1]).parent.iterdir())
"""
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, tmp_path/'c'], capture_output=True, text=True)
    assert p.stdout.strip().endswith('.c.lock') and not p.stderr
    assert not [*tmp_path.iterdir()]


def hold(path, held):
    "Have `path` locked, and a child that lives on"
    os.setsid()
    lock = locked(path)
    lock.__enter__()
    if not os.fork(): held.set()
    time.sleep(60)

def test_a_lock_goes_with_its_process(tmp_path):
    "And not with one that it has forked, as the worker of a loader, which may live longer"
    for path in (tmp_path, tmp_path/'c'):
        held = fork.Event()
        p = fork.Process(target=hold, args=(path, held))
        p.start()
        assert held.wait(60)
        with pytest.raises(ValueError, match='is in use by another'), locked(path): pass
        p.kill()
        p.join()
        with locked(path): os.killpg(p.pid, signal.SIGKILL) # the child was alive


def test_a_checkpoint_of_another_fit(tmp_path):
    def fit(n, bs=64, how='fit', lr=None, **kwargs):
        learn = block3_learner(mnist_dls(valid='reference', n_train=64, bs=bs, device='cpu'))
        with learn.no_bar(), learn.no_logging(): getattr(learn, how)(n, lr or learn.lr, cbs=Checkpoint(**dict(file=tmp_path/'c') | kwargs))
    fit(2)
    with pytest.raises(ValueError, match=r'c is of a fit with lr=\[0.02\], not \[0.5\]'): fit(2, lr=0.5, resume=True)
    with pytest.raises(ValueError, match='c: The checkpoint is not of this fit: it has another schedule'): fit(2, how='fit_one_cycle', resume=True)
    with pytest.raises(ValueError, match='is of a fit of 2 epochs, not 3'): fit(3, resume=True)
    with pytest.raises(ValueError, match='c: The checkpoint is not of this fit: it is of 64 images, 64 a step, not of 64, 32'): fit(2, bs=32, resume=True)
    with pytest.raises(FileNotFoundError, match='none is no folder'): fit(2, file=tmp_path/'none'/'c')
