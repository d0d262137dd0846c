"Sweeps: every run once, nothing lost, nothing dropped in silence, and the same results as the run by itself"
import io, json, os, signal, subprocess, sys, threading, time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load
from mnist_block3 import sweep as sweep_module
from mnist_block3.all import run_name, Study, sweep, sweep_grid, train_run
from mnist_block3.basics import locked
from mnist_block3.cli import block3_sweep

small = dict(epochs=1, n_train=320, device='cpu')
results = Path(__file__).parent.parent/'nbs'/'results'
tables = 'study','epochs','mistakes'


@pytest.fixture(scope='session')
def real(once):
    "A run in its own process, and the contents of its files"
    run = sweep_grid(['tuned'], [5], **small)[0]
    def fill(folder):
        for name,data in sweep_module._run_alone(run).items(): (folder/name).write_bytes(data)
    folder = once('sweep_run', fill)
    return run, {file.name: file.read_bytes() for file in folder.iterdir()}


class FakeRuns:
    "In place of `_run_alone`: each run has the same files; `fails` says how often a seed fails first"
    def __init__(self, files):
        self.files = files
        self.fails = {}
        self.did = []

    def __call__(self, run, threads, stop):
        seed = run['seed']
        self.did.append(seed)
        self.fails[seed] = self.fails.get(seed, 0) - 1
        if self.fails[seed] >= 0: raise RuntimeError('it broke')
        return self.files


@pytest.fixture
def fake(monkeypatch, real):
    fake = FakeRuns(real[1])
    monkeypatch.setattr(sweep_module, '_run_alone', fake)
    return fake


def quiet_sweep(runs, out, **kwargs):
    "The tables, and the lines that the sweep printed"
    lines = []
    return sweep(runs, out, log=lines.append, **kwargs), lines


@pytest.mark.parametrize('folder', ['ablation', 'search'])
def test_recorded_runs_keep_their_names(folder):
    "Otherwise a sweep would do them again"
    rows = Study(results/folder).read().to_dict('records')
    assert [run_name(row) for row in rows] == [row['run'] for row in rows]


def test_a_run_has_one_name(real, fake, tmp_path):
    "In the settings and in its row of the table, by numbers of Python and of NumPy"
    run = real[0]
    row = quiet_sweep([run], tmp_path)[0].read().to_dict('records')[0]
    assert run_name(row) == row['run'] == run_name(run)
    assert sweep_module._label(row) == sweep_module._label(run)
    numpys = sweep_grid(['tuned'], np.array([5]), dict(wd=np.array([0.])), **small)[0]
    assert run_name(numpys) == run_name(run)
    assert run_name(run | dict(reproducible=True)) != run_name(run) != run_name(run | dict(n_train=640))


def test_a_run_alone_is_the_run_itself(real, tmp_path):
    "To the bit, since both have one thread"
    run,files = real
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: learn,_ = train_run(**run, out=tmp_path/'run')
    finally: torch.set_num_threads(n_threads)
    torch.testing.assert_close(learn.model.state_dict(), load(files['weights.safetensors']), rtol=0, atol=0)
    probs,targs = learn.get_preds()
    wrong = (probs.argmax(1) != targs).nonzero()[:,0].tolist()
    assert pd.read_csv(io.BytesIO(files['mistakes.csv']))['index'].tolist() == wrong
    assert json.loads(files['summary.json'])['machine']['threads'] == 1


def test_each_run_once(fake, tmp_path):
    runs = sweep_grid(['tuned'], range(4), **small)
    quiet_sweep(runs[:2], tmp_path)
    study,_ = quiet_sweep(runs + runs, tmp_path, jobs=3, command='this one')
    assert sorted(fake.did) == [0, 1, 2, 3]
    for name in tables: assert set(study.read(name).run) == {run_name(run) for run in runs}
    assert study.read().command.fillna('').tolist() == ['', '', 'this one', 'this one']
    assert {file.stem for file in (tmp_path/'weights').iterdir()} == study.done


def test_columns_and_rows_of_others_stay(fake, tmp_path):
    "An old row has few values, and a column that no sweep writes"
    old = pd.DataFrame([dict(run='old', recipe='tuned', seed=5, accuracy=0.99, note='redrawn')])
    old.to_csv(tmp_path/'study.csv', index=False)
    run = sweep_grid(['tuned'], [5], **small, also_reference=True)[0]
    study,_ = quiet_sweep([run], tmp_path)
    assert study.read().run.tolist() == ['old', run_name(run)]
    assert study.read().note.tolist()[0] == 'redrawn' and study.read()[list(old)].iloc[:1].equals(old)
    assert study.of('tuned', epochs=1, n_train=320).run.tolist() == [run_name(run)]


def test_a_run_without_the_references_evaluation_is_done_again(fake, tmp_path):
    "Where that is asked for; its new rows take the place of the old ones"
    runs = sweep_grid(['tuned'], range(2), **small)
    both = sweep_grid(['tuned'], range(2), **small, also_reference=True)
    for todo in (runs, both[:1], both, runs, both): study,_ = quiet_sweep(todo, tmp_path, jobs=1)
    assert fake.did == [0, 1, 0, 1]
    assert len(study.read()) == len(study.read('epochs')) == 2 and study.read().also_reference.all()


def test_a_failed_run_is_tried_again_and_then_listed(fake, tmp_path):
    runs = sweep_grid(['tuned'], range(3), **small)
    fake.fails = {0: 1, 1: 9}
    study,lines = quiet_sweep(runs, tmp_path)
    assert sorted(fake.did) == [0, 0, 1, 1, 2] and sorted(study.read().seed) == [0, 2]
    failure = study.read('failures').iloc[0]
    assert (failure.seed, failure.attempts, failure.error) == (1, 2, 'it broke')
    assert json.loads(failure.settings) == runs[1]
    assert 'tuned seed 1 failed: it broke' in lines
    fake.fails = {}
    assert sorted(quiet_sweep(runs, tmp_path)[0].read().seed) == [0, 1, 2]
    assert not (tmp_path/'failures.csv').exists()


def test_console_names_only_failures_of_its_own_runs(fake, tmp_path, capsys):
    def call(seeds):
        block3_sweep(recipes='tuned', seeds=seeds, out=str(tmp_path), retries=0, **small)
    fake.fails = {0: 9}
    with pytest.raises(RuntimeError, match='1 runs failed, see .*failures.csv'): call('0')
    call('1')
    assert 'The tables are in' in capsys.readouterr().out and len(Study(tmp_path).read('failures')) == 1


def test_a_run_that_diverged_is_a_result(fake, tmp_path):
    summary = json.loads(fake.files['summary.json'])
    summary['results']['loss'] = None
    fake.files = fake.files | {'summary.json': json.dumps(summary).encode()}
    study,lines = quiet_sweep(sweep_grid(['tuned'], range(2), **small), tmp_path)
    assert len(study.read()) == 2 and study.read().loss.isna().all() and 'loss nan' in lines[1]


@pytest.mark.parametrize('after', ['weights', 'epochs', 'mistakes'])
def test_killed_between_two_tables(fake, tmp_path, monkeypatch, after):
    runs = sweep_grid(['tuned'], range(2), **small)
    study,_ = quiet_sweep(runs[:1], tmp_path)
    write = sweep_module.write_whole
    def write_and_die(path, data):
        write(path, data)
        if after in (path.parent.name, path.stem): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(sweep_module, 'write_whole', write_and_die)
        with pytest.raises(KeyboardInterrupt): quiet_sweep(runs, tmp_path)
    assert study.done == {run_name(runs[0])}
    quiet_sweep(runs, tmp_path)
    assert fake.did == [0, 1, 1]
    for name in tables: assert study.read(name).groupby('run').size().nunique() == 1
    assert sorted(study.read().seed) == sorted(study.read('epochs').seed) == [0, 1]


def test_ctrl_c_ends_the_processes(tmp_path, monkeypatch, listening_to_ctrl_c):
    processes = []
    start = sweep_module._start
    def noted_start(*args):
        processes.append(start(*args))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return processes[-1]
    monkeypatch.setattr(sweep_module, '_start', noted_start)
    runs = sweep_grid(['tuned'], range(2), **small)
    with pytest.raises(KeyboardInterrupt): quiet_sweep(runs, tmp_path, jobs=1)
    assert len(processes) == 1 and processes[0].poll() == -signal.SIGTERM


def test_time_left(fake, tmp_path, monkeypatch):
    "By the epochs that are left, the seconds of one, and the runs at once"
    add_run = sweep_module._add_run
    monkeypatch.setattr(sweep_module, '_add_run', lambda *args: add_run(*args) | dict(seconds=300.))
    _,lines = quiet_sweep(sweep_grid(['tuned'], range(5), **small), tmp_path, jobs=2)
    left = [line.partition('about ')[2] for line in lines[1:]]
    assert left == ['0:10:00 left', '0:07:30 left', '0:05:00 left', '0:02:30 left', '']


def test_one_sweep_a_folder(fake, tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match='is in use by another process'):
        quiet_sweep(sweep_grid(['tuned'], [0], **small), tmp_path)
    assert fake.did == []


def test_ray_gets_the_same_runs(monkeypatch, tmp_path, real):
    "What goes to Ray, without Ray"
    asked = []
    def remote(run, threads):
        asked.append((run['seed'], threads))
        future = Future()
        future.set_result(real[1])
        return SimpleNamespace(future=lambda: future)
    ray = MagicMock()
    ray.nodes.return_value = [dict(Alive=True, Resources=dict(CPU=3., memory=1e9))]
    ray.remote.return_value.options.return_value.remote = remote
    monkeypatch.setitem(sys.modules, 'ray', ray)
    runs = sweep_grid(['tuned'], [1, 2], **small)
    study,lines = quiet_sweep(runs, tmp_path, ray=True, address='10.0.0.1:6379')
    assert '3 at once on Ray' in lines[0] and sorted(study.read().seed) == [1, 2]
    assert asked == [(1, 1), (2, 1)]
    assert ray.init.call_args.kwargs['address'] == '10.0.0.1:6379' and ray.shutdown.called
    ray.remote.return_value.options.assert_called_with(num_cpus=1, num_gpus=0, max_retries=3)


@pytest.mark.slow
def test_on_ray(real, tmp_path, monkeypatch):
    "On a Ray of its own, the same weights as in a process"
    pytest.importorskip('ray')
    monkeypatch.setenv('RAY_ADDRESS', 'local')
    run,files = real
    quiet_sweep([run], tmp_path, ray=True)
    assert (tmp_path/'weights'/f'{run_name(run)}.safetensors').read_bytes() == files['weights.safetensors']


bad = {
    'seeds':   (dict(seeds='1-b'), "seeds='1-b': seeds are numbers and ranges"),
    'setting': (dict(settings='wd=1'), 'wd: the reference recipe has no such setting'),
    'value':   (dict(settings='lr=a'), "lr='a': lr is a number above 0"),
    'valid':   (dict(valid='tset'), "valid='tset'"),
    'device':  (dict(device='gpu'), "device='gpu'"),
    'jobs':    (dict(jobs=-1), 'jobs=-1'),
    'address': (dict(address='10.0.0.1:6379'), 'an address is for Ray'),
    'ray':     (dict(ray=True), "Ray is not installed; install it by pip install -e '.[sweep]'"),
    'out':     (dict(out='file/x'), 'file/x'),
}


@pytest.mark.parametrize('case', bad)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, case):
    kwargs,message = bad[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'ray', None)
    (tmp_path/'file').touch()
    with pytest.raises((ValueError, OSError)) as e: block3_sweep(**{**small, 'seeds': '0', **kwargs})
    assert message in str(e.value) and '\n' not in str(e.value)
    assert [file.name for file in tmp_path.iterdir()] == ['file']


def console(*args, cwd):
    "`block3_sweep`, whose runs have `cwd` in their command lines, since their files are there"
    command = [Path(sys.executable).parent/'block3_sweep', *args]
    def hear_ctrl_c(): signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, cwd=cwd, env=os.environ | dict(TMPDIR=str(cwd)), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c)


def runs_of(folder):
    "The processes of the runs that a sweep does in `folder`"
    return subprocess.run(['pgrep', '-f', f'_child.*{folder}'], capture_output=True, text=True).stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize('sig,code', [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_console_stopped_and_started_again(tmp_path, sig, code):
    "Stopped in its second run, it leaves no process behind, and the next one does what is left"
    args = ['--seeds=0,1', '--epochs=1', '--n_train=320', '--valid=reference',
            '--jobs=1', '--threads=1', '--out=here']
    p = console(*args, cwd=tmp_path)
    assert '2 runs, 0 of them done; 1 at once' in p.stdout.readline()
    assert '1/2  reference seed 0' in p.stdout.readline()
    while not runs_of(tmp_path): time.sleep(0.1)
    p.send_signal(sig)
    _,err = p.communicate(timeout=60)
    assert p.returncode == code
    if sig == signal.SIGINT: assert err == 'block3_sweep: stopped; run the same command again to resume\n'
    began = time.monotonic()
    while runs_of(tmp_path): assert time.monotonic() - began < 60 # a run may have to end its imports first
    q = console(*args, cwd=tmp_path)
    out,err = q.communicate(timeout=120)
    assert (q.returncode, err) == (0, '')
    assert '2 runs, 1 of them done' in out and 'The tables are in here' in out
    assert sorted(Study(tmp_path/'here').read().seed) == [0, 1]
