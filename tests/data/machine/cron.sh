ln -sf /usr/share/zoneinfo/UTC /etc/localtime
@install@
cat /test/environment >> /etc/sequra-challenge.env
sed -n 's/run pipeline$/run second/p' /etc/cron.d/sequra-challenge >> /etc/cron.d/sequra-challenge
log=/var/log/sequra-challenge/sequra-challenge.log
midnight() { # a cron daemon, two seconds before; its jobs have the real time
  faketime -f '@2026-01-31 23:59:58' cron -f 9<&- &
  for i in {1..300}; do ! "$@" || break; sleep 0.1; done; (( i < 300 ))
  kill $(cat /run/crond.pid)
  wait
}

: two pipelines, of which one is still going
exec 9> /var/lock/sequra-challenge/second
flock 9
midnight grep skipped /run/mail
exec 9<&-
flock /var/lock/sequra-challenge/pipeline cat $log

: and when none is
runs_in() {
  process=$(pgrep -u sequra -f '^\S*python \S*main.py --config conf/second.yaml') &&
    [[ $(readlink /proc/$process/cwd) == $1 ]] &&
    grep -z "^VIRTUAL_ENV=$1/.venv$" /proc/$process/environ
}
midnight runs_in /opt/sequra-challenge/releases/v1.2.0
for name in pipeline second; do flock /var/lock/sequra-challenge/$name true; done
@try_out@

: another release, and back
@another@
! ls /opt/sequra-challenge/current/conf/examples/news.yaml
release=v1.2.0
@back@
ls /opt/sequra-challenge/current/conf/examples/news.yaml

rotate() { logrotate --force --state /run/state /etc/logrotate.d/sequra-challenge 2>&1; }
[[ -z $(rotate) ]]
sudo -u sequra sh -c "echo the next run >> $log"
[[ -z $(rotate) ]]
ls /var/log/sequra-challenge
zcat $log.2.gz
cp /run/mail /test
