"""What `PreciseBN` would have changed in runs on the holdout whose weights were kept: they are judged again."""
import sys
from pathlib import Path
import pandas as pd, torch, torch.nn.functional as F
from safetensors.torch import load_file
from torch.optim.swa_utils import update_bn
from mnist_block3.all import Block3, load_digits, mean_std, n_holdout, Study


def main(folder):
    train,study = load_digits()[0],Study(folder).read()
    x,y = (train.images[:,None]/255 - mean_std[0])/mean_std[1],train.labels.long()
    n = len(x) - n_holdout

    @torch.no_grad()
    def judge(model):
        logp = torch.cat([model.eval()(o) for o in x[n:].split(100)])
        return F.nll_loss(logp, y[n:]).item(),int((logp.argmax(1) == y[n:]).sum())

    rows = []
    for run in study[~study.precise_bn].to_dict('records'):
        model,path = Block3(drop=0.),Path(folder, 'weights', f'{run["run"]}.safetensors')
        if not path.exists(): continue
        model.load_state_dict(load_file(path))
        before = judge(model)
        update_bn(x[:n].split(64), model)
        after = judge(model)
        rows.append({k: run[k] for k in ('run', 'seed', 'nesterov', 'wd', 'elastic', 'drop')} |
                    dict(loss=before[0], correct=before[1], precise_loss=after[0], precise_correct=after[1]))
        print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(Path(folder, 'precise_bn.csv'), index=False)


if __name__ == '__main__': main(sys.argv[1])
