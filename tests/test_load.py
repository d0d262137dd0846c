"Many fits in one process, and many processes at once"
import ctypes, gc, os, platform, subprocess, sys, threading
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from mnist_block3.all import block3_learner, mnist_dls


def counts():
    "What may grow: MiB in memory, open files, threads, tensors"
    gc.collect()
    ctypes.CDLL('libc.so.6').malloc_trim(0) # what is free is given back, so that it is not counted
    mb = int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20
    n_tensors = sum(issubclass(type(obj), torch.Tensor) for obj in gc.get_objects())
    return mb, len(os.listdir('/proc/self/fd')), threading.active_count(), n_tensors


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='needs malloc_trim')
@pytest.mark.parametrize('recipe', ['fit', 'fit_tuned'])
def test_two_hundred_fits(recipe):
    "After 40 of them memory grows by less than 4 MiB, and nothing else does"
    dls = mnist_dls(valid='reference', n_train=16, bs=8, device='cpu')
    after = {}
    for i in range(200):
        if i % 20 == 0: learn = block3_learner(dls)
        with learn.no_bar(), learn.no_logging(): getattr(learn, recipe)(1)
        assert learn.fast_epoch.engine == 'kernels'
        if i in (39, 199): after[i] = counts()
    (mb,*before),(mb_now,*now) = after.values()
    assert now == before and mb_now - mb < 4, after


@pytest.mark.slow
def test_eight_trainings_at_once(tmp_path):
    "With one cache of kernels, empty at first: all finish, with the weights of one that was alone"
    code = ('from mnist_block3.all import train_run; import sys; '
            'print(train_run(sys.argv[1], epochs=2, n_train=640, valid="reference", device="cpu")[0].fast_epoch.engine)')
    env = os.environ | dict(XDG_CACHE_HOME=str(tmp_path/'cache'), OMP_NUM_THREADS='1')
    def begin(name): return subprocess.Popen([sys.executable, '-c', code, tmp_path/name], env=env, stdout=subprocess.PIPE, text=True)
    def end(p):
        out = p.communicate(timeout=900)[0].split()
        assert p.returncode == 0 and out[-1] == 'kernels'
    for p in [begin(f'{i}') for i in range(8)]: end(p)
    end(begin('alone'))
    want = load_file(tmp_path/'alone'/'weights.safetensors')
    for i in range(8):
        got = load_file(tmp_path/f'{i}'/'weights.safetensors')
        assert all(torch.equal(got[k], v) for k,v in want.items())
