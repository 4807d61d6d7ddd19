"""No secret of the source is shown, whatever the source answers; and it cannot write on a terminal.

A secret is hidden before a text is cut, and in each way that a server may write it.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from helpers import Answer, Fetch, Load, PipelineError, masked, responds, things
from sandbox import Sandbox, Source

CANARY = "C4N4RY"
TOKEN = CANARY + "\"t\\o/k é🚀&=#'<n"  # each way of writing a text changes something of it
WAYS = {
    "plain": TOKEN,
    "lower case": TOKEN.lower(),
    "JSON": json.dumps(TOKEN),
    "JSON with letters": json.dumps(TOKEN, ensure_ascii=False),
    "JSON with slashes": json.dumps(TOKEN).replace("/", "\\/"),
    "JSON with ampersands": json.dumps(TOKEN).replace("&", "\\u0026").replace("<", "\\u003c"),
    "JSON twice": json.dumps(json.dumps(TOKEN)),
    "percent": quote(TOKEN, safe=""),
    "percent but for slashes": quote(TOKEN).lower(),
    "form": urlencode({"q": TOKEN}),
    "HTML": html.escape(TOKEN),
    "behind much else": "x" * 190 + TOKEN,
    "over the cut": "x" * 70 + TOKEN + "x" * 500,
}
ECHOES: dict[str, Callable[[str], Answer]] = {
    "4xx": lambda text: responds(401, text.encode()),
    "4xx in JSON": lambda text: responds(401, {"error": text}),
    "no array": lambda text: responds(200, {"error": text}),
    "no JSON": lambda text: responds(200, text.encode()),
    "no object": lambda text: responds(200, {"r": [text], "next": None}),
    "next": lambda text: responds(200, {"r": things(1), "next": text}),
    "next URL": lambda text: responds(200, {"r": things(1), "next": f"//h/{quote(text)}?{text}"}),
}


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("way", WAYS)
def test_a_token_that_the_source_echoes(
    fetch: Fetch, source: Source, monkeypatch: pytest.MonkeyPatch, echo: str, way: str
) -> None:
    monkeypatch.setenv("API_TOKEN", TOKEN)
    with pytest.raises(PipelineError) as caught:
        fetch(ECHOES[echo](WAYS[way]), records="r", next="next", url=source.url + "?q=${API_TOKEN}")
    shown = masked(str(caught.value))
    assert not re.search("C4N4|4RY|t\\\\*o", shown, re.IGNORECASE), shown


def assert_hidden(sandbox: Sandbox, everything: str, *secrets: str) -> None:
    """No part of a secret is in what was printed, told, written to Redshift or named in S3."""
    names = [key for key in sandbox.objects() if "/raw/" not in key]
    everything += repr([names, sandbox.received()])
    tables = sandbox.query("SELECT to_regclass('public.etl_runs') AS name")
    if tables[0]["name"]:
        everything += repr(sandbox.query("SELECT * FROM public.etl_runs"))
    assert [secret for secret in secrets if secret.lower() in everything.lower()] == [], everything


@pytest.mark.parametrize("field", [False, True], ids=["value", "field"])
def test_a_token_among_the_records(sandbox: Sandbox, load: Load, field: bool) -> None:
    token = TOKEN.encode("ascii", "ignore").decode()  # what a header can hold
    text = "x" * 70 + token + "x" * 500
    record = {"id": 1, text: 1} if field else {"id": text}
    headers = {"X-Key": "${API_TOKEN}"}
    done = load(responds(200, [record]), headers=headers, environment={"API_TOKEN": token})
    assert done.returncode == (0 if field else 1), done.stderr
    assert "***" in done.stderr
    assert_hidden(sandbox, done.stdout + done.stderr, "C4N4", "4RY")


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "short token": ({"headers": {"X-Key": "${KEY}"}}, {"KEY": "q7"}, "q7"),
    "written out": ({"headers": {"Authorization": "Token C4N4RY"}}, {}, "C4N4RY"),
    "in the path": ({"path": "/v5/${KEY}/launches"}, {"KEY": "C4N4RY"}, "C4N4RY"),
    "query": ({"query": "api_key=C4N4RY&since=2026-01-01"}, {}, "C4N4RY"),
    "short query": ({"query": "sig=C4N4"}, {}, "C4N4"),
    "quoted query": ({"query": "token=C4N4RY%2Fa%3D"}, {}, "C4N4RY/a="),
    "password": ({"user": "u:C4N4RY"}, {}, "C4N4RY"),
    "user": ({"user": "C4N4RY:"}, {}, "C4N4RY"),
    "slash in a password": ({"user": "u:pa/C4N4RY"}, {}, "C4N4RY"),
    "quoted password": ({"user": "u:C4N4RY%2Fa"}, {}, "C4N4RY/a"),
    "basic": ({"user": "u:C4N4RY"}, {}, base64.b64encode(b"u:C4N4RY").decode()),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_secret_of_the_configuration(sandbox: Sandbox, load: Load, kind: str) -> None:
    settings, environment, secret = SETTINGS[kind]
    settings = dict(settings)
    host, path = sandbox.source.url.removeprefix("http://").split("/", 1)
    user = f"{settings.pop('user')}@" if "user" in settings else ""
    query = f"?{settings.pop('query')}" if "query" in settings else ""
    url = f"http://{user}{host}{settings.pop('path', '/' + path)}{query}"
    text = f"no {secret}, from 2026-01-01: GET {url}&x={secret}".encode()
    failed = load(responds(403, text), url=url, environment=environment, **settings)
    assert_hidden(sandbox, failed.stdout + failed.stderr, secret)
    if user.count("/"):
        assert sandbox.source.requests == []
        return
    records = {"r": things(1)} if "records" in settings else things(1)
    done = load(responds(200, records), url=url, environment=environment, **settings)
    assert done.returncode == 0, done.stderr
    assert sandbox.query("SELECT id FROM public.things") == [{"id": 1}]
    assert_hidden(sandbox, done.stdout + done.stderr, secret)
    if kind == "in the path":
        (audit,) = sandbox.query("SELECT source FROM public.etl_runs")
        assert audit["source"] == f"http://{host}/v5/${{KEY}}/launches"
        assert sandbox.source.requests[-1] == "/v5/C4N4RY/launches"


def test_what_is_no_secret_stays_readable(sandbox: Sandbox, load: Load) -> None:
    """Values of the query such as a date, a table's name or a number are in the messages."""
    query = "?since=2026-01-01&name=a1&table=public.things&sort_key=id&limit=100&monkey=integer"
    record = {"id": "2026-01-01", "name": "a1"}
    done = load(responds(200, [record]), url=sandbox.source.url + query)
    assert 'public.things, id="2026-01-01": id: "2026-01-01" is not an integer' in done.stderr
    assert "***" not in done.stderr


# --- what a terminal would take for a command ---------------------------------------------------

RAW = "\x1b[31m \r \x08 \x85 \u2028 \u202e \x9b"


def raw_in(text: str) -> list[str]:
    return [repr(c) for c in text if not c.isprintable() and c != "\n"]


def header(text: str) -> str:
    """As http.server writes it, whose headers are Latin-1."""
    return text.encode("latin-1", "ignore").decode("latin-1").replace("\r", "")


FORGERIES: dict[str, Any] = {
    "reason": lambda h: h.wfile.write(f"HTTP/1.1 404 {RAW[:4]}\x85\x9b\r\n\r\n".encode("latin-1")),
    "status line": lambda h: h.wfile.write(b"HTTP/1.1 999999 \x1b[31m\x85\r\n\r\n"),
    "no HTTP": lambda h: h.wfile.write(b"\x1b[31m\x85\x9b\r\n\r\n"),
    "body": responds(404, RAW.encode()),
    "location": responds(302, Location=header(f"http://127.0.0.1:1/{RAW}")),
    "coding": responds(200, things(1), Content_Encoding=header(RAW)),
    "next": responds(200, {"r": things(1), "next": RAW}),
    "next URL": responds(200, {"r": things(1), "next": f"http://localhost/{RAW}"}),
    "no JSON": responds(200, RAW.encode()),
    "no array": responds(200, {RAW: RAW}),
    "field": responds(200, {"r": [{"id": 1, RAW: 1}], "next": None}),
    "field below": responds(200, {"r": [{"id": 1, "a": {RAW: 1}}], "next": None}),
    "value": responds(200, {"r": [{"id": RAW}], "next": None}),
    "chunk": lambda h: h.wfile.write(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\x1b[31m\x85\x9b\r\n"
    ),
    "length": lambda h: h.wfile.write(
        b"HTTP/1.1 200 OK\r\nContent-Length: \x1b[31m\r\nConnection: close\r\n\r\n[]"
    ),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_no_control_character_reaches_the_log(sandbox: Sandbox, load: Load, kind: str) -> None:
    def respond(handler: Any) -> None:
        handler.close_connection = True
        FORGERIES[kind](handler)

    tables = {
        "public.things": {"key": "id", "columns": {"id": "integer not null", "a.b": "integer"}}
    }
    settings: dict[str, Any] = {"records": "r", "next": "next", "max_wait": 0, "tables": tables}
    done = load(respond, **settings)
    assert raw_in(done.stderr) == []
    assert done.returncode in (0, 1, 75)


def test_no_control_character_reaches_the_terminal_by_a_dry_run(
    sandbox: Sandbox, load: Load
) -> None:
    record = {"id": 1, "name": f"a{RAW}é🚀"}
    done = load(responds(200, [record]), arguments=("--dry-run",), environment={"PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert raw_in(done.stdout) == []
    assert r"\x1b" in done.stdout
    assert "é🚀" in done.stdout


def test_a_raw_response_is_kept_as_it_was(sandbox: Sandbox, load: Load) -> None:
    """What is hidden from the log is still in the bucket, which is private."""
    records = [{"id": 1, "name": f"C4N4RY{RAW}"}]
    done = load(responds(200, records), headers={"X-Key": "${KEY}"}, environment={"KEY": "C4N4RY"})
    assert done.returncode == 0, done.stderr
    ((_, raw),) = [item for item in sandbox.objects().items() if "/raw/" in item[0]]
    assert json.loads(gzip.decompress(raw)) == records
    assert sandbox.query("SELECT name FROM public.things") == [{"name": records[0]["name"]}]
