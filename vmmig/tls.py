"""TLS in both directions, from a folder laid out as Cloud Hypervisor's.

The folder holds ``ca-cert.pem``, which has signed the other side's certificate, and this side's
own: ``client-cert.pem`` and ``client-key.pem`` of who connects, ``server-cert.pem`` and
``server-key.pem`` of who listens. Both sides must show one. TLS 1.2 and newer.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from vmmig.errors import MigratableError

_VERIFY = {
    9: "its certificate is not valid yet; check both hosts' clocks",
    10: "its certificate has expired; renew it",
    62: "its certificate is for another host; connect by a name that it has, or renew it",
    64: "its certificate is for another address; connect by a name that it has, or renew it",
    **dict.fromkeys(
        (2, 18, 19, 20, 21),
        "its certificate is not signed by our ca-cert.pem; give both sides the same CA",
    ),
}
_REASONS = {
    "CERTIFICATE_REQUIRED": "the other side wants a certificate, and got none from us",
    "CERTIFICATE_EXPIRED": "the other side says that our certificate has expired; renew it",
    "CERTIFICATE_REVOKED": "the other side says that our certificate is revoked; renew it",
    "UNKNOWN_CA": "the other side says that its ca-cert.pem has not signed our certificate; "
    "give both sides the same CA",
    "BAD_CERTIFICATE": "the other side refuses our certificate; "
    "it may be for another host, or of another CA",
    "CERTIFICATE_UNKNOWN": "the other side refuses our certificate; check what it is for",
    "UNSUPPORTED_CERTIFICATE": "the other side refuses our certificate; check what it is for",
    "HANDSHAKE_FAILURE": "the other side refuses the TLS handshake; "
    "it may want a certificate, or other ciphers",
    "PROTOCOL_VERSION": "the other side speaks no TLS, or too old a version; 1.2 is needed",
    "UNSUPPORTED_PROTOCOL": "the other side speaks too old a version of TLS; 1.2 is needed",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate; "
    "give it a folder with client-cert.pem and client-key.pem",
    "WRONG_VERSION_NUMBER": "the other side does not speak TLS; "
    "give both sides the option tls, or none",
    "HTTP_REQUEST": "the other side speaks HTTP, not TLS",
}


def client_context(folder: str | os.PathLike[str]) -> ssl.SSLContext:
    """For who connects: shows ``client-cert.pem``, and checks the other side's host name.

    Raises:
        MigratableError: A file is missing, wrong or open to others; the error says which.

    >>> client_context("/no/such/folder")
    Traceback (most recent call last):
    vmmig.errors.MigratableError: TLS: '/no/such/folder/ca-cert.pem' cannot be read (...
    """
    return _context(Path(folder), ssl.PROTOCOL_TLS_CLIENT, "client")


def server_context(folder: str | os.PathLike[str]) -> ssl.SSLContext:
    """For who listens: shows ``server-cert.pem``, and wants a certificate of who connects.

    Raises:
        MigratableError: A file is missing, wrong or open to others; the error says which.

    >>> server_context("/no/such/folder")
    Traceback (most recent call last):
    vmmig.errors.MigratableError: TLS: '/no/such/folder/ca-cert.pem' cannot be read (...
    """
    context = _context(Path(folder), ssl.PROTOCOL_TLS_SERVER, "server")
    # A session is never resumed; tickets that nobody reads would reset the connection.
    context.num_tickets = 0
    return context


def explained(error: OSError) -> str:
    """What an `ssl.SSLError` means, and what to do.

    >>> explained(ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"))
    'TLS: [SSL: WRONG_VERSION_NUMBER] wrong version number'
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {_VERIFY.get(error.verify_code, f'its certificate: {error.verify_message}')}"
    if isinstance(error, ssl.SSLEOFError):
        return (
            "TLS: the other side ended the connection; see what it says, or whether it speaks TLS"
        )
    reason = str(getattr(error, "reason", None) or "")
    for ending, text in _REASONS.items():
        if reason.endswith(ending):
            return f"TLS: {text}"
    return f"TLS: {error.strerror or error}"


def _context(folder: Path, protocol: int, side: str) -> ssl.SSLContext:
    authority, certificate, key = (
        folder / name for name in ("ca-cert.pem", f"{side}-cert.pem", f"{side}-key.pem")
    )
    for path in (authority, certificate, key):
        try:
            with open(path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
        except OSError as error:
            raise MigratableError(
                f"TLS: {str(path)!r} cannot be read ({error.strerror}); the folder must hold "
                f"ca-cert.pem, {side}-cert.pem and {side}-key.pem"
            ) from error
    if os.name == "posix" and mode & 0o077:
        raise MigratableError(
            f"TLS: {str(key)!r} is open to others (mode {mode & 0o777:04o}); chmod 600 it, "
            "and renew it if somebody may have read it"
        )
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(authority)
    except (OSError, ValueError) as error:
        raise MigratableError(
            f"TLS: {str(authority)!r} holds no certificate in PEM form ({_reason(error)})"
        ) from error
    try:
        # Without a password, OpenSSL would ask for one at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise MigratableError(
            f"TLS: {str(certificate)!r} and {str(key)!r} are no certificate and its key, in PEM "
            f"form and without a password ({_reason(error)})"
        ) from error
    return context


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error).lower().replace("_", " ")
