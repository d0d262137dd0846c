"Data sets as people find them: written by other libraries, read by torchvision's readers; and what is said of anything else"
import gzip, io, json, struct, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from torchvision.datasets import EMNIST, FashionMNIST, KMNIST, QMNIST
from mnist_block3.all import block3_learner, load_digits, mistakes, mnist_dls
from mnist_block3.cli import block3_predict, block3_train
from mnist_block3.data import get_images

rng = np.random.default_rng(0)
images = dict(train=rng.integers(0, 100, (30,28,28), np.uint8), test=rng.integers(0, 100, (12,28,28), np.uint8))
labels = dict(train=np.arange(30, dtype=np.uint8) % 10, test=np.arange(12, dtype=np.uint8) % 10)


def idx(a, kind=8):
    return struct.pack(f'>{1 + a.ndim}I', 256*kind + a.ndim, *a.shape) + a.astype('>i4' if kind == 12 else np.uint8).tobytes()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)


def put_idx(folder, train='train', test='t10k', pattern='{}', images=images, labels=labels):
    "Four IDX files; `pattern` makes a path of each name"
    for split,name in dict(train=train, test=test).items():
        put(folder/pattern.format(f'{name}-images-idx3-ubyte'), idx(images[split]))
        put(folder/pattern.format(f'{name}-labels-idx1-ubyte'), idx(labels[split]))
    return folder


def put_dotted(folder, pattern):
    for split,name in dict(train='train', test='t10k').items():
        put(folder/pattern.format(f'{name}-images.idx3-ubyte'), idx(images[split]))
        put(folder/pattern.format(f'{name}-labels.idx1-ubyte'), idx(labels[split]))
    return folder


def put_pictures(folder, train, test):
    for split,name in dict(train=train, test=test).items():
        for i,(image,label) in enumerate(zip(images[split], labels[split])):
            (folder/name/str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder/name/str(label)/f'{i}.png')
    return folder


def as_table(split):
    table = pd.DataFrame(images[split].reshape(-1, 784)).add_prefix('pixel')
    table.insert(0, 'label', labels[split])
    return table


def put_csv(folder, name='{}.csv', header=True):
    for split in images: as_table(split).to_csv(folder/name.format(split), index=False, header=header)
    return folder


def put_npz(folder, dtype=np.uint8):
    np.savez_compressed(folder/'mnist.npz', **{f'x_{split}': images[split].astype(dtype) for split in images},
                        **{f'y_{split}': labels[split] for split in images})
    return folder


def put_arrays(folder):
    "As KMNIST"
    for split in images:
        np.savez_compressed(folder/f'kmnist-{split}-imgs.npz', images[split])
        np.savez_compressed(folder/f'kmnist-{split}-labels.npz', labels[split])
    return folder


def as_png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'png')
    return file.getvalue()


def put_parquet(folder, n_shards=1):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    folder.mkdir(exist_ok=True)
    for split in images:
        rows = [dict(image=dict(bytes=as_png(image), path=f'{i}.png'), label=int(label))
                for i,(image,label) in enumerate(zip(images[split], labels[split]))]
        for i,shard in enumerate(np.array_split(rows, n_shards)):
            table = pyarrow.Table.from_pylist(list(shard))
            parquet.write_table(table, folder/f'{split}-{i:05}-of-{n_shards:05}.parquet')
    return folder


def put_duplicates(folder):
    "As on Kaggle: each file, and the file again in a folder of its name"
    put_dotted(folder, '{}')
    return put_idx(folder, pattern='{0}/{0}')


layouts = {
    'idx':                       lambda d: put_idx(d),
    'idx.gz':                    lambda d: put_idx(d, pattern='{}.gz'),
    'below':                     lambda d: put_idx(d, pattern='archive/MNIST/raw/{}') and d,
    'the dot':                   lambda d: put_dotted(d, '{}'),
    'the dot, packed':           lambda d: put_dotted(d, '{}.gz'),
    'folders of the same name':  lambda d: put_idx(d, pattern='archive/{0}/{0}'),
    'dots in folders':           lambda d: put_dotted(d, 'archive/{0}/{0}'),
    'both':                      put_duplicates,
    'one IDX file':              lambda d: put_idx(d)/'train-labels-idx1-ubyte',
    'training and testing':      lambda d: put_pictures(d, 'training', 'testing'),
    'train and test':            lambda d: put_pictures(d, 'train', 'test'),
    'pictures below':            lambda d: put_pictures(d/'mnist'/'mnist', 'train', 'test') and d,
    'nested pictures':           lambda d: put_pictures(d, 'train/train', 'test/test'),
    'train.csv':                 lambda d: put_csv(d),
    'mnist_train.csv':           lambda d: put_csv(d, 'mnist_{}.csv', header=False),
    'one CSV file':              lambda d: put_csv(d, 'mnist_{}.csv')/'mnist_train.csv',
    'mnist.npz':                 lambda d: put_npz(d),
    'one .npz file':             lambda d: put_npz(d)/'mnist.npz',
    'numbers of 64 bits':        lambda d: put_npz(d, np.int64),
    'four .npz files':           put_arrays,
    'parquet':                   lambda d: put_parquet(d/'mnist') and d,
    'one parquet file':          lambda d: put_parquet(d)/'train-00000-of-00001.parquet',
    'shards':                    lambda d: put_parquet(d, 3),
}


def by_image(digits): return sorted((bytes(x), int(y)) for x,y in zip(digits.images.numpy(), digits.labels))


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('layout', layouts)
def test_layouts(tmp_path, layout):
    for split,digits in zip(images, load_digits(layouts[layout](tmp_path))):
        assert by_image(digits) == sorted((bytes(x), int(y)) for x,y in zip(images[split], labels[split]))
        if 'pictures' not in layout and 'and' not in layout: assert np.array_equal(digits.images, images[split])


# EMNIST and QMNIST

def put_emnist(folder, part='letters', first=1, n=26):
    of_part = {split: (np.arange(len(y)) % n + first).astype(np.uint8) for split,y in labels.items()}
    return put_idx(folder, f'emnist-{part}-train', f'emnist-{part}-test', labels=of_part)


@pytest.mark.parametrize('part,first,n', [('letters', 1, 26), ('balanced', 0, 47), ('bymerge', 0, 47), ('byclass', 0, 62), ('digits', 0, 10)])
def test_emnist_is_turned_and_named_as_torchvisions(tmp_path, capsys, part, first, n):
    put_emnist(tmp_path/'EMNIST'/'raw', part, first, n)
    for train,digits in zip((True, False), load_digits(tmp_path/'EMNIST')):
        theirs = EMNIST(tmp_path, part, train=train)
        assert torch.equal(digits.images, theirs.data.transpose(1, 2))
        assert [str(digits[i][1]) for i in range(len(digits))] == [theirs.classes[target] for target in theirs.targets]
    assert len(digits.spec.vocab) == n
    assert capsys.readouterr().out.count('turned upright') == 1


def test_qmnist_is_torchvisions(tmp_path):
    raw = tmp_path/'QMNIST'/'raw'
    for split in images:
        columns = np.arange(8*len(labels[split]), dtype=np.int32).reshape(-1, 8) + 1000
        columns[:,0] = labels[split]
        put(raw/f'qmnist-{split}-images-idx3-ubyte', idx(images[split]))
        put(raw/f'qmnist-{split}-labels-idx2-int', idx(columns, kind=12))
    for what,digits in zip(images, load_digits(tmp_path)):
        theirs = QMNIST(tmp_path, what)
        assert torch.equal(digits.images, theirs.data)
        assert torch.equal(digits.labels.long(), theirs.targets[:,0])


def test_letters_end_to_end(tmp_path, capsys):
    source = put_emnist(tmp_path/'gzip')
    learn = block3_learner(mnist_dls(source, bs=8, device='cpu'))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert set(mistakes(learn).truth) <= set('abcdefghijklmnopqrstuvwxyz')
    assert learn.model(learn.dls.one_batch()[0]).shape == (8, 26)
    block3_train(source=str(source/'emnist-letters'), epochs=1, bs=8, device='cpu', out=str(tmp_path/'run'))
    picture = np.zeros((28,28), np.uint8)
    picture[5:24,12:16] = 255
    Image.fromarray(picture).save(tmp_path/'l.png')
    capsys.readouterr()
    block3_predict([str(tmp_path/'l.png')], weights=str(tmp_path/'run'), json=True, min_probability=0.)
    answer = json.loads(capsys.readouterr().out)
    assert len(answer['probabilities']) == 26, answer


# What there is no answer for

def test_test_csv_without_labels(tmp_path):
    "Kaggle's digit recognizer"
    many = pd.concat([as_table('train')]*334)
    many.to_csv(tmp_path/'train.csv', index=False)
    as_table('test').drop(columns='label').to_csv(tmp_path/'test.csv', index=False)
    with pytest.raises(ValueError, match=r"no test images with labels: valid='holdout'"): mnist_dls(tmp_path, device='cpu')
    assert [len(idxs) for idxs in get_images(tmp_path, valid='holdout').splits] == [20, 10_000]


def test_several_data_sets(tmp_path):
    for part in ('letters', 'digits'): put_emnist(tmp_path/'gzip', part, n=9)
    put_npz(tmp_path)
    with pytest.raises(ValueError, match='holds 3 data sets. Pass one of them') as e: load_digits(tmp_path)
    choices = str(e.value).split('one of them: ')[1].split(', ')
    assert sorted(choices) == [str(tmp_path/name) for name in ('gzip/emnist-digits', 'gzip/emnist-letters', 'mnist.npz')]
    for choice in choices: assert len(load_digits(choice)[0]) == 30


def test_torchvisions_folder_of_several(tmp_path):
    for name in ('FashionMNIST', 'KMNIST'): put_idx(tmp_path/name/'raw')
    with pytest.raises(ValueError, match=f'one of them: {tmp_path}/FashionMNIST/raw, {tmp_path}/KMNIST/raw$'): load_digits(tmp_path)
    for theirs in (FashionMNIST, KMNIST): assert list(load_digits(tmp_path/theirs.__name__)[0].spec.vocab) == theirs.classes


def put_text(path):
    put(path, b'nothing')
    return path


nothing = {
    'a typo':          (lambda d: d/'mnsit', FileNotFoundError, 'mnsit is no folder or file'),
    'an address':      (lambda d: 'https://a.org/b.zip', ValueError, 'https://a.org/b.zip is an address.*Download it first'),
    'as a path':       (lambda d: Path('https://a.org/b.zip'), ValueError, 'https://a.org/b.zip is an address'),
    'empty':           (lambda d: d, FileNotFoundError, 'holds nothing. Accepted are'),
    'other files':     (lambda d: put_text(d/'mnist.zip').parent, FileNotFoundError, 'holds mnist.zip. Accepted are(?s:.*)Unpack archives first'),
    'another file':    (lambda d: put_text(d/'mnist.pkl.gz'), ValueError, 'mnist.pkl.gz is no file of a data set. Accepted are(?s:.*)Unpack archives first'),
    'classes only':    (lambda d: put_pictures(d, 'train', 'test')/'train', FileNotFoundError, r'holds 0/, 1/, 2/, 3/, 4/ and 5 more\. Accepted are'),
    'no training':     (lambda d: put(d/'t10k-images-idx3-ubyte', b'') or put(d/'t10k-labels-idx1-ubyte', b'') or d, ValueError, 'has no training images'),
    'no labels':       (lambda d: put(d/'train-images-idx3-ubyte', b'') or d, FileNotFoundError, 'train-images-idx3-ubyte has no labels beside it'),
    'other columns':   (lambda d: pd.DataFrame(np.zeros((3,5))).to_csv(d/'train.csv') or d, ValueError, 'train.csv cannot be read: it has 6 columns, not 785'),
    'too bright':      (lambda d: as_table('train').assign(pixel3=256).to_csv(d/'train.csv', index=False) or d, ValueError, 'train.csv cannot be read: .*256'),
    'label 10':        (lambda d: as_table('train').assign(label=10).to_csv(d/'train.csv', index=False) or d, ValueError, 'train.csv holds the label 10, but labels are 0 to 9'),
    'fractions':       (lambda d: put_npz(d, np.float32), ValueError, 'mnist.npz cannot be read: its pixels are float32'),
    'other arrays':    (lambda d: np.savez(d/'a.npz', images=images['train']) or d, ValueError, 'a.npz cannot be read: it has images, but no x_train'),
    'no zip':          (lambda d: put_text(d/'a.npz'), ValueError, 'a.npz cannot be read'),
    'objects':         (lambda d: np.savez(d/'a.npz', x_train=np.array([{}]), y_train=labels['train']) or d, ValueError, 'a.npz cannot be read: Object arrays'),
}


@pytest.mark.parametrize('case', nothing)
def test_what_is_said_of_other_data(tmp_path, case):
    make, error, message = nothing[case]
    with pytest.raises(error, match=message): load_digits(make(tmp_path))


def test_a_bomb_in_an_archive(tmp_path):
    np.savez_compressed(tmp_path/'a.npz', x_train=np.zeros((200_000,28,28), np.uint8), y_train=np.zeros(200_000, np.uint8))
    with pytest.raises(ValueError, match='x_train is more than 100 times as large'): load_digits(tmp_path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    put(tmp_path/'train-00000-of-00001.parquet', b'')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(ImportError, match='needs pyarrow 15 or newer: pip install'): load_digits(tmp_path)


# Dark on light

def test_dark_digits_on_transparent_ground_become_light_on_black(tmp_path, mnist):
    digits = mnist[1].images[:20]
    for i,digit in enumerate(digits):
        for split in ('training', 'testing'):
            picture = Image.new('RGBA', (28,28), 'black')
            picture.putalpha(Image.fromarray(digit.numpy()))
            (tmp_path/split/'0').mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path/split/'0'/f'{i:02}.png')
    assert torch.equal(load_digits(tmp_path)[0].images, digits)


def test_black_on_white_is_warned_of(tmp_path, mnist):
    digits = mnist[1][:20]
    both = dict(images={split: 255 - digits.images.numpy() for split in images}, labels={split: digits.labels.numpy() for split in images})
    with pytest.warns(UserWarning, match='the border of the images is bright'): load_digits(put_idx(tmp_path, **both))
