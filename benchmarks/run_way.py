"Run one way in this process and print its times as JSON; bench.py starts it, with the settings as JSON"
import time
started = time.perf_counter()
import importlib, json, statistics, subprocess, sys
from contextlib import contextmanager, nullcontext


def timings(clock, n_train):
    "Seconds from the clock's marks. Epochs after the first are warm; 15 epochs are extrapolated unless run"
    epochs = clock.epochs()
    first,*warm = epochs
    out = dict(epochs=epochs, first_epoch=first['epoch'])
    if not warm: return out
    out |= {f'warm_{part}': statistics.median(epoch[part] for epoch in warm) for part in first}
    fit15 = sum(epoch['epoch'] for epoch in epochs[:15])
    extrapolated = len(epochs) < 15
    if extrapolated: fit15 = first['epoch'] + 14*out['warm_epoch']
    return out | dict(fit15=fit15, extrapolated=extrapolated, images_per_s=n_train/out['warm_train'])


@contextmanager
def busy_core():
    "Another process keeps a core busy"
    other = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
    try: yield
    finally: other.kill()


def measure(module, device, n_train, n_epoch, fit, seed, files, began, threads=None, busy=False, **kwargs):
    "The times of `run` in `ways.<module>`; `began`: when this process was started"
    way = importlib.import_module(f'ways.{module}')
    import torch
    from ways.common import Clock
    imported = time.perf_counter()
    torch.manual_seed(seed)
    if threads: torch.set_num_threads(threads)
    clock = Clock(device)
    with busy_core() if busy else nullcontext():
        out = way.run(clock, device=device, n_train=n_train, n_epoch=n_epoch, fit=fit, files=files, **kwargs)
    if clock.marks:
        setup = clock.at('fit')[0] - imported
        out |= dict(process=time.time() - began, imports=imported - started, setup=setup)
        out |= timings(clock, n_train)
    if device == 'cuda': out['gpu_memory'] = torch.cuda.max_memory_allocated()/2**20
    return out


if __name__ == '__main__': print(json.dumps(measure(**json.loads(sys.argv[1]))))
