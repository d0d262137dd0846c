"What test_distributed.py has each process of a launcher do; each leaves what it saw in a file of its own"
import sys
import warnings
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')
from pathlib import Path
import torch
from torch import nn
from mnist_block3.all import *
from mnist_block3.distributed import *
from mnist_block3 import run as run_module

rank,out = rank_distrib(),Path(sys.argv[1])
found = {}


class Watch(Callback):
    "What the other callbacks see of each training batch"
    order = 100
    def before_fit(self): self.losses,self.rows,self.weights = [],[],{k: v.clone() for k,v in get_model(self.model).state_dict().items()}
    def before_batch(self): self.learn.xb = tuple(o.double() for o in self.xb)
    def after_loss(self):
        if not self.training: return
        self.losses.append(self.loss.item())
        self.rows.append(len(self.pred))
        self.learn.loss = self.loss.float() # which fastai's Recorder needs


class FixedBN(Callback):
    "BatchNorm that does not look at the batch"
    order = 90
    def before_train(self):
        for o in self.model.modules():
            if isinstance(o, nn.BatchNorm2d): o.eval()


def float64_fit(name, *cbs):
    "Two epochs, the last batch of each has two images"
    set_seed(1 + rank) # so that processes differ in all that they do not agree on
    dls = mnist_dls(n_train=130, valid='reference', device='cpu', aug_tfms=[])
    learn = block3_learner(dls, lr=0.05, loss_func=nn.NLLLoss(), cbs=[Watch(), *cbs]) # fastai's losses round to float32
    learn.model.double()
    for o in learn.model.modules():
        if isinstance(o, nn.modules.dropout._DropoutNd): o.p = 0.
    took,take = [],dls.train.take
    dls.train.take = lambda idxs: took.append(list(idxs)) or take(idxs)
    with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert not isinstance(learn.model, nn.parallel.DistributedDataParallel) and all(o.shard == (0,1) for o in dls)
    found[name] = dict(shares=took, losses=learn.watch.losses, rows=learn.watch.rows, start=learn.watch.weights,
                       end=learn.model.state_dict(), history=learn.history.rows)


def evaluation():
    "Of 1000 images, none of whose batches has three or two equal parts; also of the loader that shuffles, with other seeds"
    set_seed(1 + rank)
    dls = mnist_dls(n_train=1000, bs=49, valid='reference', device='cpu', aug_tfms=[])
    learn = block3_learner(dls, pretrained=True, metrics=[accuracy, F1Score(average='macro')])
    with learn.distrib_ctx(), learn.no_bar(), learn.no_logging():
        found['validate'] = list(learn.validate())
        found['preds'] = [torch.as_tensor(o).clone() for o in learn.get_preds()]
        took,take = [],dls.train.take
        dls.train.take = lambda idxs: took.append(list(idxs)) or take(idxs)
        found['shuffled'] = dict(shares=took, validate=list(learn.validate(0)))
        try: learn.get_preds(with_input=True)
        except ValueError as e: found['with_input'] = str(e)


def mixed():
    "With a callback that changes the loss function from batch to batch"
    set_seed(1 + rank)
    learn = block3_learner(mnist_dls(n_train=130, bs=49, valid='reference', device='cpu'), cbs=MixUp())
    with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit(1)
    found['mixed'] = [float(o) for o in learn.recorder.losses]


def draws():
    "The first numbers of dropout and augmentation in each process"
    set_seed(1)
    learn = block3_learner(mnist_dls(n_train=64, valid='reference', device='cpu'))
    class Draw(Callback):
        order = 100
        def before_batch(self):
            if self.training: found['draw'] = torch.rand(4)
    with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Draw())


def run():
    "A whole run by the tuned recipe, in which all but the first process must not write"
    def refuse(*args): raise AssertionError('only the first process writes')
    if rank: run_module.write_whole = run_module.new_run_dir = refuse
    learn,folder = train_run(str(out/'run'), epochs=2, n_train=320, recipe='tuned', valid='reference', device='cpu', also_reference=True)
    found['run'] = dict(weights=learn.model.state_dict(), folder=str(folder))


def put_back():
    "`SyncBatchNorm`, which is for GPUs, as far as a CPU has it: there in the fit, gone after it, with the weights that were trained"
    set_seed(1)
    learn = block3_learner(mnist_dls(n_train=130, valid='reference', device='cpu'))
    kinds = [type(o) for o in learn.model.modules()]
    class Look(Callback):
        order = 100
        def before_batch(self): self.kinds,self.weights = [type(o) for o in get_model(self.model).modules()],get_model(self.model).state_dict()
    forward,nn.SyncBatchNorm.forward = nn.SyncBatchNorm.forward,nn.BatchNorm2d.forward
    nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *args: None # refuses a CPU, as the forward pass does
    with learn.distrib_ctx(), learn.no_bar(), learn.no_logging():
        found['sync_bn'] = learn.data_parallel_trainer.sync_bn
        learn.data_parallel_trainer.sync_bn = True
        learn.fit(1, cbs=(look := Look()))
    nn.SyncBatchNorm.forward = forward
    assert look.kinds.count(nn.SyncBatchNorm) == kinds.count(nn.BatchNorm2d) > 0
    assert [type(o) for o in learn.model.modules()] == kinds
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, look.weights[k]), k
    assert {id(o) for o in learn.model.parameters()} == {id(p) for g in learn.opt.opt.param_groups for p in g['params']}


def refused():
    "Loaders of another kind"
    dl = DataLoader(list(zip(torch.randn(8,1,28,28), torch.randint(10, (8,)))), bs=4)
    learn = block3_learner(DataLoaders(dl, dl, device='cpu'))
    try:
        with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit(1)
    except ValueError as e: found['refused'] = str(e)


float64_fit('local')
float64_fit('fixed', FixedBN())
evaluation()
mixed()
draws()
run()
put_back()
refused()
torch.save(found, out/f'{rank}.pt')
