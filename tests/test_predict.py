"Reading digits from files, and exporting the network"
import io, json, re, time
from pathlib import Path
import numpy as np, onnx, onnxruntime, pytest, torch
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save_file
from mnist_block3.all import (Block3, block3_learner, find_images, load_block3, mnist_dls, mnist_form, PictureSpec,
                              predict_digits, predict_files, weights_path)


@pytest.fixture
def folder(tmp_path, mnist):
    "Five digits in files, beside a broken picture and a text"
    for i,image in enumerate(mnist[1].images[:5].numpy()):
        ImageOps.invert(Image.fromarray(image).resize((120,120), Image.BICUBIC)).save(tmp_path/f'{i}.png')
    (tmp_path/'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n broken')
    (tmp_path/'notes.txt').write_text('no picture')
    return tmp_path


def test_finding_images(folder):
    names = ['0.png', '1.png', '2.png', '3.png', '4.png', 'broken.png']
    assert [file.name for file in find_images([folder])] == names
    found = find_images([folder/'[12].png', folder/'9*.png', folder/'0.png'])
    assert found == [folder/'1.png', folder/'2.png', folder/'9*.png', folder/'0.png']
    (folder/'[x].png').touch()
    assert find_images([folder/'[x].png']) == [folder/'[x].png']


def test_predict_files_over_several_batches(folder, mnist):
    found = list(predict_files(find_images([folder])*3, bs=4))
    assert [file.name for file,_ in found] == ['0.png', '1.png', '2.png', '3.png', '4.png', 'broken.png']*3
    digits = [int(result.argmax()) for _,result in found if not isinstance(result, ValueError)]
    assert digits == mnist[1].labels[:5].tolist()*3


@pytest.fixture(scope='module')
def pretrained(): return block3_learner(mnist_dls(n_train=64, device='cpu'), pretrained=True)


@pytest.fixture
def coloured(tmp_path, mnist):
    "A file that shows a 4 in red on white"
    paper = Image.new('RGB', (130,110), 'white')
    paper.paste('darkred', (20,5), Image.fromarray(mnist[1].images[4].numpy()).resize((100,100), Image.BICUBIC))
    paper.save(tmp_path/'red.png')
    return tmp_path/'red.png'

def with_alpha(rgb): return np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])

kinds = {
    'path': Path,
    'name': str,
    'picture': Image.open,
    'RGB array': lambda file: np.asarray(Image.open(file)),
    'BGR array': lambda file: np.asarray(Image.open(file))[...,::-1],
    'RGBA array': lambda file: with_alpha(np.asarray(Image.open(file))),
    'grey array': lambda file: np.asarray(Image.open(file).convert('L')),
    'grey array with a channel': lambda file: np.asarray(Image.open(file).convert('L'))[...,None],
    'tensor': lambda file: torch.from_numpy(np.array(Image.open(file))),
    'bytes': Path.read_bytes,
    'BytesIO': lambda file: io.BytesIO(file.read_bytes()),
    'open file': lambda file: open(file, 'rb')}

@pytest.mark.parametrize('kind', kinds)
def test_a_picture_of_any_kind_is_read_as_its_file(coloured, pretrained, kind):
    picture = kinds[kind](coloured)
    assert np.abs(mnist_form(picture).astype(int) - mnist_form(coloured)).max() <= 2
    with pretrained.no_bar(): digit = pretrained.predict(picture)[0]
    (_,probs),(_,again) = predict_files([picture, picture])
    assert digit == '4' and probs.argmax() == again.argmax() == 4


def test_a_network_for_colours_gets_them_as_in_the_file(coloured):
    spec = PictureSpec(size=32, resize='squish', mean=(0.5,)*3, std=(0.2,)*3)
    for kind in set(kinds) - {'BGR array', 'grey array', 'grey array with a channel'}:
        assert np.array_equal(spec.read(kinds[kind](coloured)), spec.read(coloured)), kind


no_pictures = {
    'float64 (28, 28)': np.random.rand(28, 28), 'uint8 (90, 90, 2)': np.ones((90,90,2), np.uint8),
    'uint8 (9,)': np.ones(9, np.uint8), 'uint8 (0, 5)': np.ones((0,5), np.uint8), 'list': [[0, 255]]*28, 'NoneType': None}

@pytest.mark.parametrize('name', no_pictures)
def test_what_is_no_picture_is_named_not_printed(name, pretrained):
    with pytest.raises(ValueError, match=r'^The image cannot be read: [^\[\]\n]{40,180}$') as e: mnist_form(no_pictures[name])
    assert str(e.value).endswith(f'not {name}')
    assert [str(error) for _,error in predict_files([no_pictures[name]])] == [str(e.value)]
    with pretrained.no_bar(), pytest.raises(ValueError, match=re.escape(str(e.value))): pretrained.predict(no_pictures[name])


@pytest.mark.parametrize('junk', [b'no picture', io.BytesIO(b'no picture')])
def test_bytes_of_no_picture(junk):
    with pytest.raises(ValueError, match='^The image cannot be read: cannot identify its format$'): mnist_form(junk)


@pytest.mark.parametrize('change,got', [
    (lambda images: images/255, 'float32 (3, 28, 28)'),
    (lambda images: images[:,:27], 'uint8 (3, 27, 28)'),
    (lambda images: images[:,:,None], 'uint8 (3, 28, 1, 28)'),
    (lambda images: images[0], 'uint8 (28, 28); one image is a batch as image[None]')])
@pytest.mark.parametrize('array', [torch.as_tensor, np.asarray])
def test_predict_digits_takes_mnists_form_only(mnist, change, got, array):
    with pytest.raises(ValueError) as e: predict_digits(load_block3(), array(change(mnist[1].images[:3])))
    assert str(e.value) == f'Expected uint8 images (N, 28, 28) as the network was trained on, but got torch.{got}'


@pytest.mark.parametrize('kind', [str, Path, lambda file: [file], lambda file: file.parent.glob('red.png')])
def test_one_file_or_any_iterable_of_files(coloured, kind):
    (file,probs), = predict_files(kind(coloured))
    assert Path(file) == coloured and probs.argmax() == 4


@pytest.mark.parametrize('kind', kinds)
def test_one_picture_of_any_kind(coloured, kind):
    (_,probs), = predict_files(kinds[kind](coloured))
    assert probs.argmax() == 4


def test_a_folder_is_not_one_file(folder):
    (_,error), = predict_files(folder)
    assert str(error) == f'{folder} cannot be read: pass find_images(folder)'


def test_console(folder, command):
    done = command('block3_predict', '.', 'notes.txt', '4.png', 'https://a.org/7.png')
    rows = [line.split('\t') for line in done.stdout.splitlines()]
    names = ['0.png', '1.png', '2.png', '3.png', '4.png', '4.png']
    assert [row[:2] for row in rows] == [list(pair) for pair in zip(names, '721044')]
    assert all(0 < float(row[2]) <= 1 for row in rows)
    errors = done.stderr.splitlines()
    assert done.returncode == 1 and len(errors) == 3 and 'https://a.org/7.png cannot be read' in errors[2]
    assert all(error.startswith('block3_predict: ') for error in errors)


def test_names_with_control_characters(folder, command):
    "Each picture has one line with three columns, and each error one line"
    names = ['a\tb.png', 'c\nd.png', 'e\r\x1b[31m.png']
    for i,name in enumerate(names): (folder/f'{i}.png').rename(folder/name)
    (folder/'broken.png').rename(folder/'brok\nen.png')
    done = command('block3_predict', *names, 'brok\nen.png', 'go\tne.png')
    assert done.stdout.splitlines() == done.stdout.split('\n')[:-1]
    rows = [line.split('\t') for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [[r'a\tb.png', '7'], [r'c\nd.png', '2'], [r'e\r\x1b[31m.png', '1']]
    assert [len(row) for row in rows] == [3, 3, 3]
    errors = done.stderr.splitlines()
    assert [error.split()[1] for error in errors] == [r'brok\nen.png', r'go\tne.png'] and done.returncode == 1
    done = command('block3_predict', '--json', *names)
    assert [json.loads(line)['path'] for line in done.stdout.splitlines()] == names


def test_names_that_begin_with_a_dash(folder, command):
    "One dash begins a name, and after two dashes all are names"
    names = ['-7.png', '-x2.png', '-h', '--json', '-4.png']
    for i,name in enumerate(names): (folder/f'{i}.png').rename(folder/name)
    done = command('block3_predict', '--min_probability', '0.1', '-7.png', '-x[2].png', '--', *names[2:])
    assert [line.split('\t')[:2] for line in done.stdout.splitlines()] == [list(pair) for pair in zip(names, '72104')]
    assert done.returncode == 0 and not done.stderr


def test_console_marks_what_it_does_not_know(tmp_path, mnist, command):
    digit = mnist[1].images[0].numpy()
    letter = Image.new('L', (100,120), 255)
    for line,width in [((20,105,50,15), 12), ((50,15,80,105), 12), ((30,70,70,70), 10)]:
        ImageDraw.Draw(letter).line(line, 0, width)
    two = Image.fromarray(np.concatenate([np.pad(digit, 20)]*2, axis=1))
    pictures = dict(a_blank=Image.new('L', (90,90), 250), b_digit=Image.fromarray(digit), c_two=two, d_letter=letter)
    names = [f'{name}.png' for name in pictures]
    for name,picture in zip(names, pictures.values()): picture.save(tmp_path/name)
    done = command('block3_predict', *names, '--min-probability', '1.1')
    rows = [line.split('\t') for line in done.stdout.splitlines()]
    assert [row[-1] for row in rows] == ['none', 'unsure', 'several', 'unsure'] and rows[1][1] == '7'
    assert done.returncode == 3 and not done.stderr
    done = command('block3_predict', '--json', 'gone.png', *names)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row['path'] for row in rows] == names
    assert [(row['digit'], row['mark']) for row in rows] == [(None, 'none'), (7, None), (None, 'several'), (4, 'unsure')]
    assert 'it is blank' in rows[0]['reason'] and '2 parts' in rows[2]['reason'] and len(rows[1]['probabilities']) == 10
    assert done.returncode == 1


def test_weights(tmp_path):
    save_file({'a': torch.zeros(3)}, tmp_path/'other.safetensors')
    with pytest.raises(ValueError, match='does not hold the weights.*Unexpected'): load_block3(tmp_path/'other.safetensors')
    (tmp_path/'weights.safetensors').write_bytes(weights_path.read_bytes())
    want = Block3(pretrained=True).state_dict()
    torch.testing.assert_close(load_block3(tmp_path).state_dict(), want, rtol=0, atol=0)


def test_export(tmp_path, mnist, command):
    done = command('block3_export', '--formats', 'safetensors,onnx,js', '--out', 'here')
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f'here/block3.{name}' for name in ('safetensors', 'onnx', 'js')]
    weights = load_file(tmp_path/'here'/'block3.safetensors')
    torch.testing.assert_close(weights, load_block3().state_dict(), rtol=0, atol=0)
    session = onnxruntime.InferenceSession(tmp_path/'here'/'block3.onnx')
    images = mnist[1].images[:300]
    logp = session.run(['log_probabilities'], {'images': ((images[:,None]/255 - 0.1307)/0.3081).numpy()})[0]
    np.testing.assert_allclose(np.exp(logp), predict_digits(load_block3(), images), atol=1e-5)
    assert onnx.load(tmp_path/'here'/'block3.onnx').opset_import[0].version == 18


@pytest.mark.slow
def test_ten_thousand_files_in_half_a_minute(tmp_path, mnist, command):
    images = mnist[1].images
    for i,image in enumerate(images.numpy()): Image.fromarray(image).save(tmp_path/f'{i:05}.png')
    began = time.perf_counter()
    done = command('block3_predict', tmp_path)
    assert time.perf_counter() - began < 30
    digits = np.array([int(line.split('\t')[1]) for line in done.stdout.splitlines()])
    assert (digits == predict_digits(load_block3(), images).argmax(1)).sum() >= 9_999
