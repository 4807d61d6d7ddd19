"""A source of pages or of nothing, from its URL to the rows, the raw response and its replay."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from helpers import (
    PAGED,
    THINGS,
    Answer,
    Load,
    assert_failed,
    drips,
    error,
    page,
    raw_response,
    responds,
    rows_of_things,
    things,
)
from sandbox import BUCKET, Sandbox

DIGITS = b"0.1234567890123456789012345"  # more than a double holds
PARTS = {
    "rows": "parts",
    "parent": "thing",
    "key": ["thing_id", "position"],
    "columns": {"thing.id": "integer", "position": "integer", "value": "varchar(8)"},
}


def test_all_pages_are_loaded_archived_and_replayed(sandbox: Sandbox, load: Load) -> None:
    url = sandbox.source.url
    awkward = b'"\xc3\xa9\\ud83d\\ude80\\n\xe2\x80\xa8"'
    last = b'{"id": 5, "name": "a5", "more": [%s, %s, {}]}' % (awkward, DIGITS)
    records = [*things(1, 2, 3, 4), json.loads(last)]
    done = load(
        page(records[:2], f"{url}?page=2"),
        page([], "?page=3"),  # relative to the page it stands on
        page(records[2:4], "/other/things?page=4"),
        responds(200, b'{"next": "/other/more", "results": [%s]}' % last),
        page([], ""),
        **PAGED,
    )
    assert "pages 5, records 5" in done.stderr
    path = "/v5/launches"
    wanted = [path, f"{path}?page=2", f"{path}?page=3", "/other/things?page=4", "/other/more"]
    assert sandbox.source.requests == wanted
    assert rows_of_things(sandbox) == things(1, 2, 3, 4, 5)
    raw, text = raw_response(sandbox)
    assert raw.endswith("/response.ndjson.gz")
    assert [json.loads(line) for line in text.splitlines()] == records
    assert DIGITS in text
    (audit,) = sandbox.query("SELECT raw, source, rows_loaded FROM public.etl_runs")
    assert audit == {"raw": raw, "source": url, "rows_loaded": 5}

    sandbox.query("DELETE FROM public.things RETURNING id")
    sandbox.source.requests.clear()
    load(arguments=("--source", raw), **PAGED)
    assert sandbox.source.requests == []
    assert rows_of_things(sandbox) == things(1, 2, 3, 4, 5)


def test_a_record_that_moved_between_two_pages_is_kept_once(sandbox: Sandbox, load: Load) -> None:
    settings = PAGED | {"tables": THINGS | {"public.parts": PARTS}}
    first, early, late, last = (
        {"id": number, "name": name, "parts": [name, "x"]}
        for number, name in ((1, "same"), (2, "early"), (2, "late"), (3, "same"))
    )
    kept: list[dict[str, Any]] = [first, late, last]

    def assert_kept() -> None:
        assert rows_of_things(sandbox) == [{n: r[n] for n in ("id", "name")} for r in kept]
        query = "SELECT thing_id, value FROM public.parts ORDER BY thing_id, position"
        values = [{"thing_id": r["id"], "value": value} for r in kept for value in r["parts"]]
        assert sandbox.query(query) == values

    load(page([first, early], "?2"), page([late, last]), **settings)
    assert_kept()
    raw, text = raw_response(sandbox)
    assert sorted(map(json.loads, text.splitlines()), key=lambda r: r["id"]) == kept
    load(arguments=("--source", raw), **settings)
    assert_kept()


def test_a_replay_of_one_record_that_has_the_records_name(sandbox: Sandbox, load: Load) -> None:
    """A raw response holds records, also where one of them looks like a page."""
    load(page([{"id": 1, "name": "a1", "results": things(2, 3)}]), **PAGED)
    load(arguments=("--source", raw_response(sandbox)[0]), **PAGED)
    assert rows_of_things(sandbox) == things(1)


def test_a_page_in_s3(sandbox: Sandbox, load: Load) -> None:
    text = json.dumps({"next": "http://localhost:1/", "results": things(1, 2)})
    sandbox.s3.put_object(Bucket=BUCKET, Key="page.json", Body=text.encode())
    load(url=f"s3://{BUCKET}/page.json", **PAGED)
    assert rows_of_things(sandbox) == things(1, 2)
    assert sandbox.source.requests == []


EMPTY: dict[str, tuple[Answer, dict[str, Any]]] = {
    "an array": (responds(200, []), {}),
    "no line": (responds(200, b""), {}),
    "blank lines": (responds(200, b"\n \n"), {}),
    "a page": (page([]), PAGED),
    "an empty page first": (page([]), PAGED | {"next": "+1", "next_param": "page"}),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_answer(sandbox: Sandbox, load: Load, kind: str) -> None:
    respond, settings = EMPTY[kind]
    table = THINGS["public.things"] | {"mode": "upsert"}
    tables = {"public.things": table, "public.parts": PARTS | {"mode": "upsert"}}
    settings = settings | {"tables": tables}
    assert "empty" in error(load(respond, status=1, **settings))
    table["min_rows"] = 0
    assert "public.things 0 rows (+0)" in load(respond, **settings).stderr
    assert len(sandbox.query("SELECT * FROM public.etl_runs")) == 2

    sandbox.query("INSERT INTO public.things VALUES (1, 'a1') RETURNING id")
    load(respond, **settings)
    assert rows_of_things(sandbox) == things(1)
    table["mode"] = "replace"
    assert "max_shrink" in error(load(respond, status=1, **settings))
    assert rows_of_things(sandbox) == things(1)
    table["max_shrink"] = 1
    load(respond, **settings)
    assert rows_of_things(sandbox) == []


def test_every_table_of_records_has_to_allow_an_empty_answer(load: Load) -> None:
    one, other = ({"key": "id", "columns": {"id": "integer"}, "min_rows": n} for n in (0, 1))
    tables = {"public.things": one, "public.others": other}
    assert "empty" in error(load(responds(200, []), tables=tables, status=1))


def test_a_variable_in_the_url(sandbox: Sandbox, load: Load) -> None:
    url = sandbox.source.url.replace("launches", "${TEAM}") + "?since=${SINCE}"
    settings = {"url": url, "arguments": ("--verbose",)}
    environment, answers = {"TEAM": "t34m"}, responds(200, things(1))
    year = time.strftime("%Y", time.gmtime())
    done = load(answers, environment=environment | {"SINCE": year}, **settings)
    assert sandbox.source.requests == [f"/v5/t34m?since={year}"]
    assert "/v5/${TEAM}\n" in done.stderr
    assert done.stderr.startswith(f"{year}-")
    assert f" run: {year}" in done.stderr  # the id, within which it is no word
    assert "t34m" not in done.stderr
    (audit,) = sandbox.query("SELECT source FROM public.etl_runs")
    assert audit["source"].endswith("/v5/${TEAM}")
    message = error(load(answers, environment=environment, status=2, **settings))
    assert "source.url: ${SINCE} is not set in the environment, or empty" in message
    assert "TEAM" not in message
    done = load(environment=environment | {"SINCE": "last week"}, status=2, **settings)
    assert "source.url: space, " in error(done)


def test_a_run_ends_although_the_source_does_not(load: Load) -> None:
    endless = drips(b"HTTP/1.1 200 OK\r\nX-Endless: ", b"x")
    assert_failed(load(endless, answer_seconds=1, status=1), "source.answer_seconds")
