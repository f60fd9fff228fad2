# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""AES-256-GCM both ways: by the library, and by OpenSSL's context where the library is slow."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd import crypto
from ansible_collections.ctsync.ha_firewall.plugins.module_utils.ctsyncd.errors import WireError

NONCE = bytes(range(12))

# Both ways give the same for every length, and open what the other one sealed; nothing that was changed is opened.
SAME = """
import random, sys
sys.path.insert(0, sys.argv[1])
from ctsyncd import crypto
from ctsyncd.errors import WireError
library = crypto.LibraryCrypto()
if library._openssl is None:
    print("fast by itself")
    sys.exit()
key = random.Random(1).randbytes(32)
ours = crypto._PreparedAesGcm(library._openssl, key)
theirs = crypto._AesGcm(library._aesgcm(key), library._invalid_tag)
chance = random.Random(2)
for size in [*range(70), 1399, 1400, 9000, crypto.ROOM_BYTES - 1, crypto.ROOM_BYTES + 5, 3]:
    nonce, plaintext, header = chance.randbytes(12), chance.randbytes(size), chance.randbytes(chance.randrange(40))
    sealed = ours.seal(nonce, plaintext, header)
    assert sealed == theirs.seal(nonce, plaintext, header), size
    assert ours.open(nonce, sealed, header) == theirs.open(nonce, sealed, header) == plaintext, size
    at = chance.randrange(len(sealed))
    changed = sealed[:at] + bytes((sealed[at] ^ 1 << chance.randrange(8),)) + sealed[at + 1 :]
    for wrong in (
        (nonce, changed, header),
        (nonce, sealed[:-1], header),
        (nonce, sealed, header + b"x"),
        (nonce[:-1] + bytes((nonce[-1] ^ 1,)), sealed, header),
        (nonce[:-1], sealed, header),
        (nonce, sealed[:15], header),
    ):
        try:
            ours.open(*wrong)
        except WireError as error:
            assert error.kind == "auth_failed"
        else:
            raise AssertionError(size)
    assert ours.open(nonce, sealed, header) == plaintext, "after a failure"
try:
    ours.seal(nonce[:-1], b"", b"")
except ValueError:
    print("equal")
"""


@pytest.mark.parametrize("python", [sys.executable, "/usr/bin/python3"])
def test_openssls_context_gives_what_the_library_gives(python: str) -> None:
    """With this Python and with that of the system: their libraries are of different ages."""
    if subprocess.run([python, "-c", "import cryptography"], check=False, capture_output=True).returncode:
        pytest.skip(f"{python} has no cryptography")
    room = Path(crypto.__file__).parents[1]
    done = subprocess.run([python, "-c", SAME, str(room)], capture_output=True, text=True, check=False)
    assert done.stdout in ("equal\n", "fast by itself\n"), done.stderr


def test_what_is_sealed_is_opened_and_nothing_else() -> None:
    library = crypto.LibraryCrypto()
    one, other = (library.derive(bytes((number,)) * 32, b"salt", b"info") for number in (1, 2))
    sealed = one.seal(NONCE, b"plaintext", b"header")
    assert one.open(NONCE, sealed, b"header") == b"plaintext"
    for aead, wrong in ((other, sealed), (one, sealed[:-1]), (one, b""), (one, random.Random(3).randbytes(40))):
        with pytest.raises(WireError) as caught:
            aead.open(NONCE, wrong, b"header")
        assert caught.value.kind == "auth_failed"


class _Slow:
    """A library's class that is written in Python."""

    def __init__(self, key: bytes) -> None:
        self.key = key

    def encrypt(self, nonce: bytes, plaintext: bytes, header: bytes) -> bytes:
        return bytes(len(self.key) + len(nonce) + len(plaintext) + len(header))


def test_a_library_that_is_not_as_expected_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lacks:
        def __init__(self, _binding: Any) -> None:
            raise AttributeError("EVP_CipherInit_ex")

    class Differs:
        def __init__(self, _binding: Any) -> None:
            self.init = self.update = self.final = self.control = lambda *_arguments: 1
            self.null = self.length = self.tag = self.get_tag = None
            self.buffer = lambda *_arguments: b"?"

        def context(self, _key: bytes, _sealing: int) -> object:
            return object()

        def out(self, _size: int) -> None:
            return None

    assert crypto.prepared(type("Native", (), {"encrypt": bytes.join})) is None
    for broken in (Lacks, Differs):
        monkeypatch.setattr(crypto, "_OpenSsl", broken)
        assert crypto.prepared(_Slow) is None
