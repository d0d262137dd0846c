"MNIST's digits redrawn as people send them; `kinds` has a function of a mask (H, W) in 0–1 and a random generator for each kind"
import io
import numpy as np
from PIL import Image, ImageDraw

def on_page(digit, rng):
    "A mask of a page of random size with `digit` somewhere on it"
    height = int(rng.integers(110, 260))
    size = int(height*rng.uniform(0.4, 0.65))
    page = Image.new('L', (int(height*rng.uniform(1, 1.25)), height))
    at = [int(rng.integers(height//9, n - size - height//9 + 1)) for n in page.size]
    page.paste(Image.fromarray(digit).resize((size,size), Image.BICUBIC), at)
    return np.asarray(page)/255

def picture(values): return Image.fromarray(np.asarray(values).clip(0, 255).round().astype(np.uint8))

def redrawn(kind, digit, rng): return picture(kinds[kind](on_page(digit, rng), rng))

def drawn(mask, ink=20, paper=250): return paper + (ink - paper)*mask

def noisy(values, rng, std=2): return values + rng.normal(0, std, values.shape)

def with_boxes(values, colour, boxes, angle=0):
    "`values` with filled boxes (left, top, right, bottom), all turned by `angle` degrees"
    h,w = values.shape[:2]
    cover = Image.new('L', (2*w,2*h))
    for box in boxes: ImageDraw.Draw(cover).rectangle([2*box[0], 2*box[1], 2*box[2] - 1, 2*box[3] - 1], 255)
    cover = np.asarray(cover.rotate(angle, Image.BICUBIC).resize((w,h), Image.BOX))/255
    return values + cover.reshape(cover.shape + (1,)*(values.ndim - 2))*(np.asarray(colour) - values)

def sides(left, top, right, bottom, n):
    "The boxes of a frame with lines of `n` pixels"
    return [(left,top,right,top+n), (left,bottom-n,right,bottom), (left,top,left+n,bottom), (right-n,top,right,bottom)]

def light(mask, rng, darkest):
    "Light that falls from 1 to `darkest` in a random direction"
    h,w = mask.shape
    turn = rng.uniform(0, 2*np.pi)
    along = np.linspace(-1, 1, h)[:,None]*np.sin(turn) + np.linspace(-1, 1, w)*np.cos(turn)
    return 1 - (1 - darkest)*(along - along.min())/np.ptp(along)

def jpeg(mask, rng):
    file = io.BytesIO()
    picture(drawn(mask)).save(file, 'JPEG', quality=30)
    return np.asarray(Image.open(file))

def ten_times(mask, rng): return np.asarray(picture(drawn(mask)).resize((10*28,10*28), Image.BICUBIC))

def frame(mask, rng):
    h,w = mask.shape
    inset,n = rng.integers(0, h//20), rng.integers(2, 5)
    return with_boxes(drawn(mask, 0, 255), 0, sides(inset, inset, w - inset, h - inset, n), rng.uniform(-1, 1))

def field(mask, rng):
    "A frame close to the digit"
    (top,bottom),(left,right) = [np.flatnonzero((mask > 0.2).any(axis))[[0,-1]] for axis in (1, 0)]
    n = rng.integers(8, 12)
    return with_boxes(drawn(mask), 0, sides(left - n, top - n, right + n, bottom + n, 2), rng.uniform(-1, 1))

def scan_edge(mask, rng):
    "On one to three sides"
    h,w = mask.shape
    edges = rng.permutation(sides(0, 0, w, h, rng.integers(2, 7)))[:rng.integers(1, 4)]
    return with_boxes(drawn(mask, 0, 255), rng.integers(0, 60), edges)

def desk(mask, rng):
    pad = (rng.uniform(0.02, 0.25, (2,2))*mask.shape[0]).astype(int)
    paper = np.pad(drawn(mask, 20, 245), pad, constant_values=rng.uniform(40, 150))
    return noisy(paper, rng)

def desk_turned(mask, rng):
    paper = picture(drawn(mask, 20, 245))
    return np.asarray(paper.rotate(rng.uniform(-8, 8), Image.BICUBIC, True, fillcolor=int(rng.uniform(40, 150))))

def punch_hole(mask, rng):
    h,w = mask.shape
    radius = h*rng.uniform(0.03, 0.05)
    x,y = rng.choice([1.4*radius, w - 1.4*radius]), rng.uniform(0.15, 0.85)*h
    is_hole = np.hypot(np.arange(h)[:,None] - y, np.arange(w) - x) < radius
    return np.where(is_hole, rng.uniform(0, 140), drawn(mask, 10))

def speck(mask, rng):
    y,x = [rng.choice([i, n - 5 - i]) for n,i in zip(mask.shape, rng.integers(1, 8, 2))]
    return with_boxes(drawn(mask, 0, 255), 0, [(x, y, x + 5, y + 5)])

def shadow(mask, rng):
    step = 1/(1 + np.exp((light(mask, rng, 0) - rng.uniform(0.3, 0.7))/rng.uniform(0.005, 0.05)))
    return noisy(drawn(mask, 20, 240)*(1 - 0.55*step), rng)

def vignette(mask, rng):
    y,x = [np.linspace(-1, 1, n) for n in mask.shape]
    return noisy(drawn(mask, 20, 240)*(1 - rng.uniform(0.25, 0.4)*(y[:,None]**2 + x**2)), rng)

def ruled(mask, rng):
    h,w = mask.shape
    gap = rng.integers(16, 30)
    page = with_boxes(np.full((h,w,3), 245.), (150,170,220), [(0,y,w,y+1) for y in range(gap//2, h, gap)])
    return page + (20 - page)*mask[...,None]

def margin(mask, rng):
    h,w = mask.shape
    x = w*rng.uniform(0.03, 0.12)
    page = with_boxes(ruled(0*mask, rng), (220,90,90), [(x,0,x + rng.integers(1, 4),h)], rng.uniform(-1, 1))
    return noisy(page + (20 - page)*mask[...,None], rng)

kinds = dict(
    as_they_are=lambda mask, rng: drawn(mask), inverted=lambda mask, rng: 255 - drawn(mask), ten_times=ten_times, jpeg=jpeg,
    low_contrast=lambda mask, rng: drawn(mask, 200, 230), ruled=ruled,
    faint_frame=lambda mask, rng: with_boxes(drawn(mask), 215, sides(5, 5, mask.shape[1] - 5, mask.shape[0] - 5, 1)),
    frame=frame, field=field, scan_edge=scan_edge, desk=desk, desk_turned=desk_turned, punch_hole=punch_hole, speck=speck,
    light_by_half=lambda mask, rng: drawn(mask)*light(mask, rng, 0.5),
    pencil=lambda mask, rng: drawn(mask, 90, 230)*light(mask, rng, 0.5),
    light_by_three_quarters=lambda mask, rng: noisy(drawn(mask)*light(mask, rng, 0.25), rng),
    shadow=shadow, vignette=vignette, margin=margin)
