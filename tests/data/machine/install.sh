# What the README downloads, without downloads: the packages are this machine's. And a sendmail.
command() { cat > $1; chmod 755 $1; }
command /usr/local/bin/python3 << 'END'
#!/bin/sh
[ "$2" != venv ] || set -- "$@" --without-pip
exec /srv/python/bin/@python@ "$@"
END
command /usr/local/bin/poetry << 'END'
#!/bin/sh
[ "$1" != install ] || exec sh -c 'echo /srv/.venv > .venv/lib/@python@/site-packages/srv.pth'
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
echo /srv/poetry > /opt/poetry/lib/@python@/site-packages/srv.pth
install -m 644 /test/ca /etc/sandbox-ca.pem
install -m 666 /dev/null /run/mail
export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0=*
cd /test/clone
@release@
[[ $(stat -c %u /opt/sequra-challenge/current/poetry.lock) == 0 ]]
