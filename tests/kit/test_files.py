"Sentences, digests, files that are whole or not there, and what is remembered."
import contextlib

import numpy as np
import pytest

from dinocls.kit import files
from dinocls.kit.files import UserError


def test_the_nearest_word_is_named():
    assert files.nearest('quik', ['smoke', 'quick']) == "did you mean 'quick'?"
    assert files.nearest('zzz', ['smoke', 'quick']) == 'there are: smoke, quick.'


@pytest.mark.parametrize('error, line', [(MemoryError(), 'MemoryError'), (ValueError('one.\ntwo'), 'one'),
                                         (OSError(2, 'No such file', 'x'), 'No such file')])
def test_an_error_is_a_line(error, line):
    assert files.reason(error) == line


def test_digests_know_content_and_no_order(tmp_path):
    assert files.digest({'a': 1, 'b': 2}) == files.digest({'b': 2, 'a': 1}) != files.digest({'a': 2})
    (tmp_path/'empty').touch()
    assert files.file_digest(tmp_path/'empty') == 'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    with files.replacing(tmp_path/'a.txt') as tmp: tmp.write_text('first')
    with contextlib.suppress(KeyError), files.replacing(tmp_path/'a.txt') as tmp:
        tmp.write_text('half')
        raise KeyError
    assert [p.name + ': ' + p.read_text() for p in tmp_path.iterdir()] == ['a.txt: first']
    with pytest.raises(UserError, match='Cannot write'), files.replacing(tmp_path/'a.txt'/'b.txt'): pass


def test_a_librarys_full_disk_is_an_os_error():
    with pytest.raises(OSError, match='No space left'), files.as_os_error():
        raise RuntimeError('No space left on device')


def test_json_comes_back(tmp_path):
    files.write_json(tmp_path/'a.json', {'x': np.float32(0.5), 'y': (1, float('nan')), 'z': np.arange(2)})
    assert files.read_json(tmp_path/'a.json') == {'x': 0.5, 'y': [1, None], 'z': [0, 1]}
    odd = {'rows': [{'a': '{\n  [', 'b': i, 'c': []} for i in range(2)], 'long': list(range(200)),
           'deep': {'x': {'y': [[1, 2], {}]}}}
    files.write_json(tmp_path/'b.json', odd)
    assert files.read_json(tmp_path/'b.json') == odd


def test_json_that_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match='is not there'): files.read_json(tmp_path/'a.json')
    (tmp_path/'a.json').write_text('{"a": ')
    with pytest.raises(UserError, match='cannot be read'): files.read_json(tmp_path/'a.json')


def test_answers_are_remembered_where_they_can_be(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert files.recall('speed', 'this machine') is None
    assert files.remember('speed', 'this machine', 2.5) == 2.5
    files.remember('speed', 'another', 1.0)
    assert files.recall('speed', 'this machine') == 2.5
    (tmp_path/'dinocls'/'speed.json').write_text('{"this machine": 2.')  # a write that was cut off by something else
    assert files.recall('speed', 'this machine') is None
    assert (files.remember('speed', 'this machine', 3.0), files.recall('speed', 'this machine')) == (3.0, 3.0)
    monkeypatch.setenv('XDG_CACHE_HOME', '/dev/null')
    assert (files.remember('speed', 'here', 1.0), files.recall('speed', 'here')) == (1.0, None)


def test_file_systems_without_modes_or_locks_are_worked_with(tmp_path, monkeypatch, capsys):
    import errno
    import os

    from filelock import FileLock

    from dinocls.kit.files import locked, write_json
    def refuse(code):
        def call(*args, **more): raise OSError(code, os.strerror(code))
        return call
    monkeypatch.setattr(os, 'chmod', refuse(errno.EPERM))
    write_json(tmp_path/'a.json', {'a': 1})
    assert (tmp_path/'a.json').is_file() and len(list(tmp_path.iterdir())) == 1
    for code in (errno.ENOLCK, errno.EOPNOTSUPP):
        monkeypatch.setattr(FileLock, 'acquire', refuse(code))
        with locked(tmp_path/'.lock'): pass
    assert capsys.readouterr().out.count('has no locks') == 1
    monkeypatch.setattr(FileLock, 'acquire', refuse(errno.EIO))
    with pytest.raises(OSError), locked(tmp_path/'.lock'): pass


@pytest.mark.parametrize('content', ['{', '[]', '[' * 10**5, '"a"', '\udcff'])
def test_a_damaged_memory_is_made_anew(tmp_path, monkeypatch, content):
    from dinocls.kit.files import recall, remember
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    (tmp_path/'dinocls').mkdir()
    (tmp_path/'dinocls'/'what.json').write_bytes(content.encode(errors='surrogateescape'))
    assert recall('what', 'k') is None and remember('what', 'k', 1) == 1 and recall('what', 'k') == 1


def test_without_a_home_folder_nothing_is_remembered(tmp_path, monkeypatch):
    import os

    from dinocls.kit.files import cache_folder, expand, recall, remember
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, 'expanduser', lambda path: path)  # as where a user has no entry
    assert remember('what', 'k', 1) == 1 and recall('what', 'k') is None and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match='XDG_CACHE_HOME'): cache_folder()
    assert str(expand('~tmp.png')) == '~tmp.png'
