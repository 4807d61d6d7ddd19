"""The reader gives the records that json.loads gives of the whole text, or refuses it."""

from __future__ import annotations

import json
import random
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from helpers import READ_CHARACTERS, PipelineError, batches_of, sizes

PIECE = READ_CHARACTERS
SEEDS = range(8)
DOCUMENTS = 500  # for each seed
VALUES: list[Any] = [
    None, True, False, 0, -7, 10**19, 1.5, -2e-7, 1e300, "", "a", 'q"\\/\b\n', "é\u2028🚀", "[{,]}",
    [], {}, [1, [2, {"id": [3]}]], {"a": {"b": None}}, [[[]]], [{"id": 1}, {"id": 2}],
]  # fmt: skip
SCRAPS = [
    *'[]{},:"\\ \n\t\r0-+.eEtn/', "\ufeff", "\u2028", "\0", "null", "NaN", "-Infinity", "1.", "\\u",
    "\\ud83d", "]", "},{", "],[", ",,", "}{", '{"id":', "9" * 5000, "1e99999999999999999999",
]  # fmt: skip


def read(path: Path, text: str, piece: int) -> str | None:
    """The records in the text, or None where it is refused."""
    path.write_bytes(text.encode(errors="surrogatepass"))
    try:
        with sizes(READ_CHARACTERS=piece):
            return repr([record for batch in batches_of(path) for record in batch])
    except PipelineError:
        return None


def expected(text: str) -> str | None:
    try:
        text.encode()
        records = json.loads(text.removeprefix("\ufeff"), parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError):
        return None
    is_good = isinstance(records, list) and all(isinstance(record, dict) for record in records)
    return repr(records) if records and is_good else None


def document(dice: random.Random) -> str:
    """An array of objects as JSON, written in one of several ways, and most often damaged."""
    records = [
        {
            name: dice.choice(VALUES)
            for name in dice.sample(["id", "a", "é", ""], dice.randint(0, 4))
        }
        for _ in range(dice.randint(0, 6))
    ]
    text = json.dumps(
        records,
        ensure_ascii=dice.random() < 0.5,
        indent=dice.choice([None, None, 0, 2, "\t"]),
        separators=dice.choice([None, (",", ":"), (" , ", " : ")]),
    )
    text = dice.choice(["", "", "\ufeff", " \n"]) + text + dice.choice(["", "", "\n", " \r\n\t"])
    for _ in range(dice.choice([0, 0, 1, 1, 2, 3])):
        start, end = sorted(dice.randrange(len(text) + 1) for _ in range(2))
        end = dice.choice([start, start, start + 1, end])
        text = text[:start] + dice.choice(["", *SCRAPS, text[start:end]]) + text[end:]
    return text


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_documents(tmp_path: Path, seed: int) -> None:
    dice, met = random.Random(seed), Counter[bool]()
    for _ in range(DOCUMENTS):
        text = document(dice)
        if not text.lstrip("\ufeff \t\r\n").startswith("["):
            continue  # lines, or nothing at all
        wanted = expected(text)
        met[wanted is None] += 1
        for piece in (1, PIECE, *(dice.randint(1, len(text) + 2) for _ in range(3))):
            got = read(tmp_path / "response", text, piece)
            assert got == wanted, (text[:300], piece)
    assert min(met[True], met[False]) > DOCUMENTS / 10


@pytest.mark.parametrize("seed", SEEDS)
def test_the_end_of_a_piece_anywhere(tmp_path: Path, seed: int) -> None:
    """A long text before the damage, so that pieces as the program reads them end around it."""
    dice, met = random.Random(seed), Counter[bool]()
    for _ in range(DOCUMENTS // 10):
        text = document(dice)
        if not text.startswith("["):
            continue
        long = PIECE * dice.randint(1, 3) - dice.randint(0, len(text) + 9) - len('[{"id": ""},')
        text = f'[{{"id": "{"x" * long}"}},' + text[1:]
        wanted = expected(text)
        met[wanted is None] += 1
        assert read(tmp_path / "response", text, PIECE) == wanted, text[long:]
    assert min(met[True], met[False]) > 2


NO_ARRAYS = {
    "comma first": '[,{"id":1},{"id":2}]',
    "two commas": '[{"id":1},,{"id":2}]',
    "comma last": '[{"id":1},{"id":2},]',
    "no comma": '[{"id":1} {"id":2}]',
    "two arrays": '[{"id":1}][{"id":2}]',
    "garbage behind": '[{"id":1}]garbage',
    "comma behind": '[{"id":1}],',
    "bracket behind": '[{"id":1}]]',
    "no end": '[{"id":1}',
    "no end after a comma": '[{"id":1},',
    "wrong end": '[{"id":1}}',
    "leading zero": '[{"id":01}]',
    "form feed": '[{"id":1}\x0c]',
}


@pytest.mark.parametrize("text", NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_what_is_no_array(tmp_path: Path, text: str) -> None:
    assert expected(text) is None
    for piece in range(1, len(text) + 2):
        for more in ("", " " * 40, "\n" * piece):
            assert read(tmp_path / "response", text + more, piece) is None, piece


def test_what_follows_an_array_that_ends_with_a_piece(tmp_path: Path) -> None:
    """Each record begins otherwise, so that they are decoded one at a time."""
    records: list[dict[str, Any]] = [{f"a{n}": n} for n in range(9)]
    array = json.dumps(records)
    last = json.dumps({"z": "x" * (PIECE - len(array) - len(', {"z": ""}'))})
    text = f"{array[:-1]}, {last}]"
    assert len(text) == PIECE
    assert read(tmp_path / "response", text, PIECE) == expected(text) is not None
    for more in ("[]", '[{"id":1}]', "x", ",", "]"):
        assert read(tmp_path / "response", text + more, PIECE) is None, more
