"Ours, as a user calls it"
from mnist_block3.all import *
from .timer import Timer


def run(clock, device, n_train, n_epoch, fit, fast=True, bf16=False, **kwargs):
    "`fit(fit)`, stopped after `n_epoch` epochs: on a CPU the fast path compiles only in fits that are long enough"
    learn = block3_learner(mnist_dls(device=device, n_train=n_train), fast=fast)
    if bf16: learn.to_bf16()
    with learn.no_bar(), learn.no_logging():
        clock('fit')
        learn.fit(fit, cbs=Timer(clock, n_epoch))
    did = learn.fast_epoch
    return dict(accuracy=history(learn).valid_accuracy.iloc[-1], engine=did.engine, why=did.why)
