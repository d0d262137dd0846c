"Plots, mistakes and report against scikit-learn and against histories made by hand"
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from sklearn.metrics import confusion_matrix
from mnist_block3.all import block_report, mistakes, mnist_dls, plot_history, plot_mistakes, plot_samples


@pytest.fixture
def learn(trained):
    "Evaluated on images that stay as they are"
    trained.dls = mnist_dls(n_train=320, device='cpu')
    return trained


def test_mistakes_are_scikit_learns(learn):
    wrong = mistakes(learn)
    probs,targs = learn.get_preds()
    want = confusion_matrix(targs, probs.argmax(1), labels=range(10))
    np.fill_diagonal(want, 0)
    got = np.zeros_like(want)
    for o in wrong.itertuples(): got[o.truth, o.prediction] += 1
    assert (got == want).all()
    assert wrong.probability.is_monotonic_decreasing and (wrong.probability >= wrong.probability_of_truth).all()
    o = wrong.iloc[0]
    assert probs[int(o['index']), int(o.truth)] == pytest.approx(o.probability_of_truth)


def test_plot_mistakes_shows_the_images_it_names(learn):
    o,fig = mistakes(learn).iloc[0],plot_mistakes(learn, n=3, ncols=3)
    ax = fig.axes[0]
    assert ax.get_title().startswith(f'{int(o.truth)}, read as {int(o.prediction)}\n')
    assert (ax.images[0].get_array() == learn.dls.valid_ds.items[int(o['index'])][0].numpy()).all()
    plt.close('all')


def test_plots(small_dls):
    h = pd.DataFrame(dict(epoch=[1,2], train_loss=[.5,.1], valid_loss=[.4,.2], train_accuracy=[.8,.9], valid_accuracy=[.85,.95]))
    fig = plot_history(h, 'test')
    assert [ax.get_title() for ax in fig.axes] == ['Training loss', 'Test loss', 'Training accuracy', 'Test accuracy']
    assert list(fig.axes[3].lines[0].get_ydata()) == [85, 95] and list(fig.axes[3].lines[0].get_xdata()) == [1, 2]
    assert all(ax.get_ylabel() for ax in fig.axes)
    fig = plot_samples(small_dls)
    assert len(fig.axes) == 12 and all(ax.get_title() in '0123456789' for ax in fig.axes)
    plt.close('all')


def test_report():
    h = pd.DataFrame(dict(epoch=range(1,8), valid_accuracy=[.98,.991,.995,.993,.9941,.996,.992], correct=9920, total=10_000))
    report = block_report(h, measured='test accuracy')
    for o in ('99.40 % test accuracy before epoch 15', 'in epoch 3 (99.50 %), in time', 'Best: 99.60 % in epoch 6',
              'Last: 99.20 % in epoch 7, 9,920 of 10,000', 'between 99.20 % and 99.60 %', 'swing of 0.40 points', 'is 0.09 points'):
        assert o in report
    assert 'not reached' in block_report(h, target=0.999) and 'too late' in block_report(h, by_epoch=3)
