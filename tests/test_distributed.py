"Several processes as one: against plain PyTorch and scikit-learn, in one process"
import json, math, os, signal, subprocess, sys, time
from contextlib import suppress
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score, log_loss
from mnist_block3.all import Block3, load_digits, run_files, train_run
from mnist_block3.cli import _how_to_go_on

pytest.importorskip('accelerate')
launcher = ['accelerate.commands.launch', '--multi_gpu', '--num_machines=1', '--mixed_precision=bf16', # which a learner does not take from it
            '--dynamo_backend=no', '--main_process_port=0']
train = '--no_python', 'block3_train'
few = '--device=cpu', '--n_train=80', '--bs=16', '--valid=reference'


def start(n, *args):
    env = os.environ | dict(OMP_NUM_THREADS='1', PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    return subprocess.Popen([sys.executable, '-m', *launcher, f'--num_processes={n}', *map(str, args)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(p, ok=True):
    said,err = p.communicate(timeout=300)
    assert (p.returncode == 0) == ok, said + err
    return said,err


@pytest.fixture(scope='module', params=[pytest.param(2, marks=pytest.mark.slow), 3])
def ranks(request, once):
    "What each of the processes found"
    n = request.param
    out = once(f'ranks{n}', lambda out: finish(start(n, Path(__file__).parent/'data_parallel.py', out)))
    return [torch.load(out/f'{r}.pt', weights_only=True) for r in range(n)]


@pytest.fixture(scope='module')
def digits():
    images,labels = load_digits()[0].images[:1000],load_digits()[0].labels[:1000]
    return ((images.float()/255 - 0.1307)/0.3081).double()[:,None],labels.long() # pixels as the loaders have them, in float32


def batches(found):
    "Each step's shares, those left out that a process took because there was nothing for it"
    for parts in zip(*(o['shares'] for o in found)): yield [parts[0], *[o for o in parts[1:] if o[0] != parts[0][0]]]


@pytest.mark.parametrize('name', ['local', 'fixed'])
def test_shares_cover_the_set_once(ranks, name):
    "In each epoch, in an order that is the same for all processes, and another one in the next epoch"
    whole = [sum(o, []) for o in batches([o[name] for o in ranks])]
    assert [len(o) for o in whole] == [64, 64, 2]*2
    epochs = sum(whole[:3], []),sum(whole[3:], [])
    for o in epochs: assert sorted(o) == list(range(130))
    assert epochs[0] != epochs[1]
    for o in ranks: assert o[name]['rows'] == [64, 64, 2]*2


@pytest.mark.parametrize('name', ['local', 'fixed'])
def test_step_in_float64(ranks, digits, name):
    """With BatchNorm fixed, a step is the one of a single process on the whole batch. Otherwise each share has statistics of its own:
    then the gradient is that of the shares' losses, each by its part of the batch, and the running statistics are the first process's"""
    found,(x,y),model = [o[name] for o in ranks],digits,Block3(drop=0.).double()
    model.load_state_dict(found[0]['start'])
    opt,losses = torch.optim.SGD(model.parameters(), 0.05, momentum=0.8),[]
    for shares in batches(found):
        model.train(name == 'local')
        sizes,loss,twins = [len(o) for o in shares],0.,[]
        if name == 'fixed': loss = F.nll_loss(model(x[sum(shares, [])]), y[sum(shares, [])])
        else:
            for n,share in zip(sizes, shares):
                buffers = {k: v.clone() for k,v in model.named_buffers()}
                params = dict(model.named_parameters())
                loss = loss + F.nll_loss(torch.func.functional_call(model, params | buffers, x[share]), y[share])*n/sum(sizes)
                twins.append(buffers)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
        if twins: model.load_state_dict(model.state_dict() | twins[0])
    for o in found:
        assert o['losses'] == pytest.approx(losses, abs=1e-12)
        for k,v in model.state_dict().items(): torch.testing.assert_close(o['end'][k], v, rtol=0, atol=1e-12)
    assert o['history'][-1]['total'] == 130


def test_evaluation_is_of_the_whole_set(ranks, digits):
    x,y = digits
    model = Block3(pretrained=True).eval()
    with torch.no_grad(): logp = model(x.float())
    pred = logp.argmax(1)
    want = [log_loss(y, logp.exp().double()), accuracy_score(y, pred), f1_score(y, pred, average='macro')]
    for o in ranks:
        assert o['validate'] == pytest.approx(want, abs=1e-6)
        torch.testing.assert_close(o['preds'][0], logp.exp(), rtol=1e-4, atol=1e-6)
        assert torch.equal(o['preds'][1], y)
        assert o['shuffled']['validate'] == pytest.approx(want, abs=1e-6)
        assert 'each process has its share of the images only' in o['with_input']
    assert sorted(sum(sum(batches([o['shuffled'] for o in ranks]), []), [])) == list(range(1000))


def test_losses_are_of_the_whole_batch(ranks):
    "Also where a callback has the loss depend on each process's share"
    for o in ranks:
        assert o['mixed'] == pytest.approx(ranks[0]['mixed'], abs=1e-6) and len(o['mixed']) == 3
        assert o['mixed'][0] == pytest.approx(math.log(10), abs=0.1) # as of a network that has learned nothing


def test_each_draws_its_own(ranks):
    drawn = [tuple(o['draw'].tolist()) for o in ranks]
    assert len(set(drawn)) == len(drawn)


def test_run_by_one_writer(ranks):
    "All have the same weights, and the files of the run are the first one's; the fast path steps aside"
    for o in ranks:
        for k,v in load_file(Path(o['run']['folder'])/'weights.safetensors').items(): assert torch.equal(o['run']['weights'][k], v)
    folder = Path(ranks[0]['run']['folder'])
    summary = json.loads((folder/'summary.json').read_text())
    assert {o.name for o in folder.iterdir()} == set(run_files)
    assert (summary['machine']['processes'], summary['engine'], summary['why']) == (len(ranks), 'plain', 'several processes share each batch')


def test_sync_bn_is_for_gpus(ranks):
    for o in ranks: assert o['sync_bn'] is False


def test_other_loaders_are_refused(ranks):
    for o in ranks: assert 'DataLoader: data-parallel training takes the loaders of mnist_dls' in o['refused']


def processes(folder):
    "The processes of a run, by rank"
    found = {}
    for o in Path('/proc').glob('[0-9]*'):
        try: env,args = (o/'environ').read_bytes().split(b'\0'),(o/'cmdline').read_bytes()
        except OSError: continue
        rank = next((e[5:] for e in env if e.startswith(b'RANK=')), None)
        if rank is not None and str(folder).encode() in args: found[int(rank)] = int(o.name)
    return found


long = *few, '--epochs=20'

@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='needs /proc')
def test_killed_and_resumed(tmp_path):
    "A process that is killed ends the run with an error, and the same number of processes ends as if nothing had happened"
    said,_ = finish(start(2, *train, *long, '--out', tmp_path/'alone'))
    assert [int(o[5:8]) for o in said.splitlines() if o.startswith('epoch')] == [*range(1, 21)] # each line once
    folder,args,seen = tmp_path/'run',[*long, '--out'],None
    for rank in (1, 0): # the other process, and the one that writes
        p = start(2, *train, *args, folder)
        while written(folder) in (None, seen): time.sleep(0.05); assert p.poll() is None, p.communicate()
        os.kill(processes(folder)[rank], signal.SIGKILL)
        began = time.monotonic()
        said,_ = finish(p, ok=False)
        assert 'Going on' not in said and time.monotonic() - began < 60
        assert not processes(folder) and not (folder/'summary.json').exists()
        args,seen = ['--resume'],written(folder)
    said,_ = finish(start(2, *train, '--resume', folder))
    assert 'Going on' not in said
    assert json.loads((folder/'summary.json').read_text())['resumed_after']['epochs'] >= 2
    alone = load_file(tmp_path/'alone'/'weights.safetensors')
    for k,v in load_file(folder/'weights.safetensors').items(): assert torch.equal(v, alone[k])
    said,_ = finish(start(2, *train, '--resume', folder))
    assert said == f'{folder} is finished: there is nothing left to do\n'

def written(folder):
    "When the last checkpoint was"
    with suppress(FileNotFoundError): return (folder/'checkpoint.safetensors').stat().st_mtime_ns


def test_each_takes_a_gpu_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match="device='cuda:1': each of several processes takes a device of its own"): train_run(tmp_path/'run', device='cuda:1')
    assert not (tmp_path/'run').exists()


def test_how_to_go_on_names_the_launcher(monkeypatch):
    assert _how_to_go_on('a run') == "; go on with: block3_train --resume 'a run'"
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert _how_to_go_on('run') == '; go on with the same launcher and: block3_train --resume run'


def test_mistake_ends_all(tmp_path):
    (tmp_path/'x').write_text('taken')
    began = time.monotonic()
    _,err = finish(start(2, *train, *few, '--out', tmp_path), ok=False)
    assert f'block3_train: {tmp_path} is not empty: a run needs a new folder' in err and time.monotonic() - began < 90
