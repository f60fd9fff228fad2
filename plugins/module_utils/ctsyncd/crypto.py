# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The edge to python3-cryptography: AES-256-GCM and HKDF-SHA-256 (RFC 5869).  Imported when used, not before."""

from __future__ import annotations

from typing import Any, Protocol

from .errors import ConfigError, WireError

KEY_BYTES = 32


class Aead(Protocol):
    """One key's sealing and opening.  A nonce (12 bytes) must never be used twice with one key."""

    def seal(self, nonce: bytes, plaintext: bytes, header: bytes) -> bytes: ...

    def open(self, nonce: bytes, sealed: bytes, header: bytes) -> bytes: ...


class Crypto(Protocol):
    """What the session needs of cryptography."""

    def derive(self, secret: bytes, salt: bytes, info: bytes) -> Aead: ...


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
        key = self._hkdf(algorithm=self._sha256(), length=KEY_BYTES, salt=salt, info=info).derive(secret)
        return _AesGcm(self._aesgcm(key), self._invalid_tag)
