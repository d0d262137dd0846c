"Hand the metadata of settings.ini to setuptools"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='], interpolation=None)
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

def lines(key): return [o for o in cfg[key].splitlines() if o.strip()]

status = {'3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}[cfg['status']]

setup(
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    url=cfg['git_url'] or None,
    license_expression=cfg['license'],
    license_files=['LICENSE', 'NOTICE'],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    classifiers=[
        f'Development Status :: {status}',
        f'Intended Audience :: {cfg["audience"]}',
        f'Natural Language :: {cfg["language"]}',
        'Programming Language :: Python :: 3 :: Only',
    ],
    packages=find_packages(include=[f'{cfg["lib_path"]}*']),
    package_data={cfg['lib_path']: lines('package_data')},
    install_requires=lines('requirements'),
    extras_require={o: lines(f'{o}_requirements') for o in ('dev', 'bench', 'sweep', 'distributed', 'onnx')},
    entry_points={
        'console_scripts': lines('console_scripts'),
        'nbdev': [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d'],
    },
    zip_safe=False,
)
