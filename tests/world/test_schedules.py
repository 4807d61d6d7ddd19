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

from helpers import responds
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
  timeout -k 5 300 systemd-nspawn --quiet --register=no --keep-unit --link-journal=no \
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

pytestmark = pytest.mark.ci

# A value for the environment, and how conf/cron/environment says that it has to be written there.
ODD = """pa$word!x\\y & #1 100% "two" 'one' `id` $(id) ~ end\\"""
QUOTED = '"' + re.sub(r'([\\"$`])', r"\\\1", ODD) + '"'

Machine = Callable[[str], str]


@pytest.fixture
def machine(sandbox: Sandbox, needed: Callable[[str], str], tmp_path: Path) -> Machine:
    """Boots a machine that has the program, runs a script in it and returns what it printed."""
    needed("systemd-nspawn")
    as_root = [needed("sudo"), "-n", "unshare", "--mount"]
    if not os.environ.get("CI") and subprocess.run([*as_root, "true"], check=False).returncode:
        pytest.skip("needs root")
    with Path(needed("poetry")).open(encoding="utf-8") as file:
        poetry_python = file.readline().removeprefix("#!").strip()
    poetry_packages = subprocess.check_output(
        [poetry_python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    binds = {
        "/srv/python": sys.base_prefix,
        "/srv/poetry": poetry_packages.strip(),
        "/srv/.venv": sysconfig.get_path("purelib"),
        "/etc/systemd/system/test.service": tmp_path / "unit",
    }
    options = [f"--bind-ro={path}:{there}" for there, path in binds.items()]

    releases(tmp_path, sandbox.source.url)
    moved = {"SSL_CERT_FILE": "/etc/sandbox-ca.pem", "LD_LIBRARY_PATH": "/srv/python/lib"}
    environment = sandbox.environment | moved
    lines = [f"{name}={value}\n" for name, value in environment.items()]
    (tmp_path / "environment").write_text("".join(lines) + f"ODD={QUOTED}\n")
    (tmp_path / "ca").write_bytes(sandbox.redshift.ca.read_bytes())
    (tmp_path / "unit").write_text(UNIT)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    install = INSTALL.format(python=version, release=readme("## A release")[1])

    def run(script: str) -> str:
        (tmp_path / "script").write_text(install + script)
        command = [*as_root, "sh", "-c", BOOT, "boot", f"--bind={tmp_path}:/test", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=360, check=False)
        if not (tmp_path / "output").exists():
            pytest.skip(f"no container can be booted here: {done.stdout}{done.stderr}")
        output = (tmp_path / "output").read_text("utf-8")
        assert done.returncode == 0, output
        return output

    return run


def releases(folder: Path, source: str) -> None:
    """A clone of the project that has v1.2.0, and a tarball of v1.3.0 as deploy.yml makes it."""
    clone = folder / "clone"
    for name in ("conf", "sequra_challenge"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("poetry.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)
    pipeline = clone / "conf" / "pipeline.yaml"
    text = pipeline.read_text("utf-8")
    for name in ("pipeline", "second"):
        (url,) = re.findall("  url: .*", text)
        other = f'  url: {source}/{name}\n  headers: {{X-Odd: "${{ODD}}"}}'
        changed = text.replace(url, other)
        pipeline.with_stem(name).write_text(changed, "utf-8")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "1.2.0"], ["tag", "v1.2.0"]):
        subprocess.run([*git, *command], cwd=clone, check=True)

    (clone / "conf" / "examples" / "news.yaml").unlink()
    deploy = yaml.safe_load((ROOT / ".github/workflows/deploy.yml").read_text("utf-8"))
    (pack,) = (step for step in deploy["jobs"]["deploy"]["steps"] if step.get("name") == "Pack")
    environment = os.environ | {"RUNNER_TEMP": str(folder)}
    subprocess.run(["bash", "-c", pack["run"]], cwd=clone, env=environment, check=True)
    (folder / "package.tar.gz").rename(folder / "sequra-challenge-v1.3.0.tar.gz")


def readme(heading: str) -> list[str]:
    """The commands below a heading of conf/cron/README.md."""
    text = (ROOT / "conf" / "cron" / "README.md").read_text("utf-8")
    section = text.partition(f"\n{heading}\n")[2]
    return re.findall(r"```sh\n(.*?)```", re.split(r"\n##", section)[0], re.DOTALL)


def runs(sandbox: Sandbox) -> list[tuple[str, str]]:
    """The pipelines that filled the tables, and the ids of their runs, in their order."""
    assert sandbox.query("SELECT count(*) FROM public.launches") == [{"count": 30}]
    sql = "SELECT DISTINCT source, _run_id, started_at FROM public.etl_runs ORDER BY started_at"
    return [(row["source"].rpartition("/")[2], row["_run_id"]) for row in sandbox.query(sql)]


def sent(sandbox: Sandbox) -> list[str]:
    """What each request had of the environment."""
    return [headers["X-Odd"] for headers in sandbox.source.headers]


def test_systemd(sandbox: Sandbox, machine: Machine, tmp_path: Path) -> None:
    install, try_out = readme("## With systemd")
    aws = (ROOT / "conf" / "aws" / "README.md").read_text("utf-8")
    (to_file,) = re.findall(r"```ini\n(.*?)```", aws, re.DOTALL)

    def succeed(handler: BaseHTTPRequestHandler) -> None:
        answer(handler, 200, sandbox.source.body)

    fails, is_away = responds(404), responds(429, Retry_After="2000")
    sandbox.source.answers = [succeed, succeed, succeed, fails, is_away, succeed]
    printed = machine(f"""
ln -sf /usr/share/zoneinfo/Asia/Kolkata /etc/localtime
sed -i 's/^passwd:.*/passwd: files/' /etc/nsswitch.conf # not every machine has libnss-systemd
{install}
cat /test/environment >> /etc/sequra-challenge.env
mkdir /etc/systemd/system/sequra-challenge@.service.d
cat > /etc/systemd/system/sequra-challenge@.service.d/override.conf << 'END'
{to_file}
END
systemctl daemon-reload
install -d /var/log/sequra-challenge
systemctl start sequra-challenge@pipeline
grep 'done: ' /var/log/sequra-challenge/sequra-challenge.log
sed /su/d /opt/sequra-challenge/current/conf/cron/logrotate > /run/logrotate
[[ -z $(logrotate --force --state /run/state /run/logrotate 2>&1) ]]
ls /var/log/sequra-challenge/sequra-challenge.log.1
rm -r /etc/systemd/system/sequra-challenge@.service.d
systemctl daemon-reload

{try_out}
[[ -z $(systemd-analyze verify /etc/systemd/system/sequra-challenge* 2>&1) ]]
systemd-analyze security --threshold=15 sequra-challenge@pipeline.service
journal() {{ journalctl --sync; journalctl -u sequra-challenge@pipeline; }}
wait_until() {{ for i in {{1..900}}; do ! "$@" || return 0; sleep 0.1; done; false; }}

: as if the machine had been off for two days
systemctl stop sequra-challenge@pipeline.timer
touch -d '2 days ago' /var/lib/systemd/timers/stamp-sequra-challenge@pipeline.timer
systemctl start sequra-challenge@pipeline.timer
thrice() {{ (( $(journal | grep -c Finished) == 3 )); }}
wait_until thrice

: and a run that fails for good
! systemctl start sequra-challenge@pipeline
[[ $(systemctl is-failed sequra-challenge@pipeline) == failed ]]
wait_until grep 404 /run/mail

: one that may mend itself
sudo systemctl reset-failed sequra-challenge@pipeline
mkdir /etc/systemd/system/sequra-challenge@.service.d
printf '[Service]\nRestartSec=1\n' > /etc/systemd/system/sequra-challenge@.service.d/override.conf
systemctl daemon-reload
! systemctl start sequra-challenge@pipeline
four_times() {{ (( $(journal | grep -c Finished) == 4 )); }}
wait_until four_times
! grep 429 /run/mail

: and a deploy with a typo, which tells whom the configuration names, and root
sed -i 's/^  bucket: .*/  bucket: B/' /opt/sequra-challenge/current/conf/pipeline.yaml
! systemctl start sequra-challenge@pipeline
wait_until grep staging.bucket /run/mail
cp /run/mail /test
journal
""")
    assert re.search(r"05:30:00 IST .* sequra-challenge@pipeline.timer", printed), printed
    journal = printed.rpartition("+ journalctl")[2]
    assert "sequra-challenge[" in journal
    _, *loaded = runs(sandbox)
    assert [name for name, _ in loaded] == ["pipeline"] * 3
    assert [run_id for _, run_id in loaded if run_id not in journal] == []
    assert journal.count("Scheduled restart job") == 1
    assert sent(sandbox) == [ODD] * 6
    mail = (tmp_path / "mail").read_text("utf-8")
    assert mail.startswith("To: root\nSubject: sequra-challenge: pipeline failed on ")
    assert "HTTP 404" in mail


def test_cron(
    sandbox: Sandbox, machine: Machine, needed: Callable[[str], str], tmp_path: Path
) -> None:
    for command in ("cron", "faketime", "logrotate"):
        needed(command)
    install, try_out = readme("## With cron")
    (tarball,) = readme("### From GitHub")
    another, times = re.subn(r"git archive .*\n", tarball, readme("## A release")[1])
    assert times == 1
    back = another.splitlines()[-1]
    printed = machine(f"""
ln -sf /usr/share/zoneinfo/UTC /etc/localtime
{install}
cat /test/environment >> /etc/sequra-challenge.env
sed -n 's/run pipeline$/run second/p' /etc/cron.d/sequra-challenge >> /etc/cron.d/sequra-challenge
log=/var/log/sequra-challenge/sequra-challenge.log
midnight() {{ # a cron daemon, two seconds before; its jobs have the real time
  faketime -f '@2026-01-31 23:59:58' cron -f 9<&- &
  for i in {{1..900}}; do ! "$@" || break; sleep 0.1; done; (( i < 900 ))
  kill $(cat /run/crond.pid)
  wait
}}

: two pipelines, of which one is still going
exec 9> /var/lock/sequra-challenge/second
flock 9
midnight grep skipped /run/mail
exec 9<&-
flock /var/lock/sequra-challenge/pipeline cat $log

: and when none is
runs_in() {{
  process=$(pgrep -u sequra -f '^\\S*python \\S*main.py --config conf/second.yaml') &&
    [[ $(readlink /proc/$process/cwd) == $1 ]] &&
    grep -z "^VIRTUAL_ENV=$1/.venv$" /proc/$process/environ
}}
midnight runs_in /opt/sequra-challenge/releases/v1.2.0
for name in pipeline second; do flock /var/lock/sequra-challenge/$name true; done
{try_out}

: another release, and back
{another.replace("v1.2.0", "v1.3.0")}
! ls /opt/sequra-challenge/current/conf/examples/news.yaml
release=v1.2.0
{back}
ls /opt/sequra-challenge/current/conf/examples/news.yaml

rotate() {{ logrotate --force --state /run/state /etc/logrotate.d/sequra-challenge 2>&1; }}
[[ -z $(rotate) ]]
sudo -u sequra sh -c "echo the next run >> $log"
[[ -z $(rotate) ]]
ls /var/log/sequra-challenge
zcat $log.2.gz
cp /run/mail /test
""")
    loaded = runs(sandbox)
    assert [name for name, _ in sorted(loaded)] == ["pipeline"] * 3 + ["second"], printed
    assert sent(sandbox) == [ODD] * 4
    mail = (tmp_path / "mail").read_text("utf-8")
    (skipped,) = re.findall(r"^\S+Z WARNING second: skipped, .*\n", mail, re.MULTILINE)
    rotated = printed.rpartition("+ ls")[2]
    assert "sequra-challenge.log.1\n" in rotated
    assert skipped in rotated
    assert not [run_id for _, run_id in loaded if run_id not in rotated]
