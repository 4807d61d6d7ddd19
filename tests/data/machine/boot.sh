# Run as root: boots the container, in a control group of its own and with none of the services that
# this machine has enabled.
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
