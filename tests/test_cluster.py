"A sweep on a Ray cluster of two nodes, one of which dies, as the driver does"
import os, secrets, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from mnist_block3.all import Study, sweep, sweep_grid

pytestmark = pytest.mark.slow
wanted = dict(valid='reference', epochs=30, n_train=320, device='cpu')


def processes(node, command=''):
    "Processes with the name of a node in their environment and `command` in their command line"
    for proc in Path('/proc').glob('[0-9]*'):
        try:
            env = (proc/'environ').read_bytes()
            args = (proc/'cmdline').read_bytes()
        except OSError: continue
        if f'BLOCK3_NODE={node}'.encode() in env and command.encode() in args: yield int(proc.name)


def kill(node):
    "As a power cut does"
    while pids := list(processes(node)):
        for pid in pids:
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        time.sleep(0.1)


def free_port():
    with socket.socket() as s:
        s.bind(('', 0))
        return s.getsockname()[1]


@pytest.fixture
def cluster():
    "The environment and the address of two Ray nodes with one core each, on this machine"
    pytest.importorskip('ray')
    if not Path('/proc/self/environ').exists(): pytest.skip('needs /proc')
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    env = os.environ | dict(RAY_AUTH_MODE='token', RAY_AUTH_TOKEN=secrets.token_hex(32),
                            RAY_USAGE_STATS_ENABLED='0', OMP_NUM_THREADS='1', PATH=path)
    def start(node, *args):
        ray = [sys.executable, '-m', 'ray.scripts.scripts', 'start', '--num-cpus=1',
               '--object-store-memory=100000000', '--disable-usage-stats']
        node_env = env | dict(BLOCK3_NODE=node)
        return subprocess.run([*ray, *args], env=node_env, check=True, text=True, capture_output=True).stdout
    out = start('a', '--head', f'--port={free_port()}', '--include-dashboard=false')
    address = next(line.split("'")[1] for line in out.splitlines() if '--address=' in line)
    start('b', f'--address={address}')
    yield env, address
    for node in 'ab': kill(node)
    last = Path(tempfile.gettempdir())/'ray'/'ray_current_cluster' # the next `ray.init` would look here
    if last.is_file() and last.read_text() == address: last.unlink()


def test_a_node_and_the_driver_die(cluster, tmp_path):
    env,address = cluster
    study = Study(tmp_path/'ray')
    settings = wanted | dict(seeds='0-7', recipes='tuned', out=study.folder, address=address)
    command = ['block3_sweep', '--ray', *[f'--{k}={v}' for k,v in settings.items()]]
    def drive():
        return subprocess.Popen(command, env=env | dict(BLOCK3_NODE='driver'), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    def wait_until(true):
        began = time.monotonic()
        while not true():
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() - began < 300
            time.sleep(0.2)
    def at_work(node): return any(processes(node, 'mnist_block3.sweep'))

    driver = drive()
    wait_until(lambda: at_work('a') and at_work('b'))
    wait_until(lambda: len(study.done) >= 2)
    wait_until(lambda: at_work('b'))
    before = study.read()
    kill('b')
    wait_until(lambda: len(study.done) >= 4)
    assert before.equals(study.read().iloc[:len(before)]) # nothing that was finished is lost
    driver.kill()
    driver.communicate()
    before = study.read()

    driver = drive()
    out,err = driver.communicate(timeout=600)
    assert driver.returncode == 0, out + err
    assert out.startswith(f'8 runs, {len(before)} of them done; 1 at once on Ray') # only what is missing
    after = study.read()
    assert before.equals(after.iloc[:len(before)]) and sorted(after.seed) == list(range(8))
    assert study.read('failures').empty

    here = sweep(sweep_grid(['tuned'], range(8), **wanted), tmp_path/'here', jobs=2, threads=1, log=[].append)
    assert here.done == study.done
    for name in here.done:
        weights = [load_file(s.folder/'weights'/f'{name}.safetensors') for s in (here, study)]
        torch.testing.assert_close(*weights, rtol=0, atol=0)
