# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The edge to python3-cryptography: AES-256-GCM and HKDF-SHA-256 (RFC 5869).  Imported when used, not before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

from .errors import ConfigError, WireError
from .wire import DIGEST_BYTES

KEY_BYTES = 32


class Aead(Protocol):
    """One key's sealing and opening.  A nonce (12 bytes) must never be used twice with one key."""

    def seal(self, nonce: bytes, plaintext: bytes, header: bytes) -> bytes: ...

    def open(self, nonce: bytes, sealed: bytes, header: bytes) -> bytes: ...


class Crypto(Protocol):
    """What the session needs of cryptography."""

    def derive(self, secret: bytes, salt: bytes, info: bytes) -> Aead: ...

    def derive_digest(self, secret: bytes, salt: bytes, info: bytes) -> Callable[[bytes, bytes], bytes]:
        """A digest of ``DIGEST_BYTES`` of header and plaintext, under a key of its own."""


class _AesGcm:
    def __init__(self, cipher: Any, invalid_tag: type[Exception]) -> None:
        self._cipher = cipher
        self._invalid_tag = invalid_tag

    def seal(self, nonce: bytes, plaintext: bytes, header: bytes) -> bytes:
        sealed: bytes = self._cipher.encrypt(nonce, plaintext, header)
        return sealed

    def open(self, nonce: bytes, sealed: bytes, header: bytes) -> bytes:
        """Raises WireError ``auth_failed``."""
        try:
            plaintext: bytes = self._cipher.decrypt(nonce, sealed, header)
        except self._invalid_tag as error:
            raise WireError("auth_failed") from error
        return plaintext


class LibraryCrypto:
    """HKDF and AES-256-GCM of python3-cryptography.  Raises ConfigError where the library is missing."""

    def __init__(self) -> None:
        try:
            from cryptography.exceptions import InvalidTag  # noqa: PLC0415
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415
            from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(
                [f"python3-cryptography cannot be imported ({error}); install the package python3-cryptography"]
            ) from error
        self._invalid_tag = InvalidTag
        self._aesgcm = AESGCM
        self._sha256 = SHA256
        self._hkdf = HKDF

    def derive(self, secret: bytes, salt: bytes, info: bytes) -> Aead:
        return _AesGcm(self._aesgcm(self._expand(secret, salt, info)), self._invalid_tag)

    def derive_digest(self, secret: bytes, salt: bytes, info: bytes) -> Callable[[bytes, bytes], bytes]:
        """BLAKE2b (RFC 7693), keyed."""
        keyed = hashlib.blake2b(key=self._expand(secret, salt, info), digest_size=DIGEST_BYTES)

        def digest(header: bytes, plaintext: bytes) -> bytes:
            one = keyed.copy()
            one.update(header)
            one.update(plaintext)
            return one.digest()

        return digest

    def _expand(self, secret: bytes, salt: bytes, info: bytes) -> bytes:
        key: bytes = self._hkdf(algorithm=self._sha256(), length=KEY_BYTES, salt=salt, info=info).derive(secret)
        return key
