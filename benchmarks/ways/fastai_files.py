"fastai as its tutorials use it: a `DataBlock` of image files, and a plain `Learner`"
from fastai.vision.all import *
from mnist_block3.model import Block3
from .timer import Timer


def make_files(folder, splits):
    "Write the digits of `splits` as PNG files, in the folders that the tutorials have"
    for name,(images,labels) in zip(('training', 'testing'), splits):
        for c in range(10): (folder/name/str(c)).mkdir(parents=True)
        for i,(image,label) in enumerate(zip(images.numpy(), labels.tolist())):
            Image.fromarray(image).save(folder/name/str(label)/f'{i}.png')


def run(clock, device, n_epoch, files, **kwargs):
    "Train on `training`, evaluate on `testing`"
    tfms = [Rotate(max_deg=5, p=1.), Zoom(min_zoom=28/22, max_zoom=28/22, p=0.1),
            Normalize.from_stats(0.1307, 0.3081, cuda=device == 'cuda')]
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      splitter=GrandparentSplitter('training', 'testing'), batch_tfms=tfms)
    dls = block.dataloaders(Path(files), bs=64, device=torch.device(device))
    learn = Learner(dls, Block3(), loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=0.8), lr=0.02,
                    metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        clock('fit')
        learn.fit(n_epoch, cbs=Timer(clock, n_epoch))
    return dict(accuracy=learn.recorder.values[-1][-1])
