import functools, http.server, os, shutil, signal, subprocess, sys, threading
from pathlib import Path
from filelock import FileLock
import matplotlib
matplotlib.use('Agg')
import pytest
from fastai.torch_core import set_seed
from mnist_block3.all import block3_learner, load_digits, mnist_dls, ProgressCallback


@pytest.fixture(autouse=True)
def seeded(): set_seed(0)


@pytest.fixture(scope='session')
def mnist(): return load_digits()


@pytest.fixture
def at_hand(mnist, monkeypatch):
    "MNIST is not read anew for each of many short runs"
    monkeypatch.setattr('mnist_block3.data.load_digits', lambda source=None: mnist)


@pytest.fixture
def listening_to_ctrl_c():
    "A shell has jobs in the background ignore it"
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.fixture(scope='session')
def small_dls(): return mnist_dls(valid='reference', n_train=320, device='cpu')


@pytest.fixture
def trained(small_dls):
    learn = block3_learner(small_dls)
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(2)
    return learn


@pytest.fixture
def command(tmp_path):
    "A function that runs a command of the package in the folder of the test"
    def command(name, *args, **env):
        return subprocess.run([Path(sys.executable).parent/name, *map(str, args)], cwd=tmp_path,
                              env=os.environ | env, capture_output=True, text=True, timeout=120)
    return command


@pytest.fixture(scope='session')
def once(tmp_path_factory):
    "A function that calls `fill` with a folder, once for all processes that run tests, and returns the folder"
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: shared = shared.parent
    def once(name, fill):
        with FileLock(shared/f'{name}.lock'):
            if not (shared/f'{name}.done').exists():
                (shared/name).mkdir()
                fill(shared/name)
                (shared/f'{name}.done').touch()
        return shared/name
    return once


@pytest.fixture(scope='session')
def built(once):
    "The folder of the site, built from the notebooks"
    root = Path(__file__).resolve().parent.parent
    env = os.environ | {'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    build = [sys.executable, 'tools/docs.py']
    once('site', lambda _: subprocess.run(build, cwd=root, env=env, check=True, capture_output=True))
    return root/'_docs'


@pytest.fixture(scope='session')
def site(built):
    "The address of the site"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=built))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='session')
def browser(tmp_path_factory):
    "Chromium without a window, which logs what goes wrong on a page"
    chromium, driver = shutil.which('chromium'), shutil.which('chromedriver')
    if not (chromium and driver): pytest.skip('needs chromium and chromedriver')
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = ['headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-sync',
             'disable-background-networking', 'disable-component-update', 'window-size=1200,900',
             f'user-data-dir={tmp_path_factory.mktemp("chromium")}']
    for flag in flags: options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def screen(browser):
    "A function that sets the size of the browser's screen and its colours until the test ends"
    def screen(width, height, mode='light'):
        phone = width < 600
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=phone)
        colours = dict(name='prefers-color-scheme', value=mode)
        browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
        browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[colours]))
    yield screen
    browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {})
