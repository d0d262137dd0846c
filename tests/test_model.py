"The network against the user's document and against the layers written out"
import re
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from mnist_block3.all import Block3, block3_learner, block3_summary, load_digits, mnist_dls, run_name, run_settings, Study

row = re.compile(r'\s*(\w+-\d+)\s+\[([-\d, ]+)\]\s+([\d,]+)\s*$')


def parse(text):
    rows = [m.groups() for m in map(row.match, text.splitlines()) if m]
    return rows,[o.strip() for o in text.splitlines() if ': ' in o]


def test_summary_is_the_documents(capsys):
    block3_summary()
    rows,totals = parse(capsys.readouterr().out)
    want_rows,want_totals = parse((Path(__file__).parent/'block3_summary.txt').read_text())
    assert len(want_rows) == 35 and len(want_totals) == 7
    for got,want in zip(rows, want_rows, strict=True): assert got == want
    assert totals == want_totals


def test_forward_is_the_network_written_out():
    m = Block3(drop=0.)
    x = torch.randn(5, 1, 28, 28)
    w = iter([p for n,p in m.named_parameters() if p.ndim == 4])
    def unit(x, padding=0):
        x = F.relu(F.conv2d(x, next(w), padding=padding))
        return F.batch_norm(x, None, None, training=True) # weight 1 and bias 0, as they start
    y = unit(unit(unit(x)))
    y = unit(unit(F.max_pool2d(y, 2), padding=1))
    y = F.avg_pool2d(unit(unit(unit(y))), 6)
    want = F.log_softmax(F.conv2d(y, next(w)).flatten(1), 1)
    assert next(w, None) is None
    torch.testing.assert_close(m(x), want)


def test_blocks_are_named_as_in_the_document():
    names = 'input_block transition1 conv_block2 pool conv_block3 transition2 conv_block4 conv_block5 conv_block6 avg_pool head'
    assert [n for n,_ in Block3().named_children()] == names.split()
    assert all(c.bias is None for c in Block3().modules() if isinstance(c, torch.nn.Conv2d))
    assert {c.p for c in Block3().modules() if isinstance(c, torch.nn.Dropout2d)} == {0.01}


def test_trained_weights_are_those_of_the_studys_seed_0():
    "On all test images, by hand; where two digits are almost equally likely, another processor may round otherwise"
    name,study = run_name(run_settings(recipe='tuned', seed=0)),Study(Path(__file__).parent.parent/'nbs'/'results')
    row, = study.read()[study.read().run == name].itertuples()
    assert (row.recipe, row.seed, row.valid, row.total) == ('tuned', 0, 'test', 10_000)
    test = load_digits()[1]
    model = Block3(pretrained=True).eval()
    with torch.no_grad(): logp = torch.cat([model((o[:,None]/255 - 0.1307)/0.3081) for o in test.images.split(500)])
    wrong = set((logp.argmax(1) != test.labels).nonzero()[:,0].tolist())
    found = study.read('mistakes')
    assert len(wrong ^ set(found[found.run == name]['index'])) <= 1 >= abs(10_000 - len(wrong) - row.correct)
    assert abs(F.nll_loss(logp, test.labels.long()).item() - row.loss) < 1e-5


def test_trained_weights_in_a_learner():
    learn = block3_learner(mnist_dls(n_train=64, device='cpu'), pretrained=True)
    for a,b in zip(learn.model.state_dict().values(), Block3(pretrained=True).state_dict().values()): assert torch.equal(a, b)
    with pytest.raises(ValueError, match='pretrained=True: .* a model was given'): block3_learner(learn.dls, Block3(), pretrained=True)
