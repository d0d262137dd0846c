"""The cost of the same bits each time, for `gpu.sh`: fits of one seed with the fastest cuDNN kernels and with
deterministic ones, in turn. A hash tells which fits ended with the same weights."""
import hashlib, json
from argparse import ArgumentParser
from pathlib import Path
import pandas as pd, torch
from mnist_block3.all import block3_learner, history, mnist_dls, set_seed
from mnist_block3.run import run_environment
from bench import here, start


def fit(deterministic, args):
    "Seconds of each epoch but the first, the engine, and a hash of the weights"
    flags = dict(enabled=True, benchmark=False, deterministic=deterministic, allow_tf32=True)
    with torch.backends.cudnn.flags(**flags):
        set_seed(0)
        learn = block3_learner(mnist_dls(device=args.device, n_train=args.n_train))
        with learn.no_bar(), learn.no_logging(): learn.fit_tuned(args.epochs)
    weights = b''.join(t.cpu().numpy().tobytes() for t in learn.model.state_dict().values())
    return history(learn).seconds.tolist()[1:], learn.fast_epoch.engine, hashlib.sha1(weights).hexdigest()[:8]


def main():
    p = ArgumentParser(description=__doc__)
    p.add_argument('--device', default='cuda', help='cpu or cuda')
    p.add_argument('--rounds', type=int, default=5, help='how often each way has its turn')
    p.add_argument('--epochs', type=int, default=4, help='epochs a fit; the first is not counted')
    p.add_argument('--n_train', type=int, help='training images; all if not given')
    p.add_argument('--out', type=Path, default=here.parent/'nbs'/'results'/'speed'/'deterministic.json')
    args = p.parse_args()
    rows = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = dict(start=start(), epochs=args.epochs, n_train=args.n_train)
    about |= run_environment(torch.device(args.device))
    for i in range(args.rounds):
        for deterministic in (False, True):
            seconds,engine,weights = fit(deterministic, args)
            row = dict(round=i, deterministic=deterministic, engine=engine, weights=weights)
            rows += [row | dict(seconds=s) for s in seconds]
            args.out.write_text(json.dumps(about | dict(rows=rows), indent=1))
    table = pd.DataFrame(rows).groupby('deterministic')
    print(table.seconds.agg(['min', 'median']).assign(different_weights=table.weights.nunique()))


if __name__ == '__main__': main()
