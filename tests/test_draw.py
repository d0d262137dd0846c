"The page where one draws a digit, in a real browser: what it computes, and what a user does there"
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from mnist_block3.all import browser_layers, load_block3, load_digits, mnist_form, predict_digits


@pytest.fixture
def page(browser, site):
    browser.get(f'{site}/draw.html')
    return browser


def shown(page): return page.execute_script('const o = document.querySelector(".draw"); return [o.form, o.probs, o.querySelector(".draw-said").textContent]')

def settled(page):
    page.execute_async_script('const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))')
    return shown(page)

def trace(page, strokes, kind='mouse'):
    "Draw lines through points in 0–1 with a real pointer"
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.pointer_input import PointerInput
    canvas = page.find_element('class name', 'draw-canvas')
    page.execute_script('arguments[0].scrollIntoView({block: "center"})', canvas)
    actions = ActionChains(page, duration=5, devices=[PointerInput(kind, kind)])
    pointer,size = actions.w3c_actions.pointer_action,canvas.size
    for stroke in strokes:
        for i,(x,y) in enumerate(stroke):
            pointer.move_to(canvas, int((x-0.5)*size['width']), int((y-0.5)*size['height']))
            if not i: pointer.pointer_down()
        pointer.pointer_up()
    actions.perform()

circle = [(0.5 + 0.22*np.sin(t), 0.5 - 0.33*np.cos(t)) for t in np.linspace(0, 2*np.pi, 25)]
drawn = {0: [circle], 1: [[(0.52,0.15), (0.48,0.85)]], 2: [[(0.3,0.3), (0.38,0.18), (0.55,0.15), (0.68,0.28), (0.62,0.45), (0.3,0.82), (0.72,0.82)]],
         3: [[(0.3,0.2), (0.5,0.15), (0.65,0.27), (0.58,0.43), (0.45,0.48), (0.62,0.55), (0.68,0.7), (0.55,0.84), (0.3,0.8)]],
         4: [[(0.35,0.15), (0.3,0.5), (0.7,0.5)], [(0.64,0.2), (0.6,0.85)]], 7: [[(0.28,0.18), (0.7,0.18), (0.45,0.85)]],
         5: [[(0.65,0.17), (0.38,0.17), (0.35,0.45), (0.55,0.43), (0.67,0.6), (0.58,0.8), (0.32,0.82)]]}


def test_it_opens_with_a_digit_within_a_second(page, site):
    page.execute_cdp_cmd('Network.enable', {})
    page.execute_cdp_cmd('Network.clearBrowserCache', {})
    page.get('about:blank')
    page.get(f'{site}/draw.html')
    form,probs,said = settled(page)
    assert said.startswith('This is a 3') and np.argmax(probs) == 3
    took,sizes = page.execute_script('''const all = [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
        return [performance.getEntriesByName("first-digit")[0].startTime, all.map(o => [o.name, o.transferSize])]''')
    assert took < 1000
    assert 50_000 < sum(n for _,n in sizes) < 2_000_000
    assert all(name.startswith((site, 'data:')) for name,_ in sizes)
    assert not [o for o in page.get_log('browser') if o['level'] == 'SEVERE'], 'no errors, nor anything that the policy refuses'


def test_nothing_is_fetched_from_elsewhere(page):
    blocked = page.execute_async_script('''const done = arguments[0]
        document.addEventListener("securitypolicyviolation", e => done(e.violatedDirective))
        fetch("http://127.0.0.2:1/").catch(() => 0)''')
    assert blocked == 'connect-src'
    page.get_log('browser')


def test_the_page_agrees_with_pytorch(page):
    test = load_digits()[1]
    model,n = load_block3(),20
    got = page.execute_script('return arguments[0].map(o => predict(o))', test.images[:n].flatten(1).tolist())
    np.testing.assert_allclose(got, predict_digits(model, test.images[:n]), atol=1e-4)
    x = torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(0))
    want = [m for name,m in model.named_children()] # a child is a unit, a pool or the head
    outs,y = [],x[None]
    with torch.no_grad():
        for m in want:
            y = m(y)
            if isinstance(m, (nn.MaxPool2d, nn.AvgPool2d)): outs[-1] = y
            else: outs.append(y)
    assert len(outs) == len(browser_layers(model)) == 9
    got = page.execute_script('''const image = {channels: 1, height: 28, width: 28, data: Float32Array.from(arguments[0])}, outs = []
        block3.layers.reduce((o, layer) => { const y = run(o, layer); outs.push(Array.from(y.data)); return y }, image); return outs''', x.flatten().tolist())
    for a,b in zip(got, outs): np.testing.assert_allclose(np.reshape(a, b.shape), b, atol=1e-4, rtol=1e-4)


def test_the_page_has_the_same_form(page):
    images,rng,seen = load_digits()[1].images[:30].numpy(),np.random.default_rng(0),0
    for i,o in enumerate(images):
        size,(h,w) = int(rng.integers(12, 150)),rng.integers(150, 200, 2)
        pic = np.full((h,w), rng.integers(0, 60), np.uint8)
        y,x = rng.integers(0, h-size),rng.integers(0, w-size)
        pic[y:y+size,x:x+size] = np.maximum(pic[y:y+size,x:x+size], np.asarray(Image.fromarray(o).resize((size,size))))
        pic = 255 - pic if i % 2 else pic
        if i % 3 == 2: pic = (pic + rng.normal(0, 15, pic.shape)).clip(0, 255).astype(np.uint8)
        if i % 10 == 9: pic = o
        got = np.reshape(page.execute_script('return mnistForm(arguments[0], arguments[1], arguments[2])', pic.flatten().tolist(), *pic.shape), (28,28))
        want = mnist_form(Image.fromarray(pic)).astype(int)
        assert abs(got - want).max() <= 1, i
        seen += want.astype(bool).any()
    assert seen == len(images)
    assert page.execute_script('return mnistForm(new Array(100).fill(7), 10, 10)') is None


@pytest.mark.parametrize('kind', ['mouse', 'touch'])
def test_digits_that_are_drawn_are_read(page, kind):
    model = load_block3()
    for digit,strokes in drawn.items():
        page.find_element('class name', 'draw-clear').click()
        assert settled(page)[2] == 'Draw a digit.'
        trace(page, strokes, kind)
        form,probs,said = settled(page)
        assert said.startswith(f'This is a {digit} '), (digit, said)
        np.testing.assert_allclose(probs, predict_digits(model, np.reshape(form, (1,28,28)).astype(np.uint8))[0], atol=1e-4)
