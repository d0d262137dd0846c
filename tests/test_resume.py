"A run that dies, at any moment, by a signal or on a full disk; and the one that resumes it"
import copy, errno, json, multiprocessing, os, random, signal, subprocess, sys, time
from functools import partial
from pathlib import Path
import pytest, torch
from fastai.optimizer import Adam, ranger
from safetensors.torch import load_file
from mnist_block3 import sweep as sweep_module
from mnist_block3.all import (Callback, Checkpoint, DataLoaders, EarlyStoppingCallback, Learner, OptimWrapper,
                              SaveModelCallback, ShowGraphCallback, Study, block3_learner, history, mnist_dls,
                              new_run_dir, read_checkpoint, resume_run, run_files, run_settings, set_seed, sweep, train_run)
from mnist_block3.cli import block3_export, block3_train

few = dict(epochs=4, n_train=40, bs=8, valid='reference', device='cpu')
fork = multiprocessing.get_context('forkserver')
fork.set_forkserver_preload(['mnist_block3.all'])


def weights(folder): return load_file(Path(folder)/'weights.safetensors')

def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

def visible(folder): return {f.name for f in Path(folder).iterdir() if not f.name.startswith('.')}


# killed

def work(folder, recipe):
    "Begin a run or resume it, in a process of its own"
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, 'w')
    if (Path(folder)/'settings.json').exists(): resume_run(folder)
    else: train_run(folder, recipe=recipe, **few)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Weights at the end of runs that nothing has happened to, and how long they took"
    made = {}
    fork.Process(target=print).start() # the server starts with the first
    for recipe in ('reference', 'tuned'):
        folder = tmp_path_factory.mktemp(recipe)/'run'
        began = time.perf_counter()
        p = fork.Process(target=work, args=(folder, recipe))
        p.start()
        p.join()
        assert p.exitcode == 0
        made[recipe] = weights(folder), time.perf_counter() - began
    return made


def kill_until_it_ends(folder, recipe, whole, rng):
    "Kill a run at random moments until it has ended by itself; how often that was"
    want,took = whole[recipe]
    for n_kills in range(100):
        p = fork.Process(target=work, args=(folder, recipe))
        p.start()
        p.join(rng.uniform(0.2, 1.1 + n_kills/10)*took) # a busy machine gets more and more time
        alive = p.is_alive()
        p.kill()
        p.join()
        if not alive and p.exitcode == 0: break
    assert same(weights(folder), want)
    assert visible(folder) - {'checkpoint.safetensors'} == set(run_files)
    return n_kills


@pytest.mark.parametrize('n', [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path, whole, n):
    rng = random.Random(n)
    n_kills = 0
    for i in range(100):
        n_kills += kill_until_it_ends(tmp_path/str(i), ('reference', 'tuned')[i%2], whole, rng)
        if n_kills >= n: break


# resumed, by each schedule and optimizer

class Stop(Callback):
    "End the fit in an epoch, as Ctrl-C does"
    order = 99
    def __init__(self, epoch): self.last = epoch
    def after_train(self):
        if self.epoch == self.last: raise KeyboardInterrupt


def new_learner(fast=False, **kwargs):
    set_seed(0)
    learn = block3_learner(mnist_dls(valid='reference', n_train=38, bs=8, device='cpu'), fast=fast, **kwargs)
    return learn


def fit(learn, *cbs, how='fit', n=3, **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(n, cbs=cbs, **kwargs)
    return learn


def assert_alike(a, b):
    assert a.fast_epoch.engine == b.fast_epoch.engine
    assert same(a.model.state_dict(), b.model.state_dict())
    assert history(a).drop(columns='seconds').equals(history(b).drop(columns='seconds'))
    for name in ('losses', 'lrs', 'iters', 'values', 'hps'):
        assert getattr(a.recorder, name) == getattr(b.recorder, name), name


sgd_like = partial(OptimWrapper, opt=torch.optim.AdamW)

@pytest.mark.parametrize('how,kwargs', [
    ('fit', dict(fast=True)), ('fit_tuned', dict(fast=True)), ('fit', dict(step_size=1)), ('fit_tuned', {}),
    ('fit_one_cycle', dict(opt_func=Adam)), ('fit_flat_cos', dict(opt_func=ranger)), ('fit', dict(opt_func=sgd_like)),
], ids=lambda o: o if isinstance(o, str) else ','.join(o))
def test_resumed_to_the_bit(tmp_path, at_hand, how, kwargs):
    alone = fit(new_learner(**kwargs), how=how)
    with pytest.raises(KeyboardInterrupt): fit(new_learner(**kwargs), Checkpoint(tmp_path/'c'), Stop(1), how=how)
    resumed = fit(new_learner(**kwargs), Checkpoint(tmp_path/'c', resume=True), how=how)
    assert_alike(alone, resumed)
    assert [f.name for f in tmp_path.iterdir()] == ['c']


# in a notebook

def test_trackers_begin_anew(tmp_path, at_hand, monkeypatch):
    "They see no skipped epoch but the last, whose model is there"
    monkeypatch.chdir(tmp_path)
    def trackers():
        early = EarlyStoppingCallback('train_loss', patience=9)
        return [SaveModelCallback('train_loss', every_epoch=True), early, ShowGraphCallback()]
    with pytest.raises(KeyboardInterrupt): new_learner().fit(3, cbs=[Checkpoint('c'), Stop(2), *trackers()])
    for file in Path('models').iterdir(): file.unlink()
    learn = new_learner()
    learn.fit(3, cbs=[Checkpoint('c', resume=True), *trackers()])
    assert_alike(learn, fit(new_learner()))
    assert sorted(file.name for file in Path('models').iterdir()) == ['model_1.pth', 'model_2.pth']


def test_only_a_fit_is_kept(tmp_path, at_hand, monkeypatch):
    "Evaluations and `lr_find` leave the file of a learner alone; the next fit resumes it, the one after begins anew"
    monkeypatch.chdir(tmp_path)
    learn = new_learner(cbs=Checkpoint('c', resume=True))
    with pytest.raises(KeyboardInterrupt): fit(learn, Stop(2))
    kept = Path('c').read_bytes()
    lr_find = partial(learn.lr_find, num_it=3, show_plot=False, suggest_funcs=None)
    with learn.no_bar(), learn.no_logging():
        for use in (learn.validate, learn.get_preds, lr_find):
            use()
            assert Path('c').read_bytes() == kept
    assert history(fit(learn)).epoch.tolist() == [1, 2, 3]
    assert_alike(learn, fit(new_learner()))
    class Count(Callback):
        n = 0
        def before_train(self): self.n += 1
    count = Count()
    fit(learn, count)
    assert count.n == 3


def test_a_finished_fit_is_loaded(tmp_path, at_hand):
    "As in a cell that is run again"
    done = fit(new_learner(fast=True), Checkpoint(tmp_path/'c', resume=True))
    assert_alike(done, fit(new_learner(fast=True), Checkpoint(tmp_path/'c', resume=True)))


def test_a_checkpoint_of_another_fit(tmp_path, at_hand):
    fit(new_learner(), Checkpoint(tmp_path/'c'))
    def refused(what, learn, **kwargs):
        with pytest.raises(ValueError, match=f'c is of another fit, with other {what}'):
            fit(learn, Checkpoint(tmp_path/'c', resume=True), **kwargs)
    refused('epochs', new_learner(), n=4)
    refused('rates', new_learner(), lr=0.5)
    refused('schedules', new_learner(), how='fit_one_cycle', lr_max=0.5)
    refused('optimizer, rates', new_learner(opt_func=Adam))
    dls = mnist_dls(valid='reference', n_train=64, bs=16, device='cpu')
    refused('images, batch_size', block3_learner(dls))
    refused('shapes', new_learner(model=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))))


def test_what_a_checkpoint_is_not_for(tmp_path):
    "Is told before anything is trained"
    dls = mnist_dls(valid='reference', n_train=64, device='cpu')
    stock = Learner(dls, new_learner().model, loss_func=torch.nn.functional.nll_loss)
    data = torch.utils.data.TensorDataset(torch.rand(64,1,28,28), torch.arange(64) % 10)
    other = block3_learner(DataLoaders(*(torch.utils.data.DataLoader(data, 64) for _ in range(2))))
    wrong = 'learners made by block3_learner'
    for learn,file,error in ((stock, 'c', wrong), (other, 'c', wrong), (new_learner(), 'none/c', 'is no folder')):
        with pytest.raises((ValueError, OSError), match=error): fit(learn, Checkpoint(tmp_path/file), Stop(0))


# a run folder

def test_settings_are_kept_and_changes_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', False)
    threads = torch.get_num_threads()
    _,folder = train_run(tmp_path/'run', reproducible=True, **few | dict(epochs=1))
    (folder/'summary.json').unlink()
    about = json.loads((folder/'settings.json').read_text())
    about['versions']['torch'] = '1.0'
    about['machine']['threads'] = 3
    (folder/'settings.json').write_text(json.dumps(about))
    torch.backends.cudnn.deterministic = False
    capsys.readouterr()
    resume_run(folder)
    assert "(was '1.0'): the result may differ" in capsys.readouterr().out.splitlines()[0]
    assert torch.get_num_threads() == 3 and torch.backends.cudnn.deterministic
    torch.set_num_threads(threads)


def test_a_finished_run_has_nothing_left_to_do(tmp_path, capsys):
    _,folder = train_run(tmp_path/'run', **few | dict(epochs=1))
    before = {f: f.read_bytes() for f in folder.iterdir()}
    block3_train(resume=str(folder))
    assert 'is finished' in capsys.readouterr().out
    assert {f: f.read_bytes() for f in folder.iterdir()} == before


@pytest.mark.parametrize('text,message', [
    (None, 'is no run folder: it has no settings.json'), ('[1]', 'settings.json cannot be used'),
    (json.dumps(dict(settings=dict(valid='tset'))), "valid='tset'")])
def test_a_mistake_in_resuming(tmp_path, text, message):
    if text: (tmp_path/'settings.json').write_text(text)
    with pytest.raises(ValueError, match=message): resume_run(tmp_path)


def test_a_folder_has_one_process(tmp_path):
    "Another process, which is then killed, and leaves no stale lock"
    folder = new_run_dir(tmp_path/'run')
    code = f'from mnist_block3.basics import locked; import time\n' \
           f'with locked({str(folder)!r}): print(1, flush=True); time.sleep(60)'
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE) as p:
        p.stdout.readline()
        with pytest.raises(ValueError, match='in use by another process'): train_run(folder, **few)
        p.kill()
    train_run(folder, **few | dict(epochs=1))


# signals

def console(folder, *args):
    "`block3_train`, which listens to Ctrl-C, as a job in the background does not"
    def listen(): signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen([Path(sys.executable).parent/'block3_train', *args], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen,
                            env=os.environ | dict(OMP_NUM_THREADS='1'))


@pytest.mark.parametrize('num,code', [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_signals(tmp_path, num, code):
    "One line on how to resume, which works"
    run = dict(epochs=3, n_train=960, bs=16, valid='reference', device='cpu')
    args = [str(part) for k,v in run.items() for part in (f'--{k}', v)]
    p = console(tmp_path, *args, '--out', 'a run')
    for line in p.stdout:
        if line.startswith('epoch  1'): break
    p.send_signal(num)
    _,err = p.communicate(timeout=60)
    assert (p.returncode, err) == (code, "block3_train: stopped; resume it with: block3_train --resume 'a run'\n")
    assert read_checkpoint(tmp_path/'a run'/'checkpoint.safetensors')['epoch'] == 1
    learn,folder = resume_run(tmp_path/'a run')
    torch.set_num_threads(1)
    train_run(tmp_path/'whole', **run)
    assert same(weights(folder), weights(tmp_path/'whole'))


def test_stopped_while_it_imports(tmp_path):
    p = console(tmp_path)
    while 'libtorch' not in Path(f'/proc/{p.pid}/maps').read_text(): time.sleep(0.01)
    p.send_signal(signal.SIGTERM)
    assert (p.communicate(timeout=60)[1], p.returncode) == ('block3_train: stopped\n', 143)
    assert list(tmp_path.iterdir()) == []


# full disks

full = 'fsync', OSError(errno.ENOSPC, 'No space left on device')
no_rename = 'replace', OSError(errno.EIO, 'Input/output error', 'a', None, 'b')

def n_writes(monkeypatch, how, work, mended):
    "Do `work` with each of its writes failing in turn, and what is `mended` after each; how many writes there are"
    name,error = how
    func = getattr(os, name)
    for n in range(40):
        calls = []
        def failing(*args):
            calls.append(args)
            if len(calls) == n + 1: raise copy.copy(error)
            return func(*args)
        with monkeypatch.context() as m:
            m.setattr(os, name, failing)
            try: work(n)
            except OSError as e: assert error.strerror in str(e)
        if len(calls) <= n: return n
        mended(n)


def tidy(folder): assert not list(Path(folder).rglob('*.tmp'))


@pytest.mark.parametrize('how', [full, pytest.param(no_rename, marks=pytest.mark.slow)], ids=['full', 'rename'])
def test_every_write_of_a_run_may_fail(tmp_path, at_hand, monkeypatch, how):
    "The last checkpoint is whole, the error says how to resume, and with room again the run goes on"
    two = few | dict(epochs=2, n_train=16)
    want = weights(train_run(tmp_path/'whole', **two)[1])
    def work(n):
        try: block3_train(**two, out=str(tmp_path/f'{n}'))
        except OSError as e:
            assert ('resume it with: block3_train --resume' in str(getattr(e, '__notes__', ''))) == (n > 0)
            raise
    def mended(n):
        folder = tmp_path/f'{n}'
        tidy(folder)
        if (folder/'settings.json').exists(): resume_run(folder)
        else: train_run(folder, **two)
        assert same(weights(folder), want), n
    assert n_writes(monkeypatch, how, work, mended) == 7, 'settings, a checkpoint an epoch, and four files at the end'


@pytest.mark.slow
@pytest.mark.parametrize('how', [full, no_rename], ids=['full', 'rename'])
def test_every_write_of_a_sweep_may_fail(tmp_path, at_hand, monkeypatch, how):
    "No table is half written, no run is in it twice or called failed, and the sweep goes on"
    run = run_settings(**few | dict(epochs=1, valid='test'))
    _,folder = train_run(tmp_path/'run', **few | dict(epochs=1, valid='test'))
    files = {f.name: f.read_bytes() for f in folder.iterdir() if f.name in run_files}
    files['mistakes.csv'] = b'index,label,pred,loss\n1,2,3,0.5\n'
    monkeypatch.setattr(sweep_module, '_run_alone', lambda *args: files)
    def work(n): sweep([run, run | dict(seed=1)], tmp_path/f'{n}', jobs=1, log=[].append)
    def mended(n):
        tidy(tmp_path/f'{n}')
        work(n)
        study = Study(tmp_path/f'{n}')
        for table in ('study', 'epochs', 'mistakes'): assert sorted(study.read(table).seed) == [0, 1]
        assert not (study.folder/'failures.csv').exists()
    assert n_writes(monkeypatch, how, work, mended) == 8, 'weights and three tables for each run'


@pytest.mark.slow
def test_every_write_of_an_export_may_fail(tmp_path, monkeypatch):
    def work(n): block3_export(formats='safetensors,js', out=str(tmp_path/f'{n}'))
    def mended(n):
        tidy(tmp_path/f'{n}')
        work(n)
        assert visible(tmp_path/f'{n}') == {'block3.safetensors', 'block3.js'}
    assert n_writes(monkeypatch, full, work, mended) == 2
