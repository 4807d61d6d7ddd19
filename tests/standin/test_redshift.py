"""What the stand-in for Redshift does, seen through the driver, libpq and PostgreSQL itself."""

import gzip
import json
import ssl
import threading

import boto3
import psutil
import psycopg
import pytest
import redshift_connector
from moto.server import ThreadedMotoServer
from redshift_connector.utils.oids import RedshiftOID

from redshift import ISOLATION, SNAPSHOT, DropConnection, Redshift, RedshiftError

USER, PASSWORD = "loader", "Loader-1"
COPY = "COPY {} FROM 's3://stage/{}' IAM_ROLE default REGION 'eu-west-1' CSV "


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="x",
        aws_secret_access_key="x",
    )
    client.create_bucket(Bucket="stage")
    yield client
    server.stop()


@pytest.fixture(scope="module")
def redshift(s3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("redshift")
    with Redshift(folder, s3.meta.endpoint_url, users={USER: PASSWORD}) as server:
        yield server


@pytest.fixture
def connect(redshift, monkeypatch):
    """Open connections as the program does; they are closed after the test."""
    monkeypatch.setenv("SSL_CERT_FILE", str(redshift.ca))
    connections = []

    def open_connection(**changes):
        arguments = {
            "host": redshift.host,
            "port": redshift.port,
            "database": "dev",
            "user": USER,
            "password": PASSWORD,
            "ssl": True,
            "sslmode": "verify-full",
            "timeout": 30,
        }
        connection = redshift_connector.connect(**arguments | changes)
        connection.autocommit = True
        connections.append(connection)
        return connection

    yield open_connection
    redshift.hook = None
    redshift.settings = {}
    for connection in connections:
        if connection._sock:
            connection.close()
    with redshift.connect() as truth:
        # The driver does not wait for the server when it leaves.
        truth.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = %s",
            [USER],
        )
        truth.execute(
            "DROP SCHEMA public CASCADE; CREATE SCHEMA public;"
            f"GRANT CREATE, USAGE ON SCHEMA public TO {USER}; TRUNCATE sandbox.load_errors"
        )


@pytest.fixture
def connection(connect):
    return connect()


def run(connection, statement, parameters=None):
    """Run a statement and return its rows, if it has any."""
    cursor = connection.cursor()
    cursor.execute(statement, parameters)
    return [tuple(row) for row in cursor.fetchall()] if cursor.description else None


def refused(connection, statement):
    """The error, as the driver's dictionary, that a statement ends in."""
    with pytest.raises(redshift_connector.error.Error) as caught:
        run(connection, statement)
    return caught.value.args[0]


def stage(s3, key, text):
    s3.put_object(Bucket="stage", Key=key, Body=text.encode() if isinstance(text, str) else text)


# --- logging in ----------------------------------------------------------------------------------


def test_wrong_password(connect):
    with pytest.raises(redshift_connector.InterfaceError, match="password authentication failed"):
        connect(password="wrong")


def test_unknown_user(connect):
    with pytest.raises(redshift_connector.InterfaceError, match='failed for user "nobody"'):
        connect(user="nobody")


def test_unknown_database(connect):
    with pytest.raises(redshift_connector.ProgrammingError, match="3D000"):
        connect(database="nowhere")


def test_without_tls(connect):
    with pytest.raises(redshift_connector.InterfaceError, match="SSL off"):
        connect(ssl=False)


def test_certificate_is_checked(connect, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(redshift_connector.InterfaceError) as caught:
        connect()
    assert "certificate verify failed" in str(caught.value.args)


def test_certificate_for_another_host(s3, tmp_path, connect, monkeypatch):
    with Redshift(tmp_path, s3.meta.endpoint_url, certificate_host="elsewhere.test") as other:
        monkeypatch.setenv("SSL_CERT_FILE", str(other.ca))
        with pytest.raises(redshift_connector.InterfaceError) as caught:
            connect(port=other.port)
        assert "Hostname mismatch" in str(caught.value.args)
        context = ssl.create_default_context(cafile=other.ca)
    assert context.cert_store_stats()["x509_ca"] == 1


def test_reports_redshifts_version(connection):
    assert (b"server_version", b"8.0.2") in connection.parameter_statuses


# --- COPY ----------------------------------------------------------------------------------------


def test_copy_round_trip(s3, redshift, connection):
    run(
        connection,
        "CREATE TABLE t (i integer, v varchar(60), n decimal(8,2), f float8, b boolean, d date,"
        " ts timestamp, tz timestamptz, s super)",
    )
    nested = {"key": ["a,b", 'q"', "\n", 1.5, None, True]}
    text = 'CR\r LF\n CRLF\r\n "quoted", tab\t back\\slash 😀'
    quoted = ['"{}"'.format(value.replace('"', '""')) for value in (text, json.dumps(nested))]
    stage(
        s3,
        "t/1.gz",
        gzip.compress(
            (
                "i,v,n,f,b,d,ts,tz,s\r\n"
                f"1,{quoted[0]},20.259,1e3,yes,2024-02-29,2024-01-02T03:04:05.678,"
                f"2024-01-02T03:04:05Z,{quoted[1]}\r\n"
                "2,,,,,,,,\r\n"
                "3,\\N,,,,,,,\r\n"
                '4,"\\N",,,,,,,'
            ).encode()
        ),
    )
    stage(
        s3,
        "t/manifest",
        json.dumps(
            {
                "entries": [
                    {"url": "s3://stage/t/1.gz", "mandatory": True},
                    {"url": "s3://stage/t/absent.gz", "mandatory": False},
                ]
            }
        ),
    )
    cursor = connection.cursor()
    cursor.execute(
        """COPY "public"."T" (i, "V", n, f, b, d, ts, tz, s) FROM 's3://stage/t/manifest'
        IAM_ROLE 'arn:aws:iam::123456789012:role/load' REGION 'eu-west-1' MANIFEST GZIP CSV
        IGNOREHEADER 1 TIMEFORMAT 'auto' DATEFORMAT AS 'auto' COMPUPDATE OFF STATUPDATE OFF"""
    )
    assert cursor.rowcount == -1
    assert run(connection, "SELECT pg_last_copy_count()") == [(4,)]
    with redshift.connect() as truth:
        rows = truth.execute(
            "SELECT i, v, n::text, f, b, d::text, ts::text, tz::text, s FROM t ORDER BY i"
        ).fetchall()
    assert rows == [
        (1, text, "20.25", 1000.0, True, "2024-02-29", "2024-01-02 03:04:05.678",
         "2024-01-02 03:04:05+00", nested),
        (2, "", None, None, None, None, None, None, None),
        (3, None, None, None, None, None, None, None, None),
        (4, None, None, None, None, None, None, None, None),
    ]  # fmt: skip
    cursor.execute("SELECT s FROM t WHERE i = 1")
    assert cursor.description[0][1] == RedshiftOID.SUPER
    assert json.loads(cursor.fetchone()[0]) == nested


def test_copy_loads_missing_columns_with_their_default(s3, connection):
    run(connection, "CREATE TABLE t (a integer, b varchar(5) DEFAULT 'b', c varchar(5))")
    stage(s3, "part", "1\r2\n")
    run(connection, COPY.format("t (a)", "part"))
    assert run(connection, "SELECT * FROM t ORDER BY a") == [(1, "b", None), (2, "b", None)]


def test_copy_with_another_null(s3, connection):
    run(connection, "CREATE TEMP TABLE t (a integer, b varchar(5), c varchar(5))")
    stage(s3, "null", "1,nil,\n2,\\N,x")
    run(connection, COPY.format("t", "null") + "NULL AS 'nil'")
    assert run(connection, "SELECT * FROM t ORDER BY a") == [(1, None, ""), (2, "\\N", "x")]


BAD_VALUES = [
    ("varchar(3)", "éé", 1204, "String length exceeds DDL length"),
    ("varchar(9)", "a\0b", 1218, "Invalid null byte"),
    ("varchar(9)", b"\xff", 1220, "invalid or unsupported UTF8"),
    ("varchar(9)", b"\xed\xa0\x80", 1220, "invalid or unsupported UTF8"),
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


@pytest.mark.parametrize(("data_type", "value", "code", "reason"), BAD_VALUES)
def test_copy_refuses(s3, connection, data_type, value, code, reason):
    run(connection, f"CREATE TABLE t (n integer, v {data_type})")
    value = value if isinstance(value, bytes) else value.encode()
    field = b'"' + value.replace(b'"', b'""') + b'"'
    stage(s3, "bad", b"n,v\n1," + field + b"\n")
    error = refused(connection, COPY.format("t", "bad") + "IGNOREHEADER 1")
    assert error["M"].startswith("Load into table 't' failed.  Check 'sys_load_error_detail'")
    assert error["C"] == "XX000"
    assert run(connection, "SELECT count(*), pg_last_copy_count() FROM t") == [(0, 0)]
    details = run(
        connection,
        "SELECT file_name, column_name, error_code, error_message FROM sys_load_error_detail",
    )
    assert details[0][:3] == ("s3://stage/bad", "v", code)
    assert reason in details[0][3]


@pytest.mark.parametrize(
    ("data_type", "value", "expected"),
    [
        ("varchar(4)", "éé", "éé"),
        ("bigint", "-9223372036854775808", -9223372036854775808),
        ("smallint", "+0032767", 32767),
        ("timestamptz", "2023-01-01 12:00:00+02", "2023-01-01 10:00:00+00"),
        ("boolean", "n", "false"),
        ("real", "3.4e38", "3.4e+38"),
        ("decimal", "-.9", "0"),
        ("super", "1", "1"),
    ],
)
def test_copy_accepts(s3, connection, data_type, value, expected):
    run(connection, f"CREATE TABLE t (v {data_type})")
    stage(s3, "good", value)
    run(connection, COPY.format("t", "good"))
    assert run(connection, "SELECT v::text FROM t") == [(str(expected),)]


def test_a_failed_copy_says_where(s3, connection):
    run(connection, "CREATE TABLE t (n integer, v varchar(3))")
    stage(s3, "bad", 'n,v\n1,"a\nb"\n2,four\n3,x\n')
    refused(connection, COPY.format("t", "bad") + "IGNOREHEADER 1")
    copy_id = run(connection, "SELECT pg_last_copy_id()")[0][0]
    assert run(
        connection,
        "SELECT query, filename, line_number, colname, type, col_length, raw_line,"
        " raw_field_value, err_code, err_reason FROM stl_load_errors",
    ) == [(copy_id, "s3://stage/bad", 4, "v", "varchar", "3", "2,four\n", "four", 1204,
           "String length exceeds DDL length")]  # fmt: skip
    assert run(
        connection, "SELECT query_id, column_type, column_length FROM sys_load_error_detail"
    ) == [(copy_id, "varchar", "3")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1,2,3", "Extra column(s) found"),
        ("1", "Delimiter not found"),
        ("", "Delimiter not found"),
        ('1,"x"y', "Invalid quote formatting for CSV"),
    ],
)
def test_copy_refuses_rows_of_another_shape(s3, connection, row, reason):
    run(connection, "CREATE TABLE t (n integer, v varchar(3))")
    stage(s3, "shape", f"1,a\n{row}\n")
    refused(connection, COPY.format("t", "shape"))
    details = run(connection, "SELECT line_number, error_message FROM sys_load_error_detail")
    assert details[0][0] == 2
    assert details[0][1].startswith(reason)


def test_last_copy_id_survives_a_failed_copy_but_no_rollback(s3, connection):
    run(connection, "CREATE TABLE t (n integer)")
    assert run(connection, "SELECT pg_last_copy_id(), pg_last_copy_count()") == [(-1, 0)]
    stage(s3, "good", "1\n2\n")
    stage(s3, "bad", "x")
    run(connection, COPY.format("t", "good"))
    first, count = run(connection, "SELECT pg_last_copy_id(), pg_last_copy_count()")[0]
    assert (first > 0, count) == (True, 2)
    refused(connection, COPY.format("t", "bad"))
    failed, count = run(connection, "SELECT pg_last_copy_id(), pg_last_copy_count()")[0]
    assert (failed > first, count) == (True, 0)

    connection.autocommit = False
    run(connection, COPY.format("t", "good"))
    assert run(connection, "SELECT pg_last_copy_id()")[0][0] > failed
    connection.rollback()
    assert run(connection, "SELECT pg_last_copy_id(), count(*) FROM t") == [(failed, 2)]
    refused(connection, COPY.format("t", "bad"))
    assert refused(connection, "SELECT 1")["C"] == "25P02"
    connection.rollback()
    assert run(connection, "SELECT pg_last_copy_id()") == [(failed,)]


def test_copy_needs_its_files(s3, connection):
    run(connection, "CREATE TABLE t (n integer)")
    entries = [{"url": "s3://stage/absent", "mandatory": True}]
    stage(s3, "manifest", json.dumps({"entries": entries}))
    error = refused(connection, COPY.format("t", "manifest") + "MANIFEST")
    assert error["M"] == "The specified S3 prefix 's3://stage/absent' does not exist"
    error = refused(connection, COPY.format("t", "no/such/manifest") + "MANIFEST")
    assert error["M"] == "Problem reading manifest file"
    assert "does not exist" in refused(connection, COPY.format("t", "no/such/prefix"))["M"]
    elsewhere = COPY.format("t", "x").replace("stage", "no-such-bucket")
    assert "does not exist" in refused(connection, elsewhere)["M"]
    assert "inflate" in refused(connection, COPY.format("t", "manifest") + "GZIP")["M"]
    assert run(connection, "SELECT pg_last_copy_id()") == [(-1,)]


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        (COPY.format("t", "x") + "FILLRECORD", "42601"),
        (COPY.format("t", "x") + "CSV", "42601"),
        ("COPY t TO 's3://stage/x' CSV", "42601"),
        ("COPY t FROM STDIN", "42601"),
        ("COPY t FROM 's3://stage/x' REGION 'x' CSV", "XX000"),
        ("COPY t FROM 's3://stage/x' IAM_ROLE default CSV", "XX000"),
        (COPY.format("t", "x") + "TIMEFORMAT 'AUTO'", "0A000"),
        (COPY.format("absent", "x"), "42P01"),
        (COPY.format("t (b)", "x"), "42703"),
    ],
)
def test_copy_refuses_statement(connection, statement, code):
    run(connection, "CREATE TABLE t (a integer)")
    assert refused(connection, statement)["C"] == code


# --- tables --------------------------------------------------------------------------------------


def test_byte_length_is_kept_by_like(connection):
    run(connection, "CREATE TABLE t (a varchar(3) NOT NULL, b varchar, c text, d varchar(max))")
    run(connection, "CREATE TEMP TABLE s (LIKE public.t INCLUDING DEFAULTS)")
    for table in "t", "s":
        run(connection, f"INSERT INTO {table} VALUES ('éa', 'x', 'x', 'x')")
        for values in "'éé', '', '', ''", "'abcd', '', '', ''":
            error = refused(connection, f"INSERT INTO {table} VALUES ({values})")
            assert error["M"] == "Value too long for character type"
        for column in "b", "c":
            sized = f"INSERT INTO {table} (a, {column}) VALUES ('', repeat('é', %s))"
            run(connection, sized % 128)
            assert refused(connection, sized % 129)["M"] == "Value too long for character type"
        run(connection, f"INSERT INTO {table} (a, d) VALUES ('', repeat('x', 65535))")
    assert refused(connection, "CREATE TABLE u (a varchar(65536))")["C"] == "22023"


def test_redshifts_clauses_are_taken_and_keys_not_enforced(redshift, connection):
    run(
        connection,
        """CREATE TABLE IF NOT EXISTS "T" ( -- a comment, with a ) in it
            "Id" bigint PRIMARY KEY ENCODE az64, "other id" int UNIQUE REFERENCES public.x (id),
            v character varying(30) DEFAULT 'it''s; "PRIMARY KEY"' ENCODE zstd, n decimal,
            at timestamp with time zone DEFAULT sysdate
        ) BACKUP NO DISTSTYLE KEY DISTKEY("Id") COMPOUND SORTKEY (at, "other id");""",
    )
    run(connection, 'INSERT INTO t ("ID", "other id", n) VALUES (1, 1, 1.4), (1, 1, 1)')
    assert run(connection, "SELECT id, v, n FROM t") == [(1, 'it\'s; "PRIMARY KEY"', 1)] * 2
    assert refused(connection, 'INSERT INTO t ("other id", n) VALUES (1, 1)')["C"] == "23502"


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE t (a int) DISTKEY (b)",
        "CREATE TABLE t (a int, b int) DISTKEY (a, b)",
        "CREATE TABLE t (a int) SORTKEY (a, c)",
        "CREATE TABLE t (a int) WITH (fillfactor = 10)",
        "CREATE TABLE t (\n  a int CHECK (a > 0)\n)",
        "ALTER TABLE known ALTER COLUMN a SET DATA TYPE bigint",
        "CREATE TABLE t (a jsonb)",
        "CREATE TABLE t (a json)",
        "CREATE TABLE t (a uuid)",
        "CREATE TABLE t (a bytea)",
        "CREATE TABLE t (a char(3))",
        "CREATE TABLE t (a serial)",
        "CREATE TABLE t (a bigserial)",
        "CREATE TABLE t (a int[])",
        "CREATE TABLE t (a int GENERATED ALWAYS AS IDENTITY)",
        "CREATE TABLE t (a int) INHERITS (known)",
        "CREATE UNLOGGED TABLE t (a int)",
        "INSERT INTO known VALUES (1) ON CONFLICT DO NOTHING",
        "INSERT INTO known VALUES (1) RETURNING a",
        "CREATE INDEX i ON known (a)",
        "CREATE UNIQUE INDEX i ON known (a)",
        "ALTER TABLE known ADD COLUMN IF NOT EXISTS b int",
        "ALTER TABLE known ADD COLUMN b uuid",
        "ALTER TABLE known ADD COLUMN b int, ADD COLUMN c int",
        "ALTER TABLE known ADD COLUMN b int NOT NULL",
        "ALTER TABLE known ADD PRIMARY KEY (a)",
        "CREATE TRIGGER x AFTER INSERT ON known EXECUTE FUNCTION f()",
        "SELECT '{}'::jsonb",
        "SELECT CAST('{}' AS json)",
        "SELECT ARRAY[1]",
        "SELECT * FROM known, LATERAL (SELECT 1) x",
        "SELECT count(*) FILTER (WHERE a > 1) FROM known",
        "SELECT * FROM known FOR UPDATE",
        "SELECT DISTINCT ON (a) a FROM known",
    ],
)
def test_refused_statement(redshift, connection, statement):
    run(connection, "CREATE TABLE known (a int)")
    assert refused(connection, statement)["C"] in ("42601", "42703", "0A000")
    with redshift.connect() as truth:
        tables = truth.execute(
            "SELECT relname, relnatts FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        ).fetchall()
    assert tables == [("known", 1)], "PostgreSQL has not seen it"


def test_words_in_quotes_and_comments_are_not_syntax(connection):
    run(connection, """CREATE TABLE t ("on conflict" int, "returning" varchar(30), uuid int)""")
    run(connection, "INSERT INTO t VALUES (1, 'RETURNING -- x', 2) -- ON CONFLICT DO NOTHING")
    statement = """SELECT "returning" /* FOR UPDATE */, "On Conflict" FROM t WHERE 'a''[]' <> ''"""
    assert run(connection, statement) == [("RETURNING -- x", 1)]


def test_parameters_are_passed_on(connection):
    run(connection, "CREATE TABLE t (a int, b varchar(10))")
    for value in "x", "y", None:
        run(connection, "INSERT INTO t VALUES (%s, %s)", (1, value))
    assert run(connection, "SELECT b FROM t WHERE a = %s AND b > %s", (1, "x")) == [("y",)]


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


def test_identity_columns(s3, connection):
    run(
        connection,
        "CREATE TABLE t (n bigint IDENTITY(5,2), a int,"
        " m int GENERATED BY DEFAULT AS IDENTITY(1, 1))",
    )
    run(connection, "INSERT INTO t (a) VALUES (1), (2)")
    run(connection, "INSERT INTO t (a, m) VALUES (3, 9)")
    assert run(connection, "SELECT n, m FROM t ORDER BY a") == [(5, 1), (7, 2), (9, 9)]
    assert refused(connection, "INSERT INTO t (n) VALUES (1)")["C"] == "428C9"
    run(connection, "CREATE TEMP TABLE s (LIKE t INCLUDING DEFAULTS)")  # a plain column there
    stage(s3, "identity", "1\n")
    assert refused(connection, COPY.format("s (a)", "identity"))["C"] == "23502"


def test_varchars_that_differ_in_spaces_at_the_end_are_equal(connection):
    run(connection, "CREATE TABLE t (a varchar(5), n int)")
    run(connection, "CREATE TEMP TABLE s (LIKE t)")
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


def test_svv_columns_can_be_closed(redshift, connect, connection):
    run(connection, "CREATE TABLE t (a int)")
    redshift.settings = {"sandbox.svv_columns": "closed"}
    other = connect()
    assert run(other, "SELECT count(*) FROM svv_columns") == [(0,)]
    assert run(other, "SELECT count(*) FROM t") == [(0,)]
    assert run(connection, "SELECT count(*) FROM svv_columns") == [(1,)]


def test_svv_columns(connection):
    run(
        connection,
        "CREATE TABLE t (s super, v varchar(7) NOT NULL, n decimal(9,2), at timestamptz)",
    )
    assert run(
        connection,
        "SELECT column_name, ordinal_position, is_nullable, data_type, character_maximum_length,"
        " numeric_precision, numeric_scale FROM svv_columns"
        " WHERE table_schema = 'public' AND table_name = 't' ORDER BY 2",
    ) == [
        ("s", 1, "YES", "super", None, None, None),
        ("v", 2, "NO", "character varying", 7, None, None),
        ("n", 3, "YES", "numeric", None, 9, 2),
        ("at", 4, "YES", "timestamp with time zone", None, None, None),
    ]


# --- transactions --------------------------------------------------------------------------------


def test_truncate_commits(redshift, connection):
    run(connection, "CREATE TABLE t (a int)")
    run(connection, "CREATE TABLE other (a int)")
    run(connection, "INSERT INTO t VALUES (1)")
    connection.autocommit = False
    run(connection, "INSERT INTO other VALUES (1)")
    run(connection, "TRUNCATE t")
    assert not connection.in_transaction
    connection.rollback()
    with redshift.connect() as truth:
        counts = truth.execute("SELECT (SELECT count(*) FROM t), (SELECT count(*) FROM other)")
        assert counts.fetchone() == (0, 1)


def test_the_second_writer_of_an_empty_table_fails(connect):
    first, second = connect(), connect()
    run(first, "CREATE TABLE t (a int)")
    for connection in first, second:
        connection.autocommit = False
        run(connection, "DELETE FROM t")
        run(connection, "INSERT INTO t VALUES (1)")
    first.commit()
    with pytest.raises(redshift_connector.ProgrammingError) as caught:
        second.commit()
    error = caught.value.args[0]
    assert (error["C"], error["M"]) == ("XX000", "1023")
    assert error["D"].startswith("Serializable isolation violation on table - ")
    second.rollback()
    assert run(second, "SELECT count(*) FROM t") == [(1,)]


def test_with_snapshots_only_writers_of_the_same_rows_conflict(connect, redshift):
    redshift.settings = {ISOLATION: SNAPSHOT}
    first, second, third = connect(), connect(), connect()
    run(first, "CREATE TABLE t (a int)")
    for connection in first, second:
        connection.autocommit = False
        run(connection, "DELETE FROM t")
        run(connection, "INSERT INTO t VALUES (1)")
    first.commit()
    second.commit()
    assert run(third, "SELECT count(*) FROM t") == [(2,)]
    run(first, "SELECT count(*) FROM t")
    run(third, "DELETE FROM t")
    error = refused(first, "DELETE FROM t")
    text = "could not complete because of conflict with concurrent transaction"
    assert (error["C"], error["M"], error.get("D")) == ("XX000", text, None)


def test_a_wait_for_a_lock_ends_with_the_statement_timeout(connect):
    first, second = connect(), connect()
    run(first, "CREATE TABLE t (a int)")
    first.autocommit = False
    run(first, "LOCK t")
    run(second, "SET statement_timeout TO 300")
    assert refused(second, "SELECT count(*) FROM t")["C"] == "57014"


def test_lock_first_makes_writers_take_turns(connect, redshift):
    first, second = connect(), connect()
    run(first, "CREATE TABLE t (a int)")
    first.autocommit = second.autocommit = False
    run(first, "LOCK t")
    waiting = threading.Event()
    redshift.hook = lambda when, text: waiting.set() if text == "LOCK TABLE t" else None
    rows = []

    def write():
        run(second, "LOCK TABLE t")
        rows.extend(run(second, "SELECT count(*) FROM t"))
        run(second, "INSERT INTO t VALUES (2)")
        second.commit()

    thread = threading.Thread(target=write)
    thread.start()
    assert waiting.wait(10)
    run(first, "INSERT INTO t SELECT count(*) FROM t")
    first.commit()
    thread.join(10)
    assert rows == [(1,)], "the second sees what the first has committed, and does not fail"


def test_deadlock(connect):
    first, second = connect(), connect()
    run(first, "CREATE TABLE a (a int)")
    run(first, "CREATE TABLE b (a int)")
    first.autocommit = second.autocommit = False
    run(first, "LOCK a")
    run(second, "LOCK b")
    errors = []

    def lock(connection, table):
        try:
            run(connection, f"LOCK {table}")
        except redshift_connector.ProgrammingError as error:
            errors.append(error.args[0]["M"])
            connection.rollback()

    thread = threading.Thread(target=lock, args=(first, "b"))
    thread.start()
    lock(second, "a")
    thread.join(10)
    assert errors == ["deadlock detected"]


# --- what tests can do with it -------------------------------------------------------------------


def test_statements_are_recorded_as_they_are_run(redshift, connection):
    redshift.statements.clear()
    run(connection, "SELECT 1")
    run(connection, "SELECT 1")
    refused(connection, "SELECT nonsense")
    refused(connection, "CREATE INDEX i ON t (a)")
    assert redshift.statements == [
        "SELECT 1", "SELECT 1", "SELECT nonsense", "CREATE INDEX i ON t (a)"]  # fmt: skip


@pytest.mark.parametrize(("when", "rows"), [("before", 0), ("after", 1)])
def test_a_hook_can_drop_the_connection(redshift, connection, when, rows):
    run(connection, "CREATE TABLE t (a int)")

    def drop(stage, statement):
        if (stage, statement) == (when, "commit"):
            raise DropConnection

    redshift.hook = drop
    connection.autocommit = False
    run(connection, "INSERT INTO t VALUES (1)")
    with pytest.raises(redshift_connector.InterfaceError):
        connection.commit()
    with redshift.connect() as truth:
        assert truth.execute("SELECT count(*) FROM t").fetchone() == (rows,)
        truth.execute("SET lock_timeout = '1s'; LOCK t")  # nothing is left of the session


@pytest.mark.parametrize(("when", "rows"), [("before", 0), ("after", 1)])
def test_a_hook_can_refuse_a_statement(redshift, connection, when, rows):
    run(connection, "CREATE TABLE t (a int)")

    def refuse(stage, statement):
        if (stage, statement[:6]) == (when, "INSERT"):
            raise RedshiftError("XX000", "could not open relation with OID 1", "gone")

    redshift.hook = refuse
    error = refused(connection, "INSERT INTO t VALUES (1)")
    assert (error["C"], error["M"]) == ("XX000", "could not open relation with OID 1")
    assert run(connection, "SELECT count(*) FROM t") == [(rows,)]
    connection.autocommit = False
    refused(connection, "INSERT INTO t VALUES (2)")
    assert refused(connection, "SELECT 1")["C"] == "25P02"


def test_an_error_of_the_stand_in_reaches_the_client(redshift, connection):
    def fail(stage, statement):
        raise ZeroDivisionError("a bug")

    redshift.hook = fail
    error = refused(connection, "SELECT 1")
    assert error["M"] == "the stand-in for Redshift failed: ZeroDivisionError: a bug"


def test_stops_while_a_client_waits_for_a_lock(s3, tmp_path, connect, monkeypatch):
    with Redshift(tmp_path, s3.meta.endpoint_url, users={USER: PASSWORD}) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(server.ca))
        first, second = connect(port=server.port), connect(port=server.port)
        run(first, "CREATE TABLE t (a int)")
        first.autocommit = second.autocommit = False
        run(first, "LOCK t")
        waiting = threading.Event()
        server.hook = lambda when, text: waiting.set() if text == "LOCK TABLE t" else None
        thread = threading.Thread(target=refused_quietly, args=(second, "LOCK TABLE t"))
        thread.start()
        assert waiting.wait(10)
        process = psutil.Process(server.cluster.get_pid())
        threads = threading.active_count()
    thread.join(10)
    assert threading.active_count() < threads
    # In a container without an init nobody reaps it.
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def refused_quietly(connection, statement):
    with pytest.raises(redshift_connector.error.Error):
        run(connection, statement)


# --- libpq ---------------------------------------------------------------------------------------


@pytest.fixture
def libpq(redshift, connect):
    """How libpq, which psql and psycopg are made of, connects."""
    return {
        "host": redshift.host,
        "port": redshift.port,
        "user": USER,
        "password": PASSWORD,
        "dbname": redshift.database,
        "sslmode": "verify-full",
        "sslrootcert": str(redshift.ca),
    }


def test_parameters_in_one_round_trip(libpq):
    with psycopg.connect(**libpq) as connection:
        connection.execute("CREATE TABLE t (a int, s super)")
        connection.execute("INSERT INTO t VALUES (%s, %s)", [1, '{"a": 1}'])
        connection.execute("TRUNCATE t", prepare=True)
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


def test_stops_at_the_first_error(redshift, libpq):
    with psycopg.connect(**libpq, autocommit=True) as connection:
        with pytest.raises(psycopg.errors.SyntaxError, match="does not support RETURNING"):
            connection.execute("CREATE TABLE t (a int); SELECT 1 FROM t RETURNING 1; DROP TABLE t")
        assert redshift.statements[-1] == "SELECT 1 FROM t RETURNING 1"
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


def test_without_encryption(libpq):
    with pytest.raises(psycopg.OperationalError, match="SSL off"):
        psycopg.connect(**libpq | {"sslmode": "disable"})
