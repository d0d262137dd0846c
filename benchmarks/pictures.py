"Seconds an epoch on pictures of one's own, beside MNIST's and beside fastai's own loaders and loop"
import argparse, json, tempfile, warnings
from datetime import datetime
from pathlib import Path
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from mnist_block3.all import *


def write_digits(folder, split, digits):
    for i,(image,label) in enumerate(zip(digits.images.numpy(), digits.labels.tolist())):
        path = folder/split/str(label)/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def write_shapes(folder, split, n):
    "Coloured discs and boxes of 64×64 pixels"
    rng = np.random.default_rng(n)
    for i in range(n):
        im = Image.new('RGB', (64,64), tuple(rng.integers(0, 120, 3)))
        corner = rng.integers(2, 30, 2)
        kind = 'disc' if i % 2 else 'box'
        draw = ImageDraw.Draw(im)
        (draw.ellipse if i % 2 else draw.rectangle)([*corner, *(corner + 30)], tuple(rng.integers(130, 256, 3)))
        path = folder/split/kind/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        im.save(path)


def fastai_learner(folder):
    "fastai's own loaders and loop, with the same network, augmentation and optimizer"
    tfms = [*aug_transforms(do_flip=False, max_rotate=5., max_zoom=1.25, max_lighting=0., max_warp=0., p_affine=1.), Normalize()]
    dls = ImageDataLoaders.from_folder(folder, train='train', valid='test', item_tfms=Resize(64), batch_tfms=tfms, bs=64)
    return Learner(dls, Block3(n_in=3, n_out=2, size=64), loss_func=NLLLossFlat(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD),
                   lr=0.02, metrics=accuracy, cbs=History())


def main(out, n, rounds):
    with tempfile.TemporaryDirectory() as d:
        digits,shapes = Path(d)/'digits', Path(d)/'shapes'
        train,test = load_digits()
        write_digits(digits, 'train', train[:n])
        write_digits(digits, 'test', test[:n])
        write_shapes(shapes, 'train', n//5)
        write_shapes(shapes, 'test', n//20)
        own = image_dls(digits, device='cpu')
        mnist = mnist_dls(n_train=n, device='cpu')
        ways = {'mnist': lambda: block3_learner(mnist), 'own 28': lambda: block3_learner(own),
                'own 64 colour': lambda: block3_learner(image_dls(shapes, size=64, device='cpu')),
                'fastai 64 colour': lambda: fastai_learner(shapes)}
        rows = []
        for i in range(rounds):
            for way,make in ways.items():
                learn = make()
                with learn.no_bar(), learn.no_logging(): learn.fit(2)
                engine = learn.fast_epoch.engine if hasattr(learn, 'fast_epoch') else 'fastai'
                rows.append(dict(way=way, round=i, seconds=history(learn).seconds.iloc[-1], n=learn.dls.train.n, n_valid=learn.dls.valid.n, engine=engine))
                print(rows[-1], flush=True)
                about = run_environment(torch.device('cpu')) | dict(date=f'{datetime.now():%Y-%m-%d %H:%M}')
                Path(out).write_text(json.dumps(about | dict(rows=rows), indent=1))


if __name__ == '__main__':
    warnings.filterwarnings('ignore')
    parser = argparse.ArgumentParser()
    parser.add_argument('--out', default='pictures.json')
    parser.add_argument('--n', type=int, default=10_000)
    parser.add_argument('--rounds', type=int, default=5)
    main(**vars(parser.parse_args()))
