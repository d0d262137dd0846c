"Run folders and the console: what is kept, that it can be done again, and what a user's mistake gets"
import json, subprocess, sys
from pathlib import Path
import pandas as pd, pytest, torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score
from mnist_block3.all import (Block3, block3_learner, JudgeAlso, mnist_dls, new_run_dir, ProgressCallback, protocols, recipe_settings,
                              run_files, train_run, write_whole)
from mnist_block3.cli import block3_train

few = dict(epochs=2, n_train=320, valid='reference', device='cpu')


def weights(folder): return load_file(folder/'weights.safetensors')


def test_same_settings_same_bits(tmp_path):
    runs = [train_run(**few, seed=seed, out=tmp_path/name)[1] for name,seed in (('a', 1), ('b', 1), ('c', 2))]
    a,b,c = map(weights, runs)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a['head.weight'], c['head.weight'])


def test_what_a_run_keeps(tmp_path):
    learn,folder = train_run(**few, out=tmp_path/'run')
    assert {o.name for o in folder.iterdir()} == set(run_files)
    summary,h = json.loads((folder/'summary.json').read_text()),pd.read_csv(folder/'history.csv')
    assert summary['settings'] == dict(few, bs=64, recipe='reference', seed=0, source=None, bf16=False, reproducible=False, fast=True,
                                       also_reference=False, lr=0.02, mom=0.8, step_size=15, gamma=0.1)
    assert (summary['engine'], summary['why']) == ('plain', 'the fit is short')
    assert {'torch', 'torchvision', 'fastai', 'fastcore', 'mnist_block3', 'python'} <= set(summary['versions'])
    assert summary['machine']['device'] == 'cpu' and summary['machine']['threads'] == torch.get_num_threads()
    assert summary['results']['correct']/summary['results']['total'] == pytest.approx(h.valid_accuracy.iloc[-1])
    assert summary['seconds'] >= summary['results']['train_seconds'] > 0
    model = Block3()
    model.load_state_dict(weights(folder))
    for a,b in zip(model.state_dict().values(), learn.model.state_dict().values(), strict=True): assert torch.equal(a, b)


def test_a_recipe_has_its_own_settings(tmp_path):
    _,folder = train_run(**few | dict(recipe='tuned', lr=0.05), out=tmp_path/'run')
    settings = json.loads((folder/'summary.json').read_text())['settings']
    assert {k: settings[k] for k in ('recipe', 'lr', 'mom', 'drop', 'nesterov')} == dict(recipe='tuned', lr=0.05, mom=0.9, drop=0., nesterov=False)
    assert 'gamma' not in settings
    with pytest.raises(ValueError, match='gamma: the tuned recipe has no such setting; it has lr, mom'): train_run(recipe='tuned', gamma=0.1)
    assert recipe_settings('reference') == dict(lr=0.02, mom=0.8, step_size=15, gamma=0.1)


def test_judging_also_as_the_reference_did_changes_nothing_else(tmp_path):
    "And comes, on what is not augmented, to what scikit-learn counts"
    (a,fa),(b,fb) = (train_run(**few | dict(epochs=1, valid='test', also_reference=o), out=tmp_path/str(o)) for o in (False, True))
    assert all(torch.equal(p, q) for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    ha,hb = (pd.read_csv(o/'history.csv').drop(columns='seconds') for o in (fa,fb))
    assert ha.equals(hb[list(ha)]) and set(hb) - set(ha) == {'reference_correct', 'reference_total'}
    assert (hb.reference_total == few['n_train']).all() and 0 < hb.reference_correct.iloc[-1] < few['n_train']
    learn = block3_learner(mnist_dls(n_train=320, aug_tfms=[], device='cpu'), cbs=JudgeAlso())
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit_tuned(1) # by which the images are distorted, and not those that it is judged on
    right = learn.history.rows[-1]['reference_correct']
    with learn.no_bar(): probs,targs = learn.get_preds(dl=learn.dls.train.new(shuffle=False))
    assert right == accuracy_score(targs, probs.argmax(1), normalize=False)


def test_precision_and_path_are_settings(tmp_path):
    a,b = (json.loads((train_run(**few, **o, out=tmp_path/str(o))[1]/'summary.json').read_text()) for o in (dict(bf16=True), dict(fast=False)))
    assert a['settings']['bf16'] and not b['settings']['bf16']
    assert (b['settings']['fast'], b['engine'], b['why']) == (False, 'plain', 'fast=False')
    assert a['results']['loss'] != b['results']['loss']


def test_runs_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert new_run_dir() != new_run_dir()
    assert len(list((tmp_path/'runs').iterdir())) == 2


def test_a_failed_run_leaves_what_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr('fastai.learner.Learner.fit', lambda *args, **kwargs: 1/0)
    with pytest.raises(ZeroDivisionError): train_run(**few, out=tmp_path/'run')
    assert [o.name for o in (tmp_path/'run').iterdir()] == ['settings.json']


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    write_whole(tmp_path/'f', b'old')
    monkeypatch.setattr('os.replace', lambda *args: 1/0)
    with pytest.raises(ZeroDivisionError): write_whole(tmp_path/'f', b'new')
    assert (tmp_path/'f').read_bytes() == b'old' and len(list(tmp_path.iterdir())) == 1


bad = {
    'valid':       (dict(valid='tset'), "valid='tset'"),
    'epochs':      (dict(epochs=0), 'epochs=0'),
    'bs':          (dict(bs=0), 'bs=0'),
    'n_train':     (dict(n_train=-1), 'n_train=-1'),
    'lr':          (dict(lr=0.), 'lr=0.0'),
    'inf':         (dict(lr=float('inf')), 'lr=inf'),
    'no float':    (dict(lr=10**400), 'lr=1000'),
    'no int64':    (dict(epochs=2**63), 'epochs is below 2**63'),
    'mom':         (dict(mom=1.), 'mom=1.0'),
    'recipe':      (dict(recipe='tunde'), "recipe='tunde': recipe is one of 'reference', 'tuned'"),
    'tuned lr':    (dict(recipe='tuned', lr=-1.), 'lr=-1.0'),
    'seed':        (dict(seed=2**64), 'seed=18446744073709551616'),
    'meta':        (dict(device='meta'), "device='meta'"),
    'device':      (dict(device='gpu'), "device='gpu'"),
    'no device':   (dict(device='cuda:77'), "no device 'cuda:77'"),
    'source':      (dict(source='none/such'), 'none/such is no folder'),
    'out taken':   (dict(out='taken'), 'taken is not empty'),
    'out a file':  (dict(out='file'), 'file cannot be written'),
    'out in file': (dict(out='file/run'), 'file/run cannot be written'),
}


@pytest.mark.parametrize('case', bad)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, case):
    kwargs,message = bad[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path/'file').touch()
    (tmp_path/'taken').mkdir()
    (tmp_path/'taken'/'summary.json').touch()
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(SystemExit) as e: block3_train.__wrapped__(**{'epochs': 1, 'n_train': 64, **kwargs})
    assert e.value.code.startswith('block3_train: ') and message in e.value.code and '\n' not in e.value.code
    assert sorted(tmp_path.rglob('*')) == before


def console(*args, cwd):
    return subprocess.run([Path(sys.executable).parent/'block3_train', *args], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_console(tmp_path):
    "Names of options may have hyphens or underscores"
    res = console('--epochs', '1', '--n_train', '640', '--valid', 'reference', '--bf16', '--reproducible', '--no-fast', cwd=tmp_path)
    assert (res.returncode, res.stderr) == (0, '')
    folder, = (tmp_path/'runs').iterdir()
    assert {o.name for o in folder.iterdir()} == set(run_files)
    h = pd.read_csv(folder/'history.csv').iloc[0]
    assert (f'epoch  1/1  train loss {h.train_loss:.4f}  reference loss {h.valid_loss:.4f}  {h.correct:.0f}/640  '
            f'{100*h.valid_accuracy:.2f} %  {h.seconds:.1f} s') in res.stdout.splitlines()
    assert protocols['reference'] in res.stdout and 'test' not in res.stdout
    assert f'are in runs/{folder.name}' in res.stdout
    settings = json.loads((folder/'summary.json').read_text())['settings']
    assert (settings['bf16'], settings['reproducible'], settings['fast']) == (True, True, False)


def test_a_run_that_diverged_is_recorded_as_one(tmp_path):
    _,folder = train_run(**few, lr=1e30, out=tmp_path/'run')
    summary = json.loads((folder/'summary.json').read_text(), parse_constant=lambda o: pytest.fail(f'{o} is no JSON'))
    assert summary['results']['loss'] is None


@pytest.mark.parametrize('args,code,line', [
    (('--device', 'tpu'), 1, "block3_train: device='tpu': device is 'cpu', 'cuda', 'cuda:N' or 'mps'\n"),
    (('--epochs', 'ten'), 2, "block3_train: argument --epochs: invalid int value: 'ten'; see block3_train --help\n"),
])
def test_console_mistake(tmp_path, args, code, line):
    res = console(*args, cwd=tmp_path)
    assert (res.returncode, res.stdout, res.stderr) == (code, '', line)
    assert list(tmp_path.iterdir()) == []
