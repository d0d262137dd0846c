"""Whether a sweep uses the cores better with a run on each, or with one run on all: the same runs in turn, both ways."""
import json, os, tempfile, time
from argparse import ArgumentParser
from pathlib import Path
import pandas as pd, torch
from mnist_block3.run import run_environment
from mnist_block3.sweep import sweep, sweep_grid
from bench import here, start


def main():
    cores = len(os.sched_getaffinity(0))
    p = ArgumentParser(description=__doc__)
    p.add_argument('--rounds', type=int, default=2, help='how often both ways have their turn')
    p.add_argument('--epochs', type=int, default=8, help='epochs a run; long enough to be compiled')
    p.add_argument('--out', type=Path, default=here.parent/'nbs'/'results'/'speed'/'jobs-cpu.json')
    a = p.parse_args()
    runs,rows = sweep_grid(['tuned'], range(cores), epochs=a.epochs, valid='holdout', device='cpu'),[]
    for r in range(a.rounds):
        for jobs in (cores, 1):
            with tempfile.TemporaryDirectory() as d:
                began = time.perf_counter()
                study = sweep(runs, d, jobs=jobs, threads=cores//jobs).read()
                seconds = time.perf_counter() - began
            rows.append(dict(round=r, jobs=jobs, threads=cores//jobs, runs=len(study), seconds=seconds, engine=study.engine.iloc[0]))
    print(pd.DataFrame(rows).to_string(index=False))
    a.out.parent.mkdir(parents=True, exist_ok=True)
    about = dict(start=start(), epochs=a.epochs, **run_environment(torch.device('cpu')))
    a.out.write_text(json.dumps(about | dict(rows=rows), indent=1))


if __name__ == '__main__': main()
