"The documentation: its sources, and the site that is made of them, in a browser, on a desk and on a phone"
import json, re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit
import pytest

root = Path(__file__).resolve().parent.parent
notebooks = sorted(path for path in (root/'nbs').rglob('*.ipynb') if not path.name.startswith('.'))


# The sources

def cells(kind):
    "Each cell of that kind, with the notebook it is in"
    for path in notebooks:
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] == kind: yield path, cell

def texts(out):
    "What an output says in words"
    rich = [text for kind, text in out.get('data', {}).items() if kind.startswith('text/')]
    return [''.join(text) for text in (out.get('text', ''), *rich)]


def test_links_between_files_lead_to_files():
    "On the page of a project the notebooks are read as they are, without the site"
    prose = [(path, ''.join(cell['source'])) for path, cell in cells('markdown')]
    prose += [(path, path.read_text(encoding='utf-8')) for path in root.glob('*.md')]
    links = [(path, url) for path, text in prose for url in re.findall(r'\]\(([^)\s]+)\)', text)]
    between = [(path, urldefrag(url).url) for path, url in links if not urlsplit(url).scheme and url[0] != '#']
    assert len(between) > 40
    assert not [(path.name, url) for path, url in between if not (path.parent/url).is_file()]


def test_no_output_is_of_one_machine():
    "No warning is saved, nor the path of a folder on the machine that ran the notebook"
    outs = [(path.name, out) for path, cell in cells('code') for out in cell['outputs']]
    local = re.compile(r'/(tmp|root|home|Users)/|site-packages')
    assert len(outs) > 100
    assert not [name for name, out in outs if out.get('name') == 'stderr']
    assert not [name for name, out in outs if any(local.search(text) for text in texts(out))]


def test_the_page_has_the_help_that_the_commands_print(monkeypatch):
    "Except for the version and the spelling of options and their values, in which fastcore 1 and 2 differ"
    from fastcore.script import anno_parser
    from mnist_block3 import cli
    monkeypatch.setenv('COLUMNS', '120')
    def plain(text):
        text = re.sub(r'\nmnist_block3 [\d.]+\s*$', '', text)
        text = re.sub(r'(--[\w-]+) (\(\w+\)|[A-Z_]+)', r'\1', text)
        return ''.join(text.replace('_', '-').split())
    shown = {}
    for _, cell in cells('code'):
        m = re.search(r"prog='(\w+)'\)\.print_help", ''.join(cell['source']))
        if m: shown[m[1]] = texts(cell['outputs'][0])[0]
    assert len(shown) == 4
    for name, text in shown.items():
        command = getattr(cli, name).__wrapped__
        assert plain(text) == plain(anno_parser(command, prog=name).format_help()), name


def test_each_promise_is_held_by_a_test():
    "Each row of a table names tests or a command that runs them, and each of these exists"
    commands = re.findall(r'^([\w-]+):', (root/'Makefile').read_text(), re.M)
    lines = (root/'nbs'/'promises.qmd').read_text(encoding='utf-8').splitlines()
    rows = [line for line in lines if line.startswith('| ') and not line.startswith('| Promise')]
    assert len(rows) > 10
    for row in rows:
        held_by = row.split('|')[2]
        tests = re.findall(r'`(test_\w+\.py)(?:::(\w+))?`', held_by)
        made = re.findall(r'`make ([\w-]+)`', held_by)
        assert tests or made or '.ci/run' in held_by, row
        assert set(made) <= set(commands), row
        for file, test in tests:
            source = (root/'tests'/file).read_text(encoding='utf-8')
            assert not test or re.search(rf'^def {test}\(', source, re.M), test


# The site: what a crawler finds

class Page(HTMLParser):
    "The anchors, links and picture texts of a page"
    def __init__(self, path):
        super().__init__()
        self.path = path
        self.text = path.read_text(encoding='utf-8')
        self.ids = set()
        self.links = [] # to pages, and to the pictures, scripts and styles it loads
        self.alts = []
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs.get('id'), attrs.get('name')}
        self.links += [attrs[key] for key in ('href', 'src') if attrs.get(key)]
        if tag == 'img': self.alts.append(attrs.get('alt') or '')


@pytest.fixture(scope='module')
def pages(built): return {path: Page(path) for path in sorted(built.rglob('*.html'))}


@pytest.mark.slow
def test_no_link_anchor_or_picture_is_broken(pages, built):
    files = {path for path in built.rglob('*') if path.is_file() and path.stat().st_size}
    def leads_somewhere(page, url):
        path, anchor = urldefrag(url)
        target = (page.path.parent/unquote(path)).resolve() if path else page.path
        if target not in files: return False
        return not anchor or target not in pages or unquote(anchor) in pages[target].ids
    within = [(page, url) for page in pages.values() for url in page.links if not urlsplit(url).scheme]
    assert len(within) > 500
    assert not [(page.path.name, url) for page, url in within if not leads_somewhere(page, url)]


@pytest.mark.slow
def test_every_picture_has_a_text(pages):
    alts = [(page.path.name, alt) for page in pages.values() for alt in page.alts]
    assert len(alts) > 25
    assert not [(name, alt) for name, alt in alts if len(alt) < 15]


@pytest.mark.slow
def test_no_markup_is_left(pages):
    "As of a link around a name that becomes a link by itself"
    markup = re.compile(r'\]\([\w./#-]+\.(?:ipynb|html|qmd|md)[^)]*\)')
    assert not [(page.path.name, left) for page in pages.values() for left in markup.findall(page.text)]


@pytest.mark.slow
def test_names_lead_to_their_entries(pages, built):
    "A name in backticks is a link to where it is explained"
    callbacks = pages[built/'howto'/'callbacks.html'].text
    assert re.search(r'href="[^"]*fast\.html#fastepoch"[^>]*>\s*<code>FastEpoch</code>', callbacks)
    entries = set().union(*(page.ids for page in pages.values()))
    names = {'mnist_dls', 'Block3', 'block3_learner', 'FastEpoch', 'mistakes', 'mnist_form', 'predict_files'}
    assert {name.lower() for name in names} <= entries


# The site in a browser

def axe_faults(axe):
    "What breaks axe-core's rules on the page that is open, and which rules could not be applied"
    by_browsers = {'scrollable-region-focusable': {'enabled': False}} # browsers see to that themselves
    found = axe.run(options=json.dumps({'rules': by_browsers}))
    assert 'color-contrast' in {rule['id'] for rule in found['passes'] + found['violations']}
    grave = [rule for rule in found['violations'] if rule['impact'] in ('serious', 'critical')]
    faults = [(rule['id'], node['target'][0]) for rule in grave for node in rule['nodes']]
    return faults + [(rule['id'], rule['error']) for rule in found['incomplete'] if rule.get('error')]


@pytest.mark.slow
@pytest.mark.parametrize('width, mode', [(1200, 'light'), (390, 'dark')])
def test_every_page_can_be_read(pages, built, browser, site, screen, width, mode):
    "By axe-core's rules, within the width of the screen, and without an error on the console"
    from selenium_axe_python import Axe
    axe = Axe(browser)
    screen(width, 844, mode)
    browser.get_log('browser')
    faults = []
    for path in pages:
        name = str(path.relative_to(built))
        browser.get(f'{site}/{name}')
        axe.inject()
        faults += [(name, *fault) for fault in axe_faults(axe)]
        wide = browser.execute_script('return document.documentElement.scrollWidth')
        if wide > width: faults.append((name, 'width', wide))
        errors = [entry['message'] for entry in browser.get_log('browser') if entry['level'] == 'SEVERE']
        faults += [(name, 'console', message) for message in errors]
    assert not faults


touch_links = '''
const menu = document.querySelector("#quarto-sidebar")
return [...menu.querySelectorAll("a")].map(link => {
  const from = () => link.getBoundingClientRect()
  menu.scrollTop += from().top - menu.getBoundingClientRect().top - menu.clientHeight/2
  const touched = document.elementFromPoint(from().left + from().width/2, from().top + from().height/2)
  return [link.textContent, link.pathname.slice(1), link.contains(touched)]
})'''

@pytest.mark.slow
@pytest.mark.parametrize('width, height', [(390, 844), (1280, 900)])
def test_every_link_of_the_menu_can_be_touched(pages, built, browser, site, screen, width, height):
    "After scrolling inside the menu; the menu leads to every page"
    from selenium.webdriver.support.ui import WebDriverWait
    screen(width, height)
    browser.get(f'{site}/index.html')
    toggle = browser.find_element('class name', 'quarto-btn-toggle')
    if toggle.is_displayed(): toggle.click()
    menu = browser.find_element('id', 'quarto-sidebar')
    WebDriverWait(browser, 5).until(lambda _: menu.rect['x'] >= 0) # the drawer slides in
    links = browser.execute_script(touch_links)
    assert not [name for name, _, touched in links if not touched]
    assert {str(path.relative_to(built)) for path in pages} <= {path for _, path, _ in links}


@pytest.mark.slow
def test_the_search_finds_a_name(browser, site):
    "Typed by a user, and followed to the entry"
    from selenium.webdriver.support.ui import WebDriverWait
    wait = WebDriverWait(browser, 5)
    browser.get(f'{site}/tutorial.html')
    boxes = browser.find_elements('css selector', '.smalldocs-search input')
    next(box for box in boxes if box.is_displayed()).send_keys('block3_learner')
    entry = 'learner.html#block3_learner'
    wait.until(lambda _: browser.find_element('css selector', f'.search-result[href$="{entry}"]')).click()
    target = wait.until(lambda _: browser.find_element('css selector', ':target'))
    assert browser.current_url.endswith(entry) and target.is_displayed()
