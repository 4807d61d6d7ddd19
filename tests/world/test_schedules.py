"""The files in conf/cron, installed with its README's commands and run by the real daemons.

Each test boots a machine for that: systemd in a container (systemd-nspawn) that sees this machine's
files below an overlay, which takes all changes and is gone afterwards.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import yaml

from sandbox import ROOT, Sandbox, answer

# Run as root: boots the container, in a control group of its own and with none of the services that
# this machine has enabled.
BOOT = r"""
set -eu
mount -t tmpfs tmpfs /run
mkdir /run/files
mount --bind / /run/files
group=$(mktemp -d "$(findmnt -nf -t cgroup2 -o TARGET)/XXXXXXXX")
status=0
SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 sh -c 'echo $$ > "$0/cgroup.procs"; exec "$@"' "$group" \
  timeout -k 5 100 systemd-nspawn --quiet --register=no --keep-unit --link-journal=no \
  --timezone=off --machine="${group##*/}" --directory=/run/files --volatile=overlay \
  --tmpfs=/etc/systemd/system "$@" --boot systemd.unit=test.service systemd.show_status=no \
  || status=$?
find "$group" -depth -type d -exec rmdir {} +
exit $status
"""

# Boots no further than the script, and ends the container with its status.
UNIT = """
[Unit]
SuccessAction=exit-force
FailureAction=exit-force
[Service]
Type=oneshot
ExecStart=bash -euxo pipefail /test/script
ExecStopPost=bash -c '((EXIT_STATUS == 0)) || tail -v /var/log/sequra-challenge/*.log /run/mail'
ExecStopPost=bash -c '((EXIT_STATUS == 0)) || journalctl -n 50'
StandardOutput=append:/test/output
StandardError=inherit
"""

# What the README downloads, without downloads: the packages are this machine's. And a sendmail.
INSTALL = """
command() {{ cat > $1; chmod 755 $1; }}
command /usr/local/bin/python3 << 'END'
#!/bin/sh
[ "$2" != venv ] || set -- "$@" --without-pip
exec /srv/python/bin/{python} "$@"
END
command /usr/local/bin/poetry << 'END'
#!/bin/sh
[ "$1" != install ] || exec sh -c 'echo /srv/.venv > .venv/lib/{python}/site-packages/srv.pth'
exec /opt/poetry/bin/python -m poetry "$@"
END
command /usr/local/bin/aws << 'END'
#!/bin/sh
exec cat "/test/$(basename "$3")"
END
command /usr/sbin/sendmail << 'END'
#!/bin/sh
exec cat >> /run/mail
END
python3 -m venv /opt/poetry
echo /srv/poetry > /opt/poetry/lib/{python}/site-packages/srv.pth
install -m 644 /test/ca /etc/sandbox-ca.pem
install -m 666 /dev/null /run/mail
export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0=*
cd /test/clone
{release}
[[ $(stat -c %u /opt/sequra-challenge/current/poetry.lock) == 0 ]]
"""


# A value for the environment, and how conf/cron/environment says that it has to be written there.
ODD = """pa$word!x\\y & #1 100% "two" 'one' `id` $(id) ~ end\\"""
QUOTED = '"' + re.sub(r'([\\"$`])', r"\\\1", ODD) + '"'

