import matplotlib
matplotlib.use('Agg')
import pytest
from fastai.torch_core import set_seed
from mnist_block3.all import block3_learner, load_digits, mnist_dls, ProgressCallback


@pytest.fixture(autouse=True)
def seeded(): set_seed(0)


@pytest.fixture(scope='session')
def mnist(): return load_digits()


@pytest.fixture(scope='session')
def small_dls(): return mnist_dls(valid='reference', n_train=320, device='cpu')


@pytest.fixture
def trained(small_dls):
    learn = block3_learner(small_dls)
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(2)
    return learn
