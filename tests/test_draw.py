"The page where you draw a digit, in a real browser: what it computes, and what a user does there"
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from mnist_block3.all import load_block3, load_digits, mnist_form, predict_digits

pytestmark = pytest.mark.slow


@pytest.fixture
def page(browser, site):
    browser.get(f'{site}/draw.html')
    return browser


def shown(page):
    "The network's input, its ten probabilities and the answer, once the page has drawn them"
    return page.execute_async_script('''const done = arguments[0], root = document.querySelector(".draw")
        const read = () => done([root.form, root.probs, root.querySelector(".draw-said").textContent])
        requestAnimationFrame(() => requestAnimationFrame(read))''')

def draw(page, strokes, kind='mouse'):
    "Draw lines through points in 0–1 with a real pointer"
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.pointer_input import PointerInput
    canvas = page.find_element('class name', 'draw-canvas')
    w, h = canvas.size['width'], canvas.size['height']
    actions = ActionChains(page, duration=5, devices=[PointerInput(kind, kind)])
    pointer = actions.w3c_actions.pointer_action
    for stroke in strokes:
        for i, (x, y) in enumerate(stroke):
            pointer.move_to(canvas, int((x-0.5)*w), int((y-0.5)*h))
            if i == 0: pointer.pointer_down()
        pointer.pointer_up()
    actions.perform()

circle = [(0.5 + 0.22*np.sin(t), 0.5 - 0.33*np.cos(t)) for t in np.linspace(0, 2*np.pi, 25)]
digits = {
    0: [circle],
    1: [[(0.52,0.15), (0.48,0.85)]],
    2: [[(0.3,0.3), (0.38,0.18), (0.55,0.15), (0.68,0.28), (0.62,0.45), (0.3,0.82), (0.72,0.82)]],
    3: [[(0.3,0.2), (0.5,0.15), (0.65,0.27), (0.58,0.43), (0.45,0.48), (0.62,0.55), (0.68,0.7),
         (0.55,0.84), (0.3,0.8)]],
    4: [[(0.35,0.15), (0.3,0.5), (0.7,0.5)], [(0.64,0.2), (0.6,0.85)]],
    5: [[(0.65,0.17), (0.38,0.17), (0.35,0.45), (0.55,0.43), (0.67,0.6), (0.58,0.8), (0.32,0.82)]],
    7: [[(0.28,0.18), (0.7,0.18), (0.45,0.85)]]}


def test_it_opens_with_a_digit_within_a_second(page, site):
    page.execute_cdp_cmd('Network.enable', {})
    page.execute_cdp_cmd('Network.clearBrowserCache', {})
    page.get('about:blank')
    page.get(f'{site}/draw.html')
    assert shown(page)[2].startswith('This is a 3')
    milliseconds, n_bytes = page.execute_script('''
        const loaded = ["navigation", "resource"].flatMap(kind => performance.getEntriesByType(kind))
        const n_bytes = loaded.reduce((sum, entry) => sum + entry.transferSize, 0)
        return [performance.getEntriesByName("first-digit")[0].startTime, n_bytes]''')
    assert milliseconds < 1000
    assert 50_000 < n_bytes < 2_000_000


def test_nothing_is_fetched_from_elsewhere(page):
    blocked = page.execute_async_script('''const done = arguments[0]
        document.addEventListener("securitypolicyviolation", e => done(e.violatedDirective))
        fetch("http://127.0.0.2:1/").catch(() => 0)''')
    assert blocked == 'connect-src'
    page.get_log('browser') # empties the log of this violation


def test_each_layer_agrees_with_pytorch(page):
    model = load_block3()
    pixels = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    got = page.execute_script('''
        const outs = [], data = Float32Array.from(arguments[0])
        const step = (image, layer) => { outs.push(run(image, layer)); return outs.at(-1) }
        block3.layers.reduce(step, {channels: 1, height: 28, width: 28, data})
        return outs.map(out => Array.from(out.data))''', pixels.flatten().tolist())
    want, x = [], pixels
    for layer in model.children():
        with torch.no_grad(): x = layer(x)
        if isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d)): want.pop() # the page pools in the layer before
        want.append(x.flatten())
    assert len(got) == len(want) == 9
    for a, b in zip(got, want): np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_the_page_has_the_same_form(page):
    "As the library, of light digits somewhere on black"
    rng = np.random.default_rng(0)
    for i, digit in enumerate(load_digits()[1].images[:30].numpy()):
        pic = Image.new('L', rng.integers(150, 200, 2).tolist())
        size = int(rng.integers(40, 140))
        pic.paste(Image.fromarray(digit).resize((size, size)), rng.integers(0, 150 - size, 2).tolist())
        got = page.execute_script('return mnistForm(arguments[0], arguments[1], arguments[2])', np.asarray(pic).ravel().tolist(), pic.height, pic.width)
        assert abs(np.reshape(got, (28, 28)) - mnist_form(pic).astype(int)).max() <= 1, i


def test_the_page_says_that_it_does_not_know(page):
    def answer(*strokes):
        page.find_element('class name', 'draw-clear').click()
        draw(page, strokes)
        return shown(page)[2]
    two = [[(x + shift, y) for x, y in digits[1][0]] for shift in (-0.2, 0.2)]
    assert answer(*two) == 'These are several digits. Draw one.'
    assert answer([(0.5, 0.5), (0.5, 0.501)]) == 'Draw a digit.'
    k = [[(0.3, 0.2), (0.3, 0.8)], [(0.7, 0.2), (0.3, 0.5), (0.7, 0.8)]]
    assert answer(*k).startswith('I am not sure. It may be a ')
    letter_A = [[(0.2, 0.8), (0.5, 0.2), (0.8, 0.8)], [(0.32, 0.6), (0.68, 0.6)]]
    assert answer(*letter_A).startswith('I am not sure. It may be a 4')
    form, probs, _ = shown(page)
    want = predict_digits(load_block3(), np.reshape(form, (1, 28, 28)).astype(np.uint8), careful=True)[0]
    np.testing.assert_allclose(probs, want, atol=1e-4)


def test_digits_that_are_drawn_are_read(page):
    model = load_block3()
    for digit, strokes in digits.items():
        page.find_element('class name', 'draw-clear').click()
        assert shown(page)[2] == 'Draw a digit.'
        draw(page, strokes)
        form, probs, answer = shown(page)
        assert answer.startswith(f'This is a {digit} ')
        want = predict_digits(model, np.reshape(form, (1, 28, 28)).astype(np.uint8), careful=True)[0]
        np.testing.assert_allclose(probs, want, atol=1e-4)


def test_a_phone_shows_the_answer_to_a_finger_without_scrolling(browser, site, screen):
    screen(390, 844)
    browser.get(f'{site}/draw.html')
    browser.find_element('class name', 'draw-clear').click()
    draw(browser, digits[4], 'touch')
    assert shown(browser)[2].startswith('This is a 4 ')
    top, bottom, scrolled = browser.execute_script('''
        const answer = document.querySelector(".draw-said").getBoundingClientRect()
        return [answer.top, answer.bottom, scrollY]''')
    assert scrolled == 0
    assert 0 <= top < bottom <= 844
