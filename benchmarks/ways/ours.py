"Ours, as a user calls it"
from mnist_block3.all import *
from .timer import Timer


def run(clock, device, n_train, n_epoch, fit, fast=True, bf16=False, tuned=False, **kwargs):
    "`fit(fit)`, stopped after `n_epoch` epochs, since the fast path depends on the length of the fit"
    learn = block3_learner(mnist_dls(device=device, n_train=n_train), fast=fast)
    if bf16: learn.to_bf16()
    with learn.no_bar(), learn.no_logging():
        clock('fit')
        (learn.fit_tuned if tuned else learn.fit)(fit, cbs=Timer(clock, n_epoch))
    fast_epoch = learn.fast_epoch
    accuracy = history(learn).valid_accuracy.iloc[-1]
    return dict(accuracy=accuracy, engine=fast_epoch.engine, why=fast_epoch.why)
