"Hosts that break off, are slow, send something else, or do not answer; and weights at every kind of place."
import hashlib
import http.server
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from publishers import cifar, host
from safetensors.torch import save_file
from torchvision.datasets import CIFAR10

from dinocls.kit import datasets, fetch
from dinocls.kit.datasets import load_dataset
from dinocls.kit.fetch import Published, address, intact, read_weights, weights_at_hand, weights_file, weights_record
from dinocls.kit.files import UserError

pytestmark = pytest.mark.usefixtures('place', 'asked_for')


@pytest.fixture
def published(tmp_path, monkeypatch):
    "A published CIFAR-10 of a few images; return the bytes of its archive, and where it is to come."
    cifar(monkeypatch, tmp_path/'published', CIFAR10, {'data_batch_1': 10, 'test_batch': 10}, 'label_names',
          list('abcdefghij'))
    return (tmp_path/'published'/CIFAR10.filename).read_bytes(), tmp_path/'data'


def test_a_download_that_breaks_is_resumed(published, monkeypatch):
    content, place = published
    with host(content, cut=2) as (url, asked):
        monkeypatch.setattr(CIFAR10, 'url', url)
        assert len(load_dataset('cifar10').images) == 20
    assert (asked[0] is None and [int(r[6:-1]) for r in asked[1:]] == [len(content) // 2,
                                                                       (len(content) // 2 + len(content)) // 2])
    assert sorted(p.name for p in place.iterdir() if p.suffix != '.lock') == ['cifar-10-batches-py', CIFAR10.filename]


def test_what_an_earlier_process_left_is_continued_even_from_another_host(published, monkeypatch):
    content, place = published
    place.mkdir()
    (place/f'{CIFAR10.filename}.part').write_bytes(content[:1000])
    with host(b'', status=503) as (busy, _), host(content) as (url, asked):
        monkeypatch.setattr(CIFAR10, 'url', busy)
        monkeypatch.setenv('DINOCLS_MIRRORS', f'http://127.0.0.1:9 {url}')
        load_dataset('cifar10')
    assert asked == ['bytes=1000-']


def test_a_host_without_ranges_sends_everything_again(published, monkeypatch):
    content, place = published
    place.mkdir()
    (place/f'{CIFAR10.filename}.part').write_bytes(b'x' * 1000)
    with host(content, ranges=False) as (url, _):
        monkeypatch.setattr(CIFAR10, 'url', url)
        load_dataset('cifar10')


@pytest.mark.parametrize('left', [b'x' * 1000, b'x' * 10**6])
def test_a_part_of_something_else_is_thrown_away(published, monkeypatch, left):
    content, place = published
    place.mkdir()
    (place/f'{CIFAR10.filename}.part').write_bytes(left)
    with host(content) as (url, _):
        monkeypatch.setattr(CIFAR10, 'url', url)
        load_dataset('cifar10')
    assert not (place/f'{CIFAR10.filename}.part').exists()


def test_a_mirror_that_sends_something_else_is_passed_over(published, monkeypatch):
    content, place = published
    with host(b'hostile' * 100) as (bad, _), host(content) as (good, _):
        monkeypatch.setattr(CIFAR10, 'url', bad)
        with pytest.raises(UserError, match='another checksum'): load_dataset('cifar10')
        assert not (place/CIFAR10.filename).exists() and not (place/f'{CIFAR10.filename}.part').exists()
        monkeypatch.setattr(datasets, 'MIRRORS', {'cifar10': (good,)})
        load_dataset('cifar10')


def test_a_folder_can_be_a_mirror(published, monkeypatch, tmp_path):
    monkeypatch.setenv('DINOCLS_MIRRORS', str(tmp_path/'published'))
    assert len(load_dataset('cifar10').images) == 20


def test_without_a_network_one_sentence_names_hosts_and_folder(published):
    with pytest.raises(UserError, match='could not be downloaded') as e: load_dataset('cifar10')
    assert str(published[1]) in str(e.value) and '127.0.0.1:9' in str(e.value) and 'DINOCLS_MIRRORS' in str(e.value)


def test_a_damaged_archive_is_named_and_left_where_it_is(published):
    content, place = published
    place.mkdir()
    (place/CIFAR10.filename).write_bytes(content[:-1])
    with pytest.raises(UserError, match='incomplete or damaged'): load_dataset('cifar10')
    assert (place/CIFAR10.filename).read_bytes() == content[:-1]


def test_a_checksum_is_known_by_its_length(tmp_path):
    (file := tmp_path/'a').write_bytes(b'abc')
    blob = hashlib.sha1(b'blob 3\0abc').hexdigest()  # as git names a file
    for checksum in (None, '', hashlib.md5(b'abc').hexdigest(), blob, hashlib.sha256(b'abc').hexdigest()):
        assert intact(file, checksum) and not intact(tmp_path/'b', checksum)
        if checksum: assert not intact(file, checksum[::-1])


def test_a_slow_host_makes_place_for_the_next(tmp_path, monkeypatch):
    "By this clock every host is slow; the last one is not given up."
    content, clock, said = b'0' * 10**6, iter(range(0, 10**6, 30)), []
    monkeypatch.setattr(fetch, 'progress', lambda *args: said.append(args))
    monkeypatch.setattr(fetch, 'time', SimpleNamespace(monotonic=lambda: next(clock)))
    checksum = hashlib.md5(content).hexdigest()
    with host(content) as (slow, first), host(content) as (last, then):
        file, _ = fetch.fetch('zeros', tmp_path, (Published('zeros', checksum, (slow, last)),))
    assert file.read_bytes() == content and first == [None]
    assert re.fullmatch(r'bytes=\d+-', then[0]), 'what the slow one sent is not lost'
    assert said[-1][0] == 'download' and said[-1][3].startswith('MB of zeros')
    with host(content) as (slow, asked):  # and where nobody else serves, the slow one is asked again
        known = Published('ones', checksum, (slow, 'http://127.0.0.1:9/refused'))
        assert fetch.fetch('ones', tmp_path, (known,))[0].read_bytes() == content and len(asked) == 2


def test_a_disk_that_is_full_is_not_the_hosts_fault(published, monkeypatch):
    content, place = published
    place.mkdir()
    (place/f'{CIFAR10.filename}.part').symlink_to('/dev/full')
    with host(content) as (url, _):
        monkeypatch.setattr(CIFAR10, 'url', url)
        with pytest.raises(UserError, match='cannot be written.*No space left'): load_dataset('cifar10')


def test_a_file_without_a_checksum_is_never_taken_from_a_mirror(tmp_path, monkeypatch):
    (mirror := tmp_path/'mirror').mkdir()
    (mirror/'a').write_bytes(b'abc')
    monkeypatch.setenv('DINOCLS_MIRRORS', str(mirror))
    def get(checksum):
        known = Published('a', checksum, ('http://127.0.0.1:9/a',))
        return fetch.fetch('a', tmp_path/'here', (known,), 'or put it there')[0].read_bytes()
    with pytest.raises(UserError, match='a is not in .* could not be downloaded .*refused.* or put it there'): get(None)
    assert get(hashlib.md5(b'abc').hexdigest()) == b'abc'


# --- weights ---

@pytest.fixture
def files_host():
    "Serve files from memory, with ranges; a connection breaks after `most` bytes."
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get('Range')))
            if self.path not in files: return self.send_error(404)
            content, start = files[self.path], int((re.search(r'\d+', self.headers.get('Range') or '0'))[0])
            self.send_response(206 if start else 200)
            if start: self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
            self.send_header('Content-Length', str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:start + most[0]])
        def log_message(self, *_): pass

    files, asked, most = {}, [], [10**9]
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}', files, asked, most
    server.shutdown()


@pytest.fixture(scope='module')
def digits(): return fetch.shipped('book-digits').read_bytes()


def sha256(content): return hashlib.sha256(content).hexdigest()


def test_a_broken_download_goes_on_and_is_then_used_without_a_network(cache, files_host, digits):
    url, files, asked, most = files_host
    files['/digits.safetensors'], most[0] = digits, len(digits) // 3 + 1
    there = f'{url}/digits.safetensors#sha256={sha256(digits)}'
    assert weights_at_hand('book-digits', there) is None
    file = weights_file('book-digits', there)
    assert (file.read_bytes() == digits and [r for _, r in asked] == [None,
                                                                      *(f'bytes={n}-'
                                                                        for n in range(most[0], len(digits), most[0]))])
    files.clear()
    assert weights_file('book-digits', there) == weights_at_hand('book-digits', there) == file
    assert {p.suffix for p in file.parent.iterdir()} == {'.safetensors', '.lock'}
    assert weights_record('book-digits', there)['sha256'] == sha256(digits)


def test_what_is_not_what_was_asked_for_is_not_kept(cache, files_host, digits):
    url, files, _, _ = files_host
    files |= {'/digits.safetensors': digits, '/login.pth': b'<html>please log in</html>'}
    for there, say in ((f'{url}/digits.safetensors#sha256={"0" * 64}', 'what it sends has another checksum'),
                       (f'{url}/login.pth', 'what it sends is something else: .* damaged, or not one'),
                       (f'{url}/none.pth', 'Not Found'), ('http://127.0.0.1:9/a.pth', 'refused')):
        with pytest.raises(UserError, match=f'could not be downloaded .*{say}.* give weights=<path') as e:
            weights_file('book-digits', there)
        assert there.partition('#')[0] in str(e.value) and '\n' not in str(e.value)
    assert {p.suffix for p in (cache/'torch'/'checkpoints').iterdir()} == {'.lock'}


def test_files_of_one_name_are_told_apart(cache, files_host, digits):
    url, files, _, _ = files_host
    save_file({k: v + 1 for k, v in read_weights(fetch.shipped('book-digits')).items()}, cache/'other.safetensors')
    files |= {'/a/model.safetensors': digits, '/b/model.safetensors': (cache/'other.safetensors').read_bytes()}
    a, b = (read_weights(weights_file('book-digits', f'{url}/{x}/model.safetensors'))['norm.bias'] for x in 'ab')
    assert torch.equal(a + 1, b)
    (cache/'torch'/'checkpoints'/'model.safetensors').write_bytes(b'of another program')
    assert weights_file('book-digits', f'{url}/a/model.safetensors#sha256={sha256(digits)}').read_bytes() == digits


def test_the_authors_file_is_found_in_the_cache_of_torch_hub(cache, monkeypatch):
    place = cache/'torch'/'checkpoints'
    for name, file in (('dinov2_vits14', 'dinov2_vits14_pretrain.pth'),
                       ('dinov2_vitg14_reg', 'dinov2_vitg14_reg4_pretrain.pth')):
        (place/file).write_bytes(b'')
        assert weights_at_hand(name, 'official') is None  # it is not what the authors published
        monkeypatch.setitem(fetch.SHA256, name, sha256(b''))
        assert weights_file(name, 'official') == place/file
    monkeypatch.setattr(fetch, 'OFFICIAL', 'http://127.0.0.1:9')
    with pytest.raises(UserError, match='dinov2_vits14_reg4_pretrain.pth is not in .* could not be downloaded'):
        weights_file('dinov2_vits14_reg', 'official')


def test_a_file_in_the_hubs_cache_must_have_the_content_that_its_name_says(cache, digits):
    folder = cache/'hub'/'models--timm--some.model'
    for part in ('refs', 'blobs', 'snapshots/1'): (folder/part).mkdir(parents=True)
    (folder/'refs'/'main').write_text('1')
    (folder/'blobs'/sha256(digits)).write_bytes(digits)
    (folder/'snapshots'/'1'/'model.safetensors').symlink_to(f'../../blobs/{sha256(digits)}')
    assert weights_file('any', hub='some.model').read_bytes() == digits
    (folder/'blobs'/sha256(digits)).write_bytes(digits[:-1] + b'!')
    with pytest.raises(UserError, match='does not have the SHA-256 .* fetched anew'):
        weights_file('any', hub='some.model')


def test_addresses():
    def file(name): return address(name, 'official')[0].partition('dinov2/')[2]
    assert file('dinov2_vitb14') == 'dinov2_vitb14/dinov2_vitb14_pretrain.pth'
    assert file('dinov2_vits14_reg') == 'dinov2_vits14/dinov2_vits14_reg4_pretrain.pth'
    assert address('', f'https://host/a.pth#sha256={"0A" * 32}') == ('https://host/a.pth', '0a' * 32)
    for name in ('dinov3_vits16', 'book-cifar'):
        with pytest.raises(UserError, match='no open address'): weights_file(name, 'official')
    for wrong in ('', 'a.zip', 'a.pth#sha256=12', 'a.pth#sha1=12'):
        with pytest.raises(UserError, match='is not the address'): address('', f'https://host/{wrong}')


def test_weights_at_hand(tmp_path):
    assert weights_at_hand('book-digits') == weights_file('book-digits') == fetch.shipped('book-digits')
    for nowhere in ('random', 'none.pth', 'https://host.invalid/a.pth'):
        assert weights_at_hand('book-digits', nowhere) is None and weights_record('book-digits', nowhere) == {}
    with pytest.raises(UserError, match='no checkpoint at none.pth'): weights_file('book-digits', 'none.pth')
    torch.save([1], tmp_path/'list.pth')
    with pytest.raises(UserError, match='expected a dict of tensors'): read_weights(tmp_path/'list.pth')


def test_passwords_are_neither_printed_nor_kept(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='names a user') as e:
        weights_file('book-digits', 'https://me:secret@host/a.pth')
    assert 'secret' not in str(e.value)
    known = Published('a', '0' * 32, ('http://me:secret@127.0.0.1:9/a', 'http://127.0.0.1:9/a?token=secret'))
    with pytest.raises(UserError, match='could not be downloaded') as e: fetch.fetch('a', tmp_path, (known,))
    assert 'secret' not in str(e.value)
    assert 'secret' not in str(UserError('see ftp://x:secret@host/b and https://host/c?sig=secret.'))


def test_a_body_without_an_end_does_not_fill_the_disk(tmp_path, monkeypatch, files_host):
    url, files, _, _ = files_host
    files['/a'] = b'0' * 3 * 2**20
    monkeypatch.setattr(fetch, 'LARGEST', 2**20)
    with pytest.raises(UserError, match='larger than'):
        fetch.fetch('a', tmp_path, (Published('a', None, (f'{url}/a',)),))
    assert not (tmp_path/'a.part').exists()


def test_without_a_home_folder_data_have_their_place_all_the_same(monkeypatch, tmp_path):
    for name in ('DINOCLS_DATA', 'HOME'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert fetch.data_folder() == tmp_path/'dinocls'/'data' and fetch.data_folder('~nobody-of-this-name/x').name == 'x'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr('os.path.expanduser', lambda path: path)  # nor is there an entry for the user
    with pytest.raises(UserError, match='no home folder'): fetch.data_folder()
    with pytest.raises(UserError, match='There is no checkpoint at ~nobody'):
        fetch.weights_file('book-digits', '~nobody/x.pth')
