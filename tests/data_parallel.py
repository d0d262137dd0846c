"What test_distributed.py has each process of a launcher do; each process saves what it found in its own file"
import sys, warnings
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')
from pathlib import Path
import torch
from torch import nn
from mnist_block3.all import *
from mnist_block3.distributed import *
from mnist_block3 import run as run_module

rank = rank_distrib()
out = Path(sys.argv[1])
found = {}


class Watch(Callback):
    "Note losses and sizes of the training batches as the other callbacks see them, in float64"
    order = 100
    def before_fit(self):
        self.losses = []
        self.rows = []
        self.start = {k: v.clone() for k,v in get_model(self.model).state_dict().items()}
    def before_batch(self): self.learn.xb = tuple(x.double() for x in self.xb)
    def after_loss(self):
        if not self.training: return
        self.losses.append(self.loss.item())
        self.rows.append(len(self.pred))
        self.learn.loss = self.loss.float() # fastai's Recorder needs float32


class FixedBN(Callback):
    "BatchNorm that does not look at the batch"
    order = 90
    def before_train(self):
        for m in self.model.modules():
            if isinstance(m, nn.BatchNorm2d): m.eval()


def note_shares(dl):
    "A list that gets the indices of each batch that `dl` takes"
    shares = []
    take = dl.take
    def noted_take(idxs):
        shares.append([int(i) for i in idxs])
        return take(idxs)
    dl.take = noted_take
    return shares


def train(learn, n_epoch=1, **kwargs):
    with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, **kwargs)


def float64_fit(name, *cbs):
    "Two epochs, with odd batches of which the last has one image"
    set_seed(1 + rank) # so that processes differ in all that they do not agree on
    dls = mnist_dls(n_train=131, bs=65, valid='reference', device='cpu', aug_tfms=[])
    loss_func = nn.NLLLoss() # fastai's losses round to float32
    learn = block3_learner(dls, lr=0.05, loss_func=loss_func, cbs=[Watch(), *cbs])
    learn.model.double()
    for m in learn.model.modules():
        if isinstance(m, nn.Dropout2d): m.p = 0.
    shares = note_shares(dls.train)
    train(learn, 2)
    assert not isinstance(learn.model, nn.parallel.DistributedDataParallel)
    assert all(dl.shard == (0,1) for dl in dls)
    watch = learn.watch
    found[name] = dict(shares=shares, losses=watch.losses, rows=watch.rows, start=watch.start,
                       end=learn.model.state_dict(), history=learn.history.rows)


def evaluation():
    "Of 1000 images in batches of odd size; also of the loader that shuffles, with other seeds"
    set_seed(1 + rank)
    dls = mnist_dls(n_train=1000, bs=49, valid='reference', device='cpu', aug_tfms=[])
    learn = block3_learner(dls, pretrained=True, metrics=[accuracy, F1Score(average='macro')])
    with learn.distrib_ctx(), learn.no_bar(), learn.no_logging():
        found['validate'] = list(learn.validate())
        found['preds'] = [torch.as_tensor(t).clone() for t in learn.get_preds()]
        shares = note_shares(dls.train)
        found['shuffled'] = dict(shares=shares, validate=list(learn.validate(0)))
        try: learn.get_preds(with_input=True)
        except ValueError as e: found['with_input'] = str(e)


def mixed():
    "With a callback that changes the loss function from batch to batch"
    set_seed(1 + rank)
    learn = block3_learner(mnist_dls(n_train=130, bs=49, valid='reference', device='cpu'), cbs=MixUp())
    train(learn)
    found['mixed'] = [float(loss) for loss in learn.recorder.losses]


def draws():
    "The first random numbers of a training batch"
    set_seed(1)
    class Draw(Callback):
        order = 100
        def before_batch(self):
            if self.training: found['draw'] = torch.rand(4)
    train(block3_learner(mnist_dls(n_train=64, valid='reference', device='cpu')), cbs=Draw())


def run():
    "A whole run by the tuned recipe, in which all but the first process must not write"
    def refuse(*args): raise AssertionError('only the first process writes')
    if rank: run_module.write_whole = run_module.new_run_dir = refuse
    learn,folder = train_run(str(out/'run'), epochs=2, n_train=320, recipe='tuned', valid='reference',
                             device='cpu', also_reference=True)
    found['run'] = dict(weights=learn.model.state_dict(), folder=str(folder))


def put_back():
    "`SyncBatchNorm` is for GPUs; as far as a CPU has it: in the fit, gone after it, with the trained weights"
    set_seed(1)
    learn = block3_learner(mnist_dls(n_train=130, valid='reference', device='cpu'))
    kinds = [type(m) for m in learn.model.modules()]
    class Look(Callback):
        order = 100
        def before_batch(self):
            self.kinds = [type(m) for m in get_model(self.model).modules()]
            self.weights = get_model(self.model).state_dict()
    forward = nn.SyncBatchNorm.forward
    # the real ones refuse a CPU
    nn.SyncBatchNorm.forward = nn.BatchNorm2d.forward
    nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *args: None
    with learn.distrib_ctx(), learn.no_bar(), learn.no_logging():
        found['sync_bn'] = learn.data_parallel_trainer.sync_bn
        learn.data_parallel_trainer.sync_bn = True
        learn.fit(1, cbs=(look := Look()))
    nn.SyncBatchNorm.forward = forward
    assert look.kinds.count(nn.SyncBatchNorm) == kinds.count(nn.BatchNorm2d) > 0
    assert [type(m) for m in learn.model.modules()] == kinds
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, look.weights[k]), k
    trained = {id(p) for group in learn.opt.opt.param_groups for p in group['params']}
    assert {id(p) for p in learn.model.parameters()} == trained


def refused():
    "Loaders of another kind"
    dl = DataLoader(list(zip(torch.randn(8,1,28,28), torch.randint(10, (8,)))), bs=4)
    try: train(block3_learner(DataLoaders(dl, dl, device='cpu')))
    except ValueError as e: found['refused'] = str(e)


float64_fit('local')
float64_fit('fixed', FixedBN())
for check in (evaluation, mixed, draws, run, put_back, refused): check()
torch.save(found, out/f'{rank}.pt')
