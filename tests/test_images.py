"Pictures of one's own: prepared as by fastai's transforms, trained on every path, told by name, refused by name"
import json, os, unicodedata
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from fastai.data.transforms import get_image_files, parent_label
from fastai.vision.all import ImageDataLoaders, PILImage, Resize, ResizeMethod, accuracy, set_seed
from safetensors.torch import load_file
from torch import nn
from mnist_block3 import images
from mnist_block3.all import (Block3, Mirror, Study, block3_learner, history, image_dls, load_block3, mistakes, onnx_bytes, predict_files, resized_picture,
                              safetensors_bytes, train_run)
from mnist_block3.cli import block3_predict, block3_sweep, block3_train


def picture(rng, kind, size=(40,30), mode='RGB'):
    "Noise, bright at the left in pictures of cats and at the right in those of dogs"
    values = rng.integers(0, 120, (*size[::-1], 3), np.uint8)
    half = slice(0, size[0]//2) if kind == 'cat' else slice(size[0]//2, None)
    values[:,half] += 130
    return Image.fromarray(values).convert(mode)

def fill(folder, n=20, kinds=('cat', 'dog'), **kwargs):
    rng = np.random.default_rng(0)
    for kind in kinds:
        (folder/kind).mkdir(parents=True)
        for i in range(n): picture(rng, kind, **kwargs).save(folder/kind/f'{i}.png')
    return folder

@pytest.fixture
def pets(tmp_path): return fill(tmp_path/'pets')


@pytest.mark.parametrize('size', [(50,30), (30,50), (33,33), (200,27), (19,64)])
@pytest.mark.parametrize('resize', ['crop', 'pad', 'squish'])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_pictures_are_resized_as_fastai_does(resize, size, mode):
    im = picture(np.random.default_rng(0), 'cat', size, mode)
    want = Resize(28, method=getattr(ResizeMethod, resize.title()))(PILImage.create(np.array(im.convert('RGB'))), split_idx=1)
    want = np.asarray(want).transpose(2, 0, 1)
    assert np.array_equal(resized_picture(im, 28, resize, colour=True), want)
    if mode == 'L': assert np.array_equal(resized_picture(im, 28, resize), want[:1])


def test_a_folder_of_classes(pets):
    theirs = ImageDataLoaders.from_folder(pets, valid_pct=0.2, item_tfms=Resize(24), bs=8)
    dls = image_dls(pets, size=24, device='cpu')
    assert list(dls.vocab) == list(theirs.vocab) and dls.c == theirs.c == 2
    assert (dls.train.n, dls.valid.n) == (32, 8)
    x,y = dls.one_batch()
    assert x.shape == (32, 3, 24, 24) and abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
    images,labels = dls.valid.take(range(8))
    of_file = {resized_picture(file, 24, colour=True).tobytes(): parent_label(file) for file in get_image_files(pets)}
    assert [of_file[image.tobytes()] for image in np.asarray(images)] == [dls.vocab[y] for y in labels]


def test_a_bar_for_many_pictures_only(pets, capsys):
    "Not even the block that a hidden bar of fastprogress prints"
    dls = image_dls(pets, size=24, device='cpu')
    assert capsys.readouterr().out == ''
    images._read_pictures(2001*[pets/'cat'/'0.png'], dls.spec)
    assert '100.00%' in capsys.readouterr().out


def test_a_split_of_the_folder_is_kept(tmp_path):
    for split,n in dict(train=12, valid=4, test=6).items(): fill(tmp_path/split, n)
    n_evaluated = {valid: image_dls(tmp_path, valid=valid, device='cpu').valid.n for valid in (0.2, 'test', 'holdout', 'reference')}
    assert n_evaluated == {0.2: 8, 'test': 12, 'holdout': 8, 'reference': 24}


def test_labels_by_function_and_by_table(pets):
    by_name = image_dls(pets, labels=lambda path: 'even' if int(path.stem) % 2 == 0 else 'odd', device='cpu')
    assert list(by_name.vocab) == ['even', 'odd']
    df = pd.DataFrame(dict(name=[f'{kind}/{i}.png' for kind in ('cat', 'dog') for i in range(10)], kind=['c']*10 + ['d']*10, later=([True]*3 + [False]*7)*2))
    df.to_csv(pets/'labels.csv', index=False)
    theirs = ImageDataLoaders.from_df(df, pets, fn_col='name', label_col='kind', valid_col='later', item_tfms=Resize(28))
    for labels in (df, 'labels.csv'):
        dls = image_dls(pets, labels=labels, valid_col='later', device='cpu')
        assert (dls.train.n, dls.valid.n, list(dls.vocab)) == (len(theirs.train_ds), len(theirs.valid_ds), list(theirs.vocab))


def test_grey_pictures_have_one_channel(tmp_path):
    assert image_dls(fill(tmp_path/'a', mode='L'), device='cpu').one_batch()[0].shape[1] == 1
    assert image_dls(fill(tmp_path/'b'), colour=False, device='cpu').one_batch()[0].shape[1] == 1


@pytest.mark.parametrize('tuned', [False, True])
def test_every_path_learns_the_same(pets, tuned):
    "As exactly as the kernels and PyTorch's layers agree in float32"
    def losses(**kwargs):
        set_seed(0)
        dls = image_dls(pets, size=24, bs=8, device='cpu', aug_tfms=[])
        learn = block3_learner(dls, Block3(drop=0, n_in=3, n_out=2, size=24), **kwargs)
        learn.logger = lambda *args: None
        with learn.no_bar(): learn.fit_tuned(1, lr=0.01, aug=0) if tuned else learn.fit(1)
        return learn, history(learn).train_loss.iloc[-1]
    (fast,got),(plain,want) = losses(), losses(fast=False)
    assert fast.fast_epoch.engine == 'kernels' and plain.fast_epoch.engine == 'plain'
    assert got == pytest.approx(want, rel=1e-3)


def test_a_fit_learns_names_and_mirrors(pets):
    "Mirrored cats are dogs, so a network that trains with mirrors cannot tell them apart"
    set_seed(0)
    def accuracy_with(flip):
        learn = block3_learner(image_dls(pets, size=24, bs=8, flip=flip, device='cpu'))
        with learn.no_bar(), learn.no_logging(): learn.fit_tuned(6, lr=0.05)
        return learn, history(learn).valid_accuracy.iloc[-1]
    learn,right = accuracy_with(False)
    assert right == 1 and len(mistakes(learn)) == 0 and learn.predict(pets/'dog'/'3.png')[0] == 'dog'
    assert any(isinstance(tfm, Mirror) for tfm in image_dls(pets, flip=True, device='cpu').train.after_batch.fs)
    assert accuracy_with(True)[1] < 1


def test_pictures_that_do_not_fit_are_read_anew(pets, monkeypatch, capsys):
    set_seed(0)
    kept = image_dls(pets, size=24, device='cpu', aug_tfms=[])
    monkeypatch.setattr(images, '_memory', lambda device: 1000)
    monkeypatch.setattr(os, 'cpu_count', lambda: 1)
    dls = image_dls(pets, size=24, device='cpu', aug_tfms=[])
    assert 'more than a quarter of the memory' in capsys.readouterr().out
    assert not dls.train.resident and list(dls.vocab) == ['cat', 'dog']
    for (x,y),(got_x,got_y) in zip(kept.valid, dls.valid):
        assert torch.allclose(x, got_x, atol=1e-5) and torch.equal(y, got_y)
    learn = block3_learner(dls)
    with learn.no_bar(): learn.fit(1)
    assert learn.fast_epoch.engine == 'plain' and len(history(learn)) == 1


def test_a_network_of_other_images(pets):
    learn = block3_learner(image_dls(pets, size=24, device='cpu'))
    first,last = learn.model.input_block[0], learn.model.head
    assert (first.in_channels, last.out_channels) == (3, 2)
    assert learn.model(torch.zeros(2, 3, 24, 24)).shape == (2, 2)
    with pytest.raises(ValueError, match='size=17: size is a whole number from 18 on'): Block3(size=17)
    with pytest.raises(ValueError, match='pretrained=True: the trained weights are for images of 1 channel'): block3_learner(learn.dls, pretrained=True)


def test_the_loss_fits_the_network(pets):
    dls = image_dls(pets, size=24, device='cpu')
    def flat(n, *more): return nn.Sequential(nn.Flatten(), nn.Linear(3*24*24, n), *more)
    assert type(block3_learner(dls, flat(2)).loss_func).__name__ == 'CrossEntropyLossFlat'
    assert type(block3_learner(dls, flat(2, nn.LogSoftmax(1))).loss_func).__name__ == 'NLLLossFlat'
    with pytest.raises(ValueError, match='gives 10 numbers for an image, but there are 2 classes'): block3_learner(dls, flat(10))
    with pytest.raises(ValueError, match='does not take images of 3×24×24: .*channels'): block3_learner(dls, Block3())


def test_a_loss_that_trains_nothing_is_told_once(pets, capsys):
    from mnist_block3.learner import NLLLossFlat
    dls = image_dls(pets, size=24, bs=8, device='cpu')
    scores = nn.Sequential(nn.Flatten(), nn.Linear(3*24*24, 2))
    learn = block3_learner(dls, scores, loss_func=NLLLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert capsys.readouterr().out.count('below 0: NLLLossFlat needs log-probabilities') == 1
    learn = block3_learner(dls, lr=1e20)
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert capsys.readouterr().out.count('The training loss is NaN') == 1


def test_a_run_folder_knows_how_to_predict(pets, tmp_path, capsys):
    run = tmp_path/'run'
    block3_train(source=str(pets), size=24, recipe='tuned', epochs=6, lr=0.05, bs=8, out=str(run), device='cpu')
    assert '99.40 %' not in capsys.readouterr().out
    assert block3_predict([str(pets/'dog'/'1.png'), str(pets/'cat'/'2.png')], weights=str(run), min_probability=0.) is None
    lines = [line.split('\t')[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == ['dog', 'cat']
    block3_predict([str(pets/'dog'/'1.png')], weights=str(run), json=True)
    assert json.loads(capsys.readouterr().out)['class'] == 'dog'
    model = load_block3(run)
    assert model.spec.vocab == ('cat', 'dog') and model.spec.size == 24 and model.spec.n_in == 3
    assert torch.equal(model.head.weight, load_file(run/'weights.safetensors')['head.weight'])


def test_runs_and_sweeps_of_pictures(pets, tmp_path):
    runs = dict(source=str(pets), size=24, epochs=1, bs=8, device='cpu')
    first,_ = train_run(tmp_path/'a', **runs)
    again,_ = train_run(tmp_path/'b', **runs)
    assert torch.equal(first.model.head.weight, again.model.head.weight)
    block3_sweep(recipes='reference', seeds='0', out=str(tmp_path/'sweep'), jobs=1, **runs)
    rows = Study(tmp_path/'sweep').read()
    assert rows['size'].tolist() == [24] and rows.correct[0] == history(first).correct.iloc[-1]


@pytest.mark.slow
def test_onnx_has_the_names_in_its_metadata(pets):
    import onnxruntime
    learn = block3_learner(image_dls(pets, size=24, device='cpu'))
    session = onnxruntime.InferenceSession(onnx_bytes(learn.model), providers=['CPUExecutionProvider'])
    assert json.loads(session.get_modelmeta().custom_metadata_map['spec'])['vocab'] == ['cat', 'dog']
    assert session.get_inputs()[0].shape[1:] == [3, 24, 24]


def remove_dogs(pets):
    for file in (pets/'dog').iterdir(): file.unlink()
def leave_one_dog(pets):
    for i in range(1, 20): (pets/'dog'/f'{i}.png').unlink()
def add_Cat(pets): fill(pets, 2, ['Cat'])
def add_broken(pets): (pets/'cat'/'broken.png').write_bytes(b'no picture')
def add_blank(pets): Image.new('RGB', (30,30), 'red').save(pets/'cat'/'blank.png')
def add_16_bits(pets): Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)).save(pets/'cat'/'deep.png')
def add_animation(pets):
    frames = [picture(np.random.default_rng(i), 'cat') for i in range(3)]
    frames[0].save(pets/'cat'/'moving.gif', save_all=True, append_images=frames[1:])

@pytest.mark.parametrize('spoil,message', [
    (lambda pets: [remove_dogs(pets), [f.unlink() for f in (pets/'cat').iterdir()]], 'holds no pictures. Accepted are folders'),
    (remove_dogs, "has one class only, 'cat'"),
    (leave_one_dog, "the class 'dog' has one picture"),
    (add_Cat, "the classes 'Cat' and 'cat' differ only by case"),
    (lambda pets: fill(pets, 2, [unicodedata.normalize(form, 'Kätzchen') for form in ('NFC', 'NFD')]), 'differ only by .* the encoding of a letter'),
    (add_broken, '(?s)1 of 41 pictures cannot be used:.*broken.png cannot be read.*skip_bad=True'),
    (add_blank, 'blank.png is blank'),
    (add_16_bits, 'deep.png cannot be read: it has more than 8 bits a channel'),
    (add_animation, 'moving.gif cannot be read: it has 3 frames'),
])
def test_bad_folders(pets, spoil, message):
    spoil(pets)
    with pytest.raises(ValueError, match=message): image_dls(pets, device='cpu')

def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='none is no folder; expected a folder of pictures'): image_dls(tmp_path/'none')
    with pytest.raises(ValueError, match='https://a.org/b.zip is an address, not a folder'): image_dls('https://a.org/b.zip')

def test_bad_pictures_can_be_left_out(pets, capsys):
    add_broken(pets)
    add_blank(pets)
    dls = image_dls(pets, skip_bad=True, device='cpu')
    assert dls.train.n + dls.valid.n == 40 and 'blank.png is blank' in capsys.readouterr().out
    for file in (pets/'dog').iterdir(): file.write_bytes(b'no picture')
    with pytest.raises(ValueError, match="None of the pictures of the class 'dog' can be used"): image_dls(pets, skip_bad=True, device='cpu')

def test_bad_tables(pets):
    rows = [('cat/0.png', 'a'), ('cat/1.png', 'a'), ('dog/0.png', 'b'), ('dog/1.png', 'b')]
    def dls(rows): return image_dls(pets, labels=pd.DataFrame(rows, columns=['name', 'label']), device='cpu')
    assert dls(rows + rows[:1]).train.n == 2
    with pytest.raises(ValueError, match="Row 4 of the table, counted from 0, has nothing in the column 1"): dls(rows + [('dog/2.png', np.nan)])
    with pytest.raises(ValueError, match="Row 0 of the table, counted from 0, has nothing in the column 0"): dls([(' ', 'a'), *rows])
    with pytest.raises(ValueError, match="'later' is no column of the table; it has name, label"): image_dls(pets, labels=pd.DataFrame(rows, columns=['name', 'label']), valid_col='later')
    with pytest.raises(ValueError, match='labels is a function of the path, a table or a CSV file, not a list'): image_dls(pets, labels=['a']*40)
    for later,message in (['yes', 0, 0, 0], "'later' holds 'yes'; accepted are True"), ([1]*4, "'later' is 1 for all pictures"):
        table = pd.DataFrame(rows, columns=['name', 'label']).assign(later=later)
        with pytest.raises(ValueError, match=message): image_dls(pets, labels=table, valid_col='later', device='cpu')
    with pytest.raises(ValueError, match='cat/0.png has two labels'): dls(rows + [('cat/0.png', 'b')])
    with pytest.raises(ValueError, match='gone.png'): dls(rows + [('gone.png', 'b')])
    with pytest.raises(ValueError, match="the classes 'a' and 'a ' differ only by case, spaces"): dls(rows + [('dog/2.png', 'a ')])

def test_names_in_a_csv_file_are_kept(pets):
    (pets/'labels.csv').write_text('name, label\n' + ''.join(f'{kind}/{i}.png, {name}\n' for kind,name in (('cat', 'NA'), ('dog', 'None')) for i in range(4)))
    assert list(image_dls(pets, labels='labels.csv', label_col='label', device='cpu').vocab) == ['NA', 'None']

def test_pictures_beside_the_folders(pets, tmp_path):
    picture(np.random.default_rng(0), 'cat').save(pets/'plan.png')
    with pytest.raises(ValueError, match='plan.png lies in no folder of a class'): image_dls(pets, device='cpu')
    split = fill(tmp_path/'split'/'train').parent
    picture(np.random.default_rng(0), 'cat').save(split/'plan.png')
    assert list(image_dls(split, device='cpu').vocab) == ['cat', 'dog']

@pytest.mark.parametrize('given,message', [
    (dict(size=8), 'size=8: size is a whole number from 18 on'),
    (dict(n_train=0), 'n_train=0: n_train is a whole number from 1 on'),
    (dict(n_train=33), 'n_train=33: there are only 32 training pictures'),
    (dict(val_bs=0), 'val_bs=0: val_bs is a whole number from 1 on'),
    (dict(colour='grey'), "colour='grey': colour is one of None, True, False"),
    (dict(flip='yes'), "flip='yes': flip is True or False"),
    (dict(seed=-1), 'seed=-1: seed is a whole number from 0'),
    (dict(valid=1.), 'valid=1.0: valid is a share above 0 and below 1, or one of test'),
])
def test_bad_options(pets, given, message):
    with pytest.raises(ValueError, match=message): image_dls(pets, **{'device': 'cpu'} | given)

@pytest.mark.parametrize('memory', [1000, 10**9])
def test_a_part_of_the_training_pictures(pets, monkeypatch, memory):
    monkeypatch.setattr(images, '_memory', lambda device: memory)
    assert [image_dls(pets, n_train=9, valid=valid, device='cpu').train.n for valid in (0.2, 'reference')] == [9, 9]
    assert image_dls(pets, n_train=9, valid='reference', device='cpu').valid.n == 9

def test_mixed_pictures_and_links_in_circles(pets):
    Image.new('RGBA', (90,31), (0,0,0,0)).save(pets/'cat'/'ghost.png')
    with pytest.raises(ValueError, match='ghost.png is blank'): image_dls(pets, device='cpu')
    (pets/'cat'/'ghost.png').unlink()
    picture(np.random.default_rng(1), 'cat', (300,200), 'P').save(pets/'cat'/'other.png')
    (pets/'dog'/'loop').symlink_to(pets)
    before = sorted(pets.rglob('*'))
    dls = image_dls(pets, device='cpu')
    assert dls.train.n + dls.valid.n == 41
    assert sorted(pets.rglob('*')) == before
