"Everything the package says of itself is read from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
s = config['DEFAULT']
split = lambda key: s[key].split()
extras = {name: split(f'{name}_requirements') for name in ('pretrain', 'lora', 'export', 'serve')}
book = split('book_requirements') + sum(extras.values(), [])  # the chapters use everything
clusters = {name: split(f'{name}_requirements') for name in ('ray', 'dask')}

setup(
    name=s['lib_name'], version=s['version'], description=s['description'], keywords=s['keywords'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    url=s['git_url'], author=s['author'], author_email=s['author_email'], license='MIT', license_files=['LICENSE'],
    packages=find_packages(include=[s['lib_name'], f"{s['lib_name']}.*"]),
    package_data={s['lib_name']: ['*.mplstyle', '*.csv', 'weights/*', 'app/static/*', 'app/web/*']},
    include_package_data=False,
    python_requires=f">={s['min_python']}", install_requires=split('requirements'),
    extras_require={**extras, **clusters, 'book': book, 'site': split('site_requirements'),
                    'dev': book + split('dev_requirements')},
    entry_points={'console_scripts': split('console_scripts')}, zip_safe=False,
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
