"Run one way in this process, and print what it took as a line of JSON; started by bench.py, with the settings as JSON"
import time
started = time.perf_counter()
import importlib, json, statistics, sys


def timings(clock, n_train):
    "Seconds from the clock's marks; an epoch after the first is warm; 15 epochs are extrapolated unless they were run"
    epochs = clock.epochs()
    first,*warm = epochs
    out = dict(epochs=epochs, first_epoch=first['epoch'])
    if warm:
        out |= {f'warm_{k}': statistics.median(o[k] for o in warm) for k in first}
        extrapolated = len(epochs) < 15
        fit15 = first['epoch'] + 14*out['warm_epoch'] if extrapolated else sum(o['epoch'] for o in epochs[:15])
        out |= dict(fit15=fit15, extrapolated=extrapolated, images_per_s=n_train/out['warm_train'])
    return out


def measure(module, device, n_train, n_epoch, fit, seed, files, began, **kwargs):
    "What `run` of `ways.<module>` took; `began`: when this process was started"
    way = importlib.import_module(f'ways.{module}')
    import torch
    from ways.common import Clock
    imported = time.perf_counter()
    torch.manual_seed(seed)
    clock = Clock(device)
    out = way.run(clock, device=device, n_train=n_train, n_epoch=n_epoch, fit=fit, files=files, **kwargs)
    if clock.marks:
        out |= dict(process=time.time() - began, imports=imported - started, setup=clock.at('fit')[0] - imported)
        out |= timings(clock, n_train)
    if device == 'cuda': out['gpu_memory'] = torch.cuda.max_memory_allocated()/2**20
    return out


if __name__ == '__main__': print(json.dumps(measure(**json.loads(sys.argv[1]))))
