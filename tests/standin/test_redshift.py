"""What the stand-in for Redshift does, seen through the driver, libpq and PostgreSQL itself."""

import contextlib
import csv
import gzip
import io
import json
import ssl
import threading

import pytest
import redshift_connector

from redshift import ISOLATION, SNAPSHOT, Redshift
from sandbox import USER

COPY = "COPY {} FROM 's3://my-data-bucket/{}' IAM_ROLE default REGION 'eu-west-1' CSV "


@pytest.fixture
def redshift(sandbox):
    return sandbox.redshift


@pytest.fixture
def connect(sandbox, monkeypatch):
    """Open connections as the program does; they are closed after the test."""
    monkeypatch.setenv("SSL_CERT_FILE", str(sandbox.redshift.ca))
    login = {name.lower(): value for name, value in sandbox.secret().items()}
    with contextlib.ExitStack() as connections:

        def open_connection(**changes):
            options = {"ssl": True, "sslmode": "verify-full", "timeout": 30}
            connection = redshift_connector.connect(**login | options | changes)
            connection.autocommit = True
            connections.enter_context(contextlib.suppress(redshift_connector.InterfaceError))
            connections.callback(connection.close)
            return connection

        yield open_connection


@pytest.fixture
def connection(connect):
    return connect()


def run(connection, statement):
    """Run a statement and return its rows, if it has any."""
    cursor = connection.cursor()
    cursor.execute(statement)
    return [tuple(row) for row in cursor.fetchall()] if cursor.description else None


def refused(connection, statement):
    """The error, as the driver's dictionary, that a statement ends in."""
    with pytest.raises(redshift_connector.error.Error) as caught:
        run(connection, statement)
    return caught.value.args[0]


def stage(sandbox, key, text):
    body = text.encode(errors="surrogateescape") if isinstance(text, str) else text
    sandbox.s3.put_object(Bucket="my-data-bucket", Key=key, Body=body)


def copied(sandbox, connection, text, table="t", options=""):
    """Loads one file into a table."""
    stage(sandbox, "file", text)
    return run(connection, COPY.format(table, "file") + options)


def copy_refused(sandbox, connection, text, options=""):
    """The error, and what the table of load errors has of it."""
    stage(sandbox, "file", text)
    error = refused(connection, COPY.format("t", "file") + options)
    (details,) = run(
        connection,
        "SELECT line_number, column_name, error_code, error_message FROM sys_load_error_detail"
        " WHERE query_id = pg_last_copy_id()",
    )
    return error, details


# --- logging in ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"password": "wrong"}, "password authentication failed"),
        ({"user": "nobody"}, 'failed for user "nobody"'),
        ({"database": "nowhere"}, "3D000"),
        ({"ssl": False}, "SSL off"),
        ({"host": "127.0.0.1"}, "certificate is not valid for '127.0.0.1'"),
    ],
)
def test_who_is_not_let_in(connect, changes, said):
    with pytest.raises(redshift_connector.error.Error) as caught:
        connect(**changes)
    assert said in str(caught.value.args)


def test_the_certificate_is_checked_as_strictly_as_by_the_newest_python(
    redshift, connect, monkeypatch
):
    strict = ssl.create_default_context(cafile=redshift.ca)
    strict.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    with monkeypatch.context() as patched:
        patched.setattr(ssl, "create_default_context", lambda *_, **__: strict)
        assert run(connect(), "SELECT 1") == [(1,)]
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(redshift_connector.InterfaceError) as caught:
        connect()
    assert "certificate verify failed" in str(caught.value.args)


# --- COPY ----------------------------------------------------------------------------------------

TEXT = 'CR\r LF\n CRLF\r\n "quoted", tab\t back\\slash 😀'
NESTED = json.dumps({"key": ["a,b", 'q"', "\n", 1.5, None, True]})
# A type, a value in a file, and what is in the table, as text.
GOOD_VALUES = [
    ("integer", "1", "1"),
    ("smallint", "+0032767", "32767"),
    ("bigint", "-9223372036854775808", "-9223372036854775808"),
    ("varchar(60)", TEXT, TEXT),
    ("varchar(4)", "éé", "éé"),
    ("decimal(8,2)", "20.259", "20.25"),
    ("decimal", "-.9", "0"),
    ("real", "3.4e38", "3.4e+38"),
    ("float8", "1e3", "1000"),
    ("boolean", "yes", "true"),
    ("boolean", "n", "false"),
    ("date", "2024-02-29", "2024-02-29"),
    ("timestamp", "2024-01-02T03:04:05.678", "2024-01-02 03:04:05.678"),
    ("timestamptz", "2024-01-02T03:04:05Z", "2024-01-02 03:04:05+00"),
    ("timestamptz", "2023-01-01 12:00:00+02", "2023-01-01 10:00:00+00"),
    ("super", NESTED, NESTED),
    ("super", "1", "1"),
]


def test_copy_round_trip(sandbox, connection):
    names = [f"v{number}" for number in range(len(GOOD_VALUES))]
    types, values, expected = zip(*GOOD_VALUES, strict=True)
    columns = ", ".join(map(" ".join, zip(names, types, strict=True)))
    run(connection, f"CREATE TABLE t ({columns}, gone varchar(5) DEFAULT 'x')")
    rows = [values, [""] * len(values), [r"\N"] * len(values)]
    file = io.StringIO(newline="")
    csv.writer(file).writerows([names, *rows])
    stage(sandbox, "t/1.gz", gzip.compress(file.getvalue().removesuffix("\r\n").encode()))
    entries = [
        {"url": "s3://my-data-bucket/t/1.gz", "mandatory": True},
        {"url": "s3://my-data-bucket/t/absent.gz", "mandatory": False},
    ]
    stage(sandbox, "t/manifest", json.dumps({"entries": entries}))
    cursor = connection.cursor()
    cursor.execute(
        f"""COPY "public"."T" ({", ".join(names)}) FROM 's3://my-data-bucket/t/manifest'
        IAM_ROLE 'arn:aws:iam::123456789012:role/load' REGION 'eu-west-1' MANIFEST GZIP CSV
        IGNOREHEADER 1 TIMEFORMAT 'auto' DATEFORMAT AS 'auto' COMPUPDATE OFF STATUPDATE OFF"""
    )
    assert cursor.rowcount == -1
    assert run(connection, "SELECT pg_last_copy_count()") == [(3,)]
    with sandbox.redshift.connect() as truth:
        found = truth.execute(f"SELECT {'::text, '.join([*names, 'gone'])}::text FROM t").fetchall()
    *first, default = found[0]
    first[types.index("super")] = json.dumps(json.loads(first[types.index("super")]))
    assert (first, default) == ([*expected], "x")
    empty = ["" if type_.startswith("varchar") else None for type_ in types]
    assert found[1:] == [(*empty, "x"), (*[None] * len(types), "x")]


def test_copy_with_another_null(sandbox, connection):
    run(connection, "CREATE TEMP TABLE t (a integer, b varchar(5), c varchar(5))")
    copied(sandbox, connection, "1,nil,\r2,\\N,x", options="NULL AS 'nil'")
    assert run(connection, "SELECT * FROM t ORDER BY a") == [(1, None, ""), (2, "\\N", "x")]


BAD_VALUES = [
    ("varchar(3)", "éé", 1204, "String length exceeds DDL length"),
    ("varchar(9)", "a\0b", 1218, "Invalid null byte"),
    ("varchar(9)", "\udcff", 1220, "invalid or unsupported UTF8"),
    ("varchar(9)", "\udced\udca0\udc80", 1220, "invalid or unsupported UTF8"),
    ("integer", "1x", 1207, "Invalid digit, Value 'x', Pos 1, Type: Integer"),
    ("integer", "1.0", 1207, "Invalid digit, Value '.', Pos 1, Type: Integer"),
    ("smallint", "32768", 1204, "Overflow"),
    ("bigint", "-9223372036854775809", 1204, "Overflow"),
    ("decimal(4,2)", "100.0", 1209, "Overflow for NUMERIC(4,2)"),
    ("decimal", "1e3", 1207, "Invalid digit"),
    ("real", "1e39", 1208, "out of range"),
    ("double precision", "1e-400", 1208, "out of range"),
    ("double precision", "NaN", 1208, "Invalid floating point value"),
    ("boolean", "on", 1210, "Unknown boolean format"),
    ("boolean", "True", 1210, "Unknown boolean format"),
    ("date", "2023-02-29", 1205, "Invalid Date Format"),
    ("date", "02/28/2023", 1205, "Invalid Date Format"),
    ("timestamp", "2023-01-01T00:00:00", 1206, "Invalid timestamp format"),
    ("timestamp", "2023-01-01 24:00:00", 1206, "Invalid timestamp format"),
    ("timestamptz", "2023-01-01 00:00:00Z", 1206, "Invalid timestamp format"),
    ("super", "abc", 1224, "Invalid JSON"),
    ("super", "NaN", 1224, "Invalid JSON"),
    ("super", '"{}"'.format("é" * 32768), 1224, "longer than 65535 bytes"),
    ("integer not null", "", 1213, "Missing data for not-null field"),
    ("varchar(5) not null", "\\N", 1213, "Missing data for not-null field"),
]


def test_copy_refuses_values(sandbox, connection):
    for data_type, value, code, reason in BAD_VALUES:
        run(connection, f"CREATE TABLE t (n integer, v {data_type})")
        text = 'n,v\n1,"{}"\n'.format(value.replace('"', '""'))
        error, details = copy_refused(sandbox, connection, text, "IGNOREHEADER 1")
        assert error["C"] == "XX000"
        assert error["M"].startswith("Load into table 't' failed.  Check 'sys_load_error_detail'")
        assert details[:3] == (2, "v", code)
        assert reason in details[3]
        assert run(connection, "SELECT count(*), pg_last_copy_count() FROM t") == [(0, 0)]
        run(connection, "DROP TABLE t")


BAD_ROWS = {
    "1,2,3": "Extra column(s) found",
    "1": "Delimiter not found",
    "": "Delimiter not found",
    '1,"x"y': "Invalid quote formatting for CSV",
}


def test_copy_refuses_rows_of_another_shape(sandbox, connection):
    run(connection, "CREATE TABLE t (n integer, v varchar(3))")
    for row, reason in BAD_ROWS.items():
        _, details = copy_refused(sandbox, connection, f"1,a\n{row}\n")
        assert details[0] == 2
        assert details[3].startswith(reason)


def test_a_failed_copy_says_where(sandbox, connection):
    run(connection, "CREATE TABLE t (n integer, v varchar(3))")
    copy_refused(sandbox, connection, 'n,v\n1,"a\nb"\n2,four\n3,x\n', "IGNOREHEADER 1")
    (copy_id,) = run(connection, "SELECT pg_last_copy_id()")[0]
    assert run(
        connection,
        "SELECT query, filename, line_number, colname, type, col_length, raw_field_value, err_code,"
        " err_reason FROM stl_load_errors WHERE query = pg_last_copy_id()",
    ) == [(copy_id, "s3://my-data-bucket/file", 4, "v", "varchar", "3", "four", 1204,
           "String length exceeds DDL length")]  # fmt: skip


def test_last_copy_id_survives_a_failed_copy_but_no_rollback(sandbox, connection):
    run(connection, "CREATE TABLE t (n integer)")
    assert run(connection, "SELECT pg_last_copy_id(), pg_last_copy_count()") == [(-1, 0)]
    copied(sandbox, connection, "1\n2\n")
    first, count = run(connection, "SELECT pg_last_copy_id(), pg_last_copy_count()")[0]
    assert (first > 0, count) == (True, 2)
    copy_refused(sandbox, connection, "x")
    failed, count = run(connection, "SELECT pg_last_copy_id(), pg_last_copy_count()")[0]
    assert (failed > first, count) == (True, 0)

    connection.autocommit = False
    copied(sandbox, connection, "1\n2\n")
    assert run(connection, "SELECT pg_last_copy_id()")[0][0] > failed
    connection.rollback()
    assert run(connection, "SELECT pg_last_copy_id(), count(*) FROM t") == [(failed, 2)]
    stage(sandbox, "file", "x")
    refused(connection, COPY.format("t", "file"))
    assert refused(connection, "SELECT 1")["C"] == "25P02"
    connection.rollback()
    assert run(connection, "SELECT pg_last_copy_id()") == [(failed,)]


def test_copy_needs_its_files(sandbox, connection):
    run(connection, "CREATE TABLE t (n integer)")
    entries = [{"url": "s3://my-data-bucket/absent", "mandatory": True}]
    stage(sandbox, "manifest", json.dumps({"entries": entries}))
    for statement, said in {
        COPY.format("t", "manifest") + "MANIFEST": "prefix 's3://my-data-bucket/absent' does not",
        COPY.format("t", "no/such/manifest") + "MANIFEST": "Problem reading manifest file",
        COPY.format("t", "no/such/prefix"): "does not exist",
        COPY.format("t", "x").replace("my-data-bucket", "no-such-bucket"): "does not exist",
        COPY.format("t", "manifest") + "GZIP": "inflate",
    }.items():
        assert said in refused(connection, statement)["M"]
    assert run(connection, "SELECT pg_last_copy_id()") == [(-1,)]


def test_copy_refuses_statements(connection):
    run(connection, "CREATE TABLE t (a integer)")
    expected = {
        COPY.format("t", "x") + "FILLRECORD": "42601",
        COPY.format("t", "x") + "CSV": "42601",
        "COPY t TO 's3://my-data-bucket/x' CSV": "42601",
        "COPY t FROM STDIN": "42601",
        "COPY t FROM 's3://my-data-bucket/x' REGION 'x' CSV": "XX000",
        "COPY t FROM 's3://my-data-bucket/x' IAM_ROLE default CSV": "XX000",
        COPY.format("t", "x") + "TIMEFORMAT 'AUTO'": "0A000",
        COPY.format("absent", "x"): "42P01",
        COPY.format("t (b)", "x"): "42703",
    }
    assert {statement: refused(connection, statement)["C"] for statement in expected} == expected


# --- tables --------------------------------------------------------------------------------------


def test_lengths_are_in_bytes(connection):
    run(connection, "CREATE TABLE t (a varchar(3) NOT NULL, b varchar, c text, d varchar(max))")
    run(connection, "INSERT INTO t VALUES ('éa', 'x', 'x', 'x')")
    for values in "'éé', '', '', ''", "'abcd', '', '', ''":
        error = refused(connection, f"INSERT INTO t VALUES ({values})")
        assert error["M"] == "Value too long for character type"
    for column in "b", "c":
        sized = f"INSERT INTO t (a, {column}) VALUES ('', repeat('é', %s))"
        run(connection, sized % 128)
        assert refused(connection, sized % 129)["M"] == "Value too long for character type"
    run(connection, "INSERT INTO t (a, d) VALUES ('', repeat('x', 65535))")
    assert refused(connection, "CREATE TABLE u (a varchar(65536))")["C"] == "22023"


def test_redshifts_clauses_are_taken_and_keys_not_enforced(redshift, connection):
    run(
        connection,
        """CREATE TABLE IF NOT EXISTS "T" ( -- a comment, with a ) in it
            "Id" bigint PRIMARY KEY ENCODE az64, "other id" int UNIQUE REFERENCES public.x (id),
            v character varying(30) DEFAULT 'it''s; "PRIMARY KEY"' ENCODE zstd, n decimal,
            at timestamp with time zone DEFAULT sysdate
        ) DISTKEY("Id") COMPOUND SORTKEY (at, "other id");""",
    )
    run(connection, 'INSERT INTO t ("ID", "other id", n) VALUES (1, 1, 1.4), (1, 1, 1)')
    assert run(connection, "SELECT id, v, n FROM t") == [(1, 'it\'s; "PRIMARY KEY"', 1)] * 2
    assert refused(connection, 'INSERT INTO t ("other id", n) VALUES (1, 1)')["C"] == "23502"


REFUSED = """
CREATE TABLE t (a int) DISTKEY (b)
CREATE TABLE t (a int, b int) DISTKEY (a, b)
CREATE TABLE t (a int) SORTKEY (a, c)
CREATE TABLE t (a int) WITH (fillfactor = 10)
CREATE TABLE t (a int CHECK (a > 0))
ALTER TABLE known ALTER COLUMN a SET DATA TYPE bigint
CREATE TABLE t (a jsonb)
CREATE TABLE t (a json)
CREATE TABLE t (a uuid)
CREATE TABLE t (a bytea)
CREATE TABLE t (a char(3))
CREATE TABLE t (a serial)
CREATE TABLE t (a bigserial)
CREATE TABLE t (a int[])
CREATE TABLE t (a int GENERATED ALWAYS AS IDENTITY)
CREATE TABLE t (a int) INHERITS (known)
CREATE UNLOGGED TABLE t (a int)
INSERT INTO known VALUES (1) ON CONFLICT DO NOTHING
INSERT INTO known VALUES (1) RETURNING a
CREATE INDEX i ON known (a)
CREATE UNIQUE INDEX i ON known (a)
ALTER TABLE known ADD COLUMN IF NOT EXISTS b int
ALTER TABLE known ADD COLUMN b uuid
ALTER TABLE known ADD COLUMN b int, ADD COLUMN c int
ALTER TABLE known ADD COLUMN b int NOT NULL
ALTER TABLE known ADD PRIMARY KEY (a)
CREATE TRIGGER x AFTER INSERT ON known EXECUTE FUNCTION f()
SELECT '{}'::jsonb
TRUNCATE known
CREATE TABLE t (LIKE known)
SELECT CAST('{}' AS json)
SELECT ARRAY[1]
SELECT * FROM known, LATERAL (SELECT 1) x
SELECT count(*) FILTER (WHERE a > 1) FROM known
SELECT * FROM known FOR UPDATE
SELECT DISTINCT ON (a) a FROM known
"""


CODES = "42601", "42703", "0A000"


def test_refused_statements(redshift, connection):
    run(connection, "CREATE TABLE known (a int)")
    for statement in REFUSED.strip().splitlines():
        assert refused(connection, statement.replace(" (", "\n("))["C"] in CODES, statement
    with redshift.connect() as truth:
        tables = truth.execute(
            "SELECT relname, relnatts FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        ).fetchall()
    assert tables == [("known", 1)], "PostgreSQL has not seen them"


def test_words_in_quotes_and_comments_are_not_syntax(connection):
    run(connection, """CREATE TABLE t ("on conflict" int, "returning" varchar(30), uuid int)""")
    run(connection, "INSERT INTO t VALUES (1, 'RETURNING -- x', 2) -- ON CONFLICT DO NOTHING")
    statement = """SELECT "returning" /* FOR UPDATE */, "On Conflict" FROM t WHERE 'a''[]' <> ''"""
    assert run(connection, statement) == [("RETURNING -- x", 1)]


def test_alter_table(connection):
    run(connection, "CREATE TABLE t (a varchar(3), n int, d varchar(3) DEFAULT 'x')")
    run(connection, "ALTER TABLE t ADD COLUMN b varchar(3)")
    run(connection, "ALTER TABLE t ADD COLUMN c int NOT NULL DEFAULT 0")
    assert "too long" in refused(connection, "INSERT INTO t (b) VALUES ('éé')")["M"]
    run(connection, "ALTER TABLE t ALTER COLUMN b TYPE varchar(4)")
    run(connection, "INSERT INTO t (b) VALUES ('éé')")
    assert "too long" in refused(connection, "INSERT INTO t (b) VALUES ('ééé')")["M"]
    for column, data_type in ("b", "int"), ("b", "text"), ("n", "varchar(10)"):
        error = refused(connection, f"ALTER TABLE t ALTER COLUMN {column} TYPE {data_type}")
        assert "only supported for VARCHAR" in error["M"]
    run(connection, "CREATE VIEW seen AS SELECT a FROM t")
    for column in "a", "d":  # a view, a default
        error = refused(connection, f"ALTER TABLE t ALTER COLUMN {column} TYPE varchar(4)")
        assert error["M"].startswith("cannot alter type of a column")
    connection.autocommit = False
    error = refused(connection, "ALTER TABLE t ALTER COLUMN b TYPE varchar(9)")
    assert error["M"] == "ALTER TABLE ALTER COLUMN cannot run inside a transaction block"


def test_varchars_that_differ_in_spaces_at_the_end_are_equal(connection):
    run(connection, "CREATE TABLE t (a varchar(5), n int)")
    run(connection, "CREATE TEMP TABLE s (a varchar(5), n int)")
    run(connection, "INSERT INTO t VALUES ('a', 1), ('a ', 1), (' a', 1), ('b', 1)")
    run(connection, "INSERT INTO s VALUES ('a  ', 1), ('c', 1)")
    doubles = "SELECT rtrim(a), count(*) FROM t GROUP BY {} HAVING count(*) > 1"
    assert run(connection, doubles.format("a, n").replace("rtrim(a)", "min(n)")) == [(1, 2)]
    assert run(connection, doubles.format("rtrim(a)")) == [("a", 2)]
    assert run(connection, "SELECT count(DISTINCT a), count(*) FROM t") == [(3, 4)]
    assert run(connection, "SELECT count(*) FROM t WHERE a = 'a'") == [(2,)]
    assert run(connection, "SELECT count(*) FROM t WHERE a <> 'a' AND a IN ('b ')") == [(1,)]
    assert run(connection, "SELECT a FROM t JOIN s USING (a) ORDER BY length(a)") == [
        ("a",), ("a ",)]  # fmt: skip
    for plan in "nestloop", "hashjoin", "mergejoin":  # the one after the other
        run(connection, f"SET enable_{plan} = off")
        assert run(connection, "SELECT count(*) FROM t JOIN s USING (a, n)") == [(2,)]
    run(connection, "DELETE FROM t USING s WHERE t.a = s.a AND t.n = s.n")
    assert run(connection, "SELECT a FROM t ORDER BY a") == [(" a",), ("b",)]


# --- transactions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("isolation", "conflicts", "said"),
    [
        ("serializable", True, ("1023", "Serializable isolation violation on table - ")),
        (SNAPSHOT, False, ("could not complete because of conflict with concurrent", "")),
    ],
)
def test_writers_conflict(connect, redshift, isolation, conflicts, said):
    """With snapshots only those of the same rows."""
    redshift.settings = {ISOLATION: isolation}
    first, second, third = connect(), connect(), connect()
    run(first, "CREATE TABLE t (a int)")
    for connection in first, second:
        connection.autocommit = False
        run(connection, "DELETE FROM t")
        run(connection, "INSERT INTO t VALUES (1)")
    first.commit()
    if conflicts:
        error = refused(second, "COMMIT")
        second.rollback()
    else:
        second.commit()
        run(first, "SELECT count(*) FROM t")
        run(third, "DELETE FROM t WHERE a = (SELECT max(a) FROM t)")
        error = refused(first, "DELETE FROM t")
    assert error["C"] == "XX000"
    assert error["M"].startswith(said[0])
    assert error.get("D", "").startswith(said[1])
    assert run(third, "SELECT count(*) FROM t") == [(int(conflicts),)]


# --- what tests can do with it -------------------------------------------------------------------


def test_an_error_of_the_stand_in_reaches_the_client(redshift, connection):
    def fail(stage, statement):
        raise ZeroDivisionError("a bug")

    redshift.hook = fail
    error = refused(connection, "SELECT 1")
    assert error["M"] == "the stand-in for Redshift failed: ZeroDivisionError: a bug"


def test_stops_while_a_client_waits_for_a_lock(sandbox, tmp_path, connect, monkeypatch):
    with Redshift(tmp_path, sandbox.aws, users={USER: "x"}) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(server.ca))
        first, second = (connect(port=server.port, password="x") for _ in range(2))
        run(first, "CREATE TABLE t (a int)")
        first.autocommit = second.autocommit = False
        run(first, "LOCK t")
        waiting = threading.Event()
        server.hook = lambda when, text: waiting.set() if text == "LOCK TABLE t" else None
        thread = threading.Thread(target=refused, args=(second, "LOCK TABLE t"))
        thread.start()
        assert waiting.wait(60)
    thread.join(60)
    assert not thread.is_alive()
