"""Speed side by side: each way of training once a round, round after round, each in a fresh process.

What is measured is kept after each process, so a run that was cut off goes on where it stopped."""
import importlib, json, os, subprocess, sys, tempfile, time
from argparse import ArgumentParser
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from matplotlib.figure import Figure
import pandas as pd
from mnist_block3.data import get_device, load_digits
from mnist_block3.run import run_environment, write_whole

here = Path(__file__).resolve().parent
ways = {
    'reference': dict(module='reference'),
    'pytorch':   dict(module='pytorch'),
    'plain':     dict(module='ours', fast=False),
    'fast':      dict(module='ours'),
    'fast bf16': dict(module='ours', bf16=True)}
peers = {'fastai': dict(module='fastai_files'), 'lightning': dict(module='lightning_mnist')}
columns = {'imports': 'import s', 'first_epoch': 'first epoch s', 'warm_train': 'train s', 'warm_valid': 'evaluate s',
           'warm_epoch': 'epoch s', 'fit15': '15 epochs s', 'process': 'process s', 'images_per_s': 'images/s',
           'memory': 'MiB', 'gpu_memory': 'GPU MiB'}


def round_jobs(names, n_warm=1, one_epoch=False, device='cpu'):
    "The processes of a round by name: `fit` is what a user would ask for, `n_epoch` how many epochs are run of it"
    jobs = {'floor': dict(module='floor', fit=0, n_epoch=0)}
    jobs |= {o: (ways | peers)[o] | dict(fit=max(15, n_warm+1), n_epoch=n_warm+1) for o in names}
    if one_epoch: jobs |= {f'{o}, fit(1)': ways[o] | dict(fit=1, n_epoch=1) for o in ('plain', 'fast')}
    if one_epoch and device == 'cuda':
        jobs |= {f'{o}, fit(15)': ways[o] | dict(fit=15, n_epoch=15) for o in ('plain', 'fast', 'fast bf16')}
    return jobs


@contextmanager
def peer_files(names, n_train):
    "A folder for each of `names` that reads files, filled before anything is timed"
    with tempfile.TemporaryDirectory() as tmp:
        folders = {o: Path(tmp)/o for o in names if o in peers}
        for o,folder in folders.items():
            train,test = load_digits()
            splits = [(d.images, d.labels) for d in (train[:n_train], test)]
            importlib.import_module(f'ways.{peers[o]["module"]}').make_files(folder, splits)
        yield folders


def tree_memory(pid):
    "Memory in MiB of a process and all below it; pages that several share are divided among them (the kernel's PSS)"
    proc = Path(f'/proc/{pid}')
    try:
        own = next(o for o in (proc/'smaps_rollup').read_text().splitlines() if o.startswith('Pss:'))
        below = [o for f in proc.glob('task/*/children') for o in f.read_text().split()]
        return int(own.split()[1])/2**10 + sum(map(tree_memory, below))
    except (OSError, StopIteration): return 0


def run_process(**kwargs):
    """What a fresh process with an empty compile cache prints, and its peak memory, looked at every two seconds.

    Raises `RuntimeError` with the end of its complaints where it fails."""
    command,peak = [sys.executable, here/'run_way.py', json.dumps(kwargs | dict(began=time.time()))],0
    with (tempfile.TemporaryDirectory() as cache,
          subprocess.Popen(command, env=os.environ | dict(TORCHINDUCTOR_CACHE_DIR=cache), stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True) as p):
        while True:
            try: out,err = p.communicate(timeout=2)
            except subprocess.TimeoutExpired: peak = max(peak, tree_memory(p.pid))
            except BaseException: p.kill(); raise
            else: break
    if p.returncode: raise RuntimeError('\n'.join(err.splitlines()[-5:]))
    return json.loads(out.splitlines()[-1]) | dict(memory=peak)


def load_results(path, about):
    "What `path` holds, or a beginning; `ValueError` where settings, machine or versions were others"
    if not path.exists(): return about | dict(starts=[], runs=[])
    data = json.loads(path.read_text())
    if bad := {k: (data.get(k), v) for k,v in about.items() if data.get(k) != v}:
        raise ValueError(f'{path} was measured otherwise: {bad}. Choose another file with --out, or remove it')
    return data


def start():
    "When, from what commit and with what command this began"
    git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=here, capture_output=True, text=True)
    return dict(date=datetime.now(timezone.utc).isoformat(timespec='seconds'), commit=git.stdout.strip(),
                command=' '.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]]))


def measure_rounds(path, device, names, rounds=3, n_warm=1, n_train=60_000, one_epoch=False):
    "Measure what is not yet in `path`; returns all it holds then, and the jobs that failed"
    about = dict(settings=dict(n_train=n_train, n_warm=n_warm), **run_environment(device))
    data,failed = load_results(path, about),set()
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(o['job'], o['round']) for o in data['runs']}
    jobs = round_jobs(names, n_warm, one_epoch, device.type)
    todo = [(r,o) for r in range(rounds) for o in jobs if (o,r) not in done]
    if not todo: return data,failed
    data['starts'].append(start())
    with peer_files(names, n_train) as files:
        for r,job in todo:
            if job in failed: continue
            print(f'round {r+1}/{rounds}  {job:20}', end='', flush=True)
            way = jobs[job] | dict(files=str(files.get(job, '')))
            try: out = run_process(device=device.type, n_train=n_train, seed=r, **way)
            except RuntimeError as e:
                failed.add(job)
                print(f'failed\n{e}')
                continue
            data['runs'].append(dict(job=job, round=r, start=len(data['starts'])-1, **out))
            write_whole(path, json.dumps(data, indent=1, allow_nan=False).encode())
            print(f'{out["process"]:8.1f} s  {out.get("engine", "")}' if 'process' in out else '')
    return data,failed


def results(data):
    "A row for each run of a way"
    return pd.DataFrame([o for o in data['runs'] if o['job'] != 'floor'])


def show_number(x): return '' if pd.isna(x) else f'{x:,.{0 if x >= 100 else 2}f}'


def summary_table(data):
    "Median over the rounds and in brackets the best, as text"
    runs = results(data)
    g,cols = runs.groupby('job', sort=False),[o for o in columns if o in runs]
    median,best = g[cols].median(),g[cols].min()
    if 'images_per_s' in cols: best['images_per_s'] = g.images_per_s.max()
    show = lambda a,b: f'{show_number(a)} ({show_number(b)})' if pd.notna(a) else ''
    text = pd.DataFrame({columns[c]: list(map(show, median[c], best[c])) for c in cols}, index=median.index)
    if 'extrapolated' in runs: text.loc[g.extrapolated.agg(lambda o: any(o.dropna())), columns['fit15']] += ' *'
    return text.assign(engine=g.engine.first().fillna('') if 'engine' in runs else '', rounds=g.size())


def draw_chart(data):
    "Seconds of a warm epoch by way, medians over the rounds"
    runs = results(data)
    runs = runs[~runs.job.str.contains('fit', regex=False)]
    times = runs.groupby('job', sort=False)[['warm_train', 'warm_valid']].median()[::-1]
    fig = Figure(figsize=(7, 1 + 0.45*len(times)), layout='constrained')
    ax = fig.subplots()
    ax.barh(times.index, times.warm_train, label='train')
    bars = ax.barh(times.index, times.warm_valid, left=times.warm_train, label='evaluate')
    ax.bar_label(bars, [show_number(o) for o in times.sum(axis=1)], padding=3)
    machine = data['machine']
    ax.set(xlabel=f'seconds an epoch, first one apart\n{machine["device_name"]}, {machine["threads"]} threads')
    ax.margins(x=0.1)
    ax.legend()
    return fig


def main():
    p = ArgumentParser(description=__doc__)
    p.add_argument('--device', help="'cpu' or 'cuda'; default: the GPU if there is one")
    p.add_argument('--rounds', type=int, default=3, help='how often each way is measured')
    p.add_argument('--epochs', type=int, default=1, help='warm epochs in a process; from 14 on, 15 epochs are really run')
    p.add_argument('--only', nargs='+', choices=[*ways, *peers], metavar='NAME', help=', '.join([*ways, *peers]))
    p.add_argument('--all', action='store_true', help='also fastai and Lightning as their tutorials use them')
    p.add_argument('--one-epoch', action='store_true', help='also whole processes of fit(1), and on a GPU of fit(15)')
    p.add_argument('--n_train', type=int, default=60_000, help='training images, to try things out')
    p.add_argument('--out', type=Path, help='default: nbs/results/speed/cpu.json or cuda.json; the chart goes beside it')
    a = p.parse_args()
    device = get_device(a.device)
    if device.type not in ('cpu', 'cuda'): p.error(f'--device {device.type}: device is cpu or cuda')
    path = a.out or here.parent/'nbs'/'results'/'speed'/f'{device.type}.json'
    names = a.only or [*ways, *(peers if a.all else [])]
    try: data,failed = measure_rounds(path, device, names, a.rounds, a.epochs, a.n_train, a.one_epoch)
    except ValueError as e: p.error(str(e))
    m,floors = data['machine'],pd.DataFrame([o for o in data['runs'] if o['job'] == 'floor'])
    print(f'\n{m["device_name"]}, {m["threads"]} threads, {m["platform"]}, torch {data["versions"]["torch"]}; '
          f'at best {floors.flops_per_s.max()/1e9:,.0f} GFLOP/s, {floors.bytes_per_s.max()/1e9:,.1f} GB/s')
    with pd.option_context('display.width', 250, 'display.max_columns', None): print(summary_table(data))
    print('Median over the rounds (best). * extrapolated: the first epoch and 14 warm ones')
    draw_chart(data).savefig(path.with_suffix('.png'), dpi=120)
    print(f'{path}, {path.with_suffix(".png")}')
    return 1 if failed else 0


if __name__ == '__main__': sys.exit(main())
