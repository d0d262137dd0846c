"""Speed side by side: each way of training once a round, round after round, each in a fresh process.

Each measurement is saved at once, so a run that was cut off goes on where it stopped."""
import importlib, json, os, shutil, subprocess, sys, tempfile, time
from argparse import ArgumentParser
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from matplotlib.figure import Figure
import pandas as pd
from mnist_block3.basics import write_whole
from mnist_block3.data import get_device
from mnist_block3.sources import load_digits
from mnist_block3.run import run_environment

here = Path(__file__).resolve().parent
ways = {
    'reference':        dict(module='reference'),
    'pytorch':          dict(module='pytorch'),
    'pytorch compiled': dict(module='pytorch', compiled=True),
    'plain':            dict(module='ours', fast=False),
    'fast':             dict(module='ours')}
on_cpu = {
    'fast, 1 thread':   dict(module='ours', threads=1),
    'fast, busy core':  dict(module='ours', busy=True)}
on_cuda = {
    'fast bf16':        dict(module='ours', bf16=True)}
peers = {'fastai': dict(module='fastai_files'), 'lightning': dict(module='lightning_mnist')}
all_ways = ways | on_cpu | on_cuda | peers
columns = {
    'imports':      'import s',
    'first_epoch':  'first epoch s',
    'warm_train':   'train s',
    'warm_valid':   'evaluate s',
    'warm_epoch':   'epoch s',
    'valid_10000':  'evaluate 10,000 s',
    'fit15':        '15 epochs s',
    'process':      'process s',
    'images_per_s': 'images/s',
    'memory':       'MiB',
    'gpu_memory':   'GPU MiB'}


def round_jobs(names, n_warm=1, whole=False):
    "The processes of a round by name. `fit` is what a user would ask for, of which `n_epoch` epochs are run"
    jobs = {'floor': dict(module='floor', fit=0, n_epoch=0)}
    for name in names: jobs[name] = all_ways[name] | dict(fit=max(15, n_warm+1), n_epoch=n_warm+1)
    if whole: jobs |= {'fast, fit(15)': ways['fast'] | dict(fit=15, n_epoch=15),
                       'fast, fit_tuned(2)': ways['fast'] | dict(tuned=True, fit=2, n_epoch=2)}
    return jobs


@contextmanager
def peer_files(names, n_train):
    "A folder for each of `names` that reads files, filled before anything is timed"
    with tempfile.TemporaryDirectory() as tmp:
        folders = {name: Path(tmp)/name for name in names if name in peers}
        for name,folder in folders.items():
            train,test = load_digits()
            splits = [(digits.images, digits.labels) for digits in (train[:n_train], test)]
            importlib.import_module(f'ways.{peers[name]["module"]}').make_files(folder, splits)
        yield folders


def tree_memory(pid):
    "MiB of a process and all below it; shared pages are divided among their users (the kernel's PSS)"
    proc = Path(f'/proc/{pid}')
    try:
        lines = (proc/'smaps_rollup').read_text().splitlines()
        own = next(int(line.split()[1]) for line in lines if line.startswith('Pss:'))
        below = [child for file in proc.glob('task/*/children') for child in file.read_text().split()]
        return own/2**10 + sum(tree_memory(child) for child in below)
    except (OSError, StopIteration): return 0


def run_process(**kwargs):
    """The output of a fresh process with an empty cache of compiled code, and its peak memory, seen every two seconds.

    Raises `RuntimeError` with the last lines of stderr where it fails."""
    command = [sys.executable, here/'run_way.py', json.dumps(kwargs | dict(began=time.time()))]
    peak = 0
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | dict(TORCHINDUCTOR_CACHE_DIR=cache, XDG_CACHE_HOME=cache)
        p = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            while True:
                try:
                    out,err = p.communicate(timeout=2)
                    break
                except subprocess.TimeoutExpired: peak = max(peak, tree_memory(p.pid))
        finally: p.kill()
    if p.returncode: raise RuntimeError('\n'.join(err.splitlines()[-5:]))
    return json.loads(out.splitlines()[-1]) | dict(memory=peak)


def load_results(path, about):
    "The contents of `path`, or a beginning; `ValueError` where settings, machine or versions were others"
    if not path.exists(): return about | dict(starts=[], runs=[])
    data = json.loads(path.read_text())
    changed = {k: (data.get(k), v) for k,v in about.items() if data.get(k) != v}
    if not changed: return data
    raise ValueError(f'{path} was measured otherwise: {changed}. Name another file with --out, or remove it')


def start():
    "When, from what commit and with what command this began"
    describe = ['git', 'describe', '--always', '--dirty']
    git = shutil.which('git') and subprocess.run(describe, cwd=here, capture_output=True, text=True).stdout.strip()
    return dict(date=datetime.now(timezone.utc).isoformat(timespec='seconds'), commit=git or None,
                command=' '.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]]))


def measure_rounds(path, device, names, rounds=3, n_warm=1, n_train=60_000, whole=False):
    "Measure what is not yet in `path`; returns the contents of `path` then, and the jobs that failed"
    about = dict(settings=dict(n_train=n_train, n_warm=n_warm), **run_environment(device))
    data = load_results(path, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(run['job'], run['round']) for run in data['runs']}
    jobs = round_jobs(names, n_warm, whole)
    todo = [(i,job) for i in range(rounds) for job in jobs if (job,i) not in done]
    failed = set()
    if todo: data['starts'].append(start())
    with peer_files(names if todo else [], n_train) as files:
        for i,job in todo:
            if job in failed: continue
            print(f'round {i+1}/{rounds}  {job:20}', end='', flush=True)
            way = jobs[job] | dict(files=str(files.get(job, '')))
            try: out = run_process(device=device.type, n_train=n_train, seed=i, **way)
            except RuntimeError as e:
                failed.add(job)
                print(f'failed\n{e}')
                continue
            data['runs'].append(dict(job=job, round=i, start=len(data['starts'])-1, **out))
            write_whole(path, json.dumps(data, indent=1, allow_nan=False).encode())
            print(f'{out["process"]:8.1f} s  {out.get("engine", "")}' if 'process' in out else '')
    return data, failed


def results(data):
    "A row for each run of a way"
    return pd.DataFrame([run for run in data['runs'] if run['job'] != 'floor'])


def show_number(x): return '' if pd.isna(x) else f'{x:,.{0 if x >= 100 else 2}f}'

def show_pair(median, best): return f'{show_number(median)} ({show_number(best)})' if pd.notna(median) else ''


def summary_table(data):
    "Median over the rounds and in brackets the best, as text"
    runs = results(data)
    jobs = runs.groupby('job', sort=False)
    measured = [name for name in columns if name in runs]
    median = jobs[measured].median()
    best = jobs[measured].min()
    if 'images_per_s' in measured: best['images_per_s'] = jobs.images_per_s.max()
    cells = {columns[name]: map(show_pair, median[name], best[name]) for name in measured}
    table = pd.DataFrame({name: list(column) for name,column in cells.items()}, index=median.index)
    if 'extrapolated' in runs:
        extrapolated = jobs.extrapolated.agg(lambda values: any(values.dropna()))
        table.loc[extrapolated, columns['fit15']] += ' *'
    return table.assign(engine=jobs.engine.first().fillna('') if 'engine' in runs else '', rounds=jobs.size())


def draw_chart(data):
    "Seconds of a warm epoch by way, medians over the rounds"
    runs = results(data)
    runs = runs[~runs.job.str.contains('fit', regex=False)]
    times = runs.groupby('job', sort=False)[['warm_train', 'warm_valid']].median()[::-1]
    fig = Figure(figsize=(7, 1 + 0.45*len(times)), layout='constrained')
    ax = fig.subplots()
    ax.barh(times.index, times.warm_train, label='train')
    bars = ax.barh(times.index, times.warm_valid, left=times.warm_train, label='evaluate')
    ax.bar_label(bars, [show_number(seconds) for seconds in times.sum(axis=1)], padding=3)
    machine = data['machine']
    hardware = f'{machine["device_name"]}, {machine["threads"]} threads'
    ax.set(xlabel=f'seconds an epoch, first one apart\n{hardware}')
    ax.margins(x=0.1)
    ax.legend()
    return fig


def print_results(data):
    "The table, under the machine and its speed at best"
    machine = data['machine']
    floors = pd.DataFrame([run for run in data['runs'] if run['job'] == 'floor'])
    print(f'\n{machine["device_name"]}, {machine["threads"]} threads, {machine["platform"]}, '
          f'torch {data["versions"]["torch"]}; at best {floors.flops_per_s.max()/1e9:,.0f} GFLOP/s, '
          f'{floors.bytes_per_s.max()/1e9:,.1f} GB/s')
    with pd.option_context('display.width', 250, 'display.max_columns', None): print(summary_table(data))
    print('Median over the rounds (best). * extrapolated: the first epoch and 14 warm ones')


def parse_args(names):
    p = ArgumentParser(description=__doc__)
    p.add_argument('--device', help="'cpu' or 'cuda'; default: the GPU if there is one")
    p.add_argument('--rounds', type=int, default=3, help='how often each way is measured')
    p.add_argument('--epochs', type=int, default=1, help='warm epochs in a process; 14 for 15 whole epochs')
    p.add_argument('--only', nargs='+', choices=names, metavar='NAME', help=', '.join(names))
    p.add_argument('--all', action='store_true', help='also fastai and Lightning as their tutorials use them')
    p.add_argument('--whole', action='store_true', help='also 15 whole epochs of the fast path, and 2 of the tuned recipe')
    p.add_argument('--n_train', type=int, default=60_000, help='training images, to try things out')
    p.add_argument('--out', type=Path, help='default: nbs/results/speed/DEVICE.json')
    return p, p.parse_args()


def main():
    p,args = parse_args(list(all_ways))
    device = get_device(args.device)
    if device.type not in ('cpu', 'cuda'): p.error(f'--device {device.type}: device is cpu or cuda')
    path = args.out or here.parent/'nbs'/'results'/'speed'/f'{device.type}.json'
    names = args.only or [*ways, *dict(cpu=on_cpu, cuda=on_cuda)[device.type], *(peers if args.all else [])]
    settings = args.rounds, args.epochs, args.n_train, args.whole
    try: data,failed = measure_rounds(path, device, names, *settings)
    except ValueError as e: p.error(str(e))
    print_results(data)
    chart = path.with_suffix('.png')
    draw_chart(data).savefig(chart, dpi=120)
    print(f'{path}, {chart}')
    return 1 if failed else 0


if __name__ == '__main__': sys.exit(main())
