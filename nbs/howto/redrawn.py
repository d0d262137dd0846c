"Digits redrawn as people send them: each kind is a function of a mask (H, W) in 0–1, a random generator and a strength in 0–1"
import io
import numpy as np
from PIL import Image, ImageDraw

def on_page(digit, rng, side=None):
    "A mask of a page, random in size, with `digit` somewhere inside"
    side = side or int(rng.integers(110, 260))
    size = int(side*rng.uniform(0.4, 0.65))
    page = Image.new('L', (int(side*rng.uniform(1, 1.25)), side))
    margin = side//9
    at = [int(rng.integers(margin, n - size - margin + 1)) for n in page.size]
    page.paste(Image.fromarray(digit).resize((size,size), Image.BICUBIC), at)
    return np.asarray(page)/255

def drawn(mask, ink=20, paper=250):
    return paper + (ink - paper)*mask

def lines(values, colour, boxes, angle=0):
    "`values` with filled boxes (left, top, right, bottom), turned by `angle`"
    im = Image.new('L', (2*values.shape[1],2*values.shape[0]))
    draw = ImageDraw.Draw(im)
    h,w = values.shape[:2]
    for left,top,right,bottom in boxes: draw.rectangle((2*left, 2*top, 2*right - 1, 2*bottom - 1), 255)
    cover = np.asarray(im.rotate(angle, Image.BICUBIC).resize((w,h), Image.BOX))/255
    cover = cover.reshape(cover.shape + (1,)*(values.ndim - 2))
    return values + cover*(np.asarray(colour) - values)

def frame_boxes(w, h, inset, width):
    l,t,r,b = inset, inset, w - inset, h - inset
    return [(l,t,r,t+width), (l,b-width,r,b), (l,t,l+width,b), (r-width,t,r,b)]

def along(values, axis, at=0.5):
    n = values.shape[axis]
    ramp = np.linspace(0, 1, n)
    return ramp[:,None] if axis == 0 else ramp[None]

def grid(values):
    h,w = values.shape[:2]
    return np.linspace(-1, 1, h)[:,None], np.linspace(-1, 1, w)[None]

def ramp(values, rng):
    "From 0 to 1 in a random direction"
    y,x = grid(values)
    turn = rng.uniform(0, 2*np.pi)
    along = y*np.sin(turn) + x*np.cos(turn)
    return (along - along.min())/np.ptp(along)

def noise(values, rng, std=2): return values + rng.normal(0, std, values.shape)

def plain(mask, rng): return drawn(mask)
def inverted(mask, rng): return 255 - drawn(mask)
def low_contrast(mask, rng): return drawn(mask, 200, 230)
def frame(mask, rng):
    h,w = mask.shape
    return lines(drawn(mask, 0, 255), 0, frame_boxes(w, h, int(rng.integers(0, h//20)), int(rng.integers(2, 5))), rng.uniform(-1, 1))
def faint_frame(mask, rng):
    h,w = mask.shape
    return lines(drawn(mask), 215, frame_boxes(w, h, 5, 1))
def scan_edge(mask, rng):
    "On one to three sides"
    h,w = mask.shape
    n = int(rng.integers(2, 7))
    boxes = [(0,0,w,n), (0,h-n,w,h), (0,0,n,h), (w-n,0,w,h)]
    return lines(drawn(mask, 0, 255), rng.integers(0, 60), [boxes[i] for i in rng.permutation(4)[:rng.integers(1, 4)]])
def desk(mask, rng):
    "Sides of different width"
    h,w = mask.shape
    pad = [(int(h*rng.uniform(0.02, 0.25)), int(h*rng.uniform(0.02, 0.25))), (int(w*rng.uniform(0.02, 0.25)), int(w*rng.uniform(0.02, 0.25)))]
    page = np.pad(drawn(mask, 20, 245), pad, constant_values=1000)
    colour = rng.uniform(40, 150)
    page[page == 1000] = colour
    return noise(page, rng)
def desk_turned(mask, rng):
    page = Image.fromarray(drawn(mask, 20, 245).astype(np.uint8))
    return np.asarray(page.rotate(rng.uniform(-8, 8), Image.BICUBIC, True, fillcolor=int(rng.uniform(40, 150))), float)
def punch_hole(mask, rng):
    h,w = mask.shape
    r = h*rng.uniform(0.03, 0.05)
    at = np.array([rng.uniform(0.15, 0.85)*h, r*1.4])
    if rng.random() < 0.5: at[1] = w - at[1]
    y,x = np.mgrid[:h,:w]
    hole = np.hypot(y - at[0], x - at[1]) < r
    page = drawn(mask, 10, 250)
    page[hole] = rng.uniform(0, 140)
    return page
def speck(mask, rng):
    h,w = mask.shape
    page = drawn(mask, 0, 255)
    y,x = [int(rng.integers(1, h//14)) if rng.random() < 0.5 else n - 6 - int(rng.integers(1, h//14)) for n in (h, w)]
    page[y:y+5,x:x+5] = 0
    return page
def half_light(mask, rng): return drawn(mask, 20, 250)*(1 - 0.5*ramp(mask, rng))
def pencil(mask, rng): return drawn(mask, 90, 230)*(1 - 0.5*ramp(mask, rng))
def quarter_light(mask, rng): return noise(drawn(mask, 20, 250)*(1 - 0.75*ramp(mask, rng)), rng)
def shadow(mask, rng):
    step = 1/(1 + np.exp(-(ramp(mask, rng) - rng.uniform(0.3, 0.7))/rng.uniform(0.005, 0.05)))
    return noise(drawn(mask, 20, 240)*(0.45 + 0.55*step), rng)
def vignette(mask, rng):
    y,x = grid(mask)
    return noise(drawn(mask, 20, 240)*(1 - rng.uniform(0.5, 0.8)*((y**2 + x**2)/2)), rng)
def coloured(values): return np.repeat(np.asarray(values, float)[...,None], 3, -1)
def ruled(mask, rng):
    h,w = mask.shape
    gap = int(rng.integers(16, 30))
    page = lines(coloured(np.full((h,w), 245.)), (150,170,220), [(0,y,w,y+1) for y in range(gap//2, h, gap)])
    return page + (20 - page)*mask[...,None]
def margin(mask, rng):
    h,w = mask.shape
    page = ruled(0*mask, rng)
    x = int(w*rng.uniform(0.03, 0.12))
    page = lines(page, (220,90,90), [(x,0,x+int(rng.integers(1, 4)),h)], rng.uniform(-1, 1))
    return noise(page + (20 - page)*mask[...,None], rng)

kinds = dict(plain=plain, inverted=inverted, low_contrast=low_contrast, ruled=ruled, faint_frame=faint_frame, frame=frame, scan_edge=scan_edge, desk=desk,
             desk_turned=desk_turned, punch_hole=punch_hole, speck=speck, half_light=half_light, pencil=pencil, quarter_light=quarter_light,
             shadow=shadow, vignette=vignette, margin=margin)

def picture(values): return Image.fromarray(np.asarray(values).clip(0, 255).round().astype(np.uint8))

def redrawn(kind, digit, rng):
    return picture(kinds[kind](on_page(digit, rng), rng))

def tight(mask, rng):
    "Cut out along the box of the digit, or up to 3 pixels around it"
    rows = np.flatnonzero((mask > 0.2).any(1)); cols = np.flatnonzero((mask > 0.2).any(0))
    box = mask[rows[0]:rows[-1]+1, cols[0]:cols[-1]+1]
    return drawn(np.pad(box, int(rng.integers(0, 4))))
def tight_frame(mask, rng):
    "A form field around the digit, somewhere on a page"
    h,w = mask.shape
    rows = np.flatnonzero((mask > 0.2).any(1)); cols = np.flatnonzero((mask > 0.2).any(0))
    d = int(rng.integers(6, 20)); n = int(rng.integers(2, 5))
    t,b,l,r = max(rows[0]-d,0), min(rows[-1]+d, h), max(cols[0]-d,0), min(cols[-1]+d,w)
    return lines(drawn(mask), 0, [(l,t,r,t+n),(l,b-n,r,b),(l,t,l+n,b),(r-n,t,r,b)], rng.uniform(-1,1))
def jpeg(mask, rng):
    f = io.BytesIO(); picture(drawn(mask)).save(f, 'JPEG', quality=30)
    return np.asarray(Image.open(f), float)
def noisy(mask, rng): return noise(drawn(mask), rng, 25)
def hole_near(mask, rng):
    "Two filled holes, at one side"
    h,w = mask.shape
    page = drawn(mask, 10, 250); y,x = np.mgrid[:h,:w]; r = h*0.045
    for at in (0.3, 0.7): page[np.hypot(y - at*h, x - r*1.3) < r] = 60
    return page
def thick_ruled(mask, rng):
    h,w = mask.shape; gap = int(rng.integers(24, 40))
    page = lines(np.full((h,w), 245.), 140, [(0,y,w,y+2) for y in range(gap//2, h, gap)])
    return page + (20 - page)*mask
def chalk(mask, rng): return 255 - noise(drawn(mask, 20, 200)*(1 - 0.4*ramp(mask, rng)), rng, 5)
def colours(mask, rng):
    a = rng.integers(0, 100, 3); b = rng.integers(160, 256, 3)
    if rng.random() < .5: a,b = b,a
    return b + mask[...,None]*(a - b)
def twocolour(mask, rng):
    a,b = [np.array(c) for c in [((200,40,40),(60,90,60)),((230,220,20),(250,250,250)),((30,60,200),(120,60,30))][int(rng.integers(3))]]
    return b + mask[...,None]*(a - b)
def bold(mask, rng):
    from scipy import ndimage
    return drawn(ndimage.grey_dilation(mask, int(mask.shape[0]/28)*2+1))
def small(mask, rng):
    im = Image.new('L', (mask.shape[1]*4, mask.shape[0]*4)); m = Image.fromarray((mask*255).astype(np.uint8)).resize((mask.shape[1]//2, mask.shape[0]//2))
    im.paste(m, [int(rng.integers(0, n - k + 1)) for n,k in zip(im.size, m.size)])
    return noise(drawn(np.asarray(im)/255), rng, 3)
kinds |= dict(tight=tight, tight_frame=tight_frame, jpeg=jpeg, noisy=noisy, hole_near=hole_near, thick_ruled=thick_ruled, chalk=chalk, colours=colours, twocolour=twocolour, bold=bold, small=small)
