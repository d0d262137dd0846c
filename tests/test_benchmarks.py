"The benchmarks: every way takes the same steps, a measurement has its fields, and a restart goes on"
import json, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine
from mnist_block3.all import block3_learner, Block3, DataLoaders

folder = Path(__file__).parent.parent/'benchmarks'
if not folder.exists(): pytest.skip('not in a checkout', allow_module_level=True)
sys.path.insert(0, str(folder))
import bench, profile_step
from run_way import timings
from ways import floor, ours, pytorch, reference
from ways.common import Clock, read_split

cpu = torch.device('cpu')
few = dict(device='cpu', n_train=128, fit=15, seed=0, files='', began=0.)
warm = dict(warm_train=1., warm_valid=0.5, warm_epoch=1.6, fit15=25.4, extrapolated=True, images_per_s=640.)


def test_files_are_those_that_we_read(mnist):
    for split,digits in zip(('train', 't10k'), mnist):
        images,labels = read_split(split)
        assert torch.equal(images, digits.images) and torch.equal(labels, digits.labels.long())


def test_same_steps_as_ours(mnist):
    train = mnist[0][:192]
    x = ((train.images/255 - 0.1307)/0.3081)[:,None].double()
    batches = DataLoader(TensorDataset(x, train.labels.long()), batch_size=64)
    start = Block3(drop=0.).double()
    models = [Block3(drop=0.).double() for _ in range(3)]
    for model in models: model.load_state_dict(start.state_dict())
    learn = block3_learner(DataLoaders(batches, batches), models[0], fast=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    reference.train_epoch(models[1], batches, reference.optimizer(models[1]), 'cpu')
    pytorch.train_epoch(models[2], batches, pytorch.optimizer(models[2]))
    want,*others = [model.state_dict() for model in models]
    for other in others: torch.testing.assert_close(other, want, rtol=0, atol=1e-12)
    assert not torch.equal(want['head.weight'], start.state_dict()['head.weight'])


def test_plain_pytorch_augments_as_torchvision_does(mnist, monkeypatch):
    x = mnist[0].images[:64,None].float()/255
    for draw,angle,scale in ((0.05, -4.5, 28/22), (0.75, 2.5, 1.)):
        monkeypatch.setattr(torch, 'rand', lambda n, device=None: torch.full((n,), draw))
        want = affine(x, -angle, [0,0], scale, [0.], InterpolationMode.BILINEAR)
        torch.testing.assert_close(pytorch.augment(x), want, rtol=0, atol=1e-4)


def test_the_references_way_learns(mnist):
    train = mnist[0][:320]
    digits = reference.PILDigits(train.images, train.labels.long())
    model = Block3()
    opt = reference.optimizer(model)
    batches = DataLoader(digits, batch_size=16, shuffle=True)
    for _ in range(6): reference.train_epoch(model, batches, opt, 'cpu')
    assert reference.evaluate(model, DataLoader(digits, batch_size=64), 'cpu')[1] > 0.5


def test_plain_pytorch_learns(mnist):
    images = mnist[0].images[:320]
    labels = mnist[0].labels[:320].long()
    model = Block3()
    opt = pytorch.optimizer(model)
    for _ in range(6): pytorch.train_epoch(model, pytorch.batches(images, labels, 16, True), opt)
    assert pytorch.evaluate(model, pytorch.batches(images, labels, 100, False))/320 > 0.5


def test_a_process_of_its_own():
    out = bench.run_process(**few | bench.round_jobs(['pytorch'])['pytorch'])
    assert len(out['epochs']) == 2 and out['extrapolated']
    assert out['fit15'] == pytest.approx(out['first_epoch'] + 14*out['warm_epoch'])
    assert out['images_per_s'] == pytest.approx(128/out['warm_train'])
    for name in ('imports', 'setup', 'process', 'warm_valid', 'memory', 'accuracy'): assert out[name] > 0


def test_a_process_that_fails():
    with pytest.raises(RuntimeError, match='No module named'):
        bench.run_process(**few, module='nothing', n_epoch=1)


def test_a_user_calls_fit_15_and_two_epochs_are_run(small_dls, monkeypatch):
    monkeypatch.setattr(ours, 'mnist_dls', lambda **kwargs: small_dls)
    clock = Clock('cpu')
    out = ours.run(clock, device='cpu', n_train=320, n_epoch=2, fit=15)
    assert [event for event,_ in clock.marks] == ['fit'] + ['train', 'valid', 'end']*2
    assert out['engine'] == 'kernels' and out['why'] is None and 0 < out['accuracy'] < 1


def test_epochs_from_marks():
    clock = Clock('cpu')
    clock.marks = list(zip(['fit'] + ['train', 'valid', 'end']*3, [0, 1, 3, 4, 5, 6, 6.5, 6.5, 7.5, 8.5]))
    assert clock.epochs()[:2] == [dict(train=2, valid=1, epoch=4), dict(train=1, valid=0.5, epoch=2.5)]
    out = timings(clock, 100)
    assert out['warm_epoch'] == 2.25 and out['fit15'] == 4 + 14*2.25 and out['extrapolated']
    for i in range(13): clock.marks += [('train', 9+i), ('valid', 9.5+i), ('end', 10+i)]
    out = timings(clock, 100)
    assert out['fit15'] == 21 and not out['extrapolated'] and len(out['epochs']) == 16


def test_the_least_work():
    work = floor.work()
    assert work['valid_flops'] == pytest.approx(2*1.28e6, rel=2e-3) # by the reference's own count
    assert 2*work['valid_flops'] < work['train_flops'] < 3*work['valid_flops']
    assert work['train_bytes'] > 2*work['valid_bytes']


class FakeProcess:
    "In place of `run_process`: measures nothing, and fails for one module, or at one call as by Ctrl-C"
    def __init__(self):
        self.n_calls = 0
        self.broken = self.stop_at = None

    def __call__(self, **kwargs):
        if self.n_calls == self.stop_at: raise KeyboardInterrupt
        self.n_calls += 1
        if kwargs['module'] == self.broken: raise RuntimeError('no such luck')
        if kwargs['module'] == 'floor': return dict(flops_per_s=1e11, bytes_per_s=1e10, memory=10)
        cold = dict(imports=1., first_epoch=3., process=9., memory=500., accuracy=0.5)
        return cold | warm if kwargs['n_epoch'] > 1 else cold


@pytest.fixture
def fake(monkeypatch):
    fake = FakeProcess()
    monkeypatch.setattr(bench, 'run_process', fake)
    return fake


def test_a_restart_goes_on(tmp_path, fake):
    path = tmp_path/'cpu.json'
    def measure(): return bench.measure_rounds(path, cpu, ['pytorch', 'fast'], rounds=2, whole=True)
    fake.stop_at = 4
    with pytest.raises(KeyboardInterrupt): measure()
    assert len(json.loads(path.read_text())['runs']) == 4
    fake.stop_at = None
    data,failed = measure()
    jobs = ['floor', 'pytorch', 'fast', 'fast, fit(15)', 'fast, fit_tuned(2)']
    done = [(run['job'], run['round']) for run in data['runs']]
    assert done == [(job, i) for i in range(2) for job in jobs]
    assert json.loads(path.read_text()) == data and not failed and len(data['starts']) == 2
    assert set(data) >= {'settings', 'versions', 'machine'}
    assert set(data['starts'][0]) >= {'date', 'commit', 'command'}
    measure()
    assert fake.n_calls == 10
    with pytest.raises(ValueError, match='n_train.*--out'):
        bench.measure_rounds(path, cpu, ['pytorch'], n_train=640)


def test_table_and_chart(tmp_path, fake):
    data,_ = bench.measure_rounds(tmp_path/'cpu.json', cpu, ['pytorch', 'fast'], whole=True)
    table = bench.summary_table(data)
    assert list(table.index) == ['pytorch', 'fast', 'fast, fit(15)', 'fast, fit_tuned(2)']
    assert table.loc['fast', '15 epochs s'] == '25.40 (25.40) *'
    labels = bench.draw_chart(data).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ['fast', 'pytorch']


def test_a_failure_is_printed_once_and_the_rest_goes_on(tmp_path, fake, capsys):
    fake.broken = 'pytorch'
    data,failed = bench.measure_rounds(tmp_path/'cpu.json', cpu, ['pytorch', 'fast'], rounds=2)
    assert failed == {'pytorch'} and [run['job'] for run in data['runs']] == ['floor', 'fast']*2
    assert capsys.readouterr().out.count('no such luck') == 1


def test_rows_of_the_profile():
    def row(*names):
        event = None
        for name in names: event = SimpleNamespace(name=name, cpu_parent=event)
        return profile_step.row_of(event)
    assert row('loading', 'aten::index') == 'loading and augmentation'
    assert row('aten::conv2d', 'aten::mkldnn_convolution') == 'convolution, forward'
    assert row('ConvolutionBackward0', 'aten::convolution_backward') == 'convolution, backward'
    assert row('_RunFunction') == 'kernels, forward'
    assert row('autograd::engine::evaluate_function: _RunFunctionBackward', '_RunFunctionBackward') == 'kernels, backward'
    assert row('Optimizer.step#SGD.step', 'aten::add_') == 'optimizer'
    assert row('aten::batch_norm', 'aten::native_batch_norm') == 'BatchNorm and other layers'
    assert row('cudaLaunchKernel') == profile_step.rest


@pytest.mark.slow
@pytest.mark.parametrize('part,files', [('check', {'check.json', 'cuda.json'}), ('study', {'study.json', 'deterministic.json', 'ways.json'})])
def test_dry_run_of_the_script_for_a_gpu(tmp_path, part, files):
    "On a CPU, with a recorder in place of CUDA graphs; the tests of CUDA are left out"
    python = f'{sys.executable} {folder.parent/"tests"/"recorder.py"}'
    env = os.environ | dict(DEVICE='cpu', N_TRAIN='150', N_BENCH='256', PYTHON=python, OMP_NUM_THREADS='1', PATIENCE='9')
    subprocess.run(['bash', folder/'gpu.sh', part, tmp_path], env=env, check=True, timeout=900)
    assert files <= {f.name for f in tmp_path.iterdir()}
    if part == 'study':
        study = json.loads((tmp_path/'study.json').read_text())
        assert study['resumed'] == dict(difference=0, engines=['graph', 'graph'])
        return
    check = json.loads((tmp_path/'check.json').read_text())
    assert check['engine'] == dict(engine='graph', why=None)
    assert check['graph_against_eager']['difference'] == 0 and check['graph_against_float64']['difference'] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize('name', bench.peers)
def test_peers(name):
    if name == 'lightning': pytest.importorskip('lightning')
    with bench.peer_files([name], few['n_train']) as files:
        out = bench.run_process(**few | dict(files=str(files[name])) | bench.round_jobs([name])[name])
    assert len(out['epochs']) == 2 and out['warm_valid'] > 0 and 0 < out['accuracy'] < 1
