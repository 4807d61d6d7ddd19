"""Prints a first configuration for a JSON API, or for a file, from what one answer holds.

    python conf/draft.py https://api.example.org/v1/orders > conf/orders.yaml
    python conf/draft.py orders.json
    python conf/draft.py source.yaml     a file with only a source: section, for headers

It looks for the records, the next page, a key, and for each field the type that main.py would take
it as. Values are not shown, they may be personal; ${NAME} stays as it is. What it prints is to be
read line by line: it has seen no more than one answer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sequra_challenge import main

USUAL = ("results", "data", "items", "docs")  # what arrays of records are called
WIDTHS = (16, 64, 256, 1024, 4096, 16_384, 65_535)  # of a varchar, in bytes
KEY_COLUMNS = 12  # that are tried together
UNUSABLE = main.RESERVED | {"null"}  # as the name of a column
NUMBER = r"-?\d+(\.\d+)?"

Record = dict[str, Any]
Names = tuple[str, ...]


@dataclass(frozen=True)
class Field:
    """A field of the records, as the column that it would be."""

    path: Names
    values: Sequence[Any]  # one for each row, None where it is not there
    type: str
    comment: str = ""
    name: str = ""

    def is_key(self) -> bool:
        """Whether main.py could tell rows apart by it."""
        comparable = not self.type.startswith(("super", "double", "boolean"))
        return comparable and None not in self.values


# --- look ---------------------------------------------------------------------------------------


def look(source: dict[str, Any]) -> tuple[Any, bool]:
    """The answer of the source, and whether its header Link names a next page."""
    url, has_link = expanded(source["url"]), False
    if urlsplit(url).scheme in ("http", "https"):
        headers = {name: expanded(text) for name, text in (source.get("headers") or {}).items()}
        with main.http_session(headers) as session:
            response = session.get(url, timeout=main.HTTP_TIMEOUT)
        response.raise_for_status()
        content, has_link = response.content, "next" in response.links
    else:
        content = Path(url).expanduser().read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    text = content.decode("utf-8-sig")
    try:
        return json.loads(text, parse_float=Decimal), has_link
    except ValueError:
        lines = filter(str.strip, text.split("\n"))
        return [json.loads(line, parse_float=Decimal) for line in lines], has_link


def expanded(text: str) -> str:
    """The text with environment variables in the place of ${NAME}."""
    return re.sub(r"\$\{(\w+)\}", lambda found: os.environ[found[1]], text)


def find_records(answer: Any, given: str) -> tuple[Names, list[Record]]:
    """The path of the array of records, () where the answer is one or is itself the record."""
    if given or isinstance(answer, list):
        return main.split_path(given), main.dig(answer, main.split_path(given)) or []
    arrays = [
        (path, value)
        for path, value in values_in(answer)
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value)
    ]
    if not arrays:
        return (), [answer]
    return max(arrays, key=lambda found: (found[0][-1] in USUAL, len(found[1])))


def find_next(answer: Any) -> Names:
    """The path of the next page's URL; () where there is none."""
    for path, value in values_in(answer):
        name = path[-2] if path[-1] == "href" else path[-1]
        is_url = isinstance(value, str) and re.match(r"https?://|[/?]", value)
        if (name == "next" and value is None) or (name.lower().startswith("next") and is_url):
            return path
    return ()


def paging_names(answer: Any) -> list[str]:
    """What may tell of pages in another way than by a URL."""
    paths = [main.join_path(p) for p, value in values_in(answer) if not isinstance(value, list)]
    return [path for path in paths if re.search("next|page|cursor|more|offset|token", path, re.I)]


def values_in(value: Any, path: Names = ()) -> Iterator[tuple[Names, Any]]:
    """What objects within objects hold, by path; nothing of arrays."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from values_in(inner, (*path, name))
    elif path:
        yield path, value


# --- columns ------------------------------------------------------------------------------------


def find_fields(rows: Sequence[Record], path: Names = ()) -> Iterator[Field]:
    """The fields of the rows, and of the objects in them."""
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        given = [value for value in values if value is not None]
        # A path cannot hold a name without letters, so that the object around it stays whole.
        is_object = all(isinstance(value, dict) and "" not in value for value in given)
        if is_object and any(given):
            yield from find_fields([value or {} for value in values], (*path, name))
        elif name:
            yield Field((*path, name), values, *type_of(given))


def type_of(values: Sequence[Any]) -> tuple[str, str]:
    """The first type that main.py takes these values as, and a comment."""
    kinds = set(map(type, values))
    if not kinds:
        return "super", "null in all of them"
    if kinds == {bool}:
        return "boolean", ""
    if kinds == {int}:
        most = max(map(abs, values))
        return ("integer", "") if most < 1 << 27 else first_fit(values, "bigint", "decimal(38,0)")
    if kinds <= {int, Decimal}:
        return first_fit(values, "double precision")
    if kinds == {str}:
        longest = max(len(text.encode()) for text in values)
        width = next((width for width in WIDTHS if width >= 2 * longest), WIDTHS[-1])
        texts = f"varchar({width})"
        if all(re.fullmatch(NUMBER, text, re.ASCII) for text in values) and "." in "".join(values):
            return first_fit(values, exact(values), texts)
        type_, _ = first_fit(values, "date", "timestamp", "timestamptz", texts)
        if type_ == "timestamptz" and not all(text.endswith("Z") for text in values):
            return texts, "as a timestamptz it would lose its offset"
        return type_, f"longest {longest} bytes" if type_ == texts else ""
    if kinds == {list}:
        inner = {type(element) for value in values for element in value}
        return "super", "an array of objects" if inner == {dict} else "an array"
    return "super", "" if kinds == {dict} else "values of different kinds"


def first_fit(values: Sequence[Any], *types: str) -> tuple[str, str]:
    """The first of the types that takes all values, else super."""
    for type_ in types:
        try:
            main.fit(main.Column(("value",), "value", type_), list(values))
        except main.Unfit:
            continue
        is_quoted = isinstance(values[0], str) and type_.startswith("decimal")
        return type_, "numbers in quotes" if is_quoted else ""
    return "super", ""


def exact(numbers: Sequence[str]) -> str:
    """A decimal with as many digits behind the point as were seen, and room before it."""
    parts = [number.lstrip("-").partition(".") for number in numbers]
    scale = max(len(fraction) for _, _, fraction in parts)
    precision = scale + 2 * max(len(whole) for whole, _, _ in parts)
    return f"decimal({min(38, max(18, precision))},{scale})"


def with_names(fields: Sequence[Field]) -> list[Field]:
    """The fields with the names of their columns, where these have to be said."""
    plain = [plain_name(field.path) for field in fields]
    times = Counter(plain)
    taken = {name for name in plain if times[name] == 1}
    named = []
    for field, name in zip(fields, plain, strict=True):
        if times[name] > 1 or not re.fullmatch(main.NAME, name) or name in UNUSABLE:
            own = free_name(field.path, taken)
            taken.add(own)
            field = replace(field, name="" if own == name else own)
        named.append(field)
    return named


def plain_name(path: Sequence[str]) -> str:
    """The name that main.py gives a column."""
    return main.parse_column(main.join_path(path), "super").name


def free_name(path: Names, taken: set[str]) -> str:
    """A name that Redshift can hold, for a path."""
    words = [re.sub(r"^\+", "plus_", re.sub("^-", "minus_", name)) for name in path]
    name = plain_name(words)
    name = unicodedata.normalize("NFKD", name.casefold()).encode("ascii", "ignore").decode()[:120]
    name = name if re.match("[a-z_]", name) else f"_{name}"
    name = f"{name}_" if name in UNUSABLE else name
    names = [name, *(f"{name}_{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def find_key(
    fields: Sequence[Field], first: str = "id", beside: Sequence[Field] = ()
) -> list[Field]:
    """The fewest fields that tell all rows apart, with those beside them; [] if there are none."""
    able = sorted(filter(Field.is_key, fields), key=lambda field: field.path != (first,))
    for size in range(1, 4):
        for chosen in combinations(able[:KEY_COLUMNS] if size > 1 else able, size):
            values = [field.values for field in (*beside, *chosen)]
            # Redshift compares texts without the spaces at their end.
            keys = {tuple(str(v).rstrip(" ") for v in row) for row in zip(*values, strict=True)}
            if len(keys) == len(values[0]):
                return list(chosen)
    return []


# --- print --------------------------------------------------------------------------------------


class Dumper(yaml.SafeDumper):
    """YAML in which all else that is no plain text is on one line."""


def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, represent_text)


def as_yaml(value: Any) -> str:
    """A value as it stands in YAML, a text with quotes if it needs some."""
    text = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def table_lines(
    name: str, fields: Sequence[Field], key: Sequence[Field], settings: dict[str, str]
) -> list[str]:
    """The section of a table."""
    names = [field.name or plain_name(field.path) for field in key]
    lines = [f"  {name}:", *(f"    {setting}: {text}" for setting, text in settings.items())]
    missing = "" if key else "  # <-- the columns that no two rows share: none was found"
    lines += [f"    key: [{', '.join(names)}]{missing}", "    columns:"]
    for field in fields:
        suffix = " not null" * (field in key) + (f" as {field.name}" if field.name else "")
        line = f"      {as_yaml(main.join_path(field.path))}: {field.type}{suffix}"
        lines.append(f"{line:<47} # {field.comment}" if field.comment else line)
    return lines


def child_lines(table: str, array: Field, rows: Sequence[Record], key: list[Field]) -> list[str]:
    """The table of an array's elements, [] where main.py could not tell them apart."""
    parents, elements = list[int](), list[Record]()
    for number, found in enumerate(array.values):
        own = sum("position" in element for element in found or [])
        if own not in (0, len(found or [])):
            return []
        for position, element in enumerate(found or [], 1):
            parents.append(number)
            elements.append(({} if own else {"position": position}) | element)
    parent = re.sub("(?<=ch|sh|ss)es$|s$", "", re.sub("ies$", "y", table.partition(".")[2]))
    parent += "_parent" * any(parent in element for element in elements)
    of_parent = [
        replace(f, path=(parent, *f.path), values=[f.values[n] for n in parents], name="")
        for f in key
    ]
    fields = with_names([*of_parent, *find_fields(elements)])
    of_parent, own_fields = fields[: len(key)], fields[len(key) :]
    own_key = find_key(own_fields, "position", of_parent)
    if not own_key:
        return []
    name = f"{table}_{array.name or plain_name(array.path)}"
    at = re.sub("^(null|~)$", r"\\\g<0>", main.join_path(array.path), flags=re.IGNORECASE)
    settings = {"rows": as_yaml(at), "parent": parent}
    return table_lines(name, fields, [*of_parent, *own_key], settings)


def draft(source: dict[str, Any], answer: Any, has_link: bool) -> str:
    """The configuration for a source that gave this answer."""
    at, records = find_records(answer, source.get("records", ""))
    if not records or not all(isinstance(record, dict) for record in records):
        raise ValueError("there are no records, that is objects in an array or one a line")
    found = {"records": main.join_path(at), "next": main.join_path(find_next(answer))}
    source = {name: text for name, text in (found | source).items() if text}
    source = {"url": source["url"]} | source
    names = ["the header Link"] * has_link + paging_names(answer)
    hints = [] if "next" in source else names
    fields = with_names(list(find_fields(records)))
    key = find_key(fields)
    stem = plain_name([Path(urlsplit(source["url"]).path).stem])
    name = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_") or "records"
    table = "public." + re.sub(r"^(?=\d)", "_", name)
    lines = [
        f"# A draft, made from {len(records)} records. Read it line by line, set the lines with",
        "# <--, and look at what --dry-run prints. The lengths are the longest that were seen.",
        "",
        as_yaml({"source": source}),
        *[f"  # Pages that main.py cannot follow? There is: {', '.join(hints)}"] * bool(hints),
        "",
        "staging:",
        "  bucket: my-data-bucket          # <-- created beforehand",
        f"  prefix: {name}",
        "",
        "redshift:",
        "  secret: redshift/credentials    # <-- in Secrets Manager: HOST, PORT, USER, PASSWORD, …",
        "",
        "tables:",
        *table_lines(table, fields, key, {}),
    ]
    for field in fields:
        if field.comment == "an array of objects" and key:
            child = child_lines(table, field, records, key)
            if child:
                lines.append(
                    f"\n# A row for each element of {as_yaml(main.join_path(field.path))}:"
                )
            lines += [f"# {line}" for line in child]
    return "\n".join(lines) + "\n"


def run() -> int:
    """Prints the draft and returns the exit status."""
    parser = argparse.ArgumentParser(description="Print a first configuration for a JSON API.")
    parser.add_argument("source", help="a URL, a file, or a YAML file with only a source: section")
    given = parser.parse_args().source
    main.import_packages()
    try:
        source = {"url": given}
        if given.endswith((".yaml", ".yml")):
            source = yaml.load(Path(given).read_bytes(), yaml.BaseLoader)["source"]
        sys.stdout.write(draft(source, *look(source)))
    except KeyError as error:
        parser.exit(1, f"{given}: {error} is missing, in the file or in the environment\n")
    except (requests.RequestException, OSError, ValueError, TypeError, yaml.YAMLError) as error:
        is_of_http = isinstance(error, requests.RequestException)
        # What requests says has the whole URL, which may be secret.
        reason = main.request_failure(error)[0] if is_of_http else error
        parser.exit(1, f"{given}: {reason}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run())
