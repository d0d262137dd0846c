"Runs found, compared and plotted, with pandas and matplotlib's own artists to check"
import json
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np, pandas as pd, pytest
from mnist_block3.all import (Study, block3_learner, compare, history, plot_history, plot_sweep, read_run,
                              run_name, sweep_grid, train_run)

results = Path(__file__).parent.parent/'nbs'/'results'


@pytest.fixture(autouse=True)
def figures_closed():
    yield
    plt.close('all')


def record(folder, runs, n_epochs=2):
    "A study of `runs` whose results are random"
    rng = np.random.default_rng(0)
    rows, epochs = [], []
    for run in runs:
        curve = pd.DataFrame(dict(run=run_name(run), recipe=run['recipe'], seed=run['seed'], epoch=range(1, n_epochs + 1),
                                  valid_loss=rng.random(n_epochs), correct=rng.integers(9000, 10_000, n_epochs), total=10_000))
        curve['valid_accuracy'] = curve.correct/curve.total
        last = curve.iloc[-1]
        epochs.append(curve)
        rows.append(run | dict(run=last.run, accuracy=last.valid_accuracy, loss=last.valid_loss, correct=last.correct,
                               total=last.total, seconds=7.5))
    folder.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(folder/'study.csv', index=False)
    pd.concat(epochs).to_csv(folder/'epochs.csv', index=False)
    return Study(folder)


@pytest.fixture
def study(tmp_path):
    "Three seeds of lr × bs in 2 epochs on the holdout, and all of them in 3 epochs too"
    grids = [sweep_grid(['tuned'], range(3), dict(lr=[0.05, 0.1], bs=[64, 128]), epochs=n, valid='holdout') for n in (2, 3)]
    return record(tmp_path/'study', grids[0] + grids[1])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return train_run(tmp_path_factory.mktemp('runs')/'a', epochs=2, n_train=64, valid='reference', device='cpu')[1]


def points(*axes): return [line.get_xydata().tolist() for ax in axes for line in ax.lines]


# Study.of

def test_of_finds_what_is_asked(study):
    rows = study.of(epochs=3, bs=128, lr=0.05)
    assert rows.seed.tolist() == [0, 1, 2]
    assert set(zip(rows.epochs, rows.bs, rows.lr)) == {(3, 128, 0.05)}


def test_of_finds_each_value_of_a_list(study):
    rows = study.of('tuned', epochs=2, lr=[0.05, 0.1], seed=1)
    assert sorted(rows.lr) == [0.05, 0.1] and set(rows.seed) == {1}


def test_of_leaves_free_what_all_runs_share(study):
    "All are on the holdout, though the default is the test set"
    assert len(study.of('tuned', epochs=3)) == 3


def test_of_takes_defaults_where_runs_differ(study):
    rows = study.of('tuned', epochs=[2, 3])
    assert set(rows.bs) == {64} and set(rows.lr) == {0.1}


def test_sizes_of_pictures_are_runs_of_their_own(tmp_path):
    runs = sweep_grid(['tuned'], range(2), dict(size=[28, 64]), source=tmp_path)
    study = record(tmp_path/'study', runs)
    assert len(study.done) == 4
    assert study.of('tuned', size=64).seed.tolist() == [0, 1]
    assert [label.get_text() for label in plot_sweep(study, 'size').axes[0].get_xticklabels()] == ['28\nn = 2', '64\nn = 2']


def test_of_says_what_the_study_has(study):
    with pytest.raises(ValueError, match='has no such run with lr 0.3, only with lr 0.05, 0.1'):
        study.of('tuned', lr=0.3)


def test_of_says_that_a_recipe_is_missing(study):
    with pytest.raises(ValueError, match="recipe='reference': .* has finished runs of tuned"): study.of('reference')


def test_of_finds_the_recorded_runs(tmp_path):
    "Without the runs before the study, of which less is known, and with a new run that has more settings"
    recorded = Study(results)
    counts = [len(recorded.of('tuned')), len(recorded.of('reference')), *(len(recorded.of('reference', step_size=k)) for k in (10, 12))]
    assert counts == [20, 10, 5, 5]
    new = record(tmp_path, sweep_grid(['tuned'], [99]))
    pd.concat([recorded.read(), new.read()]).to_csv(tmp_path/'study.csv', index=False)
    assert len(new.of('tuned')) == 21


# plot_history

@pytest.mark.parametrize('kind', ['learner', 'table', 'folder'])
def test_plot_history_of(kind, trained, folder):
    given = dict(learner=trained, table=history(trained), folder=folder)[kind]
    rows = pd.read_csv(folder/'history.csv', engine='python') if kind == 'folder' else history(trained)
    columns = rows.train_loss, rows.valid_loss, 100*rows.train_accuracy, 100*rows.valid_accuracy
    assert points(*plot_history(given).axes) == [list(map(list, zip(rows.epoch, column))) for column in columns]


def test_plot_history_of_a_folder_names_its_protocol(folder):
    assert plot_history(folder).axes[1].get_title() == 'Reference loss'


def test_a_run_that_has_not_finished(folder, tmp_path):
    (tmp_path/'settings.json').write_bytes((folder/'settings.json').read_bytes())
    with pytest.raises(ValueError, match='is no folder of a finished run: it has no summary.json'): plot_history(tmp_path)


# compare

def test_compare_rows_of_a_study(study):
    rows = study.of('tuned', epochs=2, lr=[0.05, 0.1])
    table = compare(rows)
    epochs = pd.read_csv(study.folder/'epochs.csv', engine='python').groupby('run')
    drawn = [[[e, 100*a] for e,a in zip(o.epoch, o.valid_accuracy)] for o in map(epochs.get_group, rows.run)]
    assert points(plt.gca()) == drawn
    assert list(table) == ['seed', 'lr', 'accuracy', 'correct', 'total', 'loss', 'seconds']
    pd.testing.assert_frame_equal(table, rows.set_index('run')[list(table)])


def test_compare_says_what_differs(study):
    compare(study.of('tuned', epochs=2, lr=[0.05, 0.1]))
    assert [text.get_text() for text in plt.gca().get_legend().texts][:2] == ['seed 0, lr 0.05', 'seed 0, lr 0.1']
    assert plt.gca().get_ylabel() == 'holdout accuracy in %'


def test_seeds_share_a_colour_beyond_eight_runs(study):
    compare(study)
    ax = plt.gca()
    assert len(ax.lines) == 24 and len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 8
    assert ax.get_legend().texts[0].get_text() == 'epochs 2, bs 64, lr 0.05 (3 runs)'


def test_compare_learners_by_name(trained):
    table = compare(dict(one=trained, two=trained), measure='loss')
    rows = history(trained)
    assert points(plt.gca()) == 2*[list(map(list, zip(rows.epoch, rows.valid_loss)))]
    assert table.index.tolist() == ['one', 'two'] == [text.get_text() for text in plt.gca().get_legend().texts]
    assert table.correct.tolist() == 2*[rows.correct.iloc[-1]] and table.seconds.tolist() == 2*[rows.seconds.sum()]


def test_a_name_for_several_runs(trained, folder):
    table = compare(dict(mine=[trained, trained], other=folder))
    assert table.index.tolist() == ['mine', 'mine', 'other']
    assert [text.get_text() for text in plt.gca().get_legend().texts] == ['mine (2 runs)', 'other']


def test_the_later_epochs_are_in_the_picture(tmp_path):
    study = record(tmp_path, sweep_grid(['tuned'], [0]), n_epochs=8)
    epochs = study.read('epochs')
    epochs.loc[0, 'valid_accuracy'] = 0.1
    epochs.to_csv(tmp_path/'epochs.csv', index=False)
    compare(study)
    low, high = plt.gca().get_ylim()
    assert 10 < low and 100*epochs.valid_accuracy[4:].between(low/100, high/100).all()
    assert plt.gca().get_title() == 'the first epochs lie below this picture'


def test_compare_a_learner_a_folder_and_a_row(trained, folder, study):
    table = compare([trained, folder, study.of('tuned', epochs=2, seed=0).iloc[0]])
    assert len(plt.gca().lines) == 3 and table.index.tolist()[:2] == ['learner 1', str(folder)]
    summary = json.loads((folder/'summary.json').read_text())
    assert table.accuracy.iloc[1] == summary['results']['accuracy'] and table.seconds.iloc[1] == summary['seconds']
    assert table.recipe.tolist()[1:] == ['reference', 'tuned'] and table.valid.tolist()[1:] == ['reference', 'holdout']
    assert plt.gca().get_ylabel() == 'evaluation accuracy in %'


def test_compare_without_accuracy(small_dls):
    learn = block3_learner(small_dls, metrics=[])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    with pytest.raises(ValueError, match='learner 1 has no accuracy by epoch'): compare(learn)
    assert not plt.get_fignums()
    assert compare(learn, measure='loss').loss.tolist() == history(learn).valid_loss.tolist()


def test_compare_draws_into_given_axes(trained):
    ax = plt.figure().subplots()
    compare(trained, ax=ax)
    assert len(ax.lines) == 1 and len(plt.get_fignums()) == 1


@pytest.mark.parametrize('runs,message', [
    (pd.DataFrame(dict(run=['a'])), 'do not say which study'),
    ([3], '3 is no learner, run folder, study'),
    ([], 'no runs to compare'),
    ('no/such/folder', 'is no folder of a finished run'),
], ids=['rows', 'number', 'nothing', 'folder'])
def test_compare_says_what_it_cannot_use(runs, message):
    with pytest.raises(ValueError, match=message): compare(runs)


# plot_sweep

def test_plot_sweep_shows_each_run_its_mean_and_spread(study):
    ax = plot_sweep(study, 'lr', epochs=2).axes[0]
    rows = study.of('tuned', epochs=2, lr=[0.05, 0.1])
    groups = 100*rows.set_index('lr').accuracy
    runs, means = ax.lines[:2]
    assert runs.get_ydata() == pytest.approx(groups.values)
    assert runs.get_xdata().round().tolist() == (rows.lr == 0.1).tolist()
    assert means.get_ydata() == pytest.approx(groups.groupby('lr').mean().values)
    ends = [np.ptp(bar[:,1])/2 for bar in ax.collections[0].get_segments()]
    assert ends == pytest.approx(groups.groupby('lr').std().values)
    assert [label.get_text() for label in ax.get_xticklabels()] == ['0.05\nn = 3', '0.1\nn = 3']
    assert ax.get_ylabel() == 'holdout accuracy in %' and ax.get_title() == 'tuned, epochs 2'


def test_two_settings_make_a_grid(study):
    ax = plot_sweep(study, 'lr', 'bs', epochs=3, measure='loss').axes[0]
    rows = study.read().query('epochs == 3')
    losses = rows.groupby(['bs', 'lr']).loss
    means = losses.mean().unstack()
    assert ax.images[0].get_array().data == pytest.approx(means.values)
    assert [text.get_text() for text in ax.texts] == [f'{mean:.4f}\n± {std:.4f}\nn = 3' for mean, std in zip(losses.mean(), losses.std())]


def test_a_title_names_what_all_runs_share(study):
    assert plot_sweep(study, 'lr', epochs=[2, 3], bs=128).axes[0].get_title() == 'tuned, bs 128'


def test_plot_sweep_mixes_no_epochs(study):
    with pytest.raises(ValueError, match='has no such run with epochs 14, only with epochs 2, 3'): plot_sweep(study, 'lr')


def test_plot_sweep_mixes_no_recipes(tmp_path):
    study = record(tmp_path, sweep_grid(['tuned', 'reference'], range(2)))
    with pytest.raises(ValueError, match='recipe=None: .* has finished runs of tuned, reference'): plot_sweep(study, 'lr')
    assert plot_sweep(study.folder, 'lr', recipe='reference').axes[0].get_ylabel() == 'test accuracy in %'


def test_plot_sweep_names_its_settings(study):
    with pytest.raises(ValueError, match="setting='rate': setting is one of 'epochs', .*'lr'"): plot_sweep(study, 'rate')
