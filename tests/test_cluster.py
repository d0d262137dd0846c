"A sweep on a Ray cluster of two nodes, one of which dies, as the driver does"
import os, secrets, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from mnist_block3.all import Study, run_name, sweep, sweep_grid

pytestmark = pytest.mark.slow
wanted = dict(valid='reference', epochs=60, n_train=320, device='cpu')


def marked(mark, what=''):
    "The processes that began with `mark` in their environment, and with `what` in their command line"
    for o in Path('/proc').glob('[0-9]*'):
        try: env,args = (o/'environ').read_bytes().split(b'\0'),(o/'cmdline').read_bytes()
        except OSError: continue
        if mark.encode() in env and what.encode() in args: yield int(o.name)


def kill(mark):
    "As a power cut does"
    while pids := list(marked(mark)):
        for o in pids:
            try: os.kill(o, signal.SIGKILL)
            except ProcessLookupError: pass
        time.sleep(0.1)


@pytest.fixture
def cluster(tmp_path):
    "Two nodes of a core each on this machine; what a driver needs to find them"
    pytest.importorskip('ray')
    if not Path('/proc/self/environ').exists(): pytest.skip('needs /proc')
    with socket.socket() as s:
        s.bind(('', 0))
        port = s.getsockname()[1]
    env = os.environ | dict(RAY_AUTH_MODE='token', RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED='0', OMP_NUM_THREADS='1',
                            PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    env.pop('BLOCK3_NODE', None)
    ray = [sys.executable, '-m', 'ray.scripts.scripts', 'start', '--num-cpus=1', '--object-store-memory=100000000', '--disable-usage-stats']
    said = subprocess.run([*ray, '--head', f'--port={port}', '--include-dashboard=false'], env=env | dict(BLOCK3_NODE='a'), check=True, text=True, capture_output=True).stdout
    address = next(o.split("'")[1] for o in said.splitlines() if '--address=' in o)
    subprocess.run([*ray, f'--address={address}'], env=env | dict(BLOCK3_NODE='b'), check=True, capture_output=True)
    yield env,address
    for o in 'ab': kill(f'BLOCK3_NODE={o}')
    last = Path(tempfile.gettempdir())/'ray'/'ray_current_cluster' # where the next `ray.init` would look for it for minutes
    if last.is_file() and last.read_text() == address: last.unlink()


def test_a_node_and_the_driver_die(cluster, tmp_path):
    (env,address),study = cluster,Study(tmp_path/'ray')
    args = [f'--{k}={v}' for k,v in (wanted | dict(seeds='0-7', recipes='tuned', out=study.folder, address=address)).items()]
    def drive(): return subprocess.Popen(['block3_sweep', '--ray', *args], env=env | dict(BLOCK3_NODE='driver'), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    def until(done):
        began = time.monotonic()
        while not done():
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() - began < 300
            time.sleep(0.2)
    def at_work(node): return list(marked(f'BLOCK3_NODE={node}', 'mnist_block3.sweep'))

    driver = drive()
    until(lambda: at_work('a') and at_work('b')) # both nodes do runs
    until(lambda: len(study.done) >= 2)
    until(lambda: at_work('b'))
    before = study.read()
    kill('BLOCK3_NODE=b')
    until(lambda: len(study.done) >= 4)
    assert before.equals(study.read().iloc[:len(before)]) # nothing that was finished is lost
    driver.kill()
    driver.communicate()
    before = study.read()

    driver = drive()
    said,err = driver.communicate(timeout=600)
    assert driver.returncode == 0, said + err
    assert said.startswith(f'8 runs, {len(before)} of them done; 1 at once on Ray') # only what is missing
    after = study.read()
    assert before.equals(after.iloc[:len(before)]) and sorted(after.seed) == list(range(8)) and study.read('failures').empty

    here = sweep(sweep_grid(['tuned'], range(8), **wanted), tmp_path/'here', jobs=2, threads=1, log=[].append)
    assert here.done == study.done
    for o in here.done:
        a,b = (load_file(s.folder/'weights'/f'{o}.safetensors') for s in (here, study))
        assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
