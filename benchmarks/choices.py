"""What was chosen for the compiled step of a CPU, beside what was not: milliseconds a step, in turn in one process."""
import json, statistics, time
from argparse import ArgumentParser
from contextlib import nullcontext
from pathlib import Path
import torch
from mnist_block3.all import *
from mnist_block3.fast import PointwiseAsMatmul, Steps, as_function
from mnist_block3.run import run_environment
from bench import here, start

layouts = {'NCHW': torch.contiguous_format, 'NHWC': torch.channels_last}
compiled = [dict(compiled=True, layout=o, matmul=m, bf16=b)
            for b in (False, True) for o in layouts for m in (False, True)]
variants = [dict(compiled=False, layout=o, matmul=False, bf16=False) for o in layouts] + compiled


def make_steps(compiled, layout, matmul, bf16, n_steps, bs=64):
    "`Steps` whose batches are predicted by this variant"
    set_seed(0)
    learn = block3_learner(mnist_dls(n_train=n_steps*bs, device='cpu'))
    learn.create_opt()
    dl,opt,model = learn.dls.train,learn.opt.opt,learn.model.train()
    tfms,images = [as_function(o) for o in dl.after_batch.fs],dl.dataset.items.images
    def pred(idxs):
        x = images[idxs][:,None]
        for f in tfms: x = f(x)
        x = x.contiguous(memory_format=layouts[layout])
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16), PointwiseAsMatmul() if matmul else nullcontext():
            return model(x).float()
    steps = Steps(model, learn.loss_func, tfms, dl.dataset.items, opt.param_groups, opt.state, n_steps*bs, bs)
    steps.full_pred = torch.compile(pred, dynamic=False) if compiled else pred
    steps.start(range(n_steps*bs), [[0.02]]*n_steps, [[0.8]]*n_steps)
    steps.prepare()
    return steps


def main():
    p = ArgumentParser(description=__doc__)
    p.add_argument('--rounds', type=int, default=10, help='how often each variant has its turn')
    p.add_argument('--n_steps', type=int, default=12, help='steps a turn; the first is not counted')
    p.add_argument('--out', type=Path, default=here.parent/'nbs'/'results'/'speed'/'choices-cpu.json')
    a = p.parse_args()
    steps,times = [make_steps(**o, n_steps=a.n_steps) for o in variants],[[] for _ in variants]
    for _ in range(a.rounds):
        for st,ts in zip(steps, times):
            st.at.zero_()
            for i in range(a.n_steps):
                began = time.perf_counter()
                st(i)
                if i: ts.append(1e3*(time.perf_counter() - began))
    rows = [o | dict(min_ms=min(ts), median_ms=statistics.median(ts)) for o,ts in zip(variants, times)]
    print(pd.DataFrame(rows).round(1).to_string(index=False))
    a.out.parent.mkdir(parents=True, exist_ok=True)
    about = dict(start=start(), rounds=a.rounds, n_steps=a.n_steps, **run_environment(torch.device('cpu')))
    a.out.write_text(json.dumps(about | dict(variants=rows), indent=1))


if __name__ == '__main__': main()
