"""Runs an hour on a Ray cluster against its workers: `block3_sweep --ray` on one node and on two, all on this machine."""
import json, os, secrets, socket, subprocess, sys, tempfile, time
from argparse import ArgumentParser
from contextlib import contextmanager
from pathlib import Path
import ray, torch
from mnist_block3.run import run_environment
from mnist_block3.sweep import Study
from bench import here, start

clusters = {'one node, one worker': (1, 1), 'one node, two workers': (1, 2), 'two nodes, a worker each': (2, 1)} # nodes, and cores of each
alive = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR'); print(sum(o['Alive'] for o in ray.nodes()))"


@contextmanager
def cluster(nodes, cores):
    "`nodes` Ray nodes with `cores` each, on this machine's loopback; what a driver needs to find them"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{s.getsockname()[1]}'
    env = os.environ | dict(RAY_AUTH_MODE='token', RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED='0', OMP_NUM_THREADS='1',
                            PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    begin = [sys.executable, '-m', 'ray.scripts.scripts', 'start', '--block', f'--num-cpus={cores}', '--num-gpus=0', '--node-ip-address=127.0.0.1',
             '--object-store-memory=100000000', '--disable-usage-stats']
    quiet,procs = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),[]
    def up(): return subprocess.run([sys.executable, '-c', alive, address], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.strip()
    try:
        for n in range(nodes):
            place = [f'--address={address}'] if n else ['--head', f'--port={address.split(":")[1]}', '--include-dashboard=false']
            procs.append(subprocess.Popen([*begin, *place], env=env, **quiet))
            until = time.monotonic() + 120
            while up() != str(n+1):
                if procs[-1].poll() is not None or time.monotonic() > until: raise RuntimeError(f'node {n+1} of {nodes} did not start')
        yield env,address
    finally:
        for o in reversed(procs):
            o.terminate() # a node that blocks ends all that it began
            o.wait(60)


def runs_an_hour(nodes, cores, args):
    "A sweep with as many runs for each worker; how many were done, in which time, and by what"
    n_runs = args.each*nodes*cores
    with cluster(nodes, cores) as (env,address), tempfile.TemporaryDirectory() as d:
        began = time.perf_counter()
        subprocess.run(['block3_sweep', '--ray', '--address', address, '--recipes', 'tuned', '--seeds', f'0-{n_runs-1}', '--epochs', str(args.epochs),
                        '--n_train', str(args.n_train), '--device', 'cpu', '--out', d], env=env, check=True, stdout=subprocess.DEVNULL)
        seconds,done = time.perf_counter() - began,Study(d).read()
    if len(done) != n_runs: raise RuntimeError(f'{len(done)} of {n_runs} runs were done')
    return dict(nodes=nodes, workers=nodes*cores, runs=n_runs, seconds=seconds, an_hour=3600*n_runs/seconds, engine=','.join(sorted(set(done.engine))))


def main():
    p = ArgumentParser(description=__doc__)
    p.add_argument('--rounds', type=int, default=2, help='how often each cluster has its turn')
    p.add_argument('--each', type=int, default=3, help='runs for each worker')
    p.add_argument('--epochs', type=int, default=3, help='epochs a run')
    p.add_argument('--n_train', type=int, default=20000, help='training images')
    p.add_argument('--out', type=Path, default=here.parent/'nbs'/'results'/'speed'/'cluster-cpu.json')
    a,rows = p.parse_args(),[]
    about = dict(start=start(), epochs=a.epochs, n_train=a.n_train, ray=ray.__version__, **run_environment(torch.device('cpu')))
    a.out.parent.mkdir(parents=True, exist_ok=True)
    for r in range(a.rounds):
        for name,o in clusters.items():
            rows.append(dict(round=r, cluster=name) | runs_an_hour(*o, a))
            print(rows[-1], flush=True)
            a.out.write_text(json.dumps(about | dict(rows=rows), indent=1)) # what was measured stays, should a later one fail


if __name__ == '__main__': main()
