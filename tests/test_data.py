"Digits against torchvision's reader; what a loader owes to fastai; what damaged input gets"
import gzip, struct
import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from scipy.stats import binomtest, kstest
from torchvision.datasets import MNIST
from torchvision.transforms import v2
from mnist_block3 import data
from mnist_block3.all import affine_coords, bend, CropRotate, Distort, load_digits, mnist_block, mnist_dls, PILImageBW, TensorImageBW
from mnist_block3.data import mnist_path, mnist_sha256

NAMES = [o.removesuffix('.gz') for o in mnist_sha256]


def idx(a, magic=None, dims=None):
    dims = a.shape if dims is None else dims
    return struct.pack(f'>{1+len(dims)}I', 0x800 + len(dims) if magic is None else magic, *dims) + a.tobytes()


def write_idx_folder(folder, n_train=30, n_test=10, **changed):
    "A small data set in MNIST's format; `changed` gives other bytes for some of the files"
    rng,folder = np.random.default_rng(0),folder/'idx'
    folder.mkdir()
    for name,n in zip(NAMES, (n_train, n_train, n_test, n_test)):
        a = rng.integers(0, 256, (n,28,28), np.uint8) if 'images' in name else rng.integers(0, 10, n).astype(np.uint8)
        (folder/name).write_bytes(changed.get(name.split('-')[0] + '_' + name.split('-')[1], idx(a)))
    return folder


def test_bundled_files_are_mnist_as_torchvision_reads_it(mnist, tmp_path):
    raw = tmp_path/'MNIST'/'raw'
    raw.mkdir(parents=True)
    for name in NAMES: (raw/name).write_bytes(gzip.decompress((mnist_path/f'{name}.gz').read_bytes()))
    from_torchvision_folder = load_digits(tmp_path)
    for split,train in zip((0,1), (True,False)):
        tv = MNIST(tmp_path, train=train)
        for ours in (mnist[split], from_torchvision_folder[split]):
            assert torch.equal(ours.images, tv.data)
            assert torch.equal(ours.labels.long(), tv.targets)


def test_a_sibling_data_set_is_as_good_a_source(tmp_path):
    folder = write_idx_folder(tmp_path)
    (folder/f'{NAMES[0]}.gz').write_bytes(gzip.compress((folder/NAMES[0]).read_bytes()))
    (folder/NAMES[0]).unlink()
    dls = mnist_dls(folder, bs=8, device='cpu')
    assert (dls.train.n, len(dls.train), dls.valid.n) == (30, 4, 10)


def test_image_folder_gives_the_same_tensors(mnist, tmp_path):
    for digits,split in zip(mnist, ('training', 'testing')):
        for i in range(150):
            d = tmp_path/split/str(int(digits.labels[i]))
            d.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.images[i].numpy()).save(d/f'{i+1}.png')
    for got,want in zip(load_digits(tmp_path), mnist):
        assert torch.equal(got.images, want.images[:150]) and torch.equal(got.labels, want.labels[:150])


@pytest.mark.parametrize('valid,n_train,n_valid', [('test', 60_000, 10_000), ('holdout', 50_000, 10_000), ('reference', 60_000, 60_000)])
def test_protocols(mnist, valid, n_train, n_valid):
    dls = mnist_dls(valid=valid, device='cpu')
    train,test = mnist
    assert (dls.train.n, dls.valid.n, len(dls.train)) == (n_train, n_valid, -(-n_train//64))
    items = dls.valid_ds.items
    want = {'test': test.images, 'holdout': train.images[-10_000:], 'reference': train.images}[valid]
    assert torch.equal(items.images, want)
    assert torch.equal(dls.train_ds.items.images, train.images[:n_train])


def test_only_the_reference_protocol_augments_its_evaluation(mnist):
    plain = lambda dls: (dls.valid_ds.items.images[:64,None]/255 - 0.1307)/0.3081
    for valid,same in (('test', True), ('holdout', True), ('reference', False)):
        dls = mnist_dls(valid=valid, n_train=256, device='cpu')
        assert torch.allclose(dls.valid.one_batch()[0], plain(dls), atol=1e-5) is same
        item = mnist[0].images[7]
        assert torch.allclose(dls.test_dl([item]).one_batch()[0][0,0], (item/255 - 0.1307)/0.3081, atol=1e-5)


def test_batches_hold_every_image_once_in_a_new_order(mnist):
    dls = mnist_dls(n_train=1000, aug_tfms=[], device='cpu')
    epochs = [torch.cat([o for o,_ in dls.train]) for _ in range(2)]
    assert not torch.equal(*epochs)
    for xs in epochs:
        got = (xs*0.3081 + 0.1307)[:,0].mul(255).round().byte().flatten(1)
        assert sorted(map(bytes, got.numpy())) == sorted(map(bytes, mnist[0].images[:1000].flatten(1).numpy()))


@pytest.mark.parametrize('angle', [-5, 0, 3, 5])
@pytest.mark.parametrize('crop', [False, True])
def test_augmentation_is_torchvisions(mnist, angle, crop):
    x = mnist[0].images[:300]
    tfms = [v2.CenterCrop(22)]*crop + [v2.Resize(28), v2.RandomRotation((angle, angle)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    want = torch.stack([v2.Compose(tfms)(Image.fromarray(o.numpy())) for o in x])
    got = CropRotate(p=float(crop), draw=angle)(TensorImageBW(x[:,None]/255), split_idx=0)
    assert (got-want).abs().mean() < 0.002


def test_augmentation_draws_as_the_original_does():
    "On a ramp from left to right, the slopes along both axes give each image's angle and scale; large, for rounding to matter little"
    x,tfm = TensorImageBW((torch.arange(224)/224).expand(800, 1, 224, 224)),CropRotate()
    y = tfm(x, split_idx=0)
    middle,at = y[:,0,32:192,32:192].as_subclass(torch.Tensor),torch.arange(160) - 79.5
    across,down = (224*(middle*o).mean((1,2))/at.square().mean() for o in (at, at[:,None]))
    angles,scale = torch.rad2deg(torch.atan2(down, across)),torch.hypot(across, down)
    assert kstest(angles.numpy(), 'uniform', (-5, 10)).pvalue > 0.01
    cropped = scale < 0.9
    assert scale[cropped].mean() == pytest.approx(22/28, abs=0.01) and scale[~cropped].mean() == pytest.approx(1, abs=0.01)
    assert binomtest(int(cropped.sum()), len(x), 0.1).pvalue > 0.01
    assert abs(torch.corrcoef(torch.stack([angles.abs(), cropped.float()]))[0,1]) < 0.1
    assert not torch.equal(tfm(x, split_idx=0), y)
    assert torch.equal(tfm(x, split_idx=1), x)


@pytest.mark.parametrize('deg,right,down,scale', [(0, 0, 0, 1), (8, 0, 0, 1), (0, 1.5, 0, 1), (0, 0, -1.5, 1), (0, 0, 0, 1.08), (-5, 0.7, 1.2, 0.93)])
def test_affine_coords_are_torchvisions(mnist, deg, right, down, scale):
    x = mnist[0].images[:20,None]/255
    got = F.grid_sample(x, affine_coords(x, *(torch.full((20,), float(o)) for o in (deg, right, down, scale))), align_corners=False)
    want = v2.functional.affine(x, deg, [right, down], scale, [0.], v2.InterpolationMode.BILINEAR)
    assert (got-want).abs().max() < 1e-4


def test_bend_is_torchvisions_elastic_transform(mnist):
    x,arrows = mnist[0].images[:20,None]/255,torch.randn(20, 2, 4, 4)
    still = affine_coords(x, *torch.tensor([0., 0, 0, 1]).expand(20, 4).T)
    got = F.grid_sample(x, still + bend(arrows), align_corners=False)
    want = torch.stack([v2.functional.elastic(o, b[None], v2.InterpolationMode.BILINEAR) for o,b in zip(x, bend(arrows))])
    assert (got-want).abs().max() < 1e-4
    pixels = bend(arrows)*28/2
    assert torch.allclose(pixels[:,[0,0,-1,-1],[0,-1,0,-1]], arrows[:,:,[0,0,-1,-1],[0,-1,0,-1]].transpose(1, 2), atol=1e-4)


def test_distort_draws_as_it_says():
    "On ramps from left to right and from top to bottom, whose values say where each pixel was taken from"
    n,at,t = 600,torch.arange(28) - 13.5,torch.arange(10) - 4.5
    ramps = TensorImageBW(torch.stack([at.expand(28, 28), at[:,None].expand(28, 28)]).expand(n, 2, 28, 28))
    y = Distort()(ramps, split_idx=0).as_subclass(torch.Tensor)[:,:,9:19,9:19] # the middle, where no zeros come in
    across,down = ((y*o).mean((-2,-1))[:,0]/t.square().mean() for o in (t, t[:,None]))
    assert kstest(torch.rad2deg(torch.atan2(down, across)).numpy(), 'uniform', (-8, 16)).pvalue > 0.01
    assert kstest(1/torch.hypot(across, down).numpy(), 'uniform', (0.92, 0.16)).pvalue > 0.01
    assert y.mean((-2,-1)).std() == pytest.approx(1.5/3**0.5, rel=0.1)
    moved = (Distort(0., 0., 0., elastic=0.5)(ramps, split_idx=0) - ramps)[:,:,9,9]
    assert moved.mean().abs() < 0.1 and moved.std() == pytest.approx(0.5, rel=0.15) # here an arrow stands
    assert not torch.equal(Distort()(ramps, split_idx=0), ramps)
    assert torch.equal(Distort()(ramps, split_idx=1), ramps)


def test_what_fastai_users_expect(mnist, tmp_path, capsys):
    dls = mnist_dls(n_train=64, device='cpu')
    Image.fromarray(mnist[1].images[0].numpy()).save(tmp_path/'seven.png')
    seven = mnist[1].images[0]
    batches = [dls.test_dl([o]).one_batch()[0] for o in (seven, seven.numpy(), PILImageBW.create(seven), tmp_path/'seven.png', str(tmp_path/'seven.png'))]
    for o in batches[1:]: assert torch.equal(o, batches[0])
    image,label = dls.valid_ds[0]
    assert isinstance(image, PILImageBW) and label == 7
    assert dls.new_empty() is not None
    assert dls.train.new(bs=10).one_batch()[0].shape == (10, 1, 28, 28)
    decoded = dls.valid.decode(dls.valid.one_batch())
    assert (decoded[0][0,0] - seven).abs().max() <= 1 and int(decoded[1][0]) == 7
    with_labels = dls.test_dl(dls.valid_ds.items[:5], with_labels=True).one_batch()
    assert with_labels[1].tolist() == [7, 2, 1, 0, 4]
    assert len(dls.test_dl(dls.valid_ds.items[:5]).one_batch()) == 1
    mnist_block().summary(None)
    assert 'TensorImageBW of size 4x1x28x28' in capsys.readouterr().out


def test_item_transforms_switch_to_single_items():
    fast,slow = (mnist_dls(n_train=128, device='cpu', aug_tfms=[], item_tfms=o) for o in (None, lambda o: o))
    assert fast.train.resident and not slow.train.resident
    for a,b in zip(fast.valid.one_batch(), slow.valid.one_batch()): assert torch.allclose(a, b)


ok = idx(np.zeros((30,28,28), np.uint8))
bad_files = {
    'truncated':          ({'train_images': ok[:-1]}, 'promises 30×28×28 bytes after its header, but has 23519'),
    'too long':           ({'train_images': ok + b'\0'}, 'but has more'),
    'no header':          ({'train_images': b'\0\0'}, 'holds 2 bytes, too few'),
    'empty file':         ({'t10k_labels': b''}, 'holds 0 bytes, too few'),
    'corrupt gzip':       ({'train_images': gzip.compress(ok)[:-9]}, 'is not a whole gzip file'),
    'gzip of nonsense':   ({'train_images': b'\x1f\x8b' + bytes(100)}, 'is not a whole gzip file'),
    'wrong magic':        ({'train_images': idx(np.zeros((30,28,28), np.uint8), magic=1234)}, 'magic number 1234'),
    'wrong size':         ({'train_images': idx(np.zeros((30,32,32), np.uint8))}, '30×32×32'),
    'no images':          ({'train_images': idx(np.zeros((0,28,28), np.uint8))}, '0×28×28'),
    'huge promise':       ({'train_images': idx(np.zeros((1,28,28), np.uint8), dims=(2**32-1,28,28))}, 'promises 4294967295×28×28'),
    'label out of range': ({'train_labels': idx(np.full(30, 10, np.uint8))}, 'the label 10, but labels are 0 to 9'),
    'too few labels':     ({'train_labels': idx(np.zeros(29, np.uint8))}, '30 images, but'),
    'a mix-up':           ({'train_images': idx(np.zeros(30, np.uint8)), 'train_labels': ok}, 'starts with magic number 2049'),
}


@pytest.mark.parametrize('case', bad_files)
def test_damaged_idx_files(tmp_path, case):
    files,message = bad_files[case]
    folder = write_idx_folder(tmp_path, **files)
    with pytest.raises(ValueError, match=message) as e: load_digits(folder)
    assert str(folder) in str(e.value)


def test_missing_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match='is no folder'): load_digits(tmp_path/'none')
    with pytest.raises(FileNotFoundError, match='holds neither train-images-idx3-ubyte nor'): load_digits(tmp_path)
    folder = write_idx_folder(tmp_path)
    (folder/'t10k-labels-idx1-ubyte').unlink()
    with pytest.raises(FileNotFoundError, match='holds neither t10k-labels-idx1-ubyte nor'): load_digits(folder)


def test_damaged_bundled_file(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'mnist_path', tmp_path)
    for o in mnist_path.glob('*.gz'): (tmp_path/o.name).write_bytes(o.read_bytes())
    load_digits()
    raw = bytearray((tmp_path/'t10k-labels-idx1-ubyte.gz').read_bytes())
    raw[4] ^= 1 # gzip's time stamp: the digits would still be right
    (tmp_path/'t10k-labels-idx1-ubyte.gz').write_bytes(raw)
    with pytest.raises(ValueError, match='t10k-labels-idx1-ubyte.gz is damaged.*Reinstall'): load_digits()


def test_bad_image_folders(tmp_path):
    train = tmp_path/'training'/'3'
    train.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='holds no images'): load_digits(tmp_path)
    Image.new('L', (32,28)).save(train/'1.png')
    with pytest.raises(ValueError, match='1.png cannot be read: it is 32×28 pixels'): load_digits(tmp_path)
    (train/'1.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match='1.png cannot be read: cannot identify'): load_digits(tmp_path)
    (tmp_path/'training'/'three').mkdir()
    (train/'1.png').rename(tmp_path/'training'/'three'/'1.png')
    with pytest.raises(ValueError, match="lies in the folder 'three'"): load_digits(tmp_path)


@pytest.mark.parametrize('kwargs,error,message', [
    (dict(valid='train'), ValueError, "valid='train': valid is one of 'test', 'holdout', 'reference'"),
    (dict(bs=0), ValueError, 'bs=0'), (dict(bs=1.5), ValueError, 'bs=1.5'), (dict(n_train=0), ValueError, 'n_train=0'),
    (dict(n_train=60_001), ValueError, 'only 60000'), (dict(n_train=50_001, valid='holdout'), ValueError, 'only 50000'),
    (dict(device='gpu'), ValueError, "device='gpu'"), (dict(device='cuda:77'), RuntimeError, "no device 'cuda:77'"),
])
def test_bad_settings(kwargs, error, message):
    with pytest.raises(error, match=message): mnist_dls(**kwargs)


def test_holdout_needs_enough_images(tmp_path):
    with pytest.raises(ValueError, match='over 10,000 training images, but there are 30'): mnist_dls(write_idx_folder(tmp_path), valid='holdout')
