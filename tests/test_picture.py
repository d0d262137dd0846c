"Pictures of any kind in MNIST's form"
import sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image, ImageDraw
from mnist_block3.all import NoDigit, SeveralDigits, load_block3, load_digits, mnist_form, predict_digits

sys.path.append(str(Path(__file__).parents[1]/'nbs'/'howto'))
from redrawn import kinds, on_page, picture as as_picture, redrawn

test = load_digits()[1]


def picture(i, size=120): return Image.fromarray(test.images[i].numpy()).resize((size,size), Image.BICUBIC)

def difference(a, b): return np.abs(a.astype(int) - b)

def random_colour(rng, low, high): return tuple(int(v) for v in rng.integers(low, high, 3))


def test_what_is_in_the_form_stays_as_it_is():
    for image in test.images.numpy(): assert np.array_equal(mnist_form(Image.fromarray(image)), image)
    assert np.array_equal(mnist_form(Image.fromarray(255 - image)), image)


def test_the_form_is_that_of_mnist():
    "Box and centre of mass, computed here in another way, of pictures with the digit anywhere"
    for i in range(50):
        page = Image.new('L', (200,150))
        page.paste(picture(i, 60), (i, i))
        image = mnist_form(page).astype(float)
        rows,cols = [np.flatnonzero(image.any(axis)) for axis in (1, 0)]
        assert max(np.ptp(rows), np.ptp(cols)) + 1 in (19, 20) and image.max() == 255
        for axis in (0, 1):
            centre = np.average(np.arange(28), weights=image.sum(axis))
            assert centre == pytest.approx(14, abs=0.51)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'I', 'F', 'I;16'])
def test_every_mode(mode):
    grey = picture(0)
    if mode == 'I;16': im = Image.fromarray(np.asarray(grey).astype(np.uint16)*257)
    elif mode == 'F': im = Image.fromarray(np.asarray(grey).astype(np.float32)/255)
    else: im = grey.convert(mode)
    assert im.mode == mode
    off = difference(mnist_form(im), mnist_form(grey))
    assert off.max() <= {'1': 130, 'P': 12}.get(mode, 2) and off.mean() < 6


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'bmp', 'gif', 'tif', 'webp', 'pgm'])
def test_every_format(suffix, tmp_path):
    picture(0).save(tmp_path/f'a.{suffix}')
    assert difference(mnist_form(tmp_path/f'a.{suffix}'), mnist_form(picture(0))).mean() < 2


def test_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6 # to be turned by 90° clockwise
    turned = picture(0).transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path/'turned.jpg', exif=exif, quality=100, subsampling=0)
    assert difference(mnist_form(tmp_path/'turned.jpg'), mnist_form(picture(0))).max() < 16


@pytest.mark.parametrize('colour', ['white', 'black', 'red'])
def test_transparency(colour):
    im = Image.new('RGBA', (120,120), colour)
    im.putalpha(picture(0))
    assert difference(mnist_form(im), mnist_form(picture(0))).max() <= 3


def test_forty_pictures_of_all_kinds():
    rng = np.random.default_rng(1)
    forms = []
    for i in range(100, 140):
        size = int(rng.integers(20, 300))
        h,w = map(int, rng.integers(300, 500, 2))
        ink = random_colour(rng, 0, 100)
        paper = random_colour(rng, 160, 256)
        if i % 2: ink,paper = paper,ink
        page = Image.new('RGB', (w,h), paper)
        page.paste(ink, tuple(int(v) for v in rng.integers(0, 300 - size + 1, 2)), picture(i, size))
        if i % 4 == 3: page = with_noise(page, rng, 6)
        forms.append(mnist_form(page))
    digits = predict_digits(load_block3(), np.stack(forms)).argmax(1)
    assert (digits == test.labels[100:140].numpy()).sum() >= 38


def with_noise(im, rng, strength=None):
    strength = strength or rng.uniform(10, 25)
    noisy = np.asarray(im) + rng.normal(0, strength, (im.height,im.width,3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

def with_specks(im, rng):
    pixels = np.array(im)
    p = rng.random(pixels.shape[:2])
    pixels[p < 0.005] = 0
    pixels[p > 0.995] = 255
    return Image.fromarray(pixels)

def dithered(im, rng): return im.convert('P')

@pytest.mark.parametrize('spoil', [dithered, with_noise, with_specks])
def test_specks_are_no_ink(spoil):
    "A hundred pictures each, of which the box of all that has ink read 27, 17 and 60"
    rng = np.random.default_rng(2)
    forms = []
    for i in range(200, 300):
        size = int(rng.integers(28, 225))
        colours = [random_colour(rng, 0, 100), random_colour(rng, 160, 256)]
        paper,ink = colours[::rng.choice([-1, 1])]
        page = Image.new('RGB', tuple(int(v) for v in size*rng.uniform(1, 1.8, 2)), paper)
        page.paste(ink, tuple(int(rng.integers(side - size + 1)) for side in page.size), picture(i, size))
        forms.append(mnist_form(spoil(page, rng)))
    digits = predict_digits(load_block3(), np.stack(forms)).argmax(1)
    assert (digits == test.labels[200:300].numpy()).sum() >= 95


@pytest.mark.parametrize('width', [1, 2])
def test_thin_strokes_stay(width):
    for size in (40, 60, 100):
        page = Image.new('L', (size,size), 255)
        seven = [(size*0.3,size*0.15), (size*0.7,size*0.15), (size*0.45,size*0.85)]
        ImageDraw.Draw(page).line(seven, 0, width)
        form = mnist_form(page)
        rows = np.flatnonzero(form.max(1) > 60)
        assert np.ptp(rows) + 1 >= 19 and predict_digits(load_block3(), form[None]).argmax() == 7


def test_blank_pictures():
    stripe = np.repeat(np.uint8([[0],[255]]), 20, 0).repeat(40, 1)
    infinite = np.array([[0, np.inf], [1, 2]], np.float32)
    with pytest.raises(ValueError, match='it is blank'): mnist_form(Image.new('RGB', (50,40), 'red'))
    with pytest.raises(ValueError, match='nothing but lines'): mnist_form(Image.fromarray(stripe))
    with pytest.raises(ValueError, match='not finite'): mnist_form(Image.fromarray(infinite))


# The share of the digits of each kind that the network must read, in percent
must = dict(as_they_are=99.5, inverted=99.5, ten_times=99.5, jpeg=99.5, low_contrast=99.5, ruled=99.5, faint_frame=99.5,
            frame=97, field=97, scan_edge=97, desk=95, desk_turned=95, punch_hole=97, speck=97, light_by_half=95, pencil=95,
            light_by_three_quarters=95, shadow=95, vignette=95, margin=95)

def form_or_zeros(im):
    try: return mnist_form(im)
    except (NoDigit, SeveralDigits): return np.zeros((28,28), np.uint8)

def percent_read(kind, n):
    "Of the first `n` test digits, redrawn"
    rng = np.random.default_rng(0)
    forms = [form_or_zeros(redrawn(kind, digit, rng)) for digit in test.images[:n].numpy()]
    return 100*(predict_digits(load_block3(), np.stack(forms)).argmax(1) == test.labels[:n].numpy()).mean()

@pytest.mark.parametrize('kind', kinds)
def test_redrawn(kind): assert percent_read(kind, 12) == 100

@pytest.mark.slow
@pytest.mark.parametrize('kind', kinds)
def test_400_redrawn(kind): assert percent_read(kind, 400) >= must[kind]


def n_read_of_20(draw, paper=240, size=60):
    "Digits of `size` pixels, each in the middle of a page with what `draw` draws"
    forms = []
    for i in range(20):
        page = Image.new('L', (200,160), paper)
        draw(ImageDraw.Draw(page))
        page.paste(20, (100 - size//2,80 - size//2), picture(i, size))
        forms.append(form_or_zeros(page))
    return (predict_digits(load_block3(), np.stack(forms)).argmax(1) == test.labels[:20].numpy()).sum()

surrounded = dict(thick=lambda d: d.rectangle((50,30,150,130), outline=0, width=14),
                  rounded=lambda d: d.rounded_rectangle((50,30,150,130), 25, outline=0, width=4),
                  touching=lambda d: d.rounded_rectangle((72,48,128,112), 14, outline=0, width=4),
                  circle=lambda d: d.ellipse((45,25,155,135), outline=0, width=4))

@pytest.mark.parametrize('shape', surrounded)
def test_what_surrounds_a_digit_is_no_digit(shape): assert n_read_of_20(surrounded[shape]) == 20

@pytest.mark.parametrize('left', [40, 55])
def test_small_paper_on_a_dark_desk(left):
    assert n_read_of_20(lambda d: d.rectangle((left,20,left+105,140), fill=240), paper=50) == 20

def test_turned_paper_on_a_dark_desk():
    corners = (60,50), (140,35), (150,105), (70,120)
    assert n_read_of_20(lambda d: d.polygon(corners, fill=240), paper=50) == 20

@pytest.mark.parametrize('box,desk', [((60,30,140,130), 50), ((10,5,190,150), 140)])
def test_small_digits_on_paper_on_a_desk(box, desk):
    assert n_read_of_20(lambda d: d.rectangle(box, fill=240), paper=desk, size=28) == 20

def test_a_tall_narrow_picture():
    page = Image.new('L', (40,160), 240)
    ImageDraw.Draw(page).line((16,140,24,20), 20, 18)
    assert predict_digits(load_block3(), mnist_form(page)[None]).argmax() == 1

def test_a_square_0_is_no_frame():
    "As the digits of a clock"
    page = Image.new('L', (200,200), 240)
    ImageDraw.Draw(page).rectangle((60,30,140,170), outline=0, width=20)
    assert predict_digits(load_block3(), mnist_form(page)[None]).argmax() == 0


@pytest.mark.parametrize('kind', sorted(set(kinds) - {'field', 'margin', 'shadow'}))
def test_redrawn_without_a_digit(kind):
    rng = np.random.default_rng(0)
    mask = on_page(test.images[0].numpy(), rng)
    with pytest.raises(NoDigit, match='it is blank'): mnist_form(as_picture(kinds[kind](0*mask, rng)))


@pytest.mark.parametrize('std', [1, 5, 25])
def test_noise_is_no_digit(std):
    rng = np.random.default_rng(0)
    for paper in (20, 128, 240):
        with pytest.raises(NoDigit): mnist_form(as_picture(rng.normal(paper, std, (100,120))))


def test_several_digits():
    "Side by side with gaps of 2 to 40 pixels"
    for i in range(0, 20, 2):
        halves = [digit[:,digit.any(0)] for digit in test.images[i:i+2].numpy()]
        row = np.concatenate([halves[0], np.zeros((28,1+i), np.uint8), halves[1]], axis=1)
        page = Image.fromarray(np.pad(row, 10)).resize((4*row.shape[1] + 80,4*48), Image.BICUBIC)
        with pytest.raises(SeveralDigits, match='parts that are as large'): mnist_form(page)
