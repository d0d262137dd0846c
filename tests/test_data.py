"Images against torchvision's reader; what a loader owes to fastai; what damaged input gets"
import gzip, struct, subprocess, sys
import numpy as np, pytest, torch
from fastai.data.transforms import get_image_files
from PIL import Image
from scipy.stats import binomtest, kstest, norm
from torchvision.datasets import MNIST
from mnist_block3 import data, sources
from mnist_block3.data import CropRotate, Distort, get_images, mnist_dls
from mnist_block3.sources import load_digits, mnist_path, mnist_sha256
from mnist_block3.picture import picture_files
from fastai.vision.core import PILImageBW

names = [name.removesuffix('.gz') for name in mnist_sha256]


def idx(a, dims=None):
    dims = dims or a.shape
    return struct.pack(f'>{1 + len(dims)}I', 0x800 + len(dims), *dims) + a.tobytes()


def write_idx_folder(folder, **changed):
    "30 training and 10 test images in MNIST's format; `changed` gives other bytes for some of the files"
    rng = np.random.default_rng(0)
    (folder/'idx').mkdir()
    for name in names:
        split,kind = name.split('-')[:2]
        n = 30 if split == 'train' else 10
        a = rng.integers(0, 256, (n,28,28)) if kind == 'images' else rng.integers(0, 10, n)
        (folder/'idx'/name).write_bytes(changed.get(f'{split}_{kind}', idx(a.astype(np.uint8))))
    return folder/'idx'


def test_bundled_files_are_mnist_as_torchvision_reads_it(mnist, tmp_path):
    raw = tmp_path/'MNIST'/'raw'
    raw.mkdir(parents=True)
    for name in names: (raw/name).write_bytes(gzip.decompress((mnist_path/f'{name}.gz').read_bytes()))
    from_torchvisions_folder = load_digits(tmp_path)
    for split,train in enumerate((True, False)):
        theirs = MNIST(tmp_path, train=train)
        for ours in (mnist[split], from_torchvisions_folder[split]):
            assert torch.equal(ours.images, theirs.data)
            assert torch.equal(ours.labels.long(), theirs.targets)


def test_image_folder_gives_the_same_tensors(mnist, tmp_path):
    for digits,split in zip(mnist, ('training', 'testing')):
        for i in range(110):
            path = tmp_path/split/str(int(digits.labels[i]))/f'{i + 1}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.images[i].numpy()).save(path)
    for got,want in zip(load_digits(tmp_path), mnist):
        assert torch.equal(got.images, want.images[:110])
        assert torch.equal(got.labels, want.labels[:110])


def test_pictures_are_found_as_fastai_finds_them(tmp_path):
    for name in ('b.png', 'a.JPG', 'c.txt', 'd', '.hidden.png', 'deep/er/e.tiff', '.git/f.png'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    assert picture_files(tmp_path) == sorted(get_image_files(tmp_path)) != []


def test_reading_a_picture_imports_neither_torch_nor_fastai():
    code = 'import sys, mnist_block3.picture; sys.exit(len({"torch", "fastai"} & set(sys.modules)))'
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('valid,n_train', [('test', 60_000), ('holdout', 50_000), ('reference', 60_000)])
def test_protocols(mnist, at_hand, valid, n_train):
    digits = get_images(valid=valid)
    train,test = mnist
    evaluated = {'test': test.images, 'holdout': train.images[-10_000:], 'reference': train.images}[valid]
    assert torch.equal(digits[digits.splits[0]].images, train.images[:n_train])
    assert torch.equal(digits[digits.splits[1]].images, evaluated)


def test_batches_hold_every_image_once_in_a_new_order(mnist, at_hand):
    dls = mnist_dls(n_train=1000, aug_tfms=[], device='cpu')
    epochs = [torch.cat([xb for xb,_ in dls.train]) for _ in range(2)]
    assert not torch.equal(*epochs)
    for xs in epochs:
        got = (xs*0.3081 + 0.1307)[:,0].mul(255).round().byte().flatten(1)
        assert sorted(map(bytes, got.numpy())) == sorted(map(bytes, mnist[0].images[:1000].flatten(1).numpy()))


def drawn(monkeypatch, tfm, func):
    "The random amounts that `tfm` gives to `func` for 5,000 images; 03_augment shows that `func` applies them"
    seen = []
    monkeypatch.setattr(data, func, lambda x, *amounts: seen.append(amounts) or x)
    tfm.augment(torch.zeros(5000, 1, 28, 28))
    return seen[0]


def test_augmentation_draws_as_the_original_does(monkeypatch):
    deg,scale,_ = drawn(monkeypatch, CropRotate(), 'crop_rotate')
    assert kstest(deg, 'uniform', (-5, 10)).pvalue > 0.01
    cropped = scale < 1
    assert set(scale.tolist()) == {1., np.float32(22/28)}
    assert binomtest(int(cropped.sum()), 5000, 0.1).pvalue > 0.01
    assert abs(torch.corrcoef(torch.stack([deg.abs(), cropped.float()]))[0,1]) < 0.05


def test_distort_draws_as_it_says(monkeypatch):
    deg,right,down,scale,arrows,_ = drawn(monkeypatch, Distort(elastic=0.5, strength=2), 'distort')
    for amounts,middle,limit in ((deg, 0, 16), (right, 0, 3), (down, 0, 3), (scale, 1, 0.16)):
        assert kstest(amounts, 'uniform', (middle - limit, 2*limit)).pvalue > 0.01
    assert arrows.shape == (5000, 2, 4, 4)
    assert kstest(arrows.flatten(), norm.cdf).pvalue > 0.01
    assert torch.corrcoef(torch.stack([deg, right, down, scale])).fill_diagonal_(0).abs().max() < 0.05


def test_what_fastai_users_expect(mnist, at_hand, tmp_path):
    dls = mnist_dls(n_train=64, device='cpu')
    seven = mnist[1].images[0]
    path = tmp_path/'seven.png'
    Image.fromarray(seven.numpy()).save(path)
    items = [seven, seven.numpy(), PILImageBW.create(seven), path, str(path)]
    first,*others = [dls.test_dl([item]).one_batch()[0] for item in items]
    for other in others: assert torch.equal(other, first)
    image,label = dls.valid_ds[0]
    assert isinstance(image, PILImageBW) and label == 7
    assert dls.new_empty() is not None
    assert dls.train.new(bs=10).one_batch()[0].shape == (10, 1, 28, 28)
    xs,ys = dls.valid.decode(dls.valid.one_batch())
    assert (xs[0,0] - seven).abs().max() <= 1 and int(ys[0]) == 7
    with_labels = dls.test_dl(dls.valid_ds.items[:5], with_labels=True).one_batch()
    assert with_labels[1].tolist() == [7, 2, 1, 0, 4]
    assert len(dls.test_dl(dls.valid_ds.items[:5]).one_batch()) == 1


ok = idx(np.zeros((30,28,28), np.uint8))
no_images = np.zeros((0,28,28), np.uint8)
bad_files = {
    'truncated':          (dict(train_images=ok[:-1]), 'promises 30×28×28 bytes after its header, but has 23519'),
    'too long':           (dict(train_images=ok + b'\0'), 'but has more'),
    'corrupt gzip':       (dict(train_images=gzip.compress(ok)[:-9]), 'is not a whole gzip file'),
    'gzip of nonsense':   (dict(train_images=b'\x1f\x8b' + bytes(100)), 'is not a whole gzip file'),
    'wrong size':         (dict(train_images=idx(no_images, dims=(30,32,32))), '30×32×32'),
    'no images':          (dict(train_images=idx(no_images)), '0×28×28'),
    'label out of range': (dict(train_labels=idx(np.full(30, 10, np.uint8))), 'the label 10, but labels are 0 to 9'),
    'too few labels':     (dict(train_labels=idx(np.zeros(29, np.uint8))), '30 images, but'),
    'a mix-up':           (dict(train_images=idx(np.zeros(30, np.uint8)), train_labels=ok), 'has the magic number 2049'),
}


@pytest.mark.parametrize('case', bad_files)
def test_damaged_idx_files(tmp_path, case):
    files,message = bad_files[case]
    folder = write_idx_folder(tmp_path, **files)
    with pytest.raises(ValueError, match=message) as e: load_digits(folder)
    assert str(folder) in str(e.value)


def test_damaged_bundled_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'mnist_path', tmp_path)
    for path in mnist_path.glob('*.gz'):
        raw = bytearray(path.read_bytes())
        raw[4] ^= 1 # gzip's time stamp: the digits would still be right
        (tmp_path/path.name).write_bytes(raw)
    with pytest.raises(ValueError, match='train-images-idx3-ubyte.gz is damaged.*Reinstall'): load_digits()


def test_bad_image_folders(tmp_path):
    train = tmp_path/'training'/'3'
    train.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='holds training/. Accepted are'): load_digits(tmp_path)
    Image.new('L', (32,28)).save(train/'1.png')
    with pytest.raises(ValueError, match='1.png cannot be read: it is 32×28 pixels'): load_digits(tmp_path)
    (train/'1.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match='1.png cannot be read: cannot identify'): load_digits(tmp_path)
    train.rename(tmp_path/'training'/'three')
    with pytest.raises(ValueError, match="lies in the folder 'three'"): load_digits(tmp_path)


@pytest.mark.parametrize('kwargs,error,message', [
    (dict(valid='train'), ValueError, "valid='train': valid is one of 'test', 'holdout', 'reference'"),
    (dict(bs=1.5), ValueError, 'bs=1.5'),
    (dict(n_train=0), ValueError, 'n_train=0'),
    (dict(n_train=50_001, valid='holdout'), ValueError, 'only 50000'),
    (dict(device='gpu'), ValueError, "device='gpu'"),
    (dict(device='cuda:77'), RuntimeError, "no device 'cuda:77'"),
])
def test_bad_settings(at_hand, kwargs, error, message):
    with pytest.raises(error, match=message): mnist_dls(**kwargs)


def test_holdout_needs_enough_images(tmp_path):
    folder = write_idx_folder(tmp_path)
    with pytest.raises(ValueError, match='over 10,000 training images, but there are 30'): mnist_dls(folder, valid='holdout')
