"Metadata in one place, a README in step with its notebook, and packages that carry MNIST"
import json, re, shutil, subprocess, sys, tarfile, tomllib, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest
import mnist_block3
from mnist_block3.sources import mnist_sha256

root = Path(__file__).parent.parent
if not (root/'settings.ini').exists(): pytest.skip('not in a checkout', allow_module_level=True)


@pytest.fixture(scope='module')
def ini():
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


@pytest.fixture(scope='module')
def toml(): return tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))


def test_pyproject_says_what_settings_say(ini, toml):
    project,nbdev = toml['project'],toml['tool']['nbdev']
    assert project['name'] == ini['lib_name']
    assert project['requires-python'] == f'>={ini["min_python"]}'
    urls = project.get('urls', {})
    assert urls.get('Repository', '') == ini['git_url']
    assert urls.get('Documentation', '').rstrip('/') == (ini['doc_host'] + ini['doc_baseurl']).rstrip('/')
    text = {True: 'True', False: 'False'}
    for k,v in nbdev.items(): assert text.get(v, v) == ini[k], k
    assert set(nbdev) <= set(ini)
    static = {'name', 'requires-python', 'dynamic', 'urls'}
    assert set(project) <= static, 'what settings.ini says stands only there'
    assert mnist_block3.__version__ == ini['version']


def test_readme_is_the_index_notebook(monkeypatch):
    monkeypatch.syspath_prepend(root/'tools')
    import readme
    for name,data in readme.files().items(): assert (root/name).read_bytes() == data, f'{name}: run `make readme`'


def test_every_notebook_is_in_the_sidebar():
    "In reading order"
    listed = re.findall(r'- (\S+\.ipynb)', (root/'nbs'/'_quarto.yml').read_text(encoding='utf-8'))
    names = sorted(str(o.relative_to(root/'nbs')) for o in (root/'nbs').rglob('*.ipynb') if not o.name.startswith('.'))
    assert sorted(listed) == names
    assert [o for o in listed if o[0].isdigit()] == [o for o in names if o[0].isdigit()]


def test_nothing_is_tested_where_nbdev_test_does_not_look():
    "It leaves out each cell in which `nbdev_export()` is called"
    for p in (root/'nbs').rglob('*.ipynb'):
        for o in json.loads(p.read_text(encoding='utf-8'))['cells']:
            if 'nbdev_export(' in ''.join(o['source']) and o['cell_type'] == 'code':
                assert ''.join(o['source']) == '#| hide\nimport nbdev; nbdev.nbdev_export()', p


def test_no_dead_addresses(ini):
    "Where nothing is published, nothing links to a published place"
    if ini['git_url']: pytest.skip('the project has an address')
    for name in ('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'nbs/_quarto.yml'):
        text = (root/name).read_text(encoding='utf-8')
        assert not any(o in text for o in ('github.com', 'github.io', 'badge', 'pypi.org')), name


shipped = {f'mnist_block3/mnist/{o}' for o in mnist_sha256} | {
    'mnist_block3/block3.safetensors', 'mnist_block3/known.safetensors', 'mnist_block3/kernels.cpp'}


@pytest.fixture(scope='module')
def packages(tmp_path_factory):
    "A wheel and an sdist of the tracked files"
    src,dist = (tmp_path_factory.mktemp(o) for o in ('src', 'dist'))
    tracked = subprocess.run(['git', 'ls-files', '-z'], cwd=root, capture_output=True, check=True, text=True).stdout.split('\0')
    for name in filter(None, tracked):
        (src/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/name, src/name)
    subprocess.run([sys.executable, 'setup.py', '-q', 'sdist', '-d', dist, 'bdist_wheel', '-d', dist], cwd=src, check=True, capture_output=True)
    return dist


@pytest.mark.slow
def test_wheel_and_sdist(packages, ini):
    wheel, = packages.glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    meta = zipfile.ZipFile(wheel).read(next(o for o in names if o.endswith('METADATA'))).decode()
    assert shipped <= set(names)
    assert not any(o.startswith(('tests', 'nbs', 'tools')) for o in names)
    assert any(o.endswith('LICENSE') for o in names) and any(o.endswith('NOTICE') for o in names)
    for line in ('Name: mnist_block3', f'Version: {ini["version"]}', 'Requires-Python: >=3.11', 'License-Expression: Apache-2.0'):
        assert line in meta
    needs = {o.split()[1] for o in meta.splitlines() if o.startswith('Requires-Dist') and 'extra' not in o}
    assert needs == set(ini['requirements'].split())
    sdist, = packages.glob('*.tar.gz')
    names = {o.partition('/')[2] for o in tarfile.open(sdist).getnames()}
    assert shipped | {'settings.ini', 'LICENSE', 'NOTICE', 'README.md'} <= names
