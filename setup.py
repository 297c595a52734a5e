"The package's metadata: everything from settings.ini, the version from `diffedit_lab/__init__.py`."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read('settings.ini')
cfg = ini['DEFAULT']
lib, words = cfg['lib_path'], lambda key: cfg[key].split()

setup(
    name=cfg['lib_name'], description=cfg['description'], keywords=words('keywords'),
    version=re.search(r'^__version__ = "(.+)"', Path(lib, '__init__.py').read_text(), re.M)[1],
    author=cfg['author'], license=cfg['license'], python_requires='>=' + cfg['min_python'],
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[lib, f'{lib}.*']), package_data={lib: words('package_data')},
    install_requires=words('requirements'),
    extras_require={'lab': words('lab_requirements'), 'dev': words('lab_requirements') + words('dev_requirements')},
    entry_points={'console_scripts': words('console_scripts'), 'nbdev': [f'{lib}={lib}._modidx:d']},
)
