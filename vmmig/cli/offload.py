"""``vmmig offload``: be Cloud Hypervisor's offload daemon."""

from __future__ import annotations

from typing import Any

import click

from vmmig.cli.console import CancelOnSignals, showing_progress
from vmmig.cli.urls import as_json_lines, compress, options_for, scheme_of, with_url_options
from vmmig.transfer import Options

_SOCKET = click.option(
    "--socket",
    "socket_path",
    required=True,
    type=click.Path(),
    metavar="PATH",
    help="The unix socket at which the VM is handed over.",
)


@click.group(short_help="Store and restore VMs for Cloud Hypervisor, as its offload daemon.")
def offload() -> None:
    """Be the peer of a Cloud Hypervisor's migration: store a VM at any URL, and restore it.

    \b
      vmmig offload snapshot --socket /run/vm.sock --output s3://bucket/vm.vmsnap --compress
      ch-remote --api-socket API pause
      ch-remote --api-socket API send-migration destination_url=unix:/run/vm.sock,local=on

    \b
      ch-remote --api-socket API receive-migration unix:/run/vm.sock &
      vmmig offload restore --socket /run/vm.sock --input s3://bucket/vm.vmsnap --resume
    """


@offload.command(short_help="Wait for a VM, and store it at a URL.")
@_SOCKET
@click.option(
    "--output", "url", required=True, metavar="URL", help="Where to; a path means a file."
)
@compress
@with_url_options
@as_json_lines
def snapshot(
    socket_path: str, url: str, compression: str | None, as_json: bool, **options: Any
) -> None:
    """Wait at the socket for a VM that Cloud Hypervisor sends, and store it at URL.

    Cloud Hypervisor hears that the migration is complete only when the snapshot is there, whole
    and durably, and ends the VM then. If the exit status is not 0, the VM runs on.
    """
    from vmmig.adapters.cloud_hypervisor import offload_snapshot

    timeout_s = options["timeout"] or 60.0
    with showing_progress(as_json=as_json) as show, CancelOnSignals() as signals:
        offload_snapshot(
            socket_path,
            url,
            compression=compression,
            progress=show,
            cancel=signals.token,
            timeout_s=timeout_s,
            options=_options(url, **options),
        )


@offload.command(short_help="Give a stored VM to a Cloud Hypervisor.")
@_SOCKET
@click.option("--input", "url", required=True, metavar="URL", help="Where the VM is stored.")
@click.option("--resume", is_flag=True, help="Let the VM run on; else it is restored paused.")
@click.option(
    "--copy", is_flag=True, help="Send the RAM over the socket, for a VM whose RAM is not shared."
)
@with_url_options
@as_json_lines
def restore(
    socket_path: str, url: str, resume: bool, copy: bool, as_json: bool, **options: Any
) -> None:
    """Give the VM that is stored at URL to a Cloud Hypervisor that waits at the socket.

    All of it is fetched and checked before Cloud Hypervisor hears the first word.
    """
    from vmmig.adapters.cloud_hypervisor import offload_restore

    timeout_s = options["timeout"] or 60.0
    with showing_progress(as_json=as_json) as show, CancelOnSignals() as signals:
        offload_restore(
            socket_path,
            url,
            resume=resume,
            hand_over=not copy,
            progress=show,
            cancel=signals.token,
            timeout_s=timeout_s,
            options=_options(url, **options),
        )


def _options(url: str, **options: Any) -> Options:
    """Those for the URL: a file knows no time limit, which is the socket's too."""
    if scheme_of(url) == "file":
        options["timeout"] = None
    return options_for(url, **options)
