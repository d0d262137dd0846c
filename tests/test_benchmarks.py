"The benchmarks: every way takes the same steps, what is measured has its fields, and a restart goes on"
import json, sys
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from torch.utils.data import DataLoader as TorchDL, TensorDataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine
from mnist_block3.all import block3_learner, Block3, DataLoaders, noop, ProgressCallback

folder = Path(__file__).parent.parent/'benchmarks'
if not folder.exists(): pytest.skip('not in a checkout', allow_module_level=True)
sys.path.insert(0, str(folder))
import bench, profile_step
from run_way import timings
from ways import floor, ours, pytorch, reference
from ways.common import Clock, read_split

few = dict(device='cpu', n_train=128, fit=15, seed=0, files='', began=0.)
warm = dict(warm_train=1., warm_valid=0.5, warm_epoch=1.6, fit15=25.4, extrapolated=True, images_per_s=640.)


def test_files_are_those_that_we_read(mnist):
    for split,digits in zip(('train', 't10k'), mnist):
        images,labels = read_split(split)
        assert torch.equal(images, digits.images) and torch.equal(labels, digits.labels.long())


@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_same_steps_as_ours(mnist, dtype, tol):
    x,y = mnist[0].images[:192],mnist[0].labels[:192].long()
    x = ((x/255 - 0.1307)/0.3081)[:,None].to(dtype)
    batches = TorchDL(TensorDataset(x, y), batch_size=64 if dtype == torch.float64 else 192)
    start = Block3(drop=0.).to(dtype)
    def copy():
        model = Block3(drop=0.).to(dtype)
        model.load_state_dict(start.state_dict())
        return model
    ours,ref,plain = copy(),copy(),copy()
    learn = block3_learner(DataLoaders(batches, batches), ours, fast=False)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.fit(1)
    reference.train_epoch(ref, batches, reference.optimizer(ref), 'cpu')
    pytorch.train_epoch(plain, batches, pytorch.optimizer(plain))
    want = ours.state_dict()
    for got in (ref, plain):
        for k,v in got.state_dict().items(): torch.testing.assert_close(v, want[k], rtol=0, atol=tol)
    assert not torch.equal(want['head.weight'], start.state_dict()['head.weight'])


def test_plain_pytorch_augments_as_torchvision_does(mnist, monkeypatch):
    x = mnist[0].images[:64,None].float()/255
    for draw,angle,scale in ((0.05, -4.5, 28/22), (0.75, 2.5, 1.)):
        monkeypatch.setattr(torch, 'rand', lambda n, device=None: torch.full((n,), draw))
        want = affine(x, -angle, [0,0], scale, [0.], InterpolationMode.BILINEAR)
        torch.testing.assert_close(pytorch.augment(x), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize('way', [reference, pytorch])
def test_it_learns(mnist, way):
    x,y = mnist[0].images[:320],mnist[0].labels[:320].long()
    model,pil = Block3(),reference.PILDigits(x, y)
    opt = way.optimizer(model)
    def epoch():
        if way is pytorch: return pytorch.train_epoch(model, pytorch.batches(x, y, 16, True), opt).item()/20
        return reference.train_epoch(model, TorchDL(pil, batch_size=16, shuffle=True), opt, 'cpu')[0]
    losses = [epoch() for _ in range(8)]
    assert losses[-1] < 0.6*losses[0]
    if way is pytorch: accuracy = pytorch.evaluate(model, pytorch.batches(x, y, 100, False))/320
    else: accuracy = reference.evaluate(model, TorchDL(pil, batch_size=64), 'cpu')[1]
    assert accuracy > 0.5


def test_a_process_of_its_own():
    out = bench.run_process(**few | bench.round_jobs(['reference'])['reference'])
    assert len(out['epochs']) == 2 and out['extrapolated']
    assert out['fit15'] == pytest.approx(out['first_epoch'] + 14*out['warm_epoch'])
    assert out['images_per_s'] == pytest.approx(128/out['warm_train'])
    assert all(out[o] > 0 for o in ('imports', 'setup', 'process', 'warm_valid', 'memory', 'accuracy'))
    with pytest.raises(RuntimeError, match='No module named'): bench.run_process(**few, module='nothing', n_epoch=1)


def test_a_user_calls_fit_15_and_two_epochs_are_run(small_dls, monkeypatch):
    monkeypatch.setattr(ours, 'mnist_dls', lambda **kwargs: small_dls)
    clock = Clock('cpu')
    out = ours.run(clock, device='cpu', n_train=320, n_epoch=2, fit=15)
    assert [e for e,_ in clock.marks] == ['fit'] + ['train', 'valid', 'end']*2
    assert out['engine'] == 'plain' and out['why'] == 'the fit is short' and 0 < out['accuracy'] < 1


def test_epochs_from_marks():
    clock = Clock('cpu')
    clock.marks = list(zip(['fit'] + ['train', 'valid', 'end']*3, [0, 1, 3, 4, 5, 6, 6.5, 6.5, 7.5, 8.5]))
    assert clock.epochs()[:2] == [dict(train=2, valid=1, epoch=4), dict(train=1, valid=0.5, epoch=2.5)]
    out = timings(clock, 100)
    assert out['warm_epoch'] == 2.25 and out['fit15'] == 4 + 14*2.25 and out['extrapolated']
    clock.marks += [(e, 9+i+d) for i in range(13) for e,d in (('train', 0), ('valid', 0.5), ('end', 1))]
    out = timings(clock, 100)
    assert out['fit15'] == 21 and not out['extrapolated'] and len(out['epochs']) == 16


def test_the_least_work():
    work = floor.work()
    assert work['valid_flops'] == pytest.approx(2*1.28e6, rel=2e-3) # of the reference's network, as its facts have it
    assert 2*work['valid_flops'] < work['train_flops'] < 3*work['valid_flops']
    assert work['train_bytes'] > 2*work['valid_bytes']


@pytest.fixture
def fake(monkeypatch):
    "`run_process` that measures nothing, and the list of what it was called with"
    calls = []
    def run(**kwargs):
        calls.append(kwargs)
        if kwargs['module'] == 'floor': return dict(flops_per_s=1e11, bytes_per_s=1e10, memory=10, **floor.work())
        cold = dict(imports=1., first_epoch=3., process=9., memory=500., accuracy=0.5)
        return cold | warm if kwargs['n_epoch'] > 1 else cold
    monkeypatch.setattr(bench, 'run_process', run)
    return calls


def test_a_restart_goes_on(tmp_path, fake, monkeypatch):
    path,cpu = tmp_path/'cpu.json',torch.device('cpu')
    real = bench.run_process
    def cut(**kwargs):
        if len(fake) == 4: raise KeyboardInterrupt
        return real(**kwargs)
    monkeypatch.setattr(bench, 'run_process', cut)
    with pytest.raises(KeyboardInterrupt): bench.measure_rounds(path, cpu, ['pytorch', 'fast'], rounds=2, one_epoch=True)
    assert len(json.loads(path.read_text())['runs']) == 4
    monkeypatch.setattr(bench, 'run_process', real)
    data,failed = bench.measure_rounds(path, cpu, ['pytorch', 'fast'], rounds=2, one_epoch=True)
    order = ['floor', 'pytorch', 'fast', 'plain, fit(1)', 'fast, fit(1)']
    assert [(o['job'], o['round']) for o in data['runs']] == [(o, r) for r in range(2) for o in order] and not failed
    assert json.loads(path.read_text()) == data and len(fake) == 10 and len(data['starts']) == 2
    assert {'settings', 'versions', 'machine'} <= set(data) and {'date', 'commit', 'command'} <= set(data['starts'][0])
    bench.measure_rounds(path, cpu, ['pytorch', 'fast'], rounds=2, one_epoch=True)
    assert len(fake) == 10
    with pytest.raises(ValueError, match='n_train.*--out'): bench.measure_rounds(path, cpu, ['pytorch'], n_train=640)
    table = bench.summary_table(data)
    assert list(table.index) == order[1:] and table.loc['fast', '15 epochs s'] == '25.40 (25.40) *'
    assert [o.get_text() for o in bench.draw_chart(data).axes[0].get_yticklabels()] == ['fast', 'pytorch']


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path, fake, monkeypatch, capsys):
    real = bench.run_process
    def run(**kwargs):
        if kwargs['module'] == 'pytorch': raise RuntimeError('no such luck')
        return real(**kwargs)
    monkeypatch.setattr(bench, 'run_process', run)
    data,failed = bench.measure_rounds(tmp_path/'cpu.json', torch.device('cpu'), ['pytorch', 'fast'], rounds=2)
    assert failed == {'pytorch'} and [o['job'] for o in data['runs']] == ['floor', 'fast']*2
    assert capsys.readouterr().out.count('no such luck') == 1


def test_rows_of_the_profile():
    def row(*names):
        event = None
        for o in names: event = SimpleNamespace(name=o, cpu_parent=event)
        return profile_step.row_of(event)
    assert row('loading', 'aten::index') == 'loading and augmentation'
    assert row('aten::conv2d', 'aten::mkldnn_convolution') == 'convolution, forward'
    assert row('ConvolutionBackward0', 'aten::convolution_backward') == 'convolution, backward'
    assert row('CompiledFunctionBackward', 'aten::mm') == 'convolution, backward'
    assert row('Optimizer.step#SGD.step', 'aten::add_') == 'optimizer'
    assert row('aten::batch_norm', 'aten::native_batch_norm') == 'BatchNorm and other layers'
    assert row('## Call CompiledFxGraph abc ##') == profile_step.rest


@pytest.mark.slow
@pytest.mark.parametrize('name', bench.peers)
def test_peers(name):
    if name == 'lightning': pytest.importorskip('lightning')
    with bench.peer_files([name], few['n_train']) as files:
        out = bench.run_process(**few | dict(files=str(files[name])) | bench.round_jobs([name])[name])
    assert len(out['epochs']) == 2 and out['warm_valid'] > 0 and 0 < out['accuracy'] < 1
