"Sweeps: every run once, nothing lost, nothing dropped in silence, and the same results as the run by itself"
import io, json, os, signal, subprocess, sys, time
from concurrent.futures import Future
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load
from mnist_block3 import sweep as sweep_module
from mnist_block3.all import Block3, locked, mnist_dls, run_alone, run_label, run_name, Study, sweep, sweep_grid, train_run
from mnist_block3.cli import block3_sweep, parse_seeds

small = dict(epochs=1, n_train=320, device='cpu')
tables = 'study','epochs','mistakes'


def console(*args, cwd, **kwargs):
    return subprocess.Popen([Path(sys.executable).parent/'block3_sweep', *args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **kwargs)


@pytest.fixture(scope='module')
def real():
    "A run in a process of its own, and what came of it"
    run = sweep_grid(['tuned'], [5], **small)[0]
    return run,run_alone(run)


@pytest.fixture
def fake(monkeypatch, real):
    "Let runs cost nothing; `fake.fails` says how often a seed fails first, `fake.did` which were begun"
    class Fake:
        def __init__(self): self.fails,self.did,self.files,self.error = {},[],real[1],RuntimeError('it broke')
        def __call__(self, run, threads, started):
            self.did.append(run['seed'])
            if self.fails.get(run['seed'], 0) > 0:
                self.fails[run['seed']] -= 1
                raise self.error
            return self.files
    fake = Fake()
    monkeypatch.setattr(sweep_module, 'run_alone', fake)
    return fake


def test_grid():
    runs = sweep_grid(['reference', 'tuned'], [0, 1], dict(lr=[0.01, 0.02], mom=[0.9, 0.8]), epochs=3, valid='holdout')
    assert len(runs) == 16 == len({run_name(o) for o in runs})
    assert all((o['epochs'], o['valid']) == (3, 'holdout') for o in runs)
    assert {(o['lr'], o['mom']) for o in runs} == {(0.01, 0.9), (0.01, 0.8), (0.02, 0.9), (0.02, 0.8)}
    assert [(o['recipe'], o['epochs']) for o in sweep_grid(['reference', 'tuned'], [0])] == [('reference', 15), ('tuned', 14)]
    with pytest.raises(ValueError, match='wd: the reference recipe has no such setting'): sweep_grid(settings=dict(wd=[0.]))
    with pytest.raises(ValueError, match="recipe='x'"): sweep_grid(['x'])
    with pytest.raises(ValueError, match="valid='x'"): sweep_grid(valid='x')


def test_a_run_is_named_for_what_its_result_follows_from(fake, tmp_path):
    runs = sweep_grid(['reference', 'tuned'], [0], dict(lr=[0.1, 0.05]), **small)
    assert len({run_name(o) for o in runs}) == 4
    assert run_name(runs[0]) == run_name(runs[0] | dict(device='cuda', also_reference=True)) != run_name(runs[0] | dict(n_train=640))
    assert run_name(runs[0]) == run_name({k: v for k,v in runs[0].items() if k != 'reproducible'}) != run_name(runs[0] | dict(reproducible=True))
    rows = sweep(runs, tmp_path, log=[].append).read().to_dict('records')
    assert {run_name(o) for o in rows} == {o['run'] for o in rows} == {run_name(o) for o in runs}
    assert {run_label(o) for o in rows} == {run_label(o) for o in runs}


def test_what_numpy_gives_is_a_setting_too(real):
    run = sweep_grid(['tuned'], np.array([5]), dict(wd=np.array([0.])), **small)[0]
    assert json.dumps(run) and run_name(run) == run_name(real[0])


def test_a_run_alone_is_the_run_itself(real, tmp_path):
    "To the bit, since both have one thread"
    run,files = real
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try: learn,_ = train_run(**run, out=tmp_path/'run')
    finally: torch.set_num_threads(n)
    ours = load(files['weights.safetensors'])
    assert all(torch.equal(v.cpu(), ours[k]) for k,v in learn.model.state_dict().items())
    model,dl = Block3(),mnist_dls(n_train=320, device='cpu').valid
    model.load_state_dict(ours)
    pred = torch.cat([model.eval()(xb).argmax(1) for xb,_ in dl])
    wrong = (pred != dl.dataset.items.labels).nonzero()[:,0]
    found = pd.read_csv(io.BytesIO(files['mistakes.csv']))
    assert found['index'].tolist() == wrong.tolist() and found.prediction.tolist() == pred[wrong].tolist()
    assert json.loads(files['summary.json'])['results']['correct'] == 10_000 - len(wrong)
    assert json.loads(files['summary.json'])['machine']['threads'] == 1


def test_each_run_once(fake, tmp_path):
    runs = sweep_grid(['tuned'], range(4), **small)
    sweep(runs[:2], tmp_path, log=[].append)
    study = sweep(runs + runs, tmp_path, log=[].append, jobs=3, command='this one')
    assert sorted(fake.did) == [0, 1, 2, 3]
    found = study.read()
    assert sorted(found.seed) == [0, 1, 2, 3] and list(found)[:8] == ['recipe', 'seed', 'epochs', 'valid', 'accuracy', 'loss', 'correct', 'total']
    assert list(found.command.fillna('')) == ['', '', 'this one', 'this one']
    assert {'lr', 'mom', 'wd', 'device', 'torch', 'threads', 'date', 'engine'} <= set(found)
    for name in tables: assert set(study.read(name).run) == {run_name(o) for o in runs}
    assert len(study.read('epochs')) == 4 and not (tmp_path/'failures.csv').exists()
    assert {o.stem for o in (tmp_path/'weights').iterdir()} == study.done


def test_a_run_that_was_not_judged_both_ways_is_done_again(fake, tmp_path):
    "Where that is asked for; its old rows go"
    runs = sweep_grid(['tuned'], range(2), **small)
    both = sweep_grid(['tuned'], range(2), **small, also_reference=True)
    for o in (runs, both[:1], both, runs, both): study = sweep(o, tmp_path, log=[].append, jobs=1)
    assert fake.did == [0, 1, 0, 1]
    for name in tables: assert sorted(study.read(name).drop_duplicates(['run', 'seed']).seed) == [0, 1]
    assert len(study.read()) == 2 and study.read().also_reference.all() and len(study.read('epochs')) == 2


def test_the_runs_of_a_recipe(fake, tmp_path):
    runs = sweep_grid(['tuned', 'reference'], range(2), dict(lr=[0.1, 0.05]), **small)
    study = Study(tmp_path)
    assert not len(study.of('tuned'))
    sweep(runs, tmp_path, log=[].append)
    shared = {k: small[k] for k in ('epochs', 'n_train')}
    found = study.of('tuned', **shared)
    assert sorted(found.seed) == [0, 1] and set(found.recipe) == {'tuned'} and set(found.lr) == {0.1}
    assert set(study.of('reference', lr=0.05, **shared).lr) == {0.05} and not len(study.of('reference', **shared)) and not len(study.of('tuned'))


def test_a_failed_run_is_tried_again_and_then_listed(fake, tmp_path):
    runs,lines = sweep_grid(['tuned'], range(3), **small),[]
    fake.fails = {0: 1, 1: 9}
    study = sweep(runs, tmp_path, log=lines.append)
    assert (fake.did.count(0), fake.did.count(1), fake.did.count(2)) == (2, 2, 1)
    assert sorted(study.read().seed) == [0, 2]
    row = study.read('failures').iloc[0]
    assert (row.seed, row.attempts, row.error, json.loads(row.settings)) == (1, 2, 'it broke', runs[1])
    assert any('tuned seed 1 failed: it broke' in o for o in lines)
    fake.fails = {}
    assert sorted(sweep(runs, tmp_path, log=lines.append).read().seed) == [0, 1, 2]
    assert fake.did.count(1) == 3 and not (tmp_path/'failures.csv').exists()


def test_what_failed_otherwise_is_no_concern_of_this_sweep(fake, tmp_path, capsys):
    fake.fails = {0: 9}
    call = lambda seeds: block3_sweep.__wrapped__(recipes='tuned', seeds=seeds, out=str(tmp_path), retries=0, **small)
    with pytest.raises(SystemExit, match='1 runs failed, see .*failures.csv'): call('0')
    call('1')
    assert 'The tables are in' in capsys.readouterr().out and len(Study(tmp_path).read('failures')) == 1


def test_a_run_that_diverged_is_a_result(fake, tmp_path, real):
    summary = json.loads(real[1]['summary.json'])
    summary['results']['loss'] = None
    diverged,lines = real[1] | {'summary.json': json.dumps(summary).encode()},[]
    fake.files = diverged
    study = sweep(sweep_grid(['tuned'], range(2), **small), tmp_path, log=lines.append)
    assert len(study.read()) == 2 and study.read().loss.isna().all() and 'loss nan' in lines[1]


def test_an_oserror_of_a_run_is_its_own(fake, tmp_path):
    fake.error = OSError('no space in /tmp')
    fake.fails = {0: 1}
    assert sorted(sweep(sweep_grid(['tuned'], range(2), **small), tmp_path, log=[].append).read().seed) == [0, 1]


@pytest.mark.parametrize('err,code,reason', [
    ('Traceback:\nValueError: bs=0\n', 1, 'ValueError: bs=0'),
    ('torch.AcceleratorError: out of memory\nCompile with `TORCH_USE_CUDA_DSA`\n', 1, 'torch.AcceleratorError: out of memory'),
    ('[W] a warning\n', -9, 'killed by signal 9'), ('', 3, 'ended with status 3')])
def test_why_a_run_failed(err, code, reason): assert sweep_module._reason(err, code) == reason


@pytest.mark.parametrize('after', ['weights', 'epochs', 'mistakes'])
def test_killed_between_two_tables(fake, tmp_path, monkeypatch, after):
    runs,write = sweep_grid(['tuned'], range(2), **small),sweep_module.write_whole
    study = sweep(runs[:1], tmp_path, log=[].append)
    def dies(path, data):
        write(path, data)
        if path.parent.name == after or path.stem == after: raise KeyboardInterrupt
    monkeypatch.setattr(sweep_module, 'write_whole', dies)
    with pytest.raises(KeyboardInterrupt): sweep(runs, tmp_path, log=[].append)
    assert study.done == {run_name(runs[0])}
    monkeypatch.setattr(sweep_module, 'write_whole', write)
    sweep(runs, tmp_path, log=[].append)
    assert fake.did == [0, 1, 1] and len(study.read('epochs')) == 2 and sorted(study.read().seed) == [0, 1]
    assert study.read('mistakes').groupby('run').size().nunique() == 1


def test_time_left(fake, tmp_path, monkeypatch):
    "By the epochs that are left, the seconds of one, and the runs at once"
    lines,real_row = [],sweep_module.add_run
    monkeypatch.setattr(sweep_module, 'add_run', lambda *args: real_row(*args) | dict(seconds=300., accuracy=0.5))
    sweep(sweep_grid(['tuned'], range(5), **small), tmp_path, jobs=2, log=lines.append)
    assert [o.partition('about ')[2] for o in lines[1:]] == ['10 min left', '8 min left', '5 min left', '2 min left', '']
    assert lines[1].startswith('  1/5  tuned seed ') and '50.00 %' in lines[1]


def test_one_sweep_a_folder(fake, tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match='is in use by another process'):
        sweep(sweep_grid(['tuned'], [0], **small), tmp_path, log=[].append)
    assert fake.did == []


def test_ray_gets_the_same_runs(monkeypatch, tmp_path, real):
    "What goes to Ray, without Ray: each run with its threads or its part of a GPU"
    asked = {}
    class Remote:
        def __init__(self, f): self.f = f
        def options(self, **kwargs):
            asked.update(kwargs)
            return self
        def remote(self, run, threads):
            asked.setdefault('runs', []).append((run['seed'], threads))
            self.result = real[1]
            return self
        def future(self):
            f = Future()
            f.set_result(self.result)
            return f
    class Ray:
        init = staticmethod(lambda address, ignore_reinit_error, log_to_driver, logging_level: asked.update(address=address))
        nodes = staticmethod(lambda: [dict(Alive=True, Resources=dict(CPU=3., memory=1e9)), dict(Alive=True, Resources={}), dict(Alive=False)])
        remote,shutdown = Remote,staticmethod(lambda: asked.update(shut=True))
    monkeypatch.setitem(sys.modules, 'ray', Ray)
    lines,runs = [],sweep_grid(['tuned'], [1, 2], **small)
    study = sweep(runs, tmp_path, ray=True, address='10.0.0.1:6379', log=lines.append)
    assert '3 at once on Ray' in lines[0]
    assert asked['runs'] == [(1, 1), (2, 1)] and asked['address'] == '10.0.0.1:6379' and asked['shut']
    assert (asked['num_cpus'], asked['num_gpus'], asked['max_retries']) == (1, 0, 3)
    assert sorted(study.read().seed) == [1, 2]
    Ray.nodes = staticmethod(lambda: [dict(Alive=True, Resources=dict(CPU=16., GPU=2.))])
    sweep([o | dict(device='cuda') for o in runs], tmp_path, ray=True, jobs=4, log=lines.append)
    assert '8 at once on Ray' in lines[-1] and asked['num_gpus'] == 1/4
    Ray.nodes = staticmethod(lambda: [dict(Alive=True, Resources=dict(CPU=3.))])
    with pytest.raises(ValueError, match='threads=4: no machine of the Ray cluster has so many'): sweep(runs, tmp_path, ray=True, threads=4)


def test_without_ray(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(SystemExit, match=r"block3_sweep: Ray is not installed: pip install 'mnist_block3\[sweep\]'"):
        block3_sweep.__wrapped__(ray=True, seeds='0', out=str(tmp_path/'out'), **small)


@pytest.mark.slow
def test_on_ray(real, tmp_path, monkeypatch):
    "On a Ray of its own, the same rows as in a process"
    pytest.importorskip('ray')
    monkeypatch.setenv('RAY_ADDRESS', 'local')
    study = sweep([real[0]], tmp_path/'ray', ray=True, log=[].append)
    ours,here = load(real[1]['weights.safetensors']),load((study.folder/'weights'/f'{run_name(real[0])}.safetensors').read_bytes())
    assert all(torch.equal(ours[k], here[k]) for k in ours)


bad = {
    'recipe':   (dict(recipes='tuned,x'), "recipe='x': recipe is one of 'reference', 'tuned'"),
    'seeds':    (dict(seeds='1-b'), "seeds='1-b': seeds are numbers and ranges"),
    'backward': (dict(seeds='5-1'), "seeds='5-1'"),
    'setting':  (dict(settings='wd=1'), 'wd: the reference recipe has no such setting'),
    'value':    (dict(settings='lr=a'), "lr is of type float, and not 'a'"),
    'valid':    (dict(valid='tset'), "valid='tset'"),
    'device':   (dict(device='gpu'), "device='gpu'"),
    'jobs':     (dict(jobs=-1), 'jobs=-1'),
    'address':  (dict(address='10.0.0.1:6379'), 'an address is for Ray'),
    'bs':       (dict(bs=0), 'bs=0'),
    'lr':       (dict(settings='lr=-1'), 'lr=-1.0'),
    'n_train':  (dict(n_train=0), 'n_train=0'),
    'source':   (dict(source='nowhere'), 'nowhere is no folder'),
    'big seed': (dict(seeds='4294967296'), 'seed=4294967296'),
    'flag':     (dict(recipes='tuned', settings='nesterov=2'), "nesterov is of type bool, and not '2'"),
    'epochs':   (dict(epochs=0), 'epochs=0'),
    'out':      (dict(out='file/x'), 'file/x'),
}


@pytest.mark.parametrize('case', bad)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, case):
    kwargs,message = bad[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path/'file').touch()
    with pytest.raises(SystemExit) as e: block3_sweep.__wrapped__(**{**small, 'seeds': '0', **kwargs})
    assert e.value.code.startswith('block3_sweep: ') and message in e.value.code and '\n' not in e.value.code
    assert [o.name for o in tmp_path.iterdir()] == ['file']


def test_seeds(): assert parse_seeds('3') == [3] and parse_seeds('0-2,9') == [0, 1, 2, 9]


def test_label():
    run = sweep_grid(['tuned'], [7], dict(lr=[0.05], nesterov=[True]))[0]
    assert run_label(run) == 'tuned seed 7, lr 0.05, nesterov True'


def children(pid): return subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True).stdout.split()


def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
    except OSError: return False


@pytest.mark.parametrize('sig,code', [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_console_stopped_and_started_again(tmp_path, monkeypatch, sig, code):
    "Stopped in its second run, it leaves no process behind, and the next one does what is left"
    args = '--seeds', '0,1', '--epochs', '1', '--n_train', '320', '--valid', 'reference', '--jobs', '1', '--threads', '1', '--out', 'here'
    monkeypatch.delenv('PYTHONUNBUFFERED', raising=False)
    p = console(*args, cwd=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert '2 runs, 0 of them done; 1 at once' in p.stdout.readline()
    assert '1/2  reference seed 0' in p.stdout.readline()
    while not (kids := children(p.pid)): time.sleep(0.1)
    p.send_signal(sig)
    out,err = p.communicate(timeout=60)
    assert p.returncode == code
    if sig == signal.SIGINT: assert err == 'block3_sweep: stopped; run the same command again to go on\n'
    for _ in range(600): # on a busy machine they may still be importing
        if not any(map(alive, kids)): break
        time.sleep(0.1)
    assert not any(map(alive, kids))
    q = console(*args, cwd=tmp_path)
    out,err = q.communicate(timeout=120)
    assert (q.returncode, err) == (0, '') and '2 runs, 1 of them done' in out and 'The tables are in here' in out
    found = Study(tmp_path/'here').read()
    assert sorted(found.seed) == [0, 1]
    assert found.command.iloc[0].replace('n-train', 'n_train') == f'block3_sweep {" ".join(args)}' # which depends on fastcore
