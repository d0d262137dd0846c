"The clock as a callback of fastai"
from fastai.callback.core import Callback, CancelFitException


class Timer(Callback):
    "Tell `clock` where an epoch is, and end the fit after `n_timed` epochs; fits the fast path"
    order = 59
    def __init__(self, clock, n_timed):
        self.clock = clock
        self.n_timed = n_timed

    def before_train(self): self.clock('train')
    def before_validate(self): self.clock('valid')
    def after_validate(self): self.clock('end')
    def after_epoch(self):
        if self.epoch+1 >= self.n_timed: raise CancelFitException()
