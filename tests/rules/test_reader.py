"""The reader gives the records that json.loads gives of the whole text, or refuses it."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import READ_BYTES, PipelineError, batches_of, read_records, sizes

PIECE = READ_BYTES
PACKED = gzip.compress(json.dumps([{"a": f"{n:x}" * 9} for n in range(999)]).encode(), mtime=0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reader") / "response"


def read(path: Path, text: str | bytes, piece: int) -> Any:
    """The records in the text, or what is said where it is refused."""
    path.write_bytes(text.encode(errors="surrogatepass") if isinstance(text, str) else text)
    try:
        with sizes(READ_BYTES=piece):
            return list(read_records(path))
    except PipelineError as error:
        return str(error)


def packed(*members: bytes) -> bytes:
    return b"".join(gzip.compress(member, mtime=0) for member in members)


@pytest.mark.parametrize(
    "text",
    [
        '[{"a":1},{"a":2}]',
        ' \t\r\n[ \t\r\n{ "a" : 1 } \t\r\n, \t\r\n{\t"a"\r\n:\n2\n}\n]\r\n \t',
        '\ufeff[{"a":1},{"a":2}]\n',
        '\ufeff \n[{"a":1},{"a":2}]',
        " " * PIECE + '[{"a":1},{"a":2}]',
        packed(b'[{"a":1},{"a":2}]'),
        packed(b'\xef\xbb\xbf[{"a":1},{"a":2}]\n'),
        packed(b'[{"a":1},', b'{"a":2}]'),
        '{"a":1}\n{"a":2}',
        ' \t\r\n\n{ "a" :\t1 } \r\n\n \n{"a":2}\r\n\n',
        '\ufeff{"a":1}\n{"a":2}\n',
        " " * 5_000 + '{"a":1}\n{"a":2}\n',
        packed(b'{"a":1}\n{"a"', b":2}\n"),
    ],
)
def test_the_records_of_an_array_or_one_a_line(path: Path, text: str | bytes) -> None:
    for piece in (1, 2, 3, 7, PIECE):
        assert read(path, text, piece) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("text", ["", "\n", packed(b""), " " * 5_000, "[]", " [ \r\n\t] \n"])
def test_nothing_is_no_record(path: Path, text: str | bytes) -> None:
    for piece in (1, 2, 3, 7, PIECE):
        assert read(path, text, piece) == []


@pytest.mark.parametrize("join", ["[{}]", "{}"], ids=["array", "lines"])
def test_batches_are_bounded(path: Path, join: str) -> None:
    lengths = [1, 1, 1, 1, 1, 200, 1, 1, 300, 300, 1] * 20
    texts = [json.dumps({"a": "x" * size}) for size in lengths]
    path.write_text(join.format((",", "\n")[join == "{}"].join(texts)))
    with sizes(READ_BYTES=250):
        batches = [[len(record["a"]) for record in batch] for batch in batches_of(path)]
    assert list(itertools.chain(*batches)) == lengths
    assert max(map(sum, batches)) <= 1050  # a record that did not end yet, and two pieces more


@pytest.mark.parametrize(
    "text", ['[{"a": 1}, {"a": 2}, {"a": oops}]', '{"a": 1}\n{"a": 2}\n{"a": oops}\n']
)
def test_records_before_a_fault_are_given(path: Path, text: str) -> None:
    path.write_text(text)
    with sizes(READ_BYTES=10):
        records = read_records(path)
        assert [next(records), next(records)] == [{"a": 1}, {"a": 2}]
        with pytest.raises(PipelineError, match="not JSON after record 2"):
            next(records)


# What is said, and the texts that are refused so.
WRONG: dict[str, list[str | bytes]] = {
    "not JSON after record 0": [
        *('{"error": "busy"', '{"error":\n"busy"}', '{"a": 1} {"a": 2}', '{"a": 1},\n{"a": 2}'),
        *("[", '[{"a": "line\nbreak"}]', r'[{"a": "\x41"}]', '[,{"a":1}]', '[{"a":01}]'),
    ],
    "not JSON after record 0: Expecting": ['[{"a":1 "b":2}]'],
    "not JSON after record 1": [
        *('{"a": 1}\n{"a": 2\n', '{"a": 1}\n\xa0\n', "[{}, // comment\n{}]", "[{}: {}]", "[{}}"),
        *("[{},,{}]", '[{"a":1}\x0c]', '[{"a":1},'),
    ],
    "not JSON after record 1: Expecting": ['[{"a":1},]', "[{}, ]", '[{"a":1} {"b":2}]'],
    "not JSON after record 1: it ends early": [
        *("[{}", '[{}, {"a": "te', '[{}, {"a": "te\\ud83', '[{}, {"a": 1', '[{}, {"a": tru')
    ],
    "not JSON after record 2: it ends early": ["[{}, {}, "],
    "not JSON after record 1: Extra data": [
        *("[{}]]", "[{}],", "[{}] []", "[{}][{}]", "[{}]\n<!-- served in 3 ms -->", "[{}]\xa0"),
        *("[{}]\x0b", "[{}]\x0c", "[{}]\u2028", "[{}]" + ",€" * PIECE),
        "[{}]" + " " * 2 * PIECE + "garbage",
    ],
    "record 1 is not an object: null": ["[null]"],
    "record 1 is not an object: [{}]": ["[[{}]]"],
    "record 2 is not an object: 5": ["[{}, 5]"],
    'record 2 is not an object: "text"': ['[{}, "text", {}]'],
    "record 2 is not an object: []": ['{"a": 1}\n[]'],
    "record 2 is not an object: null": ['{"a": 1}\nnull'],
    "not readable after record 0": [
        *('{"a": ' + "1" * 5_000 + "}", b'[{"a": "caf\xe9"}]'),
        *('[{"a": 1e99999999999999999999}]', '{"a":' * 100_000, "[" * 100_000),
        *('[{"a": ' + "[" * 100_000, '[{"a":' * 100_000),
    ],
    "not readable after record 1": ['[{}, {"a": ' + "1" * 5_000 + "}]"],
    "not readable after record ": [
        *(b'{"a": 1}\n{"a": "caf\xe9"}', PACKED[:-9], PACKED[:100], PACKED[:3]),
        *(PACKED[:-8] + bytes(8), PACKED + b"garbage", PACKED[:50] + b"\xff" * 9 + PACKED[59:]),
    ],
    'is no JSON array, it begins "<!DOCTYPE html>': ["<!DOCTYPE html><title>503</title>"],
    'is no JSON array, it begins "5"': ["5"],
    'is no JSON array, it begins "null"': ["null"],
    "is no JSON array": ['"[]"', "é" * PIECE, '[{"a": 1}]'.encode("utf-16")],
}


@pytest.mark.parametrize(
    ("said", "text"), [(said, text) for said, texts in WRONG.items() for text in texts]
)
def test_what_holds_no_objects_is_refused(path: Path, said: str, text: str | bytes) -> None:
    found = read(path, text, PIECE)
    assert said in found
    assert len(found) < 400
    for piece in range(1, len(text) + 2) if len(text) < 50 else ():
        assert isinstance(read(path, text, piece), str), piece
        if isinstance(text, str):
            assert isinstance(read(path, text + "\n" * piece, piece), str), piece


def test_what_follows_an_array_that_ends_with_a_piece(path: Path) -> None:
    """Each record begins otherwise, so that they are decoded one at a time."""
    records: list[dict[str, Any]] = [{f"a{n}": n} for n in range(9)]
    records.append({"z": "x" * (PIECE - len(json.dumps(records)) - len(', {"z": ""}'))})
    text = json.dumps(records)
    assert len(text) == PIECE
    assert read(path, text, PIECE) == records
    for more in ("[]", '[{"id":1}]', "x", ",", "]"):
        assert isinstance(read(path, text + more, PIECE), str), more


# --- any text -----------------------------------------------------------------------------------

VALUES: list[Any] = [
    None, True, False, 0, -7, 10**19, 1.5, -2e-7, 1e300, "", "a", 'q"\\/\b\n', "é\u2028🚀", "[{,]}",
    [], {}, [1, [2, {"id": [3]}]], {"a": {"b": None}}, [[[]]], [{"id": 1}, {"id": 2}],
]  # fmt: skip
SCRAPS = [
    "", *'[]{},:"\\ \n\t\r0-+.eEtn/', "\ufeff", "\u2028", "\0", "null", "NaN", "-Infinity", "1.",
    "\\u", "\\ud83d", "]", "},{", "],[", ",,", "}{", '{"id":', "9" * 5000, "1e99999999999999999999",
]  # fmt: skip
RECORDS = st.lists(
    st.dictionaries(st.sampled_from(["id", "a", "é", ""]), st.sampled_from(VALUES)), max_size=6
)


@st.composite
def arrays(draw: st.DrawFn) -> str:
    """An array of objects as JSON, written in one of several ways, and most often damaged."""
    text = json.dumps(
        draw(RECORDS),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 0, 2, "\t"])),
        separators=draw(st.sampled_from([None, (",", ":"), (" , ", " : ")])),
    )
    text += draw(st.sampled_from(["", "\n", " \r\n\t"]))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(1, len(text)))
        end = draw(st.sampled_from([start, start + 1]) | st.integers(start, len(text)))
        text = text[:start] + draw(st.sampled_from([text[start:end], *SCRAPS])) + text[end:]
    return text


def expected(text: str) -> Any:
    try:
        text.encode()
        records = json.loads(text, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError):
        return None
    is_list = isinstance(records, list)
    return records if is_list and all(isinstance(record, dict) for record in records) else None


def test_any_array(path: Path) -> None:
    """Also behind a long record, so that pieces as the program reads them end around the damage."""
    met = Counter[bool]()

    @given(arrays(), st.sampled_from(["", "\ufeff", " \n"]), st.integers(1, 99), st.integers(0, 99))
    def check(text: str, before: str, piece: int, share: int) -> None:
        wanted = expected(text)
        met[wanted is None] += 1
        long = PIECE - len('[{"id": ""},') - (len(text) + 9) * share // 99
        behind = f'[{{"id": "{"x" * long}"}},' + text[1:]
        for given_text, size in (before + text, piece), (before + text, PIECE), (behind, PIECE):
            found = read(path, given_text, size)
            if isinstance(found, str):
                found = None
            assert repr(found) == repr(expected(given_text.removeprefix("\ufeff"))), size

    check()
    assert min(met[True], met[False]) > sum(met.values()) / 10
