ln -sf /usr/share/zoneinfo/Asia/Kolkata /etc/localtime
sed -i 's/^passwd:.*/passwd: files/' /etc/nsswitch.conf # not every machine has libnss-systemd
@install@
cat /test/environment >> /etc/sequra-challenge.env
mkdir /etc/systemd/system/sequra-challenge@.service.d
cat > /etc/systemd/system/sequra-challenge@.service.d/override.conf << 'END'
@to_file@
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

@try_out@
[[ -z $(systemd-analyze verify /etc/systemd/system/sequra-challenge* 2>&1) ]]
systemd-analyze security --threshold=15 sequra-challenge@pipeline.service
journal() { journalctl --sync; journalctl -u sequra-challenge@pipeline; }
wait_until() { for i in {1..300}; do ! "$@" || return 0; sleep 0.1; done; false; }

: as if the machine had been off for two days
systemctl stop sequra-challenge@pipeline.timer
touch -d '2 days ago' /var/lib/systemd/timers/stamp-sequra-challenge@pipeline.timer
systemctl start sequra-challenge@pipeline.timer
thrice() { (( $(journal | grep -c Finished) == 3 )); }
wait_until thrice

: and a run that fails for good
! systemctl start sequra-challenge@pipeline
[[ $(systemctl is-failed sequra-challenge@pipeline) == failed ]]
wait_until grep 404 /run/mail

: one that may mend itself
sudo systemctl reset-failed sequra-challenge@pipeline
mkdir /etc/systemd/system/sequra-challenge@.service.d
printf '[Service]
RestartSec=1
' > /etc/systemd/system/sequra-challenge@.service.d/override.conf
systemctl daemon-reload
! systemctl start sequra-challenge@pipeline
four_times() { (( $(journal | grep -c Finished) == 4 )); }
wait_until four_times
[[ $(grep -c 'HTTP 429' /run/mail) == 0 ]]

: and a deploy with a typo, which tells whom the configuration names, and root
sed -i 's/^  bucket: .*/  bucket: B/' /opt/sequra-challenge/current/conf/pipeline.yaml
! systemctl start sequra-challenge@pipeline
wait_until grep staging.bucket /run/mail
cp /run/mail /test
journal
