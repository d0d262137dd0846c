"""CUDA graphs on a CPU: Python runs once, and a replay executes the recorded operations on the recorded memory.

`python tests/recorder.py SCRIPT ARGUMENTS` runs a script with it."""
import runpy, sys
from contextlib import contextmanager, nullcontext
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
waiting = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}


class Recorder(TorchDispatchMode):
    "Notes each operation, and raises where a capture would, since the device would have to be waited for"
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in waiting: raise RuntimeError(f'operation not permitted when stream is capturing: {func}')
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out


class Graph:
    def __init__(self): self.ops = []

    @torch.no_grad()
    def replay(self):
        for func,args,kwargs,out in self.ops:
            if func.is_view: continue
            inputs = {id(t) for t in tree_leaves((args, kwargs))}
            for old,new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old is not new and id(old) not in inputs: old.detach().copy_(new)


class Stream:
    def wait_stream(self, other): pass


class Generator:
    "The CPU's, in the place of the device's"
    def clone_state(self): return torch.get_rng_state()
    def graphsafe_set_state(self, state): pass


def install(monkeypatch):
    "Have learners on a CPU capture their steps; returns the list of graphs that were recorded"
    from mnist_block3.kernels import PythonState
    from mnist_block3.steps import Steps
    graphs,steps = [],[]
    def new_graph():
        graphs.append(Graph())
        return graphs[-1]
    @contextmanager
    def record(graph, pool=None, stream=None):
        steps[-1].at.zero_() # on a GPU nothing runs during a capture, so the position stays within the epoch
        with Recorder() as recorder: yield
        graph.ops = recorder.ops
    fakes = dict(CUDAGraph=new_graph, graph=record, Stream=Stream, current_stream=Stream, set_stream=lambda stream: None,
                 stream=lambda stream: nullcontext(), device=lambda device: nullcontext(), graph_pool_handle=lambda: None,
                 set_sync_debug_mode=lambda mode: None, get_sync_debug_mode=lambda: 0, default_generators={None: Generator(), 0: Generator()})
    for name,fake in fakes.items(): monkeypatch.setattr(torch.cuda, name, fake)
    init = Steps.__init__
    def with_graph(self, *args, **kwargs):
        init(self, *args, **kwargs | dict(graph=True, kernels=False))
        steps.append(self)
    monkeypatch.setattr(Steps, '__init__', with_graph)
    look = PythonState._look
    monkeypatch.setattr(PythonState, '_look', lambda self: look(self)[:-1]) # the CPU's generator is the device's here
    return graphs


if __name__ == '__main__':
    from pytest import MonkeyPatch
    install(MonkeyPatch())
    sys.argv = sys.argv[1:]
    if sys.argv[0] == '-m': sys.exit(f'{sys.argv[1]} is not run in a dry run')
    sys.path.insert(0, 'benchmarks')
    runpy.run_path(sys.argv[0], run_name='__main__')
