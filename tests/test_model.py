"The network against the user's document and the layers written out; its trained weights against the study"
import re
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from mnist_block3.all import Block3, block3_learner, block3_summary, mnist_dls, run_name, run_settings, Study

root = Path(__file__).parent.parent


def test_summary_is_the_documents(capsys):
    def lines(text): return [line.split() for line in text.splitlines() if re.search(r'-\d+ |: ', line)]
    block3_summary()
    want = lines((root/'tests'/'block3_summary.txt').read_text())
    assert len(want) == 35 + 7
    assert lines(capsys.readouterr().out) == want


def test_forward_is_the_network_written_out():
    model = Block3(drop=0.)
    weights = iter([p for p in model.parameters() if p.ndim == 4])
    def unit(x, padding=0):
        x = F.relu(F.conv2d(x, next(weights), padding=padding))
        return F.batch_norm(x, None, None, training=True) # weight 1 and bias 0, as they start
    x = torch.randn(5, 1, 28, 28)
    y = unit(unit(unit(x)))
    y = unit(unit(F.max_pool2d(y, 2), padding=1))
    y = F.avg_pool2d(unit(unit(unit(y))), 6)
    want = F.log_softmax(F.conv2d(y, next(weights)).flatten(1), 1)
    assert next(weights, None) is None
    torch.testing.assert_close(model(x), want)


def test_blocks_are_named_as_in_the_document():
    names = [name for name,_ in Block3().named_children()]
    assert names == ['input_block', 'transition1', 'conv_block2', 'pool', 'conv_block3', 'transition2',
                     'conv_block4', 'conv_block5', 'conv_block6', 'avg_pool', 'head']
    assert {m.p for m in Block3().modules() if isinstance(m, torch.nn.Dropout2d)} == {0.01}


def test_trained_weights_are_those_of_the_studys_seed_0(mnist):
    "Where two digits are almost equally likely, another processor may round otherwise"
    study = Study(root/'nbs'/'results')
    name = run_name(run_settings(recipe='tuned', seed=0))
    run = study.read().set_index('run').loc[name]
    test = mnist[1]
    model = Block3(pretrained=True).eval()
    images = (test.images[:,None]/255 - 0.1307)/0.3081
    with torch.no_grad(): logp = torch.cat([model(xb) for xb in images.split(500)])
    wrong = set((logp.argmax(1) != test.labels).nonzero()[:,0].tolist())
    recorded = study.read('mistakes').query('run == @name')['index']
    assert (run.valid, run.total) == ('test', 10_000)
    assert abs(10_000 - len(wrong) - run.correct) <= 1 and len(wrong ^ set(recorded)) <= 1
    assert F.nll_loss(logp, test.labels.long()).item() == pytest.approx(run.loss, abs=1e-5)


def test_trained_weights_in_a_learner():
    learn = block3_learner(mnist_dls(n_train=64, device='cpu'), pretrained=True)
    torch.testing.assert_close(learn.model.state_dict(), Block3(pretrained=True).state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match='pretrained=True: .* a model was given'):
        block3_learner(learn.dls, Block3(), pretrained=True)
