"""The files in conf/cron, installed with the README's commands and run by the real daemons.

Each test boots a machine for that: systemd in a container (systemd-nspawn) that sees this machine's
files below an overlay, which takes all changes and is gone afterwards.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sandbox import ROOT, Sandbox

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
ExecStopPost=bash -c '((EXIT_STATUS == 0)) || tail -v /var/log/sequra-challenge/*.log'
ExecStopPost=bash -c '((EXIT_STATUS == 0)) || journalctl -n 50'
StandardOutput=append:/test/output
StandardError=inherit
"""

# What the README installs, without downloads: the packages are this machine's.
INSTALL = """
for venv in /opt/poetry /opt/sequra-challenge/.venv; do
  /srv/python/bin/{python} -m venv --without-pip $venv
  echo /srv/$(basename $venv) > $venv/lib/{python}/site-packages/srv.pth
done
cat > /usr/local/bin/poetry << 'END'
#!/opt/poetry/bin/python
from poetry.console.application import main
main()
END
chmod 755 /usr/local/bin/poetry
tar -xzf /test/package.tar.gz -C /opt/sequra-challenge
[[ $(stat -c %u /opt/sequra-challenge/poetry.lock) == 0 ]]
sed -i 's|https://api.*launches |{source} |' /opt/sequra-challenge/conf/pipeline.yaml
install -m 644 /test/ca /etc/sandbox-ca.pem
"""

pytestmark = pytest.mark.ci
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

    deploy = yaml.safe_load((ROOT / ".github/workflows/deploy.yml").read_text("utf-8"))
    (pack,) = (step for step in deploy["jobs"]["deploy"]["steps"] if step.get("name") == "Pack")
    folder = os.environ | {"RUNNER_TEMP": str(tmp_path)}
    subprocess.run(["bash", "-c", pack["run"]], cwd=ROOT, env=folder, check=True)

    moved = {"SSL_CERT_FILE": "/etc/sandbox-ca.pem", "LD_LIBRARY_PATH": "/srv/python/lib"}
    environment = sandbox.environment | moved
    (tmp_path / "environment").write_text("".join(f"{k}={v}\n" for k, v in environment.items()))
    (tmp_path / "ca").write_bytes(sandbox.redshift.ca.read_bytes())
    (tmp_path / "unit").write_text(UNIT)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    install = INSTALL.format(python=version, source=sandbox.source.url)

    def run(script: str) -> str:
        (tmp_path / "script").write_text(install + script)
        command = [*as_root, "sh", "-c", BOOT, "boot", f"--bind={tmp_path}:/test", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if not (tmp_path / "output").exists():
            pytest.skip(f"no container can be booted here: {done.stdout}{done.stderr}")
        output = (tmp_path / "output").read_text("utf-8")
        assert done.returncode == 0, output
        return output

    return run


def readme(heading: str) -> list[str]:
    """The README's commands below a heading."""
    section = (ROOT / "README.md").read_text("utf-8").partition(f"\n{heading}\n")[2]
    return re.findall(r"```sh\n(.*?)```", re.split(r"\n##", section)[0], re.DOTALL)


def runs(sandbox: Sandbox) -> list[str]:
    """The ids of the runs that filled the tables, in their order."""
    assert sandbox.query("SELECT count(*) FROM public.launches") == [{"count": 30}]
    sql = "SELECT DISTINCT _run_id, started_at FROM public.etl_runs ORDER BY started_at"
    return [row["_run_id"] for row in sandbox.query(sql)]


def test_systemd(sandbox: Sandbox, machine: Machine) -> None:
    install, try_out = readme("### With systemd")
    printed = machine(f"""
ln -sf /usr/share/zoneinfo/Asia/Kolkata /etc/localtime
sed -i 's/^passwd:.*/passwd: files/' /etc/nsswitch.conf # not every machine has libnss-systemd
{install}
cat /test/environment >> /etc/sequra-challenge.env
{try_out}
[[ -z $(systemd-analyze verify /etc/systemd/system/sequra-challenge.* 2>&1) ]]
systemd-analyze security --threshold=15 sequra-challenge.service

: as if the machine had been off for two days
systemctl stop sequra-challenge.timer
touch -d '2 days ago' /var/lib/systemd/timers/stamp-sequra-challenge.timer
systemctl start sequra-challenge.timer
finished() {{ journalctl -u sequra-challenge | grep -c Finished; }}
for i in {{1..300}}; do (( $(finished) < 2 )) || break; sleep 0.1; done
journalctl -u sequra-challenge
""")
    assert re.search(r"05:30:00 IST .* sequra-challenge.timer", printed), printed
    journal = printed.rpartition("+ journalctl")[2]
    assert "sequra-challenge[" in journal
    by_hand, made_up = runs(sandbox)
    assert by_hand in journal
    assert made_up in journal


def test_cron(sandbox: Sandbox, machine: Machine, needed: Callable[[str], str]) -> None:
    for command in ("cron", "faketime", "logrotate"):
        needed(command)
    install, try_out = readme("### With cron")
    printed = machine(f"""
ln -sf /usr/share/zoneinfo/UTC /etc/localtime
{install}
cat /test/environment >> /etc/sequra-challenge.env
log=/var/log/sequra-challenge/sequra-challenge.log
midnight() {{ # a cron daemon, two seconds before; its jobs have the real time
  faketime -f '@2026-01-31 23:59:58' cron -f 9<&- &
  for i in {{1..100}}; do ! "$@" || break; sleep 0.1; done
  kill $(cat /run/crond.pid)
  wait
}}

exec 9< /opt/sequra-challenge
flock 9
midnight grep skipped $log
exec 9<&-

midnight pgrep -u sequra python
flock /opt/sequra-challenge true
{try_out}

rotate() {{ logrotate --force --state /run/state /etc/logrotate.d/sequra-challenge 2>&1; }}
[[ -z $(rotate) ]]
sudo -u sequra sh -c "echo the next run >> $log"
[[ -z $(rotate) ]]
ls /var/log/sequra-challenge
zcat $log.2.gz
""")
    scheduled, by_hand = runs(sandbox)
    rotated = printed.rpartition("+ ls")[2]
    assert "sequra-challenge.log.1\n" in rotated
    assert "skipped" in rotated
    assert scheduled in rotated
    assert by_hand not in rotated
