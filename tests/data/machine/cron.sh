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
[[ ! -e /opt/sequra-challenge/current/conf/examples/news.yaml ]]
release=v1.2.0
@back@
ls /opt/sequra-challenge/current/conf/examples/news.yaml

fails() { # with this status, and this line in the log and the mail
  status=0
  sudo -u sequra /opt/sequra-challenge/current/conf/cron/run "${@:3}" > /run/said 2>&1 || status=$?
  cat /run/said; tail $log
  [[ $status == $1 ]] && grep -E "$2" /run/said
}
: a run of nothing, of no pipeline, and without its packages
fails 2 '^usage: '
fails 2 '^20\S+Z ERROR   none: exit status 2$' none
grep 'none.*conf/none.yaml: No such file' $log
mv /opt/sequra-challenge/current/.venv /run
fails 1 '^20\S+Z ERROR   pipeline: exit status 1$' pipeline
tail -1 $log | grep 'ERROR   pipeline: exit status 1'
mv /run/.venv /opt/sequra-challenge/current

: Ctrl-C reaches the program, and its end is in the log
set -m
runuser -u sequra -- /opt/sequra-challenge/current/conf/cron/run pipeline --source http://127.0.0.1:9/ > /run/said &
for i in {1..100}; do ! grep -q 'from http://127.0.0.1:9/' $log || break; sleep 0.1; done
kill -INT -$!
status=0; wait $! || status=$?
tail -2 $log
[[ $status == 130 && $(tail -2 $log) =~ 'stopped by SIGINT'.*'ERROR   pipeline: exit status 130' ]]
set +m

rotate() { logrotate --force --state /run/state /etc/logrotate.d/sequra-challenge 2>&1; }
[[ -z $(rotate) ]]
sudo -u sequra sh -c "echo the next run >> $log"
[[ -z $(rotate) ]]
ls /var/log/sequra-challenge
zcat $log.2.gz
cp /run/mail /test
