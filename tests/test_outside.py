"What comes from outside: a damaged file of any kind ends in a documented error, soon and in little memory, and none is run"
import gzip, io, os, pickle, struct, zlib
from contextlib import contextmanager
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from safetensors.torch import save
from mnist_block3.all import (Checkpoint, Study, block3_learner, load_block3, load_digits, mnist_dls, mnist_form, read_checkpoint, read_idx,
                              read_run, read_settings, train_run)
from mnist_block3.cli import block3_train
from mnist_block3.model import weights_path

few = 20 # damaged inputs of each kind in the default set; the slow set has 100,000 of all kinds together


def picture(kind, shape=(40,30), **kwargs):
    a,b = np.zeros(shape, np.uint8),io.BytesIO()
    a[5:30,12:16] = 250
    Image.fromarray(a).save(b, kind, **kwargs)
    return b.getvalue()


def idx(a, dims=None):
    dims = dims or a.shape
    return struct.pack(f'>{len(dims)+1}I', 0x800 + len(dims), *dims) + a.tobytes()


def as_npz(save, digits):
    b = io.BytesIO()
    save(b, x_train=digits, y_train=np.array([1,2]))
    return b.getvalue()


def plant(folder, names, data):
    for o in names:
        (folder/o).parent.mkdir(parents=True, exist_ok=True)
        (folder/o).write_bytes(data)


@pytest.fixture(scope='module')
def learn():
    learn = block3_learner(mnist_dls(valid='reference', n_train=64, device='cpu'))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn


@pytest.fixture(scope='module')
def whole(tmp_path_factory, learn):
    "For each kind a loader, the file that it reads and sound contents of it"
    made = {}
    def kind(name, load, file, *contents):
        folder = tmp_path_factory.mktemp('kind')
        (folder/file).parent.mkdir(exist_ok=True, parents=True)
        made[name] = load,folder,folder/file,[o if isinstance(o, bytes) else o.encode() for o in contents]
    digits = np.arange(2*784, dtype=np.uint16).reshape(2,28,28).astype(np.uint8)
    kind('images', lambda d: read_idx(d/'a', (28,28)), 'a', idx(digits), gzip.compress(idx(digits), mtime=0))
    kind('labels', lambda d: read_idx(d/'a'), 'a', idx(digits[0,0] % 10), gzip.compress(idx(digits[0,0] % 10), mtime=0))
    kind('picture', lambda d: mnist_form(d/'a'), 'a', *(picture(o) for o in ('PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WebP', 'PPM', 'ICO', 'TGA', 'PCX')),
         picture('TIFF', compression='tiff_lzw'))
    kind('folder of images', load_digits, 'training/3/a.png', *(picture(o, (28,28)) for o in ('PNG', 'GIF', 'BMP', 'TIFF')))
    plant(made['folder of images'][1], ['testing/3/a.png'], picture('PNG', (28,28)))
    rows = '\n'.join(','.join(map(str, [i, *image.flat])) for i,image in enumerate(digits))
    kind('table', load_digits, 'train.csv', rows, ','.join(map(str, range(785))).replace('0', 'label', 1) + '\n' + rows)
    kind('archive', load_digits, 'mnist.npz', *(as_npz(save, digits) for save in (np.savez, np.savez_compressed)))
    kind('weights', lambda d: load_block3(d/'a'), 'a', weights_path.read_bytes(), save({'a': torch.ones(3)}))
    run = tmp_path_factory.mktemp('run')/'run'
    train_run(run, epochs=2, n_train=64, valid='reference', device='cpu')
    kind('settings', read_settings, 'settings.json', (run/'settings.json').read_bytes())
    for file, other in (('summary.json', 'history.csv'), ('history.csv', 'summary.json')):
        kind(file, read_run, file, (run/file).read_bytes())
        plant(made[file][1], [other], (run/other).read_bytes())
    runs = Path(__file__).parent.parent/'nbs'/'results'
    for name in ('study', 'epochs', 'mistakes'):
        lines = (runs/f'{name}.csv').read_text().splitlines(True)[:4]
        kind(name, lambda d, name=name: Study(d).read(name), f'{name}.csv', ''.join(lines))
    kind('runs of a study', lambda d: Study(d).of('tuned'), 'study.csv', ''.join((runs/'study.csv').read_text().splitlines(True)[:4]))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Checkpoint(run/'c'))
    kind('checkpoint', lambda d: read_checkpoint(d/'a'), 'a', (run/'c').read_bytes())
    for name,(load,folder,file,contents) in made.items():
        for o in contents:
            file.write_bytes(o)
            try: load(folder)
            except ValueError: assert (name, o) == ('weights', contents[-1]), name
    return made


kinds = ['images', 'labels', 'picture', 'folder of images', 'table', 'archive', 'weights', 'settings', 'summary.json', 'history.csv',
         'study', 'epochs', 'mistakes', 'runs of a study', 'checkpoint']
where,some_bytes = st.floats(0, 1, exclude_max=True),st.binary(max_size=8)
nasty = st.sampled_from([b'\xff'*4, b'\xff'*8, b'\x7f' + b'\xff'*7, b'\0'*4, b'\x80', b'NaN', b'-1', b'1e999', b'9'*25, b'"', b'[', b'{', b',', b'\n', b'null'])
step = st.tuples(st.sampled_from(['cut', 'put', 'over', 'double', 'flip', 'drop']), where, where, st.one_of(some_bytes, nasty))


def damaged(data, steps, early):
    "`data` after some cuts, insertions and so on; `early` ones hit the header"
    for how,a,b,new in steps:
        i = int(a*(min(len(data), 200) if early else len(data)))
        j = min(len(data), i + 1 + int(b*32))
        if how == 'cut': data = data[:i]
        elif how == 'put': data = data[:i] + new + data[i:]
        elif how == 'over': data = data[:i] + new + data[i+len(new):]
        elif how == 'double': data = data[:j] + data[i:]
        elif how == 'flip' and i < len(data): data = data[:i] + bytes([data[i] ^ 1 << int(b*8)]) + data[i+1:]
        elif how == 'drop': data = data[:i] + data[j:]
    return data


@contextmanager
def little_memory(mb):
    "At most `mb` MiB more at any time than before"
    def kb(name): return int(next(o.split()[1] for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(name)))
    if not Path('/proc/self/clear_refs').exists(): yield; return
    Path('/proc/self/clear_refs').write_text('5') # the peak is counted from here
    before = kb('VmRSS')
    yield
    assert kb('VmHWM') - before < mb*1024, f'{(kb("VmHWM") - before)//1024} MiB'


def pixels(file):
    "MiB that a picture may take: 16 bytes for each of the pixels that it says it has"
    try:
        with Image.open(file) as im: n = im.width*im.height
    except Exception: return 0
    return 16*n/2**20 if n <= Image.MAX_IMAGE_PIXELS else 0


def fuzz(whole, kind, n):
    load,folder,file,contents = whole[kind]
    errors = (ValueError, FileNotFoundError) if kind == 'settings' else ValueError # a source that is not there
    seen = set()
    @settings(max_examples=n, deadline=5000, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(contents)-1), st.lists(step, min_size=1, max_size=4), st.booleans())
    def one(which, steps, early):
        file.write_bytes(damaged(contents[which], steps, early))
        with little_memory(20 + (pixels(file) if kind == 'picture' else 0)): # the files have a few kB
            try: load(folder)
            except errors as e:
                seen.add(str(e))
                assert str(folder) in str(e) or kind == 'settings' and isinstance(e, FileNotFoundError), e
    one()
    assert seen, 'no damage was seen'


@pytest.mark.parametrize('kind', kinds)
@pytest.mark.filterwarnings('ignore')
def test_damage(whole, kind): fuzz(whole, kind, few)


@pytest.mark.slow
@pytest.mark.parametrize('kind', kinds)
@pytest.mark.filterwarnings('ignore')
def test_much_damage(whole, kind): fuzz(whole, kind, -(-100_000//len(kinds)))



def test_promises_too_large(tmp_path):
    "A header that promises 4 billion images"
    for name,data in dict(a=idx(np.zeros(0, np.uint8), (2**32-1,28,28)), b=gzip.compress(idx(np.zeros(0, np.uint8), (2**32-1,28,28)))).items():
        (tmp_path/name).write_bytes(data)
        with little_memory(20), pytest.raises(ValueError, match='promises 4294967295×28×28 bytes after its header, more than'): read_idx(tmp_path/name, (28,28))
    (tmp_path/'w').write_bytes(struct.pack('<Q', 2**40) + b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}')
    with little_memory(20), pytest.raises(ValueError, match='does not hold the weights'): load_block3(tmp_path/'w')


@pytest.mark.parametrize('n', [10, 1_000_000])
def test_gzip_bomb(tmp_path, n):
    "157 MB of zeros in 0.2 MB, after a header that promises more than that or 10 images"
    pack,parts = zlib.compressobj(1, wbits=31),[]
    parts.append(pack.compress(idx(np.zeros(0, np.uint8), (n,28,28))))
    parts += [pack.compress(bytes(784*10_000)) for _ in range(20)]
    (tmp_path/'bomb').write_bytes(b''.join(parts) + pack.flush())
    with little_memory(50), pytest.raises(ValueError, match='but has more' if n == 10 else 'more than 100 times its size'): read_idx(tmp_path/'bomb', (28,28))


def huge_png(side):
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(bytes(side))) + chunk(b'IEND', b'')


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('side', [60_000, 10_000])
def test_huge_picture(tmp_path, side):
    for split in ('training', 'testing'):
        (tmp_path/split/'3').mkdir(parents=True)
        (tmp_path/split/'3'/'a.png').write_bytes(huge_png(side))
    with little_memory(20):
        with pytest.raises(ValueError, match='cannot be read: .*pixels'): mnist_form(tmp_path/'training'/'3'/'a.png')
        with pytest.raises(ValueError, match='cannot be read: .*pixels'): load_digits(tmp_path)


@pytest.mark.parametrize('mode', ['1', 'P', 'I;16', 'LA', 'CMYK', 'L', 'RGBA'])
def test_large_picture(tmp_path, mode):
    "It is scaled down before it is looked at, whatever its mode, and takes at most 16 bytes a pixel"
    im = Image.new('L', (3000,3000), 0)
    im.paste(255, (1200,600,1500,2400))
    im = im.convert('I').convert('I;16') if mode == 'I;16' else im.convert(mode)
    im.save(tmp_path/'a.tif', compression='tiff_lzw')
    small = Image.new('L', (1000,1000), 0)
    small.paste(255, (400,200,500,800))
    with little_memory(16*9_000_000/2**20 + 20): form = mnist_form(tmp_path/'a.tif')
    assert np.abs(form.astype(int) - mnist_form(small)).max() <= 40 # pixels on an edge


def tiled_tiff(side):
    "28×28 pixels, in one tile of `side`×`side` zeros"
    body,n = zlib.compress(bytes(side*side), 9),9
    tags = [(256, 28), (257, 28), (258, 8), (259, 8), (262, 1), (322, side), (323, side), (324, 8 + 2 + 12*n + 4), (325, len(body))]
    return b'II*\0' + struct.pack('<IH', 8, n) + b''.join(struct.pack('<HHII', k, 4, 1, v) for k,v in tags) + bytes(4) + body


def test_huge_tile(tmp_path):
    (tmp_path/'a.tif').write_bytes(tiled_tiff(8000))
    with little_memory(20), pytest.raises(ValueError, match='its tiles have 8000×8000 pixels, it has 28×28'): mnist_form(tmp_path/'a.tif')
    (tmp_path/'b.tif').write_bytes(tiled_tiff(256))
    with pytest.raises(ValueError, match='it is blank'): mnist_form(tmp_path/'b.tif')


def test_postscript_is_not_run(tmp_path):
    Image.new('RGB', (40,40)).save(tmp_path/'a.eps')
    with pytest.raises(ValueError, match='EPS is a program, and is not run'): mnist_form(tmp_path/'a.eps')


class Evil:
    "Makes a folder where it is unpickled"
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return os.mkdir, (self.mark,)


def as_torch(obj):
    b = io.BytesIO()
    torch.save(dict(epoch=obj), b)
    return b.getvalue()

def as_numpy(obj):
    b = io.BytesIO()
    np.save(b, np.array([obj], dtype=object), allow_pickle=True)
    return b.getvalue()

forms = {
    'pickle': (pickle.dumps, pickle.loads),
    'torch': (as_torch, lambda data: torch.load(io.BytesIO(data), weights_only=False)),
    'numpy': (as_numpy, lambda data: np.load(io.BytesIO(data), allow_pickle=True)),
}

def resume_fit(file):
    learn = block3_learner(mnist_dls(valid='reference', n_train=64, device='cpu'))
    with learn.no_bar(): learn.fit(2, cbs=Checkpoint(file, resume=True))


four = 'train-images-idx3-ubyte','train-labels-idx1-ubyte','t10k-images-idx3-ubyte','t10k-labels-idx1-ubyte.gz'
places = {
    'source of IDX files':  (four, lambda d: load_digits(d)),
    'source of images':     (('training/1/a.png', 'testing/1/a.png'), lambda d: mnist_dls(d)),
    'source of NumPy arrays': (('mnist.npz',), lambda d: load_digits(d)),
    'weights':              (('w',), lambda d: load_block3(d/'w')),
    'picture':              (('a.png',), lambda d: mnist_form(d/'a.png')),
    'settings of a run':    (('settings.json',), lambda d: block3_train(resume=str(d))),
    'study':                (('study.csv',), lambda d: Study(d).read()),
    'failures':             (('failures.csv',), lambda d: Study(d).read('failures')),
    'checkpoint':           (('c',), lambda d: resume_fit(d/'c')),
}

@pytest.mark.parametrize('form', forms)
@pytest.mark.parametrize('place', places)
def test_nothing_is_unpickled(tmp_path, place, form):
    names,load = places[place]
    dump,load_carelessly = forms[form]
    mark = tmp_path/'was run'
    data = dump(Evil(mark))
    load_carelessly(data)
    mark.rmdir() # what is planted works
    plant(tmp_path/'d', names, data)
    with pytest.raises(ValueError): load(tmp_path/'d')
    assert not mark.exists()
