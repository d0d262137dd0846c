"""Whether two processes train this network faster than one: the same run in turn, in each way, on a CPU."""
import json, os, subprocess, sys, tempfile
from argparse import ArgumentParser
from pathlib import Path
import pandas as pd, torch
from mnist_block3.run import run_environment
from bench import here, start

launcher = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes=2', '--num_machines=1', '--mixed_precision=no',
            '--dynamo_backend=no', '--main_process_port=0']
code = """import sys
from mnist_block3 import fast, run
fast.compile_steps = 0 # as in a long fit
out,epochs,n_train,quick = sys.argv[1:]
run.train_run(out, epochs=int(epochs), n_train=int(n_train), device='cpu', fast=quick == 'fast')
"""
ways = {'one process, fast path': ([], 'fast', 2), "one process, fastai's loop": ([], 'plain', 2), 'two processes': (launcher, 'plain', 1)}


def epochs(way, args, d):
    "Seconds of each epoch but the first"
    launch,quick,threads = ways[way]
    (Path(d)/'train.py').write_text(code)
    cmd = [sys.executable, '-W', 'ignore', *launch, f'{d}/train.py', f'{d}/run', str(args.epochs), str(args.n_train), quick]
    subprocess.run(cmd, env=os.environ | dict(OMP_NUM_THREADS=str(threads)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return pd.read_csv(f'{d}/run/history.csv').seconds.tolist()[1:], json.loads(Path(d, 'run', 'summary.json').read_text())['engine']


def main():
    p = ArgumentParser(description=__doc__)
    p.add_argument('--rounds', type=int, default=3, help='how often each way has its turn')
    p.add_argument('--epochs', type=int, default=3, help='epochs a run; the first is not counted')
    p.add_argument('--n_train', type=int, default=20000, help='training images')
    p.add_argument('--out', type=Path, default=here.parent/'nbs'/'results'/'speed'/'processes-cpu.json')
    a,rows = p.parse_args(),[]
    for r in range(a.rounds):
        for way in ways:
            with tempfile.TemporaryDirectory() as d: seconds,engine = epochs(way, a, d)
            rows += [dict(round=r, way=way, engine=engine, seconds=o) for o in seconds]
    print(pd.DataFrame(rows).groupby('way').seconds.describe())
    a.out.parent.mkdir(parents=True, exist_ok=True)
    about = dict(start=start(), epochs=a.epochs, n_train=a.n_train, **run_environment(torch.device('cpu')))
    a.out.write_text(json.dumps(about | dict(rows=rows), indent=1))


if __name__ == '__main__': main()
