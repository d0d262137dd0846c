"Pictures in MNIST's form, reading them from files, and exporting the network"
import json, os, pickle, subprocess, sys, time
from pathlib import Path
import numpy as np, onnx, onnxruntime, pytest, torch
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file
from mnist_block3.all import (Block3, block3_learner, find_images, load_block3, load_digits, mnist_dls, mnist_form, predict_digits,
                              predict_files, weights_path)
from mnist_block3.cli import block3_export, block3_predict

test = load_digits()[1]


def command(name, *args, **kwargs):
    return subprocess.run([Path(sys.executable).parent/name, *map(str, args)], capture_output=True, text=True, **kwargs)

def picture(i, size=120): return Image.fromarray(test.images[i].numpy()).resize((size,size), Image.BICUBIC)

@pytest.fixture
def folder(tmp_path):
    "Five digits in files, beside what is none"
    for i in range(5): ImageOps.invert(picture(i)).save(tmp_path/f'{i}.png')
    (tmp_path/'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n broken')
    (tmp_path/'notes.txt').write_text('no picture')
    return tmp_path


def test_what_is_in_the_form_stays_as_it_is():
    for o in test.images.numpy():
        assert np.array_equal(mnist_form(Image.fromarray(o)), o)
    assert np.array_equal(mnist_form(Image.fromarray(255 - o)), o)


def test_the_form_is_that_of_mnist():
    "Box and centre of mass, taken here in another way, of pictures that were anywhere"
    for i in range(50):
        pic = Image.new('L', (200,150))
        pic.paste(picture(i, 60), (i, i))
        a = mnist_form(pic).astype(float)
        rows,cols = np.nonzero(a.any(1))[0],np.nonzero(a.any(0))[0]
        assert max(np.ptp(rows), np.ptp(cols)) + 1 in (19, 20)
        assert (abs(np.array([np.average(np.arange(28), weights=a.sum(o)) for o in (1, 0)]) - 14) <= 0.51).all()
        assert a.max() == 255 and a.dtype == float


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'I', 'F', 'I;16'])
def test_every_mode(mode):
    grey = picture(0)
    if mode == 'I;16': im = Image.fromarray(np.asarray(grey).astype(np.uint16)*257)
    elif mode == 'F': im = Image.fromarray(np.asarray(grey).astype(np.float32)/255)
    else: im = grey.convert(mode)
    assert im.mode == mode
    off = np.abs(mnist_form(im).astype(int) - mnist_form(grey))
    assert off.max() <= (130 if mode == '1' else 12 if mode == 'P' else 2) and off.mean() < 6


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'bmp', 'gif', 'tif', 'webp', 'pgm'])
def test_every_format(suffix, tmp_path):
    picture(0).save(tmp_path/f'a.{suffix}')
    assert np.abs(mnist_form(tmp_path/f'a.{suffix}').astype(int) - mnist_form(picture(0))).mean() < 2


def test_orientation_and_transparency(tmp_path):
    want,exif = mnist_form(picture(0)),Image.Exif()
    exif[0x0112] = 6 # to be turned by 90° clockwise
    picture(0).transpose(Image.Transpose.ROTATE_90).save(tmp_path/'turned.jpg', exif=exif, quality=100, subsampling=0)
    assert np.abs(mnist_form(tmp_path/'turned.jpg').astype(int) - want).max() < 16
    for colour in ('white', 'black', 'red'):
        im = Image.new('RGBA', (120,120), colour)
        im.putalpha(picture(0))
        assert np.abs(mnist_form(im).astype(int) - want).max() <= 3, colour


def test_forty_pictures_of_all_kinds():
    rng,right,model = np.random.default_rng(1),0,load_block3()
    for i in range(100, 140):
        size,(h,w) = int(rng.integers(20, 300)),map(int, rng.integers(300, 500, 2))
        ink,paper = (tuple(map(int, rng.integers(*o, 3))) for o in ((0,100), (160,256)))
        if i % 2: ink,paper = paper,ink
        mask,pic = picture(i, size),Image.new('RGB', (w,h), paper)
        pic.paste(Image.new('RGB', mask.size, ink), tuple(map(int, rng.integers(0, 300 - size + 1, 2))), mask)
        if i % 4 == 3: pic = Image.fromarray((np.asarray(pic) + rng.normal(0, 6, (h,w,3))).clip(0, 255).astype(np.uint8))
        right += predict_digits(model, mnist_form(pic)[None]).argmax() == test.labels[i]
    assert right >= 38


def with_noise(im, rng): return Image.fromarray((np.asarray(im) + rng.normal(0, rng.uniform(10, 25), (im.height,im.width,3))).clip(0, 255).astype(np.uint8))

def with_specks(im, rng):
    a,p = np.array(im),rng.random((im.height,im.width))
    a[p < 0.005],a[p > 0.995] = 0,255
    return Image.fromarray(a)

specked = {'dithered': lambda im, rng: im.convert('P'), 'noisy': with_noise, 'black and white specks': with_specks}

@pytest.mark.parametrize('kind', specked)
def test_specks_are_no_ink(kind):
    "A hundred pictures each, of which the box of all that has ink read 27, 17 and 60"
    rng,forms = np.random.default_rng(2),[]
    for i in range(200, 300):
        size = int(rng.integers(28, 225))
        colours = [tuple(map(int, rng.integers(*o, 3))) for o in ((0,100), (160,256))][::rng.choice([-1, 1])]
        pic,mask = Image.new('RGB', tuple(map(int, size*rng.uniform(1, 1.8, 2))), colours[0]),picture(i, size)
        pic.paste(colours[1], tuple(int(rng.integers(o - size + 1)) for o in pic.size), mask)
        forms.append(mnist_form(specked[kind](pic, rng)))
    assert (predict_digits(load_block3(), np.stack(forms)).argmax(1) == test.labels[200:300].numpy()).sum() >= 95


@pytest.mark.parametrize('width', [1, 2])
def test_thin_strokes_stay(width):
    for size in (40, 60, 100):
        pic = Image.new('L', (size,size), 255)
        ImageDraw.Draw(pic).line([(size*0.3,size*0.15), (size*0.7,size*0.15), (size*0.45,size*0.85)], 0, width)
        form = mnist_form(pic)
        rows = np.flatnonzero(form.max(1) > 60)
        assert np.ptp(rows) + 1 >= 19 and predict_digits(load_block3(), form[None]).argmax() == 7


def test_what_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match='it is blank'): mnist_form(Image.new('RGB', (50,40), 'red'))
    with pytest.raises(ValueError, match='it is blank: nothing stands out'): mnist_form(Image.fromarray(np.repeat(np.uint8([[0],[255]]), 20, 0).repeat(40, 1)))
    with pytest.raises(FileNotFoundError): mnist_form(tmp_path/'none.png')
    with pytest.raises(ValueError, match='not finite'): mnist_form(Image.fromarray(np.array([[0, np.inf], [1, 2]], np.float32)))
    picture(0).save(tmp_path/'cut.png')
    (tmp_path/'cut.png').write_bytes((tmp_path/'cut.png').read_bytes()[:200])
    with pytest.raises(ValueError, match='cut.png cannot be read'): mnist_form(tmp_path/'cut.png')
    Image.new('1', (12_000,12_000)).save(tmp_path/'huge.png')
    with pytest.raises(ValueError, match='pixels'), pytest.warns(Image.DecompressionBombWarning): mnist_form(tmp_path/'huge.png')


def test_learner_predicts_from_files_and_pictures(tmp_path):
    learn = block3_learner(mnist_dls(n_train=64, device='cpu'), pretrained=True)
    ImageOps.invert(picture(4)).save(tmp_path/'four.jpg')
    with learn.no_bar():
        got = [learn.predict(o)[2] for o in (tmp_path/'four.jpg', str(tmp_path/'four.jpg'), Image.open(tmp_path/'four.jpg'), mnist_form(tmp_path/'four.jpg'))]
    want = torch.as_tensor(predict_digits(load_block3(), mnist_form(tmp_path/'four.jpg')[None])[0])
    for o in got: torch.testing.assert_close(o, want, atol=1e-5, rtol=1e-4)
    assert want.argmax() == 4


def test_finding_images(folder):
    names = [o.name for o in find_images([folder])]
    assert names == ['0.png', '1.png', '2.png', '3.png', '4.png', 'broken.png']
    assert find_images([folder/'[12].png', folder/'9*.png', folder/'0.png']) == [folder/'1.png', folder/'2.png', folder/'9*.png', folder/'0.png']
    (folder/'[x].png').touch()
    assert find_images([folder/'[x].png']) == [folder/'[x].png']


def test_predict_files_over_several_batches(folder):
    found = list(predict_files(find_images([folder])*3, bs=4))
    assert [f.name for f,_ in found] == ['0.png', '1.png', '2.png', '3.png', '4.png', 'broken.png']*3
    assert [int(o.argmax()) for _,o in found if not isinstance(o, Exception)] == test.labels[:5].tolist()*3
    assert sum(isinstance(o, ValueError) for _,o in found) == 3


def test_console(folder):
    done = command('block3_predict', '.', 'notes.txt', '4.png', 'gone.png', cwd=folder)
    lines = [o.split('\t') for o in done.stdout.splitlines()]
    assert [o[:2] for o in lines] == [[f'{i}.png', str(int(test.labels[i]))] for i in (0,1,2,3,4,4)] and done.returncode == 1
    assert all(0 < float(o[2]) <= 1 for o in lines)
    errors = done.stderr.splitlines()
    assert len(errors) == 3 and all(o.startswith('block3_predict: ') for o in errors) and 'gone.png' in errors[2]


def test_as_json_and_by_what_is_no_weights(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    block3_predict.__wrapped__(['0.png'], json=True)
    row = json.loads(capsys.readouterr().out)
    assert row['digit'] == 7 and len(row['probabilities']) == 10 and row['path'] == '0.png'
    (folder/'evil').write_bytes(pickle.dumps(Planted(folder/'ran')))
    with pytest.raises(SystemExit, match=r'^block3_predict: .*evil does not hold the weights of Block3.*$'): block3_predict.__wrapped__(['0.png'], weights='evil')
    assert not (folder/'ran').exists()

class Planted:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_weights_of_another_network(tmp_path):
    from safetensors.torch import save_file
    save_file({'a': torch.zeros(3)}, tmp_path/'other.safetensors')
    with pytest.raises(ValueError, match='does not hold the weights of Block3'): load_block3(tmp_path/'other.safetensors')
    with pytest.raises(FileNotFoundError): load_block3(tmp_path)
    (tmp_path/'weights.safetensors').write_bytes(weights_path.read_bytes())
    for a,b in zip(load_block3(tmp_path).state_dict().values(), Block3(pretrained=True).state_dict().values()): assert torch.equal(a, b)


def test_export(tmp_path):
    done = command('block3_export', '--formats', 'safetensors,onnx,js', '--out', 'here', cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.split() == [f'here/block3.{o}' for o in ('safetensors', 'onnx', 'js')], done.stderr
    for k,v in load_file(tmp_path/'here'/'block3.safetensors').items(): assert torch.equal(v, load_block3().state_dict()[k])
    run = onnxruntime.InferenceSession(tmp_path/'here'/'block3.onnx').run
    x = ((test.images[:300,None].float()/255 - 0.1307)/0.3081).numpy()
    probs = np.exp(run(['log_probabilities'], {'images': x})[0])
    np.testing.assert_allclose(probs, predict_digits(load_block3(), test.images[:300]), atol=1e-5)
    assert onnx.load(tmp_path/'here'/'block3.onnx').opset_import[0].version == 18
    with pytest.raises(SystemExit, match="^block3_export: formats='onxx': formats are safetensors, onnx, js$"): block3_export.__wrapped__(formats='onxx')


@pytest.mark.slow
def test_ten_thousand_files_in_half_a_minute(tmp_path):
    for i,o in enumerate(test.images.numpy()): Image.fromarray(o).save(tmp_path/f'{i:05}.png')
    began = time.perf_counter()
    done = command('block3_predict', tmp_path)
    assert time.perf_counter() - began < 30
    digits = [int(o.split('\t')[1]) for o in done.stdout.splitlines()]
    want = predict_digits(load_block3(), test.images).argmax(1)
    assert (np.array(digits) == want).sum() >= 9_999
