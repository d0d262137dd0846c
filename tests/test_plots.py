"Figures in a notebook"
import nbclient, nbformat, pytest

setup = """import pandas as pd
from mnist_block3.all import *
learn = block3_learner(mnist_dls(valid='reference', n_train=64), metrics=accuracy)
with learn.no_bar(), learn.no_logging(): learn.fit(1)
rows = history(learn)
learn.remove_cb(ProgressCallback)"""

cells = {
    'plot_history(rows)': 1,
    'plot_history(rows); 0': 1,
    'fig = plot_history(rows)': 1,
    'fig': 1,
    'fig.set_size_inches(4, 3)': 0,
    'print(type(fig.axes), isinstance(fig, plt.Figure))': 0,
    'for _ in range(2): plot_history(rows)': 2,
    'plot_history(rows); plot_mistakes(learn, n=1)': 2,
    'display(plot_history(rows))': 1,
    'display(fig); fig': 2,
    'plot_mistakes(learn, n=1)': 1,
    'plt.get_fignums()': 0}


@pytest.fixture(scope='module')
def notebook():
    "The cells, run by a kernel with its inline backend"
    pytest.importorskip('ipykernel')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (setup, *cells)])
    nbclient.NotebookClient(nb, timeout=200).execute()
    return nb


def test_each_figure_is_drawn_once(notebook):
    drawn = {cell.source: sum('image/png' in out.get('data', {}) for out in cell.outputs) for cell in notebook.cells[1:]}
    assert drawn == cells
    assert notebook.cells[-1].outputs[0].data['text/plain'] == '[]' # none is left open
