"Several processes as one: against plain PyTorch and scikit-learn, in one process"
import json, math, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score, log_loss
from mnist_block3.all import Block3, run_files, train_run

pytest.importorskip('accelerate')
launcher = ['accelerate.commands.launch', '--multi_gpu', '--num_machines=1', '--dynamo_backend=no',
            '--main_process_port=0', '--mixed_precision=bf16'] # a learner takes no precision from it
train = '--no_python', 'block3_train'
few = '--device=cpu', '--n_train=80', '--bs=16', '--valid=reference'


def start(n, *args):
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    command = [sys.executable, '-m', *launcher, f'--num_processes={n}', *map(str, args)]
    return subprocess.Popen(command, env=os.environ | dict(OMP_NUM_THREADS='1', PATH=path), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(p, ok=True):
    out,err = p.communicate(timeout=300)
    assert (p.returncode == 0) == ok, out + err
    return out, err


@pytest.fixture(scope='module', params=[2, pytest.param(3, marks=pytest.mark.slow)])
def ranks(request, once):
    "What each of the processes found"
    n = request.param
    script = Path(__file__).parent/'data_parallel.py'
    folder = once(f'ranks{n}', lambda folder: finish(start(n, script, folder)))
    return [torch.load(folder/f'{rank}.pt', weights_only=True) for rank in range(n)]


@pytest.fixture(scope='module')
def digits(mnist):
    "Normalised as the loaders do it, in float32, and then in float64"
    train = mnist[0]
    x = (train.images[:1000,None].float()/255 - 0.1307)/0.3081
    return x.double(), train.labels[:1000].long()


def batches(found):
    "Each step's shares, but not the image of weight 0 that a process takes where there is none for it"
    for first,*others in zip(*(rank['shares'] for rank in found)):
        yield [first, *[share for share in others if share[0] != first[0]]]


@pytest.mark.parametrize('name', ['local', 'fixed'])
def test_shares_cover_the_set_once(ranks, name):
    "In each epoch, in an order that is the same for all processes, and another one in the next epoch"
    whole = [sum(shares, []) for shares in batches([rank[name] for rank in ranks])]
    assert [len(batch) for batch in whole] == [65, 65, 1]*2
    first = sum(whole[:3], [])
    second = sum(whole[3:], [])
    assert sorted(first) == sorted(second) == list(range(131)) and first != second
    for rank in ranks: assert rank[name]['rows'] == [65, 65, 1]*2


def local_loss(model, x, y, shares):
    """The loss of a step in which each share has its own BatchNorm statistics, and those of the first share.

    Each share's loss counts by its part of the batch"""
    n = sum(len(share) for share in shares)
    params = dict(model.named_parameters())
    loss,first = 0.,None
    for share in shares:
        buffers = {k: v.clone() for k,v in model.named_buffers()}
        logp = torch.func.functional_call(model, params | buffers, x[share])
        loss = loss + F.nll_loss(logp, y[share])*len(share)/n
        first = first or buffers
    return loss, first


@pytest.mark.parametrize('name', ['local', 'fixed'])
def test_step_in_float64(ranks, digits, name):
    "With BatchNorm fixed, a step is the one of a single process on the whole batch"
    found = [rank[name] for rank in ranks]
    x,y = digits
    model = Block3(drop=0.).double()
    model.load_state_dict(found[0]['start'])
    opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.8)
    losses = []
    for shares in batches(found):
        model.train(name == 'local')
        buffers = {}
        batch = sum(shares, [])
        if name == 'fixed': loss = F.nll_loss(model(x[batch]), y[batch])
        else: loss,buffers = local_loss(model, x, y, shares)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
        model.load_state_dict(model.state_dict() | buffers)
    for rank in found:
        assert rank['losses'] == pytest.approx(losses, abs=1e-12)
        torch.testing.assert_close(rank['end'], model.state_dict(), rtol=0, atol=1e-12)
        assert rank['history'][-1]['total'] == 131


def test_evaluation_is_of_the_whole_set(ranks, digits):
    x,y = digits
    model = Block3(pretrained=True).eval()
    with torch.no_grad(): probs = model(x.float()).exp()
    pred = probs.argmax(1)
    want = [log_loss(y, probs.double()), accuracy_score(y, pred), f1_score(y, pred, average='macro')]
    for rank in ranks:
        assert rank['validate'] == pytest.approx(want, abs=1e-6)
        assert rank['shuffled']['validate'] == pytest.approx(want, abs=1e-6)
        torch.testing.assert_close(rank['preds'][0], probs, rtol=1e-4, atol=1e-6)
        assert torch.equal(rank['preds'][1], y)
        assert 'each process has its share of the images only' in rank['with_input']
    shuffled = batches([rank['shuffled'] for rank in ranks])
    assert sorted(i for shares in shuffled for share in shares for i in share) == list(range(1000))


def test_losses_are_of_the_whole_batch(ranks):
    "Also where a callback has the loss depend on each process's share"
    first = ranks[0]['mixed']
    assert len(first) == 3 and first[0] == pytest.approx(math.log(10), abs=0.1) # nothing is learned yet
    for rank in ranks: assert rank['mixed'] == pytest.approx(first, abs=1e-6)


def test_each_draws_its_own(ranks):
    assert len({tuple(rank['draw'].tolist()) for rank in ranks}) == len(ranks)


def test_run_by_one_writer(ranks):
    "All have the same weights, and the files of the run are the first one's; the fast path steps aside"
    folder = Path(ranks[0]['run']['folder'])
    weights = load_file(folder/'weights.safetensors')
    for rank in ranks: torch.testing.assert_close(rank['run']['weights'], weights, rtol=0, atol=0)
    summary = json.loads((folder/'summary.json').read_text())
    assert {file.name for file in folder.iterdir() if file.name[0] != '.'} == set(run_files)
    assert summary['machine']['processes'] == len(ranks)
    assert (summary['engine'], summary['why']) == ('plain', 'several processes share each batch')


def test_sync_bn_is_for_gpus(ranks):
    for rank in ranks: assert rank['sync_bn'] is False


def test_other_loaders_are_refused(ranks):
    for rank in ranks:
        assert 'DataLoader: data-parallel training takes the loaders of mnist_dls' in rank['refused']


def test_each_takes_a_gpu_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match="device='cuda:1': each process takes a device"):
        train_run(tmp_path/'run', device='cuda:1')
    assert not (tmp_path/'run').exists()


@pytest.mark.slow
def test_mistake_ends_all(tmp_path):
    (tmp_path/'x').write_text('taken')
    began = time.monotonic()
    _,err = finish(start(2, *train, *few, '--out', tmp_path), ok=False)
    assert f'block3_train: {tmp_path} is not empty: a run needs a new folder' in err
    assert time.monotonic() - began < 90


def processes(folder):
    "The processes of a run, by rank"
    found = {}
    for proc in Path('/proc').glob('[0-9]*'):
        try:
            env = (proc/'environ').read_bytes().split(b'\0')
            args = (proc/'cmdline').read_bytes()
        except OSError: continue
        rank = next((entry[5:] for entry in env if entry.startswith(b'RANK=')), None)
        if rank is not None and str(folder).encode() in args: found[int(rank)] = int(proc.name)
    return found


def written(folder):
    "When the last checkpoint was written"
    try: return (folder/'checkpoint.safetensors').stat().st_mtime_ns
    except FileNotFoundError: return None


def kill_rank(p, folder, rank):
    "Kill a process of the run when the next checkpoint is there; the launcher `p` ends soon, with an error"
    before = written(folder)
    while written(folder) in (None, before):
        assert p.poll() is None, p.communicate()
        time.sleep(0.05)
    os.kill(processes(folder)[rank], signal.SIGKILL)
    began = time.monotonic()
    finish(p, ok=False)
    assert time.monotonic() - began < 60
    assert not processes(folder) and not (folder/'summary.json').exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='needs /proc')
def test_killed_and_resumed(tmp_path):
    "A run whose second process was killed, and then its first, which writes, ends as one that was left alone"
    long = *few, '--epochs=20'
    alone = tmp_path/'alone'
    out,_ = finish(start(2, *train, *long, '--out', alone))
    epochs = [int(line[5:8]) for line in out.splitlines() if line.startswith('epoch')]
    assert epochs == [*range(1, 21)] # one process prints
    folder = tmp_path/'run'
    kill_rank(start(2, *train, *long, '--out', folder), folder, 1)
    kill_rank(start(2, *train, '--resume', folder), folder, 0)
    out,_ = finish(start(2, *train, '--resume', folder))
    assert 'Resuming with' not in out # as many processes: nothing has changed
    assert json.loads((folder/'summary.json').read_text())['resumed_after'] >= 2
    weights = [load_file(run/'weights.safetensors') for run in (folder, alone)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    out,_ = finish(start(2, *train, '--resume', folder))
    assert out == f'{folder} is finished: there is nothing left to do\n'
