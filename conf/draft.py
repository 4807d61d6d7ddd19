"""Prints a first configuration for a JSON API, or for a file, from what one answer holds.

    python conf/draft.py https://api.example.org/v1/orders > orders.yaml
    python conf/draft.py orders.json
    python conf/draft.py source.yaml     a file with only a source: section, for headers or a body

It looks for the records, the next page, a key, and for each field the type that main.py would take
it as. The records' values are not shown, they may be personal; ${NAME} stays as it is. What it
prints is to be read line by line, as it has seen no more than one answer, before it goes to conf/.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import chain, combinations
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sequra_challenge import main

USUAL = ("results", "data", "items", "docs")  # what arrays of records are called
PAGES = (10, 20, 25, 30, 50, 100, 200, 250, 500, 1000)  # how many records APIs give at a time
TOTAL = "(^|_)(total|(count|found|hits|matched)(_|$))"  # in the name of a number of records
WIDTHS = (16, 64, 256, 1024, 4096, 16_384, 65_535)  # of a varchar, in bytes
KEY_COLUMNS = 12  # that are tried together
UNUSABLE = main.RESERVED | {"null"}  # as the name of a column
TIMES = ("date", "timestamp", "timestamptz")
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


def read_source(file: str) -> tuple[dict[str, Any], main.Source]:
    """The section source: of a file, as it is written and as main.py takes it."""
    faults: list[str] = []
    given = {"url": file}
    if not main.is_http(file):
        path = Path(file).expanduser()
        if not path.is_file():
            raise main.PipelineError("no such file, nor a URL of http or https")
        if path.suffix in (".yaml", ".yml"):
            document = yaml.load(path.read_bytes(), yaml.BaseLoader)
            given = main.read_mapping(document, "", faults).get("source", {})
    source: main.Source = main.read_section(main.Source, given, "source", faults)
    faults += [fault for is_wrong, fault in main.source_faults(source) if is_wrong]
    if faults:
        raise main.ConfigError("\n  ".join(["", *faults]))
    main.hide_credentials(source.url, source.headers)
    return given, source


def look(source: main.Source) -> tuple[Any, str]:
    """The answer of the source, and what its header Link names as the next page."""
    file, link = Path(source.url).expanduser(), ""
    with tempfile.TemporaryDirectory() as folder:
        if main.is_http(source.url):
            file, request = Path(folder, "answer"), main.Request(source.url, source.body)
            with main.http_session(source.headers) as session:
                hasty = replace(source, next="Link", max_wait=5)
                link = main.download(session, request, file, hasty, {})
        if main.is_one_object(file):
            return main.read_answer(file, "the source"), link
        return list(chain.from_iterable(main.read_records(file))), link


def find_records(answer: Any, source: main.Source) -> tuple[str, list[Record]]:
    """The path of the array of records, "" where the answer is one or is itself the record.

    Raises PipelineError where there are no records.
    """
    found = [(p, v) for p, v in values_in(answer) if isinstance(v, list) and p != ("errors",)]
    arrays = [(p, v) for p, v in found if v and all(isinstance(record, dict) for record in v)]
    empty = [main.join_path(path) for path, value in found if not value]
    if source.records or isinstance(answer, list):
        path, records = source.records, main.records_of(answer, source, "the source")
    elif arrays:
        names, records = max(arrays, key=lambda array: (array[0][-1] in USUAL, len(array[1])))
        path = main.join_path(names)
    elif empty and "id" not in answer:
        path, records = " or ".join(empty), []
    else:
        path, records = "", main.records_of(answer, source, "it") if source.body else [answer]
    if not records:
        raise main.PipelineError(f"{path or 'the array'} is empty; a draft needs records")
    return path, records


def find_next(answer: Any, link: str, body: str) -> dict[str, str]:
    """The settings for the next page; {} where it is not sure what they are."""
    if link:
        return {"next": "Link"}
    for path, value in values_in(answer):
        name = path[-2] if path[-1] == "href" else path[-1]
        is_url = isinstance(value, str) and re.match(r"https?://|[/?]", value)
        if (name == "next" and value is None) or (name.lower().startswith("next") and is_url):
            return {"next": main.join_path(path)}
    if body and "options" in json.loads(body) and "nextPage" in answer:
        return {"next": "nextPage", "next_param": "options.page"}
    if isinstance(main.dig(answer, ("response_metadata", "next_cursor")), str):
        return {"next": "response_metadata.next_cursor", "next_param": "cursor"}
    return {}


def paging_names(answer: Any) -> list[str]:
    """What may tell of pages in a way that is not sure."""
    paths = [main.join_path(p) for p, value in values_in(answer) if not isinstance(value, list)]
    return [path for path in paths if re.search("next|page|cursor|more|offset|token", path, re.I)]


def paging_comment(answer: Any, records: Sequence[Record], source: main.Source) -> str:
    """What to ask the API's guide where no next page was found; "" where nothing tells of one."""
    number = len(records)
    totals = [
        (value, as_yaml(main.join_path(path)))
        for path, value in values_in(answer)
        if type(value) is int and value > number and re.search(TOTAL, plain_name(path))
    ]
    names = ", ".join(map(as_yaml, paging_names(answer)))
    hint = f"next and next_param? There is: {names}" if names else ""
    if totals and records[0] is not answer:
        total, path = max(totals)
        return f"<-- {number} of {total} records came ({path}): {hint or 'next and next_param?'}"
    asked = re.findall(r"\d+", f"{urlsplit(source.url).query} {source.body}")
    is_full = number in PAGES or (number > 1 and str(number) in asked)
    return hint or "<-- no next page was seen: are these records all?" * is_full


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
        is_number = all(re.fullmatch(NUMBER, text, re.ASCII) for text in values)
        others = [exact(values)] if is_number and "." in "".join(values) else TIMES
        type_, comment = first_fit(values, *others, texts)
        if type_ == "timestamptz" and not all(text.endswith("Z") for text in values):
            return texts, "as a timestamptz it would lose its offset"
        return type_, f"longest {longest} bytes" if type_ == texts else comment
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
    scale = min(37, max(len(fraction) for _, _, fraction in parts))
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


def child_lines(table: str, array: Field, key: list[Field]) -> list[str]:
    """The table of an array's elements, [] where main.py could not tell them apart."""
    arrays = [found or [] for found in array.values]
    if any(0 < sum("position" in one for one in found) < len(found) for found in arrays):
        return []
    parents = [number for number, found in enumerate(arrays) for _ in found]
    elements = [{"position": at} | one for found in arrays for at, one in enumerate(found, 1)]
    parent = re.sub("(?<=ch|sh|ss)es$|s$", "", re.sub("ies$", "y", table.partition(".")[2]))
    parent += "_parent" * any(parent in (*element, "value") for element in elements)
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


def draft(given: dict[str, Any], source: main.Source, answer: Any, link: str) -> str:
    """The configuration for a source that gave this answer."""
    path, records = find_records(answer, source)
    following = {} if "next" in given else find_next(answer, link, source.body)
    settings = {"url": "", "records": path} | following | given
    section = {name: text for name, text in settings.items() if text and name != "body"}
    body = ["  body: |", textwrap.indent(given["body"].strip(), " " * 4)] if source.body else []
    paging = "" if "next" in section else paging_comment(answer, records, source)
    fields = with_names(list(find_fields(records)))
    key = find_key(fields)
    stem = plain_name([Path(urlsplit(given["url"]).path).stem])
    name = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_") or "records"
    table = "public." + re.sub(r"^(?=\d)", "_", name)
    lines = [
        f"# A draft, made from {len(records)} record(s). Read it line by line, set the lines with",
        "# <--, and look at what --dry-run prints. The lengths are the longest that were seen.",
        "",
        as_yaml({"source": section}),
        *body,
        *[f"  # {paging}"] * bool(paging),
        "",
        "staging:",
        "  bucket: my-data-bucket          # <-- created beforehand",
        f"{f'  prefix: spacex/{name}':<33} # <-- begins with the stack's prefix, see conf/aws",
        "",
        "redshift:",
        "  secret: redshift/spacex         # <-- in Secrets Manager: HOST, PORT, USER, PASSWORD, …",
        "  copy_role: null                 # <-- the stack's, else as in pipeline.yaml",
        "",
        "tables:",
        *table_lines(table, fields, key, {}),
    ]
    for field in fields:
        if field.comment == "an array of objects" and key:
            child = child_lines(table, field, key)
            heading = f"\n# A row for each element of {as_yaml(main.join_path(field.path))}:"
            lines += [heading, *(f"# {line}" for line in child)] if child else []
    return "\n".join(lines) + "\n"


def run() -> int:
    """Prints the draft and returns the exit status."""
    parser = argparse.ArgumentParser(description="Print a first configuration for a JSON API.")
    parser.add_argument("source", help="a URL, a file, or a YAML file with only a source: section")
    file = parser.parse_args().source
    main.import_packages()
    try:
        given, source = read_source(file)
        sys.stdout.write(draft(given, source, *look(source)))
    except (main.PipelineError, OSError, RuntimeError, yaml.YAMLError) as error:  # of ~nobody, too
        text = f"{main.masked(file)}: {main.masked(str(error))}\n"
        parser.exit(1, main.escaped(text))
    return 0


if __name__ == "__main__":
    sys.exit(run())
