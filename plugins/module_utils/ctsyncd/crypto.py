# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The edge to python3-cryptography: AES-256-GCM and HKDF-SHA-256 (RFC 5869).  Imported when used, not before."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable
from typing import Any, Protocol

from .errors import ConfigError, WireError
from .wire import DIGEST_BYTES

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
ROOM_BYTES = 16_384  # longer than any datagram


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


class _OpenSsl:
    """OpenSSL as the library itself calls it, by the interface that it has for pyOpenSSL, and room for results."""

    def __init__(self, binding: Any) -> None:
        """``binding``: cryptography's ``Binding``.  Raises AttributeError where it lacks a function."""
        self.ffi, self.lib = ffi, lib = binding.ffi, binding.lib
        self.null, self.buffer = ffi.NULL, ffi.buffer
        self.init, self.update, self.final = lib.EVP_CipherInit_ex, lib.EVP_CipherUpdate, lib.EVP_CipherFinal_ex
        self.control, self.clear_error = lib.EVP_CIPHER_CTX_ctrl, lib.ERR_clear_error
        self.get_tag, self.set_tag = lib.EVP_CTRL_AEAD_GET_TAG, lib.EVP_CTRL_AEAD_SET_TAG
        self.length = ffi.new("int *")
        self.tag = ffi.new("unsigned char[]", TAG_BYTES)
        self._room = 0
        self._out: Any = None

    def context(self, key: bytes, sealing: int) -> Any:
        """A context of AES-256-GCM for a key, for sealing (1) or opening (0)."""
        lib, null = self.lib, self.null
        context = self.ffi.gc(lib.EVP_CIPHER_CTX_new(), lib.EVP_CIPHER_CTX_free)
        cipher = lib.EVP_get_cipherbyname(b"aes-256-gcm")  # NONCE_BYTES, unless something else is said
        if null in (context, cipher) or self.init(context, cipher, null, key, null, sealing) != 1:
            self.clear_error()
            raise OSError("OpenSSL does not offer AES-256-GCM")
        return context

    def out(self, size: int) -> Any:
        """Room for so many bytes."""
        if size > self._room:
            self._room = max(size, ROOM_BYTES)
            self._out = self.ffi.new("unsigned char[]", self._room)
        return self._out


class _PreparedAesGcm:
    """The same as :class:`_AesGcm` with a context that is kept from one datagram to the next.

    Before its version 42 the library does in Python, for each datagram, what is the same for all of them: it looks the
    cipher up, makes a context and expands the key.  That takes ten times as long as the cipher itself, and after a
    pause, when none of it is in the processor's caches, a tenth of a millisecond more.  See OpenSSL's
    EVP_EncryptInit(3), "AEAD Interface".
    """

    def __init__(self, openssl: _OpenSsl, key: bytes) -> None:
        self._openssl = openssl
        self._key = key
        self._sealing: Any = None
        self._opening: Any = None

    def seal(self, nonce: bytes, plaintext: bytes, header: bytes) -> bytes:
        openssl, size = self._openssl, len(plaintext)
        if len(nonce) != NONCE_BYTES:
            raise ValueError(f"a nonce of {len(nonce)} bytes")
        if self._sealing is None:
            self._sealing = openssl.context(self._key, 1)
        context, null, length, out = self._sealing, openssl.null, openssl.length, openssl.out(size)
        if (
            openssl.init(context, null, null, null, nonce, 1) != 1
            or openssl.update(context, null, length, header, len(header)) != 1
            or openssl.update(context, out, length, plaintext, size) != 1
            or openssl.final(context, null, length) != 1
            or openssl.control(context, openssl.get_tag, TAG_BYTES, openssl.tag) != 1
        ):
            openssl.clear_error()
            raise OSError("OpenSSL could not seal a datagram")
        sealed: bytes = openssl.buffer(out, size)[:] + openssl.buffer(openssl.tag)[:]
        return sealed

    def open(self, nonce: bytes, sealed: bytes, header: bytes) -> bytes:
        """Raises WireError ``auth_failed``, and gives nothing away of what is not authentic."""
        openssl, size = self._openssl, len(sealed) - TAG_BYTES
        if size < 0 or len(nonce) != NONCE_BYTES:
            raise WireError("auth_failed")
        if self._opening is None:
            self._opening = openssl.context(self._key, 0)
        context, null, length, out = self._opening, openssl.null, openssl.length, openssl.out(size)
        if (
            openssl.init(context, null, null, null, nonce, 0) != 1
            or openssl.control(context, openssl.set_tag, TAG_BYTES, sealed[size:]) != 1
            or openssl.update(context, null, length, header, len(header)) != 1
            or openssl.update(context, out, length, sealed, size) != 1
            or openssl.final(context, null, length) != 1  # compares the tag
        ):
            openssl.clear_error()
            raise WireError("auth_failed")
        plaintext: bytes = openssl.buffer(out, size)[:]
        return plaintext


def prepared(aesgcm: Any) -> _OpenSsl | None:
    """What to make :class:`_PreparedAesGcm` with; None where the library is fast by itself, or not as it is expected.

    ``aesgcm``: the library's class.
    """
    if not isinstance(aesgcm.encrypt, types.FunctionType):  # not written in Python any more
        return None
    try:
        from cryptography.hazmat.bindings.openssl.binding import Binding  # noqa: PLC0415

        openssl = _OpenSsl(Binding())
        sample = bytes(NONCE_BYTES), b"plaintext", b"header"
        sealed = _PreparedAesGcm(openssl, bytes(KEY_BYTES)).seal(*sample)
    except (ImportError, AttributeError, TypeError, OSError):
        return None
    return openssl if sealed == aesgcm(bytes(KEY_BYTES)).encrypt(*sample) else None


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
        self._openssl = prepared(AESGCM)
        self._sha256 = SHA256
        self._hkdf = HKDF

    def derive(self, secret: bytes, salt: bytes, info: bytes) -> Aead:
        key = self._expand(secret, salt, info)
        if self._openssl is not None:
            return _PreparedAesGcm(self._openssl, key)
        return _AesGcm(self._aesgcm(key), self._invalid_tag)

    def derive_digest(self, secret: bytes, salt: bytes, info: bytes) -> Callable[[bytes, bytes], bytes]:
        """BLAKE2b (RFC 7693), keyed."""
        keyed = hashlib.blake2b(key=self._expand(secret, salt, info), digest_size=DIGEST_BYTES)

        def digest(header: bytes, plaintext: bytes) -> bytes:
            one = keyed.copy()
            one.update(header + plaintext)
            return one.digest()

        return digest

    def _expand(self, secret: bytes, salt: bytes, info: bytes) -> bytes:
        key: bytes = self._hkdf(algorithm=self._sha256(), length=KEY_BYTES, salt=salt, info=info).derive(secret)
        return key
