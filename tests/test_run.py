"Run folders and the console: what is kept, that it can be repeated, and what a user's mistake gets"
import json, subprocess, sys
import pandas as pd, pytest, torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score
from mnist_block3.all import JudgeAlso, ProgressCallback, block3_learner, mnist_dls, run_files, train_run
from mnist_block3.cli import block3_train
from mnist_block3.settings import run_settings

few = dict(epochs=2, n_train=320, valid='reference', device='cpu')


def weights(folder): return load_file(folder/'weights.safetensors')


def test_same_settings_same_bits(tmp_path):
    def trained(name, seed): return weights(train_run(tmp_path/name, **few, seed=seed)[1])
    a,b,c = trained('a', 1), trained('b', 1), trained('c', 2)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a['head.weight'], c['head.weight'])


def test_what_a_run_keeps(tmp_path):
    learn,folder = train_run(tmp_path/'run', **few, recipe='tuned', lr=0.05)
    assert {f.name for f in folder.iterdir() if f.name != '.lock'} == set(run_files)
    summary = json.loads((folder/'summary.json').read_text())
    rows = pd.read_csv(folder/'history.csv')
    assert summary['settings'] == run_settings('tuned', lr=0.05, **few)
    assert (summary['engine'], summary['why']) == ('kernels', None)
    machine,results = summary['machine'],summary['results']
    assert {'torch', 'torchvision', 'fastai', 'fastcore', 'mnist_block3', 'python', 'code'} <= set(summary['versions'])
    assert (machine['device'], machine['threads']) == ('cpu', torch.get_num_threads())
    assert results['correct']/results['total'] == pytest.approx(rows.valid_accuracy.iloc[-1])
    assert summary['seconds'] >= results['train_seconds'] > 0
    torch.testing.assert_close(weights(folder), dict(learn.model.state_dict()), rtol=0, atol=0)


def test_judging_also_as_the_reference_did_changes_nothing_else(tmp_path):
    "And comes, on what is not augmented, to what scikit-learn counts"
    # two epochs: the second would draw other numbers if the first had not put them back
    a,fa = train_run(tmp_path/'a', **few)
    b,fb = train_run(tmp_path/'b', **few, also_reference=True)
    torch.testing.assert_close(a.model.state_dict(), b.model.state_dict(), rtol=0, atol=0)
    ha,hb = (pd.read_csv(folder/'history.csv').drop(columns='seconds') for folder in (fa, fb))
    assert ha.equals(hb[list(ha)]) and set(hb) - set(ha) == {'reference_correct', 'reference_total'}
    dls = mnist_dls(valid='reference', n_train=320, aug_tfms=[], device='cpu')
    learn = block3_learner(dls, cbs=JudgeAlso(dls.train))
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit_tuned(1) # which distorts the images that it trains on only
    with learn.no_bar(): probs,targs = learn.get_preds(dl=learn.dls.train.new(shuffle=False))
    n_right = accuracy_score(targs, probs.argmax(1), normalize=False)
    assert learn.history.rows[-1]['reference_correct'] == n_right


def test_precision_is_a_setting(tmp_path):
    a,b = (weights(train_run(tmp_path/str(bf16), **few, fast=False, bf16=bf16)[1]) for bf16 in (True, False))
    assert not torch.equal(a['head.weight'], b['head.weight'])


def test_a_run_that_diverged_is_recorded_as_one(tmp_path):
    _,folder = train_run(tmp_path/'run', **few, lr=1e30)
    def fail(text): pytest.fail(f'{text} is no JSON')
    summary = json.loads((folder/'summary.json').read_text(), parse_constant=fail)
    assert summary['results']['loss'] is None


@pytest.mark.parametrize('kwargs,message', [
    (dict(valid='tset'), "valid='tset'"), (dict(bs=0), 'bs=0'), (dict(n_train=10**9), 'only 60000 training images'),
    (dict(lr=float('inf')), 'lr=inf'), (dict(mom=1.), 'mom=1.0'), (dict(recipe='tunde'), "is one of 'reference', 'tuned'"),
    (dict(settings='gamma=1', recipe='tuned'), 'the tuned recipe has no such setting'),
    (dict(settings='lr=0.1', lr=0.2), "lr: given twice, in settings='lr=0.1' too"),
    (dict(seed=2**64), 'seed=18446744073709551616'), (dict(source='none/such'), 'none/such is no folder'),
    (dict(device='gpu'), "device='gpu'"), (dict(device='cuda:77'), "no device 'cuda:77'"),
    (dict(out='taken'), 'taken is not empty'), (dict(out='file/run'), "Not a directory: 'file/run'")])
def test_a_mistake_leaves_nothing(tmp_path, monkeypatch, at_hand, kwargs, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'file').touch()
    (tmp_path/'taken').mkdir()
    (tmp_path/'taken'/'summary.json').touch()
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises((ValueError, OSError, RuntimeError), match=message):
        block3_train(**dict(epochs=1, n_train=64) | kwargs)
    assert sorted(tmp_path.rglob('*')) == before


def test_console(tmp_path, command):
    "Options are spelled with hyphens or underscores, on a terminal that knows ASCII only"
    args = '--epochs', '1', '--n_train', '640', '--valid', 'reference', '--bf16', '--no-fast', '--out', 'büro'
    res = command('block3_train', *args, PYTHONIOENCODING='ascii')
    assert (res.returncode, res.stderr) == (0, '')
    assert {f.name for f in (tmp_path/'büro').iterdir()} >= set(run_files)
    row = pd.read_csv(tmp_path/'büro'/'history.csv').iloc[0]
    assert (f'epoch  1/1  train loss {row.train_loss:.4f}  reference loss {row.valid_loss:.4f}  '
            f'{row.correct:.0f}/640  {100*row.valid_accuracy:.2f} %  {row.seconds:.1f} s') in res.stdout.splitlines()
    assert 'accuracy as the reference measured it' in res.stdout and '99.40 %' not in res.stdout
    assert r'are in b\xfcro' in res.stdout
    summary = json.loads((tmp_path/'büro'/'summary.json').read_text())
    assert [summary['settings'][k] for k in ('bf16', 'fast')] == [True, False]
    assert (summary['engine'], summary['why']) == ('plain', 'fast=False')


@pytest.mark.parametrize('name,args,code,error', [
    ('block3_train', '--epochs ten', 2, "argument --epochs: invalid int value: 'ten'; see block3_train --help"),
    ('block3_sweep', '--seeds a', 1, "seeds='a': seeds are numbers and ranges, as in 0-9,20"),
    ('block3_export', '--formats js,x', 1, "formats='x': formats is one of 'safetensors', 'onnx', 'js'"),
    ('block3_predict', '--wieghts x a.png', 2, 'unrecognized arguments: --wieghts; see block3_predict --help')])
def test_console_mistake(tmp_path, command, name, args, code, error):
    res = command(name, *args.split())
    assert (res.returncode, res.stdout, res.stderr) == (code, '', f'{name}: {error}\n')
    assert list(tmp_path.iterdir()) == []


def test_a_list_in_an_error_is_printed_in_one_line(tmp_path, command):
    error = command('block3_train', '--source', tmp_path).stderr
    assert 'Accepted are - IDX files' in error and error.count('\n') == 1 and r'\n' not in error


def test_help_and_mistakes_do_not_wait_for_imports(tmp_path):
    code = 'import sys, mnist_block3.cli; print({"torch", "fastai", "matplotlib"} & set(sys.modules))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == 'set()\n'
