"An experiment book: from CIFAR-10 to a served model, every number re-measured."
import importlib

__version__ = "0.2.0"

_HOME = {'preset': 'kit.config', 'load_dataset': 'kit.datasets', 'backbone': 'model', 'corrupt': 'kit.corruptions',
         'ProductionModel': 'inference'}  # what others call → the module that defines it
__all__ = [*_HOME]


def __getattr__(name: str):
    "Load what is asked for, and nothing before."
    if name not in _HOME: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_HOME[name]}'), name)


def __dir__(): return sorted([*globals(), *_HOME])
