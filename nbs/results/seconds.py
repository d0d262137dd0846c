"Seconds to an accuracy: what the runs in the folder `budget` say, for the speed page and the first page"
from pathlib import Path
import matplotlib.pyplot as plt
import pandas as pd
from mnist_block3.sweep import Study

goals = 0.994, 0.995


def budget_rows(): return Study(Path(__file__).parent/'budget').read()

def seconds_by_epochs(rows):
    "Median seconds of a run on two threads that had the machine for itself, by number of epochs"
    return rows[(rows.threads == 2) & (rows.valid == 'test')].groupby('epochs').seconds.median()

def budget_table():
    "A row for each number of epochs: accuracies in per cent on the holdout and on the test images, and seconds"
    rows = budget_rows()
    rows['percent'] = 100*rows.accuracy
    runs = rows.groupby(['valid', 'epochs']).percent.agg(['mean', 'std', 'size'])
    words = [f'{r["mean"]:.2f} ± {r["std"]:.2f} ({r["size"]:.0f} seeds)' for _,r in runs.iterrows()]
    table = pd.Series(words, runs.index).unstack('valid')
    test = rows[rows.valid == 'test'].groupby('epochs').percent
    table['lowest test'] = test.min().round(2)
    table['highest test'] = test.max().round(2)
    table['seconds'] = seconds_by_epochs(rows).round()
    return table.rename(columns=dict(holdout='holdout, %', test='test, %')).rename_axis('epochs')

def budget_said():
    "What the numbers of epochs that the holdout asks for reach on the test images, in words"
    rows = budget_rows()
    seconds = seconds_by_epochs(rows)
    holdout = 100*rows[rows.valid == 'holdout'].groupby('epochs').accuracy.mean()
    def on_test(n):
        test = 100*rows[(rows.valid == 'test') & (rows.epochs == n)].accuracy
        return (f'On the test images, `learn.fit_tuned({n})` gets **{test.mean():.2f} % ± {test.std():.2f}** '
                f'({len(test)} seeds) in **{seconds[n]:.0f} seconds**.')
    lines = []
    for goal in goals:
        reached = holdout.index[holdout >= 100*goal]
        if len(reached): lines.append(f'{100*goal:.2f} % of the holdout takes {reached[0]} epochs. {on_test(reached[0])}')
        else: lines.append(f'No number of epochs reaches {100*goal:.2f} % of the holdout; {holdout.idxmax()} come nearest, '
                           f'with {holdout.max():.2f} %. {on_test(holdout.idxmax())}')
    return ' '.join(lines)

def plot_budget():
    "Test accuracy over seconds: each run, and mean and standard deviation for each number of epochs"
    rows = budget_rows()
    seconds = seconds_by_epochs(rows)
    test = rows[rows.valid == 'test'].assign(percent=100*rows.accuracy)
    runs = test.groupby('epochs').percent
    fig,ax = plt.subplots(figsize=(6.4, 3), layout='constrained')
    ax.plot(seconds[test.epochs].values, test.percent, 'o', ms=3, alpha=0.4, label='a run')
    ax.errorbar(seconds[runs.mean().index], runs.mean(), runs.std(), fmt='ks', ms=4, capsize=3, label='mean ± standard deviation')
    for n,mean in runs.mean().items(): ax.annotate(f' {n}', (seconds[n], mean), xytext=(4, -9), textcoords='offset points', fontsize=8)
    for goal in goals: ax.axhline(100*goal, color='0.6', lw=0.8, ls='--')
    ax.set(xscale='log', xlabel='seconds of training and evaluation on two CPU cores', ylabel='test accuracy in %', xlim=(5, 130))
    ax.set_xticks([5, 10, 20, 50, 100], [5, 10, 20, 50, 100])
    ax.xaxis.minorticks_off()
    ax.legend(loc='lower right', title='number: epochs')
    return fig
