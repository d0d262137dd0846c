"The site: what a crawler finds on it, and how it looks in a browser, on a desk and on a phone, by day and by night"
import json, re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit
import pytest

root = Path(__file__).resolve().parent.parent


class Page(HTMLParser):
    "The anchors, links, pictures and sources of a page"
    def __init__(self, path):
        super().__init__()
        self.path,self.ids,self.links,self.images,self.sources = path,set(),[],[],[]
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag == 'a' and 'href' in a: self.links.append(a['href'])
        elif tag == 'img': self.images.append(a)
        if tag == 'link' and a.get('rel') != 'canonical': self.sources.append(a.get('href'))
        elif 'src' in a: self.sources.append(a['src'])


@pytest.fixture(scope='module')
def pages(built): return {o: Page(o) for o in sorted(built.rglob('*.html'))}


def outside(url): return urlsplit(url).scheme in ('http', 'https', 'mailto')

def target(page, url):
    "The file that `url` on `page` leads to, and the anchor in it"
    path,anchor = urldefrag(url)
    file = (page.path.parent/unquote(urlsplit(path).path)).resolve() if path else page.path
    return file/'index.html' if file.is_dir() else file, unquote(anchor)


def test_no_link_anchor_or_picture_is_broken(pages, built):
    broken,n = [],0
    for page in pages.values():
        for url in page.links + [o for o in page.sources if not o.startswith('data:')] + [o['src'] for o in page.images if not o['src'].startswith('data:')]:
            if outside(url): continue
            file,anchor = target(page, url)
            n += 1
            if not file.is_file() or not file.stat().st_size: broken.append((page.path.name, url, 'no such file'))
            elif anchor and file in pages and anchor not in pages[file].ids: broken.append((page.path.name, url, 'no such anchor'))
            elif built not in file.parents: broken.append((page.path.name, url, 'not on the site'))
    assert not broken
    assert n > 500


def test_every_page_is_reached_from_the_first(pages, built):
    seen,todo = set(),[built/'index.html']
    while todo:
        seen.add(now := todo.pop())
        todo += {t for o in pages[now].links if not outside(o) and (t := target(pages[now], o)[0]) in pages} - seen
    assert {o.name for o in set(pages) - seen} <= {'404.html'}
    notebooks = {re.sub(r'^\d+_', '', o.stem) for o in (root/'nbs').rglob('*.ipynb') if not o.name.startswith('.')}
    assert notebooks | {'contributing', 'changelog'} <= {o.stem for o in seen}


def test_every_picture_has_a_text_of_its_own(pages):
    "And nothing comes from another host"
    texts = [(p.path.name, o.get('alt')) for p in pages.values() for o in p.images]
    assert len(texts) > 25
    assert not [o for o in texts if not o[1] or len(o[1]) < 15]
    assert not [o for p in pages.values() for o in p.sources + [o['src'] for o in p.images] if outside(o) or o.startswith('//')]


def test_no_markup_is_left(pages):
    "As of a link around a name that is a link by itself"
    assert not [(p.path.name, o) for p in pages.values() for o in re.findall(r'\]\([\w./#-]+\.(?:ipynb|html|qmd|md)[^)]*\)', p.path.read_text(encoding='utf-8'))]


def test_names_lead_to_their_entries(pages, built):
    "A name in backticks is a link to where it is explained"
    learner = (built/'learner.html').read_text(encoding='utf-8')
    assert re.search(r'href="[^"]*fast\.html#fastepoch"[^>]*>\s*<code>FastEpoch</code>', learner)
    for name in ('mnist_dls', 'block3_learner', 'Block3', 'FastEpoch', 'mistakes', 'train_run', 'sweep', 'mnist_form', 'predict_files'):
        assert any(name.lower() in o.ids for o in pages.values()), name


@pytest.mark.parametrize('width,mode', [(1200, 'light'), (390, 'dark')])
def test_every_page_can_be_read(pages, built, browser, site, width, mode):
    "By axe-core's rules, within the width of the screen, and without an error on the console"
    from selenium_axe_python import Axe
    faults,axe = [],Axe(browser)
    try:
        browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=844, deviceScaleFactor=1, mobile=width < 600))
        browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value=mode)]))
        browser.get_log('browser')
        for page in pages.values():
            name = str(page.path.relative_to(built))
            browser.get(f'{site}/{name}')
            axe.inject()
            found = axe.run(options=json.dumps({'rules': {'scrollable-region-focusable': {'enabled': False}}})) # browsers see to that themselves
            faults += [(name, o['id'], n['target'][0]) for o in found['violations'] if o['impact'] in ('serious', 'critical') for n in o['nodes']]
            faults += [(name, o['id'], o['error']) for o in found['incomplete'] if o.get('error')] # axe passes over a rule of its own that fails
            assert 'color-contrast' in {o['id'] for o in found['passes'] + found['violations']}, name
            if (wide := browser.execute_script('return document.documentElement.scrollWidth')) > width: faults.append((name, 'width', wide))
            faults += [(name, 'console', o['message']) for o in browser.get_log('browser') if o['level'] == 'SEVERE']
    finally:
        browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
        browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {})
    assert not faults


def test_the_search_finds_a_name(browser, site):
    "Typed by a user, and followed to the entry"
    from selenium.webdriver.support.ui import WebDriverWait
    browser.get(f'{site}/tutorial.html')
    box = next(o for o in browser.find_elements('css selector', '.smalldocs-search input') if o.is_displayed())
    box.send_keys('mnist_form')
    hits = WebDriverWait(browser, 5).until(lambda b: [o for o in b.find_elements('class name', 'search-result') if 'mnist_form' in o.text])
    next(o for o in hits if '/data.html#' in o.get_attribute('href')).click()
    entry = WebDriverWait(browser, 5).until(lambda b: b.find_element('css selector', ':target'))
    assert 'data.html#' in browser.current_url and entry.is_displayed()


def cells():
    "The notebooks, and each cell that may have an output"
    for f in sorted((root/'nbs').rglob('*.ipynb')):
        if not f.name.startswith('.'): yield from ((f.name, o) for o in json.loads(f.read_text(encoding='utf-8'))['cells'] if o['cell_type'] == 'code')

def texts(out):
    "What an output says in words"
    return [''.join(o) for o in (out.get('text', ''), *(v for k,v in out.get('data', {}).items() if k.startswith('text/')))]


def test_no_output_is_of_one_machine():
    "No warning is saved, nor the path of a folder on the machine that ran the notebook"
    outs = [(name, o) for name,cell in cells() for o in cell['outputs']]
    assert len(outs) > 100
    assert not [name for name,o in outs if o.get('name') == 'stderr' or any(re.search(r'/(tmp|root|home|Users)/|site-packages', t) for t in texts(o))]


def test_the_page_has_the_help_that_the_commands_print(monkeypatch):
    "But for the spelling of options, what stands for their values, and a last line with the version: there fastcore 1 and 2 differ"
    from fastcore.script import anno_parser
    from mnist_block3 import cli
    monkeypatch.setenv('COLUMNS', '120')
    plain = lambda o: ''.join(re.sub(r'(--[\w-]+) (\(\w+\)|[A-Z_]+)|\nmnist_block3 [\d.]+\s*$', r'\1', o).replace('_', '-').split())
    shown = {m[1]: texts(cell['outputs'][0])[0] for _,cell in cells() if (m := re.search(r"prog='(\w+)'\)\.print_help", ''.join(cell['source'])))}
    assert len(shown) == 4
    for name,text in shown.items(): assert plain(text) == plain(anno_parser(getattr(cli, name).__wrapped__, prog=name).format_help()), name


def test_each_promise_is_held_by_a_test():
    "A table row names tests or a command that runs them, and each of them is there"
    root = Path(__file__).parent
    targets = re.findall(r'^([\w-]+):', (root.parent/'Makefile').read_text(), re.M)
    rows = [o for o in (root.parent/'nbs'/'promises.qmd').read_text().splitlines() if o.startswith('| ') and not o.startswith('| Promise')]
    for row in rows:
        named = re.findall(r'`(test_\w+\.py)(?:::(\w+))?`', row.split('|')[2])
        made = re.findall(r'`make ([\w-]+)`', row.split('|')[2])
        assert named or made or '.ci/run' in row, row
        assert {*made} <= {*targets}, row
        for file,test in named: assert not test or re.search(rf'^def {test}\(', (root/file).read_text(), re.M), test
    assert len(rows) > 10
