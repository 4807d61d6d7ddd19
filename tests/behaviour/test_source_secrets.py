"""No secret of the source is shown, whatever the source answers; and it cannot write on a terminal.

A secret is hidden before a text is cut, and in each way that a server may write it.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable
from urllib.parse import quote, urlencode

import pytest

from helpers import (
    CANARY,
    PAGED,
    Answer,
    Done,
    Fetch,
    Load,
    PipelineError,
    hide,
    masked,
    page,
    raw_response,
    responds,
    sends,
    things,
)
from sandbox import Sandbox, Source

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
    "HTML in numbers": re.sub(r"\W", lambda c: f"&#{ord(c[0])};", TOKEN),
    "behind much else": "x" * 190 + TOKEN,
    "over the cut": "x" * 70 + TOKEN + "x" * 500,
}
ECHOES: dict[str, Callable[[str], Answer]] = {
    "4xx": lambda text: responds(401, text.encode()),
    "4xx in JSON": lambda text: responds(401, {"error": text}),
    "no array": lambda text: responds(200, {"error": text}),
    "no JSON": lambda text: responds(200, text.encode()),
    "no object": lambda text: responds(200, {"results": [text]}),
    "next": lambda text: page(things(1), text),
    "next URL": lambda text: page(things(1), f"//h/{quote(text)}?{text}"),
}


@pytest.mark.parametrize("text", WAYS.values(), ids=WAYS)
def test_a_token_that_the_source_echoes(
    fetch: Fetch, source: Source, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("API_TOKEN", TOKEN)
    for asked, echo in enumerate(ECHOES.values(), 1):
        with pytest.raises(PipelineError) as caught:
            fetch(echo(text), body='{"q": "${API_TOKEN}"}', **PAGED)
        assert json.loads(source.posted[-1]) == {"q": TOKEN}
        assert len(source.requests) == asked
        shown = masked(str(caught.value))
        assert not re.search(r"C4N4|4RY|t\\*o/k", shown, re.IGNORECASE), shown


def test_many_backslashes_do_not_take_for_ever() -> None:
    hide("pw" + "\\" * 6 + "end1")
    assert masked("pw" + "\\" * 40) == "pw" + "\\" * 40


def assert_hidden(sandbox: Sandbox, done: Done, *secrets: str) -> None:
    """No part of a secret is in what was printed, told, written to Redshift or named in S3."""
    names = [key for key in sandbox.objects() if "/raw/" not in key]
    tables = sandbox.query("SELECT to_regclass('public.etl_runs') AS name")
    audit = sandbox.query("SELECT * FROM public.etl_runs") if tables[0]["name"] else []
    shown = done.stdout + done.stderr + repr([names, sandbox.received(), audit])
    assert [secret for secret in secrets if secret.lower() in shown.lower()] == [], shown


@pytest.mark.parametrize("field", [False, True], ids=["value", "field"])
def test_a_token_among_the_records(sandbox: Sandbox, load: Load, field: bool) -> None:
    token = TOKEN.encode("ascii", "ignore").decode()  # what a header can hold
    text = "x" * 70 + token + "x" * 500
    record = {"id": 1, text: 1} if field else {"id": text}
    headers = {"X-Key": "${API_TOKEN}"}
    environment, status = {"API_TOKEN": token}, 0 if field else 1
    done = load(responds(200, [record]), headers=headers, environment=environment, status=status)
    assert "***" in done.stderr
    assert_hidden(sandbox, done, "C4N4", "4RY")


# User and password, path, query; what of them is secret.
URLS: dict[str, tuple[str, str, str, str]] = {
    "in the path": ("", "/v5/${KEY}/launches", "", "C4N4RY"),
    "query": ("", "/", "?api_key=C4N4RY&since=2026-01-01", "C4N4RY"),
    "camel case": ("", "/", "?accessKey=C4N4RY", "C4N4RY"),
    "short query": ("", "/", "?sig=C4N4", "C4N4"),
    "quoted query": ("", "/", "?token=C4N4RY%2Fa%3D", "C4N4RY/a="),
    "password": ("u:C4N4RY@", "/", "", "C4N4RY"),
    "at in a password": ("u:p@C4N4RY@", "/", "", "C4N4RY"),
    "user": ("C4N4RY:@", "/", "", "C4N4RY"),
    "slash in a password": ("u:pa/C4N4RY@", "/", "", "C4N4RY"),
    "quoted password": ("u:C4N4RY%2Fa@", "/", "", "C4N4RY/a"),
    "basic": ("u:C4N4RY@", "/", "", base64.b64encode(b"u:C4N4RY").decode()),
    "short token": ("", "/", "", "q7"),
    "written out": ("", "/", "", "Wr1tten"),
}


@pytest.mark.parametrize("kind", URLS)
def test_a_secret_of_the_configuration(
    fetch: Fetch, source: Source, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    user, path, query, secret = URLS[kind]
    monkeypatch.setenv("KEY", "q7" if kind == "short token" else "C4N4RY")
    headers = {"X-Key": "${KEY}", "Authorization": "Token Wr1tten"}
    url = f"http://{user}{source.at('').partition('//')[2]}{path}{query}"
    with pytest.raises(PipelineError) as caught:
        fetch(responds(403), url=url, headers=headers)
    echo = f"{caught.value}; no {secret}, from 2026-01-01: GET {url}&x={secret}"
    assert secret.lower() not in masked(echo).lower()
    assert len(source.requests) == ("/" not in user)


def test_all_secrets_of_the_configuration(sandbox: Sandbox, load: Load) -> None:
    host = sandbox.source.at("").removeprefix("http://")
    query = "?api_key=C4N4RY&since=2026-01-01&sig=S1gn&token=T0ken%2Fa%3D"
    done = load(
        responds(503, b"C4N4RY"),
        responds(200, things(1)),
        url=f"http://Us3r:P4ss%2Fw@{host}/v5/${{KEY}}/launches{query}",
        headers={"X-Key": "${KEY}", "Authorization": "Token Wr1tten"},
        environment={"KEY": "q7"},
    )
    basic = base64.b64encode(b"Us3r:P4ss/w").decode()
    parts = ("q7", "C4N4RY", "S1gn", "T0ken", "Us3r", "P4ss", "Wr1tten", basic)
    assert_hidden(sandbox, done, *parts)
    assert sandbox.query("SELECT id FROM public.things") == [{"id": 1}]
    (audit,) = sandbox.query("SELECT source FROM public.etl_runs")
    assert audit["source"] == f"http://{host}/v5/${{KEY}}/launches"
    assert sandbox.source.requests == [f"/v5/q7/launches{query}"] * 2


def test_what_is_no_secret_stays_readable(sandbox: Sandbox, load: Load) -> None:
    """Values of the query such as a date, a table's name or a number are in the messages."""
    query = "?since=2026-01-01&name=a1&table=public.things&sort_key=id&limit=100&monkey=integer"
    record = {"id": "2026-01-01", "name": "a1"}
    done = load(responds(200, [record]), url=sandbox.source.url + query, status=1)
    assert 'public.things, id="2026-01-01": id: "2026-01-01" is not an integer' in done.stderr
    assert "***" not in done.stderr


# --- what a terminal would take for a command ---------------------------------------------------

RAW = "\x1b[31m \r \x08 \x85 \u2028 \u202e \x9b"


def raw_in(text: str) -> list[str]:
    return [repr(c) for c in text if not c.isprintable() and c != "\n"]


def header(text: str) -> str:
    """As http.server writes it, whose headers are Latin-1."""
    return text.encode("latin-1", "ignore").decode("latin-1").replace("\r", "")


FORGERIES: dict[str, list[Answer]] = {
    "no answers of HTTP": [
        sends(b"HTTP/1.1 999999 \x1b[31m\x85\r\n\r\n"),
        sends(b"\x1b[31m\x85\x9b\r\n\r\n"),
        sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\x1b[31m\x85\x9b\r\n"),
        sends(b"HTTP/1.1 200 OK\r\nContent-Length: \x1b[31m\r\n\r\n[]"),
    ],
    "reason": [sends(f"HTTP/1.1 404 {RAW[:4]}\x85\x9b\r\n\r\n".encode("latin-1"))],
    "body": [responds(404, RAW.encode())],
    "location": [responds(302, Location=header(f"http://127.0.0.1:1/{RAW}"))],
    "coding": [responds(200, things(1), Content_Encoding=header(RAW))],
    "next": [page(things(1), RAW)],
    "next URL": [page(things(1), f"http://localhost/{RAW}")],
    "no JSON": [responds(200, RAW.encode())],
    "no array": [responds(200, {RAW: RAW})],
    "fields": [page([{"id": 1, RAW: 1, "a": {RAW: 1}}])],
    "value": [page([{"id": RAW}])],
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_no_control_character_reaches_the_log(load: Load, kind: str) -> None:
    columns = {"id": "integer not null", "a.b": "integer"}
    settings = PAGED | {"tables": {"public.things": {"key": "id", "columns": columns}}}
    done = load(*FORGERIES[kind], status=0 if kind == "fields" else 1, **settings)
    assert raw_in(done.stderr) == []


def test_no_control_character_reaches_the_terminal_by_a_dry_run(load: Load) -> None:
    record = {"id": 1, "name": f"a{RAW}é🚀"}
    done = load(responds(200, [record]), arguments=("--dry-run",), environment={"PYTHONUTF8": "1"})
    assert raw_in(done.stdout) == []
    assert r"\x1b" in done.stdout
    assert "é🚀" in done.stdout


def test_a_raw_response_is_kept_as_it_was(sandbox: Sandbox, load: Load) -> None:
    """What is hidden from the log is still in the bucket, which is private."""
    records = [{"id": 1, "name": f"{CANARY}{RAW}"}]
    load(responds(200, records), headers={"X-Key": "${KEY}"}, environment={"KEY": CANARY})
    assert json.loads(raw_response(sandbox)[1]) == records
    assert sandbox.query("SELECT name FROM public.things") == [{"name": records[0]["name"]}]
